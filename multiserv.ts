#!/usr/bin/env -S deno run --allow-net=127.0.0.1
/**
 * Starts n HTTP servers in one process, each with its own port and router.
 *
 *     $ deno run multiserv.ts 3
 *     $ curl localhost:1025
 *     hello from handler 1
 *
 * @module
 */
import { lookup } from "node:dns/promises";
import { setTimeout as sleep } from "node:timers/promises";
import { parseArgs } from "jsr:@std/cli@^1/parse-args";
import { STATUS_CODE } from "jsr:@std/http@^1/status";
import type { Context, Handler, Next } from "npm:hono@^4";
import { Hono } from "npm:hono@^4/tiny"; // the preset that takes least memory

// ---- 1. The lesson ----------------------------------------------------------
// The Go program and nothing else: n apps, and for each a handler and a server.
// What checks numbers and words errors stands at the end of the file.

/**
 * Makes n apps, each a router without routes. Go: `newMuxers`.
 *
 * @param n From 1 to 64512, as many as there are ports from 1024 up
 * @throws {RangeError} If n is anything else
 */
export function newApps(n: number): Hono[] {
  checkNumber("n", n, 1, 64512);
  return Array.from({ length: n }, () => new Hono());
}

/** Makes a handler that answers with its number. Go: `type handler int`. */
export function handler(i: number): Handler {
  return (c) => c.text(`hello from handler ${i}`);
}

/**
 * A Hono app, or anything else with a `fetch`. Go: `http.Handler`. The info is
 * what `Deno.serve` tells of a request: who sent it, for example.
 */
export interface App {
  fetch(request: Request, info?: unknown): Response | Promise<Response>;
}

/** Options of {@linkcode serveAll}. */
export interface ServeAllOptions {
  /** Address to listen on. @default {"127.0.0.1"} */
  hostname?: string;
  /** App i gets port + i; with 0, every app a free port. @default {1024} */
  port?: number;
}

/** Is to n servers what `Deno.HttpServer` is to one. */
export interface MultiServer extends AsyncDisposable {
  /** Where the apps listen, in their order, such as `http://127.0.0.1:1024`. */
  readonly urls: string[];
  /**
   * Resolves when all servers have stopped, rejects when one has lost its port.
   * Go: `wg.Wait()`.
   */
  readonly finished: Promise<void>;
  /** Stops accepting connections; resolves when all requests are answered. */
  shutdown(): Promise<void>;
}

/**
 * Serves each app on a port of its own, all of them or none. Go: the loop with
 * a goroutine per `ListenAndServe`. The caller must shut the servers down.
 *
 * @throws {RangeError} If `port` is not 0 or 1024 to 65535, or if there are no
 * apps, or more than ports from there up
 * @throws {AggregateError} If servers cannot start; `errors` say which and why
 *
 * @example
 * ```ts
 * const apps = newApps(3);
 * apps.forEach((app, i) => app.all("*", handler(i))); // Go: mux.Handle
 *
 * await using servers = await serveAll(apps, { port: 0 });
 *
 * for (const url of servers.urls) {
 *   const response = await fetch(url);
 *   console.log(await response.text()); // hello from handler 0, 1 and 2
 * }
 * ```
 */
export async function serveAll(
  apps: readonly App[],
  { hostname = "127.0.0.1", port = 1024 }: ServeAllOptions = {},
): Promise<MultiServer> {
  checkPorts(port, apps.length);
  const servers: Server[] = [];
  const errors: Error[] = []; // of all the ports that cannot be had
  for (const [i, app] of apps.entries()) {
    const itsPort = port === 0 ? 0 : port + i;
    try {
      // It waits until that server listens, not until it ends: all serve at once.
      servers.push(await listenAndServe(hostname, itsPort, app));
    } catch (cause) {
      errors.push(portError(itsPort, cause));
    }
  }

  async function shutdown() {
    await Promise.all(servers.map((server) => server.shutdown()));
  }
  if (errors.length > 0) {
    await shutdown();
    throw new AggregateError(errors, `No server started on ${quote(hostname)}`);
  }
  const finished = Promise.all(servers.map((server) => server.finished));
  return {
    urls: servers.map((server) => server.url),
    finished: finished.then(() => {}),
    shutdown,
    [Symbol.asyncDispose]: shutdown,
  };
}

/** One of them. */
interface Server {
  url: string;
  finished: Promise<void>;
  shutdown(): Promise<void>;
}

