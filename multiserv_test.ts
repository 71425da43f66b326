// The whole suite: what README.md promises, and what the program does when
// people, clients and machines do not behave. It runs on Deno and on Node.
import {
  assert,
  assertEquals,
  assertMatch,
  assertRejects,
  assertThrows,
} from "jsr:@std/assert@^1";
import { spawn } from "node:child_process";
import { EventEmitter, once } from "node:events";
import { connect, createServer } from "node:net";
import { dirname } from "node:path";
import process from "node:process";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import type { Handler } from "npm:hono@^4";
import {
  type App,
  handler,
  main,
  newApps,
  serveAll,
  type ServeAllOptions,
  withFaults,
} from "./multiserv.ts";

// ---- Which tests run --------------------------------------------------------

const onDeno = "deno" in process.versions;

/** Whether it is allowed. In tests, Deno 2.9 asks nobody for what is not. */
const isGranted = (name: "net" | "run" | "env") =>
  Deno.permissions.requestSync({ name }).state === "granted";
const net = isGranted("net");
const run = net && isGranted("run") && isGranted("env");
const onLinux = run && process.platform === "linux";

/** What ends or undoes what a test has begun. */
const cleanups: (() => unknown)[] = [];
const after = (cleanup: () => unknown) => cleanups.push(cleanup);

/** Makes a function like `Deno.test`, for tests that may be ignored or hang. */
const testIf = (allowed: boolean) => (name: string, body: () => unknown) =>
  Deno.test({
    name,
    ignore: !allowed,
    async fn() {
      const late = Promise.withResolvers<void>();
      const timer = setTimeout(late.reject, 45_000, new Error("It hangs"));
      const inTime = (work: unknown) => Promise.race([work, late.promise]);
      try {
        await inTime(body());
      } finally {
        const ends = cleanups.splice(0).reverse().map((cleanup) => cleanup());
        await inTime(Promise.all(ends)).finally(() => clearTimeout(timer));
      }
    },
  });
const test = testIf(true); // opens no socket
const netTest = testIf(net); // needs the network
const runTest = testIf(run); // starts the command
const linuxTest = testIf(onLinux); // needs /dev/full, or script for a terminal
/** A test of what only Deno has: permissions, shebang, `deno test` itself. */
const denoTest = (name: string, body: () => unknown, allowed = run) =>
  testIf(allowed && onDeno)(`${name} (Deno only)`, body);

// ---- Ports ------------------------------------------------------------------

/** Resolves to whether it got the port. It keeps no program from ending. */
const listens = (server: ReturnType<typeof createServer>, port: number) =>
  once(server.listen(port, "127.0.0.1").unref(), "listening")
    .then(() => true, () => false);

async function isFree(port: number): Promise<boolean> {
  const probe = createServer();
  const free = await listens(probe, port);
  if (free) await once(probe.close(), "close");
  return free;
}

/**
 * Ports that no other suite uses at the same time: the one before them is held
 * as long as this one runs. They lie below those that the system gives to
 * clients, and away from those that `fetch` refuses.
 */
let nextPort = 11_000;
while (net && !await listens(createServer(), nextPort)) {
  nextPort += 5000;
  if (nextPort > 30_000) throw new Error("Four suites run already");
}
const endPort = nextPort++ + 5000;

/** Finds n free ports in a row, which no other test has had. */
async function freePorts(n: number): Promise<number> {
  const first = nextPort;
  while (nextPort < first + n) {
    if (nextPort >= endPort) throw new Error("This suite has no ports left");
    if (!await isFree(nextPort++)) return freePorts(n);
  }
  return first;
}

const portOf = (url: string) => Number(new URL(url).port);

// ---- Servers and clients ----------------------------------------------------

/** An app that says hello from handler i, or has faults. */
const helloApp = (faults = "", i = 0) =>
  newApps(1)[0]!.all("*", withFaults(handler(i), faults));
const helloApps = (n: number) =>
  Array.from({ length: n }, (_, i) => helloApp("", i));

/** Serves apps until the test ends. */
async function serving(apps: App[], options: ServeAllOptions = { port: 0 }) {
  const servers = await serveAll(apps, options);
  after(servers.shutdown);
  const url = servers.urls[0]!;
  return { ...servers, url, port: portOf(url) };
}

const get = async (url: string) => (await fetch(url)).text();
const urlOf = (port: number) => `http://127.0.0.1:${port}`;

async function assertHello(url: string, i = 0) {
  assertEquals(await get(url), `hello from handler ${i}`);
}

/** What a stream has brought so far, and a way to wait for more of it. */
function received(stream: EventEmitter) {
  const decoder = new TextDecoder();
  let seen = "";
  stream.on("data", (bytes: Uint8Array) => {
    seen += decoder.decode(bytes, { stream: true });
  });
  let isOpen = true;
  const closed = once(stream, "close").catch(() => {}).then(() => {
    isOpen = false;
  });
  /** Resolves when the text has come that often; rejects if it never will. */
  async function until(text: string, times = 1) {
    while (seen.split(text).length <= times) {
      if (!isOpen) throw new Error(`no "${text}" in: ${seen}`);
      await Promise.race([once(stream, "data"), closed]);
    }
  }
  return { until, all: () => seen, closed };
}

/** Opens a connection that ends with the test; resolves once bytes are sent. */
async function dial(port: number, bytes = "") {
  const socket = connect(port, "127.0.0.1");
  after(() => socket.destroy());
  await once(socket, "connect");
  const answer = received(socket);
  if (bytes) await new Promise((sent) => socket.write(bytes, sent));
  return { socket, ...answer };
}

/** Waits until somebody listens, or nobody does any more. */
async function untilListening(port: number, expected = true) {
  const accepts = () => dial(port).then(() => true, () => false);
  while (await accepts() !== expected) await sleep(5);
}

/** The first lines of a request. */
const request = (line: string, ...headers: string[]) =>
  [`${line} HTTP/1.1`, "host: localhost", ...headers, "\r\n"].join("\r\n");

/** A POST with a body of so many bytes. */
const post = (bytes: number) =>
  request("POST /", `content-length: ${bytes}`) + "x".repeat(bytes);

// ---- Without a network ------------------------------------------------------

/** Replaces members of an object until the test ends. */
function replace(object: object, members: Record<string, unknown>) {
  for (const [name, value] of Object.entries(members)) {
    const was = Object.getOwnPropertyDescriptor(object, name)!;
    Object.defineProperty(object, name, { value, configurable: true });
    after(() => Object.defineProperty(object, name, was));
  }
}

/** Stands in for one server of `Deno.serve`. */
function standIn(
  { hostname, port, onListen }: Required<Deno.ServeTcpOptions>,
  fetch: App["fetch"],
) {
  const addr = { transport: "tcp", hostname, port: port || 40_000 } as const;
  const ended = Promise.withResolvers<void>();
  const server = {
    fetch,
    port: addr.port,
    finished: ended.promise,
    /** As a failed `accept` does. */
    fail: ended.reject,
    /** Requests in flight, which `shutdown` waits for. */
    inFlight: Promise.resolve(),
    shutdowns: 0,
    async shutdown() {
      server.shutdowns++;
      await server.inFlight;
      ended.resolve();
    },
  };
  onListen(addr);
  return server;
}
type StandIn = ReturnType<typeof standIn>;

