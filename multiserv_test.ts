// What multiserv promises, on Deno (deno task test) and on Node, where the same
// tests run unchanged (npm --prefix node test).
import {
  assert,
  assertEquals,
  assertMatch,
  assertRejects,
  assertThrows,
} from "jsr:@std/assert@^1";
import { spawn, spawnSync } from "node:child_process";
import { once } from "node:events";
import { connect } from "node:net";
import process from "node:process";
import type { Readable } from "node:stream";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import type { Handler } from "npm:hono@^4";
import {
  type App,
  type Faults,
  handler,
  main,
  newApps,
  serveAll,
  type ServeAllOptions,
  withFaults,
} from "./multiserv.ts";

// ---- How tests run ----------------------------------------------------------

/** What ends what a test has begun, and what it waited for last. */
const cleanups: (() => unknown)[] = [];
let waitingFor = "nothing yet";

/** Makes a function like `Deno.test`, whose tests clean up and never hang. */
function testIf(allowed: boolean) {
  return (name: string, body: () => unknown) => {
    if (!allowed) ignored++;
    Deno.test({ name, ignore: !allowed, fn: () => inTime(body) });
  };
}
let ignored = 0;

async function inTime(body: () => unknown) {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const late = new Promise((_, reject) => {
    const hang = () => reject(new Error(`Hangs, waiting for ${waitingFor}`));
    timer = setTimeout(hang, 9000);
  });
  try {
    await Promise.race([body(), late]);
  } finally {
    const ends = cleanups.splice(0).reverse().map((cleanup) => cleanup());
    await Promise.race([Promise.all(ends), late]).finally(() =>
      clearTimeout(timer)
    );
  }
}

function isGranted(name: "net" | "run" | "env") {
  return Deno.permissions.querySync({ name }).state === "granted";
}
const net = isGranted("net");
const run = net && isGranted("run") && isGranted("env");
const onDeno = navigator.userAgent.startsWith("Deno");

const test = testIf(true); // needs no permission
const netTest = testIf(net);
const runTest = testIf(run); // starts the command
function denoTest(name: string, body: () => unknown, allowed = run) {
  testIf(allowed && onDeno)(`${name} (Deno only)`, body);
}

// ---- newApps, handler -------------------------------------------------------

test("newApps makes n apps, each a router of its own", async () => {
  const apps = newApps(3);
  apps[1]!.get("/path", handler(1));
  const ask = async (path: string) => {
    const answers = apps.map((app) => app.request(path));
    return (await Promise.all(answers)).map(({ status }) => status);
  };
  assertEquals(await ask("/path"), [404, 200, 404]);
  assertEquals(await ask("/path/"), [404, 404, 404]);
});

/** Checks an answer in plain text. */
async function assertAnswers(
  answer: Response | Promise<Response>,
  status: number,
  body: string,
) {
  const response = await answer;
  assertEquals([response.status, await response.text()], [status, body]);
  assertMatch(response.headers.get("content-type") ?? "", /^text\/plain\b/);
}

/** An app that answers every request. */
function appOf(answer: Handler): App & ReturnType<typeof newApps>[0] {
  return newApps(1)[0]!.all("*", answer);
}

test("handler answers any method and path with its number", async () => {
  const app = appOf(handler(7));
  for (const path of ["/", "/a/b/", "/%ff", "/?delay=x"]) {
    for (const method of ["GET", "POST", "DELETE", "OPTIONS", "FOO"]) {
      const answer = app.request(path, { method });
      await assertAnswers(answer, 200, "hello from handler 7");
    }
    await assertAnswers(app.request(path, { method: "HEAD" }), 200, "");
  }
});

// ---- withFaults -------------------------------------------------------------

const faultyApp = (faults?: Faults) => appOf(withFaults(handler(0), faults));

test("?status answers with that status, and the same body", async () => {
  for (const status of [200, 301, 404, 499, 503, 520, 529, 599]) {
    const answer = faultyApp().request(`/a?status=${status}`);
    await assertAnswers(answer, status, "hello from handler 0");
  }
});

test("what describes a body goes where the body goes", async () => {
  const headers = {
    "content-length": "5",
    "content-type": "text/html",
    "content-encoding": "br",
    "x-own": "yes",
  };
  const full = appOf(withFaults(() => new Response("hello", { headers })));
  const empty = { status: 304, headers };
  const unchanged = appOf(withFaults(() => new Response(null, empty)));
  for (
    const [app, status] of [
      [full, 204],
      [full, 205],
      [full, 304],
      [unchanged, 503],
    ] as const
  ) {
    const response = await app.request(`/?status=${status}`);
    assertEquals([response.status, response.body], [status, null]);
    assertEquals([...response.headers.keys()], ["x-own"]);
  }
  const kept = await full.request("/?status=410");
  assertEquals(Object.fromEntries(kept.headers), headers);
});

