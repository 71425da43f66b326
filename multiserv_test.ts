// What multiserv promises, on Deno (deno task test) and on Node, where the same
// tests run unchanged (npm --prefix node test).
import {
  assert,
  assertEquals,
  assertMatch,
  assertThrows,
} from "jsr:@std/assert@^1";
import { spawn, spawnSync } from "node:child_process";
import { once } from "node:events";
import { readFile } from "node:fs/promises";
import { connect, createServer } from "node:net";
import { tmpdir } from "node:os";
import process from "node:process";
import type { Readable } from "node:stream";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import type { Handler, Hono } from "npm:hono@^4";
import { stream, streamSSE } from "npm:hono@^4/streaming";
import {
  type App,
  type Faults,
  handler,
  main,
  newApps,
  serveAll,
  withFaults,
} from "./multiserv.ts";

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
  "::1": net && await serveAll(newApps(1), { port: 0, hostname: "::1" })
    .then((servers) => servers.shutdown()).then(() => true, () => false),
};
type Need = keyof typeof needs;
let ignored = 0;

function test(name: string, fn: () => Promise<void>, need: Need = "nothing") {
  const ignore = !needs[need];
  if (ignore) ignored++;
  const itsName = ignore ? `${name} (needs ${need})` : name;
  Deno.test({ name: itsName, fn, ignore, timeout: 8500 });
}
function denoTest(name: string, fn: () => Promise<void>, need: Need = "run") {
  if (onDeno) return test(name, fn, need);
  Deno.test({ name: `${name} (Deno only)`, ignore: true, fn() {} });
}

/** What ends what a test has begun. */
const cleanups: (() => unknown)[] = [];
Deno.test.afterEach(async () => {
  const ends = cleanups.splice(0).reverse().map((cleanup) => cleanup());
  const late = once(AbortSignal.timeout(1000), "abort"); // the others may go on
  await Promise.race([Promise.all(ends), late]);
});

// ---- newApps, handler -------------------------------------------------------

test("newApps makes n apps, each a router of its own", async () => {
  const apps = newApps(3);
  apps[1]!.get("/path", handler(1));
  const statuses = (path: string) =>
    Promise.all(apps.map(async (app) => (await app.request(path)).status));
  assertEquals(await statuses("/path"), [404, 200, 404]);
  assertEquals(await statuses("/path/"), [404, 404, 404]);
});

/** Checks an answer in plain text. */
async function assertAnswers(response: Response, status: number, body: string) {
  assertEquals([response.status, await response.text()], [status, body]);
  assertMatch(response.headers.get("content-type") ?? "", /^text\/plain\b/);
}

/** An app that answers every request so. */
const appOf = (answer: Handler) => newApps(1)[0]!.all("*", answer);

test("handler answers any method and path with its number", async () => {
  const app = appOf(handler(7));
  for (const request of ["GET /", "POST /a/b/", "FOO /%ff?delay=x", "HEAD /"]) {
    const [method = "", path = ""] = request.split(" ");
    const hello = method === "HEAD" ? "" : "hello from handler 7";
    await assertAnswers(await app.request(path, { method }), 200, hello);
  }
});

// ---- withFaults -------------------------------------------------------------

const faultyApp = (faults?: Faults) => appOf(withFaults(handler(0), faults));

test("?status answers with that status, and the same body", async () => {
  for (const status of [200, 301, 404, 499, 503, 520, 529, 599]) {
    const answer = await faultyApp().request(`/a?status=${status}`);
    await assertAnswers(answer, status, "hello from handler 0");
  }
  const misspelt = await faultyApp().request("/?dealy=x&statis=404");
  await assertAnswers(misspelt, 200, "hello from handler 0");
});

test("a status without a body has nothing that describes one", async () => {
  const own = { "x-own": "yes" };
  const type = { "content-encoding": "br", "content-type": "text/html" };
  const headers = { ...own, ...type, "content-length": "5" };
  let dropped = 0;
  const cancel = () => Promise.reject(Error(`unheard of: ${++dropped}`));
  const body = () => new ReadableStream({ cancel });
  const app = appOf(withFaults(() => new Response(body(), { headers })));
  for (const [k, status] of [410, 204, 205, 304].entries()) {
    const answer = await app.request(`/?status=${status}`);
    const { body, headers: left } = answer;
    assertEquals([answer.status, body === null, dropped], [status, k > 0, k]);
    assertEquals(Object.fromEntries(left), k > 0 ? own : headers);
  }
});

