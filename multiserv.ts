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
import { setTimeout as sleep } from "node:timers/promises";
import { parseArgs } from "jsr:@std/cli@^1/parse-args";
import { STATUS_CODE } from "jsr:@std/http@^1/status";
import { type Handler, Hono } from "npm:hono@^4";

// ---- 1. The lesson ----------------------------------------------------------
// The Go program and nothing else: n apps, and for each a handler and a server.

/** Makes n Hono apps, each a router without routes. Go: `newMuxers`. */
export function newApps(n: number): Hono[] {
  return Array.from({ length: n }, () => new Hono());
}

/** Makes a handler that answers with its number. Go: `type handler int`. */
export function handler(i: number): Handler {
  return (c) => c.text(`hello from handler ${i}`);
}

/** A Hono app, or anything else with its `fetch`. Go: `http.Handler`. */
export type App = Pick<Hono, "fetch">;

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
  /** Resolves when all servers have been shut down. Go: `wg.Wait()`. */
  readonly finished: Promise<void>;
  /** Stops accepting connections; resolves when all requests are answered. */
  shutdown(): Promise<void>;
}

/**
 * Serves each app on a port of its own, all of them or none. Go: the loop with
 * a goroutine per `ListenAndServe`. The caller must shut the servers down.
 *
 * @throws {AggregateError} If servers cannot start. Its `errors` are all the
 * ports that are taken or, alone, the first failure of another kind
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
  const servers: Server[] = [];
  let errors: Error[] = [];
  for (const [i, app] of apps.entries()) {
    const itsPort = port === 0 ? 0 : port + i;
    try {
      // It waits until that server listens, not until it ends: all serve at once.
      servers.push(await listenAndServe(hostname, itsPort, app));
    } catch (cause) {
      const failure = explain(cause);
      const error = new Error(`port ${itsPort} ${failure.reason}`, { cause });
      if (failure === failures.EADDRINUSE) {
        errors.push(error); // other ports may be taken, too
      } else {
        errors = [error]; // no other port would do better
        break;
      }
    }
  }

  async function shutdown() {
    await Promise.all(servers.map((server) => server.shutdown()));
  }
  if (errors.length > 0) {
    await shutdown();
    throw new AggregateError(errors, `No server started on "${hostname}"`);
  }
  const finished = Promise.all(servers.map((server) => server.finished));
  return {
    urls: servers.map((server) => server.url),
    finished: finished.then(() => {}),
    shutdown,
    [Symbol.asyncDispose]: shutdown,
  };
}

// ---- 2. One server ----------------------------------------------------------
// It is Go's in two things that Deno.serve is not: it goes on after a failed
// accept, and keeps a connection whose request had a body that nobody read.

type Server = Awaited<ReturnType<typeof listenAndServe>>;

/**
 * Starts one server; resolves once it listens. Go: `http.ListenAndServe`, which
 * returns only when the server ends.
 */
async function listenAndServe(hostname: string, port: number, app: App) {
  const options = { hostname, port, onListen() {} };
  const start = () =>
    Deno.serve(options, (request, info) => answer(app, request, info));

  const first = await start();
  const { addr } = first;
  options.port = addr.port; // the free one that it got, if 0 was asked for
  const servers = [first]; // all that were ever started for this port
  let stopping = false;

  // A Deno server ends when it cannot accept a connection, for example for want
  // of open files. What it has accepted it still answers; another takes its port.
  async function goOn() {
    while (!stopping) {
      await sleep(100);
      if (stopping) return;
      try {
        const server = await start();
        servers.push(server);
        await server.finished;
      } catch {
        // It could not listen, or not accept: once more.
      }
    }
  }
  async function drain() {
    stopping = true;
    await Promise.all(servers.map((server) => server.shutdown()));
  }
  const finished = first.finished.then(goOn, goOn).then(drain);

  return {
    url: `http://${inUrl(addr.hostname)}:${addr.port}`,
    finished,
    shutdown: () => drain().then(() => finished),
  };
}

/** Deno closes a connection when a body was not read. Node reads on, as Go. */
const mustDiscard = navigator.userAgent.startsWith("Deno");

/** The app's answer, after which nothing of the body is left. */
function answer(app: App, request: Request, info: object) {
  const response = app.fetch(request, info);
  if (request.method === "GET" || !mustDiscard) return response;
  return response instanceof Promise
    ? response.then((response) => discardBody(request, response))
    : discardBody(request, response); // at once, as awaiting costs time
}

function discardBody({ body }: Request, response: Response) {
  // An echo still needs it. Where somebody reads it, cancel rejects.
  if (body !== response.body) body?.cancel().catch(() => {});
  return response;
}

/** A host as URLs have it: an IPv6 address stands in brackets. */
function inUrl(hostname: string) {
  return hostname.includes(":") ? `[${hostname}]` : hostname;
}

interface Failure {
  reason: string;
  hint?: string;
}