test("a status with a percent is a share of the answers", async () => {
  const { random } = Math;
  cleanups.push(() => Math.random = random);
  const shares: [Faults, query: string, ...statuses: number[]][] = [
    [{}, "?status=503:10", 503, 503, 200, 200],
    [{}, "?status=503:0", 200, 200, 200, 200],
    [{}, "?status=503:100", 503, 503, 503, 503],
    [{ status: 500, percent: 10 }, "", 500, 500, 200, 200],
    [{ status: 500 }, "?delay=0", 500, 500, 500, 500],
    // What a request asks for wins, value by value, its percent included.
    [{ status: 500, percent: 10 }, "?status=501", 501, 501, 501, 501],
  ];
  for (const [faults, query, ...expected] of shares) {
    const statuses: number[] = [];
    for (const chance of [0, 0.0999, 0.1, 0.9999]) {
      Math.random = () => chance;
      statuses.push((await faultyApp(faults).request(`/${query}`)).status);
    }
    assertEquals(statuses, expected, query);
  }
});

test("a delay waits as long as it says", async () => {
  const order: unknown[] = [];
  const app = faultyApp({ delay: 300 });
  const happenings = [
    ...[50, 150, 250, 350].map((ms) => sleep(ms, `${ms} ms`)),
    ...["", "?delay=100", "?delay=0"].map(async (query) => {
      await app.request(`/${query}`);
      return query;
    }),
  ];
  await Promise.all(
    happenings.map(async (happening) => order.push(await happening)),
  );
  // Timers of one process fire in their order, however late they are.
  assertEquals(
    order,
    ["?delay=0", "50 ms", "?delay=100", "150 ms", "250 ms", "", "350 ms"],
  );
});

test("a delay ends when the client goes away, and nothing else looks", async () => {
  for (const query of ["", "?status=503", "?delay=0"]) {
    const request = new Request(`http://localhost/${query}`);
    let looked = false; // at which Deno may print a note
    Object.defineProperty(request, "signal", { get: () => looked = true });
    await faultyApp().fetch(request);
    assertEquals(looked, false, query);
  }
  const leaving = new AbortController();
  const answer = faultyApp().request("/?delay=60000", leaving);
  leaving.abort();
  waitingFor = "the end of the delay";
  assertEquals((await answer).status, 200);
});

const range = (name: string, min: number, max: number, got: string) =>
  `${name} must be a whole number from ${min} to ${max}, got "${got}"`;
const noDelay = (got: string) => range("delay", 0, 60_000, got);
const noStatus = (got: string) => range("status", 200, 599, got);
const noPercent = (got: string) => range("percent of status", 0, 100, got);

test("a request for nonsense is answered with 400 and why", async () => {
  const nonsense: [query: string, message: string][] = [
    ["status=503&delay=", noDelay("")],
    ["delay=soon", noDelay("soon")],
    ["delay=-1", noDelay("-1")],
    ["delay=60001", noDelay("60001")],
    ["delay=1e3", noDelay("1e3")],
    ["status=", noStatus("")],
    ["status=199", noStatus("199")],
    ["status=600", noStatus("600")],
    ["status=503:", noPercent("")],
    ["status=503:101", noPercent("101")],
    ["status=503:0.5", noPercent("0.5")],
    ["status=503:10:5", noPercent("10:5")],
  ];
  for (const [query, message] of nonsense) {
    await assertAnswers(faultyApp().request(`/?${query}`), 400, message);
  }
  const other = faultyApp().request("/?dealy=1&status=200&status=x");
  await assertAnswers(other, 200, "hello from handler 0");
});

test("faults that make no sense are a RangeError at once", () => {
  const nonsense: [Faults, message: string][] = [
    [{ delay: -1 }, noDelay("-1")],
    [{ delay: 60_001 }, noDelay("60001")],
    [{ delay: NaN }, noDelay("NaN")],
    [{ status: 99 }, noStatus("99")],
    [{ status: 200.5 }, noStatus("200.5")],
    [{ status: 0 }, noStatus("0")],
    [{ status: 503, percent: 101 }, noPercent("101")],
  ];
  for (const [faults, message] of nonsense) {
    assertThrows(() => faultyApp(faults), RangeError, message);
  }
});

// ---- The command line, in this process --------------------------------------

/** Runs a command line to its end; resolves to what it printed. */
async function runMain(...args: string[]) {
  const { log, error } = console;
  const [stdout, stderr]: [string[], string[]] = [[], []];
  cleanups.push(() => Object.assign(console, { log, error }));
  console.log = (line: string) => stdout.push(line);
  console.error = (line: string) => stderr.push(line);
  waitingFor = `multiserv ${args.join(" ")}`;
  const code = await main(args);
  return { code, stdout: stdout.join("\n"), stderr: stderr.join("\n") };
}