/** Replaces `Deno.serve`; `refuse` may throw instead of listening. */
function standIns(refuse: (port: number) => void = () => {}): StandIn[] {
  const servers: StandIn[] = [];
  function serve(...args: Parameters<typeof standIn>) {
    refuse(args[0].port);
    const server = standIn(...args);
    servers.push(server);
    return server;
  }
  replace(Deno, { serve });
  return servers;
}

/** What a stand-in answers. */
const ask = (server: StandIn, path: string, init?: RequestInit) =>
  server.fetch(new Request(`http://localhost/${path}`, init));

/** An error as a system call gives it. */
const systemError = (code: string, message = `told ${code}`) =>
  Object.assign(new Error(message), { code });

interface Ended {
  code: number | null;
  stdout: string;
  stderr: string;
}

/** Runs `main` in this process, with nothing printed or ended. */
function inProcess(args: string[], isTerminal = false) {
  const output = () => {
    const stream = new EventEmitter();
    const write = (bytes: Uint8Array) => void stream.emit("data", bytes);
    const writable = new WritableStream({ write });
    return { isTerminal: () => isTerminal, writable, ...received(stream) };
  };
  const [stdout, stderr] = [output(), output()];
  const signals = new EventEmitter();
  const exits: number[] = [];
  const granted = () => ({ state: "granted" });
  replace(Deno, {
    stdout,
    stderr,
    permissions: { querySync: granted, requestSync: granted },
    addSignalListener: signals.on.bind(signals),
    exit: (code: number) => exits.push(code),
  });
  const ended = main(args).then((code): Ended => (
    { code, stdout: stdout.all(), stderr: stderr.all() }
  ));
  const press = (signal: string) => signals.emit(signal);
  return { stdout, stderr, press, exits, ended };
}

// ---- Messages ---------------------------------------------------------------

const outOfRange = (name: string, min: number, max: number) => (got: unknown) =>
  `${name} must be a whole number from ${min} to ${max}, got "${got}"`;
const badPort = outOfRange("port, unless 0,", 1024, 65535);
const onlyFit = (most: number, servers: number, from: number) =>
  `only ${most} of "${servers}" servers fit on the ports from ${from} up`;
const badFault = (name: string) =>
  `faults are delay=<ms> and status=<code>[:<percent>], got "${name}"`;

/** What the command says when servers cannot start. */
const notStarted = (hostname: string, ...lines: string[]): Ended => {
  const said = [`multiserv: No server started on "${hostname}"`, ...lines, ""];
  return { code: 1, stdout: "", stderr: said.join("\n") };
};
/** What it says of a command line that makes no sense. */
const usageError = (message: string): Ended => (
  { code: 2, stdout: "", stderr: `multiserv: ${message}\nTry --help\n` }
);
const howToStop = "Press Ctrl+C to stop";
const allowIt = (host: string) => `Allow it: deno run --allow-net=${host}`;

// ---- newApps, handler -------------------------------------------------------

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

test("newApps makes n apps, each a router of its own", async () => {
  const apps = newApps(3);
  apps[1]!.get("/", handler(1));
  // handler alone has no faults
  const answers = apps.map(async (app) =>
    (await app.request("/?delay=x")).status
  );
  assertEquals(await Promise.all(answers), [404, 200, 404]);
});

test("newApps refuses what is no number of servers", () => {
  const range = outOfRange("n", 1, 64512);
  for (const n of [0, -1, 1.5, NaN, Infinity, 64513, 1e21, "3"]) {
    assertThrows(() => newApps(n as number), RangeError, range(n));
  }
  assertEquals(newApps(64512).length, 64512);
});

// ---- withFaults -------------------------------------------------------------

test("?status answers with that status, and the same body", async () => {
  for (const status of [200, 201, 301, 404, 418, 429, 499, 503, 529, 599]) {
    const answer = helloApp().request(`/a?status=${status}`);
    await assertAnswers(answer, status, "hello from handler 0");
  }
  for (const status of [204, 205, 304]) {
    const response = await helloApp().request(`/?status=${status}`);
    assertEquals([response.status, response.body], [status, null]);
  }
  const head = { method: "HEAD" };
  await assertAnswers(helloApp().request("/?status=500", head), 500, "");
});

test("?status=<code>:<percent> is a share of the answers", async () => {
  for (
    const [faults, query, expected] of [
      ["", "?status=503:10", [503, 503, 200, 200]],
      ["", "?status=503:0", [200, 200, 200, 200]],
      ["", "?status=503:100", [503, 503, 503, 503]],
      ["status=500:10", "?delay=0", [500, 500, 200, 200]],
      ["status=500:10", "?status=501", [501, 501, 501, 501]],
    ] as const
  ) {
    const statuses: number[] = [];
    for (const chance of [0, 0.0999, 0.1, 0.9999]) {
      replace(Math, { random: () => chance });
      statuses.push((await helloApp(faults).request(`/${query}`)).status);
    }
    assertEquals(statuses, expected, `${faults} ${query}`);
  }
});

test("?delay waits as long as it says, and wins over the default", async () => {
  const timers = [50, 150, 250, 350].map((ms) => sleep(ms, `${ms} ms`));
  const app = helloApp("delay=300&status=503");
  const queries = ["/", "/?delay=100", "/?delay=0&status=200"];
  const answers = queries.map(async (query) =>
    (await app.request(query)).status
  );
  const order: unknown[] = [];
  const happenings = [...timers, ...answers].map(async (happening) => {
    order.push(await happening);
  });
  await Promise.all(happenings);
  // Timers of one process fire in their order, however late they are.
  assertEquals(
    order,
    [200, "50 ms", 503, "150 ms", "250 ms", 503, "350 ms"],
  );
});

const badDelay = outOfRange("delay", 0, 60_000);
const badStatus = outOfRange("status", 200, 599);
const badPercent = outOfRange("percent of status", 0, 100);

/** Inputs that make no sense, and what is said of them. */
type Wrong = [input: string, message: string][];

/** Inputs that begin alike; the message shows the rest. */
const each = (
  start: string,
  message: (got: string) => string,
  ...rests: string[]
): Wrong => rests.map((got) => [start + got, message(got)]);

const nonsense: Wrong = [
  ["delay=60000&status=1", badStatus("1")],
  ["delay=+1", badDelay(" 1")],
  ...each("delay=", badDelay, "", "x", "-1", "1.5", "1e3", "0x10", "60001"),
  ...each("status=", badStatus, "", "x", "20", "199", "600", "2e2", "200.0"),
  ...each("status=503:", badPercent, "", "x", "101", "-1", "0.5", "10:5"),
];

