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
import { readFile } from "node:fs/promises";
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
  withFaults,
} from "./multiserv.ts";

// ---- How tests run ----------------------------------------------------------

const onDeno = navigator.userAgent.startsWith("Deno");
const isGranted = (name: "net" | "run" | "env" | "read") =>
  Deno.permissions.querySync({ name }).state === "granted";
const net = isGranted("net");
const run = net && isGranted("run") && isGranted("env") && isGranted("read");

/** What a test has begun ends with it; what it waits for is known if it hangs. */
const cleanups: (() => unknown)[] = [];
let waitingFor = "nothing yet";
let ignored = 0;

function test(name: string, body: () => unknown, allowed = true) {
  if (!allowed) ignored++;
  Deno.test({ name, ignore: !allowed, fn: () => inTime(body) });
}
const netTest = (name: string, body: () => unknown) => test(name, body, net);
const runTest = (name: string, body: () => unknown) => test(name, body, run);
const denoTest = (name: string, body: () => unknown, allowed = run) =>
  test(`${name} (Deno only)`, body, allowed && onDeno);

async function inTime(body: () => unknown) {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const late = new Promise((_, reject) => {
    const hangs = () => reject(new Error(`Hangs, waiting for ${waitingFor}`));
    timer = setTimeout(hangs, 9000);
  });
  try {
    await Promise.race([body(), late]);
  } finally {
    const ends = cleanups.splice(0).reverse().map((cleanup) => cleanup());
    await Promise.race([Promise.all(ends), late])
      .finally(() => clearTimeout(timer));
  }
}

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
const appOf = (answer: Handler) => newApps(1)[0]!.all("*", answer);

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
    "content-encoding": "br",
    "content-length": "5",
    "content-type": "text/html",
    "x-own": "yes",
  };
  const full = appOf(withFaults(() => new Response("hello", { headers })));
  const empty = { status: 304, headers };
  const unchanged = appOf(withFaults(() => new Response(null, empty)));
  const ask = async (app: typeof full, status: number) => {
    const response = await app.request(`/?status=${status}`);
    assertEquals(response.status, status);
    return [response.body === null, Object.fromEntries(response.headers)];
  };
  for (const status of [204, 205, 304]) {
    assertEquals(await ask(full, status), [true, { "x-own": "yes" }]);
  }
  assertEquals(await ask(unchanged, 503), [true, { "x-own": "yes" }]);
  assertEquals(await ask(full, 410), [false, headers]);
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
  const app = faultyApp({ delay: 300 });
  const order: string[] = [];
  const timers = [50, 150, 250, 350].map(async (ms) => {
    await sleep(ms);
    order.push(`${ms} ms`);
  });
  const answers = ["/", "/?delay=100", "/?delay=0"].map(async (path) => {
    await app.request(path);
    order.push(path);
  });
  await Promise.all([...timers, ...answers]);
  // Timers of one process fire in their order, however late they are.
  const [zero, hundred] = ["/?delay=0", "/?delay=100"];
  const first = [zero, "50 ms", hundred, "150 ms"];
  assertEquals(order, [...first, "250 ms", "/", "350 ms"]);
});

test("a delay ends when the client goes away", async () => {
  const leaving = new AbortController();
  const answer = faultyApp().request("/?delay=60000", leaving);
  leaving.abort();
  waitingFor = "the end of the delay";
  assertEquals((await answer).status, 200);
});

/** What is said of a number that is out of its range. */
const range = (name: string, min: number, max: number, got: string) =>
  `${name} must be a whole number from ${min} to ${max}, got "${got}"`;
const noDelay = (got: string) => range("delay", 0, 60_000, got);
const noStatus = (got: string) => range("status", 200, 599, got);
const noPercent = (got: string) => range("percent of status", 0, 100, got);

const nonsense = {
  "status=503&delay=": noDelay(""),
  "delay=soon": noDelay("soon"),
  "delay=-1": noDelay("-1"),
  "delay=60001": noDelay("60001"),
  "delay=1e3": noDelay("1e3"),
  "delay=%0Aline": noDelay("\\nline"),
  "status=": noStatus(""),
  "status=199": noStatus("199"),
  "status=600": noStatus("600"),
  "status=503:": noPercent(""),
  "status=503:101": noPercent("101"),
  "status=503:0.5": noPercent("0.5"),
  "status=503:10:5": noPercent("10:5"),
};