test("wrong command lines: what is wrong, and exit code 2", async () => {
  const noN = (got: string) => range("n", 1, 64512, got);
  const noPort = (got: string) => range("port, unless 0,", 1024, 65535, got);
  const wrong: [args: string[], message: string][] = [
    [[], "n is missing"],
    [["-v"], "n is missing"],
    [["3", "4"], 'one n is enough, got "3 4"'],
    [[""], noN("")],
    [[" 3"], noN(" 3")],
    [["abc"], noN("abc")],
    [["3.5"], noN("3.5")],
    [["1e3"], noN("1e3")],
    [["0x10"], noN("0x10")],
    [["0"], noN("0")],
    [["--", "-3"], noN("-3")],
    [["64513"], noN("64513")],
    [["64513", "-p0"], noN("64513")],
    [["2", "-p", "65535"], range("n", 1, 1, "2")],
    [["536", "-p", "60000", "-f", "5001"], range("n", 1, 535, "536")],
    [["3", "-p", "80"], noPort("80")],
    [["3", "-p", "65536"], noPort("65536")],
    [["3", "--port"], noPort("")],
    [["3", "-f", "x"], range("first", 0, 64511, "x")],
    [["3", "-p", "65000", "-f", "536"], range("first", 0, 535, "536")],
    [["3", "-H"], "--hostname needs a value"],
    [["3", "--delay", "60001"], noDelay("60001")],
    [["3", "--status=99"], noStatus("99")],
    [["3", "--status", "503:x"], noPercent("x")],
    [["-3"], 'unknown option "-3"'],
    [["3", "--prot=5"], 'unknown option "--prot=5"'],
  ];
  for (const [args, message] of wrong) {
    const stderr = `multiserv: ${message}\nTry --help`;
    const expected = { code: 2, stdout: "", stderr };
    assertEquals(await runMain(...args), expected, args.join(" "));
  }
});

test("--help prints the usage, which fits into 80 columns", async () => {
  const { code, stdout, stderr } = await runMain("--help");
  assertMatch(stdout, /^Usage: multiserv \[options\] <n>\n/);
  assertEquals(stdout.split("\n").filter((line) => line.length > 80), []);
  assertEquals([code, stderr], [0, ""]);
  assertEquals((await runMain("3", "-h")).stdout, stdout);
});

netTest("servers that cannot start: why, a hint, and exit code 1", async () => {
  const { port } = await serving(newApps(6), { port: await freePorts(6) });
  const failing = async (...args: string[]) => {
    const { code, stdout, stderr } = await runMain("-p", `${port}`, ...args);
    assertEquals([code, stdout], [1, ""]);
    return stderr.split("\n");
  };
  const taken = [0, 1, 2, 3, 4].map((i) =>
    `port ${port + i} is already in use`
  );
  assertEquals(await failing("6"), [
    'multiserv: No server started on "127.0.0.1"',
    ...taken,
    "… and 1 more",
    "Try another --port",
  ]);
  const reason = "cannot be opened: the address is not on this machine";
  assertEquals(await failing("3", "-H", "192.0.2.1"), [
    'multiserv: No server started on "192.0.2.1"',
    `port ${port} ${reason}`,
    "Try another --hostname",
  ]);
  // The system's own words, and no hint.
  const [, why, ...rest] = await failing("3", "-H", "no-such-host.invalid");
  assertMatch(why ?? "", RegExp(`^port ${port} cannot be opened: .`));
  assertEquals(rest, []);
  assertEquals((await failing("3", "-H", "a b")).length, 2);
});

// ---- serveAll ---------------------------------------------------------------

/** Serves apps until the test ends. */
async function serving(apps: App[], options: ServeAllOptions = { port: 0 }) {
  const servers = await serveAll(apps, options);
  cleanups.push(servers.shutdown);
  const url = servers.urls[0]!;
  return { ...servers, url, port: portOf(url) };
}

const portOf = (url: string) => Number(new URL(url).port);
const urlOf = (port: number) => `http://127.0.0.1:${port}`;

/** The first of n free ports in a row, below those that clients are given. */
async function freePorts(n: number): Promise<number> {
  const port = 11_000 + Math.floor(Math.random() * 20_000);
  try {
    await (await serveAll(newApps(n), { port })).shutdown();
    return port;
  } catch {
    return await freePorts(n);
  }
}

async function get(url: string): Promise<string> {
  waitingFor = url;
  return await (await fetch(url)).text();
}

const helloApps = (n: number) =>
  Array.from({ length: n }, (_, i) => appOf(withFaults(handler(i))));

async function assertHello(url: string, i = 0) {
  assertEquals(await get(url), `hello from handler ${i}`);
}