/**
 * Starts one server; resolves once it listens. Go: `http.ListenAndServe`, which
 * returns only when the server ends.
 */
async function listenAndServe(hostname: string, port: number, app: App) {
  const listening = Promise.withResolvers<Deno.NetAddr>();
  const options = { hostname, port, onListen: listening.resolve };
  const start = () =>
    Deno.serve(options, (request, info) => app.fetch(request, info));

  let server = start(); // throws on Deno if it cannot listen;
  server.finished.catch(listening.reject); // on Node, this tells a bit later
  const addr = await listening.promise;
  options.port = addr.port; // the free port that it got, if 0 was asked for

  // A Deno server ends when it cannot accept a connection, for example for want
  // of open files. A Go server goes on; here, another one soon takes its port.
  let stopping = false;
  const finished = server.finished.catch(async () => {
    const draining: Promise<void>[] = [];
    while (true) {
      draining.push(server.shutdown()); // it answers what it has accepted
      await sleep(100);
      if (stopping) break;
      try {
        server = start();
        await server.finished;
        break; // it was shut down
      } catch (cause) {
        if (codeOf(cause) === "EADDRINUSE") throw portError(addr.port, cause);
      }
    }
    await Promise.all(draining);
  });

  return {
    url: `http://${inUrl(addr.hostname)}:${addr.port}`,
    finished,
    async shutdown() {
      stopping = true;
      await Promise.allSettled([server.shutdown(), finished]);
    },
  };
}

// ---- 2. Faults on request ---------------------------------------------------
// A slow or failing node, to try clients with.

/**
 * Wraps a handler, so that a request can ask for a late or failing answer:
 *
 * - `?delay=<ms>` waits before it answers, 0 to 60000 milliseconds;
 * - `?status=<code>` answers with that status, 200 to 599;
 * - `?status=<code>:<percent>` does so for that share of answers, at random.
 *
 * Any other value is answered with 400 and a line that says what was expected.
 *
 * @param faults For requests that ask for none, written as their query would
 * be: `"delay=200&status=503:10"`. What a request asks for wins, value by value
 * @throws {RangeError} If the faults make no sense
 */
export function withFaults(handler: Handler, faults = ""): Handler {
  const query = new URLSearchParams(faults);
  for (const name of query.keys()) {
    if (name === "delay" || name === "status") continue;
    throw new RangeError(
      `faults are delay=<ms> and status=<code>[:<percent>], got ${quote(name)}`,
    );
  }
  const byDefault = parseFaults(query.get("delay"), query.get("status"));
  return (c, next) => {
    const isPlain = faults === "" && !c.req.url.includes("?");
    const hasNoBody = c.req.method === "GET" || c.req.raw.bodyUsed;
    return isPlain && hasNoBody
      ? handler(c, next) // the usual case, at no cost
      : answerWithFaults(c, next, handler, byDefault);
  };
}

interface Faults {
  delay?: number;
  status?: number;
  percent?: number;
}

/** @throws {RangeError} If one makes no sense */
function parseFaults(delay?: string | null, status?: string | null): Faults {
  const faults: Faults = {};
  if (typeof delay === "string") {
    faults.delay = parseNumber("delay", delay, 0, 60_000);
  }
  if (typeof status === "string") {
    const [code = ""] = status.split(":", 1);
    const percent = code === status ? "100" : status.slice(code.length + 1);
    faults.status = parseNumber("status", code, 200, 599);
    faults.percent = parseNumber("percent of status", percent, 0, 100);
  }
  return faults;
}

const { NoContent, ResetContent, NotModified } = STATUS_CODE;
const statusesWithoutBody: number[] = [NoContent, ResetContent, NotModified];

async function answerWithFaults(
  c: Context,
  next: Next,
  handler: Handler,
  byDefault: Faults,
): Promise<Response> {
  let asked: Faults;
  try {
    asked = parseFaults(c.req.query("delay"), c.req.query("status"));
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    discardBody(c.req.raw);
    return c.text(error.message, STATUS_CODE.BadRequest);
  }

  const { delay = 0, status, percent = 0 } = { ...byDefault, ...asked };
  if (delay > 0) {
    const { signal } = c.req.raw; // aborts when the client goes away
    await sleep(delay, undefined, { signal }).catch(() => {});
  }
  const answer: Response = await handler(c, next);
  const response = c.finalized ? c.res : answer; // a later handler's, or its own
  discardBody(c.req.raw, response);
  if (status === undefined || Math.random() * 100 >= percent) return response;
  const hasNoBody = statusesWithoutBody.includes(status);
  const { headers } = response;
  // Set, not just returned: it may replace the answer of a later handler.
  c.res = new Response(hasNoBody ? null : response.body, { status, headers });
  return c.res;
}

