// What only Node can get wrong. All else ../multiserv_test.ts tests.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { subscribe, unsubscribe } from "node:diagnostics_channel";
import { once } from "node:events";
import {
  mkdir,
  mkdtemp,
  readFile,
  rm,
  symlink,
  writeFile,
} from "node:fs/promises";
import { type IncomingMessage, Server } from "node:http";
import { connect, Socket } from "node:net";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import process from "node:process";
import { text } from "node:stream/consumers";
import { test as nodeTest, type TestContext } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import type { Handler } from "npm:hono@^4";
import { bodyLimit } from "npm:hono@^4/body-limit";
import type * as program from "./multiserv.ts";
import { handler, newApps, serveAll, withFaults } from "./multiserv.ts";
import type * as declared from "./types.d.ts";

/** A test that fails if it hangs: Node itself ends connections after 5 s. */
function test(name: string, fn: (t: TestContext) => Promise<void>) {
  nodeTest(name, { timeout: 4500 }, fn);
}

/** Where README.md stands. */
const root = fileURLToPath(new URL("..", import.meta.url));

/** Runs a program to its end, which comes with the test's at the latest. */
async function launch(t: TestContext, ...args: string[]) {
  // With these, a test in the program would report to this one, in colours.
  const unset = { NODE_TEST_CONTEXT: undefined, FORCE_COLOR: undefined };
  const env = { ...process.env, ...unset };
  const child = spawn(process.execPath, args, { cwd: root, env });
  t.after(() => child.kill("SIGKILL"));
  const [stdout, stderr, [code]] = await Promise.all([
    text(child.stdout),
    text(child.stderr),
    once(child, "close"),
  ]);
  return { code, stdout, stderr };
}

/** Runs a module as if it stood beside README.md. */
const evaluate = (t: TestContext, program: string) =>
  launch(t, "--input-type=module", "--eval", program);

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

// ---- The loader -------------------------------------------------------------

test("importing the adapter changes nothing for its host", async (t) => {
  const program = `
    const { Request, Response } = globalThis;
    const module = await import("./node/multiserv.ts");
    console.log(Object.keys(module).join());
    const apps = module.newApps(1);
    apps[0].all("*", module.handler(5));
    const servers = await module.serveAll(apps, { port: 0 });
    const response = await fetch(servers.urls[0]);
    console.log(await response.text());
    console.log(response instanceof globalThis.Response);
    console.log(Request === globalThis.Request, Response === globalThis.Response);
    console.log(typeof Deno);
    await servers.shutdown();`;
  const lines = [
    "handler,newApps,serveAll,withFaults",
    "hello from handler 5",
    "true",
    "true true",
    "undefined\n",
  ];
  const expected = { code: 0, stdout: lines.join("\n"), stderr: "" };
  assert.deepEqual(await evaluate(t, program), expected);
});

test("a program that imports the adapter keeps its own packages", async (t) => {
  const program = `
    await import("${import.meta.resolve("./multiserv.ts")}");
    console.log((await import("@hono/node-server")).default);`;
  const folder = await project(t, {
    "main.mjs": program,
    "node_modules/@hono/node-server/index.js": `module.exports = "its own";`,
  });
  const { stdout, stderr } = await launch(t, join(folder, "main.mjs"));
  assert.deepEqual([stdout, stderr], ["its own\n", ""]);
});