/** What a stream has brought so far, and a way to wait for more of it. */
function received(stream: Readable) {
  let seen = "";
  let isOpen = true;
  stream.on("data", (data: Uint8Array) => {
    seen += new TextDecoder().decode(data);
  });
  const closed = once(stream, "close").catch(() => {}).then(() => {
    isOpen = false;
  });
  /** Resolves when the text has come that often; rejects if it never will. */
  async function until(text: string, times = 1) {
    waitingFor = `"${text}"`;
    while (seen.split(text).length <= times) {
      if (!isOpen) throw new Error(`no ${times}. "${text}" in: ${seen}`);
      await Promise.race([once(stream, "data"), closed]);
    }
  }
  return { until, closed, all: () => closed.then(() => seen) };
}

/** Opens a connection that ends with the test, and sends bytes over it. */
async function dial(port: number, bytes = "") {
  const socket = connect(port, "127.0.0.1");
  cleanups.push(() => socket.destroy());
  await once(socket, "connect");
  socket.on("error", () => {}); // the other side may close it early
  const send = (bytes: string) =>
    new Promise((sent) => socket.write(bytes, sent));
  await send(bytes);
  return { socket, send, ...received(socket) };
}

/** The first lines of a request. */
const head = (line: string, ...headers: string[]) =>
  [`${line} HTTP/1.1`, "host: localhost", ...headers, "\r\n"].join("\r\n");

/** A POST with a body of so many bytes. */
const post = (bytes: number) =>
  head("POST /", `content-length: ${bytes}`) + "x".repeat(bytes);

netTest("taken ports: all are named, nothing is left listening", async () => {
  const port = await freePorts(5);
  await serving(newApps(1), { port: port + 1 });
  await serving(newApps(1), { port: port + 3 });
  const { message, errors } = await assertRejects(
    () => serving(newApps(5), { port }),
    AggregateError,
  );
  assertEquals(message, 'No server started on "127.0.0.1"');
  assertEquals(
    errors.map((
      error: Error & { cause: { code: string } },
    ) => [error.message, error.cause.code]),
    [1, 3].map((i) => [`port ${port + i} is already in use`, "EADDRINUSE"]),
  );
  for (const i of [0, 2, 4]) await serving(newApps(1), { port: port + i });
});

netTest(
  "a failure of another kind ends the start, and stands alone",
  async () => {
    const port = 65_535; // the next one does not exist
    const { errors } = await assertRejects(
      () => serving(newApps(9), { port }),
      AggregateError,
    );
    assertEquals(errors.length, 1);
    assertMatch(errors[0].message, /^port 65536 cannot be opened: ./);
  },
);

netTest("app i listens on port + i, or each on a free port", async () => {
  const port = await freePorts(3);
  const { urls } = await serving(helloApps(3), { port });
  assertEquals(urls, [0, 1, 2].map((i) => urlOf(port + i)));
  await Promise.all(urls.map(assertHello));

  const free = await serving(helloApps(5));
  assertEquals(new Set(free.urls).size, 5);
  await Promise.all(free.urls.map(assertHello));
});

const ipv6 = net && await serveAll(newApps(1), { hostname: "::1", port: 0 })
  .then((servers) => servers.shutdown()).then(() => true, () => false);
testIf(ipv6)("IPv6 (needs ::1)", async () => {
  const { url } = await serving(helloApps(1), { hostname: "::1", port: 0 });
  assertMatch(url, /^http:\/\/\[::1\]:\d+$/);
  await assertHello(url);
});

netTest("localhost is served, whatever address it has", async () => {
  const options = { hostname: "localhost", port: 0 };
  await assertHello((await serving(helloApps(1), options)).url);
});

netTest("serves whatever has a fetch", async () => {
  class Counter {
    count = 0;
    fetch() {
      return new Response(`${++this.count}`);
    }
  }
  const { url } = await serving([new Counter()]);
  assertEquals([await get(url), await get(url)], ["1", "2"]);
});

netTest("what goes over the wire", async () => {
  const { port } = await serving(helloApps(1));
  const close = "connection: close";
  const exchanges: [bytes: string, status: number, greets: boolean][] = [
    [head("PROPFIND /", close), 200, true],
    [head("HEAD /", close), 200, false],
    [head("GET /?status=599", close), 599, true],
    [head("GET /?status=204", close), 204, false],
    ["GET / HTTP/1.0\r\n\r\n", 200, true],
  ];
  for (const [bytes, status, greets] of exchanges) {
    const answer = await (await dial(port, bytes)).all();
    assertMatch(answer, RegExp(`^HTTP/1.[01] ${status} `));
    assertEquals(answer.includes("hello from handler 0"), greets, bytes);
  }
});

