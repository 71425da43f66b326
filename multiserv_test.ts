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
import { spawn } from "node:child_process";
import { once } from "node:events";
import { connect, createServer, type Socket } from "node:net";
import { dirname } from "node:path";
import process from "node:process";
import { text } from "node:stream/consumers";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { handler, type MultiServer, newApps, serveAll } from "./multiserv.ts";

// ---- What a test needs ------------------------------------------------------

const onDeno = "deno" in process.versions;
const onLinux = process.platform === "linux";

/** Asks once for each permission; without it the tests are ignored. */
async function granted(name: "net" | "run" | "env") {
  return (await Deno.permissions.request({ name })).state === "granted";
}
const net = await granted("net");
const run = net && await granted("run") && await granted("env");

type Body = () => void | Promise<void>;

/** A test that opens no socket. */
const test = (name: string, fn: Body) => Deno.test({ name, fn });
/** A test that needs the network. */
const netTest = (name: string, fn: Body) =>
  Deno.test({ name, ignore: !net, fn });
/** A test that starts the command. */
const runTest = (name: string, fn: Body) =>
  Deno.test({ name, ignore: !run, fn });
/** A test of what only Deno has: permissions, shebang, `deno test` itself. */
const denoTest = (name: string, fn: Body) =>
  Deno.test({
    name: onDeno ? name : `${name} (Deno only)`,
    ignore: !run || !onDeno,
    fn,
  });

/** The app that the command line would serve as handler i. */
const helloApp = (i: number) => newApps(1)[0].all("*", handler(i));
const helloApps = (n: number) =>
  Array.from({ length: n }, (_, i) => helloApp(i));

/** Runs `fn` on running servers, and stops them whatever happens. */
async function using(
  starting: Promise<MultiServer>,
  fn: (servers: MultiServer) => void | Promise<void>,
) {
  const servers = await starting;
  try {
    await fn(servers);
  } finally {
    await servers.shutdown();
  }
}

/**
 * Finds n free ports in a row, below those that the system gives to clients and
 * away from those that `fetch` refuses.
 */
async function freePorts(n: number): Promise<number> {
  for (;;) {
    const port = 20_000 + Math.floor(Math.random() * (10_000 - n));
    const servers = await serveAll(newApps(n), { port }).catch(() => {});
    if (!servers) continue;
    await servers.shutdown();
    return port;
  }
}

const get = async (url: string) => (await fetch(url)).text();
const portOf = (url: string) => Number(new URL(url).port);

/** Opens a raw connection to localhost. */
async function dial(port: number): Promise<Socket> {
  const socket = connect(port, "localhost");
  await once(socket, "connect");
  return socket;
}

/** Sends raw bytes, resolves to all that comes back until the server closes. */
async function raw(port: number, bytes: string): Promise<string> {
  const socket = await dial(port);
  socket.write(bytes);
  return text(socket);
}

/** Whether nobody listens on the port. */
async function isFree(port: number): Promise<boolean> {
  const probe = createServer();
  const bound = Promise.withResolvers<boolean>();
  probe.once("error", () => bound.resolve(false));
  probe.listen(port, "localhost", () => bound.resolve(true));
  const free = await bound.promise;
  if (free) await new Promise((closed) => probe.close(closed));
  return free;
}

// ---- newApps, handler -------------------------------------------------------

test("newApps makes n empty apps", async () => {
  const apps = newApps(3);
  assertEquals(apps.length, 3);
  for (const app of apps) assertEquals((await app.request("/")).status, 404);
});

test("newApps refuses what is no number of servers", () => {
  for (const n of [0, -1, 1.5, NaN, Infinity, 64513, 1e21]) {
    const error = assertThrows(() => newApps(n), RangeError) as RangeError;
    assertStringIncludes(error.message, `"${n}"`);
  }
  assertEquals(newApps(64512).length, 64512);
});

test("each app is a router of its own", async () => {
  const [one, two] = helloApps(2);
  const [three, four] = newApps(2);
  three.get("/only-here", (c) => c.text("here"));
  assertEquals(await (await three.request("/only-here")).text(), "here");
  assertEquals((await four.request("/only-here")).status, 404);
  assertEquals(await (await one.request("/")).text(), "hello from handler 0");
  assertEquals(await (await two.request("/")).text(), "hello from handler 1");
});

