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
// The parts of the Go program, in its order: n apps, and a handler and a server
// for each. What was its main is in chapter 4.

/** Makes n Hono apps, each a router without routes. Go: `newMuxers`. */
export function newApps(n: number): Hono[] {
  return Array.from({ length: n }, () => new Hono());
}

/** Makes a handler that answers with its number. Go: `type handler int`. */
export function handler(i: number): Handler {
  return (c) => c.text(`hello from handler ${i}`);
}

/** A Hono app, or what else a server may ask. Go: `http.Handler`, as a mux is. */
export interface App {
  /** Answers a request; `info` is what the runtime knows of it. */
  fetch(request: Request, info: object): Response | Promise<Response>;
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
  /** Resolves when all servers have been shut down. Go: `wg.Wait()`. */
  readonly finished: Promise<void>;
  /** Accepts no more; resolves when all is answered. Go: `Server.Shutdown`. */
  shutdown(): Promise<void>;
}

/**
 * Serves each app on a port of its own, all of them or none. Go: the loop with
 * a goroutine per `ListenAndServe`, which keeps those that could start. The
 * caller must shut the servers down.
 *
 * @throws {AggregateError} If servers cannot start. Its `errors` name all the
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
      // Waits until this one listens, not until it ends: all serve at once.
      servers.push(await listenAndServe(hostname, itsPort, app));
    } catch (cause) {
      const { code, reason } = explain(cause);
      const error = new Error(`port ${itsPort} ${reason}`, { cause });
      if (code === "EADDRINUSE") {
        errors.push(error); // other ports may be taken, too
      } else {
        errors = [error]; // another port would not do better
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
// Like Go's and unlike Deno.serve, it goes on after a failed accept. All else is
// between the handler and its runtime.

interface Server {
  url: string;
  finished: Promise<void>;
  shutdown(): Promise<void>;
}

/** Resolves once it listens; Go's `http.ListenAndServe` returns at its end. */
async function listenAndServe(hostname: string, port: number, app: App) {
  const options = { hostname, port, onListen() {} }; // no line of Deno's own
  const start = () =>
    Deno.serve(options, (request, info) => app.fetch(request, info));

  const first = await start(); // on Node it takes a moment
  const { addr } = first;
  options.port = addr.port; // the free one that it got, if 0 was asked for
  const started = [first]; // and whatever takes over from it
  let stopping = false;

  // A Deno server ends when it cannot accept a connection, for want of open
  // files perhaps. It still answers what it has accepted; another takes over.
  async function takeOver(error: unknown) {
    let pause = 5; // milliseconds; doubles up to a second, as Go's does
    while (!stopping) {
      const why = error instanceof Error ? `: ${error.message}` : "";
      print(`port ${addr.port} is not listening${why}; trying again`);
      await sleep(pause);
      if (stopping) return;
      const since = performance.now();
      try {
        const server = await start();
        started.push(server);
        if (!stopping) await server.finished;
        error = undefined; // it has ended without saying why
      } catch (cause) {
        error = cause; // it could not listen, or not accept, once more
      }
      const isSoon = performance.now() - since < 1000;
      pause = isSoon ? Math.min(2 * pause, 1000) : 5;
    }
  }
  async function shutdown() {
    stopping = true;
    await Promise.all(started.map((server) => server.shutdown()));
  }
  return {
    url: `http://${inUrl(addr.hostname)}:${addr.port}`,
    finished: first.finished.then(takeOver, takeOver).then(shutdown),
    shutdown,
  };
}

/** A host as URLs have it: an IPv6 address stands in brackets. */
function inUrl(hostname: string) {
  return hostname.includes(":") ? `[${hostname}]` : hostname;
}

