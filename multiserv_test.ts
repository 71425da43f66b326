// What multiserv promises, on Deno (deno task test) and on Node, where the same
// tests run unchanged (npm --prefix node test).
import { assert, assertEquals, assertMatch } from "jsr:@std/assert@^1";
import { spawn, spawnSync } from "node:child_process";
import { once } from "node:events";
import { readFile } from "node:fs/promises";
import { connect } from "node:net";
import { tmpdir } from "node:os";
import process from "node:process";
import type { Readable } from "node:stream";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import type { Handler, Hono } from "npm:hono@^4";
import { stream, streamSSE } from "npm:hono@^4/streaming";
import type { App, Faults } from "./multiserv.ts";
import { handler, main, newApps, serveAll, withFaults } from "./multiserv.ts";

// ---- How tests run ----------------------------------------------------------

const onDeno = navigator.userAgent.startsWith("Deno");
const isGranted = (name: "net" | "run" | "env" | "read") =>
  Deno.permissions.querySync({ name }).state === "granted";
const net = isGranted("net");
const run = net && isGranted("run") && isGranted("env") && isGranted("read");

/** What a test may need, and whether it is here. */
const needs = {
  nothing: true,
  net,
  run,
  signals: run && process.platform !== "win32",
  Linux: run && process.platform === "linux",
  script: run && spawnSync("script", ["--version"]).status === 0,
};
type Need = keyof typeof needs;
let ignored = 0;

function test(name: string, fn: () => Promise<void>, need: Need = "nothing") {
  if (needs[need]) return Deno.test({ name, fn, timeout: 8500 });
  ignored++;
  Deno.test({ name: `${name} (needs ${need})`, fn, ignore: true });
}
function denoTest(name: string, fn: () => Promise<void>, need: Need = "run") {
  if (onDeno) return test(name, fn, need);
  Deno.test({ name: `${name} (Deno only)`, fn, ignore: true });
}

/** What ends what a test has begun. */
const cleanups: (() => unknown)[] = [];
Deno.test.afterEach(async () => {
  // The last first, as each puts back what it has found.
  const ends = cleanups.splice(0).reverse().map((cleanup) => cleanup());
  // One that hangs must not hold up the tests after this one.
  const late = Promise.withResolvers<void>();
  const timer = setTimeout(late.resolve, 1000);
  await Promise.race([Promise.all(ends), late.promise]);
  clearTimeout(timer);
});

// ---- Apps and handlers ------------------------------------------------------

test("newApps makes n apps, each a router of its own", async () => {
  const apps = newApps(3);
  apps[1]!.get("/path", handler(1));
  const answers = await Promise.all(apps.map((app) => app.request("/path")));
  assertEquals(answers.map((answer) => answer.status), [404, 200, 404]);
  assertEquals((await apps[1]!.request("/path/")).status, 404);
});

/** An app that gives this answer to every request. */
const appOf = (answer: Handler) => newApps(1)[0]!.all("*", answer);
const faultyApp = (faults?: Faults) => appOf(withFaults(handler(0), faults));

/** Checks an answer in plain text. */
async function assertAnswers(response: Response, status: number, body: string) {
  assertEquals([response.status, await response.text()], [status, body]);
  assertMatch(response.headers.get("content-type") ?? "", /^text\/plain\b/);
}

test("any method and path is answered, with the status it asks for", async () => {
  const app = appOf(withFaults(handler(7)));
  const asked = { GET: 200, POST: 404, FOO: 499, HEAD: 599 };
  for (const [method, status] of Object.entries(asked)) {
    const path = `/a/%ff?status=${status}&statis=503&dealy=x`;
    const hello = method === "HEAD" ? "" : "hello from handler 7";
    await assertAnswers(await app.request(path, { method }), status, hello);
  }
});

test("a status without a body has nothing that describes one", async () => {
  const own = { "x-own": "yes" };
  const type = { "content-encoding": "br", "content-type": "text/html" };
  const headers = { ...own, ...type, "content-length": "5" };
  let dropped = 0;
  async function cancel() {
    dropped++;
    await Promise.reject(new Error("nobody shall hear of it"));
  }
  const body = () => new ReadableStream({ cancel });
  const app = appOf(withFaults(() => new Response(body(), { headers })));
  const left = { 204: own, 205: own, 304: own, 410: headers };
  for (const [status, itsHeaders] of Object.entries(left)) {
    const answer = await app.request(`/?status=${status}`);
    assertEquals(answer.status, Number(status));
    assertEquals(Object.fromEntries(answer.headers), itsHeaders);
  }
  assertEquals(dropped, 3);
});