test("a request for nonsense is answered with 400 and why", async () => {
  for (const [query, message] of Object.entries(nonsense)) {
    await assertAnswers(faultyApp().request(`/?${query}`), 400, message);
  }
  const misspelt = faultyApp().request("/?dealy=x&status=200");
  await assertAnswers(misspelt, 200, "hello from handler 0");
});

test("faults that make no sense are a RangeError at once", () => {
  const throws = (faults: Faults, message: string) =>
    assertThrows(() => faultyApp(faults), RangeError, message);
  throws({ delay: -1 }, noDelay("-1"));
  throws({ delay: 60_001 }, noDelay("60001"));
  throws({ delay: NaN }, noDelay("NaN"));
  throws({ status: 0 }, noStatus("0"));
  throws({ status: 200.5 }, noStatus("200.5"));
  throws({ status: 503, percent: 101 }, noPercent("101"));
});

// ---- main, in this process --------------------------------------------------

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
  const wrong: [message: string, ...args: string[]][] = [
    ["n is missing"],
    ["n is missing", "-v"],
    ['one n is enough, got "3 4"', "3", "4"],
    ...["", " 3", "abc", "3.5", "1e3", "0x10", "0", "64513"]
      .map((n): [string, string] => [noN(n), n]),
    [noN("-3"), "--", "-3"],
    [noN("64513"), "64513", "-p0"],
    [range("n", 1, 1, "2"), "2", "-p", "65535"],
    [range("n", 1, 535, "536"), "536", "-p", "60000", "-f", "5001"],
    [noPort("80"), "3", "-p", "80"],
    [noPort("65536"), "3", "-p", "65536"],
    [noPort(""), "3", "--port"],
    [range("first", 0, 64511, "x"), "3", "-f", "x"],
    [range("first", 0, 535, "536"), "3", "-p", "65000", "-f", "536"],
    ["--hostname needs a value", "3", "-H"],
    [noDelay("60001"), "3", "--delay", "60001"],
    [noStatus("99"), "3", "--status=99"],
    [noPercent("x"), "3", "--status", "503:x"],
    ['unknown option "-3"', "-3"],
    ['unknown option "--prot=5"', "3", "--prot=5"],
  ];
  for (const [message, ...args] of wrong) {
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

netTest("servers that cannot start: why, a hint, exit code 1", async () => {
  const port = await freePorts(6);
  await serving(newApps(6), port);
  const failing = async (...args: string[]) => {
    const { code, stdout, stderr } = await runMain("-p", `${port}`, ...args);
    assertEquals([code, stdout], [1, ""]);
    return stderr.split("\n");
  };
  const head = 'multiserv: No server started on "127.0.0.1"';
  const taken = (i: number) => `port ${port + i} is already in use`;
  const all = [head, ...[0, 1, 2, 3, 4].map(taken)];
  const hint = "Try another --port";
  assertEquals(await failing("6"), [...all, "… and 1 more", hint]);
  assertEquals(await failing("5"), [...all, hint]);
  assertEquals(await failing("3", "-H", "192.0.2.1"), [
    'multiserv: No server started on "192.0.2.1"',
    `port ${port} cannot be opened: the address is not on this machine`,
    "Try another --hostname",
  ]);
  // Of a host that nobody knows, or can: the system's own words, and no hint.
  for (const host of ["no-such-host.invalid", "a b"]) {
    const [, why, ...rest] = await failing("3", "-H", host);
    assertMatch(why ?? "", RegExp(`^port ${port} cannot be opened: .`));
    assertEquals(rest, []);
  }
});

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
  const starting = serveAll(newApps(n), { port });
  return await starting.then(async (servers) => {
    await servers.shutdown();
    return port;
  }, () => freePorts(n));
}

const urlOf = (port: number) => `http://127.0.0.1:${port}`;

async function get(url: string): Promise<string> {
  waitingFor = url;
  return await (await fetch(url)).text();
}

async function assertHello(url: string, i = 0) {
  assertEquals(await get(url), `hello from handler ${i}`);
}

const helloApps = (n: number) =>
  Array.from({ length: n }, (_, i) => appOf(withFaults(handler(i))));

/** What a stream brings, and a way to wait for it. */
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
  const all = () => closed.then(() => seen);
  return { until, closed, all, seen: () => seen };
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