test("nonsense: 400 to a request, a RangeError from withFaults", async () => {
  for (const [faults, message] of nonsense) {
    await assertAnswers(helloApp().request(`/?${faults}`), 400, message);
    assertThrows(() => helloApp(faults), RangeError, message);
  }
  const misspelt = "delay=1&status=200&dealy=200";
  assertThrows(() => helloApp(misspelt), RangeError, badFault("dealy"));
});

test("withFaults takes any handler, and keeps what it answers", async () => {
  const [app] = newApps(1);
  const gone: Handler = (c) => c.text("gone", 410, { "x-own": "yes" });
  app!.get("/own", withFaults(gone));
  // One that leaves the answer to the next is a handler, too.
  app!.get("/next", withFaults((_c, next) => next()), gone);
  for (const path of ["/own", "/next"]) {
    for (const query of ["", "?other=1", "?status=200&status=500"]) {
      const response = await app!.request(path + query);
      assertEquals(response.headers.get("x-own"), "yes");
      const status = query.startsWith("?status") ? 200 : 410;
      await assertAnswers(response, status, "gone");
    }
  }
});

test("withFaults discards a body that nobody reads, and no other", async () => {
  const sent = { method: "POST", body: "sent" };
  for (const query of ["", "?status=503", "?status=x"]) {
    const request = new Request(`http://localhost/${query}`, sent);
    await helloApp().fetch(request);
    assert(request.bodyUsed, query);
  }
  const [app] = newApps(1);
  app!.post("/read", withFaults(async (c) => c.text(await c.req.text())));
  app!.post("/echo", withFaults((c) => new Response(c.req.raw.body)));
  for (const path of ["/read", "/echo"]) {
    const body = new Blob(["sent"]).stream();
    const streamed = { method: "POST", body, duplex: "half" };
    const response = await app!.request(path, streamed);
    assertEquals(await response.text(), "sent");
  }
  // One that somebody holds on to cannot be discarded, which is no error.
  app!.post("/", withFaults((c) => c.text(`${c.req.raw.body!.getReader()}`)));
  assertEquals((await app!.request("/", sent)).status, 200);
});

test("only a delay looks whether the client has left", async () => {
  for (const query of ["", "?status=503", "?delay=0", "?delay=x"]) {
    const request = new Request(`http://localhost/${query}`);
    let looked = false; // Deno prints a note at the first time
    Object.defineProperty(request, "signal", { get: () => looked = true });
    await helloApp().fetch(request);
    assertEquals(looked, false, query);
  }
  const leaving = new AbortController();
  const answer = helloApp().request("/?delay=60000", leaving);
  leaving.abort();
  assertEquals((await answer).status, 200);
});

// ---- serveAll: what it refuses ----------------------------------------------

test("serveAll refuses bad ports and more apps than ports", async () => {
  standIns();
  const refuses = (n: number, port: unknown, message: string) => {
    const starting = () => serveAll(helloApps(n), { port: port as number });
    return assertRejects(starting, RangeError, message);
  };
  for (const port of [80, 1023, 65536, -1, 1024.5, NaN, "5000"]) {
    await refuses(1, port, badPort(port));
  }
  await refuses(2, 65535, onlyFit(1, 2, 65535));
  await refuses(5537, 60000, onlyFit(5536, 5537, 60000));
  await refuses(0, 5000, outOfRange("number of servers", 1, 64512)(0));
});

netTest("a taken port: one error, nothing left listening", async () => {
  const port = await freePorts(4);
  await serving(newApps(1), { port: port + 2 });
  const starting = () => serving(newApps(4), { port });
  const { message, errors } = await assertRejects(starting, AggregateError);
  assertEquals(message, 'No server started on "127.0.0.1"');
  assertEquals(errors.length, 1);
  assertEquals(errors[0].message, `port ${port + 2} is already in use`);
  assertEquals(errors[0].cause.code, "EADDRINUSE");
  for (const i of [0, 1, 3]) assert(await isFree(port + i));
});

netTest("an empty hostname does not mean all addresses", async () => {
  const starting = () => serving(newApps(1), { port: 0, hostname: "" });
  await assertRejects(starting, AggregateError);
});

// ---- serveAll: what it serves -----------------------------------------------

netTest("app i listens on port + i, or each on a free port", async () => {
  const port = await freePorts(3);
  const { urls } = await serving(helloApps(3), { port });
  assertEquals(urls, [0, 1, 2].map((i) => urlOf(port + i)));
  await Promise.all(urls.map(assertHello));

  const free = (await serving(helloApps(5))).urls;
  assertEquals(new Set(free).size, 5);
  await Promise.all(free.map(assertHello));
});

netTest("IPv6 and names, where the machine knows them", async () => {
  for (const hostname of ["::1", "[::1]", "localhost"]) {
    const starting = serving(helloApps(1), { port: 0, hostname });
    const started = await starting.catch((error: AggregateError) => error);
    if (started instanceof AggregateError) {
      const message = "port 0: address not on this machine";
      assertEquals(started.errors[0].message, message);
    } else {
      assertMatch(started.url, /^http:\/\/(\[::1\]|127\.0\.0\.1):\d+$/);
      await assertHello(started.url);
    }
  }
});

netTest("what goes over the wire", async () => {
  const { port } = await serving(helloApps(1));
  const ask = async (bytes: string) => {
    const { closed, all } = await dial(port, bytes);
    await closed;
    return all();
  };
  const close = "connection: close";
  const exchanges: [bytes: string, status: number, greets: boolean][] = [
    [request("PROPFIND /", close), 200, true],
    [request("HEAD /", close), 200, false],
    [request("GET /?status=599", close), 599, true],
    [request("GET /?status=204", close), 204, false],
    // Old clients do not say which host they mean.
    ["GET / HTTP/1.0\r\n\r\n", 200, true],
    [`GET / HTTP/1.1\r\n${close}\r\n\r\n`, 200, true],
  ];
  for (const [bytes, status, greets] of exchanges) {
    const answer = await ask(bytes);
    assertMatch(answer, RegExp(`^HTTP/1.[01] ${status} `));
    assertEquals(answer.includes("hello from handler 0"), greets, bytes);
  }
  assert(!(await ask(request("CONNECT a:1", close))).includes("hello"));
});

netTest("serves whatever has a fetch, and tells it who asks", async () => {
  class Counter {
    count = 0;
    fetch(_request: Request, { remoteAddr }: Deno.ServeHandlerInfo) {
      const { hostname } = remoteAddr as Deno.NetAddr;
      return new Response(`${++this.count} ${hostname}`);
    }
  }
  const own = { fetch: () => new Response("own") };
  const { urls } = await serving([new Counter(), own]);
  assertEquals(await Promise.all(urls.map(get)), ["1 127.0.0.1", "own"]);
  assertEquals(await get(urls[0]!), "2 127.0.0.1");
});