netTest("bodies nobody reads: answered, on the same connection", async () => {
  const late: Handler = async (c) => {
    await sleep(1);
    return c.text("hello");
  };
  for (const app of [...helloApps(1), appOf(late)]) {
    const { port } = await serving([app]);
    const { send, until } = await dial(port);
    for (const n of [1, 2, 3]) {
      send(post(3_000_000));
      await until("hello", n);
    }
  }
});

netTest("a body that is read, or sent back, is whole", async () => {
  const read = appOf(async (c) => c.text(await c.req.text()));
  const echo = appOf((c) => new Response(c.req.raw.body));
  const answersFirst = Promise.withResolvers<string>();
  const later = appOf((c) => {
    c.req.text().then(answersFirst.resolve, answersFirst.reject);
    return c.text("accepted", 202);
  });
  const { urls, port: _ } = await serving([read, echo]);
  const body = "x".repeat(3_000_000);
  for (const url of urls) {
    const response = await fetch(url, { method: "POST", body });
    assert(await response.text() === body);
  }
  const { port } = await serving([later]);
  const request = post(1000);
  const { send, until } = await dial(port, request.slice(0, -900));
  await until("accepted");
  await send(request.slice(-900));
  waitingFor = "the rest of the body";
  assertEquals((await answersFirst.promise).length, 1000);
});

netTest("a client that has left holds up no shutdown", async () => {
  const arrived = Promise.withResolvers<void>();
  const app = appOf(withFaults(handler(0)));
  const fetch = (request: Request) => {
    arrived.resolve();
    return app.fetch(request);
  };
  const { port, shutdown } = await serving([{ fetch }]);
  const { socket } = await dial(port, head("GET /?delay=60000"));
  await arrived.promise;
  socket.destroy();
  waitingFor = "shutdown";
  await shutdown();
});

netTest("shutdown answers what is in flight and lets nobody in", async () => {
  const arrived = Promise.withResolvers<void>();
  const release = Promise.withResolvers<void>();
  cleanups.push(release.resolve);
  const slow = appOf(async (c) => {
    arrived.resolve();
    await release.promise;
    return c.text("at last");
  });
  const apps = [slow, ...helloApps(1)];
  const servers = await serving(apps, { port: await freePorts(2) });
  const answer = get(servers.url);
  await arrived.promise;
  const done: string[] = [];
  const ends = [
    servers.shutdown().then(() => done.push("shutdown")),
    servers.shutdown(), // again
    servers.finished.then(() => done.push("finished")),
  ];
  await untilListening(servers.port, false);
  await untilListening(servers.port + 1, false);
  assertEquals(done, []);
  release.resolve();
  assertEquals(await answer, "at last");
  waitingFor = "shutdown and finished";
  await Promise.all(ends);
  await servers.shutdown();
});

/** Waits until somebody listens, or nobody does any more. */
async function untilListening(port: number, expected = true) {
  waitingFor = `port ${port} to listen: ${expected}`;
  const accepts = () => dial(port).then(() => true, () => false);
  while (await accepts() !== expected) await sleep(5);
}

netTest("silent and kept-alive connections hold up no end", async () => {
  const { port, ...servers } = await serving(helloApps(2));
  const idle = await dial(port, head("GET /"));
  await idle.until("hello");
  const silent = await dial(portOf(servers.urls[1]!));
  waitingFor = "the end of idle connections";
  await servers[Symbol.asyncDispose]();
  await Promise.all([servers.finished, idle.closed, silent.closed]);
});

// ---- The command, as a process ----------------------------------------------

const here = fileURLToPath(new URL(".", import.meta.url));
const runtime = process.execPath;

/** The words that run `multiserv` with these arguments. */
function multiserv(...args: string[]): string[] {
  return onDeno
    ? [runtime, "run", "--allow-net", "multiserv.ts", ...args]
    : [runtime, "node/multiserv.ts", ...args];
}

/** Starts a command in the repository, which ends with the test. */
function start([file = "", ...args]: string[], stdin: string | null = "") {
  const env = { ...process.env, NO_COLOR: "1", FORCE_COLOR: undefined };
  const child = spawn(file, args, { cwd: here, env });
  const ended = once(child, "close");
  cleanups.push(() => child.kill("SIGKILL") && ended);
  if (stdin !== null) child.stdin.end(stdin); // or else, type there
  const [stdout, stderr] = [received(child.stdout), received(child.stderr)];
  /** Resolves, after the signal if one is given, to how it ended. */
  async function end(signal?: NodeJS.Signals) {
    // With child.kill, Deno would call every end the signal's.
    if (signal) process.kill(child.pid!, signal);
    waitingFor = `the end of ${file} ${args.join(" ")}`;
    const [code, by] = await ended;
    const printed = { stdout: await stdout.all(), stderr: await stderr.all() };
    return { code: code ?? by, ...printed };
  }
  return { child, stdout, stderr, end };
}