test("a fault with a percent is for a share of the answers", async () => {
  const { random } = Math;
  cleanups.push(() => Math.random = random);
  const shares: [Faults, query: string, ...statuses: number[]][] = [
    [{ status: "500:10" }, "", 500, 500, 200, 200],
    [{ status: 500 }, "?delay=0", 500, 500, 500, 500],
    // What a request asks for wins, value by value, its percent included.
    [{ status: 500 }, "?status=501:0", 200, 200, 200, 200],
    [{ status: "500:10" }, "?status=501:100", 501, 501, 501, 501],
    [{ status: 500, delay: "60000:0" }, "?status=502:10", 502, 502, 200, 200],
  ];
  for (const [k, chance] of [0, 0.0999, 0.1, 0.9999].entries()) {
    Math.random = () => chance;
    for (const [faults, query, ...statuses] of shares) {
      const { status } = await faultyApp(faults).request(`/${query}`);
      assertEquals(status, statuses[k], `${query} at ${chance}`);
    }
  }
});

test("a delay waits as long as it says, each on its own", async () => {
  const app = faultyApp({ delay: "200:100" });
  const waits = ["?delay=60000:0", 50, "?delay=100", 150, "", 250];
  const over: typeof waits = [];
  // Timers of one process fire in their order, however late they are.
  await Promise.all(waits.map(async (wait) => {
    await (typeof wait === "number" ? sleep(wait) : app.request(`/${wait}`));
    over.push(wait);
  }));
  assertEquals(over, waits);
});

test("a delay ends when the client goes away", async () => {
  const leaving = new AbortController();
  const answer = faultyApp().request("/?delay=60000", leaving);
  leaving.abort();
  assertEquals((await answer).status, 200);
});

test("nonsense is refused in a query, an option and a command", async () => {
  const delay = "delay must be a whole number from 0 to 60000, or 2000:10";
  const status = "status must be a whole number from 200 to 599, or 503:10";
  const nonsense: [must: string, name: keyof Faults, ...values: string[]][] = [
    [delay, "delay", "", "-1", "60001", "\nline", "x:5"],
    [status, "status", "199", "600", "0.5", "503:", "503:101", "503:1:1"],
  ];
  for (const [must, name, ...values] of nonsense) {
    for (const value of values) {
      const why = `${must} for 10 percent, got ${JSON.stringify(value)}`;
      const query = new URLSearchParams({ delay: "0", [name]: value });
      await assertAnswers(await faultyApp().request(`/?${query}`), 400, why);
      const wrapped = Promise.resolve({ [name]: value }).then(faultyApp);
      assertEquals(await wrapped.catch(String), `RangeError: ${why}`);
      await assertRefused(why, "3", `--${name}=${value}`);
    }
  }
});

// @ts-expect-error TypeScript knows the form.
({ status: "503,10" }) satisfies Faults;

// ---- serveAll, and main in this process -------------------------------------

/** Serves apps until the test ends, on free ports or from one up. */
async function serving(apps: App[], port = 0) {
  const servers = await serveAll(apps, { port });
  cleanups.push(servers.shutdown);
  const url = servers.urls[0]!;
  return { ...servers, url, port: Number(new URL(url).port) };
}

/** The first of n free ports in a row, below those that clients are given. */
async function freePorts(n: number, tries = 100): Promise<number> {
  const port = 11_000 + Math.floor(Math.random() * 20_000);
  const servers = await serveAll(newApps(n), { port }).catch((error) => {
    if (tries === 0) throw error;
  });
  await servers?.shutdown();
  return servers ? port : freePorts(n, tries - 1);
}

const urlOf = (port: number) => `http://127.0.0.1:${port}`;
const get = async (url: string) => await (await fetch(url)).text();
const assertHello = async (url: string, i = 0) =>
  assertEquals(await get(url), `hello from handler ${i}`);

/** Asks until it is so; gives up when the test has ended. */
async function repeat(isSo: () => Promise<unknown>) {
  let isOver = false;
  cleanups.push(() => isOver = true);
  while (!isOver && !await isSo()) await sleep(5);
}
const untilAnswering = (url: string) => repeat(() => get(url).catch(() => ""));
const untilRefused = (port: number) =>
  repeat(() => dial(port).then(() => false, () => true));

const helloApps = (n: number) =>
  Array.from({ length: n }, (_, i) => appOf(withFaults(handler(i))));

test("app i listens on port + i, or each on a free port", async () => {
  const port = await freePorts(3);
  const { urls } = await serving(helloApps(3), port);
  assertEquals(urls, [0, 1, 2].map((i) => urlOf(port + i)));
  const free = await serving(helloApps(3));
  for (const i of [0, 1, 2]) {
    await assertHello(urls[i]!, i);
    await assertHello(free.urls[i]!, i);
  }
}, "net");

test("without options it is 127.0.0.1, from port 1024 up", async () => {
  const servers = await serveAll(newApps(1)).catch((taken) => taken);
  await servers.shutdown?.();
  const place = servers.urls?.[0] ?? servers + servers.errors[0];
  assertMatch(place, /\b127\.0\.0\.1\b.+\b1024\b/);
}, "net");

test("an app is anything that can fetch", async () => {
  const app = {
    text: "hello",
    fetch(request: Request, info: Deno.ServeHandlerInfo) {
      return new Response(`${this.text} ${request.method} ${typeof info}`);
    },
  };
  const { url } = await serving([app]);
  assertEquals(await get(url), "hello GET object");
}, "net");

