// What only Node can get wrong. All else ../multiserv_test.ts tests.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import * as fs from "node:fs/promises";
import { Server } from "node:http";
import { connect, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import process from "node:process";
import { text } from "node:stream/consumers";
import { test as nodeTest, type TestContext } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import type { HttpBindings } from "@hono/node-server";
import type { Handler, Hono } from "npm:hono@^4";
import { bodyLimit } from "npm:hono@^4/body-limit";
import * as program from "./multiserv.ts";
import type * as declared from "./types.d.ts";

const { handler, newApps, serveAll, withFaults } = program;

type Test = (t: TestContext) => Promise<void>;

/** A test that fails if it hangs: Node itself ends connections after 5 s. */
function test(name: string, fn: Test, skip = false) {
  nodeTest(name, { timeout: 4500, skip }, fn);
}

/** A test that makes links, which not everybody may on Windows. */
const linkTest = (name: string, fn: Test) =>
  test(`${name} (needs links)`, fn, !links);
const probe = await fs.mkdtemp(join(tmpdir(), "multiserv-"));
const links = await Promise.all([
  fs.symlink(probe, join(probe, "folder"), "junction"),
  fs.symlink("multiserv.ts", join(probe, "file")),
]).then(() => true, () => false);
await fs.rm(probe, { recursive: true });

// ---- The loader -------------------------------------------------------------

/** Where README.md stands. */
const root = fileURLToPath(new URL("..", import.meta.url));

/** Makes a folder with these files, which goes with the test. */
async function project(t: TestContext, files: Record<string, string>) {
  const folder = await fs.mkdtemp(join(tmpdir(), "multiserv-"));
  t.after(() => fs.rm(folder, { recursive: true }));
  for (const [path, content] of Object.entries(files)) {
    const file = join(folder, path);
    await fs.mkdir(dirname(file), { recursive: true });
    await fs.writeFile(file, content);
  }
  return folder;
}

/** Runs Node to its end, which comes with the test's at the latest. */
async function launch(t: TestContext, ...args: string[]) {
  // With these, a test in the program would report to this one, in colours.
  const unset = { NODE_TEST_CONTEXT: undefined, FORCE_COLOR: undefined };
  const env = { ...process.env, ...unset };
  const child = spawn(process.execPath, args, { env });
  t.after(() => child.kill("SIGKILL"));
  const [stdout, stderr, [code]] = await Promise.all([
    text(child.stdout),
    text(child.stderr),
    once(child, "close"),
  ]);
  return { code, stdout, stderr };
}

test("a program that imports the adapter stays as it was", async (t) => {
  const program = `
    import { registerHooks } from "node:module";
    registerHooks({
      resolve: (specifier, context, next) =>
        next(specifier.replace("npm:", "@hono/"), context),
    });
    const { Request, Response } = globalThis;
    const adapter = "${import.meta.resolve("./multiserv.ts")}";
    const { handler, newApps, serveAll } = await import(adapter);
    const [app] = newApps(1);
    app.all("*", handler(5));
    const servers = await serveAll([app], { port: 0 });
    const response = await fetch(servers.urls[0]);
    console.log(await response.text(), response instanceof Response);
    await servers.shutdown();
    console.log(Request === globalThis.Request, Response === globalThis.Response);
    console.log(typeof Deno, (await import("npm:node-server")).default);`;
  const folder = await project(t, {
    "main.mjs": program,
    "node_modules/@hono/node-server/index.js": `module.exports = "its own";`,
  });
  assert.deepEqual(await launch(t, join(folder, "main.mjs")), {
    code: 0,
    stdout: "hello from handler 5 true\ntrue true\nundefined its own\n",
    stderr: "",
  });
});

linkTest("README.md's test passes where the folder is installed", async (t) => {
  const readme = await fs.readFile(join(root, "node/README.md"), "utf8");
  const blocks = readme.split("```").filter((_, k) => k % 2 === 1);
  const example = blocks.find((block) => block.includes('from "node:test"'));
  assert.ok(example);
  const folder = await project(t, {
    "package.json": `{ "type": "module" }`,
    "servers.test.ts": example.slice(example.indexOf("\n")),
  });
  // npm links a folder that it installs.
  const modules = join(folder, "node_modules");
  await fs.mkdir(modules);
  const link = join(modules, "multiserv-node");
  await fs.symlink(join(root, "node"), link, "junction");
  const options = ["--test-reporter=tap", join(folder, "servers.test.ts")];
  const { code, stdout } = await launch(t, ...options);
  assert.equal(code, 0, stdout);
  assert.match(stdout, /^# pass 1$/m);
});

linkTest("runs below a CommonJS package.json, and by a link", async (t) => {
  const paths = ["deno.ts", "hook.ts", "multiserv.ts", "package.json"]
    .map((path) => `node/${path}`).concat("deno.json", "multiserv.ts");
  const contents = paths.map(async (path) =>
    [path, await fs.readFile(join(root, path), "utf8")] as const
  );
  const folder = await project(t, {
    "package.json": `{ "type": "commonjs" }`,
    ...Object.fromEntries(await Promise.all(contents)),
  });
  const modules = "node/node_modules";
  await fs.symlink(join(root, modules), join(folder, modules), "junction");
  const run = () => launch(t, join(folder, "node/multiserv.ts"));
  const expected = "multiserv: n is missing\nTry --help\n";
  assert.equal((await run()).stderr, expected);

  // Nor does it matter where the program is, if a link leads there.
  await fs.mkdir(join(folder, "elsewhere"));
  const moved = join(folder, "elsewhere/multiserv.ts");
  await fs.rename(join(folder, "multiserv.ts"), moved);
  await fs.symlink(moved, join(folder, "multiserv.ts"));
  assert.equal((await run()).stderr, expected);
});

test("Node gets the same versions of the packages as Deno", async () => {
  const read = async (path: string) =>
    JSON.parse(await fs.readFile(join(root, path), "utf8"));
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

// Nor where these are no apps.
({}) as Hono<{ Bindings: HttpBindings }> satisfies declared.App;
({
  fetch: (_: Request, env: HttpBindings) => new Response(env.incoming.url),
}) satisfies declared.App;

// ---- Requests ---------------------------------------------------------------

const appOf = (answer: Handler) => newApps(1)[0]!.all("*", answer);
const helloApp = appOf(withFaults(handler(0)));

/** Serves an app on one server until the test ends. */
async function serving(t: TestContext, app: program.App = helloApp) {
  const { urls, shutdown } = await serveAll([app], { port: 0 });
  t.after(shutdown);
  return { url: urls[0]!, shutdown };
}

/** Opens a connection, which ends with the test, and sends bytes over it. */
async function dial(t: TestContext, url: string, bytes = ""): Promise<Socket> {
  const socket = connect(Number(new URL(url).port), "127.0.0.1");
  t.after(() => socket.destroy());
  socket.on("error", () => {}); // closed by the server, perhaps early
  await once(socket, "connect");
  socket.write(bytes);
  return socket;
}

test("a handler that throws answers 500 and says so", async (t) => {
  const { mock } = t.mock.method(console, "error", () => {});
  const { url } = await serving(t, { fetch: () => assert.fail("oh") });
  const response = await fetch(url);
  assert.equal(response.status, 500);
  assert.equal(await response.text(), "Internal Server Error");
  assert.equal(mock.calls[0]?.arguments[0].message, "oh");
});

test("impossible requests are refused, without a word", async (t) => {
  const { mock } = t.mock.method(console, "error", () => {});
  const { url } = await serving(t);
  const long = "x".repeat(17_000);
  const statuses: [request: string, status: number][] = [
    ["GET / HTTP/1.0", 200],
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
  for (const [request, status] of statuses) {
    const bytes = `${request}\r\nconnection: close\r\n\r\n`;
    const answer = await text(await dial(t, url, bytes));
    assert.ok(answer.startsWith(`HTTP/1.1 ${status} `), request + answer);
  }
  assert.equal(mock.callCount(), 0);
});

test("an app gets Node's own request and response", async (t) => {
  const app = appOf((c) => c.json(Object.keys(c.env as object)));
  const { url } = await serving(t, app);
  const keys = await (await fetch(url)).json();
  assert.deepEqual(keys, ["incoming", "outgoing"]);
});

// ---- Uploads ----------------------------------------------------------------

/** A request's first lines. */
const head = (line: string, ...headers: string[]) =>
  [`${line} HTTP/1.1`, "host: localhost", ...headers, "\r\n"].join("\r\n");

test("an upload that is refused half way soon ends", async (t) => {
  const { url } = await serving(t, appOf(bodyLimit({ maxSize: 1000 })));
  const start = head("POST /", "transfer-encoding: chunked");
  const chunk = `${(1_000_000).toString(16)}\r\n${"x".repeat(1_000_000)}\r\n`;
  const all = `${start}${chunk.repeat(20)}0\r\n\r\n`;
  const socket = await dial(t, url, all);
  const [answer] = await once(socket, "data");
  assert.match(`${answer}`, /^HTTP\/1.1 413 /);
  await new Promise((closed) => socket.resume().once("close", closed));
});

test("an upload that goes on at the end costs no answer", async (t) => {
  const { url, shutdown } = await serving(t);
  const start = head("POST /", "content-length: 9") + "x";
  const socket = await dial(t, url, start);
  await once(socket, "readable"); // the answer is there, and not read yet
  const ended = shutdown();
  for (let k = 0; k < 8; k++) { // a client that is slow to send
    await sleep(10);
    socket.write("x");
  }
  assert.match(await text(socket), /hello from handler 0$/);
  await ended;
});

test("no upload holds up the end, nor does its client's leaving", async (t) => {
  const arrived = Promise.withResolvers<void>();
  const slow = withFaults(handler(0), { delay: 60_000 });
  const app = newApps(1)[0]!.on(["GET", "POST"], "/", handler(0)).put(
    "/",
    (c, next) => {
      arrived.resolve();
      return slow(c, next);
    },
  );
  const { url, shutdown } = await serving(t, app);
  for (const method of ["GET", "POST"]) {
    const start = head(`${method} /`, "content-length: 9") + "x";
    const unread = await dial(t, url, start);
    await once(unread, "data"); // the answer
  }
  const leaving = await dial(t, url, head("PUT /", "content-length: 9") + "x");
  await arrived.promise;
  leaving.destroy();
  await shutdown();
});

// ---- Connections ------------------------------------------------------------

/** Serves on a server that can be seen. */
async function servingInSight(t: TestContext) {
  const { mock } = t.mock.method(Server.prototype, "listen");
  const servers = await serving(t);
  return { ...servers, server: mock.calls[0]?.this as unknown as Server };
}

test("a client that cannot be accepted ends no server", async (t) => {
  const { url, server } = await servingInSight(t);
  server.emit("error", new Error("accept ECONNABORTED"));
  assert.equal(await (await fetch(url)).text(), "hello from handler 0");
});

test("forgets a connection that has closed", async (t) => {
  const { url, shutdown, server } = await servingInSight(t);
  const accepted = once(server, "connection");
  const client = await dial(t, url);
  const [socket] = await accepted;
  client.destroy();
  if (!socket.closed) await once(socket, "close");
  const { mock } = t.mock.method(socket as Socket, "destroySoon");
  await shutdown();
  assert.equal(mock.callCount(), 0);
});

test("a request that has just been sent is answered", async (t) => {
  const { url, shutdown } = await serving(t);
  const socket = await dial(t, url);
  socket.write(head("GET /"));
  const [answer] = await Promise.all([text(socket), shutdown()]);
  assert.match(answer, /hello from handler 0$/);
});

test("no host name does not mean all addresses", async () => {
  const starting = serveAll([helloApp], { port: 0, hostname: "" });
  await assert.rejects(starting, { message: 'No server started on ""' });
});

test("a client that goes on asking does not hold up the end", async (t) => {
  const { url, shutdown } = await serving(t);
  const request = head("GET /?delay=100");
  const socket = await dial(t, url, request);
  const asking = setInterval(() => socket.write(request), 20);
  t.after(() => clearInterval(asking));
  await once(socket, "data");
  await shutdown();
});