/** What people meet when servers start, by the error's code or name. */
const failures: Record<string, { reason: string; hint?: string }> = {
  EADDRINUSE: { reason: "is already in use", hint: "Try another --port" },
  EACCES: { reason: "is reserved by the system", hint: "Try another --port" },
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

function explain(error: unknown) {
  const { name, message, code = name } = error as Error & { code?: string };
  const other = { reason: `cannot be opened: ${message}`, hint: undefined };
  return { code, ...failures[code] ?? other };
}

// ---- 3. Faults --------------------------------------------------------------
// A slow or failing node, to try clients with.

/** What can be wrong with answers, all of them or, as in `"503:10"`, 10 %. */
export interface Faults {
  /** Milliseconds before an answer comes, 0 to 60000. */
  delay?: number | `${number}:${number}`;
  /** Its status, 200 to 599. Without one, it is the handler's. */
  status?: number | `${number}:${number}`;
}

/**
 * Wraps a handler, so that its answers are late or failing where the request's
 * query asks for it, or else as is usual. Go: middleware, which is a
 * `func(http.Handler) http.Handler`.
 *
 * - `?delay=<ms>` waits, or until the client goes away;
 * - `?status=<code>` answers with that status, and a body where it allows one;
 * - either with `:<percent>` does so at random, for that share of the answers;
 * - another value of these two is answered with 400 and what was expected.
 *
 * @param inner One that returns a `Response`
 * @param usual What a request asks for wins over these, value by value
 * @throws {RangeError} If one of the faults is out of its range
 */
export function withFaults(inner: Handler, usual: Faults = {}): Handler {
  drawFaults(usual); // throws now, and not when the first request comes
  return (c, next) => {
    let faults;
    try {
      faults = drawFaults({ ...usual, ...c.req.query() });
    } catch (error) {
      return c.text((error as Error).message, STATUS_CODE.BadRequest);
    }
    const { delay, status } = faults;
    if (!delay && !status) return inner(c, next); // at once: async costs time
    return spoiled(inner, delay, status)(c, next);
  };
}

/** Draws which faults the next answer has. @throws {RangeError} */
function drawFaults({ delay, status }: { delay?: unknown; status?: unknown }) {
  return { delay: draw("delay", delay), status: draw("status", status) };
}

type Range = { min: number; max: number; note?: string };
const ranges = {
  delay: { min: 0, max: 60_000, note: ", or 2000:10 for 10 percent" },
  status: { min: 200, max: 599, note: ", or 503:10 for 10 percent" },
};

/** The number in `503`, always, or in `503:10` by a chance of 10 %. */
function draw(name: keyof Faults, given: unknown) {
  if (given === undefined) return undefined;
  const form = /^(\d+):(\d\d?|100)$/;
  const [, digits = given, percent = 100] = form.exec(`${given}`) ?? [];
  const value = parseNumber(`${name} must be`, digits, ranges[name]);
  return Math.random() * 100 < Number(percent) ? value : undefined;
}

/** @throws {RangeError} Unless it is in the range, and in digits alone */
function parseNumber(must: string, given: unknown, { min, max, note }: Range) {
  const text = `${given}`;
  const value = Number(text);
  if (/^\d+$/.test(text) && value >= min && value <= max) return value;
  const range = `a whole number from ${min} to ${max}${note ?? ""}`;
  throw new RangeError(`${must} ${range}, got ${JSON.stringify(text)}`);
}

const { NoContent, ResetContent, NotModified } = STATUS_CODE;
const statusesWithoutBody: number[] = [NoContent, ResetContent, NotModified];

/** The same handler, but late or with another status. */
function spoiled(inner: Handler, delay = 0, status = 0): Handler {
  return async (c, next) => {
    if (delay) {
      const { signal } = c.req.raw; // aborts when the client goes away
      await sleep(delay, undefined, { signal }).catch(() => {});
    }
    const response: Response = await inner(c, next);
    const isUpgrade = response.status === STATUS_CODE.SwitchingProtocols;
    if (!status || isUpgrade) return response;

    const headers = new Headers(response.headers);
    const body = statusesWithoutBody.includes(status) ? null : response.body;
    if (body === null) {
      response.body?.cancel().catch(() => {});
      headers.delete("content-length"); // nor what would describe it
      headers.delete("content-type");
      headers.delete("content-encoding");
    }
    return new Response(body, { status, headers });
  };
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
      --status <code>    answer with this status
  -v, --verbose          log every request to stderr
  -h, --help             show this help

A delay or status may be for a share of the answers: 503:10 is one in ten.
A request may ask for itself: /?delay=<ms>&status=<code>`;

/** Runs the command line; resolves to the exit code. Go: `main`. */
export async function main(args: string[]): Promise<number> {
  let options;
  try {
    options = parse(args);
  } catch (error) {
    print(`multiserv: ${(error as Error).message}\nTry --help`);
    return 2;
  }
  if (options === null) {
    print(usage, console.log);
    return 0;
  }
  const { n, first, hostname, port, faults, verbose } = options;
  // Asks once, for the host; Deno itself would ask for each port. What is not
  // a host is refused by serveAll, too, which says why.
  const access = { name: "net", host: inUrl(hostname) } as const;
  await Deno.permissions.request(access).catch(() => {});
  const apps = newApps(n);
  for (const [k, app] of apps.entries()) {
    const i = first + k;
    if (verbose) app.use(logger(i));
    app.all("*", withFaults(unread(handler(i)), faults));
  }
  let servers;
  try {
    servers = await serveAll(apps, { hostname, port });
  } catch (error) {
    report(error as AggregateError);
    return 1;
  }

  // Before the first line, as whoever reads it may send a signal.
  const stopped = stopAtSignal(servers);
  for (const [k, url] of servers.urls.entries()) {
    print(`handler ${first + k} listening on ${url}`, console.log);
  }
  print("Press Ctrl+C to stop");
  await stopped;
  return 0;
}

/**
 * The same handler, which reads no body. Told so, Deno discards it and keeps the
 * connection, as Go does up to 256 KB; Node does so untold.
 */
function unread(inner: Handler): Handler {
  return (c, next) => {
    const isUpload = c.req.method !== "GET" && !c.req.header("expect");
    if (isUpload && "completed" in c.env) { // on Deno
      c.req.raw.body?.cancel().catch(() => {});
    }
    return inner(c, next);
  };
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
  // Of -vp3000, verbose is "p3000".
  const stuck = [flags.verbose, flags.help].find((x) => typeof x !== "boolean");
  if (stuck !== undefined) {
    throw new RangeError(`--verbose and --help take no value, got "${stuck}"`);
  }
  if (flags.help) return null;

  const { _: words, hostname, delay, status, verbose } = flags;
  if (hostname === "") throw new RangeError("--hostname needs a value");
  const port = flags.port === "0"
    ? 0
    : parseNumber("port must be 0 or", flags.port, { min: 1024, max: 65535 });
  const lowest = port || 1024;
  const firsts = { min: 0, max: 65535 - lowest };
  const first = parseNumber("first must be", flags.first, firsts);
  if (words.length === 0) throw new RangeError("n is missing");
  if (words.length > 1) {
    throw new RangeError(`one n is enough, got "${words.join(" ")}"`);
  }
  const max = 65536 - lowest - first;
  const note = Number(words[0]) > max ? ", as ports end at 65535" : "";
  const n = parseNumber("n must be", words[0], { min: 1, max, note });
  const faults = { delay, status } as Faults;
  drawFaults(faults); // throws if one is out of its range
  const firstPort = port === 0 ? 0 : port + first;
  return { n, first, hostname, port: firstPort, faults, verbose };
}

/** Logs every request, percent-encoded, so that nobody can forge a line. */
function logger(i: number): Handler {
  return async (c, next) => {
    const start = performance.now();
    await next();
    const ms = Math.round(performance.now() - start);
    const url = URL.parse(c.req.url); // null if it names an impossible host
    const path = url ? url.pathname + url.search : "?";
    print(`handler ${i}: ${c.req.method} ${path} ${c.res.status} ${ms}ms`);
  };
}

/** Says what went wrong: up to five errors, and what helps. */
function report({ message, errors }: AggregateError) {
  const lines = errors.slice(0, 5).map((error) => error.message);
  if (errors.length > 5) lines.push(`… and ${errors.length - 5} more`);
  const { hint } = explain(errors[0].cause);
  if (hint) lines.push(hint);
  print([`multiserv: ${message}`, ...lines].join("\n"));
}

/** Waits for a signal, then until all requests are answered. */
async function stopAtSignal(servers: MultiServer) {
  const signals = ["SIGINT", "SIGTERM"] as const;
  const { promise, resolve } = Promise.withResolvers<void>();
  for (const signal of signals) Deno.addSignalListener(signal, resolve);
  await promise; // Go: <-signals

  // Some wrappers send a signal twice, within milliseconds: time to hear both.
  const stopped = Promise.all([servers.shutdown(), sleep(50)]);
  const isLate = await Promise.race([stopped, sleep(500, "late")]) === "late";
  // From here on a signal does what it does by default: it ends the process.
  for (const signal of signals) Deno.removeSignalListener(signal, resolve);
  if (isLate) print("Answering requests in flight; Ctrl+C again stops now");
  await stopped;
}

/** Prints a line. On a full disk it is lost, which shall not cost an answer. */
function print(line: string, write = console.error) {
  try {
    write(line);
  } catch {
    // No space left on device
  }
}

if (import.meta.main) Deno.exit(await main(Deno.args));