// Does not compile where these are no apps.
({}) as Hono<{ Bindings: { id: string } }> satisfies App;
({}) as Deno.ServeDefaultExport satisfies App;

/** Runs a command line to its end; resolves to what it printed. */
async function runMain(...args: string[]) {
  const { log, error } = console;
  cleanups.push(() => Object.assign(console, { log, error }));
  let [stdout, stderr] = ["", ""];
  console.log = (line: string) => stdout += `${line}\n`;
  console.error = (line: string) => stderr += `${line}\n`;
  return { code: await main(args), stdout, stderr };
}

test("servers start all or none: why, a hint, exit code 1", async () => {
  const port = await freePorts(8);
  await serving(newApps(6), port + 1);
  const taken = [1, 2, 3, 4, 5]
    .map((i) => `port ${port + i} is already in use`);
  const notHere = "cannot be opened: the address is not on this machine";
  const failures: [n: string, host: string, ...lines: string[]][] = [
    ["6", "127.0.0.1", ...taken, "Try another --port"],
    ["8", "127.0.0.1", ...taken, "… and 1 more", "Try another --port"],
    ["3", "192.0.2.1", `port ${port} ${notHere}`, "Try another --hostname"],
  ];
  for (const [n, host, ...lines] of failures) {
    const title = `multiserv: No server started on "${host}"`;
    const stderr = [title, ...lines, ""].join("\n");
    const ended = await runMain("-p", `${port}`, "-H", host, n);
    assertEquals(ended, { code: 1, stdout: "", stderr });
  }
  for (const i of [0, 7]) await serving(newApps(1), port + i); // free again
  // Of a host that cannot be: the system's own words, and no hint.
  const { stderr } = await runMain("-H", "a..b", "3");
  assertMatch(stderr, /^.+ "a..b"\nport 1024 cannot be opened: .+\n$/);

  // The last port is taken by now, or was before. Another failure is worse.
  await serving(newApps(1), 65535).catch(() => {});
  const error = await serveAll(newApps(9), { port: 65535 }).catch((why) => why);
  assert(error instanceof AggregateError);
  assertMatch(`${error.errors}`, /^Error: port 65536 cannot be opened: [^,]+$/);
}, "net");

/** Checks that a command line is refused, and what it is told. */
async function assertRefused(why: string, ...args: string[]) {
  const stderr = `multiserv: ${why}\nTry --help\n`;
  const ended = await runMain(...args);
  assertEquals(ended, { code: 2, stdout: "", stderr }, args.join(" "));
}

test("wrong command lines: what is wrong, and exit code 2", async () => {
  const n = "n must be a whole number from 1 to";
  const first = "first must be a whole number from 0 to";
  const port = "port must be 0 or a whole number from 1024 to 65535, got";
  const noValue = "--verbose and --help take no value, got";
  const wrong = {
    "3 4": 'one n is enough, got "3 4"',
    "-- -3": `${n} 64512, got "-3"`,
    "64513 -p0": `${n} 64512, as ports end at 65535, got "64513"`,
    "2 -p 65535": `${n} 1, as ports end at 65535, got "2"`,
    "536 -p 60000 -f 5001": `${n} 535, as ports end at 65535, got "536"`,
    "3 -p 65000 -f 536": `${first} 535, got "536"`,
    "3 -p 1023": `${port} "1023"`,
    "3 -p 65536": `${port} "65536"`,
    "3 --port": `${port} ""`,
    "3 -H": "--hostname needs a value",
    "-v0 1": `${noValue} "0"`,
    "-hp3000": `${noValue} "p3000"`,
    "-3": 'unknown option "-3"',
    "3 --prot=5": 'unknown option "--prot=5"',
  };
  for (const [line, why] of Object.entries(wrong)) {
    await assertRefused(why, ...line.split(" "));
  }
  for (const word of ["", " 3", "abc", "3.5", "1e3", "0x10", "0"]) {
    await assertRefused(`${n} 64512, got "${word}"`, word);
  }
  await assertRefused("n is missing");
});

test("--help prints the usage, which fits into 80 columns", async () => {
  const { code, stdout, stderr } = await runMain("-vh", "3");
  assertEquals([code, stderr], [0, ""]);
  assertMatch(stdout, /^Usage: multiserv \[options\] <n>\n(.{0,80}\n)+$/);
});

// ---- Beside the bare runtime ------------------------------------------------

/** What a stream brings, and ways to wait for it. */
function received(stream: Readable) {
  let seen = "";
  stream.setEncoding("utf8").on("data", (text: string) => seen += text);
  const closed = once(stream, "close").catch(() => {});
  async function wait(isThere: () => unknown) {
    while (!isThere()) {
      if (stream.closed) throw new Error(`closed after: ${seen}`);
      await Promise.race([once(stream, "data"), closed]);
    }
    return seen;
  }
  return {
    /** Resolves when the text has come that often. */
    until: (text: string, times = 1) =>
      wait(() => seen.split(text).length > times),
    /** Resolves to the first answer, decoded. */
    answer: () => wait(() => decode(seen)).then(decode),
    /** Resolves to everything, at the end. */
    all: () => closed.then(() => seen),
  };
}