netTest("a client that stops sending has left: no delay goes on", async () => {
  const answered = Promise.withResolvers<Response>();
  const fetch = async (request: Request) => {
    const answer = helloApp().fetch(request);
    answered.resolve(answer);
    return await answer;
  };
  const { port } = await serving([{ fetch }]);
  const { socket, closed, all } = await dial(port);
  socket.end(request("GET /?delay=60000"));
  await Promise.all([answered.promise, closed]);
  assertEquals(all(), "");
});

netTest("uploads nobody reads: answered, on the same connection", async () => {
  const { port } = await serving(helloApps(1));
  const { socket, until } = await dial(port);
  for (const n of [1, 2, 3]) {
    socket.write(post(3_000_000));
    await until("hello", n);
  }
});

// ---- serveAll: how it stops -------------------------------------------------

netTest("shutdown answers what is in flight and lets nobody in", async () => {
  const arrived = Promise.withResolvers<void>();
  const release = Promise.withResolvers<void>();
  const apps = newApps(2);
  apps[0]!.get("/", async (c) => {
    arrived.resolve();
    await release.promise;
    return c.text("at last");
  });
  const servers = await serving(apps, { port: await freePorts(2) });
  after(release.resolve);
  const done: string[] = [];
  const finished = servers.finished.then(() => done.push("finished"));
  const answer = get(servers.url);
  await arrived.promise;
  const stopping = servers.shutdown().then(() => done.push("shutdown"));
  const again = servers.shutdown();
  for (const i of [0, 1]) await untilListening(servers.port + i, false);
  assertEquals(done, []);
  release.resolve();
  assertEquals(await answer, "at last");
  await Promise.all([stopping, again, finished]);
  await servers.shutdown();
  for (const i of [0, 1]) assert(await isFree(servers.port + i));
});

netTest("silent and kept-alive connections hold up no end", async () => {
  const { port, ...servers } = await serving(helloApps(2));
  const idle = await dial(port, request("GET /"));
  await idle.until("hello");
  const silent = await dial(portOf(servers.urls[1]!));
  await servers[Symbol.asyncDispose]();
  await Promise.all([servers.finished, idle.closed, silent.closed]);
});

// ---- A server that cannot accept --------------------------------------------

test("a server that fails to accept listens again, as it was", async () => {
  let attempts = 0;
  const started = standIns(() => {
    if (++attempts === 3) throw systemError("EMFILE"); // not at once, either
  });
  const untilStarted = async (n: number) => {
    while (started.length < n) await sleep(5);
  };
  const servers = await serving(helloApps(2));
  const inFlight = Promise.withResolvers<void>();
  after(inFlight.resolve);
  started[0]!.inFlight = inFlight.promise;
  started[0]!.fail(systemError("ECONNABORTED"));
  await sleep(50);
  assertEquals(attempts, 2); // it waits before it tries
  await untilStarted(3);
  started[2]!.fail(systemError("EMFILE")); // it may fail more than once
  await untilStarted(4);
  assertEquals(started[3]!.port, 40_000); // not 0, which was asked for
  await assertAnswers(ask(started[3]!, ""), 200, "hello from handler 0");
  assertEquals([attempts, started[1]!.shutdowns], [5, 0]);

  // What the first had accepted is answered before all has ended.
  const done: string[] = [];
  const stopping = Promise.all([
    servers.shutdown().then(() => done.push("shutdown")),
    servers.finished.then(() => done.push("finished")),
  ]);
  await sleep(20);
  assertEquals(done, []);
  inFlight.resolve();
  await stopping;
  assertEquals(started.length, 4);
});

test("shutdown while it waits to listen again", async () => {
  const started = standIns();
  const { urls, finished, shutdown } = await serveAll(helloApps(2));
  assertEquals(urls, ["http://127.0.0.1:1024", "http://127.0.0.1:1025"]);
  started[0]!.fail(systemError("EMFILE"));
  await sleep(1); // so that it waits
  await shutdown();
  await finished;
  assertEquals(started.length, 2);
});

// ---- The command line: what it refuses --------------------------------------

const badN = outOfRange("n", 1, 64512);
const noOption = (got: string) => `unknown option "${got}"`;
const noValue = (got: string) => `this option takes no value: "${got}"`;
const needsValue = (option: string) => `--${option} needs a value`;

const nines = "9".repeat(40);

/** Wrong command lines, split at spaces. */
const wrong: Wrong = [
  ["-v", "n is missing"],
  ["--", "n is missing"],
  ["-- -3", badN("-3")],
  ["--_", badN("")],
  ["3 4", 'one n is enough, got "3 4"'],
  ["3 ", 'one n is enough, got "3 "'],
  ["--_=x 3", 'one n is enough, got "x 3"'],
  ["3 -p -v", needsValue("port")],
  ["3 -H ", needsValue("hostname")],
  ["2 -p 65535", onlyFit(1, 2, 65535)],
  ["536 -p 60000 -f 5001", onlyFit(535, 536, 65001)],
  ["3 -p 65000 -f 536", outOfRange("first", 0, 535)("536")],
  ["64513 -p 0", badN("64513")],
  ["3 -p 0 -f 64512", outOfRange("first", 0, 64511)("64512")],
  ["3\n4", badN("3\\n4")],
  [nines, badN(nines)],
  [`${nines}9`, badN(`${nines}…`)],
  ["😀".repeat(41), badN("😀".repeat(40) + "…")],
  ["3 --faults delay=-1", badDelay("-1")],
  ["3 --faults dealy=1", badFault("dealy")],
  ...each("", badN, "", "-", "abc", "3.5", "3.0", "1e3", "0x10", "0", "00"),
  ...each("", badN, "+3", "٣", "1_000", "Infinity", "64513"),
  ...each("3 --port=", badPort, "80", "1023", "65536", "-1", "x", "00"),
  ...each("3 --first=", outOfRange("first", 0, 64511), "x", "-1", "64512"),
  ...each(
    "3 ",
    noOption,
    "-3",
    "-x",
    "--prot",
    "--prot=5",
    "--no-verbose",
  ),
  ...each(
    "3 ",
    noValue,
    "-v3",
    "-v=1",
    "--verbose=1",
    "--help=no",
    "-vp80",
  ),
];
for (const name of ["port", "first", "hostname", "faults"]) {
  wrong.push([`3 --${name}`, needsValue(name)]);
  wrong.push([`3 --${name}=`, needsValue(name)]);
}

test("wrong command lines: what is wrong, exit 2", async () => {
  standIns();
  for (const [line, message] of wrong) {
    const { ended } = inProcess(line.split(" "));
    assertEquals(await ended, usageError(message), line);
  }
  for (const got of [" 3", "3 "]) {
    assertEquals(await inProcess([got]).ended, usageError(badN(got)));
  }
});

