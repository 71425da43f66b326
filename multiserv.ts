#!/usr/bin/env -S deno run --allow-net=127.0.0.1
/**
 * Starts n HTTP servers in one process, each with a port and a router of its own.
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
import { Hono } from "npm:hono@^4/tiny"; // the router that takes least memory

// ---- 1. The lesson ----------------------------------------------------------
// The Go program and nothing else: n apps, a handler for each, a server for each.

/**
 * Makes n apps, each a router that has no routes yet. Go: `newMuxers`.
 *
 * @param n From 1 to 64512: there are no more ports from 1024 up
 * @throws {RangeError} If n is not such a number
 */
export function newApps(n: number): Hono[] {
  checkWholeNumber("n", n, 1, 64512);
  return Array.from({ length: n }, () => new Hono());
}

/** Makes a handler that answers with its number. Go: `type handler int`. */
export function handler(i: number): Handler {
  return (c) => c.text(`hello from handler ${i}`);
}

/** A Hono app, or whatever else has such a `fetch`. Go: `http.Handler`. */
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

/** To n servers what `Deno.HttpServer` is to one. */
export interface MultiServer extends AsyncDisposable {
  /** Where the apps listen, in their order, such as `http://127.0.0.1:1024`. */
  readonly urls: string[];
  /** Resolves when all servers have stopped. Go: `wg.Wait()`. */
  readonly finished: Promise<void>;
  /** Takes no new connections, answers requests in flight, then resolves. */
  shutdown(): Promise<void>;
}