/** Discards a body that nobody reads, or else Deno closes the connection. */
function discardBody(request: Request, response?: Response) {
  const { body } = request;
  if (body === null || body === response?.body) return; // an echo needs it
  body.cancel().catch(() => {}); // somebody reads it, or the client is gone
}

// ---- 3. The command line ----------------------------------------------------
// Arguments in; messages, signals and an exit code out.

const usage = `Usage: multiserv [options] <n>

Starts n HTTP servers; server i listens on port + i and answers "hello from handler <i>".

  -p, --port <port>      port of handler 0, 1024 to 65535, or 0 for free ports (default 1024)
  -f, --first <i>        number of the first handler (default 0)
  -H, --hostname <host>  address to listen on (default 127.0.0.1)
      --faults <query>   delay or fail requests, e.g. "delay=200&status=503:10"
  -v, --verbose          log every request to stderr
  -h, --help             show this help

A request may ask for itself: /?delay=<ms>&status=<code>[:<percent>]`;

/** Runs the command line; resolves to its exit code. Go: `main`. */
export async function main(args: string[]): Promise<number> {
  const exitCode = await parseAndRun(args);
  await flush();
  return exitCode;
}

async function parseAndRun(args: string[]): Promise<number> {
  let command: Command | "help";
  try {
    command = parse(args);
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    const advice = args.length === 0 ? usage : "Try --help";
    print(Deno.stderr, `multiserv: ${error.message}\n${advice}`);
    return 2;
  }
  if (command === "help") {
    print(Deno.stdout, usage);
    return 0;
  }
  return await run(command);
}

/** A command line that makes sense. */
interface Command {
  n: number;
  /** Port of the first server, whatever its number; 0 for free ports. */
  firstPort: number;
  first: number;
  hostname: string;
  faults: string;
  verbose: boolean;
}

/** What `parseArgs` finds. */
interface Flags {
  _: (string | number)[];
  port: string;
  first: string;
  hostname: string;
  faults?: string;
  verbose: boolean;
  help: boolean;
}

/** @throws {RangeError} If the arguments make no sense */
function parse(args: string[]): Command | "help" {
  const flags: Flags = parseArgs(args, {
    string: ["_", "port", "first", "hostname", "faults"],
    boolean: ["verbose", "help"],
    alias: { p: "port", f: "first", H: "hostname", v: "verbose", h: "help" },
    default: { port: "1024", first: "0", hostname: "127.0.0.1" },
    collect: ["_"], // without this, an argument --_ makes it throw
    unknown(arg: string, option?: string) {
      if (option) throw new RangeError(`unknown option ${quote(arg)}`);
    },
  });
  for (const name of ["port", "first", "hostname", "faults"] as const) {
    if (flags[name] === "") throw new RangeError(`--${name} needs a value`);
  }
  for (const arg of args) { // parseArgs would take --verbose=1 for --verbose
    if (!/^(-[vh].*|--verbose|--help)[=\d]/.test(arg)) continue;
    throw new RangeError(`this option takes no value: ${quote(arg)}`);
  }
  if (flags.help) return "help";

  const { _: words, hostname, faults = "", verbose } = flags;
  if (words.length === 0) throw new RangeError("n is missing");
  if (words.length > 1) {
    throw new RangeError(`one n is enough, got ${quote(words.join(" "))}`);
  }
  const n = parseNumber("n", `${words[0]}`, 1, 64512);
  const port = flags.port === "0"
    ? 0
    : parseNumber("port, unless 0,", flags.port, 1024, 65535);
  const mostFirst = 65535 - Math.max(port, 1024);
  const first = parseNumber("first", flags.first, 0, mostFirst);
  const firstPort = port === 0 ? 0 : port + first;
  checkPorts(firstPort, n);
  withFaults(handler(0), faults); // throws if they make no sense
  return { n, firstPort, first, hostname, faults, verbose };
}

