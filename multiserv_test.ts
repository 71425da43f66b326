// The whole suite: what README.md promises, and what the program does when
// people, clients and machines do not behave. It runs on Deno and on Node.
import {
  assert,
  assertEquals,
  assertMatch,
  assertRejects,
  assertStringIncludes,
  assertThrows,
} from "jsr:@std/assert@^1";
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { connect, createServer, type Socket } from "node:net";
import { dirname } from "node:path";
import process from "node:process";
import type { Readable } from "node:stream";
import { text } from "node:stream/consumers";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import type { Handler } from "npm:hono@^4";
import {
  handler,
  main,
  type MultiServer,
  newApps,
  serveAll,
  type ServeAllOptions,
  withFaults,
} from "./multiserv.ts";

// ---- Which tests run --------------------------------------------------------

const onDeno = "deno" in process.versions;
const onLinux = process.platform === "linux";

/** Whether it is allowed, by a flag or by somebody whom Deno may ask. */
function isGranted(name: "net" | "run" | "env") {
  return Deno.permissions.requestSync({ name }).state === "granted";
}
const net = isGranted("net");
const run = net && isGranted("run") && isGranted("env");

type Body = () => void | Promise<void>;

/** What tests have started and is still running, each with its end. */
const children = new Map<ChildProcess, Promise<unknown>>();

/** Fails a test that hangs, and leaves nothing running that it has started. */
const limited = (fn: Body) => async () => {
  const late = Promise.withResolvers<void>();
  const timer = setTimeout(late.reject, 60_000, new Error("Hangs: 60 seconds"));
  try {
    await Promise.race([fn(), late.promise]);
  } finally {
    clearTimeout(timer);
    for (const child of children.keys()) process.kill(child.pid!, "SIGKILL");
    await Promise.all(children.values());
  }
};

function register(name: string, ignore: boolean, fn: Body) {
  Deno.test({ name, ignore, fn: limited(fn) });
}
/** A test that opens no socket. */
const test = (name: string, fn: Body) => register(name, false, fn);
/** A test that needs the network. */
const netTest = (name: string, fn: Body) => register(name, !net, fn);
/** A test that starts the command. */
const runTest = (name: string, fn: Body) => register(name, !run, fn);
/** One that does it in a way that only Linux knows. */
const linuxTest = (name: string, fn: Body) =>
  register(name, !run || !onLinux, fn);
/** A test of what only Deno has: permissions, shebang, `deno test` itself. */
const denoTest = (name: string, fn: Body) =>
  register(onDeno ? name : `${name} (Deno only)`, !run || !onDeno, fn);

// ---- Ports ------------------------------------------------------------------

/** Resolves to whether it listens now. It keeps no program from ending. */
async function listens(server: ReturnType<typeof createServer>, port: number) {
  const bound = Promise.withResolvers<boolean>();
  server.once("error", () => bound.resolve(false));
  server.listen(port, "127.0.0.1", () => bound.resolve(true)).unref();
  return await bound.promise;
}

/** Whether nobody listens on the port. */
async function isFree(port: number): Promise<boolean> {
  const probe = createServer();
  if (!await listens(probe, port)) return false;
  await new Promise((closed) => probe.close(closed));
  return true;
}

/**
 * A block of ports that no other suite uses at the same time: its first port is
 * held as long as this one runs. They lie below those that the system gives to
 * clients, and away from those that `fetch` refuses.
 */
const block = { next: 0, end: 0 };
for (let port = 11_000; net && block.end === 0; port += 5000) {
  if (port > 30_000) throw new Error("Four suites run already");
  if (!await listens(createServer(), port)) continue;
  Object.assign(block, { next: port + 1, end: port + 5000 });
}

/** Finds n free ports in a row, which no other test has had. */
async function freePorts(n: number): Promise<number> {
  const port = block.next;
  block.next += n;
  if (block.next > block.end) throw new Error("This suite has no ports left");
  const taken = await serveAll(newApps(n), { port }).then(
    (servers) => servers.shutdown(),
    () => true,
  );
  return taken ? freePorts(n) : port;
}

const portOf = (url: string) => Number(new URL(url).port);

// ---- Servers and clients ----------------------------------------------------

/** The app that the command line would serve as handler i. */
const helloApp = (i: number, faults?: string) =>
  newApps(1)[0]!.all("*", withFaults(handler(i), faults));
const helloApps = (n: number) =>
  Array.from({ length: n }, (_, i) => helloApp(i));

/** Runs `fn` on running servers, and stops them whatever happens. */
async function using(
  starting: Promise<MultiServer>,
  fn: (urls: [string, ...string[]]) => unknown,
) {
  const servers = await starting;
  try {
    await fn(servers.urls as [string, ...string[]]);
  } finally {
    await servers.shutdown();
  }
}

const get = async (url: string) => (await fetch(url)).text();

async function assertHello(url: string, i = 0) {
  assertEquals(await get(url), `hello from handler ${i}`);
}

/** Opens a raw connection. */
async function dial(port: number): Promise<Socket> {
  const socket = connect(port, "127.0.0.1");
  await once(socket, "connect");
  return socket;
}

/** Sends raw bytes, resolves to all that comes back until the server closes. */
async function raw(port: number, bytes: string): Promise<string> {
  const socket = await dial(port);
  socket.write(bytes);
  return text(socket);
}

/** What a stream has brought so far, and a way to wait for more of it. */
function received(stream: Readable) {
  let seen = "";
  let look = () => {};
  stream.on("data", (data: Uint8Array) => {
    seen += new TextDecoder().decode(data);
    look();
  });
  /** Resolves when the text has come that often. */
  const times = (part: string, n: number) =>
    new Promise<void>((resolve) => {
      look = () => seen.split(part).length > n && resolve();
      look();
    });
  return { times, all: () => seen };
}

/** A POST with a body of so many bytes, of which these come at once. */
const post = (bytes: number, now = bytes) =>
  `POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: ${bytes}\r\n\r\n` +
  "x".repeat(now);

/**
 * Sends a request down a connection of its own. Resolves when it has left; a
 * later one to the same server arrives after it.
 */
async function send(url: string, query: string) {
  const socket = await dial(portOf(url));
  const request = `GET /${query} HTTP/1.1\r\nhost: localhost\r\n` +
    "connection: close\r\n\r\n";
  await new Promise((sent) => socket.write(request, sent));
  const body = async () => (await text(socket)).split("\r\n\r\n")[1];
  return { answer: body().catch(() => undefined) };
}

// ---- A stand-in for Deno, where no network is needed ------------------------

/** Replaces members of `Deno` while `fn` runs. */
async function replacing(members: Record<string, unknown>, fn: Body) {
  const kept = Object.keys(members).map((name) =>
    [name, Object.getOwnPropertyDescriptor(Deno, name)!] as const
  );
  for (const [name, value] of Object.entries(members)) {
    Object.defineProperty(Deno, name, { value, configurable: true });
  }
  try {
    await fn();
  } finally {
    for (const [name, was] of kept) Object.defineProperty(Deno, name, was);
  }
}

/** An error as a system call gives it. */
const systemError = (code: string, message = `told ${code}`) =>
  Object.assign(new Error(message), { code });

/** What stands in for one server of `Deno.serve`. */
interface StandIn {
  port: number;
  fetch: (request: Request) => Response | Promise<Response>;
  /** As a failed `accept` does. */
  fail(error: Error): void;
  /** Requests in flight, which `shutdown` waits for. */
  inFlight: Promise<void>;
  shutdowns: number;
}

/** Stands in for `Deno.serve`; `refuse` may throw instead of listening. */
function standIns(refuse: (port: number) => void = () => {}) {
  const servers: StandIn[] = [];
  const serve = (
    { hostname, port, onListen }: Required<Deno.ServeTcpOptions>,
    fetch: StandIn["fetch"],
  ) => {
    refuse(port);
    const ended = Promise.withResolvers<void>();
    const addr = { transport: "tcp", hostname, port: port || 40_000 } as const;
    const server = {
      port: addr.port,
      fetch,
      fail: ended.reject,
      inFlight: Promise.resolve(),
      shutdowns: 0,
      addr,
      finished: ended.promise,
      async shutdown() {
        server.shutdowns++;
        await server.inFlight;
        ended.resolve();
      },
    };
    servers.push(server);
    onListen(addr);
    return server;
  };
  return { serve, servers };
}

interface Ended {
  code: number | null;
  stdout: string;
  stderr: string;
}