test("the test of README.md passes where the folder is installed", async (t) => {
  const readme = await readFile(join(root, "node/README.md"), "utf8");
  const blocks = readme.split("```").filter((_, k) => k % 2 === 1);
  const example = blocks.find((block) => block.includes('from "node:test"'));
  assert.ok(example);
  const folder = await project(t, {
    "package.json": `{ "type": "module" }`,
    "servers.test.ts": example.slice(example.indexOf("\n")),
  });
  // npm links a folder that it installs.
  await mkdir(join(folder, "node_modules"));
  const link = join(folder, "node_modules/multiserv-node");
  await symlink(join(root, "node"), link);
  const options = ["--test-reporter=tap", join(folder, "servers.test.ts")];
  const { code, stdout } = await launch(t, ...options);
  assert.equal(code, 0, stdout);
  assert.match(stdout, /^# pass 1$/m);
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
true satisfies Same<declared.Faults, program.Faults>;
true satisfies Same<declared.MultiServer, program.MultiServer>;
true satisfies Same<declared.ServeAllOptions, program.ServeAllOptions>;

// ---- Requests ---------------------------------------------------------------

/** Serves a handler on one server until the test ends. */
async function serving(t: TestContext, answer: Handler = handler(0)) {
  const [app] = newApps(1);
  assert.ok(app);
  const servers = await serveAll([app.all("*", answer)], { port: 0 });
  t.after(() => servers.shutdown());
  return { shutdown: servers.shutdown, url: servers.urls[0]! };
}

/** Opens a connection, which ends with the test. */
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

test("a handler that throws answers 500 and says so", async (t) => {
  const { mock } = t.mock.method(console, "error", () => {});
  const servers = await serveAll([{ fetch: () => assert.fail("oh") }], {
    port: 0,
  });
  t.after(() => servers.shutdown());
  const response = await fetch(servers.urls[0]!);
  assert.equal(response.status, 500);
  assert.equal(await response.text(), "Internal Server Error");
  assert.equal(mock.calls[0]?.arguments[0].message, "oh");
});

test("impossible requests are refused, without a word", async (t) => {
  const { mock } = t.mock.method(console, "error", () => {});
  const { url } = await serving(t, withFaults(handler(0)));
  const long = "x".repeat(17_000);
  const refused: [request: string, status: number][] = [
    ["GET / HTTP/1.1", 400], // needs a Host
    ["FOO / HTTP/1.1\r\nhost: a", 400],
    ["OPTIONS * HTTP/1.1\r\nhost: a", 400],
    ["GET / HTTP/1.1\r\nhost: a b", 400],
    ["GET /?é HTTP/1.1\r\nhost: a", 400],
    ["GET /?status=503 HTTP/1.1\r\nhost: a.1", 400],
    ["POST / HTTP/1.1\r\nhost: 256.1.1.1", 400],
    ["GET http://u:p@h/?delay=1 HTTP/1.1\r\nhost: a", 400],
    ["POST http://u@h/ HTTP/1.1\r\nhost: a", 400],
    [`GET /${long} HTTP/1.1\r\nhost: a`, 431],
  ];
  for (const [request, status] of refused) {
    const socket = await dial(t, url);
    socket.write(`${request}\r\nconnection: close\r\n\r\n`);
    const answer = await text(socket);
    assert.ok(answer.startsWith(`HTTP/1.1 ${status} `), request + answer);
  }
  assert.equal(mock.callCount(), 0);
});

test("an app learns where a request comes from", async (t) => {
  const { url } = await serving(t, (c) => {
    const { incoming } = c.env as { incoming: IncomingMessage };
    return c.text(`${incoming.socket.remotePort}`);
  });
  const socket = await dial(t, url);
  socket.write(head("GET /", "connection: close"));
  const port = `${socket.localPort}`;
  assert.ok((await text(socket)).endsWith(`\r\n\r\n${port}`));
});

// ---- Uploads ----------------------------------------------------------------

/** Ways to read a body; each resolves to its length. */
const readers: Record<string, (request: Request) => Promise<number>> = {
  text: async (request) => (await request.text()).length,
  json: async (request) => (await request.json()).length + 2, // its quotes
  arrayBuffer: async (request) => (await request.arrayBuffer()).byteLength,
  clone: async (request) => (await request.clone().text()).length,
  async forAwait(request) {
    let length = 0;
    for await (const chunk of request.body!) length += chunk.length;
    return length;
  },
};

test("a body that is still read after the answer is whole", async (t) => {
  for (const [name, read] of Object.entries(readers)) {
    const length = Promise.withResolvers<number>();
    const { url } = await serving(t, (c) => {
      read(c.req.raw).then(length.resolve, length.reject);
      return c.text("accepted");
    });
    const socket = await dial(t, url);
    const body = JSON.stringify("x".repeat(998));
    socket.write(post(1000) + body.slice(0, 100));
    await once(socket, "data"); // the answer
    await sleep(300);
    socket.write(body.slice(100));
    assert.equal(await length.promise, 1000, name);
  }
});

test("an upload that is refused half way soon ends", async (t) => {
  const [app] = newApps(1);
  assert.ok(app);
  app.use(bodyLimit({ maxSize: 1000 }));
  app.post("/", async (c) => c.text(await c.req.text()));
  const servers = await serveAll([app], { port: 0 });
  t.after(() => servers.shutdown());
  const socket = await dial(t, servers.urls[0]!);
  const chunked = "transfer-encoding: chunked";
  const part = `${(1_000_000).toString(16)}\r\n${"x".repeat(1_000_000)}\r\n`;
  socket.write(head("POST /", chunked) + part.repeat(20) + "0\r\n\r\n");
  const [answer] = await once(socket, "data");
  assert.match(`${answer}`, /^HTTP\/1.1 413 /);
  await new Promise((closed) => socket.resume().once("close", closed));
});

test("no upload holds up the end, neither its client's leaving", async (t) => {
  const arrived = Promise.withResolvers<void>();
  const slow = withFaults(handler(0), { delay: 60_000 });
  const { url, shutdown } = await serving(t, (c, next) => {
    if (c.req.method === "GET") return c.text("hello");
    arrived.resolve();
    return slow(c, next);
  });
  const leaving = await dial(t, url);
  leaving.write(post(1000) + "some of it");
  await arrived.promise;
  leaving.destroy();
  await shutdown();

  const unread = await serving(t);
  const endless = await dial(t, unread.url);
  endless.write(post(1000) + "some of it");
  await once(endless, "data");
  await unread.shutdown();
});

// ---- Connections ------------------------------------------------------------

test("forgets a connection that has closed", async (t) => {
  const accepted = Promise.withResolvers<Socket>();
  const onSocket = (message: unknown) =>
    accepted.resolve((message as { socket: Socket }).socket);
  subscribe("net.server.socket", onSocket);
  t.after(() => unsubscribe("net.server.socket", onSocket));
  const { url, shutdown } = await serving(t);
  const client = await dial(t, url);
  const socket = await accepted.promise;
  client.destroy();
  if (!socket.closed) await once(socket, "close");
  const { mock } = t.mock.method(Socket.prototype, "destroySoon");
  await shutdown();
  assert.equal(mock.callCount(), 0);
});

test("pipelined requests are all answered before it stops", async (t) => {
  const { url, shutdown } = await serving(t, withFaults(handler(0)));
  const socket = await dial(t, url);
  const slow = head("GET /?delay=100");
  socket.write(head("GET /") + slow + slow);
  const [first] = await once(socket, "data");
  const [rest] = await Promise.all([text(socket), shutdown()]);
  assert.equal(`${first}${rest}`.split("hello").length, 4);
});

test("a client that cannot be accepted ends no server", async (t) => {
  const { mock } = t.mock.method(Server.prototype, "listen");
  const { url } = await serving(t);
  const server = mock.calls[0]?.this;
  assert.ok(server instanceof Server);
  server.emit("error", new Error("accept ECONNABORTED"));
  assert.equal(await (await fetch(url)).text(), "hello from handler 0");
});