/** Serves until a signal comes; resolves to the exit code. */
async function run(command: Command): Promise<number> {
  const { n, firstPort, first, hostname, faults, verbose } = command;
  askForNetwork(hostname, firstPort, n); // Ctrl+C at this question ends it all
  const interrupted = untilSignal(); // before any await: Ctrl+C may come early

  const apps = newApps(n);
  for (const [k, app] of apps.entries()) {
    if (verbose) app.use(logger(first + k));
    app.all("*", commandHandler(first + k, faults));
  }
  let servers: MultiServer;
  try {
    servers = await serveAll(apps, { hostname, port: firstPort });
  } catch (error) {
    if (!(error instanceof AggregateError)) throw error;
    await report(error, hostname);
    return 1;
  }

  const lines = servers.urls.map((url, k) =>
    `handler ${first + k} listening on ${url}`
  );
  // Neither is awaited: perhaps nobody reads the lines, or sends a signal.
  print(Deno.stdout, lines.join("\n")).then(() => tell("Press Ctrl+C to stop"));
  interrupted.then(() => stop(servers));
  try {
    await servers.finished;
    return 0;
  } catch (error) {
    await servers.shutdown();
    await report(new AggregateError([error], "All servers stopped"), hostname);
    return 1;
  }
}

/** Resolves at the first SIGINT or SIGTERM; a second one ends the process. */
function untilSignal(): Promise<void> {
  const { promise, resolve } = Promise.withResolvers<void>();
  let isFirst = true;
  function listenFor(signal: Deno.Signal, exitCode: number) {
    Deno.addSignalListener(signal, () => {
      if (!isFirst) Deno.exit(exitCode);
      isFirst = false;
      resolve();
    });
  }
  listenFor("SIGINT", 130);
  listenFor("SIGTERM", 143);
  return promise;
}

/** Asks for network access once, for the host; Deno would ask for each port. */
function askForNetwork(hostname: string, firstPort: number, n: number) {
  const host = inUrl(hostname);
  function isAllowed(host: string) {
    const { state } = Deno.permissions.querySync({ name: "net", host });
    return state === "granted";
  }
  try {
    if (isAllowed(host)) return;
    const ports = firstPort === 0
      ? [0]
      : Array.from({ length: n }, (_, k) => firstPort + k);
    if (ports.every((port) => isAllowed(`${host}:${port}`))) return;
    Deno.permissions.requestSync({ name: "net", host });
  } catch {
    // There is no such host: its servers will not start, and say so.
  }
}

/** Shuts the servers down; where that takes long, tells why. */
async function stop(servers: MultiServer) {
  const notice = setTimeout(
    () => tell("Answering requests in flight; Ctrl+C again stops now"),
    500,
  );
  await servers.shutdown();
  clearTimeout(notice);
}

/**
 * `handler(i)` with faults. As it reads no body, that is discarded beforehand:
 * then `withFaults` takes the quick way for a POST, too.
 */
function commandHandler(i: number, faults: string): Handler {
  const answer = withFaults(handler(i), faults);
  return (c, next) => {
    if (c.req.method !== "GET") discardBody(c.req.raw);
    return answer(c, next);
  };
}

/** Logs every request: path and query only, percent-encoded as in any URL. */
function logger(i: number): Handler {
  return async (c, next) => {
    await next();
    if (isBackedUp(Deno.stderr)) return;
    // Leaves out the host: a client may send one that no URL can have.
    const { url } = c.req;
    const path = url.slice(url.indexOf("/", url.indexOf("//") + 2));
    const { pathname, search } = new URL(`http://localhost${path}`);
    const line = `${c.req.method} ${pathname}${search} ${c.res.status}`;
    print(Deno.stderr, `handler ${i}: ${line}`);
  };
}

/** Says what went wrong: up to five errors, and what helps against the last. */
async function report({ message, errors }: AggregateError, hostname: string) {
  const shown: string[] = errors.slice(0, 5).map((error) => error.message);
  if (errors.length > 5) shown.push(`… and ${errors.length - 5} more`);
  // The last, as open files run out after ports that are taken.
  const reason = reasons[codeOf(errors.at(-1).cause)];
  if (reason !== undefined) {
    shown.push(hints[reason]!.replace("<host>", inUrl(hostname)));
  } else if (await isUnknown(hostname)) {
    shown.splice(0, Infinity, "unknown host name", "Try another --hostname");
  }
  print(Deno.stderr, [`multiserv: ${message}`, ...shown].join("\n"));
}

/** Whether nobody knows the host; Deno's own error has no code for that. */
function isUnknown(hostname: string): Promise<boolean> {
  return lookup(hostname).then(
    () => false,
    ({ code }) => ["ENOTFOUND", "EAI_AGAIN", "EINVAL"].includes(code),
  );
}