/** Waits until somebody listens, or nobody does any more. */
async function untilListening(port: number, expected = true) {
  waitingFor = `port ${port} to ${expected ? "open" : "close"}`;
  const accepts = () => dial(port).then(() => true, () => false);
  while (await accepts() !== expected) await sleep(5);
}

/** The first lines of a request. */
const head = (line: string, ...headers: string[]) =>
  [`${line} HTTP/1.1`, "host: localhost", ...headers, "\r\n"].join("\r\n");

/** A POST with a body of so many bytes. */
const post = (bytes: number) =>
  head("POST /", `content-length: ${bytes}`) + "x".repeat(bytes);

netTest("taken ports: all are named, nothing is left listening", async () => {
  const port = await freePorts(5);
  await serving(newApps(1), port + 1);
  await serving(newApps(1), port + 3);
  const starting = () => serving(newApps(5), port);
  const { message, errors } = await assertRejects(starting, AggregateError);
  assertEquals(message, 'No server started on "127.0.0.1"');
  assertEquals(errors.length, 2);
  for (const [k, error] of errors.entries()) {
    const taken = `port ${port + 2 * k + 1} is already in use`;
    assertEquals([error.message, error.cause.code], [taken, "EADDRINUSE"]);
  }
  for (const i of [0, 2, 4]) await serving(newApps(1), port + i);
});

netTest("any other failure ends the start, and stands alone", async () => {
  const port = 65_535; // the last one there is, taken by now or before
  await serving(newApps(1), port).catch(() => {});
  const starting = () => serving(newApps(9), port);
  const { errors } = await assertRejects(starting, AggregateError);
  assertEquals(errors.length, 1);
  assertMatch(errors[0].message, /^port 65536 cannot be opened: ./);
});

netTest("without options it is 127.0.0.1, from port 1024 up", async () => {
  const starting = serveAll(newApps(1));
  const { urls, message, errors } = await starting.catch((error) => error);
  if (urls) {
    await (await starting).shutdown();
    assertEquals(urls, ["http://127.0.0.1:1024"]);
  } else {
    assertEquals(message, 'No server started on "127.0.0.1"');
    assertMatch(errors[0].message, /^port 1024 /);
  }
});

netTest("app i listens on port + i, or each on a free port", async () => {
  const port = await freePorts(3);
  const { urls } = await serving(helloApps(3), port);
  assertEquals(urls, [0, 1, 2].map((i) => urlOf(port + i)));
  await Promise.all(urls.map(assertHello));

  const free = await serving(helloApps(5));
  assertEquals(new Set(free.urls).size, 5);
  await Promise.all(free.urls.map(assertHello));
});

const hasIPv6 = net && await serveAll(newApps(1), { port: 0, hostname: "::1" })
  .then((servers) => servers.shutdown()).then(() => true, () => false);
test("IPv6 (needs ::1)", async () => {
  const { url } = await serving(helloApps(1), 0, "::1");
  assertMatch(url, /^http:\/\/\[::1\]:\d+$/);
  await assertHello(url);
}, hasIPv6);

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
  const exchanges: [bytes: string, status: number, greets: boolean][] = [
    [head("PROPFIND /", "connection: close"), 200, true],
    [head("HEAD /", "connection: close"), 200, false],
    [head("GET /?status=599", "connection: close"), 599, true],
    [head("GET /?status=204", "connection: close"), 204, false],
    ["GET / HTTP/1.0\r\n\r\n", 200, true],
  ];
  for (const [bytes, status, greets] of exchanges) {
    const answer = await (await dial(port, bytes)).all();
    assertMatch(answer, RegExp(`^HTTP/1.[01] ${status} `));
    assertEquals(answer.includes("hello from handler 0"), greets, bytes);
  }
});

netTest("bodies nobody reads: answered, on the same connection", async () => {
  const late: Handler = (c) => sleep(1).then(() => c.text("hello"));
  for (const app of [...helloApps(1), appOf(late)]) {
    const { port } = await serving([app]);
    const { send, until } = await dial(port);
    for (const n of [1, 2, 3]) {
      send(post(3_000_000));
      await until("hello", n);
    }
  }
});