test("a fault with a percent is for a share of the answers", async () => {
  const { random } = Math;
  cleanups.push(() => Math.random = random);
  const shares: [Faults, query: string, ...statuses: number[]][] = [
    [{}, "?status=503:10", 503, 503, 200],
    [{}, "?status=503:0", 200, 200, 200],
    [{ status: "500:10" }, "", 500, 500, 200],
    [{ status: 500 }, "?delay=0", 500, 500, 500],
    // What a request asks for wins, value by value, its percent included.
    [{ status: "500:10" }, "?status=501:100", 501, 501, 501],
    [{ status: 500, delay: "60000:0" }, "?status=502:10", 502, 502, 200],
  ];
  for (const [faults, query, ...expected] of shares) {
    const statuses: number[] = [];
    for (const chance of [0, 0.0999, 0.1]) {
      Math.random = () => chance;
      statuses.push((await faultyApp(faults).request(`/${query}`)).status);
    }
    assertEquals(statuses, expected, query);
  }
});

test("a delay waits as long as it says, each on its own", async () => {
  const app = faultyApp({ delay: "200:100" });
  const [now, soon, late] = ["/?delay=60000:0", "/?delay=100", "/"]
    .map((path) => app.request(path));
  // Timers of one process fire in their order, however late they are.
  const events = [now, sleep(50), soon, sleep(150), late, sleep(250)];
  const order: number[] = [];
  await Promise.all(events.map(async (event, k) => {
    await event;
    order.push(k);
  }));
  assertEquals(order, [0, 1, 2, 3, 4, 5]);
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
      assertThrows(() => faultyApp({ [name]: value }), RangeError, why);
      assertEquals(await runMain("3", `--${name}=${value}`), refused(why));
    }
  }
});

// @ts-expect-error TypeScript knows the form.
({ status: "503,10" }) satisfies Faults;

// ---- main, in this process --------------------------------------------------

/** Runs a command line to its end; resolves to what it printed. */
async function runMain(...args: string[]) {
  const { log, error } = console;
  cleanups.push(() => Object.assign(console, { log, error }));
  let [stdout, stderr] = ["", ""];
  console.log = (line: string) => stdout += `${line}\n`;
  console.error = (line: string) => stderr += `${line}\n`;
  return { code: await main(args), stdout, stderr };
}

/** What a command line that makes no sense comes to. */
function refused(why: string) {
  return { code: 2, stdout: "", stderr: `multiserv: ${why}\nTry --help\n` };
}

test("wrong command lines: what is wrong, and exit code 2", async () => {
  const no = (must: string, range: string, got: string) =>
    `${must} a whole number from ${range}, got "${got}"`;
  const noN = (got: string, range = "1 to 64512") =>
    no("n must be", range, got);
  const noPort = (got: string) => no("port must be 0 or", "1024 to 65535", got);
  const noValue = "--verbose and --help take no value, got";
  const end = "as ports end at 65535";
  const wrong: [why: string, ...args: string[]][] = [
    ["n is missing"],
    ['one n is enough, got "3 4"', "3", "4"],
    ...["", " 3", "abc", "3.5", "1e3", "0x10", "0"]
      .map((n): [string, string] => [noN(n), n]),
    [noN("-3"), "--", "-3"],
    [noN("64513", `1 to 64512, ${end}`), "64513", "-p0"],
    [noN("2", `1 to 1, ${end}`), "2", "-p", "65535"],
    [noN("536", `1 to 535, ${end}`), "536", "-p", "60000", "-f", "5001"],
    [no("first must be", "0 to 535", "536"), "3", "-p", "65000", "-f", "536"],
    [noPort("1023"), "3", "-p", "1023"],
    [noPort("65536"), "3", "-p", "65536"],
    [noPort(""), "3", "--port"],
    ["--hostname needs a value", "3", "-H"],
    [`${noValue} "0"`, "-v0", "1"],
    [`${noValue} "p3000"`, "-hp3000"],
    ['unknown option "-3"', "-3"],
    ['unknown option "--prot=5"', "3", "--prot=5"],
  ];
  for (const [why, ...args] of wrong) {
    assertEquals(await runMain(...args), refused(why), args.join(" "));
  }
});