/** The status and body of an answer, or null as long as it is not whole. */
function decode(answer: string) {
  const [head = ""] = /^.+?\r\n\r\n/s.exec(answer) ?? [];
  const status = head.slice("HTTP/1.1 ".length, "HTTP/1.1 200 ".length);
  const body = answer.slice(head.length);
  if (/^transfer-encoding: chunked/im.test(head)) {
    if (!body.endsWith("0\r\n\r\n")) return null;
    const sizes = /(?:^|\r\n)[\da-f]+\r\n/;
    return status + body.slice(0, -2).split(sizes).join("");
  }
  const length = Number(/^content-length: (\d+)/im.exec(head)?.[1] ?? 0);
  return head && body.length >= length ? status + body.slice(0, length) : null;
}

/** Opens a connection that ends with the test, and sends bytes over it. */
async function dial(port: number, bytes = "") {
  const socket = connect(port, "127.0.0.1");
  cleanups.push(() => socket.destroy());
  await once(socket, "connect");
  socket.on("error", () => {}); // the other side may close it early
  socket.write(bytes);
  return { socket, ...received(socket) };
}

/** The first lines of a request. */
const head = (line: string, ...headers: string[]) =>
  [`${line} HTTP/1.1`, "host: localhost", ...headers, "\r\n"].join("\r\n");

/** A POST with a body of so many bytes. */
const post = (bytes: number, path = "/") =>
  head(`POST ${path}`, `content-length: ${bytes}`) + "x".repeat(bytes);

/** What handlers do with the body of a request. */
const readers: Record<string, Handler> = {
  "/echoes": (c) => new Response(c.req.raw.body),
  "/reads-at-once": async (c) => c.text(await c.req.text()),
  "/reads-late": async (c) => c.text(await sleep(50).then(() => c.req.text())),
  "/reads-in-parts": async (c) => {
    let length = 0;
    for await (const part of c.req.raw.body ?? []) length += part.length;
    return c.text(`${length}`);
  },
  "/streams-lazily": (c) => {
    async function* parts() {
      yield* c.req.raw.body ?? [];
    }
    return new Response(ReadableStream.from(parts()));
  },
  "/reads-when-its-answer-has-begun": (c) =>
    stream(c, async (out) => {
      await out.write("receiving ");
      await out.write(await c.req.text());
    }),
  "/reads-between-events": (c) =>
    streamSSE(c, async (out) => {
      await out.writeSSE({ data: "receiving" });
      await out.writeSSE({ data: await c.req.text() });
    }),
  "/streams-without-reading": (c) =>
    stream(c, async (out) => {
      for (let k = 0; k < 5; k++) await out.write("x".repeat(100_000));
    }),
  "/clones": async (c) =>
    c.text(await c.req.raw.clone().text() + await c.req.text()),
  "/does-not-read": (c) => c.text("too large", 413),
  "/forwards": (c) => {
    const init = { method: "POST", body: c.req.raw.body, duplex: "half" };
    return fetch(new URL("/echoes", c.req.url), init);
  },
  "/throws": (c) => c.req.text().then(() => Promise.reject(Error("oh"))),
  "/answers-204": (c) => c.req.text().then(() => c.body(null, 204)),
};

/** Uploads a body in parts; resolves to the answer. */
async function upload(port: number, path: string, parts: string[]) {
  const length = `content-length: ${parts.join("").length}`;
  const { socket, answer } = await dial(port, head(`POST ${path}`, length));
  socket.pause(); // a client that reads when it has sent
  for (const part of parts) {
    socket.write(part);
    await sleep(150);
  }
  socket.resume();
  return await answer();
}

test("a client gets what it gets from the bare runtime", async () => {
  const app = newApps(1)[0]!.onError((error, c) => c.text(error.message, 500));
  for (const [path, reader] of Object.entries(readers)) app.post(path, reader);
  const options = { hostname: "127.0.0.1", port: 0, onListen() {} };
  const bare = await Deno.serve(options, app.fetch);
  cleanups.push(() => bare.shutdown());
  const { port } = await serving([app]);
  const large = "x".repeat(100_000);
  const bodies = [[], ["x"], ["x", "x"], [large], [large, large, large]];
  const paths = Object.keys(readers);
  for (const parts of bodies) {
    await Promise.all(paths.map(async (path) => {
      const ours = upload(port, path, parts);
      const bares = upload(bare.addr.port, path, parts);
      assertEquals(await ours, await bares, `${path}: ${parts.length} parts`);
    }));
  }
}, "net");

// ---- The end ----------------------------------------------------------------

const text = "x".repeat(20_000_000);
const big: Handler = (c) => c.text(text);
let held = Promise.withResolvers<void>();
const slow: Handler = (c) => held.promise.then(() => c.text("slow"));
const streamed: Handler = (c) =>
  stream(c, async (out) => {
    await out.write("begun, ");
    await held.promise;
    await out.write("ended");
  });