netTest("a body that is read or sent back is whole", async () => {
  const read = appOf(async (c) => c.text(await c.req.text()));
  const echo = appOf((c) => new Response(c.req.raw.body));
  const body = "x".repeat(3_000_000);
  for (const url of (await serving([read, echo])).urls) {
    const response = await fetch(url, { method: "POST", body });
    assert(await response.text() === body);
  }
  const { promise, resolve, reject } = Promise.withResolvers<string>();
  const later = appOf((c) => {
    c.req.text().then(resolve, reject);
    return c.text("accepted");
  });
  const { port } = await serving([later]);
  const { send, until } = await dial(port, post(1000).slice(0, -900));
  await until("accepted");
  await send("x".repeat(900));
  assertEquals((await promise).length, 1000);
});

netTest("a client that has left holds up no shutdown", async () => {
  const arrived = Promise.withResolvers<void>();
  const slow = withFaults(handler(0), { delay: 60_000 });
  const app = appOf((c, next) => {
    arrived.resolve();
    return slow(c, next);
  });
  const { port, shutdown } = await serving([app]);
  const { socket } = await dial(port, head("GET /"));
  await arrived.promise;
  socket.destroy();
  waitingFor = "shutdown";
  await shutdown();
});

netTest("shutdown answers what is in flight and lets nobody in", async () => {
  const arrived = Promise.withResolvers<void>();
  const release = Promise.withResolvers<void>();
  const slow = appOf(async (c) => {
    arrived.resolve();
    await release.promise;
    return c.text("at last");
  });
  const apps = [slow, ...helloApps(1)];
  const servers = await serving(apps, await freePorts(2));
  cleanups.push(release.resolve);
  const answer = get(servers.url);
  await arrived.promise;
  const done: string[] = [];
  const ends = [
    servers.shutdown().then(() => done.push("shutdown")),
    servers.shutdown(), // again
    servers.finished.then(() => done.push("finished")),
  ];
  for (const i of [0, 1]) await untilListening(servers.port + i, false);
  assertEquals(done, []);
  release.resolve();
  assertEquals(await answer, "at last");
  waitingFor = "shutdown and finished";
  await Promise.all(ends);
  await servers.shutdown();
});

netTest("silent and kept-alive connections hold up no end", async () => {
  const servers = await serving(helloApps(1));
  const idle = await dial(servers.port, head("GET /"));
  await idle.until("hello");
  const silent = await dial(servers.port);
  waitingFor = "the end of idle connections";
  await servers[Symbol.asyncDispose]();
  await Promise.all([servers.finished, idle.closed, silent.closed]);
});

// ---- The command, as a process ----------------------------------------------

const here = fileURLToPath(new URL(".", import.meta.url));
const runtime = process.execPath;
const command = onDeno
  ? [runtime, "run", "--allow-net", "multiserv.ts"]
  : [runtime, "node/multiserv.ts"];

/** Starts words in the repository, which end with the test. */
function start([file = "", ...args]: string[], stdin: string | null = "") {
  const env = { ...process.env, NO_COLOR: "1", FORCE_COLOR: undefined };
  const child = spawn(file, args, { cwd: here, env });
  const ended = once(child, "close");
  cleanups.push(() => child.kill("SIGKILL") && ended);
  if (stdin !== null) child.stdin.end(stdin); // or else, type there
  const [stdout, stderr] = [received(child.stdout), received(child.stderr)];
  // With child.kill, Deno would call every end the signal's.
  const kill = (signal: NodeJS.Signals) => process.kill(child.pid!, signal);
  /** Resolves to how it ended. */
  async function end() {
    waitingFor = `the end of ${file} ${args.join(" ")}`;
    const [code, signal] = await ended;
    const printed = { stdout: await stdout.all(), stderr: await stderr.all() };
    return { code: code ?? signal, ...printed };
  }
  return { child, stdout, stderr, kill, end };
}

/** The same in a shell, where `"$@"` is the words. */
const inShell = (
  line: string,
  words: string[],
) => ["sh", "-c", line, "sh", ...words];

/** Starts the command on free ports; resolves when its first line has come. */
async function serve(n: number, ...args: string[]) {
  const port = await freePorts(n);
  const started = start([...command, "-p", `${port}`, ...args, `${n}`]);
  await started.stdout.until("\n").catch(async () => {
    throw new Error(await started.stderr.all());
  });
  return { port, ...started };
}

const ready = (port: number, n: number, first = 0) =>
  Array.from({ length: n }, (_, k) => first + k)
    .map((i) => `handler ${i} listening on ${urlOf(port + i)}\n`).join("");