/** What people meet when servers start, by the code of the error or its name. */
const failures: Record<string, Failure> = {
  EADDRINUSE: { reason: "is already in use", hint: "Try another --port" },
  EADDRNOTAVAIL: {
    reason: "cannot be opened: the address is not on this machine",
    hint: "Try another --hostname",
  },
  EMFILE: {
    reason: "cannot be opened: too many open files",
    hint: "Raise ulimit -n or start fewer",
  },
  NotCapable: {
    reason: "cannot be opened: no network access",
    hint: "Allow it: deno run --allow-net",
  },
};

function explain(error: unknown): Failure {
  const { code, name, message } = error as Error & { code?: string };
  return failures[code ?? name] ?? { reason: `cannot be opened: ${message}` };
}

// ---- 3. Faults --------------------------------------------------------------
// A slow or failing node, to try clients with.

/** What can be wrong with an answer. */
export interface Faults {
  /** Milliseconds before it comes, 0 to 60000. @default {0} */
  delay?: number;
  /** Its status, 200 to 599. Without one, it is the handler's. */
  status?: number;
  /** Share of the answers with that status, 0 to 100. @default {100} */
  percent?: number;
}

/**
 * Wraps a handler, so that its answers are late or failing where the request's
 * query asks for it, or else as `faults` say. Go: middleware, which is a
 * `func(http.Handler) http.Handler`.
 *
 * - `?delay=<ms>` waits, unless the client goes away;
 * - `?status=<code>` answers with that status, and a body where it allows one;
 * - `?status=<code>:<percent>` does so for that share of the answers, at random.
 *
 * Any other value of these two is answered with 400 and what was expected.
 *
 * @param handler One that returns a `Response`
 * @param faults Whole numbers. What a request asks for wins, value by value
 * @throws {RangeError} If one of the faults is out of its range
 */
export function withFaults(handler: Handler, faults: Faults = {}): Handler {
  const { delay = 0, status, percent = 100 } = faults;
  const usual = parseFaults({
    delay: `${delay}`,
    status: status === undefined ? status : `${status}:${percent}`,
  });
  const isPlain = delay === 0 && status === undefined;

  const faulty: Handler = async (c, next) => {
    let faults: Faults;
    try {
      faults = { ...usual, ...parseFaults(c.req.query()) };
    } catch (error) {
      return c.text((error as RangeError).message, STATUS_CODE.BadRequest);
    }
    const { delay = 0, status, percent = 100 } = faults;
    if (delay > 0) {
      const { signal } = c.req.raw; // aborts when the client goes away
      await sleep(delay, undefined, { signal }).catch(() => {});
    }
    const response: Response = await handler(c, next);
    const isDue = Math.random() * 100 < percent;
    return status && isDue ? withStatus(status, response) : response;
  };
  return (c, next) =>
    isPlain && !c.req.url.includes("?")
      ? handler(c, next) // the usual case, at no cost
      : faulty(c, next);
}

/**
 * Reads faults as a query and the command line have them.
 *
 * @throws {RangeError} If one is out of its range
 */
function parseFaults(
  { delay, status }: { delay?: string; status?: string },
): Faults {
  const faults: Faults = {};
  if (delay !== undefined) {
    faults.delay = parseNumber("delay", delay, 0, 60_000);
  }
  if (status !== undefined) {
    const [code = "", ...rest] = status.split(":");
    const percent = rest.length === 0 ? "100" : rest.join(":");
    faults.status = parseNumber("status", code, 200, 599);
    faults.percent = parseNumber("percent of status", percent, 0, 100);
  }
  return faults;
}

const { NoContent, ResetContent, NotModified } = STATUS_CODE;
const statusesWithoutBody: number[] = [NoContent, ResetContent, NotModified];

function withStatus(status: number, response: Response): Response {
  if (response.status === STATUS_CODE.SwitchingProtocols) return response;
  const body = statusesWithoutBody.includes(status) ? null : response.body;
  const headers = new Headers(response.headers);
  if (body === null) { // nor what would describe it
    headers.delete("content-length");
    headers.delete("content-type");
    headers.delete("content-encoding");
  }
  return new Response(body, { status, headers });
}

// ---- 4. The command line ----------------------------------------------------
// Arguments in; messages, signals and an exit code out.

const usage = `Usage: multiserv [options] <n>

Starts n HTTP servers; server i listens on port + i and
answers "hello from handler <i>".

  -p, --port <port>      port of handler 0, or 0 for free ports (default 1024)
  -f, --first <i>        number of the first handler (default 0)
  -H, --hostname <host>  address to listen on (default 127.0.0.1)
      --delay <ms>       answer late
      --status <code>    answer with this status; 503:10 for one answer in ten
  -v, --verbose          log every request to stderr
  -h, --help             show this help

A request may ask for itself: /?delay=<ms>&status=<code>[:<percent>]`;

