// What only Node has. All else ../multiserv_test.ts tests, on Node as on Deno.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { subscribe, unsubscribe } from "node:diagnostics_channel";
import dns from "node:dns/promises";
import { once } from "node:events";
import {
  mkdir,
  mkdtemp,
  readFile,
  rm,
  symlink,
  writeFile,
} from "node:fs/promises";
import { Server } from "node:http";
import { syncBuiltinESMExports } from "node:module";
import { type AddressInfo, connect, Socket } from "node:net";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import process from "node:process";
import { text } from "node:stream/consumers";
import { test as nodeTest, type TestContext } from "node:test";
import { fileURLToPath } from "node:url";
import type { Handler } from "npm:hono@^4";
import type * as program from "./multiserv.ts";
import {
  type App,
  handler,
  newApps,
  serveAll,
  withFaults,
} from "./multiserv.ts";
import type * as declared from "./types.d.ts";

// ---- What a test needs ------------------------------------------------------

type Body = (t: TestContext) => Promise<void>;

function test(name: string, fn: Body, timeout = 60_000) {
  nodeTest(name, { timeout }, fn);
}

/** Where README.md stands. */
const root = fileURLToPath(new URL("..", import.meta.url));

/** Serves apps until the test ends. */
async function serving(t: TestContext, ...apps: App[]) {
  const servers = await serveAll(apps, { port: 0 });
  t.after(() => servers.shutdown());
  return { ...servers, url: servers.urls[0]! };
}

/** The app that answers every request. */
const answering = (answer = withFaults(handler(0))) =>
  newApps(1)[0]!.all("*", answer);
const hello = "hello from handler 0";

const get = async (url: string) => (await fetch(url)).text();

/** Opens a raw connection, closes it when the test ends. */
async function dial(t: TestContext, url: string): Promise<Socket> {
  const socket = connect(Number(new URL(url).port), "127.0.0.1");
  t.after(() => socket.destroy());
  socket.on("error", () => {}); // closed by the server, perhaps early
  await once(socket, "connect");
  return socket;
}

/** A request's first lines. */
const head = (line: string, ...headers: string[]) =>
  [`${line} HTTP/1.1`, "host: localhost", ...headers, "\r\n"].join("\r\n");
const post = (bytes: number) => head("POST /", `content-length: ${bytes}`);

/** Resolves when n more hellos have come; rejects if the server hangs up. */
function hellos(socket: Socket, n: number): Promise<void> {
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  let seen = "";
  socket.on("data", (data: Uint8Array) => {
    seen += new TextDecoder().decode(data);
    if (seen.split(hello).length > n) resolve();
  });
  socket.once("close", () => reject(new Error("The server hung up")));
  return promise;
}

/** Runs a program to its end, which comes with the test's at the latest. */
async function launch(t: TestContext, file: string, ...args: string[]) {
  // With this variable, a test in the program would report to this one.
  const env = { ...process.env, NODE_TEST_CONTEXT: undefined };
  const child = spawn(file, args, { cwd: root, env });
  t.after(() => child.kill("SIGKILL"));
  const [stdout, stderr, [code]] = await Promise.all([
    text(child.stdout),
    text(child.stderr),
    once(child, "close"),
  ]);
  return { code, stdout, stderr };
}

/** Makes a folder with these files, which goes with the test. */
async function project(t: TestContext, files: Record<string, string>) {
  const folder = await mkdtemp(join(tmpdir(), "multiserv-"));
  t.after(() => rm(folder, { recursive: true }));
  for (const [path, content] of Object.entries(files)) {
    const file = join(folder, path);
    await mkdir(dirname(file), { recursive: true });
    await writeFile(file, content);
  }
  return folder;
}

/** Runs a Node program as if it stood beside README.md. */
const running = (t: TestContext, program: string, ...options: string[]) =>
  launch(t, process.execPath, ...options, "--eval", program);
const asModule = "--input-type=module";

// ---- As a module ------------------------------------------------------------