/** Starts a command; resolves to its first server's port when n are ready. */
async function startReady(n: number, words: string[], stdin?: string) {
  const started = start(words, stdin);
  await started.stdout.until("\n", n).catch(async () => {
    throw new Error(await started.stderr.all());
  });
  return started;
}

/** The same in a shell, where `"$@"` is the command. */
const inShell = (
  line: string,
  words: string[],
) => ["sh", "-c", line, "sh", ...words];

const ready = (port: number, n: number, first = 0) =>
  Array.from({ length: n }, (_, k) => first + k)
    .map((i) => `handler ${i} listening on ${urlOf(port + i)}\n`).join("");

runTest(
  "serves, and answers what is in flight when it is told to stop",
  async () => {
    const port = await freePorts(50);
    const words = multiserv("50", "-p", `${port}`);
    const { end } = await startReady(50, words);
    const slow = await Promise.all(
      Array.from(
        { length: 50 },
        (_, i) => dial(port + i, head("GET /?delay=1000")),
      ),
    );
    for (const i of [0, 49]) {
      await assertHello(urlOf(port + i), i);
    }
    const { code, stdout, stderr } = await end("SIGTERM");
    assertEquals([code, stdout], [0, ready(port, 50)]);
    const notice = "Answering requests in flight; Ctrl+C again stops now";
    assertEquals(stderr, `Press Ctrl+C to stop\n${notice}\n`);
    for (const [i, { all }] of slow.entries()) {
      assert((await all()).endsWith(`\r\n\r\nhello from handler ${i}`));
    }
  },
);

runTest(
  "a signal that comes twice at once is one, a later one ends it",
  async () => {
    const port = await freePorts(1);
    for (const signal of ["SIGINT", "SIGTERM"] as const) {
      const words = multiserv("1", "-p", `${port}`, "--delay", "1500");
      const { child, end, stderr } = await startReady(1, words);
      const { all } = await dial(port, head("GET /"));
      await dial(port, head("GET /?delay=0")).then(({ until }) =>
        until("hello")
      );
      for (let k = 0; k < 3; k++) process.kill(child.pid!, signal);
      await stderr.until("Ctrl+C again");
      if (signal === "SIGINT") {
        assertEquals((await end()).code, 0);
        assert((await all()).endsWith("hello from handler 0"));
      } else {
        assertEquals((await end(signal)).code, signal);
        assertEquals(await all(), "");
      }
    }
  },
);

runTest(
  "--first, --delay and --status, and what requests ask for",
  async () => {
    const port = await freePorts(5) - 3;
    const args = ["-f3", "-p", `${port}`, "--status", "503", "--delay=1"];
    const words = multiserv("2", ...args);
    const { end } = await startReady(2, words);
    for (const i of [3, 4]) {
      const url = `${urlOf(port + i)}/any/path`;
      await assertAnswers(fetch(url), 503, `hello from handler ${i}`);
      const asked = fetch(`${url}?status=200`);
      await assertAnswers(asked, 200, `hello from handler ${i}`);
    }
    const { stdout } = await end("SIGINT"); // the first line may be all it knows
    assertEquals(stdout, ready(port, 2, 3));
  },
);

runTest("-v logs path and query, and no request makes it throw", async () => {
  const port = await freePorts(1);
  const { end } = await startReady(1, multiserv("1", "-vp", `${port}`));
  const requests: [bytes: string, logged: RegExp | null][] = [
    ["GET /a?b=c HTTP/1.1\r\nhost: a", /\/a\?b=c 200/],
    ["GET //b\x7f?\x1b[31m= HTTP/1.1\r\nhost: a", null],
    ["GET http://a/c?status=503 HTTP/1.1\r\nhost: a", /\/c\?status=503 503/],
    ["GET http://a?x=/admin HTTP/1.1\r\nhost: a", /\/\?x=\/admin 200/],
    ["GET /d HTTP/1.1\r\nhost: a?status=503", null],
    ["GET /e?status=503 HTTP/1.1\r\nhost: a.1", null],
    ["POST /f HTTP/1.1\r\nhost: 256.1.1.1", null],
    ["GET http://u:p@h/?delay=1 HTTP/1.1\r\nhost: a", null],
    ["POST http://u:p@h/ HTTP/1.1\r\nhost: a", null],
    ["TRACE /?delay=1 HTTP/1.1\r\nhost: a", null],
  ];
  for (const sign of "@%[^<") {
    const line = `GET http://a?x=${sign} HTTP/1.1\r\nhost: a`;
    requests.push([line, null]);
  }
  for (const [bytes] of requests) {
    const { all } = await dial(port, `${bytes}\r\nconnection: close\r\n\r\n`);
    assertMatch(await all(), /^HTTP\/1.1 (200|400|503) |^$/, bytes);
  }
  const { stderr } = await end("SIGTERM");
  const [hint, ...lines] = stderr.trimEnd().split("\n");
  assertEquals(hint, "Press Ctrl+C to stop");
  const form = /^handler 0: [A-Z]+ (\?|\/[!-~]*) (200|400|503) \d+ms$/;
  for (const line of lines) assertMatch(line, form);
  for (const [bytes, logged] of requests) {
    if (logged) assert(lines.some((line) => logged.test(line)), bytes);
  }
});