test("any method and path: 200, text/plain, the exact bytes", async () => {
  const app = helloApp(7);
  for (const method of ["GET", "POST", "PUT", "DELETE", "OPTIONS", "FOO"]) {
    for (
      const path of ["/", "/a/b/", "//x", "/%ff", "/ü", "/a?b", "/?", "/*"]
    ) {
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

// ---- ?delay and ?status -----------------------------------------------------

test("?status answers with that status", async () => {
  for (const status of [200, 201, 301, 404, 418, 429, 500, 503, 511]) {
    const response = await helloApp(3).request(`/a?status=${status}`);
    assertEquals(response.status, status);
    assertMatch(response.headers.get("content-type") ?? "", /^text\/plain\b/);
    assertEquals(await response.text(), "hello from handler 3");
  }
});

test("?status of an answer without a body", async () => {
  for (const status of [204, 205, 304]) {
    const response = await helloApp(3).request(`/?status=${status}`);
    assertEquals(response.status, status);
    assertEquals(response.body, null);
  }
});

test("a value that is no such number: 400 and what was expected", async () => {
  const bad: [query: string, line: string][] = [];
  for (const value of ["", "x", "-1", "1.5", "1e3", "0x10", " 1", "60001"]) {
    bad.push([
      `delay=${encodeURIComponent(value)}`,
      `delay must be a whole number from 0 to 60000, got "${value}"`,
    ]);
  }
  for (const value of ["", "x", "20", "199", "600", "2e2", "-200", "200.0"]) {
    bad.push([
      `status=${value}`,
      `status must be a whole number from 200 to 599, got "${value}"`,
    ]);
  }
  bad.push(["delay", 'delay must be a whole number from 0 to 60000, got ""']);
  bad.push(["status=299", "299 is no HTTP status"]);
  bad.push(["status=599", "599 is no HTTP status"]);
  bad.push([
    "delay=60000&status=1",
    'status must be a whole number from 200 to 599, got "1"',
  ]);
  for (const [query, line] of bad) {
    const response = await helloApp(0).request(`/?${query}`);
    assertEquals([response.status, await response.text()], [400, line]);
    assertMatch(response.headers.get("content-type") ?? "", /^text\/plain\b/);
  }
});

test("?delay waits, alone and together with ?status", async () => {
  const order: string[] = [];
  const ask = async (query: string) => {
    const response = await helloApp(1).request(`/?${query}`);
    assertEquals(await response.text(), "hello from handler 1");
    order.push(`${query} ${response.status}`);
  };
  await Promise.all([
    ask("delay=200&status=503"),
    ask("delay=100"),
    ask("delay=0"),
    ask("other=1"),
  ]);
  assertEquals(order.slice(2), ["delay=100 200", "delay=200&status=503 503"]);
});

test("a client that leaves ends the longest delay", async () => {
  const leaving = new AbortController();
  const request = new Request("http://localhost/?delay=60000", leaving);
  const answer = helloApp(0).request(request);
  leaving.abort();
  assertEquals((await answer).status, 200);
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
  await using(serveAll([{ fetch }], { port: 0 }), async ({ urls }) => {
    const socket = await dial(portOf(urls[0]));
    socket.write("GET /?delay=60000 HTTP/1.1\r\nhost: localhost\r\n\r\n");
    await arrived.promise;
    socket.destroy();
    await done.promise;
  });
});

// ---- serveAll ---------------------------------------------------------------

netTest("app i listens on port + i", async () => {
  const port = await freePorts(3);
  await using(serveAll(helloApps(3), { port }), async ({ urls }) => {
    assertEquals(
      urls,
      [0, 1, 2].map((i) => `http://localhost:${port + i}`),
    );
    for (const [i, url] of urls.entries()) {
      assertEquals(await get(url), `hello from handler ${i}`);
    }
  });
});

netTest("port 0 gives every app a free port", async () => {
  await using(serveAll(helloApps(5), { port: 0 }), async ({ urls }) => {
    assertEquals(new Set(urls.map(portOf)).size, 5);
    assertEquals(
      await Promise.all(urls.map(get)),
      urls.map((_, i) => `hello from handler ${i}`),
    );
  });
});

netTest("what goes over the wire", async () => {
  await using(serveAll(helloApps(1), { port: 0 }), async ({ urls }) => {
    const ask = (method: string, path = "/") =>
      raw(
        portOf(urls[0]),
        `${method} ${path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n`,
      );
    for (const method of ["GET", "DELETE", "OPTIONS", "PROPFIND"]) {
      const [head, body] = (await ask(method)).split("\r\n\r\n");
      assertMatch(head, /^HTTP\/1.1 200 OK\r\n/);
      assertMatch(head, /^content-type: text\/plain;/im);
      assertMatch(head, /^content-length: 20\r?$/im);
      assertEquals(body, "hello from handler 0");
    }
    for (const [method, path] of [["HEAD", "/"], ["GET", "/?status=204"]]) {
      const [, body] = (await ask(method, path)).split("\r\n\r\n");
      assertEquals(body, "");
    }
    assertMatch(await ask("GET", "/?status=503"), /^HTTP\/1.1 503 /);
  });
});

netTest("every server keeps its number under concurrent requests", async () => {
  await using(serveAll(helloApps(20), { port: 0 }), async ({ urls }) => {
    const asked = Array.from({ length: 400 }, (_, k) => k * 7 % 20);
    const answers = await Promise.all(asked.map((i) => get(urls[i])));
    assertEquals(answers, asked.map((i) => `hello from handler ${i}`));
  });
});

netTest("serves whatever has a fetch, as its method", async () => {
  class Counter {
    count = 0;
    fetch(_request: Request) {
      return new Response(`${++this.count}`);
    }
  }
  const apps = [new Counter(), { fetch: () => new Response("own") }];
  await using(serveAll(apps, { port: 0 }), async ({ urls }) => {
    assertEquals(await Promise.all(urls.map(get)), ["1", "own"]);
    assertEquals(await get(urls[0]), "2");
  });
});

netTest("an app learns who asks", async () => {
  const app = {
    fetch: (_request: Request, { remoteAddr }: Deno.ServeHandlerInfo) =>
      new Response((remoteAddr as Deno.NetAddr).hostname),
  };
  await using(serveAll([app], { port: 0 }), async ({ urls }) => {
    assertMatch(await get(urls[0]), /^(127\.0\.0\.1|::1)$/);
  });
});

netTest("an app that throws answers 500, its neighbours go on", async () => {
  const apps = helloApps(3);
  apps[1] = newApps(1)[0].onError((_error, c) => c.text("sorry", 500));
  apps[1].get("/", () => {
    throw new Error("on purpose");
  });
  await using(serveAll(apps, { port: 0 }), async ({ urls }) => {
    const response = await fetch(urls[1]);
    assertEquals([response.status, await response.text()], [500, "sorry"]);
    assertEquals(await get(urls[0]), "hello from handler 0");
    assertEquals(await get(urls[2]), "hello from handler 2");
  });
});

netTest("malformed HTTP on one port harms nobody", async () => {
  await using(serveAll(helloApps(2), { port: 0 }), async ({ urls }) => {
    for (const bytes of ["nonsense\r\n\r\n", "GET /\x01 HTTP/1.1\r\n\r\n"]) {
      assertMatch(await raw(portOf(urls[0]), bytes), /^(HTTP\/1.1 400 |$)/);
    }
    assertEquals(await get(urls[0]), "hello from handler 0");
    assertEquals(await get(urls[1]), "hello from handler 1");
  });
});

netTest("shutdown answers what is in flight and lets nobody in", async () => {
  const arrived = Promise.withResolvers<void>();
  const release = Promise.withResolvers<void>();
  const apps = newApps(2);
  apps[1].get("/", async (c) => {
    arrived.resolve();
    await release.promise;
    return c.text("at last");
  });
  const servers = await serveAll(apps, { port: 0 });
  const ports = servers.urls.map(portOf);
  const answer = get(servers.urls[1]);
  await arrived.promise;
  let stopped = false;
  const stopping = servers.shutdown().then(() => stopped = true);
  const again = servers.shutdown();
  for (const port of ports) {
    await assertRejects(() => dial(port));
  }
  assertEquals(stopped, false);
  release.resolve();
  assertEquals(await answer, "at last");
  await stopping;
  await again;
  await servers.finished;
  await servers.shutdown();
  for (const port of ports) assert(await isFree(port));
});

netTest("silent and kept-alive connections do not hold it up", async () => {
  const servers = await serveAll(helloApps(2), { port: 0 });
  const silent = await dial(portOf(servers.urls[0]));
  const idle = await dial(portOf(servers.urls[1]));
  idle.write("GET / HTTP/1.1\r\nhost: localhost\r\n\r\n");
  await once(idle, "data");
  const gone = [once(silent, "close"), once(idle, "close")];
  idle.resume();
  silent.resume();
  await servers.shutdown();
  await Promise.all(gone);
});

netTest("asyncDispose is shutdown", async () => {
  const servers = await serveAll(helloApps(2), { port: 0 });
  await servers[Symbol.asyncDispose]();
  await servers.finished;
  for (const url of servers.urls) assert(await isFree(portOf(url)));
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
      assertEquals(
        error.errors.map((error) => error.message),
        [`handler 2: port ${port + 2} is already in use`],
      );
      assertEquals(error.errors[0].cause.code, "EADDRINUSE");
      for (const i of [0, 1, 3]) assert(await isFree(port + i));
    });
  },
);

netTest("first counts handlers and ports from there", async () => {
  const port = await freePorts(6);
  await using(serveAll(newApps(1), { port: port + 5 }), async () => {
    const error = await assertRejects(
      () => serveAll(newApps(2), { port, first: 4 }),
      AggregateError,
    ) as AggregateError;
    assertEquals(
      error.errors.map((error) => error.message),
      [`handler 5: port ${port + 5} is already in use`],
    );
  });
});

test("serveAll refuses bad ports and more apps than ports", async () => {
  const bad: [
    n: number,
    options: Parameters<typeof serveAll>[1],
    value: string,
  ][] = [
    [1, { port: 80 }, "80"],
    [1, { port: 1023 }, "1023"],
    [1, { port: 65536 }, "65536"],
    [1, { port: -1 }, "-1"],
    [1, { port: 1024.5 }, "1024.5"],
    [1, { port: NaN }, "NaN"],
    [2, { port: 65535 }, "2"],
    [5537, { port: 60000 }, "5537"],
    [1, { first: -1 }, "-1"],
    [1, { first: 64512 }, "64512"],
    [3, { port: 65000, first: 534 }, "3"],
  ];
  for (const [n, options, value] of bad) {
    const error = await assertRejects(
      () => serveAll(newApps(n), options),
      RangeError,
    ) as RangeError;
    assertStringIncludes(error.message, `got "${value}"`);
  }
  const none = await assertRejects(
    () => serveAll([]),
    RangeError,
  ) as RangeError;
  assertStringIncludes(none.message, 'got "0"');
});

test("every way the machine can refuse has its words", async () => {
  // The real refusals that a test can arrange are in the tests of the command.
  const refusals: [code: string, words: string][] = [
    ["EADDRINUSE", "handler 0: port 1024 is already in use"],
    ["EADDRNOTAVAIL", "handler 0: port 1024: address not on this machine"],
    ["EACCES", "handler 0: port 1024: permission denied"],
    ["EMFILE", "handler 0: port 1024: too many open files"],
    ["EOTHER", "handler 0: port 1024: told EOTHER"],
  ];
  const { serve } = Deno;
  try {
    for (const [code, words] of refusals) {
      const cause = Object.assign(new Error(`told ${code}`), { code });
      Deno.serve = () => {
        throw cause;
      };
      const error = await assertRejects(
        () => serveAll(newApps(1)),
        AggregateError,
      ) as AggregateError;
      assertEquals(error.errors[0].message, words);
      assertEquals(error.errors[0].cause, cause);
    }
  } finally {
    Deno.serve = serve;
  }
});

// ---- The command line -------------------------------------------------------

const here = dirname(fileURLToPath(import.meta.url));
const runtime = process.execPath;
const command = onDeno
  ? [runtime, "run", "--allow-net", "multiserv.ts"]
  : [runtime, "node/multiserv.ts"];

interface Ended {
  code: number | null;
  stdout: string;
  stderr: string;
}

/** Starts a command in the repository, with nothing on its standard input. */
function launch(words: string[]) {
  const child = spawn("env", ["NO_COLOR=1", ...words], {
    cwd: here,
    stdio: ["ignore", "pipe", "pipe"],
  });
  const closed = once(child, "close");
  const ended: Promise<Ended> = Promise.all([
    text(child.stdout),
    text(child.stderr),
    closed,
  ]).then(([stdout, stderr, [code]]) => ({ code, stdout, stderr }));
  return { child, ended };
}

/** Runs `multiserv` with these arguments, to its end. */
const cli = (...args: string[]) => launch([...command, ...args]).ended;

/** Starts `multiserv` and waits for its ready lines. */
async function running(n: number, ...args: string[]) {
  const port = await freePorts(n);
  const { child, ended } = launch([
    ...command,
    `${n}`,
    "--port",
    `${port}`,
    ...args,
  ]);
  let seen = "";
  const ready = Promise.withResolvers<void>();
  child.stdout.on("data", (data: Uint8Array) => {
    seen += new TextDecoder().decode(data);
    if (seen.split("\n").length > n) ready.resolve();
  });
  await Promise.race([ready.promise, ended]);
  const kill = (signal: NodeJS.Signals) => process.kill(child.pid!, signal);
  return { port, ended, kill };
}

/** Waits until nobody listens any more. */
async function untilRefused(port: number) {
  for (;;) {
    try {
      (await dial(port)).destroy();
    } catch {
      return;
    }
  }
}

const range = (n: string, from = 1024) =>
  `n, for ports from ${from} up, must be a whole number from 1 to ${
    65536 - from
  }, got "${n}"`;
const portRange = (port: string) =>
  `port, unless 0, must be a whole number from 1024 to 65535, got "${port}"`;
const firstRange = (first: string, max = 64511) =>
  `first must be a whole number from 0 to ${max}, got "${first}"`;
const noHost = 'hostname must not be empty, got ""';
const unknown = (option: string) => `unknown option "${option}"`;

/** Wrong command lines and what they are told, the same on both runtimes. */
const wrong: [args: string[], message: string][] = [
  [[], range("")],
  [[""], range("")],
  [["3", "4"], range("3 4")],
  [["3", ""], range("3 ")],
  [["abc"], range("abc")],
  [["3.5"], range("3.5")],
  [["3.0"], range("3.0")],
  [["1e3"], range("1e3")],
  [["0x10"], range("0x10")],
  [["0"], range("0")],
  [["00"], range("00")],
  [["+3"], range("+3")],
  [["٣"], range("٣")],
  [[" 3"], range(" 3")],
  [["3 "], range("3 ")],
  [["1_000"], range("1_000")],
  [["Infinity"], range("Infinity")],
  [["64513"], range("64513")],
  [["99999999999999999999"], range("99999999999999999999")],
  [["--", "-3"], range("-3")],
  [["-"], range("-")],
  [["-3"], unknown("-3")],
  [["-x", "3"], unknown("-x")],
  [["--prot", "5000", "3"], unknown("--prot")],
  [["--prot=5000", "3"], unknown("--prot=5000")],
  [["--no-verbose", "3"], unknown("--no-verbose")],
  [["--constructor", "3"], unknown("--constructor")],
  [["3", "-p"], portRange("")],
  [["3", "--port"], portRange("")],
  [["3", "--port="], portRange("")],
  [["3", "-p", "-v"], portRange("")],
  [["3", "-p", "80"], portRange("80")],
  [["3", "-p", "1023"], portRange("1023")],
  [["3", "-p", "65536"], portRange("65536")],
  [["3", "-p", "http"], portRange("http")],
  [["3", "--port=-1"], portRange("-1")],
  [["3", "--port=1e4"], portRange("1e4")],
  [["2", "-p", "65535"], range("2", 65535)],
  [["70000", "-p", "60000"], range("70000", 60000)],
  [["536", "-p", "60000", "-f", "5001"], range("536", 65001)],
  [["3", "-f"], firstRange("")],
  [["3", "-f", "x"], firstRange("x")],
  [["3", "--first=-1"], firstRange("-1")],
  [["3", "-f", "64512"], firstRange("64512")],
  [["3", "-p", "65000", "-f", "536"], firstRange("536", 535)],
  [["3", "-H"], noHost],
  [["3", "--hostname="], noHost],
];

runTest("wrong command lines: what is wrong, exit 2", async () => {
  const rest = wrong.slice();
  const worker = async () => {
    for (let row = rest.pop(); row; row = rest.pop()) {
      const [args, message] = row;
      assertEquals(await cli(...args), {
        code: 2,
        stdout: "",
        stderr: `multiserv: ${message}\nTry --help\n`,
      }, `multiserv ${args.join(" ")}`);
    }
  };
  await Promise.all([worker(), worker(), worker()]);
});

runTest("--help goes to stdout, exit 0", async () => {
  for (const args of [["--help"], ["-h"], ["3", "-p", "80", "-h"]]) {
    const { code, stdout, stderr } = await cli(...args);
    assertEquals([code, stderr], [0, ""]);
    assertMatch(stdout, /^Usage: multiserv \[options\] <n>\n/);
    for (const option of ["port", "first", "hostname", "verbose", "help"]) {
      assertMatch(stdout, new RegExp(`-\\w, --${option}\\b`));
    }
  }
});

for (const signal of ["SIGINT", "SIGTERM"] as const) {
  runTest(`${signal}: answers what is in flight, exit 0`, async () => {
    const { port, kill, ended } = await running(2);
    const slow = get(`http://localhost:${port}/?delay=300`);
    // Answered after the slow request has arrived on the same port.
    assertEquals(await get(`http://localhost:${port}`), "hello from handler 0");
    kill(signal);
    assertEquals(await slow, "hello from handler 0");
    assertEquals(await ended, {
      code: 0,
      stdout: [0, 1].map((i) =>
        `handler ${i} listening on http://localhost:${port + i}\n`
      ).join(""),
      stderr: "",
    });
    for (const i of [0, 1]) assert(await isFree(port + i));
  });

  runTest(`a second ${signal} ends it at once`, async () => {
    const { port, kill, ended } = await running(1);
    const lost = assertRejects(() =>
      get(`http://localhost:${port}/?delay=60000`)
    );
    await get(`http://localhost:${port}`);
    kill(signal);
    await untilRefused(port);
    kill(signal);
    assertEquals((await ended).code, signal === "SIGINT" ? 130 : 143);
    await lost;
  });
}

runTest("--first counts from there, handler i on port + i", async () => {
  const port = await freePorts(4);
  const { kill, ended } = await running(2, "-p", `${port}`, "--first", "2");
  assertEquals(
    await get(`http://localhost:${port + 3}`),
    "hello from handler 3",
  );
  kill("SIGTERM");
  assertEquals(
    (await ended).stdout,
    [2, 3].map((i) =>
      `handler ${i} listening on http://localhost:${port + i}\n`
    ).join(""),
  );
});

runTest("--port 0 gives free ports", async () => {
  const { kill, ended } = await running(3, "--port=0");
  kill("SIGTERM");
  const ports = [...(await ended).stdout.matchAll(/localhost:(\d+)\n/g)];
  assertEquals(new Set(ports.map(([, port]) => port)).size, 3);
});

runTest("--hostname is where it listens", async () => {
  const { port, kill, ended } = await running(1, "-H", "127.0.0.1");
  assertEquals(await get(`http://127.0.0.1:${port}`), "hello from handler 0");
  kill("SIGTERM");
  assertEquals(
    (await ended).stdout,
    `handler 0 listening on http://127.0.0.1:${port}\n`,
  );
});

runTest("an IPv6 address stands in brackets", async () => {
  for (const hostname of ["::1", "[::1]"]) {
    const { port, kill, ended } = await running(1, "-H", hostname);
    assertEquals(await get(`http://[::1]:${port}`), "hello from handler 0");
    kill("SIGTERM");
    assertEquals(
      (await ended).stdout,
      `handler 0 listening on http://[::1]:${port}\n`,
    );
  }
});

runTest("--verbose logs every request to stderr", async () => {
  const { port, kill, ended } = await running(2, "-v");
  await get(`http://localhost:${port + 1}/a?status=404`);
  await (await fetch(`http://localhost:${port}/b`, { method: "POST" })).text();
  kill("SIGTERM");
  assertEquals(
    (await ended).stderr,
    `handler 1: GET http://localhost:${port + 1}/a?status=404 404\n` +
      `handler 0: POST http://localhost:${port}/b 200\n`,
  );
});

runTest("without --verbose no request leaves a line", async () => {
  const { port, kill, ended } = await running(1);
  await get(`http://localhost:${port}/?delay=1`);
  await get(`http://localhost:${port}/?delay=1`);
  const leaving = await dial(port);
  leaving.write("GET /?delay=60000 HTTP/1.1\r\nhost: localhost\r\n\r\n");
  await get(`http://localhost:${port}`);
  leaving.destroy();
  kill("SIGTERM");
  assertEquals(await ended, {
    code: 0,
    stdout: `handler 0 listening on http://localhost:${port}\n`,
    stderr: "",
  });
});

/** What stderr says when servers cannot start. */
const refused = (hostname: string, list: string[], hint: string) => ({
  code: 1,
  stdout: "",
  stderr: [
    `multiserv: No server started on "${hostname}"`,
    ...list.slice(0, 5),
    ...list.length > 5 ? [`… and ${list.length - 5} more`] : [],
    hint,
    "",
  ].join("\n"),
});

runTest("a taken port: which one, exit 1, nothing left listening", async () => {
  const port = await freePorts(3);
  await using(serveAll(newApps(1), { port: port + 1 }), async () => {
    assertEquals(
      await cli("3", "-p", `${port}`),
      refused(
        "localhost",
        [`handler 1: port ${port + 1} is already in use`],
        "Try another --port",
      ),
    );
    for (const i of [0, 2]) assert(await isFree(port + i));
  });
});

runTest("many taken ports: five of them and how many more", async () => {
  const port = await freePorts(8);
  await using(serveAll(newApps(7), { port }), async () => {
    assertEquals(
      await cli("8", "-p", `${port}`),
      refused(
        "localhost",
        [0, 1, 2, 3, 4, 5, 6].map((i) =>
          `handler ${i}: port ${port + i} is already in use`
        ),
        "Try another --port",
      ),
    );
  });
});

runTest("the first port is 1024 unless told otherwise", async () => {
  // Whoever holds it, nobody else can.
  const held = await serveAll(newApps(1), { port: 1024 }).catch(() => {});
  assertEquals(
    await cli("1"),
    refused(
      "localhost",
      ["handler 0: port 1024 is already in use"],
      "Try another --port",
    ),
  );
  await held?.shutdown();
});

runTest("an address of another machine", async () => {
  const port = await freePorts(2);
  assertEquals(
    await cli("2", "-p", `${port}`, "-H", "192.0.2.1"),
    refused(
      "192.0.2.1",
      [0, 1].map((i) =>
        `handler ${i}: port ${port + i}: address not on this machine`
      ),
      "Try another --hostname",
    ),
  );
});

runTest("an unknown host name", async () => {
  for (const hostname of ["no-such-host.invalid", "a b", "x:y"]) {
    assertEquals(
      await cli("1", "-p", "5000", "-H", hostname),
      refused(
        hostname,
        ["handler 0: port 5000: unknown host name"],
        "Try another --hostname",
      ),
    );
  }
});

runTest("too many open files names ulimit -n", async () => {
  const port = await freePorts(200);
  const limited = ["sh", "-c", 'ulimit -n 100 && exec "$@"', "sh", ...command];
  const { code, stdout, stderr } = await launch(
    [...limited, "200", "-p", `${port}`],
  ).ended;
  assertEquals([code, stdout], [1, ""]);
  const lines = stderr.trimEnd().split("\n");
  assertEquals(lines.length, 8);
  assertEquals(lines[0], 'multiserv: No server started on "localhost"');
  for (const line of lines.slice(1, 6)) {
    assertMatch(line, /^handler \d+: port \d+: too many open files$/);
  }
  assertMatch(lines[6], /^… and \d+ more$/);
  assertEquals(lines[7], "Raise ulimit -n or start fewer");
});

runTest("a closed stdout does not end it", async () => {
  const n = 3000; // their ready lines are more than a pipe holds
  const port = await freePorts(n);
  const child = spawn(command[0], [
    ...command.slice(1),
    `${n}`,
    "-p",
    `${port}`,
  ], {
    cwd: here,
    stdio: ["ignore", "pipe", "pipe"],
  });
  const closed = once(child, "close");
  const stderr = text(child.stderr);
  await once(child.stdout, "data");
  child.stdout.destroy();
  const last = `http://localhost:${port + n - 1}`;
  assertEquals(await get(last), `hello from handler ${n - 1}`);
  process.kill(child.pid!, "SIGTERM");
  const [code] = await closed;
  assertEquals([code, await stderr], [0, ""]);
});

/** Runs `multiserv` on a terminal, through util-linux `script`. */
function onTerminal(command: string[]) {
  const line = command.map((word) => `'${word}'`).join(" ");
  const words = ["NO_COLOR=1", "script", "-qec", line, "/dev/null"];
  const child = spawn("env", words, {
    cwd: here,
    stdio: ["pipe", "pipe", "inherit"],
  });
  const closed = once(child, "close");
  let shown = "";
  const waiting = new Set<() => void>();
  child.stdout.on("data", (data: Uint8Array) => {
    shown += new TextDecoder().decode(data);
    for (const look of waiting) look();
  });
  /** Waits until the screen has shown this text. */
  const until = async (text: string) => {
    const found = Promise.withResolvers<void>();
    const look = () => shown.includes(text) && found.resolve();
    waiting.add(look);
    look();
    await Promise.race([
      found.promise,
      closed.then(() => found.reject(new Error(`no "${text}" in: ${shown}`))),
    ]);
    waiting.delete(look);
  };
  const type = (keys: string) => child.stdin.write(keys);
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
  const end = async () => {
    const [code] = await closed;
    return { code, shown };
  };
  return { until, type, answer, end };
}

Deno.test({
  name: "on a terminal a last line says how to stop, and Ctrl+C does",
  ignore: !run || !onLinux,
  async fn() {
    const port = await freePorts(1);
    const screen = onTerminal([...command, "1", "-p", `${port}`]);
    await screen.until("Press Ctrl+C to stop");
    screen.type("\x03");
    const { code, shown } = await screen.end();
    assertEquals(code, 0);
    assertMatch(
      shown,
      /^handler 0 listening on .*\r\nPress Ctrl\+C to stop\r\n/,
    );
  },
});

// ---- Only Deno --------------------------------------------------------------

denoTest(
  "asks for the network once, for all ports",
  async () => {
    const port = await freePorts(3);
    const words = [runtime, "run", "multiserv.ts", "3", "-p", `${port}`];
    const yes = onTerminal(words);
    await yes.answer("y\n", "Granted");
    await yes.until("Press Ctrl+C to stop");
    assertEquals(
      await get(`http://localhost:${port + 2}`),
      "hello from handler 2",
    );
    yes.type("\x03");
    const { code, shown } = await yes.end();
    assertEquals([code, shown.split("Deno requests").length - 1], [0, 1]);

    const no = onTerminal(words);
    await no.answer("n\n", "Denied");
    const ended = await no.end();
    assertEquals(ended.code, 1);
    assertEquals(ended.shown.split("Deno requests").length - 1, 1);
    assertStringIncludes(ended.shown, "Allow it: deno run --allow-net");
  },
);

// Deno starts Deno with -A, unless there is some permission flag.
const withNothing = "--deny-ffi";

denoTest("where nobody can be asked: the flag to add, exit 1", async () => {
  assertEquals(
    await launch(
      [runtime, "run", withNothing, "multiserv.ts", "1", "-p", "5000"],
    ).ended,
    refused(
      "localhost",
      ["handler 0: port 5000: no network access"],
      "Allow it: deno run --allow-net",
    ),
  );
});

denoTest("permission for just its ports is enough", async () => {
  const port = await freePorts(1);
  await using(serveAll(newApps(1), { port }), async () => {
    const allow = `--allow-net=localhost:${port}`;
    const args = [runtime, "run", allow, "multiserv.ts", "1", "-p", `${port}`];
    assertEquals(
      await launch(args).ended,
      refused(
        "localhost",
        [`handler 0: port ${port} is already in use`],
        "Try another --port",
      ),
    );
  });
});

denoTest("multiserv.ts alone runs from an empty folder", async () => {
  // The import map says where to get the packages, nothing else.
  const script = `
    folder=$(mktemp -d) && cp multiserv.ts "$folder" && map=$PWD/deno.json &&
    cd "$folder" && "$0" run ${withNothing} --import-map="$map" multiserv.ts -h
    code=$? && rm -r "$folder" && exit "$code"`;
  const { code, stdout } = await launch(["sh", "-c", script, runtime]).ended;
  assertEquals(code, 0);
  assertMatch(stdout, /^Usage: multiserv/);
});

denoTest("./multiserv.ts runs, with the permission it needs", async () => {
  const port = await freePorts(1);
  await using(serveAll(newApps(1), { port }), async () => {
    // Gets as far as the port, so it was allowed to open it.
    const path = `${dirname(runtime)}:$PATH`;
    assertEquals(
      await launch(["sh", "-c", `PATH=${path} ./multiserv.ts 1 -p ${port}`])
        .ended,
      refused(
        "localhost",
        [`handler 0: port ${port} is already in use`],
        "Try another --port",
      ),
    );
  });
});

denoTest("bare deno test passes where nothing is allowed", async () => {
  const { code, stdout } = await launch([runtime, "test", withNothing]).ended;
  assertEquals(code, 0);
  assertMatch(stdout, /\| \d+ passed \| 0 failed \| \d+ ignored /);
});

// ---- Only Node --------------------------------------------------------------

if (!onDeno) {
  /** Runs a program that imports the adapter. */
  const importing = (program: string) =>
    launch([runtime, "--input-type=module", "-e", program]).ended;

  runTest("a Node program can import the adapter", async () => {
    const ended = await importing(`
      import { handler, newApps, serveAll } from "./node/multiserv.ts";
      const [app] = newApps(1);
      const servers = await serveAll([app.all("*", handler(5))], { port: 0 });
      console.log(await (await fetch(servers.urls[0])).text());
      await servers.shutdown();`);
    const stdout = "hello from handler 5\n";
    assertEquals(ended, { code: 0, stdout, stderr: "" });
  });

  runTest("too old a Node is told so in one line", async () => {
    const ended = await importing(`
      Object.defineProperty(process.versions, "node", { value: "22.17.1" });
      await import("./node/multiserv.ts");`);
    const stderr = "multiserv: needs Node 22.18 or newer, this is 22.17.1\n";
    assertEquals(ended, { code: 1, stdout: "", stderr });
  });
}

// ---- The repository ---------------------------------------------------------

runTest("Node gets the same versions of the packages as Deno", async () => {
  const read = async (path: string) =>
    JSON.parse((await launch(["cat", path]).ended).stdout);
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

runTest("multiserv.ts is at most 200 lines", async () => {
  const { stdout } = await launch(["wc", "-l", "multiserv.ts"]).ended;
  assert(parseInt(stdout) <= 200, stdout);
});

// ---- Benchmarks: deno task bench --------------------------------------------

const hello = "hello from handler 0";
const bareServer = (port: number) =>
  Deno.serve(
    { hostname: "localhost", port, onListen() {} },
    () => new Response(hello),
  );

/** Sends 100 requests at once down one connection, waits for the answers. */
async function ask(socket: Socket) {
  const all = Promise.withResolvers<void>();
  let seen = "";
  socket.on("data", (data: Uint8Array) => {
    seen += new TextDecoder().decode(data);
    if (seen.split(hello).length > 100) all.resolve();
  });
  socket.write("GET / HTTP/1.1\r\nhost: localhost\r\n\r\n".repeat(100));
  await all.promise;
}

/** Measures what 2000 requests take, 20 connections with 100 in flight each. */
async function load(b: Deno.BenchContext, port: number) {
  const sockets = await Promise.all(
    Array.from({ length: 20 }, () => dial(port)),
  );
  b.start();
  await Promise.all(sockets.map(ask));
  b.end();
  for (const socket of sockets) socket.destroy();
}

Deno.bench("2000 requests, bare Deno.serve", {
  group: "hello",
  baseline: true,
}, async (b) => {
  const server = bareServer(0);
  await load(b, server.addr.port);
  await server.shutdown();
});
Deno.bench("2000 requests, multiserv", { group: "hello" }, async (b) => {
  const servers = await serveAll(helloApps(1), { port: 0 });
  await load(b, portOf(servers.urls[0]));
  await servers.shutdown();
});

for (const n of [1, 100, 1000]) {
  const group = `start and shut down ${n}`;
  Deno.bench(
    `${group}, bare Deno.serve`,
    { group, baseline: true },
    async () => {
      const ports = Array.from({ length: n }, (_, i) => 20_000 + i);
      await Promise.all(ports.map((port) => bareServer(port).shutdown()));
    },
  );
  Deno.bench(`${group}, multiserv`, { group }, async () => {
    await (await serveAll(helloApps(n), { port: 20_000 })).shutdown();
  });
}