test("no argument at all: n is missing, and the usage", async () => {
  standIns();
  const { stdout: usage } = await inProcess(["--help"]).ended;
  assertMatch(usage, /^Usage: multiserv \[options\] <n>\n/);
  const stderr = `multiserv: n is missing\n${usage}`;
  assertEquals(await inProcess([]).ended, { code: 2, stdout: "", stderr });
  for (const line of ["-h", "3 -p 80 -h", "-vh"]) {
    const help = { code: 0, stdout: usage, stderr: "" };
    assertEquals(await inProcess(line.split(" ")).ended, help);
  }
});

test("a fault of the program is not called its user's", async () => {
  const noArray = null as unknown as string[];
  await assertRejects(() => inProcess(noArray).ended, TypeError);
});

const notHere =
  "port 1024: address not on this machine\nTry another --hostname";
const noFiles =
  "port 1024: too many open files\nRaise ulimit -n or start fewer";

/** Why a server cannot start and what helps, by the code of the error. */
const refusals: Record<string, string> = {
  EADDRINUSE: "port 1024 is already in use\nTry another --port",
  EACCES: "port 1024: permission denied\nTry another --port",
  EADDRNOTAVAIL: notHere,
  EAFNOSUPPORT: notHere,
  EINVAL: notHere,
  EMFILE: noFiles,
  ENFILE: noFiles,
  EBUSY: noFiles,
  // The words of an error are not searched: hosts' names stand in them.
  EOTHER: "port 1024: EADDRINUSE too many open files",
};

test("every way the machine can refuse has its words", async () => {
  for (const [code, told] of Object.entries(refusals)) {
    standIns(() => {
      throw systemError(code, "EADDRINUSE too many open files");
    });
    const { ended } = inProcess(["1"]);
    assertEquals(await ended, notStarted("127.0.0.1", told));
  }
  standIns(() => {
    throw Object.assign(new Error("no"), { name: "NotCapable" });
  });
  const told = notStarted(
    "::1",
    "port 1024: no network access",
    allowIt("[::1]"),
  );
  assertEquals(await inProcess(["1", "-H", "::1"]).ended, told);
});

test("many errors: five, how many more, the last one's hint", async () => {
  for (const n of [5, 7]) {
    const last = 1024 + n - 1;
    standIns((port) => {
      throw systemError(port === last ? "EMFILE" : "EADDRINUSE");
    });
    const lines = [1024, 1025, 1026, 1027, 1028]
      .map((port) => `port ${port} is already in use`);
    if (n === 5) lines[4] = `port ${last}: too many open files`;
    if (n > 5) lines.push(`… and ${n - 5} more`);
    lines.push("Raise ulimit -n or start fewer");
    const { ended } = inProcess([`${n}`]);
    assertEquals(await ended, notStarted("127.0.0.1", ...lines));
  }
});

netTest("hosts that this machine does not have, or nobody knows", async () => {
  const port = await freePorts(1);
  const absent = `port ${port}: address not on this machine`;
  const long = "a".repeat(300);
  const unknown = ["no-such-host.invalid", "a b", "x:y", "[127.0.0.1]", long];
  for (const hostname of ["192.0.2.1", "ff02::1", ...unknown]) {
    const shown = hostname === long ? `${"a".repeat(40)}…` : hostname;
    const why = unknown.includes(hostname) ? "unknown host name" : absent;
    const { ended } = inProcess(["1", "-p", `${port}`, "-H", hostname]);
    const told = notStarted(shown, why, "Try another --hostname");
    assertEquals(await ended, told);
  }
});

// ---- The command line: what it does -----------------------------------------

/** The ready lines of servers at these URLs. */
const ready = (urls: string[], first = 0) =>
  urls.map((url, k) => `handler ${first + k} listening on ${url}\n`).join("");

/** Runs a command line in this process, resolves once its servers listen. */
async function readyInProcess(line: string, isTerminal?: boolean) {
  const servers = standIns();
  const command = inProcess(line.split(" "), isTerminal);
  const failed = command.ended.then(({ stderr }) => {
    throw new Error(stderr);
  });
  await Promise.race([command.stdout.until("listening"), failed]);
  return { servers, server: servers[0]!, ...command };
}

test("handler i listens on port + i", async () => {
  const lines: [line: string, first: number, ...urls: string[]][] = [
    ["2", 0, "http://127.0.0.1:1024", "http://127.0.0.1:1025"],
    ["1 -p 5000 --first=3", 3, "http://127.0.0.1:5003"],
    ["1 -p 65000 -f 535", 535, "http://127.0.0.1:65535"],
    ["1 -p0 -f64511", 64511, "http://127.0.0.1:40000"],
    ["1 --hostname ::1", 0, "http://[::1]:1024"],
    ["1 -H [::1]", 0, "http://[::1]:1024"],
  ];
  for (const [line, first, ...urls] of lines) {
    const { servers, press, stderr, ended } = await readyInProcess(line, true);
    await stderr.until(`${howToStop}\n`);
    for (const [k, server] of servers.entries()) {
      const body = `hello from handler ${first + k}`;
      await assertAnswers(ask(server, "a"), 200, body);
    }
    press("SIGTERM");
    const stdout = ready(urls, first);
    assertEquals(await ended, { code: 0, stdout, stderr: `${howToStop}\n` });
  }
});

test("any method and path: 200, text/plain, the exact text", async () => {
  const { server, press, ended } = await readyInProcess("1 -f 7");
  const body = "hello from handler 7";
  for (const path of ["", "a/b/", "/x", "%ff", "ü", "?other=x", "*"]) {
    for (const method of ["GET", "POST", "PUT", "DELETE", "OPTIONS", "FOO"]) {
      await assertAnswers(ask(server, path, { method }), 200, body);
    }
    await assertAnswers(ask(server, path, { method: "HEAD" }), 200, "");
  }
  press("SIGTERM");
  await ended;
});

test("--faults holds for requests that do not ask", async () => {
  const { server, press, ended } = await readyInProcess(
    "1 --faults status=503",
  );
  await assertAnswers(ask(server, ""), 503, "hello from handler 0");
  await assertAnswers(ask(server, "?status=200"), 200, "hello from handler 0");
  press("SIGINT");
  await ended;
});

test("a second signal ends it at once, also while it starts", async () => {
  for (const [signal, code] of [["SIGINT", 130], ["SIGTERM", 143]] as const) {
    standIns();
    const { press, exits, ended } = inProcess(["1"]);
    press("SIGINT"); // nothing has been awaited yet
    press(signal);
    assertEquals(exits, [code]);
    assertEquals((await ended).code, 0); // exit() did nothing
  }
});

test("on a terminal: how to stop, and why that takes a while", async () => {
  const hint = `${howToStop}\n`;
  const why = "Answering requests in flight; Ctrl+C again stops now\n";
  for (const [ms, said] of [[400, hint], [600, hint + why]] as const) {
    const { server, stderr, press, ended } = await readyInProcess("1", true);
    await stderr.until(hint);
    server.inFlight = sleep(ms);
    press("SIGINT");
    assertEquals((await ended).stderr, said);
  }
});