runTest("too many open files: the hint names ulimit -n", async () => {
  const words = multiserv("200", "-p", `${await freePorts(200)}`);
  const { code, stdout, stderr } = await start(
    inShell('ulimit -n 100; exec "$@"', words),
  ).end();
  assertEquals([code, stdout], [1, ""]);
  const reason = "cannot be opened: too many open files";
  const hint = "Raise ulimit -n or start fewer";
  assertMatch(
    stderr,
    RegExp(`^multiserv: .*\nport \\d+ ${reason}\n${hint}\n$`),
  );
});

/** Starts a program that serves an app with a GET, and what is added to it. */
function startApp(port: number, added: string, shell = ":") {
  const module = onDeno ? "./multiserv.ts" : "./node/multiserv.ts";
  const program = `
    import { handler, newApps, serveAll } from "${module}";
    const [app] = newApps(1);
    app.get("/", handler(0));
    ${added}
    await serveAll([app], { port: ${port} });
    console.log("ready");`;
  const words = onDeno
    ? [runtime, "run", "--allow-net", "-"]
    : [runtime, "--input-type=module", "-"];
  return startReady(1, inShell(`${shell}; exec "$@"`, words), program);
}

runTest("too many clients: it goes on, and so do uploads", async () => {
  const port = await freePorts(1);
  const upload = 'app.post("/", async (c) => c.text(await c.req.text()));';
  await startApp(port, upload, "ulimit -n 64");
  const request = post(1000);
  const { send, until } = await dial(port, request.slice(0, -900));
  const crowd = Array.from({ length: 100 }, () => connect(port, "127.0.0.1"));
  const gone = crowd.map((client) => once(client, "close").catch(() => {}));
  waitingFor = "a client to be refused";
  await Promise.race(gone);
  for (const client of crowd) client.destroy();
  await send(request.slice(-900));
  await until("x".repeat(1000));
  let answer: string | undefined;
  while (!answer) answer = await get(urlOf(port)).catch(() => undefined);
  assertEquals(answer, "hello from handler 0");
});

runTest("stops at once for who has read but one line", async () => {
  const words = multiserv("20", "-p", `${await freePorts(20)}`);
  const { end } = await startReady(1, words);
  assertEquals((await end("SIGTERM")).code, 0);
});

/** Whether the machine has what a shell command looks for. */
function has(line: string): boolean {
  return run && spawnSync("sh", ["-c", line]).status === 0;
}

const unwritable = "output that cannot be written changes nothing";
testIf(has("test -c /dev/full"))(
  `${unwritable} (needs /dev/full)`,
  async () => {
    for (const spoil of ["closed pipes", ">/dev/full 2>&1", ">&- 2>&-"]) {
      const port = await freePorts(1);
      const words = multiserv("1", "-v", "-p", `${port}`);
      const isPipe = spoil === "closed pipes";
      const { child, end } = start(
        isPipe ? words : inShell(`exec "$@" ${spoil}`, words),
      );
      if (isPipe) child.stdout.destroy();
      if (isPipe) child.stderr.destroy();
      await untilListening(port);
      for (let k = 0; k < 3; k++) await assertHello(urlOf(port));
      assertEquals((await end("SIGTERM")).code, 0, spoil);
    }
  },
);

// ---- What only Deno has -----------------------------------------------------

denoTest("without permission: the flag to add, and exit code 1", async () => {
  const port = await freePorts(2);
  // With no flag for permissions, Deno would start Deno with all of them.
  const words = [runtime, "run", "--deny-ffi", "multiserv.ts"];
  const { code, stdout, stderr } = await start([...words, "2", "-p", `${port}`])
    .end();
  const said = [
    'multiserv: No server started on "127.0.0.1"',
    `port ${port} cannot be opened: no network access`,
    "Allow it: deno run --allow-net\n",
  ];
  assertEquals([code, stdout, stderr], [1, "", said.join("\n")]);
});