/** Runs `main` in this process, with nothing bound, printed or ended. */
async function inProcess(
  args: string[],
  {
    serve = standIns().serve,
    terminal = false,
    unread = Promise.resolve(),
    whileRunning = () => {},
  }: {
    serve?: unknown;
    terminal?: boolean;
    /** Until when nobody reads stderr. */
    unread?: Promise<void>;
    whileRunning?: (person: {
      press: (signal: string) => void;
      until: (line: string) => Promise<void>;
      exits: number[];
    }) => unknown;
  } = {},
): Promise<Ended> {
  const said = { stdout: "", stderr: "" };
  let look = () => {};
  const stream = (name: keyof typeof said) => ({
    isTerminal: () => terminal,
    writable: new WritableStream<Uint8Array>({
      async write(bytes) {
        if (name === "stderr") await unread;
        said[name] += new TextDecoder().decode(bytes);
        look();
      },
    }),
  });
  const until = (line: string) =>
    new Promise<void>((resolve) => {
      look = () => (said.stdout + said.stderr).includes(line) && resolve();
      look();
    });
  const listeners: Record<string, () => void> = {};
  const exits: number[] = [];
  const granted = { state: "granted" };
  let code: number | null = null;
  await replacing({
    serve,
    stdout: stream("stdout"),
    stderr: stream("stderr"),
    permissions: { querySync: () => granted, requestSync: () => granted },
    addSignalListener(signal: string, listener: () => void) {
      listeners[signal] = listener;
    },
    exit: (code: number) => exits.push(code),
  }, async () => {
    const ending = main(args);
    await whileRunning({
      press: (signal) => listeners[signal]!(),
      until,
      exits,
    });
    code = await ending;
  });
  return { code, ...said };
}

/** What stderr says when servers cannot start. */
const refused = (hostname: string, list: string[], hint?: string): Ended => ({
  code: 1,
  stdout: "",
  stderr: [
    `multiserv: No server started on "${hostname}"`,
    ...list.slice(0, 5),
    ...list.length > 5 ? [`… and ${list.length - 5} more`] : [],
    ...hint === undefined ? [] : [hint],
    "",
  ].join("\n"),
});

/** The ready lines of servers at these URLs. */
const ready = (urls: string[]) =>
  urls.map((url, i) => `handler ${i} listening on ${url}\n`).join("");

// ---- newApps, handler -------------------------------------------------------

test("newApps makes n apps, each a router of its own", async () => {
  const apps = newApps(3);
  assertEquals(apps.length, 3);
  apps[1]!.get("/only-here", (c) => c.text("here"));
  const statuses = apps.map(async (app) =>
    (await app.request("/only-here")).status
  );
  assertEquals(await Promise.all(statuses), [404, 200, 404]);
});

test("newApps refuses what is no number of servers", () => {
  for (const n of [0, -1, 1.5, NaN, Infinity, 64513, 1e21]) {
    const error = assertThrows(() => newApps(n), RangeError) as RangeError;
    assertEquals(
      error.message,
      `n must be a whole number from 1 to 64512, got "${n}"`,
    );
  }
  assertThrows(() => newApps("3" as unknown as number), RangeError);
  assertEquals(newApps(64512).length, 64512);
});

test("any method and path: 200, text/plain, the exact bytes", async () => {
  const app = newApps(1)[0]!.all("*", handler(7));
  for (const method of ["GET", "POST", "PUT", "DELETE", "OPTIONS", "FOO"]) {
    for (const path of ["/", "/a/b/", "//x", "/%ff", "/ü", "/?delay=x", "/*"]) {
      const response = await app.request(path, { method });
      assertEquals(response.status, 200);
      assertMatch(response.headers.get("content-type") ?? "", /^text\/plain\b/);
      assertEquals(
        new Uint8Array(await response.arrayBuffer()),
        new TextEncoder().encode("hello from handler 7"),
      );
    }
  }
});

test("HEAD: the same without a body", async () => {
  for (const path of ["/", "/?status=500"]) {
    const get = await helloApp(7).request(path);
    const head = await helloApp(7).request(path, { method: "HEAD" });
    assertEquals(head.status, get.status);
    assertEquals(
      head.headers.get("content-type"),
      get.headers.get("content-type"),
    );
    assertEquals(await head.text(), "");
  }
});

// ---- withFaults -------------------------------------------------------------

test("?status answers with that status, and the same body", async () => {
  for (
    const status of [200, 201, 301, 404, 418, 429, 499, 503, 520, 529, 599]
  ) {
    const response = await helloApp(3).request(`/a?status=${status}`);
    assertEquals(response.status, status);
    assertMatch(response.headers.get("content-type") ?? "", /^text\/plain\b/);
    assertEquals(await response.text(), "hello from handler 3");
  }
  for (const status of [204, 205, 304]) {
    const response = await helloApp(3).request(`/?status=${status}`);
    assertEquals([response.status, response.body], [status, null]);
  }
});

/** The statuses of a request when chance draws these numbers. */
async function statuses(query: string, chances: number[], faults?: string) {
  const { random } = Math;
  try {
    const seen = [];
    for (const chance of chances) {
      Math.random = () => chance;
      seen.push((await helloApp(0, faults).request(query)).status);
    }
    return seen;
  } finally {
    Math.random = random;
  }
}

test("?status=<code>:<percent> is a share of the answers", async () => {
  const chances = [0, 0.0999, 0.1, 0.9999];
  for (
    const [query, seen] of [
      ["/?status=503:10", [503, 503, 200, 200]],
      ["/?status=503:0", [200, 200, 200, 200]],
      ["/?status=503:100", [503, 503, 503, 503]],
      ["/?status=503", [503, 503, 503, 503]],
    ] as const
  ) assertEquals(await statuses(query, chances), seen);
});

test("?delay waits as long as it says, also with ?status", async () => {
  const order: string[] = [];
  const ask = async (query: string) => {
    const response = await helloApp(1).request(`/?${query}`);
    assertEquals(await response.text(), "hello from handler 1");
    order.push(`${query} ${response.status}`);
  };
  // Timers of one process fire in their order, however late they are.
  const after = (ms: number) => sleep(ms).then(() => order.push(`${ms} ms`));
  await Promise.all([
    after(350),
    ask("delay=300&status=503"),
    after(250),
    after(150),
    ask("delay=100"),
    after(50),
    ask("delay=0"),
  ]);
  assertEquals(order, [
    "delay=0 200",
    "50 ms",
    "delay=100 200",
    "150 ms",
    "250 ms",
    "delay=300&status=503 503",
    "350 ms",
  ]);
});

test("what a request asks for wins over the handler's own faults", async () => {
  const faults = "delay=100&status=503";
  const order: string[] = [];
  const ask = async (query: string) => {
    const { status } = await helloApp(0, faults).request(query);
    order.push(`${query} ${status}`);
  };
  await Promise.all([ask("/"), ask("/?delay=0"), ask("/?status=429")]);
  assertEquals(order[0], "/?delay=0 503");
  assertEquals(order.slice(1).sort(), ["/ 503", "/?status=429 429"]);
  assertEquals(await statuses("/", [0, 0.5], "status=500:20"), [500, 200]);
  assertEquals(
    await statuses("/?status=501", [0, 0.5], "status=500:20"),
    [501, 501],
  );
});

const whole = (name: string, min: number, max: number) => (got: string) =>
  `${name} must be a whole number from ${min} to ${max}, got "${got}"`;
const delayRange = whole("delay", 0, 60_000);
const statusRange = whole("status", 200, 599);
const percentRange = whole("percent of status", 0, 100);

/** Faults that make no sense, and what was expected. */
const nonsense: Record<string, string> = {
  "delay": delayRange(""),
  "delay=60000&status=1": statusRange("1"),
  [`delay=${"9".repeat(12_000)}`]: delayRange("9".repeat(40) + "…"),
};
for (const got of ["", "x", "-1", "1.5", "1e3", "0x10", " 1", "60001"]) {
  nonsense[`delay=${encodeURIComponent(got)}`] = delayRange(got);
}
for (const got of ["", "x", "20", "199", "600", "2e2", "-200", "200.0"]) {
  nonsense[`status=${got}`] = statusRange(got);
}
for (const got of ["", "x", "101", "-1", "0.5", "10:5"]) {
  nonsense[`status=503:${got}`] = percentRange(got);
}

test("a request for nonsense: 400 and what was expected", async () => {
  for (const [query, message] of Object.entries(nonsense)) {
    const response = await helloApp(0).request(`/?${query}`);
    assertEquals([response.status, await response.text()], [400, message]);
    assertMatch(response.headers.get("content-type") ?? "", /^text\/plain\b/);
  }
});