test("a port that is lost later: the rest stops, exit 1 and why", async () => {
  const { servers, ended } = await readyInProcess("2");
  standIns(() => {
    throw systemError("EADDRINUSE");
  });
  servers[1]!.fail(systemError("EMFILE"));
  const { code, stderr } = await ended;
  const why = "port 1025 is already in use\nTry another --port\n";
  assertEquals(stderr, `multiserv: All servers stopped\n${why}`);
  assertEquals([code, servers[0]!.shutdowns], [1, 1]);
});

test("--verbose: path and query only, so nobody forges a line", async () => {
  const { servers, press, ended } = await readyInProcess("-v 2 --first 7");
  const requests = {
    "http://localhost/a?status=404": "/a?status=404 404",
    "http://b/c": "/c 200",
    "https://b/d?e": "/d?e 200",
    "http://localhost//d\u009b\u202e \x1b[31m?\u009b=\u202e":
      "//d%C2%9B%E2%80%AE%20%1B[31m?%C2%9B=%E2%80%AE 200",
    "http://[/e": "/e 200",
    "http://a/ 200 handler 7: GET http://b/f":
      "/%20200%20handler%207:%20GET%20http://b/f 200",
  };
  for (const url of Object.keys(requests)) {
    const request = new Request("http://localhost/");
    // As Deno has it: made of what the client sends, valid or not.
    Object.defineProperty(request, "url", { value: url });
    await servers[1]!.fetch(request);
  }
  await servers[0]!.fetch(new Request("http://a", { method: "POST" }));
  press("SIGTERM");
  const lines = Object.values(requests).map((line) =>
    `handler 8: GET ${line}\n`
  );
  lines.push("handler 7: POST / 200\n");
  assertEquals((await ended).stderr, lines.join(""));
});

test("of a log that nobody reads it keeps a thousand lines", async () => {
  const { server, press, ended } = await readyInProcess("1 -v");
  const reading = Promise.withResolvers<void>();
  let lines = 0;
  const write = () => reading.promise.then(() => void lines++);
  replace(Deno, { stderr: { writable: new WritableStream({ write }) } });
  for (let k = 0; k < 2000; k++) await ask(server, "");
  reading.resolve();
  press("SIGTERM");
  await ended;
  assert(lines > 990 && lines < 1010, `${lines} lines`);
});

// ---- The command, as a process ----------------------------------------------

const here = dirname(fileURLToPath(import.meta.url));
const runtime = process.execPath;
const command = onDeno
  ? [runtime, "run", "--allow-net", "multiserv.ts"]
  : [runtime, "node/multiserv.ts"];

/** Starts a command in the repository, which ends with the test. */
function start(...words: string[]) {
  const options = { cwd: here, stdio: "pipe" } as const;
  const child = spawn("env", ["NO_COLOR=1", ...words], options);
  const [stdout, stderr] = [received(child.stdout), received(child.stderr)];
  const ended = once(child, "close").then(([code]): Ended => (
    { code, stdout: stdout.all(), stderr: stderr.all() }
  ));
  after(() => child.kill("SIGKILL") && ended);
  // With child.kill, Deno reports the signal and no exit code.
  const kill = (signal: NodeJS.Signals) => process.kill(child.pid!, signal);
  return { child, kill, stdout, stderr, ended };
}

/** Runs a command to its end, with this as its stdin. */
function launch(words: string[], stdin?: string) {
  const { child, ended } = start(...words);
  child.stdin.end(stdin);
  return ended;
}

/** Starts a command that serves n ports, waits for its ready lines. */
async function startReady(n: number, words: string[]) {
  const { kill, stdout, stderr, ended } = start(...words);
  await stdout.until("\n", n).catch(() => {});
  const urls = stdout.all().match(/http:\S+(?=\n)/g) ?? [];
  assertEquals(urls.length, n, stderr.all());
  return { kill, urls, url: urls[0]!, ended };
}

/** The words that run `multiserv` with these arguments. */
const multiserv = (...args: string[]) => [...command, ...args];

/** The same from a shell, in which it is `"$@"`. */
function inShell(line: string, ...args: string[]) {
  return ["sh", "-c", line, "sh", ...multiserv(...args)];
}

runTest("a handful of wrong command lines, for real", async () => {
  for (const [line, message] of wrong.filter((_, k) => k % 10 === 0)) {
    const ended = await launch(multiserv(...line.split(" ")));
    assertEquals(ended, usageError(message));
  }
});

runTest("SIGTERM answers what is in flight on every server", async () => {
  const { kill, urls, ended } = await startReady(100, multiserv("100", "-p0"));
  const slow = await Promise.all(
    urls.map((url) => dial(portOf(url), request("GET /?delay=1000"))),
  );
  await Promise.all(urls.map(assertHello)); // so the slow ones have arrived
  kill("SIGTERM");
  for (const [i, { closed, all }] of slow.entries()) {
    await closed;
    assert(all().endsWith(`\r\n\r\nhello from handler ${i}`), all());
  }
  assertEquals((await ended).code, 0);
});

runTest("a second signal ends it, with requests in flight", async () => {
  for (const [signal, code] of [["SIGINT", 130], ["SIGTERM", 143]] as const) {
    const port = `${await freePorts(1)}`;
    const words = multiserv("1", "-p", port);
    const { kill, url, ended } = await startReady(1, words);
    const lost = await dial(portOf(url), request("GET /?delay=60000"));
    await get(url);
    kill(signal);
    await untilListening(portOf(url), false);
    kill(signal);
    assertEquals((await ended).code, code);
    await lost.closed;
    assertEquals(lost.all(), "");
  }
});

runTest("too many open files names ulimit -n", async () => {
  const port = await freePorts(200);
  const words = inShell('ulimit -n 100; exec "$@"', "200", "-p", `${port}`);
  const ended = await launch(words);
  assertEquals([ended.code, ended.stdout], [1, ""]);
  const list = "(port \\d+: too many open files\n){5}… and \\d+ more\n";
  const help = "Raise ulimit -n or start fewer\n";
  assertMatch(ended.stderr, RegExp(`^multiserv: .*\n${list}${help}$`));
});

runTest("more clients than open files: it answers when they go", async () => {
  const words = inShell('ulimit -n 64; exec "$@"', "5", "-p", "0");
  const { kill, urls, ended } = await startReady(5, words);
  const crowd = Array.from(
    { length: 100 },
    (_, k) => connect(portOf(urls[k % 5]!), "127.0.0.1").resume(),
  );
  const hungUp = crowd.map((client) => once(client, "close").catch(() => {}));
  await Promise.race(hungUp); // some are refused, or hung up on
  for (const client of crowd) client.destroy();
  for (const [i, url] of urls.entries()) {
    let answer: string | undefined;
    while (!answer) answer = await get(url).catch(() => undefined);
    assertEquals(answer, `hello from handler ${i}`);
  }
  kill("SIGTERM");
  const { code, stderr } = await ended;
  assertEquals([code, stderr], [0, ""]);
});