/**
 * Serves each app on a port of its own, all of them or none. Go: the loop with
 * a goroutine per `ListenAndServe`. The caller must shut the servers down.
 *
 * @throws {RangeError} If the port is none, or there are more apps than ports
 * @throws {AggregateError} If servers cannot start; `errors` say which and why
 *
 * @example
 * ```ts
 * const apps = newApps(3);
 * apps.forEach((app, i) => app.all("*", handler(i)));
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
  const errors: Error[] = [];
  for (const [i, app] of apps.entries()) {
    const itsPort = port === 0 ? 0 : port + i;
    try {
      servers.push(await listenAndServe(hostname, itsPort, app));
    } catch (cause) {
      errors.push(portError(itsPort, cause));
    }
  }

  async function shutdown() {
    await Promise.all(servers.map((server) => server.shutdown()));
  }
  async function finished() {
    await Promise.all(servers.map((server) => server.finished));
  }
  if (errors.length > 0) {
    await shutdown();
    throw new AggregateError(errors, `No server started on ${quote(hostname)}`);
  }
  return {
    urls: servers.map((server) => server.url),
    finished: finished(),
    shutdown,
    [Symbol.asyncDispose]: shutdown,
  };
}

interface Server {
  url: string;
  finished: Promise<void>;
  shutdown(): Promise<void>;
}

/** Starts one server, resolves once it listens. Go: `http.ListenAndServe`. */
async function listenAndServe(
  hostname: string,
  port: number,
  app: App,
): Promise<Server> {
  const listening = Promise.withResolvers<Deno.NetAddr>();
  const options = { hostname, port, onListen: listening.resolve };
  const serve = () =>
    Deno.serve(options, (request, info) => app.fetch(request, info));

  let server = serve(); // If it cannot start, Deno throws here;
  server.finished.catch(listening.reject); // Node says so a moment later.
  const addr = await listening.promise;
  options.port = addr.port; // which one, if it was 0

  // A Deno server ends when it fails to accept a connection, for want of open
  // files for example. A Go server listens on, and so does ours, a moment later.
  let stopping = false;
  const finished = server.finished.catch(async () => {
    let answered: unknown;
    while (!stopping) {
      answered = Promise.all([answered, server.shutdown()]);
      await sleep(100);
      if (stopping) break;
      try {
        server = serve();
        await server.finished;
      } catch (cause) {
        if (codeOf(cause) === "EADDRINUSE") throw portError(addr.port, cause);
      }
    }
    await answered;
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
 * Makes the same handler, but late or failing where a request asks for it:
 *
 * - `?delay=<ms>` waits before it answers, 0 to 60000 milliseconds;
 * - `?status=<code>` answers with that status, 200 to 599;
 * - `?status=<code>:<percent>` does so for that share of answers, at random.
 *
 * A value that is none of this is answered with 400 and what was expected.
 *
 * @param faults For requests that do not ask themselves, value by value, and
 * written as they would: `"delay=200&status=503:10"`
 * @throws {RangeError} If the faults make no sense
 */
export function withFaults(handler: Handler, faults = ""): Handler {
  const named = Object.fromEntries(new URLSearchParams(faults));
  for (const name of Object.keys(named)) {
    if (["delay", "status"].includes(name)) continue;
    throw new RangeError(
      `faults are delay=<ms> and status=<code>[:<percent>], got ${quote(name)}`,
    );
  }
  const byDefault = parseFaults(named);
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

function parseFaults({ delay, status }: Record<string, string>): Faults {
  const faults: Faults = {};
  if (delay !== undefined) {
    faults.delay = parseWholeNumber("delay", delay, 0, 60_000);
  }
  if (status !== undefined) {
    const [code = "", ...rest] = status.split(":");
    const percent = rest.length === 0 ? "100" : rest.join(":");
    faults.status = parseWholeNumber("status", code, 200, 599);
    faults.percent = parseWholeNumber("percent of status", percent, 0, 100);
  }
  return faults;
}

async function answerWithFaults(
  c: Context,
  next: Next,
  handler: Handler,
  byDefault: Faults,
): Promise<Response> {
  let faults: Faults;
  try {
    faults = { ...byDefault, ...parseFaults(c.req.query()) };
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    letGo(c.req.raw);
    return c.text(error.message, STATUS_CODE.BadRequest);
  }
  const { delay = 0, status, percent = 0 } = faults;
  if (delay > 0) {
    const { signal } = c.req.raw; // aborts when the client goes away
    await sleep(delay, undefined, { signal }).catch(() => {});
  }
  const response: Response = await handler(c, next);
  letGo(c.req.raw, response);
  if (status === undefined || Math.random() * 100 >= percent) return response;
  const body = withoutBody.includes(status) ? null : response.body;
  return new Response(body, { status, headers: response.headers });
}

const { NoContent, ResetContent, NotModified } = STATUS_CODE;
const withoutBody: number[] = [NoContent, ResetContent, NotModified];

/** Lets go of a body that nobody reads: Deno would close the connection. */
function letGo(request: Request, response?: Response) {
  if (request.bodyUsed) return;
  const { body } = request;
  if (body === null || body === response?.body) return; // it is sent back
  body.cancel().catch(() => {}); // the client may be gone by now
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

/** Runs the command line, resolves to its exit code. Go: `main`. */
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
  if (command !== "help") return await run(command);
  print(Deno.stdout, usage);
  return 0;
}

/** What to run. */
interface Command {
  n: number;
  /** Of the first server, whatever its number; 0 for free ports. */
  port: number;
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
    collect: ["_"], // or else --_ crashes it
    unknown(arg: string, option?: string) {
      if (option) throw new RangeError(`unknown option ${quote(arg)}`);
    },
  });
  for (const name of ["port", "first", "hostname", "faults"] as const) {
    if (flags[name] === "") throw new RangeError(`--${name} needs a value`);
  }
  for (const arg of args) {
    if (!/^(-v|-h|--verbose|--help)[=\d]/.test(arg)) continue;
    throw new RangeError(`this option takes no value: ${quote(arg)}`);
  }
  if (flags.help) return "help";

  const { _: words, hostname, faults = "", verbose } = flags;
  if (words.length === 0) throw new RangeError("n is missing");
  if (words.length > 1) {
    throw new RangeError(`one n is enough, got ${quote(words.join(" "))}`);
  }
  const n = parseWholeNumber("n", `${words[0]}`, 1, 64512);
  const port = flags.port === "0"
    ? 0
    : parseWholeNumber("port, unless 0,", flags.port, 1024, 65535);
  const most = 65535 - Math.max(port, 1024);
  const first = parseWholeNumber("first", flags.first, 0, most);
  const firstPort = port === 0 ? 0 : port + first;
  checkPorts(firstPort, n);
  withFaults(handler(0), faults); // throws if they make no sense
  return { n, port: firstPort, first, hostname, faults, verbose };
}

/** Serves until a signal comes, resolves to the exit code. */
async function run(command: Command): Promise<number> {
  const { n, port, first, hostname, faults, verbose } = command;
  const interrupted = untilSignal(); // listens before anything is awaited
  await askForNetwork(hostname, port, n);

  const apps = newApps(n);
  for (const [k, app] of apps.entries()) {
    if (verbose) app.use(logger(first + k));
    app.all("*", commandHandler(first + k, faults));
  }
  let servers: MultiServer;
  try {
    servers = await serveAll(apps, { hostname, port });
  } catch (error) {
    if (!(error instanceof AggregateError)) throw error;
    await report(error, hostname);
    return 1;
  }

  const lines = servers.urls.map((url, k) =>
    `handler ${first + k} listening on ${url}`
  );
  const ready = print(Deno.stdout, lines.join("\n"));
  ready.then(() => tell("Press Ctrl+C to stop"));
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

/** Resolves at the first SIGINT or SIGTERM; the second ends the process. */
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

/** Has Deno ask once, for the host, where it would ask for every port. */
async function askForNetwork(hostname: string, port: number, n: number) {
  const host = inUrl(hostname);
  function isAllowed(host: string) {
    return Deno.permissions.querySync({ name: "net", host }).state ===
      "granted";
  }
  try {
    if (isAllowed(host)) return;
    const ports = Array.from(
      { length: n },
      (_, k) => port === 0 ? 0 : port + k,
    );
    if (ports.every((port) => isAllowed(`${host}:${port}`))) return;
    await Deno.permissions.request({ name: "net", host });
  } catch {
    // There is no such host: its servers will not start, and say so.
  }
}

/** Shuts the servers down; where that takes long, says why. */
async function stop(servers: MultiServer) {
  const notice = setTimeout(
    () => tell("Answering requests in flight; Ctrl+C again stops now"),
    500,
  );
  await servers.shutdown();
  clearTimeout(notice);
}

/** `handler(i)` with faults; lets go of a body at once, as nothing reads it. */
function commandHandler(i: number, faults: string): Handler {
  const answer = withFaults(handler(i), faults);
  return (c, next) => {
    if (c.req.method !== "GET") letGo(c.req.raw);
    return answer(c, next);
  };
}

/** Logs every request: path and query only, percent-encoded as in any URL. */
function logger(i: number): Handler {
  return async (c, next) => {
    await next();
    // The host comes from the client, and may be what no URL can have.
    const path = c.req.url.slice(c.req.url.indexOf("/", "http://".length));
    const { pathname, search } = new URL(`http://localhost${path}`);
    const line = `${c.req.method} ${pathname}${search} ${c.res.status}`;
    print(Deno.stderr, `handler ${i}: ${line}`);
  };
}

/** Says what went wrong: up to five errors, and what helps against the last. */
async function report(error: AggregateError, hostname: string) {
  const { message, errors } = error;
  const { cause } = errors.at(-1);
  let lines: string[] = errors.slice(0, 5).map((error) => error.message);
  if (errors.length > 5) lines.push(`… and ${errors.length - 5} more`);
  let reason = reasons[codeOf(cause)];
  if (reason === undefined && await isUnknown(hostname)) {
    reason = "unknown host name";
    lines = [reason];
  }
  const hint = reason && hints[reason];
  if (hint !== undefined) lines.push(hint.replace("<host>", inUrl(hostname)));
  print(Deno.stderr, [`multiserv: ${message}`, ...lines].join("\n"));
}

/** Whether nobody knows the host; Deno's own error has no code for that. */
function isUnknown(hostname: string): Promise<boolean> {
  return lookup(hostname).then(
    () => false,
    ({ code }) => code === "ENOTFOUND" || code === "EAI_AGAIN",
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

/** What helps. */
const hints: Record<string, string> = {
  "already in use": "Try another --port",
  "permission denied": "Try another --port",
  "address not on this machine": "Try another --hostname",
  "unknown host name": "Try another --hostname",
  "too many open files": "Raise ulimit -n or start fewer",
  "no network access": "Allow it: deno run --allow-net=<host>",
};

/** A server that could not start, or not again, and why. */
function portError(port: number, cause: unknown): Error {
  const reason = reasons[codeOf(cause)] ?? (cause as Error).message;
  const is = codeOf(cause) === "EADDRINUSE" ? " is" : ":";
  return new Error(`port ${port}${is} ${reason}`, { cause });
}

/** The code of a system's error; of one that has none, the class. */
function codeOf(error: unknown): string {
  const { code, name } = error as { code?: string; name: string };
  return code ?? name;
}

/** @throws {RangeError} Unless so many servers fit on the ports from there up */
function checkPorts(port: number, servers: number) {
  checkWholeNumber("number of servers", servers, 1, 64512);
  if (port === 0) return;
  checkWholeNumber("port, unless 0,", port, 1024, 65535);
  const most = 65536 - port;
  if (servers <= most) return;
  throw new RangeError(
    `only ${most} of "${servers}" servers fit on the ports from ${port} up`,
  );
}

/** @throws {RangeError} Unless the text is a whole number from min to max */
function parseWholeNumber(
  name: string,
  text: string,
  min: number,
  max: number,
): number {
  const value = /^\d+$/.test(text) ? Number(text) : NaN;
  checkWholeNumber(name, value, min, max, text);
  return value;
}

/** @throws {RangeError} Unless the value is a whole number from min to max */
function checkWholeNumber(
  name: string,
  value: number,
  min: number,
  max: number,
  text: string = `${value}`,
) {
  if (Number.isInteger(value) && value >= min && value <= max) return;
  throw new RangeError(
    `${name} must be a whole number from ${min} to ${max}, got ${quote(text)}`,
  );
}

/** The text in quotes; of a long one, its first 40 characters. */
function quote(text: string): string {
  return JSON.stringify(text.length > 40 ? `${text.slice(0, 40)}…` : text);
}

/** A host as URLs have it: an IPv6 address stands in brackets. */
function inUrl(hostname: string): string {
  const isBare = hostname.includes(":") && !hostname.startsWith("[");
  return isBare ? `[${hostname}]` : hostname;
}

/** Tells somebody at a terminal what scripts need not know. */
function tell(line: string) {
  if (Deno.stderr.isTerminal()) print(Deno.stderr, line);
}

type Output = Pick<typeof Deno.stdout, "writable">;

function print(output: Output, line: string): Promise<void> {
  return write(output, `${line}\n`);
}

/**
 * Writes without holding anybody up: what cannot be written, for a full disk or
 * a closed pipe, is dropped, and so is what piles up because nobody reads it.
 */
async function write(output: Output, text: string): Promise<void> {
  const writer = output.writable.getWriter();
  const pilesUp = writer.desiredSize !== null && writer.desiredSize < -1000;
  const bytes = new TextEncoder().encode(text);
  const written = pilesUp ? undefined : writer.write(bytes);
  writer.releaseLock();
  await written?.catch(() => {});
}

/** Waits until all is written, but not long: perhaps nobody reads it. */
async function flush() {
  const done = new AbortController();
  const all = [write(Deno.stdout, ""), write(Deno.stderr, "")];
  Promise.all(all).then(() => done.abort());
  await sleep(1000, undefined, { signal: done.signal }).catch(() => {});
}

if (import.meta.main) Deno.exit(await main(Deno.args));