/** Runs the command line; resolves to the exit code. Go: `main`. */
export async function main(args: string[]): Promise<number> {
  let options: ReturnType<typeof parse>;
  try {
    options = parse(args);
  } catch (error) {
    const { message } = error as Error;
    print(console.error, `multiserv: ${message}\nTry --help`);
    return 2;
  }
  if (options === "help") {
    print(console.log, usage);
    return 0;
  }

  const { n, first, hostname, port, faults, verbose } = options;
  await askForNetwork(hostname);
  const apps = newApps(n);
  for (const [k, app] of apps.entries()) {
    const i = first + k;
    if (verbose) app.use(logger(i));
    app.all("*", withFaults(handler(i), faults));
  }
  let servers: MultiServer;
  try {
    servers = await serveAll(apps, { hostname, port });
  } catch (error) {
    report(error as AggregateError);
    return 1;
  }

  const stopped = untilSignal(servers); // may come with the first ready line
  for (const [k, url] of servers.urls.entries()) {
    print(console.log, `handler ${first + k} listening on ${url}`);
  }
  print(console.error, "Press Ctrl+C to stop");
  await stopped;
  return 0;
}

/** @throws {RangeError} If the arguments make no sense */
function parse(args: string[]) {
  const flags = parseArgs(args, {
    string: ["_", "port", "first", "hostname", "delay", "status"],
    boolean: ["verbose", "help"],
    alias: { p: "port", f: "first", H: "hostname", v: "verbose", h: "help" },
    default: { port: "1024", first: "0", hostname: "127.0.0.1" },
    unknown(arg: string, option?: string) {
      if (option) throw new RangeError(`unknown option "${arg}"`);
    },
  });
  if (flags.help) return "help";

  const { _: words, hostname, verbose } = flags;
  if (hostname === "") throw new RangeError("--hostname needs a value");
  const port = flags.port === "0"
    ? 0
    : parseNumber("port, unless 0,", flags.port, 1024, 65535);
  const lowest = port === 0 ? 1024 : port;
  const first = parseNumber("first", flags.first, 0, 65535 - lowest);
  if (words.length === 0) throw new RangeError("n is missing");
  if (words.length > 1) {
    throw new RangeError(`one n is enough, got "${words.join(" ")}"`);
  }
  const n = parseNumber("n", `${words[0]}`, 1, 65536 - lowest - first);
  const firstPort = port === 0 ? 0 : port + first;
  const faults = parseFaults(flags);
  return { n, first, hostname, port: firstPort, faults, verbose };
}

/** @throws {RangeError} Unless it is such a number, in digits alone */
function parseNumber(name: string, text: string, min: number, max: number) {
  const value = Number(text);
  if (/^\d+$/.test(text) && value >= min && value <= max) return value;
  const range = `a whole number from ${min} to ${max}`;
  throw new RangeError(`${name} must be ${range}, got "${text}"`);
}

/** Asks for network access once, for the host; Deno would ask for each port. */
async function askForNetwork(hostname: string) {
  try {
    const host = inUrl(hostname);
    await Deno.permissions.request({ name: "net", host });
  } catch {
    // No such host can be: its server will not start, and say so.
  }
}

/** Logs every request: path and query only, percent-encoded. */
function logger(i: number): Handler {
  return async (c, next) => {
    const start = performance.now();
    await next();
    const ms = Math.round(performance.now() - start);
    const url = URL.parse(c.req.url); // null if it names an impossible host
    const path = url === null ? "?" : url.pathname + url.search;
    const line = `${c.req.method} ${path} ${c.res.status} ${ms}ms`;
    print(console.error, `handler ${i}: ${line}`);
  };
}

/** Says what went wrong: up to five errors, and what helps. */
function report({ message, errors }: AggregateError) {
  const lines = [`multiserv: ${message}`];
  for (const error of errors.slice(0, 5)) lines.push(error.message);
  if (errors.length > 5) lines.push(`… and ${errors.length - 5} more`);
  const { hint } = explain(errors[0].cause);
  if (hint !== undefined) lines.push(hint);
  print(console.error, lines.join("\n"));
}

/**
 * Resolves when a signal has come and all requests are answered. Some wrappers
 * send a signal twice at once; only a later one ends the process.
 */
async function untilSignal(servers: MultiServer) {
  const signals = ["SIGINT", "SIGTERM"] as const;
  let timer: ReturnType<typeof setTimeout> | undefined;
  function stop() {
    servers.shutdown();
    timer ??= setTimeout(() => {
      ignoreSignals(); // so the next one does what it does by default
      const line = "Answering requests in flight; Ctrl+C again stops now";
      print(console.error, line);
    }, 500);
  }
  function ignoreSignals() {
    for (const signal of signals) Deno.removeSignalListener(signal, stop);
  }
  for (const signal of signals) Deno.addSignalListener(signal, stop);
  await servers.finished;
  clearTimeout(timer);
  ignoreSignals();
}

/** Prints a line; on a full disk, it is lost. */
function print(write: (line: string) => void, line: string) {
  try {
    write(line);
  } catch {
    // Neither an answer nor the program shall fail for it.
  }
}

if (import.meta.main) Deno.exit(await main(Deno.args));