/** What has begun when the end comes, what is sent then, and what comes. */
type End = { answer: Handler; sent: string; then?: string; answers?: number };
const ends: Record<string, End> = {
  "a big answer": { answer: big, sent: head("GET /") },
  "a streamed answer": { answer: streamed, sent: head("GET /") },
  "an upload whose answer is late": { answer: slow, sent: post(8_000_000) },
  "an answer before its upload": {
    answer: big,
    sent: post(9_000_000).slice(0, -8_000_000),
    then: "x".repeat(8_000_000),
  },
  "three requests in a row": {
    answer: slow,
    sent: head("GET /").repeat(3),
    answers: onDeno ? 1 : 3, // Deno lets go of what it has not begun to read
  },
  "a GET whose body stops": {
    answer: slow,
    sent: head("GET /", "content-length: 9") + "x",
    then: onDeno ? "x".repeat(8) : "", // Deno waits for the rest
  },
};

for (const [name, end] of Object.entries(ends)) {
  for (const from of ["inside", "outside"]) {
    test(`the end, from ${from} a handler, answers: ${name}`, async () => {
      held = Promise.withResolvers();
      const begun = Promise.withResolvers<void>();
      const app = appOf((c, next) => {
        begun.resolve();
        if (from === "inside") servers.shutdown();
        return end.answer(c, next);
      });
      const servers = await serving([app], await freePorts(1));
      const { socket, all } = await dial(servers.port);
      socket.pause(); // a client that is slow to read
      socket.write(end.sent);
      await begun.promise;
      if (from === "outside") await sleep(50);
      const over = [servers.shutdown(), servers.shutdown(), servers.finished];
      socket.write(end.then ?? "");
      const refused = untilRefused(servers.port).then(() => "refused");
      const first = await Promise.race([refused, ...over]);
      // Some systems take all of a big answer at once, and it is over.
      if (end.answer !== big) assertEquals(first, "refused");
      held.resolve();
      socket.resume();
      const answers = (await all()).split(/(?=HTTP\/1.1 200)/);
      assert(answers.every(decode));
      assertEquals(answers.length, end.answers ?? 1);
      await Promise.all(over);
    }, "net");
  }
}

test("no client holds up the end: silent, idle or gone", async () => {
  const servers = await serving(helloApps(1));
  const gone = await dial(servers.port, head("GET /?delay=60000"));
  const silent = await dial(servers.port);
  const idle = await dial(servers.port, head("GET /"));
  await idle.until("hello"); // so all that was sent has arrived
  gone.socket.destroy();
  await servers[Symbol.asyncDispose]();
  await Promise.all([servers.finished, silent.all(), idle.all()]);
}, "net");

// ---- The command, as a process ----------------------------------------------

const root = fileURLToPath(new URL(".", import.meta.url));
const runtime = process.execPath;
const command = onDeno
  ? [runtime, "run", "--allow-net", "multiserv.ts"]
  : [runtime, "node/multiserv.ts"];
/** Words that run a program which comes on stdin. */
const onStdin = onDeno
  ? [runtime, "run", "--allow-net", "-"]
  : [runtime, "--input-type=module", "--import=./node/hook.ts", "-"];

/** Starts words in a folder, ours by default, which end with the test. */
function start([file = "", ...args]: string[], stdin = "", cwd = root) {
  const env = { ...process.env, NO_COLOR: "1", FORCE_COLOR: undefined };
  const child = spawn(file, args, { cwd, env });
  const ended = once(child, "close");
  ended.catch(() => {}); // no such program: a test of it fails, and no other
  cleanups.push(() => child.kill("SIGKILL") && ended);
  child.stdin.on("error", () => {});
  if (stdin) child.stdin.end(stdin);
  const [stdout, stderr] = [received(child.stdout), received(child.stderr)];
  // With child.kill, Deno would call every end the signal's.
  const kill = (signal: NodeJS.Signals) => process.kill(child.pid!, signal);
  /** Resolves to how it ended. */
  async function end() {
    const [code, signal] = await ended;
    const printed = { stdout: await stdout.all(), stderr: await stderr.all() };
    return { code: code ?? signal, ...printed };
  }
  return { child, stdout, stderr, kill, end };
}

/** Words for a line of shell, in which `"$@"` are the given words. */
function inShell(line: string, words: string[]) {
  return ["sh", "-c", line, "sh", ...words];
}

/** Starts main for two servers, in a program that outlives it. */
async function startMain() {
  const port = await freePorts(2);
  const program = `
    import { main } from "./multiserv.ts";
    console.log(await main(["2", "-p", "${port}"]));
    setTimeout(() => console.log("lives on"), 100);
    setInterval(() => {}, 1000);`;
  const started = start(onStdin, program);
  await started.stdout.until("\n");
  return { port, ...started };
}

const ready = (port: number, i: number) =>
  `handler ${i} listening on ${urlOf(port + i)}\n`;
const howToStop = "Press Ctrl+C to stop\n";
const notice = "Answering requests in flight; Ctrl+C again stops now\n";