const asks = "asks for network access once (needs script)";
denoTest(asks, async () => {
  const port = await freePorts(2);
  const line = `exec "${runtime}" run multiserv.ts 2 -p ${port}`;
  const { child, stdout, end } = start(
    ["script", "-qec", line, "/dev/null"],
    null,
  );
  await stdout.until("Allow?");
  // Deno drops what is typed too early.
  const typing = setInterval(() => child.stdin.write("y\n"), 100);
  await stdout.until("Granted").finally(() => clearInterval(typing));
  await stdout.until("Press Ctrl+C");
  child.stdin.write("\x03");
  const { code, stdout: shown } = await end();
  assertEquals([code, shown.split("Deno requests").length], [0, 2]);
}, has("command -v script"));

denoTest("multiserv.ts alone runs from an empty folder", async () => {
  const port = await freePorts(1);
  // The import map says where to get the packages, nothing else.
  const line = `map=$PWD/deno.json; folder=$(mktemp -d)
    trap 'rm -r "$folder"' EXIT
    cp multiserv.ts "$folder" && cd "$folder" &&
    "$1" run --allow-net --import-map="$map" multiserv.ts 1 -p ${port} &
    servers=$!; trap 'kill $servers' TERM; wait; wait $servers`;
  const { end } = await startReady(1, inShell(line, [runtime]));
  await assertHello(urlOf(port));
  assertEquals((await end("SIGTERM")).stdout, ready(port, 1));
});

denoTest("a WebSocket is upgraded, whatever its query", async () => {
  const chat: Handler = (c) => {
    const { socket, response } = Deno.upgradeWebSocket(c.req.raw);
    socket.onopen = () => socket.send("hello");
    return response;
  };
  const { url } = await serving([appOf(withFaults(chat))]);
  for (const query of ["?token=abc", "?status=503"]) {
    const socket = new WebSocket(url.replace("http", "ws") + query);
    waitingFor = `a WebSocket with ${query}`;
    const [message] = await once(socket, "message");
    assertEquals(message.data, "hello");
    socket.close();
    await once(socket, "close");
  }
}, net);

denoTest("a server that ended for another reason starts again", async () => {
  const port = await freePorts(1);
  const ending = `app.get("/end", (c) => {
    Deno.upgradeWebSocket(c.req.raw);
    return c.text("not its answer");
  });`;
  await startApp(port, ending);
  const key = "sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==";
  const upgrade = ["upgrade: websocket", "connection: upgrade", key];
  await dial(port, head("GET /end", ...upgrade, "sec-websocket-version: 13"));
  await untilListening(port, false);
  await untilListening(port);
  await assertHello(urlOf(port));
});

denoTest("bare deno test passes, and says what needs permissions", async () => {
  const { code, stdout } = await start([runtime, "test", "--deny-ffi"]).end();
  assertEquals(code, 0, stdout);
  const [, ignored] = /0 failed \| (\d+) ignored/.exec(stdout) ?? [];
  const line = `${ignored} tests need permissions: deno task test`;
  assert(stdout.includes(line), stdout);
});

// ---- Benchmarks: deno task bench --------------------------------------------

type Shutdown = () => Promise<unknown>;
type Serve = (n: number, port: number) => Shutdown | Promise<Shutdown>;

const contestants: Record<string, Serve> = {
  "bare Deno.serve"(n, port) {
    const servers = Array.from({ length: n }, (_, i) => {
      const options = { hostname: "127.0.0.1", port: port + i, onListen() {} };
      return Deno.serve(options, (request) => {
        if (request.method !== "GET") request.body?.cancel();
        return new Response(`hello from handler ${i}`);
      });
    });
    return () => Promise.all(servers.map((server) => server.shutdown()));
  },
  async multiserv(n, port) {
    return (await serveAll(helloApps(n), { port })).shutdown;
  },
};

for (const [name, serve] of Object.entries(contestants)) {
  const baseline = name === "bare Deno.serve";
  const requests = { "GET": head("GET /"), "POST of 1 KB": post(1024) };
  for (const [kind, bytes] of Object.entries(requests)) {
    const group = `2000 times ${kind}`; // 100 on each of 20 connections
    Deno.bench(`${group}, ${name}`, { group, baseline }, async (b) => {
      const port = await freePorts(1);
      const shutdown = await serve(1, port);
      const dialled = Array.from({ length: 20 }, () => dial(port));
      const clients = await Promise.all(dialled);
      b.start();
      await Promise.all(clients.map(async ({ send, until }) => {
        send(bytes.repeat(100));
        await until("hello from handler 0", 100);
      }));
      b.end();
      for (const cleanup of cleanups.splice(0)) cleanup();
      await shutdown();
    });
  }
  const start = { group: "start of 10,000 servers", baseline, n: 5, warmup: 1 };
  Deno.bench(`${start.group}, ${name}`, start, async (b) => {
    b.start();
    const shutdown = await serve(10_000, 20_000);
    b.end();
    await shutdown();
  });
}

if (!run) console.log(`${ignored} tests need permissions: deno task test`);