const howToStop = "Press Ctrl+C to stop\n";
const notice = "Answering requests in flight; Ctrl+C again stops now\n";

runTest("serves, and answers what is in flight when it stops", async () => {
  const { port, stderr, kill, end } = await serve(50);
  await stderr.until(howToStop);
  const slow = Array.from({ length: 50 }, async (_, i) => {
    const { all } = await dial(port + i, head("GET /?delay=900"));
    return (await all()).split("\r\n").at(-1);
  });
  for (const i of [0, 49]) await assertHello(urlOf(port + i), i);
  kill("SIGTERM");
  const printed = { stdout: ready(port, 50), stderr: howToStop + notice };
  assertEquals(await end(), { code: 0, ...printed });
  assertEquals(
    await Promise.all(slow),
    slow.map((_, i) => `hello from handler ${i}`),
  );
});

runTest("a signal that comes twice at once is one", async () => {
  const { port, kill, end } = await serve(1, "--delay", "300");
  const answer = get(urlOf(port));
  await get(`${urlOf(port)}?delay=0`); // so the other has arrived
  for (let k = 0; k < 3; k++) kill("SIGINT");
  assertEquals(await answer, "hello from handler 0");
  assertEquals(await end(), {
    code: 0,
    stdout: ready(port, 1),
    stderr: howToStop,
  });
});

runTest("another signal, half a second later, ends it", async () => {
  for (const signal of ["SIGINT", "SIGTERM"] as const) {
    const { port, stderr, kill, end } = await serve(1);
    const lost = await dial(port, head("GET /?delay=60000"));
    await assertHello(urlOf(port));
    kill("SIGTERM");
    await stderr.until(notice);
    kill(signal);
    assertEquals((await end()).code, signal);
    assertEquals(await lost.all(), "");
  }
});

runTest("--first, --delay, --status, and what requests ask for", async () => {
  const faults = ["--status", "503", "--delay=1"];
  const { port: firstPort, kill, end } = await serve(5, "-f3", ...faults);
  for (const i of [3, 7]) {
    const url = `${urlOf(firstPort + i)}/any/path`;
    await assertAnswers(fetch(url), 503, `hello from handler ${i}`);
    const asked = fetch(`${url}?status=200`);
    await assertAnswers(asked, 200, `hello from handler ${i}`);
  }
  kill("SIGINT");
  assertEquals((await end()).stdout, ready(firstPort, 5, 3));
});

runTest("-v logs path and query, and no request makes it throw", async () => {
  const { port, stderr, kill, end } = await serve(1, "-v");
  await stderr.until(howToStop);
  const requests = [
    "GET /a?b=c HTTP/1.1\r\nhost: a",
    "GET http://a/c?status=503 HTTP/1.1\r\nhost: a",
    "GET http://a?x=/admin HTTP/1.1\r\nhost: a",
    "GET //b\x7f?\x1b[31m= HTTP/1.1\r\nhost: a",
    "GET /d HTTP/1.1\r\nhost: a?status=503",
    "GET /e?status=503 HTTP/1.1\r\nhost: a.1",
    "POST /f HTTP/1.1\r\nhost: 256.1.1.1",
    "GET http://u:p@h/?delay=1 HTTP/1.1\r\nhost: a",
    "POST http://u:p@h/ HTTP/1.1\r\nhost: a",
    "TRACE /?delay=1 HTTP/1.1\r\nhost: a",
    ...Array.from("@%[^<", (x) => `GET http://a?x=${x} HTTP/1.1\r\nhost: a`),
  ];
  for (const request of requests) {
    const bytes = `${request}\r\nconnection: close\r\n\r\n`;
    const answer = await (await dial(port, bytes)).all();
    assertMatch(answer, /^HTTP\/1.1 (200|400|503) |^$/, request);
  }
  kill("SIGTERM");
  const [, ...lines] = (await end()).stderr.trimEnd().split("\n");
  const form = /^handler 0: [A-Z]+ (\?|\/[!-~]*) (200|400|503) \d+ms$/;
  for (const line of lines) assertMatch(line, form);
  const logged = ["/a?b=c 200", "/c?status=503 503", "/?x=/admin 200"];
  for (const [k, text] of logged.entries()) {
    assert(lines[k]?.startsWith(`handler 0: GET ${text} `), lines[k]);
  }
});