const stops = { "/": "", "/?delay=100": "", "/?delay=1500": notice };
for (const [path, said] of Object.entries(stops)) {
  test(`a signal ends it, once it has answered ${path}`, async () => {
    const { port, stdout, kill, end } = await startMain();
    const client = await dial(port + 1, head(`GET ${path}`));
    await assertHello(urlOf(port + 1), 1); // so that one has arrived
    kill("SIGINT");
    await sleep(5);
    kill("SIGTERM"); // as wrappers may send two
    await stdout.until("lives on");
    kill("SIGTERM"); // which is the system's again
    assertEquals(await end(), {
      code: "SIGTERM",
      stdout: `${ready(port, 0)}${ready(port, 1)}0\nlives on\n`,
      stderr: howToStop + said,
    });
    assertEquals(await client.answer(), "200 hello from handler 1");
  }, "signals");
}

test("Ctrl+C half a second later ends it at once", async () => {
  const { port, stderr, kill, end } = await startMain();
  await dial(port, head("GET /?delay=60000"));
  await assertHello(urlOf(port)); // so the slow request has arrived
  kill("SIGTERM");
  await stderr.until(notice);
  kill("SIGINT");
  assertEquals((await end()).code, "SIGINT");
}, "signals");

test("unread uploads leave the connection as it is", async () => {
  const { port } = await startMain();
  const { socket, until, all } = await dial(port); // one for all requests
  for (const [k, path] of ["/", "/?status=503", "/?delay=1"].entries()) {
    const request = post(3_000_000, path);
    socket.write(request.slice(0, 500));
    await sleep(50); // so not all is there
    socket.write(request.slice(500));
    await until("hello", k + 1);
  }
  // Who waits to be told may not send it at all: left to Deno, which closes.
  socket.write(head("POST /", "expect: 100-continue", "content-length: 9"));
  await until("hello", 4);
  socket.end("x".repeat(9));
  assertEquals((await all()).includes("connection: close"), onDeno);
}, "run");

test("the command's options, and a log that no request can spoil", async () => {
  const options = ["-p0", "-f3", "--status", "503", "--delay=1:100", "-v"];
  const { stdout, stderr } = start([...command, ...options, "2"]);
  const form = /^handler 3 .+\nhandler 4 listening on http:.+:(\d{4,})\n$/;
  const port = Number(form.exec(await stdout.until("\n", 2))?.[1]);
  const requests = { // with their hosts, and what is logged of them
    "http://a/c?status=599&delay=0 a": "/c?status=599&delay=0 599",
    "http://a?x=@/admin a": "/?x=@/admin 503",
    "/d a?status=503": onDeno ? "/?status=503/d 400" : "", // Node refuses it
    "/e a.1": onDeno ? "? 503" : "", // and this
    "/%1b?b=c a": "/%1b?b=c 503",
  };
  await assertHello(urlOf(port), 4);
  let expected = `${howToStop}handler 4: GET / 503 0ms\n`;
  for (const [request, logged] of Object.entries(requests)) {
    const [target, host = ""] = request.split(" ");
    const bytes = head(`GET ${target}`, "connection: close");
    const answer = await dial(port, bytes.replace("localhost", host));
    assertMatch(await answer.all(), /^HTTP\/1.1 (400|503|599) /, request);
    if (logged) expected += `handler 4: GET ${logged} 0ms\n`;
  }
  const log = await stderr.until("/%1b");
  assertEquals(log.replaceAll(/\d+ms$/gm, "0ms"), expected);
}, "run");

test("too many open files: the hint names ulimit -n", async () => {
  const line = 'ulimit -n 100; exec "$@" 200 -p0';
  const { code, stdout, stderr } = await start(inShell(line, command)).end();
  const why = "too many open files\nRaise ulimit -n or start fewer\n";
  assert(stderr.endsWith(`cannot be opened: ${why}`), stderr);
  assertEquals([code, stdout], [1, ""]);
}, "Linux");

test("a closed pipe or a full disk costs no answer", async () => {
  for (const spoil of ["", ">/dev/full 2>&1", ">&- 2>&-"]) {
    const port = await freePorts(1);
    const line = `exec "$@" 1 -v -p ${port} ${spoil}`;
    const { child, kill, end } = start(inShell(line, command));
    child.stdout.destroy(); // a closed pipe
    child.stderr.destroy();
    await untilAnswering(urlOf(port));
    await assertHello(urlOf(port));
    kill("SIGTERM");
    assertEquals((await end()).code, 0, spoil);
  }
}, "Linux");

/** Starts a program that serves an app; resolves once it listens. */
async function startServing(routes: string, words = onStdin) {
  const program = `
    import { handler, newApps, serveAll } from "./multiserv.ts";
    const app = newApps(1)[0].get("/", handler(0))${routes};
    const servers = await serveAll([app], { port: 0 });
    console.log(servers.urls[0]);
    await servers.finished;
    console.log("finished");`;
  const started = start(words, program);
  const url = (await started.stdout.until("\n")).trim();
  return { url, port: Number(new URL(url).port), ...started };
}