test("--help prints the usage, which fits into 80 columns", async () => {
  const { code, stdout, stderr } = await runMain("3", "-hv");
  assertEquals([code, stderr], [0, ""]);
  assertMatch(stdout, /^Usage: multiserv \[options\] <n>\n(.{0,80}\n)+$/);
});

test("servers that cannot start: why, a hint, exit code 1", async () => {
  const port = await freePorts(6);
  await serving(newApps(6), port);
  const taken = [0, 1, 2, 3, 4]
    .map((i) => `port ${port + i} is already in use`);
  const notHere = "cannot be opened: the address is not on this machine";
  const failures: [n: string, host: string, ...lines: string[]][] = [
    ["5", "127.0.0.1", ...taken, "Try another --port"],
    ["6", "127.0.0.1", ...taken, "… and 1 more", "Try another --port"],
    ["3", "192.0.2.1", `port ${port} ${notHere}`, "Try another --hostname"],
  ];
  for (const [n, host, ...lines] of failures) {
    const title = `multiserv: No server started on "${host}"`;
    const stderr = [title, ...lines, ""].join("\n");
    const ended = await runMain("-p", `${port}`, "-H", host, n);
    assertEquals(ended, { code: 1, stdout: "", stderr });
  }
  // Of a host that cannot be: the system's own words, and no hint.
  const { stderr } = await runMain("-H", "a b", "3");
  assertMatch(stderr, /^.+ "a b"\nport 1024 cannot be opened: .+\n$/);
}, "net");

// ---- serveAll ---------------------------------------------------------------

/** Serves apps until the test ends, on free ports or from one up. */
async function serving(apps: App[], port = 0, hostname = "127.0.0.1") {
  const servers = await serveAll(apps, { port, hostname });
  cleanups.push(servers.shutdown);
  const url = servers.urls[0]!;
  return { ...servers, url, port: Number(new URL(url).port) };
}

/** The first of n free ports in a row, below those that clients are given. */
async function freePorts(n: number): Promise<number> {
  const port = 11_000 + Math.floor(Math.random() * 20_000);
  const servers = await serveAll(newApps(n), { port }).catch(() => null);
  await servers?.shutdown();
  return servers ? port : freePorts(n);
}

const urlOf = (port: number) => `http://127.0.0.1:${port}`;

const get = async (url: string) => await (await fetch(url)).text();

const assertHello = async (url: string, i = 0) =>
  assertEquals(await get(url), `hello from handler ${i}`);

/** Resolves when there is an answer. */
async function untilAnswering(url: string) {
  let isOver = false;
  cleanups.push(() => isOver = true);
  while (!isOver && !await get(url).catch(() => "")) await sleep(5);
}

const helloApps = (n: number) =>
  Array.from({ length: n }, (_, i) => appOf(withFaults(handler(i))));

test("app i listens on port + i, or each on a free port", async () => {
  const port = await freePorts(3);
  const { urls } = await serving(helloApps(3), port);
  assertEquals(urls, [0, 1, 2].map((i) => urlOf(port + i)));
  await Promise.all(urls.map(assertHello));
  const free = await serving(helloApps(3));
  await Promise.all(free.urls.map(assertHello));
}, "net");

