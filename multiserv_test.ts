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
import {
  setImmediate as nextTurn,
  setTimeout as sleep,
} from "node:timers/promises";
import { fileURLToPath } from "node:url";
import {
  handler,
  main,
  type MultiServer,
  newApps,
  serveAll,
} from "./multiserv.ts";

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

/** What tests have started and is still running. */
const children = new Set<ChildProcess>();

/** Fails a test that hangs, and leaves nothing running that it has started. */
const limited = (fn: Body) => async () => {
  const late = Promise.withResolvers<void>();
  const timer = setTimeout(late.reject, 60_000, new Error("Hangs: 60 seconds"));
  try {
    await Promise.race([fn(), late.promise]);
  } finally {
    clearTimeout(timer);
    for (const child of children) process.kill(child.pid!, "SIGKILL");
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

/** The errors of a start that fails, one per server that could not start. */
async function failed(starting: Promise<MultiServer>) {
  const error = await assertRejects(() => starting, AggregateError);
  return (error as AggregateError).errors;
}

/**
 * Finds n free ports in a row, below those that the system gives to clients and
 * away from those that `fetch` refuses.
 */
async function freePorts(n: number): Promise<number> {
  for (;;) {
    const port = 11_000 + Math.floor(Math.random() * (21_000 - n));
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
  bad.push(["status=299", "status 299 is unknown"]);
  bad.push(["status=599", "status 599 is unknown"]);
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

netTest("numbers as text, from JavaScript, are numbers", async () => {
  const port = await freePorts(4);
  const options = { port: `${port}`, first: "3" } as unknown as {
    port: number;
  };
  await using(serveAll(newApps(1), options), ({ urls }) => {
    assertEquals(urls, [`http://localhost:${port + 3}`]);
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
    const port = portOf(urls[0]);
    // Old clients do not say which host they mean.
    for (const version of ["1.0", "1.1\r\nconnection: close"]) {
      assertMatch(await raw(port, `GET / HTTP/${version}\r\n\r\n`), / 200 OK/);
    }
    for (const [method, path] of [["HEAD", "/"], ["GET", "/?status=204"]]) {
      const [, body] = (await ask(method, path)).split("\r\n\r\n");
      assertEquals(body, "");
    }
    assertMatch(await ask("GET", "/?status=503"), /^HTTP\/1.1 503 /);
  });
});

netTest("no hello for CONNECT, nor late for who stopped sending", async () => {
  await using(serveAll(helloApps(1), { port: 0 }), async ({ urls }) => {
    const port = portOf(urls[0]);
    const rest = "HTTP/1.1\r\nhost: a:1\r\nconnection: close\r\n\r\n";
    assert(!(await raw(port, `CONNECT a:1 ${rest}`)).includes("hello"));
    const socket = await dial(port);
    socket.end(`GET /?delay=60000 ${rest}`);
    assertEquals(await text(socket), "");
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

netTest("an app learns who asks, and when that is done", async () => {
  const order: string[] = [];
  const done = Promise.withResolvers<void>();
  const app = {
    async fetch(_request: Request, info: Deno.ServeHandlerInfo) {
      info.completed.then(() => order.push("completed"))
        .then(() => done.resolve());
      await nextTurn();
      order.push("answered");
      return new Response((info.remoteAddr as Deno.NetAddr).hostname);
    },
  };
  await using(serveAll([app], { port: 0 }), async ({ urls }) => {
    assertMatch(await get(urls[0]), /^(127\.0\.0\.1|::1)$/);
    await done.promise;
    assertEquals(order, ["answered", "completed"]);
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
  apps[0].get("/", async (c) => {
    arrived.resolve();
    await release.promise;
    return c.text("at last");
  });
  const servers = await serveAll(apps, { port: await freePorts(2) });
  const ports = servers.urls.map(portOf);
  const done: string[] = [];
  const finished = servers.finished.then(() => done.push("finished"));
  const answer = get(servers.urls[0]);
  await arrived.promise;
  const stopping = servers.shutdown().then(() => done.push("shutdown"));
  const again = servers.shutdown();
  for (const port of ports) {
    await assertRejects(() => dial(port));
  }
  assertEquals(done, []);
  release.resolve();
  assertEquals(await answer, "at last");
  await Promise.all([stopping, again, finished]);
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
  const servers = await serveAll(helloApps(2), { port: await freePorts(2) });
  await servers[Symbol.asyncDispose]();
  await servers.finished;
  for (const url of servers.urls) assert(await isFree(portOf(url)));
});

netTest(
  "a taken port: one AggregateError, nothing left listening",
  async () => {
    const port = await freePorts(4);
    await using(serveAll(newApps(1), { port: port + 2 }), async () => {
      const errors = await failed(serveAll(newApps(4), { port }));
      assertEquals(
        errors.map((error) => error.message),
        [`handler 2: port ${port + 2} is already in use`],
      );
      assertEquals(errors[0].cause.code, "EADDRINUSE");
      for (const i of [0, 1, 3]) assert(await isFree(port + i));
    });
  },
);

netTest("first counts handlers and ports from there", async () => {
  const port = await freePorts(6);
  await using(serveAll(newApps(1), { port: port + 5 }), async () => {
    const errors = await failed(serveAll(newApps(2), { port, first: 4 }));
    assertEquals(
      errors.map((error) => error.message),
      [`handler 5: port ${port + 5} is already in use`],
    );
  });
});

netTest("an empty hostname does not mean all addresses", async () => {
  const starting = serveAll(newApps(1), { port: 0, hostname: "" });
  assertEquals(
    (await failed(starting)).map((error) => error.message),
    ["handler 0: port 0: unknown host name"],
  );
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
  const refusals: [code: string, why: string, hint: string][] = [
    ["EADDRINUSE", " is already in use", "Try another --port"],
    [
      "EADDRNOTAVAIL",
      ": address not on this machine",
      "Try another --hostname",
    ],
    ["EACCES", ": permission denied", "Try another --port"],
    ["EMFILE", ": too many open files", "Raise ulimit -n or start fewer"],
    ["EOTHER", ": told EOTHER", "Try another --port"],
  ];
  const { serve, addSignalListener } = Deno;
  const { error: print } = console;
  try {
    // A signal that comes before the failure changes nothing about it.
    Deno.addSignalListener = (signal, stop) => {
      if (signal === "SIGINT") stop();
    };
    for (const [code, why, hint] of refusals) {
      const cause = Object.assign(new Error(`told ${code}`), { code });
      Deno.serve = () => {
        throw cause;
      };
      const [error] = await failed(serveAll(newApps(1)));
      assertEquals(error.message, `handler 0: port 1024${why}`);
      assertEquals(error.cause, cause);

      let printed = "";
      console.error = (line: string) => printed += `${line}\n`;
      const exitCode = await main(["1"]);
      const list = [`handler 0: port 1024${why}`];
      assertEquals(
        { code: exitCode, stdout: "", stderr: printed },
        refused("localhost", list, hint),
      );
    }
  } finally {
    Object.assign(Deno, { serve, addSignalListener });
    console.error = print;
  }
});

test("a fault of the program itself is not called one of its user", async () => {
  await assertRejects(() => main(null as unknown as string[]), TypeError);
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

/** Starts a command in the repository. */
function start(words: string[], stdin: "ignore" | "pipe" = "ignore") {
  const child = spawn("env", ["NO_COLOR=1", ...words], {
    cwd: here,
    stdio: [stdin, "pipe", "pipe"],
  });
  children.add(child);
  const closed = once(child, "close").then(([code]) => {
    children.delete(child);
    return code as number | null;
  });
  const kill = (signal: NodeJS.Signals) => process.kill(child.pid!, signal);
  return { child, stdout: child.stdout!, stderr: child.stderr!, closed, kill };
}

/** Starts a command, resolves to all it says. */
function launch(words: string[]) {
  const { child, stdout, stderr, closed, kill } = start(words);
  const ended: Promise<Ended> = Promise.all([
    closed,
    text(stdout),
    text(stderr),
  ])
    .then(([code, stdout, stderr]) => ({ code, stdout, stderr }));
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
  const urls = await new Promise<string[]>((resolve, reject) => {
    let seen = "";
    child.stdout!.on("data", (data: Uint8Array) => {
      seen += new TextDecoder().decode(data);
      const urls = seen.match(/http:\S+(?=\n)/g) ?? [];
      if (urls.length === n) resolve(urls);
    });
    ended.then(({ stderr }) => reject(new Error(stderr)));
  });
  return { urls, ended, kill };
}

/** Starts `multiserv` on free ports and waits for its ready lines. */
const running = (n: number, ...args: string[]) =>
  serving(n, [...command, `${n}`, "-p", "0", ...args]);

/** The command for `multiserv` with so many open files allowed. */
const withFiles = (files: number, ...args: string[]) => {
  const line = `ulimit -n ${files} && exec "$@"`;
  return ["sh", "-c", line, "sh", ...command, ...args];
};

/** The ready lines of servers at these URLs. */
const ready = (urls: string[], first = 0) =>
  urls.map((url, k) => `handler ${first + k} listening on ${url}\n`).join("");

/** Waits until somebody listens, or nobody does any more. */
async function untilListening(port: number, listening: boolean) {
  for (;;) {
    const socket = await dial(port).catch(() => undefined);
    socket?.destroy();
    if (listening === (socket !== undefined)) return;
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
  [["64513", "-p", "0"], range("64513")],
  [["3\n4"], range("3\n4")],
  [["99999999999999999999"], range("99999999999999999999")],
  [["--", "-3"], range("-3")],
  [["-"], range("-")],
  [["--_"], range("")],
  [["--_=x", "3"], range("x 3")],
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
  [["3", "-p", "0", "-f", "64512"], firstRange("64512")],
  [["3", "-p", "65000", "-f", "536"], firstRange("536", 535)],
  [["3", "-H"], noHost],
  [["3", "-H", ""], noHost],
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

runTest("--help goes to stdout, as README.md shows it", async () => {
  const readme = await contents("README.md");
  for (const args of [["--help"], ["-h"], ["3", "-p", "80", "-h"]]) {
    const { code, stdout, stderr } = await cli(...args);
    assertEquals([code, stderr], [0, ""]);
    assertStringIncludes(readme, `multiserv.ts --help\n${stdout}\`\`\`\n`);
  }
});

for (const signal of ["SIGINT", "SIGTERM"] as const) {
  runTest(`${signal}: answers what is in flight, exit 0`, async () => {
    const port = `${await freePorts(2)}`;
    const { urls, kill, ended } = await running(2, "-p", port);
    const slow = await send(urls[0], "?delay=300");
    assertEquals(await get(urls[0]), "hello from handler 0");
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

  runTest(`${signal} while it starts: stops, exit 0`, async () => {
    const n = 2000;
    const port = await freePorts(n);
    const { ended, kill } = launch([...command, `${n}`, "-p", `${port}`]);
    await untilListening(port, true);
    kill(signal);
    const { code, stderr } = await ended;
    assertEquals([code, stderr], [0, ""]);
    assert(await isFree(port));
  });
}

runTest("--port and --first: handler i listens on port + i", async () => {
  const port = await freePorts(4);
  const args = ["--port", `${port}`, "--first", "2"];
  const { urls, kill, ended } = await running(2, ...args);
  assertEquals(urls.map(portOf), [port + 2, port + 3]);
  assertEquals(await get(urls[1]), "hello from handler 3");
  kill("SIGTERM");
  assertEquals((await ended).stdout, ready(urls, 2));
});

runTest("--port 0 gives free ports, whatever the first number", async () => {
  const { urls, kill, ended } = await running(3, "--first=64511");
  assertEquals(new Set(urls).size, 3);
  assertEquals(await get(urls[2]), "hello from handler 64513");
  kill("SIGTERM");
  assertEquals((await ended).stdout, ready(urls, 64511));
});

runTest("--hostname is where it listens", async () => {
  const { urls: [url], kill, ended } = await running(1, "-H", "127.0.0.1");
  assertMatch(url, /^http:\/\/127\.0\.0\.1:\d+$/);
  assertEquals(await get(url), "hello from handler 0");
  kill("SIGTERM");
  await ended;
});

runTest("an IPv6 address stands in brackets", async () => {
  for (const hostname of ["::1", "[::1]", "0:0:0:0:0:0:0:1"]) {
    const { urls: [url], kill, ended } = await running(1, "-H", hostname);
    assertEquals(new URL(url).hostname, "[::1]");
    assertEquals(await get(url), "hello from handler 0");
    kill("SIGTERM");
    await ended;
  }
});

runTest("--verbose logs every request to stderr", async () => {
  const { urls, kill, ended } = await running(2, "-v", "--first", "7");
  await get(`${urls[1]}/a?status=404`);
  await (await fetch(`${urls[0]}/b`, { method: "POST" })).text();
  kill("SIGTERM");
  assertEquals(await ended, {
    code: 0,
    stdout: ready(urls, 7),
    stderr: `handler 8: GET ${urls[1]}/a?status=404 404\n` +
      `handler 7: POST ${urls[0]}/b 200\n`,
  });
});

runTest("without --verbose no request leaves a line", async () => {
  const { urls, kill, ended } = await running(1);
  await get(`${urls[0]}/?delay=1`);
  await get(`${urls[0]}/?delay=1`);
  const leaving = await dial(portOf(urls[0]));
  leaving.write("GET /?delay=60000 HTTP/1.1\r\nhost: localhost\r\n\r\n");
  await get(urls[0]);
  leaving.destroy();
  kill("SIGTERM");
  assertEquals(await ended, { code: 0, stdout: ready(urls), stderr: "" });
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
    const taken = (i: number) =>
      `handler ${i}: port ${port + i} is already in use`;
    for (const [first, n] of [[0, 8], [1, 7], [2, 6]]) {
      const numbers = Array.from({ length: n - 1 }, (_, k) => first + k);
      assertEquals(
        await cli(`${n}`, "-p", `${port}`, "-f", `${first}`),
        refused("localhost", numbers.map(taken), "Try another --port"),
      );
    }
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
  for (const hostname of ["192.0.2.1", "ff02::1"]) {
    assertEquals(
      await cli("2", "-p", `${port}`, "-H", hostname),
      refused(
        hostname,
        [0, 1].map((i) =>
          `handler ${i}: port ${port + i}: address not on this machine`
        ),
        "Try another --hostname",
      ),
    );
  }
});

runTest("an unknown host name", async () => {
  for (
    const hostname of [
      "no-such-host.invalid",
      "a b",
      "x:y",
      "[x]",
      "[127.0.0.1]",
    ]
  ) {
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
  const words = withFiles(100, "200", "-p", `${port}`);
  const { code, stdout, stderr } = await launch(words).ended;
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

runTest("the hint is for the last that failed: files run out", async () => {
  const port = await freePorts(200);
  await using(serveAll(newApps(6), { port }), async () => {
    const words = withFiles(100, "200", "-p", `${port}`);
    const lines = (await launch(words).ended).stderr.trimEnd().split("\n");
    assertEquals(lines[5], `handler 4: port ${port + 4} is already in use`);
    assertEquals(lines[7], "Raise ulimit -n or start fewer");
  });
});

/** The first URL in what a command says first. */
async function firstUrl(stdout: Readable): Promise<string> {
  const [data] = await once(stdout, "data");
  return /http:\S+/.exec(new TextDecoder().decode(data))![0];
}

runTest("a closed stderr does not end it", async () => {
  const words = [...command, "1", "-v", "-p", "0"];
  const { stdout, stderr, closed, kill } = start(words);
  stderr.destroy();
  const url = await firstUrl(stdout);
  stdout.resume();
  for (let k = 0; k < 5; k++) {
    assertEquals(await get(url), "hello from handler 0");
  }
  kill("SIGTERM");
  assertEquals(await closed, 0);
});

runTest("a closed stdout does not end it", async () => {
  const n = 3000; // their ready lines are more than a pipe holds
  const words = [...command, `${n}`, "-p", "0"];
  const { stdout, stderr, closed, kill } = start(words);
  const said = text(stderr);
  const url = await firstUrl(stdout);
  stdout.destroy();
  assertEquals(await get(url), "hello from handler 0");
  kill("SIGTERM");
  assertEquals([await closed, await said], [0, ""]);
});

/** More clients than a server has files for. */
const crowd = (url: string) =>
  Array.from(
    { length: 60 },
    () => connect(portOf(url), "localhost").on("error", () => {}).resume(),
  );

denoTest("out of open files while it serves: says so, exit 1", async () => {
  const words = withFiles(60, "5", "-p", "0");
  const { urls: [url], ended } = await serving(5, words);
  const sockets = crowd(url);
  const { code, stderr } = await ended;
  for (const socket of sockets) socket.destroy();
  assertEquals(code, 1);
  assertEquals(
    stderr,
    "multiserv: Servers stopped: too many open files\n" +
      "Raise ulimit -n or start fewer\n",
  );
});

/** Runs `multiserv` on a terminal, through util-linux `script`. */
function onTerminal(command: string[]) {
  const line = command.map((word) => `'${word}'`).join(" ");
  // exec: a shell that stayed would take Ctrl+C too, and some die of it.
  const words = ["script", "-qec", `exec ${line}`, "/dev/null"];
  const { child, stdout, closed } = start(words, "pipe");
  let shown = "";
  const waiting = new Set<() => void>();
  stdout.on("data", (data: Uint8Array) => {
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
  const end = async () => ({ code: await closed, shown });
  return { until, type, answer, end };
}

linuxTest("on a terminal stderr ends with how to stop: Ctrl+C", async () => {
  const away = ["sh", "-c", 'exec "$@" > /dev/null', "sh"];
  const screen = onTerminal([...away, ...command, "1", "-p", "0"]);
  await screen.until("Press Ctrl+C to stop");
  screen.type("\x03");
  const { code, shown } = await screen.end();
  assertEquals(code, 0);
  assertMatch(shown, /^Press Ctrl\+C to stop\r\n(\^C)?$/);
});

// ---- Under load -------------------------------------------------------------

netTest("300 servers loaded at once: no answer lost or mixed up", async () => {
  await using(serveAll(helloApps(300), { port: 0 }), async ({ urls }) => {
    await Promise.all(urls.map(async (url, i) => {
      for (let k = 0; k < 10; k++) {
        assertEquals(await get(url), `hello from handler ${i}`);
      }
    }));
  });
});

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

netTest("a taken port at the end of 500 leaves nothing behind", async () => {
  const port = await freePorts(500);
  await using(serveAll(newApps(1), { port: port + 499 }), async () => {
    const errors = await failed(serveAll(newApps(500), { port }));
    assertEquals(errors.length, 1);
    await (await serveAll(newApps(499), { port })).shutdown();
  });
});

linuxTest("200 servers, 20 times over, leak no descriptor", async () => {
  const descriptors = async () => {
    const ls = await launch(["ls", `/proc/${process.pid}/fd`]).ended;
    return ls.stdout.split("\n").length;
  };
  const round = () =>
    using(serveAll(helloApps(200), { port: 0 }), async ({ urls }) => {
      await get(urls[199]);
    });
  await round();
  const before = await descriptors();
  for (let k = 0; k < 20; k++) await round();
  const after = await descriptors();
  assert(after <= before + 5, `${before} before, ${after} after`);
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

denoTest("./multiserv.ts runs, with just the permission it needs", async () => {
  const port = await freePorts(1);
  await using(serveAll(newApps(1), { port }), async () => {
    const path = `${dirname(runtime)}:$PATH`;
    const line = `PATH=${path} ./multiserv.ts 1 -p ${port}`;
    assertEquals(
      await launch(["sh", "-c", line]).ended,
      refused(
        "localhost",
        [`handler 0: port ${port} is already in use`],
        "Try another --port",
      ),
    );
    assertEquals(
      await launch(["sh", "-c", `${line} -H 127.0.0.1`]).ended,
      refused(
        "127.0.0.1",
        [`handler 0: port ${port}: no network access`],
        "Allow it: deno run --allow-net",
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

  runTest("a host name that is unknown now may be known later", async () => {
    const { stdout, stderr } = await importing(`
      import dns from "node:dns/promises";
      import { syncBuiltinESMExports } from "node:module";
      const knowing = (lookup) => {
        dns.lookup = lookup;
        syncBuiltinESMExports();
      };
      import { newApps, serveAll } from "./node/multiserv.ts";
      const start = () => serveAll(newApps(1), { hostname: "new", port: 0 });
      knowing(() => Promise.reject(new Error("unknown")));
      await start().catch((error) => console.log(error.errors[0].message));
      knowing(() => Promise.resolve({ address: "127.0.0.1" }));
      await (await start()).shutdown();`);
    const refusal = "handler 0: port 0: unknown host name\n";
    assertEquals([stdout, stderr], [refusal, ""]);
  });

  runTest("a fetch that throws answers 500 and says so", async () => {
    const { code, stdout, stderr } = await importing(`
      import { serveAll } from "./node/multiserv.ts";
      const apps = [
        { fetch() { throw new Error("boom"); } },
        { async fetch() { throw new Error("late"); } },
        { fetch() {} },
      ];
      const servers = await serveAll(apps, { port: 0 });
      for (const url of servers.urls) {
        const response = await fetch(url);
        console.log(response.status, await response.text());
      }
      await servers.shutdown();`);
    assertEquals(code, 0);
    assertEquals(stdout, "500 Internal Server Error\n".repeat(3));
    assertMatch(stderr, /^Error: boom\n[^]*^Error: late\n[^]*^TypeError: /m);
  });

  netTest("requests that Node refuses", async () => {
    await using(serveAll(helloApps(1), { port: 0 }), async ({ urls }) => {
      const long = "x".repeat(17_000);
      for (
        const [request, status] of [
          ["FOO / HTTP/1.1\r\nhost: a", 400],
          ["GET / HTTP/1.1\r\nhost: a b", 400],
          [`GET /${long} HTTP/1.1\r\nhost: a`, 431],
          [`GET / HTTP/1.1\r\nhost: a\r\nx: ${long}`, 431],
        ]
      ) {
        const answer = await raw(
          portOf(urls[0]),
          `${request}\r\nconnection: close\r\n\r\n`,
        );
        assertStringIncludes(answer, `HTTP/1.1 ${status} `);
      }
    });
  });

  runTest("README.md's blocks run as they stand", async () => {
    const readme = await contents("README.md");
    const blocks = [...readme.matchAll(/^```ts\n([^]*?)^```$/gm)];
    assert(blocks.length > 0);
    for (const [, block] of blocks) {
      // Node 22 knows no `await using`.
      const program = Number.parseInt(process.versions.node) < 24
        ? block.replace("await using servers", "const servers") +
          "await servers.shutdown();"
        : block;
      const words = [runtime, "--import", "./node/multiserv.ts"];
      words.push("--input-type=module-typescript", "-e", program);
      const { code, stderr } = await launch(words).ended;
      assertEquals([code, stderr], [0, ""], program);
    }
  });

  runTest("pipelined requests are all answered before it stops", async () => {
    const { urls: [url], kill, ended } = await running(1);
    const socket = await dial(portOf(url));
    const ask = (query: string) =>
      `GET /${query} HTTP/1.1\r\nhost: localhost\r\n\r\n`;
    socket.write(ask("") + ask("?delay=200") + ask("?delay=200"));
    const [data] = await once(socket, "data");
    kill("SIGTERM");
    const all = `${data}${await text(socket)}`;
    assertEquals(all.match(/hello from handler 0/g)?.length, 3);
    assertEquals((await ended).code, 0);
  });

  runTest("out of open files while it serves: hangs up, goes on", async () => {
    const words = withFiles(60, "2", "-p", "0");
    const { urls: [url], ended, kill } = await serving(2, words);
    const sockets = crowd(url);
    await new Promise((close) => {
      for (const socket of sockets) socket.once("close", close);
    });
    for (const socket of sockets) socket.destroy();
    // The server learns of that one connection at a time.
    let answer;
    while (!answer) answer = await get(url).catch(() => undefined);
    assertEquals(answer, "hello from handler 0");
    kill("SIGTERM");
    const { code, stderr } = await ended;
    assertEquals([code, stderr], [0, ""]);
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

/** The first of 10,000 ports that are free, looked for once. */
let base: Promise<number> | undefined;
const basePort = () => base ??= freePorts(10_000);

for (const n of [1, 1000, 10_000]) {
  const rounds = n < 10_000 ? {} : { n: 5, warmup: 1 };
  const bare = (port: number) =>
    Array.from({ length: n }, (_, i) => bareServer(port + i));
  const stop = (servers: ReturnType<typeof bare>) =>
    Promise.all(servers.map((server) => server.shutdown()));

  let group = `start ${n}`;
  let baseline = { group, ...rounds, baseline: true };
  Deno.bench(`${group}, Deno.serve`, baseline, async (b) => {
    const port = await basePort();
    b.start();
    const servers = bare(port);
    b.end();
    await stop(servers);
  });
  Deno.bench(`${group}, multiserv`, { group, ...rounds }, async (b) => {
    const port = await basePort();
    b.start();
    const servers = await serveAll(helloApps(n), { port });
    b.end();
    await servers.shutdown();
  });

  group = `shut down ${n}`;
  baseline = { ...baseline, group };
  Deno.bench(`${group}, Deno.serve`, baseline, async (b) => {
    const servers = bare(await basePort());
    b.start();
    await stop(servers);
    b.end();
  });
  Deno.bench(`${group}, multiserv`, { group, ...rounds }, async (b) => {
    const servers = await serveAll(helloApps(n), { port: await basePort() });
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
    const options = { hostname: "localhost", port: port + i, onListen() {} };
    Deno.serve(options, () => new Response(hello));
  }
  console.log("ready");`;

for (const n of [1, 1000, 10_000]) {
  const group = `memory of ${n}: what is printed counts, not the time`;
  for (
    const [name, ...words] of [
      ["Deno.serve", runtime, "eval", bareProgram],
      ["multiserv", ...command, "-p"],
    ]
  ) {
    const options = { group, n: 1, warmup: 0 };
    Deno.bench(`memory of ${n}, ${name}`, options, async () => {
      const port = `${await basePort()}`;
      const one = await memory([...words, port, "1"]);
      const all = n > 1 ? await memory([...words, port, `${n}`]) : 0;
      const KiB = n > 1 ? (all - one) / (n - 1) : one;
      console.log(`${KiB.toFixed(1)} KiB ${n > 1 ? "each" : "in all"}`);
    });
  }
}