test("withFaults refuses nonsense when it is called", () => {
  const others = {
    "delay=1&status=200&dealy=200":
      'faults are delay=<ms> and status=<code>[:<percent>], got "dealy"',
  };
  for (const [faults, message] of Object.entries({ ...nonsense, ...others })) {
    const call = () => withFaults(handler(0), faults);
    const error = assertThrows(call, RangeError) as RangeError;
    assertEquals(error.message, message);
  }
});

test("withFaults takes any handler, and keeps what it answers", async () => {
  const [app] = newApps(1);
  app!.all("*", withFaults((c) => c.text("gone", 410, { "x-own": "yes" })));
  for (const query of ["", "?other=1", "?status=200&status=500"]) {
    const response = await app!.request(`/${query}`);
    assertEquals(response.status, query.startsWith("?status") ? 200 : 410);
    assertEquals(response.headers.get("x-own"), "yes");
    assertEquals(await response.text(), "gone");
  }
  // One that leaves the answer to the next is a handler, too.
  const [other] = newApps(1);
  other!.get("/", withFaults((_c, next) => next()), handler(1));
  for (const [query, status] of [["", 200], ["?status=503", 503]]) {
    const response = await other!.request(`/${query}`);
    assertEquals(response.status, status);
    assertEquals(await response.text(), "hello from handler 1");
  }
  assertEquals((await other!.request("/no-such?status=503")).status, 404);
  // The first of two is meant, here too.
  assertEquals(await statuses("/", [0], "status=500&status=501"), [500]);
});

test("withFaults discards a body that nobody reads, and no other", async () => {
  for (const query of ["", "?status=503", "?status=x"]) {
    const post = { method: "POST", body: "sent" };
    const request = new Request(`http://localhost/${query}`, post);
    await helloApp(0).fetch(request);
    assert(request.bodyUsed, query);
  }
  // One that somebody holds on to cannot be discarded, which is no error.
  const [app] = newApps(1);
  app!.post("/", withFaults((c) => c.text(`${c.req.raw.body!.getReader()}`)));
  const response = await app!.request("/", { method: "POST", body: "sent" });
  assertEquals(response.status, 200);
});

netTest("withFaults leaves a body to whoever reads it", async () => {
  const readers: Handler[] = [
    async (c) => c.text(await c.req.text()),
    (c) => new Response(c.req.raw.body),
  ];
  const apps = newApps(readers.length);
  apps.forEach((app, i) => app.post("/", withFaults(readers[i]!)));
  await using(serveAll(apps, { port: 0 }), async (urls) => {
    for (const url of urls) {
      const socket = await dial(portOf(url));
      const { times } = received(socket);
      socket.write(post(4, 0));
      await sleep(20); // the body comes when the handler has answered
      socket.write("xxxx");
      await times("xxxx", 1);
      socket.destroy();
    }
  });
});

test("a client that leaves ends the longest delay", async () => {
  const leaving = new AbortController();
  const request = new Request("http://localhost/?delay=60000", leaving);
  const answer = helloApp(0).request(request);
  leaving.abort();
  assertEquals((await answer).status, 200);
});

test("only a delay looks whether the client has left", async () => {
  // Deno prints a note when `signal` is first read.
  for (const query of ["", "?status=503", "?delay=0", "?delay=x"]) {
    const request = new Request(`http://localhost/${query}`);
    let looked = false;
    Object.defineProperty(request, "signal", { get: () => looked = true });
    await helloApp(0).fetch(request);
    assertEquals(looked, false, query);
  }
});

// ---- serveAll: what it refuses ----------------------------------------------

test("serveAll refuses bad ports and more apps than ports", async () => {
  const port = (got: number) =>
    `port, unless 0, must be a whole number from 1024 to 65535, got "${got}"`;
  const bad: [n: number, options: ServeAllOptions, message: string][] = [
    ...[80, 1023, 65536, -1, 1024.5, NaN].map(
      (got): typeof bad[number] => [1, { port: got }, port(got)],
    ),
    [
      2,
      { port: 65535 },
      'only 1 of "2" servers fit on the ports from 65535 up',
    ],
    [
      5537,
      { port: 60000 },
      'only 5536 of "5537" servers fit on the ports from 60000 up',
    ],
  ];
  for (const [n, options, message] of bad) {
    const error = await assertRejects(
      () => serveAll(newApps(n), options),
      RangeError,
    );
    assertEquals((error as Error).message, message);
  }
  const text = { port: "5000" } as unknown as ServeAllOptions;
  await assertRejects(() => serveAll(newApps(1), text), RangeError);
  const none = await assertRejects(() => serveAll([]), RangeError);
  assertStringIncludes((none as Error).message, 'got "0"');
});

netTest(
  "a taken port: one AggregateError, nothing left listening",
  async () => {
    const port = await freePorts(4);
    await using(serveAll(newApps(1), { port: port + 2 }), async () => {
      const error = await assertRejects(
        () => serveAll(newApps(4), { port }),
        AggregateError,
      ) as AggregateError;
      assertEquals(error.message, 'No server started on "127.0.0.1"');
      assertEquals(
        error.errors.map((error) => [error.message, error.cause.code]),
        [[`port ${port + 2} is already in use`, "EADDRINUSE"]],
      );
      for (const i of [0, 1, 3]) assert(await isFree(port + i));
    });
  },
);

netTest("an empty hostname does not mean all addresses", async () => {
  const starting = serveAll(newApps(1), { port: 0, hostname: "" });
  await assertRejects(() => starting, AggregateError);
});

// ---- serveAll: what it serves -----------------------------------------------

test("the first port is 1024 unless told otherwise", async () => {
  await replacing({ serve: standIns().serve }, async () => {
    const { urls } = await serveAll(newApps(2));
    assertEquals(urls, ["http://127.0.0.1:1024", "http://127.0.0.1:1025"]);
  });
});

netTest("app i listens on port + i", async () => {
  const port = await freePorts(3);
  await using(serveAll(helloApps(3), { port }), async (urls) => {
    assertEquals(urls, [0, 1, 2].map((i) => `http://127.0.0.1:${port + i}`));
    await Promise.all(urls.map(assertHello));
  });
});

netTest("port 0 gives every app a free port", async () => {
  await using(serveAll(helloApps(5), { port: 0 }), async (urls) => {
    assertEquals(new Set(urls.map(portOf)).size, 5);
    await Promise.all(urls.map(assertHello));
  });
});

netTest("what goes over the wire", async () => {
  await using(serveAll(helloApps(1), { port: 0 }), async ([url]) => {
    const ask = (method: string, path = "/") =>
      raw(
        portOf(url),
        `${method} ${path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n`,
      );
    for (const method of ["GET", "DELETE", "OPTIONS", "PROPFIND"]) {
      const [head = "", body] = (await ask(method)).split("\r\n\r\n");
      assertMatch(head, /^HTTP\/1.1 200 OK\r\n/);
      assertMatch(head, /^content-type: text\/plain;/im);
      assertMatch(head, /^content-length: 20\r?$/im);
      assertEquals(body, "hello from handler 0");
    }
    // Old clients do not say which host they mean.
    for (const version of ["1.0", "1.1\r\nconnection: close"]) {
      const answer = await raw(portOf(url), `GET / HTTP/${version}\r\n\r\n`);
      assertMatch(answer, / 200 OK/);
    }
    for (const [method, path] of [["HEAD", "/"], ["GET", "/?status=204"]]) {
      const [, body] = (await ask(method!, path)).split("\r\n\r\n");
      assertEquals(body, "");
    }
    assertMatch(await ask("GET", "/?status=503"), /^HTTP\/1.1 503 /);
    assertMatch(await ask("GET", "/?status=599"), /^HTTP\/1.1 599 /);
  });
});

netTest("no hello for CONNECT, nor late for who stopped sending", async () => {
  await using(serveAll(helloApps(1), { port: 0 }), async ([url]) => {
    const port = portOf(url);
    const rest = "HTTP/1.1\r\nhost: a:1\r\nconnection: close\r\n\r\n";
    assert(!(await raw(port, `CONNECT a:1 ${rest}`)).includes("hello"));
    const socket = await dial(port);
    socket.end(`GET /?delay=60000 ${rest}`);
    assertEquals(await text(socket), "");
  });
});

netTest("serves whatever has a fetch, and tells it who asks", async () => {
  class Counter {
    count = 0;
    fetch(_request: Request, { remoteAddr }: Deno.ServeHandlerInfo) {
      const { hostname } = remoteAddr as Deno.NetAddr;
      return new Response(`${++this.count} ${hostname}`);
    }
  }
  const apps = [new Counter(), { fetch: () => new Response("own") }];
  await using(serveAll(apps, { port: 0 }), async (urls) => {
    assertEquals(await Promise.all(urls.map(get)), ["1 127.0.0.1", "own"]);
    assertEquals(await get(urls[0]), "2 127.0.0.1");
  });
});