runTest("too many open files: the hint names ulimit -n", async () => {
  const port = await freePorts(200);
  const words = [...command, "200", "-p", `${port}`];
  const { code, stdout, stderr } = await start(
    inShell('ulimit -n 100; exec "$@"', words),
  ).end();
  const why = "cannot be opened: too many open files";
  const hint = "Raise ulimit -n or start fewer";
  assertMatch(stderr, RegExp(`^multiserv: .*\nport \\d+ ${why}\n${hint}\n$`));
  assertEquals([code, stdout], [1, ""]);
});

/** Starts a program that serves an app; resolves to its port, and ways on. */
async function serveApp(routes: string, shell = ":") {
  const program = `
    import { handler, newApps, serveAll } from "./${command.at(-1)}";
    const [app] = newApps(1);
    app.get("/", handler(0));
    app.get("/stop", (c) => {
      servers.shutdown();
      return c.text("stopping");
    });
    ${routes}
    const servers = await serveAll([app], { port: 0 });
    console.log(servers.urls[0] + "/");
    await servers.finished;
    console.log("finished");`;
  const options = onDeno ? ["run", "--allow-net"] : ["--input-type=module"];
  const words = inShell(`${shell}; exec "$@"`, [runtime, ...options, "-"]);
  const started = start(words, program);
  await started.stdout.until("/\n");
  return { port: Number(started.stdout.seen().match(/\d+(?=\/)/)), ...started };
}

runTest("too many clients: it goes on with what it has begun", async () => {
  const { port, end } = await serveApp(
    `app.post("/", async (c) => c.text(await c.req.text()));
    app.get("/slow", async (c) => {
      await new Promise((done) => setTimeout(done, 1500));
      console.log("answered");
      return c.text("slow");
    });`,
    "ulimit -n 64",
  );
  const slow = await dial(port, head("GET /slow"));
  const { send, until } = await dial(port, post(1000).slice(0, -900));
  const crowd = Array.from({ length: 100 }, () => connect(port, "127.0.0.1"));
  const gone = crowd.map((client) => once(client, "close").catch(() => {}));
  waitingFor = "a client to be refused";
  await Promise.race(gone);
  for (const client of crowd) client.destroy();
  await send("x".repeat(900));
  await until("x".repeat(1000));
  let answer: string | undefined;
  while (!answer) answer = await get(urlOf(port)).catch(() => undefined);
  assertEquals(answer, "hello from handler 0");
  await get(`${urlOf(port)}/stop`);
  await slow.until("slow");
  assertMatch((await end()).stdout, /answered\nfinished\n$/);
});

runTest("stops at once for who has read but one line", async () => {
  const { kill, end } = await serve(20);
  kill("SIGTERM");
  assertEquals((await end()).code, 0);
});

/** Whether the machine has what a shell command looks for. */
const has = (line: string) => run && spawnSync("sh", ["-c", line]).status === 0;

test(
  "output that cannot be written changes nothing (needs /dev/full)",
  async () => {
    for (const spoil of ["", ">/dev/full 2>&1", ">&- 2>&-"]) {
      const port = await freePorts(1);
      const words = [...command, "1", "-v", "-p", `${port}`];
      const { child, kill, end } = start(inShell(`exec "$@" ${spoil}`, words));
      child.stdout.destroy(); // a closed pipe
      child.stderr.destroy();
      await untilListening(port);
      for (let k = 0; k < 3; k++) await assertHello(urlOf(port));
      kill("SIGTERM");
      assertEquals((await end()).code, 0, spoil);
    }
  },
  has("test -c /dev/full"),
);

// ---- What only Deno has -----------------------------------------------------

