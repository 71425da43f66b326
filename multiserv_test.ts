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
const signals = run && process.platform !== "win32";
const inShell = (line: string) =>
  signals && spawnSync("sh", ["-c", line]).status === 0;

/** What a test may need, and whether it is here. */
const needs = {
  nothing: true,
  net,
  run,
  signals,
  "ulimit": inShell("ulimit -n 64"),
  "script": inShell("command -v script"),
  "/dev/full": inShell("test -c /dev/full"),
  "::1": net && await serveAll(newApps(1), { port: 0, hostname: "::1" })
    .then((servers) => servers.shutdown()).then(() => true, () => false),
};
let ignored = 0;

function test(
  name: string,
  fn: () => void | Promise<void>,
  need: keyof typeof needs = "nothing",
) {
  if (!["nothing", "net", "run"].includes(need)) name += ` (needs ${need})`;
  if (!needs[need]) ignored++;
  Deno.test({ name, fn, ignore: !needs[need], timeout: 8500 });
}
function denoTest(...[name, fn, need = "run"]: Parameters<typeof test>) {
  if (onDeno) return test(name, fn, need);
  Deno.test({ name: `${name} (Deno only)`, ignore: true, fn() {} });
}

/** What ends what a test has begun. */
const cleanups: (() => unknown)[] = [];
Deno.test.afterEach(async () => {
  const { promise: late, resolve } = Promise.withResolvers<void>();
  const timer = setTimeout(resolve, 1000); // the other tests need not wait
  const ends = cleanups.splice(0).reverse().map((cleanup) => cleanup());
  await Promise.race([late, Promise.all(ends)]);
  clearTimeout(timer);
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

/** An app that answers every request. */
const appOf = (answer: Handler) => newApps(1)[0]!.all("*", answer);

test("handler answers any method and path with its number", async () => {
  const app = appOf(handler(7));
  const requests = {
    GET: "/",
    POST: "/a/b/",
    OPTIONS: "/%ff",
    FOO: "/?delay=x",
  };
  for (const [method, path] of Object.entries(requests)) {
    const answer = await app.request(path, { method });
    await assertAnswers(answer, 200, "hello from handler 7");
  }
  await assertAnswers(await app.request("/", { method: "HEAD" }), 200, "");
});

// ---- withFaults -------------------------------------------------------------

const faultyApp = (faults?: Faults) => appOf(withFaults(handler(0), faults));

test("?status answers with that status, and the same body", async () => {
  for (const status of [200, 301, 404, 499, 503, 520, 529, 599]) {
    const answer = await faultyApp().request(`/a?status=${status}`);
    await assertAnswers(answer, status, "hello from handler 0");
  }
});

test("a status without a body has nothing that describes one", async () => {
  const headers = {
    "content-encoding": "br",
    "content-length": "5",
    "content-type": "text/html",
    "x-own": "yes",
  };
  let dropped = 0;
  const body = () =>
    new ReadableStream({
      cancel() {
        dropped++;
        throw new Error("nobody shall hear of it");
      },
    });
  const app = appOf(withFaults(() => new Response(body(), { headers })));
  const full = await app.request("/?status=410");
  assertEquals(Object.fromEntries(full.headers), headers);
  assertEquals([full.status, dropped], [410, 0]);
  for (const [k, status] of [204, 205, 304].entries()) {
    const empty = await app.request(`/?status=${status}`);
    assertEquals([empty.status, empty.body, dropped], [status, null, k + 1]);
    assertEquals([...empty.headers], [["x-own", "yes"]]);
  }
  const notModified = new Response(null, { status: 304, headers });
  const busy = await appOf(withFaults(() => notModified))
    .request("/?status=503");
  assertEquals([...busy.headers], [["x-own", "yes"]]);
});

test("a fault with a percent is for a share of the answers", async () => {
  const { random } = Math;
  cleanups.push(() => Math.random = random);
  const shares: [Faults, query: string, ...statuses: number[]][] = [
    [{}, "?status=503:10", 503, 503, 200, 200],
    [{}, "?status=503:0", 200, 200, 200, 200],
    [{ status: "500:10" }, "", 500, 500, 200, 200],
    [{ status: 500 }, "?delay=0", 500, 500, 500, 500],
    // What a request asks for wins, value by value, its percent included.
    [{ status: "500:10" }, "?status=501:100", 501, 501, 501, 501],
    [{ status: 500, delay: "60000:0" }, "?status=502:10", 502, 502, 200, 200],
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

test("a delay ends when the client goes away", async () => {
  const leaving = new AbortController();
  const answer = faultyApp().request("/?delay=60000", leaving);
  leaving.abort();
  assertEquals((await answer).status, 200);
});

/** What is said of a number that is out of its range. */
const range = (
  name: string,
  min: number,
  max: number,
  got: string,
  more = "",
) =>
  `${name} must be a whole number from ${min} to ${max}${more}, got "${got}"`;
const noDelay = (got: string) =>
  range("delay", 0, 60_000, got, ", or 2000:10 for 10 percent");
const noStatus = (got: string) =>
  range("status", 200, 599, got, ", or 503:10 for 10 percent");

test("a request for nonsense is answered with 400 and why", async () => {
  const nonsense = {
    "status=503&delay=": noDelay(""),
    "delay=60001": noDelay("60001"),
    "delay=60001:5": noDelay("60001"),
    "delay=%0Aline": noDelay("\\nline"),
    "status=199": noStatus("199"),
    "status=503:": noStatus("503:"),
    "status=503:101": noStatus("503:101"),
    "status=503,10": noStatus("503,10"),
    "status=503:10:5": noStatus("503:10:5"),
  };
  for (const [query, message] of Object.entries(nonsense)) {
    await assertAnswers(await faultyApp().request(`/?${query}`), 400, message);
  }
  const misspelt = await faultyApp().request("/?dealy=x&status=200");
  await assertAnswers(misspelt, 200, "hello from handler 0");
});

test("faults that make no sense are a RangeError at once", () => {
  const nonsense: [Faults, message: string][] = [
    [{ delay: -1 }, noDelay("-1")],
    [{ status: 99 }, noStatus("99")],
    [{ status: 0.5 }, noStatus("0.5")],
    [{ status: "503:101" }, noStatus("503:101")],
    // @ts-expect-error TypeScript knows the form.
    [{ status: "503,10" }, noStatus("503,10")],
  ];
  for (const [faults, message] of nonsense) {
    assertThrows(() => faultyApp(faults), RangeError, message);
  }
});

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

test("wrong command lines: what is wrong, and exit code 2", async () => {
  const noN = (got: string) => range("n", 1, 64512, got);
  const tooMany = (got: string, max: number) =>
    range("n", 1, max, got, ", as ports end at 65535");
  const noPort = (got: string) =>
    range("port", 1024, 65535, got)
      .replace("be a", "be 0 or a");
  const wrong: [message: string, ...args: string[]][] = [
    ["n is missing"],
    ['one n is enough, got "3 4"', "3", "4"],
    ...["", " 3", "abc", "3.5", "1e3", "0x10", "0"]
      .map((n): [string, string] => [noN(n), n]),
    [noN("-3"), "--", "-3"],
    [tooMany("64513", 64512), "64513", "-p0"],
    [tooMany("2", 1), "2", "-p", "65535"],
    [tooMany("536", 535), "536", "-p", "60000", "-f", "5001"],
    [noPort("1023"), "3", "-p", "1023"],
    [noPort("65536"), "3", "-p", "65536"],
    [noPort(""), "3", "--port"],
    [range("first", 0, 535, "536"), "3", "-p", "65000", "-f", "536"],
    ["--hostname needs a value", "3", "-H"],
    [noDelay("60001"), "3", "--delay", "60001"],
    [noStatus("503,10"), "3", "--status=503,10"],
    ['--verbose and --help take no value, got "p3000"', "-vp3000", "1"],
    ['--verbose and --help take no value, got "0"', "-v0", "1"],
    ['--verbose and --help take no value, got "p3000"', "-hp3000"],
    ['unknown option "-3"', "-3"],
    ['unknown option "--prot=5"', "3", "--prot=5"],
  ];
  for (const [message, ...args] of wrong) {
    const stderr = `multiserv: ${message}\nTry --help\n`;
    const expected = { code: 2, stdout: "", stderr };
    assertEquals(await runMain(...args), expected, args.join(" "));
  }
});

test("--help prints the usage, which fits into 80 columns", async () => {
  const help = await runMain("--help");
  assertMatch(help.stdout, /^Usage: multiserv \[options\] <n>\n/);
  assertEquals(help.stdout.split("\n").filter((line) => line.length > 80), []);
  assertEquals(await runMain("3", "-hv"), { ...help, code: 0, stderr: "" });
});

test("servers that cannot start: why, a hint, exit code 1", async () => {
  const port = await freePorts(6);
  await serving(newApps(6), port);
  const failing = async (...args: string[]) => {
    const { code, stdout, stderr } = await runMain("-p", `${port}`, ...args);
    assertEquals([code, stdout], [1, ""]);
    return stderr.trimEnd().split("\n");
  };
  const none = (host: string) => `multiserv: No server started on "${host}"`;
  const taken = (i: number) => `port ${port + i} is already in use`;
  const five = [none("127.0.0.1"), ...[0, 1, 2, 3, 4].map(taken)];
  const hint = "Try another --port";
  assertEquals(await failing("5"), [...five, hint]);
  assertEquals(await failing("6"), [...five, "… and 1 more", hint]);
  assertEquals(await failing("3", "-H", "192.0.2.1"), [
    none("192.0.2.1"),
    `port ${port} cannot be opened: the address is not on this machine`,
    "Try another --hostname",
  ]);
  // Of a host that nobody knows, or can: the system's own words, and no hint.
  for (const host of ["no-such-host.invalid", "a b"]) {
    const [, why, ...rest] = await failing("3", "-H", host);
    assertMatch(why ?? "", RegExp(`^port ${port} cannot be opened: .`));
    assertEquals(rest, []);
  }
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

const helloApps = (n: number) =>
  Array.from({ length: n }, (_, i) => appOf(withFaults(handler(i))));

/** What a stream brings, and ways to wait for it. */
function received(stream: Readable) {
  let seen = "";
  stream.setEncoding("utf8").on("data", (text: string) => seen += text);
  const closed = once(stream, "close").catch(() => {});
  async function wait(what: string, isThere: () => boolean) {
    while (!isThere()) {
      if (stream.closed) throw new Error(`no ${what} in: ${seen}`);
      await Promise.race([once(stream, "data"), closed]);
    }
    return seen;
  }
  return {
    /** Resolves when the text has come that often. */
    until: (text: string, times = 1) =>
      wait(`${times}. "${text}"`, () => seen.split(text).length > times),
    /** Resolves to the first answer, decoded. */
    answer: () => wait("answer", () => decode(seen) !== null).then(decode),
    /** Resolves to everything, at the end. */
    all: () => closed.then(() => seen),
  };
}

/** The status and body of an answer, or null as long as it is not whole. */
function decode(answer: string) {
  const end = answer.indexOf("\r\n\r\n");
  if (end < 0) return null;
  const head = answer.slice(0, end).toLowerCase();
  const status = head.slice("http/1.1 ".length).slice(0, 3);
  let rest = answer.slice(end + 4);
  if (!head.includes("transfer-encoding: chunked")) {
    const length = Number(/content-length: (\d+)/.exec(head)?.[1] ?? 0);
    return rest.length < length ? null : `${status} ${rest.slice(0, length)}`;
  }
  for (let body = "";;) {
    const [line = "", size = ""] = /^([0-9a-f]+)\r\n/i.exec(rest) ?? [];
    const after = line.length + parseInt(size, 16);
    if (!line || rest.length < after + 2) return null;
    if (after === line.length) return `${status} ${body}`;
    body += rest.slice(line.length, after);
    rest = rest.slice(after + 2);
  }
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

/** Asks until there is an answer or, if that is expected, none any more. */
async function untilAnswering(url: string, expected = true) {
  let isOver = false;
  cleanups.push(() => isOver = true);
  const answers = () => get(url).then(() => true, () => false);
  while (!isOver && await answers() !== expected) await sleep(5);
}

/** The first lines of a request. */
const head = (line: string, ...headers: string[]) =>
  [`${line} HTTP/1.1`, "host: localhost", ...headers, "\r\n"].join("\r\n");

/** A POST with a body of so many bytes. */
const post = (bytes: number, path = "/") =>
  head(`POST ${path}`, `content-length: ${bytes}`) + "x".repeat(bytes);

test("app i listens on port + i, or each on a free port", async () => {
  const port = await freePorts(3);
  const { urls } = await serving(helloApps(3), port);
  assertEquals(urls, [0, 1, 2].map((i) => urlOf(port + i)));
  await Promise.all(urls.map(assertHello));
  const free = await serving(helloApps(3));
  await Promise.all(free.urls.map(assertHello));
}, "net");

test("all servers start or none, and the errors say why", async () => {
  const failing = async (n: number, port: number) => {
    const starting = () => serveAll(newApps(n), { port });
    return (await assertRejects(starting, AggregateError)).errors.map(String);
  };
  const port = await freePorts(5);
  for (const i of [1, 3]) await serving(newApps(1), port + i);
  const taken = (i: number) => `Error: port ${port + i} is already in use`;
  assertEquals(await failing(5, port), [taken(1), taken(3)]);
  for (const i of [0, 2, 4]) await serving(newApps(1), port + i);

  // The last port is taken by now, or was before. Another failure is worse.
  await serving(newApps(1), 65535).catch(() => {});
  const [tooHigh, ...others] = await failing(9, 65535);
  assertMatch(tooHigh ?? "", /^Error: port 65536 cannot be opened: ./);
  assertEquals(others, []);
}, "net");

test("without options it is 127.0.0.1, from port 1024 up", async () => {
  const { urls, shutdown, message, errors } = await serveAll(newApps(1))
    .catch((taken) => taken);
  await shutdown?.();
  const place = urls?.[0] ?? `${message}, ${errors[0].message}`;
  assertMatch(place, /\b127\.0\.0\.1\b.+\b1024\b/);
}, "net");

test("an IPv6 address stands in brackets", async () => {
  const { url } = await serving(helloApps(1), 0, "::1");
  assertMatch(url, /^http:\/\/\[::1\]:\d+$/);
  await assertHello(url);
}, "::1");

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

const length = async (request: Request) => `${(await request.text()).length}`;

/** What handlers do with the body of a request. */
const readers: Record<string, Handler> = {
  "echoes it": (c) => new Response(c.req.raw.body), // first, for the forwarder
  "reads at once": async (c) => c.text(await length(c.req.raw)),
  "reads late": async (c) => {
    await sleep(50);
    return c.text(await length(c.req.raw));
  },
  "reads in parts": async (c) => {
    let n = 0;
    for await (const part of c.req.raw.body ?? []) {
      n += part.length;
      await sleep(1);
    }
    return c.text(`${n}`);
  },
  "reads one part": async (c) => {
    const reader = c.req.raw.body?.getReader();
    await reader?.read();
    await reader?.cancel();
    return c.text("enough");
  },
  "does not read": (c) => c.text("unread"),
  "streams without reading": (c) =>
    stream(c, async (out) => {
      for (let k = 0; k < 20; k++) await out.write("x".repeat(100_000));
    }),
  "reads when its answer has begun": (c) =>
    stream(c, async (out) => {
      await out.write("receiving ");
      await out.write(await length(c.req.raw));
    }),
  "reads between events": (c) =>
    streamSSE(c, async (out) => {
      await out.writeSSE({ data: "receiving" });
      await out.writeSSE({ data: await c.req.text() });
    }),
  "reads when its answer is read": (c) => {
    async function* lazy() {
      yield new TextEncoder().encode(await length(c.req.raw));
    }
    return new Response(ReadableStream.from(lazy()));
  },
  "forwards it": (c) => {
    const init = { method: "POST", body: c.req.raw.body, duplex: "half" };
    return fetch(new URL("/0", c.req.url), init);
  },
  "clones it": async (c) =>
    c.text(await length(c.req.raw.clone()) + await length(c.req.raw)),
  "throws": (c) => length(c.req.raw).then(() => Promise.reject(Error("oh"))),
  "answers 204": (c) => length(c.req.raw).then(() => c.body(null, 204)),
  "answers 413": (c) => c.text("too large", 413),
};

/** Ways to send a body: its size, in how many parts, and what is between. */
const ways = [
  { size: 0, parts: 1, pause: 0 },
  ...[5, 300_000].flatMap((size) => [
    { size, parts: 1, pause: 0 },
    { size, parts: 4, pause: 5 },
    { size, parts: 2, pause: 150 },
  ]),
];

const anyPort = { hostname: "127.0.0.1", port: 0, onListen() {} };

test("a client gets what it gets from the bare runtime", async () => {
  const app = newApps(1)[0]!.onError((error, c) => c.text(error.message, 500));
  for (const [k, reader] of Object.values(readers).entries()) {
    app.post(`/${k}`, reader);
  }
  const bare = await Deno.serve(anyPort, app.fetch);
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

test("a body that is read behind the answer is whole", async () => {
  const { promise, resolve, reject } = Promise.withResolvers<string>();
  const app = appOf((c) => {
    c.req.text().then(resolve, reject);
    return c.text("accepted");
  });
  const { port } = await serving([app]);
  const { until } = await dial(port, post(3_000_000));
  const [later] = await Promise.all([promise, until("accepted")]);
  assertEquals(later.length, 3_000_000);
}, "net");

// ---- The end ----------------------------------------------------------------

const big = "x".repeat(20_000_000);
const slow: Handler = (c) => sleep(200).then(() => c.text("slow"));
/** What has begun when the end comes, and what is sent after that. */
const ends: Record<string, { answer: Handler; sent: string; then?: string }> = {
  "a big answer": { answer: (c) => c.text(big), sent: head("GET /") },
  "a streamed answer": {
    answer: (c) =>
      stream(c, async (out) => {
        for (let k = 0; k < 5; k++) {
          await out.write("part ");
          await sleep(50);
        }
      }),
    sent: head("GET /"),
  },
  "an upload whose answer is late": { answer: slow, sent: post(8_000_000) },
  "an answer before its upload": {
    answer: (c) => c.text(big.slice(0, 2_000_000)),
    sent: post(3_000_000).slice(0, -2_000_000),
    then: "x".repeat(2_000_000),
  },
  "three requests in a row": { answer: slow, sent: head("GET /").repeat(3) },
  "a GET whose body stops": {
    answer: slow,
    sent: head("GET /", "content-length: 9") + "x",
  },
};

for (const [name, { answer, sent, then = "" }] of Object.entries(ends)) {
  for (const from of ["inside", "outside"]) {
    test(`the end, from ${from} a handler: ${name} is whole`, async () => {
      const begun = Promise.withResolvers<void>();
      const { port, shutdown, finished } = await serving([
        appOf((c, next) => {
          begun.resolve();
          if (from === "inside") shutdown();
          return answer(c, next);
        }),
      ]);
      const { socket, until, all } = await dial(port);
      socket.pause(); // a client that is slow to read
      socket.write(sent);
      await begun.promise;
      if (from === "outside") await sleep(50);
      const stopped = shutdown();
      await new Promise((isSent) => socket.write(then, isSent));
      await sleep(50);
      socket.resume();
      if (onDeno && name === "a GET whose body stops") {
        await until("slow");
        socket.end(); // Deno waits for the rest, or for this
      }
      const [, ...answers] = (await all()).split("HTTP/1.1 200");
      for (const answer of answers) assert(decode(`HTTP/1.1 200${answer}`));
      // Deno lets go of what it has not begun to read.
      const isRow = name === "three requests in a row" && !onDeno;
      assertEquals(answers.length, isRow ? 3 : 1);
      await Promise.all([stopped, finished]);
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

test("shutdown answers what is in flight and lets nobody in", async () => {
  const servers = await serving(helloApps(2), await freePorts(2));
  const slow = await dial(servers.port, head("GET /?delay=1000"));
  await assertHello(servers.url); // so the slow request has arrived
  const ends = [servers.shutdown(), servers.shutdown(), servers.finished];
  let ended = false;
  Promise.race(ends).then(() => ended = true);
  for (const url of servers.urls) await untilAnswering(url, false);
  assert(!ended);
  assertMatch(await slow.all(), /hello from handler 0$/);
  await Promise.all(ends);
}, "net");

// ---- The command, as a process ----------------------------------------------

const root = fileURLToPath(new URL(".", import.meta.url));
const runtime = process.execPath;
const command = onDeno
  ? [runtime, "run", "--allow-net", "multiserv.ts"]
  : [runtime, "node/multiserv.ts"];

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

test("serves, and answers what is in flight when it stops", async () => {
  const { port, stderr, kill, end } = await serve(10);
  await stderr.until(howToStop);
  const ports = Array.from({ length: 10 }, (_, i) => port + i);
  const delayed = head("GET /?delay=1000");
  const slow = await Promise.all(ports.map((port) => dial(port, delayed)));
  await Promise.all(ports.map(urlOf).map(assertHello)); // so the slow are in
  for (let k = 0; k < 2; k++) kill("SIGTERM"); // as timeout sends it
  const printed = { stdout: ready(port, 10), stderr: howToStop + notice };
  assertEquals(await end(), { code: 0, ...printed });
  for (const [i, { answer }] of slow.entries()) {
    assertEquals(await answer(), `200 hello from handler ${i}`);
  }
}, "signals");

test("stops at once, in silence, for who has read but one line", async () => {
  for (const path of ["/", "/?delay=100"]) {
    const { port, kill, end } = await serve(20);
    const last = await dial(port, head(`GET ${path}`));
    await assertHello(urlOf(port)); // so that one has arrived
    kill("SIGTERM");
    await sleep(5);
    kill("SIGTERM"); // as a wrapper may send it
    const { code, stderr } = await end();
    assertEquals([code, stderr], [0, howToStop]);
    await last.answer();
  }
}, "signals");

test("a signal that comes half a second later ends it", async () => {
  const ended = (["SIGINT", "SIGTERM"] as const).map(async (signal) => {
    const { port, stderr, kill, end } = await serve(1);
    const lost = await dial(port, head("GET /?delay=60000"));
    await assertHello(urlOf(port)); // so the slow request has arrived
    kill("SIGTERM");
    await stderr.until(notice);
    kill(signal);
    assertEquals((await end()).code, signal);
    assertEquals(await lost.all(), "");
  });
  await Promise.all(ended);
}, "signals");

/** Words that run a program which comes on stdin. */
const onStdin = onDeno
  ? [runtime, "run", "--allow-net", "-"]
  : [runtime, "--input-type=module", "--import=./node/hook.ts", "-"];

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
  const faults = ["--status", "503", "--delay=300:100"];
  const { port, stdout } = await serve(2, "-f3", ...faults);
  const url = `${urlOf(port + 4)}/any/path`;
  const usual = await dial(port + 4, head("GET /any/path"));
  const asked = await fetch(`${url}?status=599&delay=0`, { method: "POST" });
  await assertAnswers(asked, 599, "hello from handler 4");
  assertEquals(await usual.answer(), "503 hello from handler 4");
  assertEquals(await stdout.until("handler 4"), ready(port, 2, 3));
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

test("--first numbers handlers on free ports, too", async () => {
  const { stdout } = start([...command, "-p", "0", "-f", "3", "2"]);
  const lines = (await stdout.until("\n", 2)).trim().split("\n");
  const urls = lines.map((line) => line.split(" ").at(-1)!);
  assert(urls.every((url) => Number(new URL(url).port) > 1023));
  const expected = urls.map((url, k) => `handler ${3 + k} listening on ${url}`);
  assertEquals(lines, expected);
  await Promise.all(urls.map((url, k) => assertHello(url, 3 + k)));
}, "run");

test("-v logs path and query, and no request makes it throw", async () => {
  const { port, stderr } = await serve(1, "-v");
  await stderr.until(howToStop);
  const requests = [
    "GET /a?b=c HTTP/1.1\r\nhost: a",
    "GET http://a/c?status=503 HTTP/1.1\r\nhost: a",
    "GET http://a?x=/admin HTTP/1.1\r\nhost: a",
    "GET //b\x7f?\x1b[31m= HTTP/1.1\r\nhost: a",
    "GET /d HTTP/1.1\r\nhost: a?status=503",
    "GET /e?status=503 HTTP/1.1\r\nhost: a.1",
    "GET http://u:p@h/?delay=1 HTTP/1.1\r\nhost: a",
    "TRACE /?delay=1 HTTP/1.1\r\nhost: a",
    ...Array.from("@%[^<", (x) => `GET http://a?x=${x} HTTP/1.1\r\nhost: a`),
    "GET /last HTTP/1.1\r\nhost: a",
  ];
  for (const request of requests) {
    const bytes = `${request}\r\nconnection: close\r\n\r\n`;
    const answer = await dial(port, bytes);
    assertMatch(await answer.all(), /^HTTP\/1.1 (200|400|503) /, request);
  }
  const log = (await stderr.until("/last")).slice(howToStop.length);
  const form = /^handler 0: [A-Z]+ (\?|\/[!-~]*) (200|400|503) \d+ms$/;
  for (const line of log.trimEnd().split("\n")) assertMatch(line, form);
  const logged = ["/a?b=c 200", "/c?status=503 503", "/?x=/admin 200"];
  if (onDeno) logged.push("? 503"); // of a.1, which Node refuses
  for (const line of logged) assert(log.includes(`: GET ${line} `), log);
}, "run");

test("too many open files: the hint names ulimit -n", async () => {
  const line = `ulimit -n 100; exec "$@" 200 -p ${await freePorts(200)}`;
  const { code, stdout, stderr } = await startInShell(line, command).end();
  const why = "too many open files\nRaise ulimit -n or start fewer\n";
  assert(stderr.endsWith(`cannot be opened: ${why}`), stderr);
  assertEquals([code, stdout], [1, ""]);
}, "ulimit");

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
}, "/dev/full");

test("too many clients: it goes on with what it has begun", async () => {
  const program = `
    import { handler, newApps, serveAll } from "./multiserv.ts";
    const [app] = newApps(1);
    app.get("/", handler(0)).post("/", async (c) => {
      const text = await c.req.text();
      servers.shutdown();
      await new Promise((later) => setTimeout(later, 300));
      console.log("answered");
      return c.text(text);
    });
    const servers = await serveAll([app], { port: 0 });
    console.log(servers.urls[0]);
    await servers.finished;
    console.log("finished");`;
  const line = 'ulimit -n 64; exec "$@"';
  const { stdout, end } = startInShell(line, onStdin, program);
  const url = (await stdout.until("\n")).trim();
  const port = Number(new URL(url).port);
  const upload = await dial(port, post(1000).slice(0, -900));
  const crowd = Array.from({ length: 100 }, () => connect(port, "127.0.0.1"));
  const gone = crowd.map((client) => once(client, "close").catch(() => {}));
  await Promise.race(gone); // one was refused
  for (const client of crowd) client.destroy();
  await untilAnswering(url);
  upload.socket.write("x".repeat(900));
  assertEquals(await upload.answer(), `200 ${"x".repeat(1000)}`);
  const { stdout: printed, stderr } = await end();
  assertEquals(printed, `${url}\nanswered\nfinished\n`);
  const said = `port ${port} is not listening: Error: Too many open files`;
  assertEquals(stderr.startsWith(said), onDeno, stderr);
}, "ulimit");

// ---- What only Deno has -----------------------------------------------------

const key = "sec-websocket-key: any";
const upgrade = ["upgrade: websocket", "connection: upgrade", key];

denoTest("a server that has ended listens again, once it can", async () => {
  const program = `
    import { handler, newApps, serveAll } from "./multiserv.ts";
    const app = newApps(1)[0].get("/", handler(0)).get("/end", (c) => {
      console.log("end");
      if (c.req.query("stop")) console.error = () => servers.shutdown();
      Deno.upgradeWebSocket(c.req.raw);
      return c.text("not its answer, which ends this server");
    });
    const servers = await serveAll([app], { port: 0 });
    console.log(servers.urls[0]);
    await servers.finished;
    Deno.exit(); // in spite of the upgrades
  `;
  const { stdout, stderr, end } = start(onStdin, program);
  const url = (await stdout.until("\n")).trim();
  const port = Number(new URL(url).port);
  let another = createServer();
  for (let isTaken = false; !isTaken;) { // the port, by another program
    await dial(port, head("GET /end", ...upgrade)).catch(() => {});
    another = createServer().listen(port, "127.0.0.1");
    isTaken = await once(another, "listening").then(() => true, () => false);
  }
  await stderr.until(`port ${port} is not listening: `);
  await new Promise((closed) => another.close(closed));
  await untilAnswering(url);
  const ended = (await stdout.until("end")).split("end").length;
  await dial(port, head("GET /end", ...upgrade));
  await stdout.until("end", ended);
  await untilAnswering(url);
  await dial(port, head("GET /end?stop=1", ...upgrade));
  const { stderr: said } = await end();
  const withoutReason = said.match(/ is not listening; trying again$/gm);
  assertEquals(withoutReason?.length, ended, said);
});

denoTest("asks for network access once", async () => {
  const port = await freePorts(2);
  const host = needs["::1"] ? "[::1]" : "127.0.0.1";
  const bare = host.replace(/[[\]]/g, "");
  const line = `exec "${runtime}" run multiserv.ts 2 -p ${port} -H ${bare}`;
  const script = ["script", "-qec", line, "/dev/null"];
  const { child, stdout, end } = start(script);
  await stdout.until("Allow?");
  // Deno drops what is typed too early.
  const typing = setInterval(() => child.stdin.write("y\n"), 100);
  await stdout.until("Granted").finally(() => clearInterval(typing));
  await stdout.until("Press Ctrl+C");
  child.stdin.write("\x03");
  const { code, stdout: shown } = await end();
  assertEquals([code, shown.split("Deno requests").length], [0, 2]);
  assert(shown.includes(`net access to "${host}"`), shown);
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

const chat: Handler = (c) => {
  const { socket, response } = Deno.upgradeWebSocket(c.req.raw);
  socket.onopen = () => socket.send("hello");
  return response;
};

denoTest("a WebSocket is upgraded, whatever its query", async () => {
  const { url } = await serving([appOf(withFaults(chat))]);
  for (const query of ["?token=abc", "?status=503"]) {
    const socket = new WebSocket(url.replace("http", "ws") + query);
    const [message] = await once(socket, "message");
    assertEquals(message.data, "hello");
    socket.close();
    await once(socket, "close");
  }
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

const checkedOnStdin = [runtime, "run", "-q", "--check", "--allow-net", "-"];

const lessonRun = "$ deno run --allow-net lesson.ts\n";
for (const k of [0, 1, 2, 3]) {
  denoTest(`lesson ${k + 1} prints what stands below it`, async () => {
    const output = blocks.filter((block) => block.startsWith(lessonRun))[k]!;
    const lesson = blocks[blocks.indexOf(output) - 1]!;
    const { stdout, stderr } = await start(checkedOnStdin, lesson).end();
    assertEquals([lessonRun + stdout.trimEnd(), stderr], [output, ""]);
  });
}

denoTest("idea.ts serves n, and can be blocked", async () => {
  const idea = blockWith("Deno.args[0]");
  const without = await start(checkedOnStdin, idea).end();
  assertEquals(without.code, 1);
  assert(without.stderr.startsWith("Usage: "), without.stderr);
  const port = await freePorts(3);
  const all = '  app.all("*"';
  const program = idea.replace("1024", `${port}`)
    .replace(all, blockWith("/block") + "\n" + all);
  start([...onStdin, "3"], program);
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
  const { stdout } = start(checkedOnStdin, program);
  await stdout.until("\n", 20);
  const slow = await dial(port + 17, head("GET /"));
  const flaky = async () => {
    const response = await fetch(urlOf(port + 18));
    await response.text();
    return response.status;
  };
  while (await flaky() !== 503);
  while (await flaky() !== 200);
  assertEquals(await slow.answer(), "200 hello from handler 17");
});

denoTest("its scripts leave no server behind", async () => {
  const port = await freePorts(20);
  const script = (text: string) =>
    start([
      "sh",
      "-c",
      blockWith(text).replaceAll("deno run", `"${runtime}" run`)
        .replaceAll("multiserv.ts", `multiserv.ts -p ${port}`)
        .replace(/curl .* &/, "echo asked &"),
    ]);
  const { code, stdout } = await script("mkfifo").end();
  assertEquals([code, stdout], [0, "asked\n"]);
  const { kill, end } = script("--first 10 10");
  for (const i of [0, 19]) await untilAnswering(urlOf(port + i));
  assertEquals((await script("mkfifo").end()).code, 1); // the port is taken
  kill("SIGTERM");
  await end();
  for (const i of [0, 19]) await untilAnswering(urlOf(port + i), false);
}, "signals");

denoTest("the command says what it shows", async () => {
  const all = blocks.join("\n");
  assert(all.includes(ready(1024, 3) + howToStop));
  const port = await freePorts(3);
  await serving(newApps(1), port + 1);
  const commands: [line: string, ...unseen: string[]][] = [
    ["multiserv.ts --help"],
    ["multiserv.ts three"],
    ["--deny-net multiserv.ts 3"],
    ["--allow-net multiserv.ts 3", "-p", `${port}`],
  ];
  for (const [line, ...unseen] of commands) {
    const words = [runtime, "run", ...line.split(" "), ...unseen];
    const { stdout, stderr } = await start(words).end();
    const said = (stdout + stderr).replace(`${port + 1}`, "1025");
    assert(all.includes(`$ deno run ${line}\n${said.trimEnd()}`), said);
  }
});

// ---- Benchmarks: deno task bench --------------------------------------------

/** Ways to start n servers from a port up; each resolves to their shutdown. */
const contestants = {
  "bare Deno.serve"(n: number, port: number) {
    const servers = Array.from({ length: n }, (_, i) => {
      const options = { hostname: "127.0.0.1", port: port + i, onListen() {} };
      const hello = `hello from handler ${i}`;
      return Deno.serve(options, (_request) => new Response(hello));
    });
    return () => Promise.all(servers.map((server) => server.shutdown()));
  },
  async multiserv(n: number, port: number) {
    return (await serveAll(helloApps(n), { port })).shutdown;
  },
};

for (const [name, contestant] of Object.entries(contestants)) {
  Deno.bench(name, { group: "2000 requests" }, async (b) => {
    const port = await freePorts(1);
    const shutdown = await contestant(1, port);
    const dialled = Array.from({ length: 20 }, () => dial(port));
    const clients = await Promise.all(dialled);
    b.start();
    await Promise.all(clients.map(({ socket, until }) => {
      socket.write(head("GET /").repeat(100));
      return until("hello from handler 0", 100);
    }));
    b.end();
    for (const cleanup of cleanups.splice(0)) cleanup(); // hangs up
    await shutdown();
  });
  Deno.bench(name, { group: "start of 10,000", n: 5, warmup: 1 }, async (b) => {
    const port = await freePorts(10_000);
    b.start();
    const shutdown = await contestant(10_000, port);
    b.end();
    await shutdown();
  });
}

if (!run) console.log(`${ignored} tests need permissions: deno task test`);