netTest("a client that hangs up frees its timer", async () => {
  const app = helloApp(0);
  const arrived = Promise.withResolvers<void>();
  const done = Promise.withResolvers<void>();
  const fetch = async (request: Request) => {
    const answer = app.fetch(request);
    arrived.resolve();
    const response = await answer;
    done.resolve();
    return response;
  };
  await using(serveAll([{ fetch }], { port: 0 }), async ([url]) => {
    const socket = await dial(portOf(url));
    socket.write("GET /?delay=60000 HTTP/1.1\r\nhost: localhost\r\n\r\n");
    await arrived.promise;
    socket.destroy();
    await done.promise;
  });
});

netTest("uploads nobody reads: answered, on the same connection", async () => {
  const size = 3_000_000;
  await using(serveAll(helloApps(1), { port: 0 }), async ([url]) => {
    const socket = await dial(portOf(url));
    const { times } = received(socket);
    for (const n of [1, 2, 3]) {
      socket.write(post(size));
      await times("hello from handler 0", n);
    }
    // A slow one: it goes on long after the answer.
    socket.write(post(size, 0));
    for (let sent = 0; sent < size; sent += size / 10) {
      socket.write("x".repeat(size / 10));
      await sleep(100);
    }
    socket.write(post(10));
    await times("hello from handler 0", 5);
    socket.destroy();
  });
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
  const servers = await serveAll(apps, { port: await freePorts(2) });
  const ports = servers.urls.map(portOf);
  const done: string[] = [];
  const finished = servers.finished.then(() => done.push("finished"));
  const answer = get(servers.urls[0]!);
  await arrived.promise;
  const stopping = servers.shutdown().then(() => done.push("shutdown"));
  const again = servers.shutdown();
  for (const port of ports) await assertRejects(() => dial(port));
  assertEquals(done, []);
  release.resolve();
  assertEquals(await answer, "at last");
  await Promise.all([stopping, again, finished]);
  await servers.shutdown();
  for (const port of ports) assert(await isFree(port));
});

netTest("silent and kept-alive connections do not hold it up", async () => {
  const servers = await serveAll(helloApps(2), { port: 0 });
  const [silent, idle] = await Promise.all(
    servers.urls.map((url) => dial(portOf(url))),
  ) as [Socket, Socket];
  idle.write("GET / HTTP/1.1\r\nhost: localhost\r\n\r\n");
  await once(idle, "data");
  const gone = [once(silent, "close"), once(idle, "close")];
  idle.resume();
  silent.resume();
  await servers.shutdown();
  await Promise.all(gone);
});

netTest("asyncDispose is shutdown", async () => {
  const servers = await serveAll(helloApps(2), { port: await freePorts(2) });
  await servers[Symbol.asyncDispose]();
  await servers.finished;
  for (const url of servers.urls) assert(await isFree(portOf(url)));
});

// ---- A server that cannot accept --------------------------------------------

/** Two servers without a network, of which the first is to fail. */
async function twoServers(
  fn: (
    servers: MultiServer,
    standIns: StandIn[],
    refuse: (code?: string) => void,
  ) => Promise<void>,
) {
  let code: string | undefined;
  const stand = standIns(() => {
    if (code !== undefined) throw systemError(code);
  });
  await replacing({ serve: stand.serve }, async () => {
    const servers = await serveAll(helloApps(2), { port: 5000 });
    await fn(servers, stand.servers, (c) => code = c);
  });
}

/** Resolves once so many servers have been started. */
async function untilStarted(servers: StandIn[], n: number) {
  while (servers.length < n) await sleep(5);
}

test("a server that fails to accept listens again, as it was", async () => {
  await twoServers(async (servers, standIns, refuse) => {
    const [first, second] = standIns as [StandIn, StandIn];
    const inFlight = Promise.withResolvers<void>();
    first.inFlight = inFlight.promise;
    refuse("EMFILE"); // nor can it listen again at once
    first.fail(systemError("ECONNABORTED"));
    await sleep(250);
    refuse(undefined);
    await untilStarted(standIns, 3);
    standIns[2]!.fail(systemError("EMFILE")); // it may fail more than once
    await untilStarted(standIns, 4);
    const { port, fetch } = standIns[3]!;
    assertEquals(port, 5000);
    const answer = await fetch(new Request("http://localhost/"));
    assertEquals(await answer.text(), "hello from handler 0");
    assertEquals(second.shutdowns, 0);

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
    assertEquals(standIns.length, 4);
  });
});

test("shutdown while it waits to listen again", async () => {
  await twoServers(async (servers, standIns) => {
    standIns[0]!.fail(systemError("EMFILE"));
    await sleep(1);
    await servers.shutdown();
    await servers.finished;
    assertEquals(standIns.length, 2);
  });
});

test("a port that is lost meanwhile rejects finished", async () => {
  await twoServers(async (servers, standIns, refuse) => {
    refuse("EADDRINUSE");
    standIns[0]!.fail(systemError("EMFILE"));
    const error = await assertRejects(() => servers.finished) as Error;
    assertEquals(error.message, "port 5000 is already in use");
    assertEquals((error.cause as { code: string }).code, "EADDRINUSE");
    await servers.shutdown();
    assertEquals(standIns[1]!.shutdowns, 1);
  });
});

test("port 0: it listens again on the port it had", async () => {
  const { serve, servers: standIn } = standIns();
  await replacing({ serve }, async () => {
    await using(serveAll(helloApps(1), { port: 0 }), async () => {
      standIn[0]!.fail(systemError("EMFILE"));
      await untilStarted(standIn, 2);
      assertEquals(standIn[1]!.port, 40_000);
    });
  });
});

// ---- The command line: what it refuses --------------------------------------

const n = whole("n", 1, 64512);
const port = whole("port, unless 0,", 1024, 65535);
const first = whole("first", 0, 64511);
const fit = (most: number, servers: number, from: number) =>
  `only ${most} of "${servers}" servers fit on the ports from ${from} up`;
const needsValue = (option: string) => `--${option} needs a value`;

/** Wrong command lines, `_` for a space, and what they are told. */
const wrong: Record<string, string> = {
  "-v": "n is missing",
  "-p 5000": "n is missing",
  "3 4": 'one n is enough, got "3 4"',
  "3 ": 'one n is enough, got "3 "',
  "--_=x 3": 'one n is enough, got "x 3"',
  "3 -p": needsValue("port"),
  "3 --port": needsValue("port"),
  "3 --port=": needsValue("port"),
  "3 -p -v": needsValue("port"),
  "3 -f": needsValue("first"),
  "3 -H": needsValue("hostname"),
  "3 -H ": needsValue("hostname"),
  "3 --hostname=": needsValue("hostname"),
  "3 --faults": needsValue("faults"),
  "2 -p 65535": fit(1, 2, 65535),
  "536 -p 60000 -f 5001": fit(535, 536, 65001),
  "3 -p 65000 -f 536": whole("first", 0, 535)("536"),
  "64513 -p 0": n("64513"),
  "--": "n is missing",
  "-- -3": n("-3"),
  "--_": n(""),
  [`3\n4`]: n("3\\n4"),
  ["9".repeat(12_000)]: n("9".repeat(40) + "…"),
  ["9".repeat(41)]: n("9".repeat(40) + "…"),
  ["9".repeat(40)]: n("9".repeat(40)),
  ["😀".repeat(41)]: n("😀".repeat(40) + "…"),
  "3 --faults delay=-1": delayRange("-1"),
  "3 --faults status=503:101": percentRange("101"),
  "3 --faults dealy=1":
    'faults are delay=<ms> and status=<code>[:<percent>], got "dealy"',
};
for (const got of ["abc", "3.5", "3.0", "1e3", "0x10", "0", "00", "+3", "٣"]) {
  wrong[got] = n(got);
}
for (const got of ["", "-", "1_000", "Infinity", "64513", "9".repeat(20)]) {
  wrong[got] = n(got);
}
for (const got of ["80", "1023", "65536", "http", "-1", "1e4", "00"]) {
  wrong[`3 --port=${got}`] = port(got);
}
for (const got of ["x", "-1", "64512"]) wrong[`3 --first=${got}`] = first(got);
for (const got of ["-3", "-x", "--prot", "--prot=5", "--no-verbose"]) {
  wrong[`${got} 3`] = `unknown option "${got}"`;
}
for (const got of ["-v3", "-v=1", "--verbose=1", "--help=no", "-vp80"]) {
  wrong[`3 ${got}`] = `this option takes no value: "${got}"`;
}