linuxTest("output that cannot be written changes nothing", async () => {
  const help = await launch(inShell('exec "$@" >/dev/full', "--help"));
  assertEquals(help, { code: 0, stdout: "", stderr: "" });
  for (const spoil of [">/dev/full 2>&1", ">&- 2>&-", "destroy", "pause"]) {
    const n = spoil === "pause" ? 1500 : 1; // more lines than a pipe holds
    const port = await freePorts(n);
    const line = `exec "$@" ${spoil.includes(">") ? spoil : ""}`;
    const words = inShell(line, `${n}`, "-v", "-p", `${port}`);
    const { child, kill, ended } = start(...words);
    const exited = once(child, "exit");
    const outputs = [child.stdout, child.stderr];
    if (spoil === "destroy" || spoil === "pause") {
      for (const output of outputs) output[spoil]();
    }
    await untilListening(port + n - 1);
    const { socket, until } = await dial(port);
    for (let k = 1; k <= 100; k++) { // 800 KB of log, too
      socket.write(request(`GET /${"x".repeat(8000)}`));
      await until("hello", k);
    }
    socket.destroy();
    kill("SIGTERM");
    assertEquals((await exited)[0], 0, spoil);
    for (const output of outputs) output.resume();
    await ended;
  }
});

/** A command as a shell reads it. */
const quoted = (words: string[]) =>
  words.map((word) => `'${word.replaceAll("'", "'\\''")}'`).join(" ");

/** Runs a command on a terminal, through util-linux `script`. */
function onTerminal(words: string[]) {
  // exec: a shell that stayed would take Ctrl+C too, and some die of it.
  const line = `exec ${quoted(words)}`;
  const started = start("script", "-qec", line, "/dev/null");
  const { child, stdout: { until }, ended } = started;
  const type = (keys: string) => child.stdin.write(keys);
  return { until, type, ended };
}

// ---- Only Deno --------------------------------------------------------------

const denoRun = (...args: string[]) => [runtime, "run", ...args];
const question = "Deno requests";

denoTest("asks for the network once, for all ports", async () => {
  const port = await freePorts(3);
  for (
    const [keys, reply, exitCode] of [
      ["y\n", "Granted", 0],
      ["n\n", "Denied", 1],
      ["\x03", "^C", 130],
    ] as const
  ) {
    const words = denoRun("multiserv.ts", "3", "-p", `${port}`);
    const { until, type, ended } = onTerminal(words);
    await until("Allow?");
    const typing = setInterval(type, 200, keys); // Deno drops what is early
    await until(reply).finally(() => clearInterval(typing));
    if (exitCode === 0) {
      await until(howToStop);
      await assertHello(urlOf(port + 2), 2);
      type("\x03");
    }
    const { code, stdout } = await ended;
    assertEquals([code, stdout.split(question).length - 1], [exitCode, 1]);
    assertEquals(stdout.includes(allowIt("127.0.0.1")), exitCode === 1);
  }
}, onLinux);

denoTest("asks nobody who has allowed just its ports", async () => {
  const port = await freePorts(2);
  const allow = `--allow-net=127.0.0.1:${port},127.0.0.1:${port + 1}`;
  const words = denoRun(allow, "multiserv.ts", "2", "-p", `${port}`);
  const { until, type, ended } = onTerminal(words);
  await until(howToStop);
  type("\x03");
  const { code, stdout } = await ended;
  assertEquals([code, stdout.includes(question)], [0, false]);
}, onLinux);

denoTest("multiserv.ts alone runs from an empty folder", async () => {
  const port = await freePorts(1);
  const folder = (await launch(["mktemp", "-d"])).stdout.trim();
  after(() => launch(["rm", "-r", folder]));
  // The import map says where to get the packages, nothing else.
  const line = `cp multiserv.ts ${folder} && map=$PWD/deno.json &&
    cd ${folder} && exec "$0" run --allow-net --import-map="$map" \\
    multiserv.ts 1 -p ${port}`;
  const { kill, url, ended } = await startReady(1, ["sh", "-c", line, runtime]);
  assertEquals((await fetch(`${url}/?status=204`)).status, 204);
  kill("SIGTERM");
  assertEquals((await ended).stdout, ready([urlOf(port)]));
});

denoTest("./multiserv.ts runs, with just the permission it needs", async () => {
  const { port } = await serving(newApps(1), { port: await freePorts(1) });
  const run = (args: string) => {
    const path = `PATH='${dirname(runtime)}':"$PATH"`;
    const line = `${path} ./multiserv.ts 1 -p ${port} ${args}`;
    return launch(["sh", "-c", line]);
  };
  const taken = [`port ${port} is already in use`, "Try another --port"];
  assertEquals(await run(""), notStarted("127.0.0.1", ...taken));
  const barred = [`port ${port}: no network access`, allowIt("127.0.0.2")];
  assertEquals(await run("-H 127.0.0.2"), notStarted("127.0.0.2", ...barred));
});

denoTest("bare deno test passes where nothing is allowed", async () => {
  // With no permission flag at all, Deno would start Deno with -A.
  const words = [runtime, "test", "--deny-ffi"];
  const { code, stdout } = await launch(words);
  assertEquals(code, 0);
  assertMatch(stdout, /\| [1-9]\d* passed \| 0 failed \| \d+ ignored /);
});

// ---- README.md --------------------------------------------------------------

/** What stands in a file of the repository. */
const contents = async (path: string) => (await launch(["cat", path])).stdout;