test("too many clients: it goes on with what it has begun", async () => {
  const routes = `.post("/", async (c) => {
    const text = await c.req.text();
    servers.shutdown();
    await new Promise((later) => setTimeout(later, 300));
    console.log("answered");
    return c.text(text);
  })`;
  const few = inShell('ulimit -n 64; exec "$@"', onStdin);
  const { url, port, end } = await startServing(routes, few);
  const upload = await dial(port, post(1000).slice(0, -900));
  const crowd = Array.from({ length: 100 }, () => connect(port, "127.0.0.1"));
  const gone = crowd.map((client) => once(client, "close").catch(() => {}));
  await Promise.race(gone); // one was refused
  for (const client of crowd) client.destroy();
  await untilAnswering(url);
  upload.socket.write("x".repeat(900));
  assertEquals(await upload.answer(), `200 ${"x".repeat(1000)}`);
  const { stdout, stderr } = await end();
  assertEquals(stdout, `${url}\nanswered\nfinished\n`);
  const said = `port ${port} is not listening: Error: Too many open files`;
  assertEquals(stderr.startsWith(said), onDeno, stderr);
}, "Linux");

// ---- What only Deno has -----------------------------------------------------

const key = "sec-websocket-key: any";
const upgrade = ["upgrade: websocket", "connection: upgrade", key];

denoTest("a server that has ended listens again, once it can", async () => {
  const routes = `.get("/end", (c) => {
    Deno.upgradeWebSocket(c.req.raw);
    return c.text("not its answer, which ends this server");
  })`;
  const { url, port, stderr, kill, end } = await startServing(routes);
  const again = `port ${port} is not listening; trying again`;
  let ends = 0;
  async function endServer() {
    await dial(port, head("GET /end", ...upgrade));
    await stderr.until(again, ++ends);
  }
  await endServer();
  await untilAnswering(url);
  let another = null; // which takes the port
  while (!another) {
    await endServer();
    another = await serving(newApps(1), port).catch(() => null);
  }
  await stderr.until(`port ${port} is not listening: `);
  await sleep(300); // with pauses that grow it tries some five times
  const tries = (await stderr.until(again)).split("not listening: ").length - 1;
  assert(tries < 12, `${tries} times`);
  await another.shutdown();
  await untilAnswering(url);
  kill("SIGKILL");
  assertEquals((await end()).stderr.split(again).length - 1, ends);
});

denoTest("asks for network access once", async () => {
  const ipv6 = await serveAll(newApps(1), { port: 0, hostname: "::1" })
    .catch(() => null);
  await ipv6?.shutdown();
  const [host, inUrl] = ipv6 ? ["::1", "[::1]"] : ["127.0.0.1", "127.0.0.1"];
  const line = `exec "${runtime}" run multiserv.ts 2 -p0 -H ${host}`;
  const { child, stdout, end } = start(["script", "-qec", line, "/dev/null"]);
  // Deno drops what is typed too early.
  const typing = setInterval(() => child.stdin.write("y\n"), 100);
  await stdout.until(`handler 1 listening on http://${inUrl}:`)
    .finally(() => clearInterval(typing));
  child.stdin.write("\x03");
  const { code, stdout: shown } = await end();
  const asked = shown.match(/requests net access to ".+"/g);
  assertEquals(asked, [`requests net access to "${inUrl}"`]);
  assertEquals(code, 0);
}, "script");

denoTest("a WebSocket is upgraded, whatever its query", async () => {
  const app = appOf(withFaults((c) => {
    const { socket, response } = Deno.upgradeWebSocket(c.req.raw);
    socket.onopen = () => socket.send("hello");
    return response;
  }));
  const { port } = await serving([app]);
  const { until } = await dial(port, head("GET /?status=503", ...upgrade));
  await until("hello");
}, "net");

denoTest("bare deno test passes, and says what needs permissions", async () => {
  // With no flag for permissions, Deno would start Deno with all of them.
  const options = ["--no-check", "--deny-ffi", "multiserv_test.ts"];
  const { code, stdout } = await start([runtime, "test", ...options]).end();
  assertEquals(code, 0, stdout);
  const [, n] = /0 failed \| (\d+) ignored/.exec(stdout) ?? [];
  assert(stdout.includes(`${n} tests need permissions: deno task test\n`));
});

// ---- What README.md shows ---------------------------------------------------

const readme = run ? await readFile(`${root}README.md`, "utf8") : "";
const blocks = readme.split("\n```").filter((_, k) => k % 2 === 1)
  .map((block) => block.slice(block.indexOf("\n") + 1)); // after its language
/** The block that has this text. */
const blockWith = (text: string) => blocks.find((b) => b.includes(text)) ?? "";

const checked = [runtime, "run", "-q", "--check", "--allow-net", "-"];

const lessonRun = "$ deno run --allow-net lesson.ts\n";
for (const k of [0, 1, 2, 3]) {
  denoTest(`lesson ${k + 1} prints what stands below it`, async () => {
    const shown = blocks.filter((block) => block.startsWith(lessonRun))[k]!;
    const lesson = blocks[blocks.indexOf(shown) - 1];
    const { stdout, stderr } = await start(checked, lesson).end();
    assertEquals([lessonRun + stdout.trimEnd(), stderr], [shown, ""]);
  });
}