const toldWrong = (message: string): Ended => ({
  code: 2,
  stdout: "",
  stderr: `multiserv: ${message}\nTry --help\n`,
});

test("wrong command lines: what is wrong, exit 2", async () => {
  for (const [line, message] of Object.entries(wrong)) {
    assertEquals(await inProcess(line.split(" ")), toldWrong(message), line);
  }
  for (const got of [" 3", "3 "]) {
    assertEquals(await inProcess([got]), toldWrong(n(got)));
  }
});

test("no argument at all: n is missing, and the usage", async () => {
  const usage = (await inProcess(["--help"])).stdout;
  assertMatch(usage, /^Usage: multiserv \[options\] <n>\n/);
  const stderr = `multiserv: n is missing\n${usage}`;
  assertEquals(await inProcess([]), { code: 2, stdout: "", stderr });
  for (const args of [["-h"], ["3", "-p", "80", "-h"], ["-vh"]]) {
    const ended = await inProcess(args);
    assertEquals(ended, { code: 0, stdout: usage, stderr: "" });
  }
});

test("a fault of the program itself is not called one of its user", async () => {
  await assertRejects(() => inProcess(null as unknown as string[]), TypeError);
});

/** What people are told when the system refuses a server with this code. */
const elsewhere = ": address not on this machine; Try another --hostname";
const files = ": too many open files; Raise ulimit -n or start fewer";
const refusals: Record<string, string> = {
  EADDRINUSE: " is already in use; Try another --port",
  EACCES: ": permission denied; Try another --port",
  EADDRNOTAVAIL: elsewhere,
  EAFNOSUPPORT: elsewhere,
  EINVAL: elsewhere,
  EMFILE: files,
  ENFILE: files,
  EBUSY: files,
  // The words of an error are not searched: hosts' names stand in them.
  EOTHER: ": told EADDRINUSE too many files",
};

test("every way the machine can refuse has its words", async () => {
  for (const [code, told] of Object.entries(refusals)) {
    const { serve } = standIns(() => {
      throw systemError(code, "told EADDRINUSE too many files");
    });
    const [why, hint] = told.split("; ");
    const ended = refused("127.0.0.1", [`port 1024${why}`], hint);
    assertEquals(await inProcess(["1"], { serve }), ended);
  }
});

test("no access: the flag to add, with the host", async () => {
  const { serve } = standIns(() => {
    throw Object.assign(new Error("no"), { name: "NotCapable" });
  });
  const list = [1024, 1025].map((port) => `port ${port}: no network access`);
  for (const [given, host] of [["127.0.0.1", "127.0.0.1"], ["::1", "[::1]"]]) {
    const hint = `Allow it: deno run --allow-net=${host}`;
    const ended = refused(given!, list, hint);
    assertEquals(await inProcess(["2", "-H", given!], { serve }), ended);
  }
});

test("many errors: five of them, how many more, the last one's hint", async () => {
  for (const n of [5, 6, 8]) {
    const last = 1024 + n - 1;
    const { serve } = standIns((port) => {
      throw systemError(port === last ? "EMFILE" : "EADDRINUSE");
    });
    const list = Array.from({ length: n - 1 }, (_, k) => `port ${1024 + k} is`)
      .map((line) => `${line} already in use`);
    list.push(`port ${last}: too many open files`);
    const ended = refused("127.0.0.1", list, "Raise ulimit -n or start fewer");
    assertEquals(await inProcess([`${n}`], { serve }), ended);
  }
});

// ---- The command line: what it does -----------------------------------------

/** Command lines, and the ready lines that they print. */
const listening: Record<string, string[]> = {
  "2": ["0 127.0.0.1:1024", "1 127.0.0.1:1025"],
  "-v 2 --port=5000": ["0 127.0.0.1:5000", "1 127.0.0.1:5001"],
  "2 -p 5000 --first 3": ["3 127.0.0.1:5003", "4 127.0.0.1:5004"],
  "1 -p 65000 -f 535": ["535 127.0.0.1:65535"],
  "1 -p0 -f64511": ["64511 127.0.0.1:40000"],
  "1 -H ::1": ["0 [::1]:1024"],
  "1 --hostname=[::1]": ["0 [::1]:1024"],
};

test("handler i listens on port + i", async () => {
  for (const [line, expected] of Object.entries(listening)) {
    const { serve, servers } = standIns();
    const { code, stdout } = await inProcess(line.split(" "), {
      serve,
      async whileRunning({ press, until }) {
        await until(`${expected.at(-1)!.split(" ")[1]}\n`);
        for (const [k, { fetch }] of servers.entries()) {
          const answer = await fetch(new Request("http://localhost/a"));
          const [i] = expected[k]!.split(" ");
          assertEquals(await answer.text(), `hello from handler ${i}`);
        }
        press("SIGTERM");
      },
    });
    const lines = expected.map((words) => {
      const [i, host] = words.split(" ");
      return `handler ${i} listening on http://${host}\n`;
    });
    assertEquals([code, stdout], [0, lines.join("")]);
  }
});

test("--faults holds for requests that do not ask", async () => {
  const { serve, servers } = standIns();
  await inProcess(["1", "--faults", "status=503"], {
    serve,
    async whileRunning({ press, until }) {
      await until("listening");
      for (const [query, status] of [["", 503], ["?status=200", 200]]) {
        const request = new Request(`http://localhost/${query}`);
        assertEquals((await servers[0]!.fetch(request)).status, status);
      }
      press("SIGINT");
    },
  });
});

test("a second signal ends it at once, also while it starts", async () => {
  for (const [signal, code] of [["SIGINT", 130], ["SIGTERM", 143]] as const) {
    const { serve, servers } = standIns();
    const inFlight = Promise.withResolvers<void>();
    await inProcess(["1"], {
      serve,
      async whileRunning({ press, until, exits }) {
        press("SIGINT"); // nothing has been awaited yet
        await until("listening");
        servers[0]!.inFlight = inFlight.promise;
        press(signal);
        assertEquals(exits, [code]);
        inFlight.resolve();
      },
    });
  }
});

test("on a terminal: how to stop, and why it takes a while", async () => {
  const { serve, servers } = standIns();
  const inFlight = Promise.withResolvers<void>();
  const notice = "Answering requests in flight; Ctrl+C again stops now\n";
  const { stderr } = await inProcess(["1"], {
    serve,
    terminal: true,
    async whileRunning({ press, until }) {
      await until("Press Ctrl+C to stop\n");
      servers[0]!.inFlight = inFlight.promise;
      press("SIGINT");
      await until(notice);
      inFlight.resolve();
    },
  });
  assertEquals(stderr, `Press Ctrl+C to stop\n${notice}`);
});

test("a port that is lost later: the rest stops, exit 1 and why", async () => {
  let lost = false;
  const { serve, servers } = standIns(() => {
    if (lost) throw systemError("EADDRINUSE");
  });
  const { code, stderr } = await inProcess(["2"], {
    serve,
    async whileRunning({ until }) {
      await until("listening");
      lost = true;
      servers[1]!.fail(systemError("EMFILE"));
    },
  });
  assertEquals([code, servers[0]!.shutdowns], [1, 1]);
  assertEquals(
    stderr,
    "multiserv: All servers stopped\nport 1025 is already in use\n" +
      "Try another --port\n",
  );
});

test("--verbose: path and query only, so that no client forges a line", async () => {
  const { serve, servers } = standIns();
  const { stderr } = await inProcess(["2", "-v", "--first", "7"], {
    serve,
    async whileRunning({ press, until }) {
      await until("listening");
      const ask = (url: string, init?: RequestInit) => {
        const request = new Request("http://localhost/", init);
        // As Deno has it: made of what the client sends, valid or not.
        Object.defineProperty(request, "url", { value: url });
        return servers[1]!.fetch(request);
      };
      await ask("http://localhost/a?status=404");
      await ask("http://b/c", { method: "POST", body: "x" });
      await ask("http://localhost//d\u009b\u202e \x1b[31m?\u009b=\u202e");
      await ask("http://[/e");
      await ask("http://a/ 200 handler 7: GET http://b/f");
      press("SIGTERM");
    },
  });
  assertEquals(
    stderr,
    "handler 8: GET /a?status=404 404\n" +
      "handler 8: POST /c 200\n" +
      "handler 8: GET //d%C2%9B%E2%80%AE%20%1B[31m?%C2%9B=%E2%80%AE 200\n" +
      "handler 8: GET /e 200\n" +
      "handler 8: GET /%20200%20handler%207:%20GET%20http://b/f 200\n",
  );
});