test("all servers start or none, and the errors say why", async () => {
  const failing = (n: number, port: number) =>
    serveAll(newApps(n), { port }).catch((error) => error);
  const port = await freePorts(5);
  for (const i of [1, 3]) await serving(newApps(1), port + i);
  const error = await failing(5, port);
  assert(error instanceof AggregateError);
  const taken = (i: number) => `Error: port ${port + i} is already in use`;
  assertEquals(error.errors.map(String), [taken(1), taken(3)]);
  assertEquals(error.errors[0].cause.code, "EADDRINUSE");
  for (const i of [0, 2, 4]) await serving(newApps(1), port + i);

  // The last port is taken by now, or was before. Another failure is worse.
  await serving(newApps(1), 65535).catch(() => {});
  const { errors } = await failing(9, 65535);
  assertMatch(errors.join(), /^Error: port 65536 cannot be opened: [^,]+$/);
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
  const end = answer.indexOf("\r\n\r\n") + 2;
  const head = answer.slice(0, end).toLowerCase();
  const body = answer.slice(end);
  const status = head.slice("http/1.1 ".length).slice(0, 4);
  if (head.includes("\r\ntransfer-encoding: chunked")) {
    const parts = body.slice(0, -2).split(/\r\n[\da-f]+\r\n/); // by their sizes
    return body.endsWith("\r\n0\r\n\r\n") ? status + parts.join("") : null;
  }
  const length = Number(/\r\ncontent-length: (\d+)/.exec(head)?.[1] ?? 0);
  return body.length < 2 + length ? null : status + body.slice(2, 2 + length);
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

/** Resolves when nobody listens any more. */
async function untilRefused(port: number) {
  while (await dial(port).then(() => true, () => false)) await sleep(5);
}

/** The first lines of a request. */
const head = (line: string, ...headers: string[]) =>
  [`${line} HTTP/1.1`, "host: localhost", ...headers, "\r\n"].join("\r\n");

/** A POST with a body of so many bytes. */
const post = (bytes: number, path = "/") =>
  head(`POST ${path}`, `content-length: ${bytes}`) + "x".repeat(bytes);

const reads: Handler = async (c) => c.text(`${(await c.req.text()).length}`);

/** What handlers do with the body of a request. */
const readers: Record<string, Handler> = {
  "echoes it": (c) => new Response(c.req.raw.body), // first, for the forwarder
  "reads at once": reads,
  "reads late": (c, next) => sleep(50).then(() => reads(c, next)),
  "reads in parts, which it streams": (c) => {
    async function* parts() {
      for await (const part of c.req.raw.body ?? []) {
        await sleep(1);
        yield part;
      }
    }
    return new Response(ReadableStream.from(parts()));
  },
  "does not read": handler(0),
  "streams without reading": (c) =>
    stream(c, async (out) => {
      for (let k = 0; k < 20; k++) await out.write("x".repeat(100_000));
    }),
  "reads when its answer has begun": (c) =>
    stream(c, async (out) => {
      await out.write("receiving ");
      await out.write(await c.req.text());
    }),
  "reads between events": (c) =>
    streamSSE(c, async (out) => {
      await out.writeSSE({ data: "receiving" });
      await out.writeSSE({ data: await c.req.text() });
    }),
  "forwards it": (c) => {
    const init = { method: "POST", body: c.req.raw.body, duplex: "half" };
    return fetch(new URL("/0", c.req.url), init);
  },
  "clones it": async (c, next) => {
    await c.req.raw.clone().text();
    return reads(c, next);
  },
  "throws": (c) => c.req.text().then(() => Promise.reject(Error("oh"))),
  "answers 204": (c) => c.req.text().then(() => c.body(null, 204)),
  "answers 413": (c) => c.text("too large", 413),
};

/** Ways to send a body: its size, in how many parts, and what is between. */
const ways = [0, 5, 300_000].flatMap((size) => [
  { size, parts: 1, pause: 0 },
  { size, parts: 4, pause: 5 },
  { size, parts: 2, pause: 150 },
]);

test("a client gets what it gets from the bare runtime", async () => {
  const app = newApps(1)[0]!.onError((error, c) => c.text(error.message, 500));
  for (const [k, reader] of Object.values(readers).entries()) {
    app.post(`/${k}`, reader);
  }
  const options = { hostname: "127.0.0.1", port: 0, onListen() {} };
  const bare = await Deno.serve(options, app.fetch);
  cleanups.push(() => bare.shutdown());
  const { port } = await serving([app]);
  for (const { size, parts, pause } of ways) {
    const ask = async (port: number, path: number) => {
      const start = head(`POST /${path}`, `content-length: ${size}`);
      const { socket, answer } = await dial(port, start);
      socket.pause(); // a client that reads when it has sent
      for (let k = 0; k < parts; k++) {
        socket.write("x".repeat(size / parts + (k ? 0 : size % parts)));
        await sleep(pause);
      }
      socket.resume();
      return await answer().catch(() => "broken");
    };
    await Promise.all(
      Object.keys(readers).map(async (name, path) => {
        const ports = [port, bare.addr.port];
        const [ours, bares] = await Promise.all(ports.map((p) => ask(p, path)));
        assertEquals(ours, bares, `${name}: ${size} in ${parts} parts`);
        assertMatch(ours!, /^(200|204|413|500) /);
      }),
    );
  }
}, "net");

// ---- The end ----------------------------------------------------------------

const big = "x".repeat(20_000_000);
let held = Promise.withResolvers<void>();
const slow: Handler = (c) => held.promise.then(() => c.text("slow"));

/** What has begun when the end comes, what is sent then, and what comes. */
type End = { answer: Handler; sent: string; then?: string; answers?: number };
const ends: Record<string, End> = {
  "a big answer": { answer: (c) => c.text(big), sent: head("GET /") },
  "a streamed answer": {
    answer: (c) =>
      stream(c, async (out) => {
        await out.write("begun, ");
        await held.promise;
        await out.write("ended");
      }),
    sent: head("GET /"),
  },
  "an upload whose answer is late": { answer: slow, sent: post(8_000_000) },
  "an answer before its upload": {
    answer: (c) => c.text(big),
    sent: post(3_000_000).slice(0, -2_000_000),
    then: "x".repeat(2_000_000),
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
    test(`the end, from ${from} a handler: ${name} is whole`, async () => {
      held = Promise.withResolvers();
      const begun = Promise.withResolvers<void>();
      const app = appOf((c, next) => {
        begun.resolve();
        if (from === "inside") servers.shutdown();
        return end.answer(c, next);
      });
      const servers = await serving([app]);
      const { socket, all } = await dial(servers.port);
      socket.pause(); // a client that is slow to read
      socket.write(end.sent);
      await begun.promise;
      if (from === "outside") await sleep(50);
      const stopped = [servers.shutdown(), servers.shutdown()];
      let isOver = false;
      Promise.race([servers.finished, ...stopped]).then(() => isOver = true);
      socket.write(end.then ?? "");
      await untilRefused(servers.port);
      assert(!isOver);
      held.resolve();
      socket.resume();
      const [, ...answers] = (await all()).split("HTTP/1.1 200");
      for (const answer of answers) assert(decode(`HTTP/1.1 200${answer}`));
      assertEquals(answers.length, end.answers ?? 1);
      await Promise.all([servers.finished, ...stopped]);
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

/** Starts them in a shell, where `"$@"` is the words. */
const startInShell = (line: string, words: string[], stdin = "") =>
  start(["sh", "-c", line, "sh", ...words], stdin);

/** Starts the command on free ports; resolves when its first line has come. */
async function serve(n: number, ...args: string[]) {
  const port = await freePorts(n);
  const started = start([...command, "-p", `${port}`, ...args, `${n}`]);
  await started.stdout.until("\n");
  return { port, ...started };
}

const ready = (port: number, n: number) =>
  Array.from(
    { length: n },
    (_, i) => `handler ${i} listening on ${urlOf(port + i)}\n`,
  ).join("");
const howToStop = "Press Ctrl+C to stop\n";
const notice = "Answering requests in flight; Ctrl+C again stops now\n";

test("a signal ends it, once what is in flight is answered", async () => {
  const stops = { "/": "", "/?delay=100": "", "/?delay=1000": notice };
  for (const [path, said] of Object.entries(stops)) {
    const { port, kill, end } = await serve(10);
    const client = await dial(port + 9, head(`GET ${path}`));
    await assertHello(urlOf(port + 9), 9); // so that one has arrived
    kill("SIGTERM");
    await sleep(5);
    kill("SIGTERM"); // as some wrappers do
    const stderr = howToStop + said;
    assertEquals(await end(), { code: 0, stdout: ready(port, 10), stderr });
    assertEquals(await client.answer(), "200 hello from handler 9");
  }
}, "signals");

test("a signal that comes half a second later ends it", async () => {
  await Promise.all((["SIGINT", "SIGTERM"] as const).map(async (signal) => {
    const { port, stderr, kill, end } = await serve(1);
    const lost = await dial(port, head("GET /?delay=60000"));
    await assertHello(urlOf(port)); // so the slow request has arrived
    kill("SIGTERM");
    await stderr.until(notice);
    kill(signal);
    assertEquals((await end()).code, signal);
    assertEquals(await lost.all(), "");
  }));
}, "signals");

test("the signals are the system's again after main", async () => {
  const program = `
    import { main } from "./multiserv.ts";
    console.log(await main(["1", "-p0"]));
    setInterval(() => {}, 1000);`;
  const { stdout, kill, end } = start(onStdin, program);
  await stdout.until("listening");
  kill("SIGTERM");
  await stdout.until("\n0\n");
  kill("SIGTERM");
  assertEquals((await end()).code, "SIGTERM");
}, "signals");

test("--first, --delay, --status, and what requests ask for", async () => {
  const args = ["-p0", "-f3", "--status", "503", "--delay=300:100", "2"];
  const { stdout } = start([...command, ...args]);
  const form = /^handler 3 .+\nhandler 4 listening on http:.+:(\d+)\n$/;
  const port = Number(form.exec(await stdout.until("\n", 2))?.[1]);
  const usual = await dial(port, head("GET /any/path"));
  const asked = await dial(port, head("POST /?status=599&delay=0"));
  assertEquals(await asked.answer(), "599 hello from handler 4");
  assertEquals(await usual.answer(), "503 hello from handler 4");
}, "run");

test("unread uploads leave the connection as it is", async () => {
  const { port } = await serve(1);
  const { socket, until } = await dial(port); // the same for all requests
  for (const [k, path] of ["/", "/?status=503", "/?delay=1"].entries()) {
    const request = post(3_000_000, path);
    socket.write(request.slice(0, 500));
    await sleep(50); // so not all is there
    socket.write(request.slice(500));
    await until("hello", k + 1);
  }
}, "run");

test("-v logs path and query, and no request makes it throw", async () => {
  const { port, stderr } = await serve(1, "-v");
  const requests = [ // and their hosts
    "/a?b=c a",
    "http://a/c?status=503 a",
    "http://a?x=/admin a",
    "http://a?x=@ a",
    "//b\x7f?\x1b[31m= a",
    "/d a?status=503",
    "/e?status=503 a.1",
    "/last a",
  ];
  for (const request of requests) {
    const [target, host = ""] = request.split(" ");
    const bytes = head(`GET ${target}`, "connection: close");
    const answer = await dial(port, bytes.replace("localhost", host));
    assertMatch(await answer.all(), /^HTTP\/1.1 (200|400|503) /, request);
  }
  const [, ...log] = (await stderr.until("/last")).trimEnd().split("\n");
  const form = /^handler 0: [A-Z]+ (\?|\/[!-~]*) (200|400|503) \d+ms$/;
  for (const line of log) assertMatch(line, form);
  const logged = ["/a?b=c 200", "/c?status=503 503", "/?x=/admin 200"];
  if (onDeno) logged.push("? 503"); // of a.1, which Node refuses
  for (const what of logged) {
    assert(`${log}`.includes(`: GET ${what} `), `${log}`);
  }
}, "run");

test("too many open files: the hint names ulimit -n", async () => {
  const line = `ulimit -n 100; exec "$@" 200 -p ${await freePorts(200)}`;
  const { code, stdout, stderr } = await startInShell(line, command).end();
  const why = "too many open files\nRaise ulimit -n or start fewer\n";
  assert(stderr.endsWith(`cannot be opened: ${why}`), stderr);
  assertEquals([code, stdout], [1, ""]);
}, "Linux");

test("no output, no matter", async () => {
  const spoils = ["", ">/dev/full 2>&1", ">&- 2>&-"];
  await Promise.all(spoils.map(async (spoil) => {
    const port = await freePorts(3);
    const line = `exec "$@" 3 -v -p ${port} ${spoil}`;
    const { child, kill, end } = startInShell(line, command);
    child.stdout.destroy(); // a closed pipe
    child.stderr.destroy();
    await untilAnswering(urlOf(port));
    for (let k = 0; k < 3; k++) await assertHello(urlOf(port));
    kill("SIGTERM");
    assertEquals((await end()).code, 0, spoil);
  }));
}, "Linux");

/** Starts a program that serves an app; resolves once it listens. */
async function startServing(app: string, line = 'exec "$@"') {
  const program = `
    import { handler, newApps, serveAll } from "./multiserv.ts";
    const app = newApps(1)[0].get("/", handler(0))${app};
    const servers = await serveAll([app], { port: 0 });
    console.log(servers.urls[0]);
    await servers.finished;
    console.log("finished");
    process.exit(); // in spite of upgrades`;
  const started = startInShell(line, onStdin, program);
  const url = (await started.stdout.until("\n")).trim();
  return { url, port: Number(new URL(url).port), ...started };
}

test("too many clients: it goes on with what it has begun", async () => {
  const { url, port, end } = await startServing(
    `.post("/", async (c) => {
    const text = await c.req.text();
    servers.shutdown();
    await new Promise((later) => setTimeout(later, 300));
    console.log("answered");
    return c.text(text);
  })`,
    'ulimit -n 64; exec "$@"',
  );
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
  const { url, port, stderr, end } = await startServing(`.get("/end", (c) => {
    Deno.upgradeWebSocket(c.req.raw);
    return c.text("not its answer, which ends this server");
  }).get("/stop", (c) => {
    servers.shutdown();
    return c.text("");
  })`);
  let another = createServer();
  for (let isTaken = false; !isTaken;) { // the port, by another program
    await dial(port, head("GET /end", ...upgrade)).catch(() => {});
    another = createServer().listen(port, "127.0.0.1");
    isTaken = await once(another, "listening").then(() => true, () => false);
  }
  await stderr.until(`port ${port} is not listening: `);
  await new Promise((closed) => another.close(closed));
  await untilAnswering(url);
  const again = "is not listening; trying again";
  const times = (await stderr.until(again)).split(again).length;
  await dial(port, head("GET /end", ...upgrade));
  await stderr.until(again, times);
  await untilAnswering(url);
  await dial(port, head("GET /stop"));
  assertEquals((await end()).stdout, `${url}\nfinished\n`);
}, "signals");

denoTest("asks for network access once", async () => {
  const port = await freePorts(2);
  const host = needs["::1"] ? "[::1]" : "127.0.0.1";
  const bare = host.replace(/[[\]]/g, "");
  const line = `exec "${runtime}" run multiserv.ts 2 -p ${port} -H ${bare}`;
  const { child, stdout, end } = start(["script", "-qec", line, "/dev/null"]);
  await stdout.until("Allow?");
  // Deno drops what is typed too early.
  const typing = setInterval(() => child.stdin.write("y\n"), 100);
  await stdout.until("Granted").finally(() => clearInterval(typing));
  await stdout.until("Press Ctrl+C");
  child.stdin.write("\x03");
  const { code, stdout: shown } = await end();
  assertEquals([code, shown.split("Deno requests").length], [0, 2]);
  assert(shown.includes(`net access to "${host}"`), shown);
  assert(shown.includes(`handler 1 listening on http://${host}:${port + 1}`));
}, "script");

denoTest("multiserv.ts runs alone, with no file beside it", async () => {
  const port = await freePorts(1);
  // The import map says where to get the packages, nothing else.
  const options = ["--allow-net", `--import-map=${root}deno.json`];
  const words = [runtime, "run", ...options, "-", "1", "-p", `${port}`];
  const program = await readFile(`${root}multiserv.ts`, "utf8");
  const { stdout } = start(words, program, tmpdir());
  await stdout.until(ready(port, 1));
  await assertHello(urlOf(port));
});

denoTest("a WebSocket is upgraded, whatever its query", async () => {
  const chat: Handler = (c) => {
    const { socket, response } = Deno.upgradeWebSocket(c.req.raw);
    socket.onopen = () => socket.send("hello");
    return response;
  };
  const { url } = await serving([appOf(withFaults(chat))]);
  const socket = new WebSocket(`${url.replace("http", "ws")}?status=503`);
  const [message] = await once(socket, "message");
  assertEquals(message.data, "hello");
  socket.close();
  await once(socket, "close");
}, "net");

denoTest("who expects to be told is left to the runtime", async () => {
  const { port } = await serve(1);
  const expects = head("POST /", "expect: 100-continue", "content-length: 9");
  const { socket, until, all } = await dial(port, expects);
  await until("hello");
  socket.end("x".repeat(9));
  assertMatch(await all(), /^connection: close\r$/m);
});

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

denoTest("the command says what it shows", async () => {
  assert(readme.includes(ready(1024, 3) + howToStop));
  const port = await freePorts(3);
  await serving(newApps(1), port + 1);
  const taken = ["-p", `${port}`];
  const lines = {
    "multiserv.ts --help": [],
    "multiserv.ts three": [],
    "--deny-net multiserv.ts 3": [],
    "--allow-net multiserv.ts 3": taken,
  };
  for (const [line, unseen] of Object.entries(lines)) {
    const words = [runtime, "run", ...line.split(" "), ...unseen];
    const { stdout, stderr } = await start(words).end();
    const said = (stdout + stderr).replace(`${port + 1}`, "1025");
    assert(readme.includes(`$ deno run ${line}\n${said}`), said);
  }
});

denoTest("idea.ts serves n, and can be blocked", async () => {
  const port = await freePorts(3);
  const all = '  app.all("*"';
  const program = blockWith("Deno.args[0]").replace("1024", `${port}`)
    .replace(all, `${blockWith("/block")}\n${all}`);
  start([...checked, "3"], program);
  for (const i of [0, 1, 2]) {
    await untilAnswering(urlOf(port + i));
    await assertHello(urlOf(port + i), i);
  }
  assertEquals(await get(`${urlOf(port)}/block`), "blocked for a second");
});

denoTest("fleet.ts has a slow and a flaky node", async () => {
  const port = await freePorts(20);
  const program = blockWith("newApps(20)")
    .replace("serveAll(apps)", `serveAll(apps, { port: ${port} })`)
    .replace("delay: 2000", "delay: 200"); // to be quick
  await start(checked, program).stdout.until("\n", 20);
  const ask = async (i: number) =>
    await (await dial(port + i, head("GET /"))).answer();
  const slow = ask(17);
  while (await ask(18) !== "503 hello from handler 18");
  while (await ask(18) !== "200 hello from handler 18");
  assertEquals(await slow, "200 hello from handler 17");
});

denoTest("its scripts leave no server behind", async () => {
  const port = await freePorts(20);
  const script = (text: string) => {
    const line = blockWith(text).replaceAll("deno run", `"${runtime}" run`)
      .replaceAll("multiserv.ts", `multiserv.ts -p ${port}`)
      .replace(/curl .* &/, "echo asked &");
    return startInShell(line, []);
  };
  const { code, stdout } = await script("mkfifo").end();
  assertEquals([code, stdout], [0, "asked\n"]);
  const { kill, end } = script("--first 10 10");
  for (const i of [0, 19]) await untilAnswering(urlOf(port + i));
  assertEquals((await script("mkfifo").end()).code, 1); // the port is taken
  kill("SIGTERM");
  await end();
  for (const i of [0, 19]) await untilRefused(port + i);
}, "signals");

// ---- Benchmarks: deno task bench --------------------------------------------

/** Ways to start n servers from a port up. */
const contestants = {
  "bare Deno.serve": (n: number, port: number) =>
    Array.from({ length: n }, (_, i) => {
      const options = { hostname: "127.0.0.1", port: port + i, onListen() {} };
      return Deno.serve(options, () => new Response(`hello from handler ${i}`));
    }),
  multiserv: async (n: number, port: number) => [
    await serveAll(helloApps(n), { port }),
  ],
};

for (const [name, contestant] of Object.entries(contestants)) {
  Deno.bench(name, { group: "2000 requests" }, async (b) => {
    const port = await freePorts(1);
    const servers = await contestant(1, port);
    b.start();
    await Promise.all(Array.from({ length: 20 }, async () => {
      const { socket, until } = await dial(port, head("GET /").repeat(100));
      await until("hello from handler 0", 100);
      socket.destroy();
    }));
    b.end();
    for (const server of servers) await server.shutdown();
  });
  Deno.bench(name, { group: "start of 10,000", n: 5, warmup: 1 }, async (b) => {
    const port = await freePorts(10_000);
    b.start();
    const servers = await contestant(10_000, port);
    b.end();
    await Promise.all(servers.map((server) => server.shutdown()));
  });
}

if (!run) console.log(`${ignored} tests need permissions: deno task test`);