/** Why a port cannot be had, by the code or the class of the error. */
const reasons: Record<string, string> = {
  EADDRINUSE: "already in use",
  EACCES: "permission denied",
  EADDRNOTAVAIL: "address not on this machine",
  EAFNOSUPPORT: "address not on this machine",
  EINVAL: "address not on this machine",
  EMFILE: "too many open files",
  ENFILE: "too many open files",
  EBUSY: "too many open files", // none was left to look the host up
  NotCapable: "no network access",
};

/** What helps against it. */
const hints: Record<string, string> = {
  "already in use": "Try another --port",
  "permission denied": "Try another --port",
  "address not on this machine": "Try another --hostname",
  "too many open files": "Raise ulimit -n or start fewer",
  "no network access": "Allow it: deno run --allow-net=<host>",
};

/** Tells somebody at a terminal what scripts need not know. */
function tell(line: string) {
  if (Deno.stderr.isTerminal()) print(Deno.stderr, line);
}

type Output = Pick<typeof Deno.stdout, "writable">;

function print(output: Output, line: string): Promise<void> {
  return write(output, `${line}\n`);
}

/** Writes; drops what cannot be written, for a full disk or a closed pipe. */
async function write({ writable }: Output, text: string): Promise<void> {
  const writer = writable.getWriter();
  const written = writer.write(new TextEncoder().encode(text));
  writer.releaseLock();
  await written.catch(() => {});
}

/** Whether over a thousand lines wait to be written, as nobody reads them. */
function isBackedUp({ writable }: Output): boolean {
  const writer = writable.getWriter();
  const { desiredSize } = writer; // 1 less what waits; null after an error
  writer.releaseLock();
  return desiredSize !== null && desiredSize < -1000;
}

/** Waits until all is written, a second at most: perhaps nobody reads it. */
async function flush() {
  const done = new AbortController(); // or else the timer would live on
  const all = [write(Deno.stdout, ""), write(Deno.stderr, "")];
  Promise.all(all).then(() => done.abort());
  await sleep(1000, undefined, { signal: done.signal }).catch(() => {});
}

// What all three chapters use: ports, numbers and words.

/** A server that could not start, or not again, and why. */
function portError(port: number, cause: unknown): Error {
  const code = codeOf(cause);
  const reason = reasons[code] ?? (cause as Error).message;
  const separator = code === "EADDRINUSE" ? " is " : ": ";
  return new Error(`port ${port}${separator}${reason}`, { cause });
}

/** The code of a system's error; of one that has none, its class. */
function codeOf(error: unknown): string {
  const { code, name } = error as { code?: string; name: string };
  return code ?? name;
}

/** @throws {RangeError} Unless so many servers fit on the ports from it up */
function checkPorts(port: number, servers: number) {
  checkNumber("number of servers", servers, 1, 64512);
  if (port === 0) return;
  checkNumber("port, unless 0,", port, 1024, 65535);
  const most = 65536 - port;
  if (servers <= most) return;
  throw new RangeError(
    `only ${most} of "${servers}" servers fit on the ports from ${port} up`,
  );
}

/** @throws {RangeError} Unless it is a whole number from min to max */
function checkNumber(name: string, value: number, min: number, max: number) {
  const isInRange = value >= min && value <= max;
  if (Number.isInteger(value) && isInRange) return;
  throw outOfRange(name, `${value}`, min, max);
}

/** @throws {RangeError} Unless it is such a number, in digits alone */
function parseNumber(name: string, text: string, min: number, max: number) {
  const value = Number(text);
  const isInRange = value >= min && value <= max;
  if (/^\d+$/.test(text) && isInRange) return value;
  throw outOfRange(name, text, min, max);
}

function outOfRange(name: string, got: string, min: number, max: number) {
  const range = `a whole number from ${min} to ${max}`;
  return new RangeError(`${name} must be ${range}, got ${quote(got)}`);
}

/** The text in quotes; of a long one, its first 40 characters. */
function quote(text: string): string {
  const letters = [...text];
  const start = letters.slice(0, 40).join("");
  return JSON.stringify(letters.length > 40 ? `${start}…` : text);
}

/** A host as URLs have it: an IPv6 address stands in brackets. */
function inUrl(hostname: string): string {
  const isBare = hostname.includes(":") && !hostname.startsWith("[");
  return isBare ? `[${hostname}]` : hostname;
}

if (import.meta.main) Deno.exit(await main(Deno.args));