test("of a log that nobody reads it keeps a thousand lines", async () => {
  const { serve, servers } = standIns();
  const reading = Promise.withResolvers<void>();
  const { stderr } = await inProcess(["1", "-v"], {
    serve,
    unread: reading.promise,
    async whileRunning({ press, until }) {
      await until("listening");
      for (let k = 0; k < 2000; k++) {
        await servers[0]!.fetch(new Request("http://localhost/"));
      }
      reading.resolve();
      press("SIGTERM");
    },
  });
  const lines = stderr.split("\n").length;
  assert(lines > 990 && lines < 1010, `${lines} lines`);
});

// ---- The command, as a process ----------------------------------------------

const here = dirname(fileURLToPath(import.meta.url));
const runtime = process.execPath;
const command = onDeno
  ? [runtime, "run", "--allow-net", "multiserv.ts"]
  : [runtime, "node/multiserv.ts"];

/** Starts a command in the repository. */
function start(words: string[], stdin: "ignore" | "pipe" = "ignore") {
  const child = spawn("env", ["NO_COLOR=1", ...words], {
    cwd: here,
    stdio: [stdin, "pipe", "pipe"],
  });
  const closed = once(child, "close").then(([code]) => {
    children.delete(child);
    return code as number | null;
  });
  children.set(child, closed);
  const kill = (signal: NodeJS.Signals) => process.kill(child.pid!, signal);
  return { child, stdout: child.stdout!, stderr: child.stderr!, closed, kill };
}

/** Starts a command, resolves to all it says. */
function launch(words: string[], stdin?: "pipe") {
  const { child, stdout, stderr, closed, kill } = start(words, stdin);
  const ended: Promise<Ended> = Promise.all([
    closed,
    text(stdout),
    text(stderr),
  ]).then(([code, stdout, stderr]) => ({ code, stdout, stderr }));
  return { child, ended, kill };
}

/** What stands in a file of the repository. */
const contents = async (path: string) =>
  (await launch(["cat", path]).ended).stdout;

/** Runs `multiserv` with these arguments, to its end. */
const cli = (...args: string[]) => launch([...command, ...args]).ended;

/** Starts a command that serves n ports and waits for its ready lines. */
async function serving(n: number, words: string[]) {
  const { child, ended, kill } = launch(words);
  const { times, all } = received(child.stdout!);
  const early = ended.then(({ stderr }) => Promise.reject(new Error(stderr)));
  await Promise.race([times("\n", n), early]);
  const urls = all().match(/http:\S+(?=\n)/g) ?? [];
  assertEquals(urls.length, n);
  return { urls: urls as unknown as [string, ...string[]], ended, kill };
}

/** Starts `multiserv` on free ports and waits for its ready lines. */
const running = (n: number, ...args: string[]) =>
  serving(n, [...command, `${n}`, "-p", "0", ...args]);

/** The command for `multiserv` with so many open files allowed. */
const withFiles = (files: number, ...args: string[]) => {
  const line = `ulimit -n ${files} && exec "$@"`;
  return ["sh", "-c", line, "sh", ...command, ...args];
};

/** Waits until somebody listens, or nobody does any more. */
async function untilListening(port: number, listening: boolean) {
  for (;;) {
    const socket = await dial(port).catch(() => undefined);
    socket?.destroy();
    if (listening === (socket !== undefined)) return;
  }
}

runTest("a handful of wrong command lines, for real", async () => {
  for (const line of ["abc", "3 -p", "3 -v3", "2 -p 65535", "-x 3"]) {
    assertEquals(await cli(...line.split(" ")), toldWrong(wrong[line]!));
  }
});

for (const signal of ["SIGINT", "SIGTERM"] as const) {
  runTest(`${signal}: answers what is in flight, exit 0`, async () => {
    const port = `${await freePorts(2)}`;
    const { urls, kill, ended } = await running(2, "-p", port);
    const slow = await send(urls[0], "?delay=300");
    await assertHello(urls[0]);
    kill(signal);
    assertEquals(await slow.answer, "hello from handler 0");
    assertEquals(await ended, { code: 0, stdout: ready(urls), stderr: "" });
    for (const url of urls) assert(await isFree(portOf(url)));
  });

  runTest(`a second ${signal} ends it at once`, async () => {
    const port = `${await freePorts(1)}`;
    const { urls: [url], kill, ended } = await running(1, "-p", port);
    const lost = await send(url, "?delay=60000");
    await get(url);
    kill(signal);
    await untilListening(portOf(url), false);
    kill(signal);
    assertEquals((await ended).code, signal === "SIGINT" ? 130 : 143);
    assertEquals(await lost.answer, undefined);
  });
}

runTest("SIGTERM under load loses no request it has accepted", async () => {
  const n = 100;
  const { urls, kill, ended } = await running(n);
  const slow = await Promise.all(urls.map((url) => send(url, "?delay=300")));
  let reached = 0;
  const loads = urls.map(async (url, i) => {
    for (let first = true;; first = false) {
      const answer = await get(url).catch(() => "refused");
      if (answer === "refused") return;
      assertEquals(answer, `hello from handler ${i}`);
      // Every server has answered once, so the slow requests have arrived.
      if (first && ++reached === n) kill("SIGTERM");
    }
  });
  assertEquals(
    await Promise.all(slow.map(({ answer }) => answer)),
    urls.map((_, i) => `hello from handler ${i}`),
  );
  await Promise.all(loads);
  assertEquals((await ended).code, 0);
});

runTest("IPv6 and names, where the machine knows them", async () => {
  for (const hostname of ["::1", "[::1]", "localhost"]) {
    const args = ["1", "-p", `${await freePorts(1)}`, "-H", hostname];
    const started = await serving(1, [...command, ...args]).catch(() => {});
    if (!started) {
      const { code, stderr } = await cli(...args);
      assertEquals(code, 1);
      assertStringIncludes(stderr, ": address not on this machine\n");
      continue;
    }
    const { urls: [url], kill, ended } = started;
    assertMatch(url, /^http:\/\/(\[::1\]|127\.0\.0\.1):\d+$/);
    await assertHello(url);
    kill("SIGTERM");
    await ended;
  }
});

runTest("an address of another machine, and unknown hosts", async () => {
  const port = await freePorts(1);
  for (const hostname of ["192.0.2.1", "ff02::1"]) {
    assertEquals(
      await cli("1", "-p", `${port}`, "-H", hostname),
      refused(
        hostname,
        [`port ${port}: address not on this machine`],
        "Try another --hostname",
      ),
    );
  }
  for (
    const hostname of [
      "no-such-host.invalid",
      "too-many-open-files.invalid",
      "EADDRINUSE.invalid",
      "a".repeat(300),
      "a b",
      "x:y",
      "[x]",
      "[127.0.0.1]",
    ]
  ) {
    assertEquals(
      await cli("2", "-p", "5000", "-H", hostname),
      refused(
        hostname.length > 40 ? `${hostname.slice(0, 40)}…` : hostname,
        ["unknown host name"],
        "Try another --hostname",
      ),
    );
  }
});

runTest("too many open files names ulimit -n", async () => {
  const port = await freePorts(200);
  const words = withFiles(100, "200", "-p", `${port}`);
  const { code, stdout, stderr } = await launch(words).ended;
  assertEquals([code, stdout], [1, ""]);
  const lines = stderr.trimEnd().split("\n");
  assertEquals(lines.length, 8);
  for (const line of lines.slice(1, 6)) {
    assertMatch(line, /^port \d+: too many open files$/);
  }
  assertMatch(lines[6]!, /^… and \d+ more$/);
  assertEquals(lines[7], "Raise ulimit -n or start fewer");
});

runTest("more clients than open files: it answers when they go", async () => {
  const { urls, ended, kill } = await serving(5, withFiles(64, "5", "-p", "0"));
  const crowd = Array.from(
    { length: 100 },
    (_, k) =>
      connect(portOf(urls[k % 5]!), "127.0.0.1").on("error", () => {}).resume(),
  );
  await Promise.all(
    crowd.map((socket) =>
      new Promise<void>((done) =>
        socket.once("connect", done).once("close", () => done())
      )
    ),
  );
  for (const socket of crowd) socket.destroy();
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
  for (const redirection of ["> /dev/full 2>&1", ">&- 2>&-", "closed pipes"]) {
    const pipes = redirection === "closed pipes";
    const port = await freePorts(1);
    const line = `exec "$@" ${pipes ? "" : redirection}`;
    const words = [...command, "1", "-v", "-p", `${port}`];
    const started = start(["sh", "-c", line, "sh", ...words]);
    if (pipes) {
      started.stdout.destroy();
      started.stderr.destroy();
    }
    await untilListening(port, true);
    for (let k = 0; k < 5; k++) {
      await assertHello(`http://127.0.0.1:${port}`);
    }
    started.kill("SIGTERM");
    assertEquals(await started.closed, 0, redirection);
  }
});