test("a Node program can import the adapter", async (t) => {
  const program = `
    import * as multiserv from "./node/multiserv.ts";
    console.log(Object.keys(multiserv).join());
    const apps = multiserv.newApps(1);
    apps[0].all("*", multiserv.handler(5));
    const servers = await multiserv.serveAll(apps, { port: 0 });
    console.log(await (await fetch(servers.urls[0])).text());
    await servers.shutdown();`;
  const stdout = "handler,newApps,serveAll,withFaults\nhello from handler 5\n";
  const expected = { code: 0, stdout, stderr: "" };
  assert.deepEqual(await running(t, program, asModule), expected);
});

test("a program that imports the adapter keeps its own packages", async (t) => {
  const program = `
    await import("${import.meta.resolve("./multiserv.ts")}");
    console.log((await import("@hono/node-server")).default);`;
  const folder = await project(t, {
    "main.mjs": program,
    "node_modules/@hono/node-server/index.js": `module.exports = "its own";`,
  });
  const main = join(folder, "main.mjs");
  const { stdout, stderr } = await launch(t, process.execPath, main);
  assert.deepEqual([stdout, stderr], ["its own\n", ""]);
});

test("the test of README.md passes where the folder is installed", async (t) => {
  const readme = await readFile(join(root, "README.md"), "utf8");
  const [, program = ""] =
    /```ts ignore\n(import .*"multiserv-node"[^]*?)```/.exec(readme) ?? [];
  const folder = await project(t, {
    "package.json": `{ "type": "module" }`,
    "servers.test.ts": program,
  });
  // npm links a folder that it installs.
  await mkdir(join(folder, "node_modules"));
  await symlink(
    join(root, "node"),
    join(folder, "node_modules/multiserv-node"),
  );
  const options = ["--test-reporter=tap", join(folder, "servers.test.ts")];
  const { code, stdout } = await launch(t, process.execPath, ...options);
  assert.equal(code, 0, stdout);
  assert.match(stdout, /^# pass 1$/m);
});

test("too old a Node is told so in one line", async (t) => {
  const program = `
    Object.defineProperty(process.versions, "node", { value: "22.17.1" });
    await import("./node/multiserv.ts");`;
  const stderr = "multiserv: needs Node 22.18 or newer, this is 22.17.1\n";
  const expected = { code: 1, stdout: "", stderr };
  assert.deepEqual(await running(t, program, asModule), expected);
});

test("Node gets the same versions of the packages as Deno", async () => {
  const read = async (path: string) =>
    JSON.parse(await readFile(join(root, path), "utf8"));
  const { dependencies } = await read("node/package.json");
  const { npm } = await read("deno.lock");
  const pinned = Object.entries(dependencies).map((pin) => pin.join("@"));
  // What comes after _ are the peers it was resolved with.
  const locked = Object.keys(npm).map((key) => key.split("_")[0]);
  assert.deepEqual(pinned.sort(), locked.sort());
});

/** `true` where two types are the same, or else `false`. */
type Same<A, B> = (<T>() => T extends A ? 1 : 2) extends
  (<T>() => T extends B ? 1 : 2) ? true : false;
type Members<T> = { -readonly [Name in keyof T]: T[Name] };

// Does not compile where types.d.ts says something else than the program.
true satisfies Same<Members<typeof declared>, Members<typeof program>>;
true satisfies Same<declared.App, program.App>;
true satisfies Same<declared.MultiServer, program.MultiServer>;
true satisfies Same<declared.ServeAllOptions, program.ServeAllOptions>;

// ---- Host names -------------------------------------------------------------

/** Has the system look names up in this way until the test ends. */
function lookingUp(t: TestContext, lookup: () => Promise<unknown>) {
  const mocked = t.mock.method(dns, "lookup", lookup);
  syncBuiltinESMExports();
  t.after(() => {
    mocked.mock.restore();
    syncBuiltinESMExports();
  });
  return mocked.mock;
}

/** Starts a server that cannot start, resolves to why. */
async function failure(hostname: string): Promise<Error & { cause: Error }> {
  const starting = serveAll(newApps(1), { hostname, port: 0 });
  const { errors } = await starting.catch((error) => error);
  return errors[0];
}

test("a host name that is unknown now may be known later", async (t) => {
  const cause = Object.assign(new Error("no such host"), { code: "ENOTFOUND" });
  const lookup = lookingUp(t, () => Promise.reject(cause));
  const error = await failure("new");
  const message = "failed to lookup address information: no such host";
  assert.equal(error.message, `port 0: ${message}`);
  assert.equal(error.cause.message, message);
  assert.equal(error.cause.cause, cause);
  assert.ok(!("code" in error.cause)); // as on Deno

  lookup.mockImplementation(() => Promise.resolve({ address: "127.0.0.1" }));
  await (await serveAll(newApps(1), { hostname: "new", port: 0 })).shutdown();
});

test("a look-up for which there is no file left says so", async (t) => {
  let cause: Error;
  lookingUp(t, () => Promise.reject(cause));
  for (const code of ["EMFILE", "ENFILE", "EBUSY"]) {
    cause = Object.assign(new Error(code), { code });
    const error = await failure("busy");
    assert.equal(error.message, "port 0: too many open files");
    assert.equal(error.cause, cause);
  }
});

test("looks a host name up once for all servers", async (t) => {
  const found = { address: "127.0.0.1" };
  const lookup = lookingUp(t, () => Promise.resolve(found));
  const servers = await serveAll(newApps(5), { hostname: "many", port: 0 });
  await servers.shutdown();
  assert.equal(lookup.callCount(), 1);
});

// ---- Requests ---------------------------------------------------------------

test("a fetch that throws answers 500 and says so", async (t) => {
  const { mock } = t.mock.method(console, "error", () => {});
  const { urls } = await serving(
    t,
    { fetch: () => assert.fail("now") },
    { fetch: () => Promise.reject(new Error("late")) },
  );
  for (const url of urls) {
    const response = await fetch(url);
    assert.equal(response.status, 500);
    assert.equal(await response.text(), "Internal Server Error");
  }
  const said = mock.calls.map(({ arguments: [error] }) => error.message);
  assert.deepEqual(said, ["now", "late"]);
});

test("requests that Node refuses", async (t) => {
  const { url } = await serving(t, answering());
  const long = "x".repeat(17_000);
  for (
    const [request, status] of [
      ["FOO / HTTP/1.1\r\nhost: a", 400],
      ["OPTIONS * HTTP/1.1\r\nhost: a", 400],
      ["GET / HTTP/1.1\r\nhost: a b", 400],
      ["GET /?é HTTP/1.1\r\nhost: a", 400],
      [`GET /${long} HTTP/1.1\r\nhost: a`, 431],
      [`GET / HTTP/1.1\r\nhost: a\r\nx: ${long}`, 431],
    ]
  ) {
    const socket = await dial(t, url);
    socket.write(`${request}\r\nconnection: close\r\n\r\n`);
    const answer = await text(socket);
    assert.ok(answer.startsWith(`HTTP/1.1 ${status} `), answer);
  }
});

test("an app learns where a request comes from, and its end", async (t) => {
  const asked = Promise.withResolvers<Deno.ServeHandlerInfo<Deno.NetAddr>>();
  const { url } = await serving(t, {
    fetch(_request, info: Deno.ServeHandlerInfo<Deno.NetAddr>) {
      asked.resolve(info);
      return new Response(hello);
    },
  });
  const socket = await dial(t, url);
  const { localPort: port } = socket;
  socket.write(head("GET /"));
  const { remoteAddr, completed } = await asked.promise;
  const expected = { transport: "tcp", hostname: "127.0.0.1", port };
  assert.deepEqual(remoteAddr, expected);
  await completed;
});

// ---- Uploads ----------------------------------------------------------------

/** Handlers that read no body: one does nothing, two let go of it. */
const notReading: Handler[] = [
  handler(0),
  withFaults(handler(0)),
  async (c) => {
    await c.req.raw.body?.cancel();
    return c.text(hello);
  },
];

test("a connection outlives uploads that nobody reads", async (t) => {
  for (const answer of notReading) {
    const { url } = await serving(t, answering(answer));
    const socket = await dial(t, url);
    for (let i = 0; i < 3; i++) {
      socket.write(post(3_000_000) + "x".repeat(3_000_000));
      await hellos(socket, 1);
    }
  }
});

test("an upload goes on after its answer, however long and large", async (t) => {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  for (const answer of notReading) {
    const { url } = await serving(t, answering(answer));
    const socket = await dial(t, url);
    socket.write(post(70_000_000));
    await hellos(socket, 1);
    for (let i = 0; i < 3; i++) t.mock.timers.tick(100_000);
    const part = new Uint8Array(1_000_000);
    for (let i = 0; i < 70; i++) {
      if (!socket.write(part)) await once(socket, "drain");
    }
    socket.write(head("GET /"));
    await hellos(socket, 1);
  }
});

test("an upload that never ends holds up no shutdown", async (t) => {
  const { url, shutdown } = await serving(t, answering());
  const socket = await dial(t, url);
  socket.write(post(1000) + "some of it");
  await hellos(socket, 1);
  await shutdown();
}, 4000); // Node itself would close the connection after 5 s.

test("what a handler reads is all there", async (t) => {
  const [app] = newApps(1);
  assert.ok(app);
  app.post("/text", async (c) => c.text(await c.req.text()));
  app.post("/echo", (c) => new Response(c.req.raw.body));
  const { url } = await serving(t, app);
  const body = "x".repeat(3_000_000);
  for (const path of ["text", "echo"]) {
    const response = await fetch(`${url}/${path}`, { method: "POST", body });
    assert.ok(await response.text() === body, path);
  }
});

// ---- Connections ------------------------------------------------------------

test("forgets a connection that has closed", async (t) => {
  const sockets: Socket[] = [];
  const onSocket = (message: unknown) => {
    sockets.push((message as { socket: Socket }).socket);
  };
  subscribe("net.server.socket", onSocket);
  t.after(() => unsubscribe("net.server.socket", onSocket));
  const { url, shutdown } = await serving(t, answering());
  const client = await dial(t, url);
  client.write(head("GET /"));
  await hellos(client, 1);
  client.destroy();
  const [socket] = sockets;
  assert.ok(socket);
  if (!socket.closed) await once(socket, "close");

  const { mock } = t.mock.method(Socket.prototype, "destroySoon");
  await shutdown();
  assert.equal(mock.callCount(), 0);
});

test("pipelined requests are all answered before it stops", async (t) => {
  const { url, shutdown } = await serving(t, answering());
  const socket = await dial(t, url);
  const slow = head("GET /?delay=100");
  const [first, all] = [hellos(socket, 1), hellos(socket, 3)];
  socket.write(head("GET /") + slow + slow);
  await first;
  await Promise.all([all, shutdown()]);
}, 4000); // Node itself would close the connection after 5 s, too.

test("a client that cannot be accepted ends no server", async (t) => {
  const { mock } = t.mock.method(Server.prototype, "listen");
  const listening = Promise.withResolvers<Deno.NetAddr>();
  const server = Deno.serve(
    { hostname: "127.0.0.1", port: 0, onListen: listening.resolve },
    () => new Response(hello),
  );
  t.after(() => server.shutdown());
  const { port } = await listening.promise;
  const [call] = mock.calls;
  assert.ok(call?.this instanceof Server);
  assert.equal((call.this.address() as AddressInfo).port, port);
  call.this.emit("error", new Error("accept ECONNABORTED"));
  assert.equal(await get(`http://127.0.0.1:${port}`), hello);
  await server.shutdown();
  await server.finished;
});

// ---- Output -----------------------------------------------------------------

test("a write ends when it is done or has failed", async (t) => {
  const program = `
    import "./node/multiserv.ts";
    process.stderr.on("error", () => {});
    const write = ({ writable }) =>
      writable.getWriter().write(new TextEncoder().encode("some text\\n"));
    await write(Deno.stdout);
    await write(Deno.stderr).catch(({ code }) => console.log(code));`;
  const script = `exec "$1" ${asModule} --eval "$0" 2>/dev/full`;
  const words = ["-c", script, program, process.execPath];
  const expected = { code: 0, stdout: "some text\nENOSPC\n", stderr: "" };
  assert.deepEqual(await launch(t, "sh", ...words), expected);
});