denoTest("asks for network access once (needs script)", async () => {
  const port = await freePorts(2);
  const host = hasIPv6 ? "::1" : "127.0.0.1";
  const line = `exec "${runtime}" run multiserv.ts 2 -p ${port} -H ${host}`;
  const words = ["script", "-qec", line, "/dev/null"];
  const { child, stdout, end } = start(words, null);
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
  const line = `map=$PWD/deno.json; cd "$(mktemp -d)" && pwd &&
    cp "\${map%/*}/multiserv.ts" . &&
    exec "$1" run --allow-net --import-map="$map" multiserv.ts 1 -p ${port}`;
  const { stdout, kill, end } = start(inShell(line, [runtime]));
  await stdout.until("listening");
  await assertHello(urlOf(port));
  kill("SIGTERM");
  const [folder = "", ...lines] = (await end()).stdout.split("\n");
  spawnSync("rm", ["-r", folder]);
  assertEquals(lines.join("\n"), ready(port, 1));
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
  const { port, stdout } = await serveApp(`app.get("/end", (c) => {
    Deno.upgradeWebSocket(c.req.raw);
    if (c.req.query("stop")) setTimeout(servers.shutdown, 5);
    return c.text("not its answer");
  });`);
  const ending = (path: string) => {
    const key = "sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==";
    const upgrade = ["upgrade: websocket", "connection: upgrade", key];
    return head(`GET ${path}`, ...upgrade, "sec-websocket-version: 13");
  };
  await dial(port, ending("/end"));
  await untilListening(port, false);
  await untilListening(port);
  await assertHello(urlOf(port));
  await dial(port, ending("/end?stop=1")); // it must not start once more
  await stdout.until("finished");
});

denoTest("bare deno test passes, and says what needs permissions", async () => {
  // With no flag for permissions, Deno would start Deno with all of them.
  const { code, stdout } = await start([runtime, "test", "--deny-ffi"]).end();
  assertEquals(code, 0, stdout);
  const [, n] = /0 failed \| (\d+) ignored/.exec(stdout) ?? [];
  assert(stdout.includes(`${n} tests need permissions: deno task test\n`));
});

denoTest("README.md shows what happens", async () => {
  const readme = await readFile(`${here}README.md`, "utf8");
  assert(readme.includes(ready(1024, 3) + howToStop));
  const blocks = readme.split("\n```").filter((_, k) => k % 2 === 1);
  let lessons = 0;
  for (const [k, block] of blocks.entries()) {
    const [language, ...lines] = block.split("\n");
    const code = lines.join("\n");
    const [shell, ...printed] = blocks[k + 1]?.split("\n").slice(1) ?? [];
    if (language === "ts" && shell?.endsWith("lesson.ts")) {
      const lesson = start([runtime, "run", "--allow-net", "-"], code);
      const { stdout, stderr } = await lesson.end();
      assertEquals([stdout, stderr], [`${printed.join("\n")}\n`, ""]);
      lessons++;
    }
    if (language === "ts ignore") {
      const port = await freePorts(3);
      const idea = code.replace("1024", `${port}`);
      start([runtime, "run", "--allow-net", "-"], idea);
      await untilListening(port + 2);
      await assertHello(urlOf(port + 2), 2);
    }
  }
  assertEquals(lessons, 4);
});

denoTest("README.md shows what the command says", async () => {
  const readme = await readFile(`${here}README.md`, "utf8");
  const port = await freePorts(3);
  await serving(newApps(1), port + 1);
  const denied = ["--deny-net", "multiserv.ts"];
  const allowed = ["--allow-net", "multiserv.ts"];
  for (
    const words of [
      ["multiserv.ts", "--help"],
      ["multiserv.ts", "three"],
      [...denied, "3"],
      [...allowed, "3", "-p", `${port}`],
    ]
  ) {
    const { stdout, stderr } = await start([runtime, "run", ...words]).end();
    const said = (stdout + stderr).replace(`${port + 1}`, "1025");
    const line = words.join(" ").replace(` -p ${port}`, "");
    assert(readme.includes(`$ deno run ${line}\n${said}`), said);
  }
});

// ---- Benchmarks: deno task bench --------------------------------------------

type Shutdown = () => Promise<unknown>;
type Contestant = (n: number, port: number) => Shutdown | Promise<Shutdown>;

const contestants: Record<string, Contestant> = {
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

for (const [name, contestant] of Object.entries(contestants)) {
  const baseline = name === "bare Deno.serve";
  const requests = { "GET": head("GET /"), "POST of 1 KB": post(1024) };
  for (const [kind, bytes] of Object.entries(requests)) {
    const group = `2000 times ${kind}`; // 100 on each of 20 connections
    Deno.bench(`${group}, ${name}`, { group, baseline }, async (b) => {
      const port = await freePorts(1);
      const shutdown = await contestant(1, port);
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
    const shutdown = await contestant(10_000, 20_000);
    b.end();
    await shutdown();
  });
}

if (!run) console.log(`${ignored} tests need permissions: deno task test`);