runTest("pipes that nobody reads hold nobody up", async () => {
  const n = 1500; // their ready lines are more than a pipe holds
  const port = await freePorts(n);
  const words = [...command, `${n}`, "-v", "-p", `${port}`];
  const { stdout, stderr, closed, kill } = start(words);
  stdout.pause();
  stderr.pause();
  await untilListening(port + n - 1, true);
  const socket = await dial(port);
  const { times } = received(socket);
  // 16 MB of log, which is more than it keeps for whoever might read it
  const request = `GET /${"x".repeat(8000)} HTTP/1.1\r\nhost: a\r\n\r\n`;
  for (let k = 1; k <= 2000; k++) {
    socket.write(request);
    await times("hello from handler 0", k);
  }
  socket.destroy();
  kill("SIGTERM");
  await untilListening(port, false);
  stdout.resume();
  stderr.resume();
  assertEquals(await closed, 0);
});

/** Runs a command on a terminal, through util-linux `script`. */
function onTerminal(command: string[]) {
  const line = command.map((word) => `'${word}'`).join(" ");
  // exec: a shell that stayed would take Ctrl+C too, and some die of it.
  const words = ["script", "-qec", `exec ${line}`, "/dev/null"];
  const { child, stdout, closed } = start(words, "pipe");
  const { times, all } = received(stdout);
  /** Waits until the screen has shown this text. */
  const until = (text: string) =>
    Promise.race([
      times(text, 1),
      closed.then(() => Promise.reject(new Error(`no "${text}" in: ${all()}`))),
    ]);
  const type = (keys: string) => child.stdin!.write(keys);
  /** Answers a question: it drops what is typed before it is ready to read. */
  const answer = async (keys: string, reply: string) => {
    await until("Allow?");
    for (let shown = false; !shown;) {
      type(keys);
      const patience = new AbortController();
      shown = await Promise.race([
        until(reply).then(() => true),
        sleep(200, false, patience).catch(() => false),
      ]);
      patience.abort();
    }
  };
  /** Resolves to the exit code and the screen, once it has ended. */
  const end = async () => ({ code: await closed, shown: all() });
  return { until, type, answer, end };
}

linuxTest("on a real terminal: the ready lines, then how to stop", async () => {
  const screen = onTerminal([...command, "2", "-p", "0"]);
  await screen.until("Press Ctrl+C to stop");
  screen.type("\x03");
  const { code, shown } = await screen.end();
  assertEquals(code, 0);
  assertMatch(
    shown,
    /^(handler \d listening on \S+\r\n){2}Press Ctrl\+C to stop\r\n(\^C)?$/,
  );
});

linuxTest("200 servers, 20 times over, leak no descriptor", async () => {
  const descriptors = async () => {
    const ls = await launch(["ls", `/proc/${process.pid}/fd`]).ended;
    return ls.stdout.split("\n").length;
  };
  const round = () =>
    using(serveAll(helloApps(200), { port: 0 }), (urls) => get(urls[0]));
  await round();
  const before = await descriptors();
  for (let k = 0; k < 20; k++) await round();
  const after = await descriptors();
  assert(after <= before + 5, `${before} before, ${after} after`);
});

// ---- Only Deno --------------------------------------------------------------

denoTest("asks for the network once, for all ports", async () => {
  const port = await freePorts(3);
  const words = [runtime, "run", "multiserv.ts", "3", "-p", `${port}`];
  const yes = onTerminal(words);
  await yes.answer("y\n", "Granted");
  await yes.until("Press Ctrl+C to stop");
  await assertHello(`http://127.0.0.1:${port + 2}`, 2);
  yes.type("\x03");
  const { code, shown } = await yes.end();
  assertEquals([code, shown.split("Deno requests").length - 1], [0, 1]);

  const no = onTerminal(words);
  await no.answer("n\n", "Denied");
  const ended = await no.end();
  assertEquals(ended.code, 1);
  assertEquals(ended.shown.split("Deno requests").length - 1, 1);
  assertStringIncludes(
    ended.shown,
    "Allow it: deno run --allow-net=127.0.0.1\r\n",
  );

  const neither = onTerminal(words);
  await neither.answer("\x03", "^C");
  assertEquals((await neither.end()).code, 130);
});

denoTest("asks nobody who has allowed just its ports", async () => {
  const port = await freePorts(2);
  const allow = `--allow-net=127.0.0.1:${port},127.0.0.1:${port + 1}`;
  const words = [runtime, "run", allow, "multiserv.ts", "2", "-p", `${port}`];
  const screen = onTerminal(words);
  await screen.until("Press Ctrl+C to stop");
  screen.type("\x03");
  const { code, shown } = await screen.end();
  assertEquals(code, 0);
  assert(!shown.includes("Deno requests"));
});

// Deno starts Deno with -A, unless there is some permission flag.
const withNothing = "--deny-ffi";

denoTest("where nobody can be asked: the flag to add, exit 1", async () => {
  assertEquals(
    await launch(
      [runtime, "run", withNothing, "multiserv.ts", "1", "-p", "5000"],
    ).ended,
    refused(
      "127.0.0.1",
      ["port 5000: no network access"],
      "Allow it: deno run --allow-net=127.0.0.1",
    ),
  );
});

denoTest("multiserv.ts alone runs from an empty folder", async () => {
  const port = await freePorts(1);
  const folder = (await launch(["mktemp", "-d"]).ended).stdout.trim();
  // The import map says where to get the packages, nothing else.
  const line = `cp multiserv.ts ${folder} && map=$PWD/deno.json &&
    cd ${folder} && exec "$0" run --allow-net --import-map="$map" \\
    multiserv.ts 1 -p ${port}`;
  try {
    const words = ["sh", "-c", line, runtime];
    const { urls: [url], ended, kill } = await serving(1, words);
    assertEquals(url, `http://127.0.0.1:${port}`);
    assertEquals((await fetch(`${url}/?status=204`)).status, 204);
    kill("SIGTERM");
    assertEquals((await ended).stdout, ready([url]));
  } finally {
    await launch(["rm", "-r", folder]).ended;
  }
});

denoTest("./multiserv.ts runs, with just the permission it needs", async () => {
  const port = await freePorts(1);
  await using(serveAll(newApps(1), { port }), async () => {
    const path = `${dirname(runtime)}:$PATH`;
    const line = `PATH=${path} ./multiserv.ts 1 -p ${port}`;
    assertEquals(
      await launch(["sh", "-c", line]).ended,
      refused(
        "127.0.0.1",
        [`port ${port} is already in use`],
        "Try another --port",
      ),
    );
    assertEquals(
      await launch(["sh", "-c", `${line} -H 127.0.0.2`]).ended,
      refused(
        "127.0.0.2",
        [`port ${port}: no network access`],
        "Allow it: deno run --allow-net=127.0.0.2",
      ),
    );
  });
});

denoTest("bare deno test passes where nothing is allowed", async () => {
  const { code, stdout } = await launch([runtime, "test", withNothing]).ended;
  assertEquals(code, 0);
  assertMatch(stdout, /\| \d+ passed \| 0 failed \| \d+ ignored /);
});

// ---- README.md --------------------------------------------------------------

interface Block {
  heading: string;
  language: string;
  text: string;
}

/** The code blocks of README.md. */
async function blocks(): Promise<Block[]> {
  const found: Block[] = [];
  let heading = "";
  const parts = /^#+ (.+)$|^```(.*)\n([^]*?)^```$/gm;
  const readme = await contents("README.md");
  for (const [, title, language, text] of readme.matchAll(parts)) {
    if (title !== undefined) heading = title;
    else found.push({ heading, language: language!, text: text! });
  }
  return found;
}

/** The texts of the blocks under a heading in a language, at least one. */
async function blocksUnder(heading: string, language: string) {
  const texts = (await blocks())
    .filter((block) => block.heading === heading && block.language === language)
    .map(({ text }) => text);
  assert(texts.length > 0, `${heading}: no ${language} block`);
  return texts as [string, ...string[]];
}

/** Runs a program in the repository, to its end. */
function runProgram(program: string) {
  const words = onDeno
    ? [runtime, "run", "--allow-net=127.0.0.1", "-"]
    : [runtime, "--import", "./node/multiserv.ts"];
  if (!onDeno) words.push("--input-type=module-typescript", "-");
  const started = launch(words, "pipe");
  started.child.stdin!.end(program);
  return started.ended;
}