denoTest("multiserv.ts alone says what README.md shows", async () => {
  const lines = [0, 1, 2].map((i) => ready(1024, i)).join("") + howToStop;
  assertEquals(readme.split(lines).length, 3); // here, and on Node
  const port = await freePorts(3);
  await serving(newApps(1), port + 1);
  const commands = [
    "multiserv.ts --help",
    "multiserv.ts three",
    "--deny-net multiserv.ts 3",
    `--allow-net multiserv.ts 3 -p ${port}`,
  ];
  const program = await readFile(`${root}multiserv.ts`, "utf8");
  // It says where to get the packages, nothing else.
  const map = `--import-map=${root}deno.json`;
  for (const line of commands) {
    const words = line.replace("multiserv.ts", "-").split(" ");
    const started = start([runtime, "run", map, ...words], program, tmpdir());
    const { stdout, stderr } = await started.end();
    const shown = `$ deno run ${line}\n${stdout}${stderr}`
      .replace(` -p ${port}`, "").replace(`${port + 1}`, "1025");
    assert(readme.includes(shown), shown);
  }
});

denoTest("idea.ts serves n, with the route that blocks it", async () => {
  const idea = blockWith("Deno.args[0]");
  const { code, stderr } = await start(checked, idea).end();
  assertEquals(code, 1);
  assert(stderr.startsWith("Usage: "), stderr);
  const port = await freePorts(3);
  const all = '  app.all("*"';
  const program = idea.replace("1024", "Number(Deno.args[1])")
    .replace(all, `${blockWith("/block")}\n${all}`);
  start([...checked, "3", `${port}`], program);
  await untilAnswering(urlOf(port));
  for (const i of [0, 1, 2]) await assertHello(urlOf(port + i), i);
  assertEquals(await get(`${urlOf(port)}/block`), "blocked for a second");
});

denoTest("fleet.ts has a slow and a flaky node", async () => {
  const port = await freePorts(20);
  const program = blockWith("newApps(20)")
    .replace("(apps)", "(apps, { port: Number(Deno.args[0]) })")
    .replace("delay: 2000", "delay: 200"); // to be quick
  await start([...checked, `${port}`], program).stdout.until("\n", 20);
  const [slow, quick] = [17, 16].map((i) => get(urlOf(port + i)));
  assertEquals(await Promise.race([slow, quick]), "hello from handler 16");
  assertEquals(await slow, "hello from handler 17");
  const ask = async () => (await dial(port + 18, head("GET /"))).answer();
  while (await ask() !== "503 hello from handler 18");
  while (await ask() !== "200 hello from handler 18");
});

denoTest("scripts of README.md leave no server behind", async () => {
  const port = await freePorts(20);
  const script = (text: string) => {
    const line = blockWith(text).replaceAll("deno run", `"${runtime}" run`)
      .replaceAll("multiserv.ts", `multiserv.ts -p ${port}`)
      .replace(/curl .* &/, "echo asked &");
    return start(inShell(line, []));
  };
  const { code, stdout } = await script("mkfifo").end();
  assertEquals([code, stdout], [0, "asked\n"]);
  const { kill, end } = script("--first 10 10");
  for (const i of [0, 19]) await untilAnswering(urlOf(port + i));
  assertEquals((await script("mkfifo").end()).code, 1); // the port is taken
  kill("SIGTERM");
  await end();
  for (const i of [0, 19]) await untilRefused(port + i);
  await serving(newApps(1), port + 10);
  assertEquals((await script("--first 10 10").end()).code, 1); // one fails
  await untilRefused(port);
}, "signals");

// ---- Benchmarks: deno task bench --------------------------------------------

/** Ways to start n servers from a port up. */
const contestants = {
  "bare Deno.serve": (n: number, port: number) =>
    Array.from({ length: n }, (_, i) => {
      const options = { hostname: "127.0.0.1", port: port + i, onListen() {} };
      return Deno.serve(options, () => new Response(`hello from handler ${i}`));
    }),
  multiserv: (n: number, port: number) => [serveAll(helloApps(n), { port })],
};

for (const [name, contestant] of Object.entries(contestants)) {
  Deno.bench(name, { group: "2000 requests" }, async (b) => {
    const port = await freePorts(1);
    const servers = await Promise.all(contestant(1, port));
    b.start();
    await Promise.all(Array.from({ length: 20 }, async () => {
      const { until } = await dial(port, head("GET /").repeat(100));
      await until("hello from handler 0", 100);
    }));
    b.end();
    await Promise.all(servers.map((server) => server.shutdown()));
  });
  Deno.bench(name, { group: "start of 10,000", n: 5, warmup: 1 }, async (b) => {
    const port = await freePorts(10_000);
    b.start();
    const servers = await Promise.all(contestant(10_000, port));
    b.end();
    await Promise.all(servers.map((server) => server.shutdown()));
  });
}

if (!run) console.log(`${ignored} tests need permissions: deno task test`);