/** The code blocks in a language that stand under a heading of README.md. */
async function blocks(heading: string, language: string) {
  const sections = (await contents("README.md")).split(/^#+ /m);
  const section = sections.find((text) => text.startsWith(`${heading}\n`))!;
  const block = RegExp("^```" + language + "\\n([^]*?)^```$", "gm");
  const texts = [...section.matchAll(block)].map(([, text]) => text);
  return texts as [string, ...string[]];
}

runTest("each ts block runs, and prints what the next one shows", async () => {
  const onNode = ["--import", "./node/multiserv.ts"];
  const words = onDeno
    ? denoRun("--allow-net=127.0.0.1", "-")
    : [runtime, ...onNode, "--input-type=module-typescript", "-"];
  const readme = await contents("README.md");
  const lesson =
    /^```ts\n([^]*?)^```\n(?:\n```console\n.*lesson.ts\n([^]*?)```)?/gm;
  let lessons = 0;
  for (const [, text = "", output] of readme.matchAll(lesson)) {
    // Node 22 knows no `await using`; this does on all.
    const program = text.replace("await using", "const") +
      "await servers.shutdown();";
    const { code, stdout, stderr } = await launch(words, program);
    assertEquals([code, stderr], [0, ""], text);
    if (output === undefined) continue;
    assertEquals(stdout, output);
    lessons++;
  }
  assertEquals(lessons, 4);
});

/** What README shows, where the ports from 1024 up are those from another. */
const onPorts = (port: number, shown: string) =>
  shown.replaceAll(
    /(?<=port |:)10\d\d/g,
    (given) => `${Number(given) - 1024 + port}`,
  );

linuxTest("a terminal shows what README shows, until Ctrl+C", async () => {
  const [shown] = await blocks("Run it", "console");
  const port = await freePorts(3);
  const words = multiserv("3", "-p", `${port}`);
  const { until, type, ended } = onTerminal(words);
  await until(howToStop);
  type("\x03");
  const { code, stdout } = await ended;
  const lines = shown.replace(/^.*\n/, "").replaceAll("\n", "\r\n");
  assert(stdout.startsWith(onPorts(port, lines)), stdout);
  assertEquals(code, 0);
});

const denoCommand = "deno run --allow-net=127.0.0.1 multiserv.ts";

runTest("the script of README waits, uses and stops the servers", async () => {
  const [script] = await blocks("As a command", "sh");
  const port = await freePorts(3);
  const there = command.map((word) =>
    word.endsWith(".ts") ? `${here}/${word}` : word
  );
  const line = script
    .replace(denoCommand, `${quoted(there)} -p ${port}`)
    .replace("1025", `${port + 1}`);
  const words = ["sh", "-c", `cd "$(mktemp -d)"\n${line}rmdir "$PWD"`];
  const { stdout, stderr } = await launch(words);
  assertEquals([stdout, stderr], ["hello from handler 1\nexit code 0\n", ""]);
});

linuxTest("README's loop over the cores, and one Ctrl+C for all", async () => {
  const [loop] = await blocks("Larger fleets", "sh");
  const port = await freePorts(4);
  const line = loop
    .replace("0 250 500 750", "0 2")
    .replace(denoCommand, `${quoted(command)} -p ${port}`)
    .replace(" 250 &", " 2 &");
  const { until, type, ended } = onTerminal(["sh", "-c", line]);
  for (const i of [0, 1, 2, 3]) {
    await until(`handler ${i} listening`);
    await assertHello(urlOf(port + i), i);
  }
  type("\x03");
  await ended;
  for (const i of [0, 1, 2, 3]) await untilListening(port + i, false);
});

denoTest("the command says what README shows", async () => {
  const shown = (await blocks("As a command", "console")).join("");
  const { port } = await serving(newApps(3), { port: await freePorts(3) });
  const commands = shown.split(/^\$ deno /m).slice(1);
  assertEquals(commands.length, 5);
  for (const command of commands) {
    const [line = "", ...said] = command.split("\n");
    const words = [runtime, ...line.split(" "), "-p", `${port}`];
    const { stdout, stderr } = await launch(words);
    assertEquals(stdout + stderr, onPorts(port, said.join("\n")), line);
  }
});

denoTest("the idea in a dozen lines runs", async () => {
  const port = await freePorts(3);
  const [idea] = await blocks("The idea", "ts ignore");
  const { child, kill, ended } = start(
    ...denoRun("--allow-net=127.0.0.1", "-"),
  );
  child.stdin.end(idea.replace("1024", `${port}`));
  for (const i of [0, 1, 2]) {
    await untilListening(port + i);
    await assertHello(urlOf(port + i), i);
  }
  kill("SIGKILL");
  await ended;
});

// ---- Benchmarks: deno task bench --------------------------------------------

/** The first of 10,000 ports that nothing else may hold meanwhile. */
const basePort = 20_000;

type Shutdown = () => Promise<unknown>;
/** Starts n servers from basePort up. */
type Start = (n: number) => Shutdown | Promise<Shutdown>;

const contestants: Record<string, Start> = {
  "Deno.serve"(n) {
    const servers = Array.from({ length: n }, (_, i) => {
      const options = { hostname: "127.0.0.1", port: basePort + i };
      return Deno.serve({ ...options, onListen() {} }, (request) => {
        if (request.method !== "GET") request.body?.cancel();
        return new Response("hello from handler 0");
      });
    });
    return () => Promise.all(servers.map((server) => server.shutdown()));
  },
  async multiserv(n) {
    return (await serveAll(helloApps(n), { port: basePort })).shutdown;
  },
};

type Measure = (b: Deno.BenchContext, start: Start) => Promise<void>;

/** Measures both in turn. */
function compare(group: string, measure: Measure, rounds = {}) {
  for (const [name, start] of Object.entries(contestants)) {
    const options = { group, baseline: name === "Deno.serve", ...rounds };
    // Deno waits for no function that is not called async.
    const fn = async (b: Deno.BenchContext) => await measure(b, start);
    Deno.bench(`${group}, ${name}`, options, fn);
  }
}

const asked = { "GET": request("GET /"), "POST of 1 KB": post(1024) };
for (const [name, bytes] of Object.entries(asked)) {
  // 20 connections with 100 in flight on each
  compare(`2000 times ${name}`, async (b, start) => {
    const shutdown = await start(1);
    const dialled = Array.from({ length: 20 }, () => dial(basePort));
    const clients = await Promise.all(dialled);
    b.start();
    await Promise.all(clients.map(({ socket, until }) => {
      socket.write(bytes.repeat(100));
      return until("hello from handler 0", 100);
    }));
    b.end();
    for (const { socket } of clients) socket.destroy();
    await shutdown();
  });
}

const fewRounds = { n: 5, warmup: 1 };
compare("start 10,000", async (b, start) => {
  b.start();
  const shutdown = await start(10_000);
  b.end();
  await shutdown();
}, fewRounds);
compare("stop 10,000", async (b, start) => {
  const shutdown = await start(10_000);
  b.start();
  await shutdown();
  b.end();
}, fewRounds);

/** KiB of memory that a command with n servers holds, after a second. */
async function memory(words: string[], n: number) {
  const { child, kill, stdout, ended } = start(...words, `${basePort}`, `${n}`);
  await stdout.until("\n");
  await sleep(1000);
  const ps = await launch(["ps", "-o", "rss=", "-p", `${child.pid}`]);
  kill("SIGKILL");
  await ended;
  return Number(ps.stdout);
}

const bareProgram = `
  const [port, n] = Deno.args.map(Number);
  for (let i = 0; i < n; i++) {
    const hello = "hello from handler " + i;
    const options = { hostname: "127.0.0.1", port: port + i, onListen() {} };
    Deno.serve(options, () => new Response(hello));
  }
  console.log("ready");`;
const programs = {
  "Deno.serve": [runtime, "eval", bareProgram],
  "multiserv": multiserv("-p"),
};
const memoryGroup = {
  group: "memory, whose time means nothing",
  n: 1,
  warmup: 0,
};
for (const [name, words] of Object.entries(programs)) {
  Deno.bench(`memory of 10,000, ${name}`, memoryGroup, async () => {
    const [one, all] = [await memory(words, 1), await memory(words, 10_000)];
    console.log(`${((all - one) / 9999).toFixed(1)} KiB each`);
  });
}