runTest(
  "each ts block runs, and prints what the next block shows",
  async () => {
    const all = await blocks();
    const command = "$ deno run --allow-net=127.0.0.1 lesson.ts\n";
    let lessons = 0;
    for (const [k, { language, text, heading }] of all.entries()) {
      if (language !== "ts") continue;
      // Node 22 knows no `await using`.
      const program = onDeno || Number.parseInt(process.versions.node) >= 24
        ? text
        : text.replace("await using servers", "const servers") +
          "await servers.shutdown();";
      const { code, stdout, stderr } = await runProgram(program);
      assertEquals([code, stderr], [0, ""], text);
      const next = all[k + 1]!;
      if (next.heading !== heading || !next.text.startsWith(command)) continue;
      assertEquals(command + stdout, next.text);
      lessons++;
    }
    assertEquals(lessons, 4);
  },
);

runTest("--help is what README shows", async () => {
  const [shown] = await blocksUnder("As a command", "console");
  const { code, stdout, stderr } = await cli("--help");
  assertEquals([code, stderr], [0, ""]);
  assertEquals(`$ deno run multiserv.ts --help\n${stdout}`, shown);
});

const denoCommand = "deno run --allow-net=127.0.0.1 multiserv.ts";

runTest("the script of README waits, uses and stops the servers", async () => {
  const [script] = await blocksUnder("As a command", "sh");
  const port = await freePorts(3);
  const here = command.map((word) => word.replace(/^.*\.ts$/, `"$OLDPWD"/$&`));
  const line = script
    .replace(denoCommand, `${here.join(" ")} -p ${port}`)
    .replace("1025", `${port + 1}`);
  const words = ["sh", "-c", `cd "$(mktemp -d)"\n${line}rmdir "$PWD"`];
  const { stdout, stderr } = await launch(words).ended;
  assertEquals([stdout, stderr], ["hello from handler 1\nexit code 0\n", ""]);
});

linuxTest("README's loop over the cores, and one Ctrl+C for all", async () => {
  const [loop] = await blocksUnder("Larger fleets", "sh");
  const port = await freePorts(4);
  const line = loop
    .replace("0 250 500 750", "0 2")
    .replace(denoCommand, `${command.join(" ")} -p ${port}`)
    .replace(" 250 &", " 2 &");
  const screen = onTerminal(["sh", "-c", line]);
  for (const i of [0, 1, 2, 3]) {
    await screen.until(`handler ${i} listening`);
    await assertHello(`http://127.0.0.1:${port + i}`, i);
  }
  screen.type("\x03");
  await screen.end();
  for (const i of [0, 1, 2, 3]) await untilListening(port + i, false);
});

denoTest("what goes wrong is said as README shows it", async () => {
  const [, shown = ""] = await blocksUnder("As a command", "console");
  const port = await freePorts(3);
  await using(serveAll(newApps(3), { port }), async () => {
    const commands = shown.split(/^\$ deno /m).slice(1);
    assertEquals(commands.length, 4);
    for (const command of commands) {
      const [line = "", ...said] = command.split("\n");
      const words = line.split(" ");
      if (line.endsWith(" 3")) {
        words.push("-p", `${port}`);
      }
      const { stderr } = await launch([runtime, ...words]).ended;
      const here = stderr.replaceAll(
        /port (?!1024)\d+/g,
        (given) => `port ${Number(given.slice(5)) - port + 1024}`,
      );
      assertEquals(here, said.join("\n"));
    }
  });
});

denoTest("the idea in a dozen lines runs", async () => {
  const port = await freePorts(3);
  const [idea] = await blocksUnder("The idea", "ts ignore");
  const words = [runtime, "run", "--allow-net=127.0.0.1", "-"];
  const { child, closed, kill } = start(words, "pipe");
  child.stdin!.end(idea.replace("1024", `${port}`));
  for (const i of [0, 1, 2]) {
    await untilListening(port + i, true);
    await assertHello(`http://127.0.0.1:${port + i}`, i);
  }
  kill("SIGKILL");
  await closed;
});

// ---- The repository ---------------------------------------------------------

runTest("Node gets the same versions of the packages as Deno", async () => {
  const read = async (path: string) => JSON.parse(await contents(path));
  const { npm } = await read("deno.lock");
  const { dependencies } = await read("node/package.json");
  const { packages } = await read("node/package-lock.json");
  const pinned = (name: string) =>
    `${name}@${packages[`node_modules/${name}`].version}`;
  assertEquals(
    Object.keys(dependencies).map(pinned).sort(),
    // What comes after _ are the peers it was resolved with.
    Object.keys(npm).map((key) => key.split("_")[0]).sort(),
  );
  for (const [name, version] of Object.entries(dependencies)) {
    assertEquals(pinned(name), `${name}@${version}`);
  }
});

// ---- Benchmarks: deno task bench --------------------------------------------

const hello = "hello from handler 0";
const bareServer = (port: number) =>
  Deno.serve({ hostname: "127.0.0.1", port, onListen() {} }, (request) => {
    if (request.method !== "GET") request.body?.cancel();
    return new Response(hello);
  });

/** Measures 2000 requests: 20 connections with 100 in flight on each. */
async function load(b: Deno.BenchContext, port: number, request: string) {
  const connections = Array.from({ length: 20 }, () => dial(port));
  const sockets = await Promise.all(connections);
  b.start();
  await Promise.all(sockets.map(async (socket) => {
    const { times } = received(socket);
    socket.write(request.repeat(100));
    await times(hello, 100);
  }));
  b.end();
  for (const socket of sockets) socket.destroy();
}

const requests = {
  "GET": "GET / HTTP/1.1\r\nhost: localhost\r\n\r\n",
  "POST of 1 KB": post(1024),
};
for (const [name, request] of Object.entries(requests)) {
  const group = `2000 times ${name}`;
  const bare = { group, baseline: true };
  Deno.bench(`${group}, Deno.serve`, bare, async (b) => {
    const server = bareServer(0);
    await load(b, server.addr.port, request);
    await server.shutdown();
  });
  Deno.bench(`${group}, multiserv`, { group }, async (b) => {
    await using(serveAll(helloApps(1), { port: 0 }), async ([url]) => {
      await load(b, portOf(url), request);
    });
  });
}

/** The first of 10,000 free ports in a row. */
const basePort = 20_000;

for (const n of [1, 1000, 10_000]) {
  const rounds = n < 10_000 ? {} : { n: 5, warmup: 1 };
  const bare = () =>
    Array.from({ length: n }, (_, i) => bareServer(basePort + i));
  const start = () => serveAll(helloApps(n), { port: basePort });
  const stop = (servers: ReturnType<typeof bare>) =>
    Promise.all(servers.map((server) => server.shutdown()));

  let options = { group: `start ${n}`, ...rounds };
  const baseline = true;
  Deno.bench(`start ${n}, Deno.serve`, { ...options, baseline }, async (b) => {
    b.start();
    const servers = bare();
    b.end();
    await stop(servers);
  });
  Deno.bench(`start ${n}, multiserv`, options, async (b) => {
    b.start();
    const servers = await start();
    b.end();
    await servers.shutdown();
  });

  options = { group: `stop ${n}`, ...rounds };
  Deno.bench(`stop ${n}, Deno.serve`, { ...options, baseline }, async (b) => {
    const servers = bare();
    b.start();
    await stop(servers);
    b.end();
  });
  Deno.bench(`stop ${n}, multiserv`, options, async (b) => {
    const servers = await start();
    b.start();
    await servers.shutdown();
    b.end();
  });
}

/** KiB of memory that a command holds, a second after its first line. */
async function memory(words: string[]) {
  const { child, stdout, closed, kill } = start(words);
  await once(stdout, "data");
  stdout.resume();
  await sleep(1000);
  const ps = launch(["ps", "-o", "rss=", "-p", `${child.pid}`]);
  const rss = Number((await ps.ended).stdout);
  kill("SIGKILL");
  await closed;
  return rss;
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
  "multiserv": [...command, "-p"],
};

for (const n of [1, 1000, 10_000]) {
  const group = `memory of ${n}: what is printed counts, not the time`;
  for (const [name, words] of Object.entries(programs)) {
    const options = { group, n: 1, warmup: 0 };
    Deno.bench(`memory of ${n}, ${name}`, options, async () => {
      const one = await memory([...words, `${basePort}`, "1"]);
      const all = await memory([...words, `${basePort}`, `${n}`]);
      const each = n === 1 ? one : (all - one) / (n - 1);
      console.log(`${each.toFixed(1)} KiB ${n === 1 ? "in all" : "each"}`);
    });
  }
}
