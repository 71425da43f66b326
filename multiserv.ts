#!/usr/bin/env -S deno run --allow-net=localhost
/**
 * Starts n HTTP servers in one process, each with a port and router of its own.
 *
 *     $ deno run multiserv.ts 3
 *     $ curl localhost:1025
 *     hello from handler 1
 *
 * @module
 */
import { setTimeout as sleep } from "node:timers/promises";
import { parseArgs } from "jsr:@std/cli@^1/parse-args";
import { isStatus } from "jsr:@std/http@^1/status";
import type { Context, Handler } from "npm:hono@^4";
import { Hono } from "npm:hono@^4/tiny"; // the router that takes least memory

/** Makes n empty routers, 1 to 64512, else a RangeError. Go: `newMuxers`. */
export function newApps(n: number): Hono[] {
  return Array.from({ length: whole("n", n, 1, 64512) }, () => new Hono());
}

/**
 * Makes a handler that answers with its number i. Go: `type handler int` and
 * its `ServeHTTP`. A request may ask for a slow or failing node: `?delay=<ms>`
 * (0 to 60000) waits first, `?status=<code>` (200 to 599) sets the status.
 */
export function handler(i: number): Handler {
  const hello = `hello from handler ${i}`;
  return (c) => c.req.url.includes("?") ? perform(c, hello) : c.text(hello);
}

async function perform(c: Context, hello: string): Promise<Response> {
  try {
    const delay = whole("delay", c.req.query("delay") ?? 0, 0, 60_000);
    const status = whole("status", c.req.query("status") ?? 200, 200, 599);
    if (!isStatus(status)) throw new RangeError(`status ${status} is unknown`);
    const { signal } = c.req.raw; // aborts when the client goes away
    if (delay) await sleep(delay, null, { signal }).catch(() => {});
    const body = [204, 205, 304].includes(status) ? null : hello;
    return new Response(body, { status });
  } catch (error) {
    return c.text((error as RangeError).message, 400);
  }
}

/** Options of {@linkcode serveAll}. */
export interface ServeAllOptions {
  /** Address to listen on. @default {"localhost"} */
  hostname?: string;
  /** App i gets port + i; 0 gives every app a free port. @default {1024} */
  port?: number;
  /** Number of the first app, from which ports count too. @default {0} */
  first?: number;
}

/** To n servers what `Deno.HttpServer` is to one. */
export interface MultiServer extends AsyncDisposable {
  /** Where the apps listen, in their order. */
  readonly urls: string[];
  /** Resolves when all servers have stopped. */
  readonly finished: Promise<void>;
  /** Takes no new connections, answers requests in flight, then resolves. */
  shutdown(): Promise<void>;
}

/**
 * Serves each app on a port of its own, all or none. Go: the loop that starts
 * a goroutine per `ListenAndServe`. The caller must shut the servers down.
 *
 * @param apps Hono apps, or whatever else has a `fetch`. Go: `http.Handler`
 * @throws {RangeError} If a port is bad, or there are more apps than ports
 * @throws {AggregateError} If servers cannot start; `errors` say which and why
 */
export async function serveAll(
  apps: readonly Pick<Deno.ServeDefaultExport, "fetch">[],
  { hostname = "localhost", port = 1024, first = 0 }: ServeAllOptions = {},
): Promise<MultiServer> {
  [, port, first] = checked(apps.length, port, first);
  const host = hostname.replace(/^[^[]*:.*/, "[$&]"); // IPv6 in brackets
  // One question for all ports. No, or no such host: the ports will tell.
  await Deno.permissions.request({ name: "net", host }).catch(() => {});
  const servers: Deno.HttpServer<Deno.NetAddr>[] = [];
  const errors: Error[] = [];
  for (const [k, app] of apps.entries()) {
    const where = { hostname, port: port && port + first + k };
    try {
      await new Promise<unknown>((onListen, onError) => {
        const server = Deno.serve({ ...where, onListen }, app.fetch.bind(app));
        server.finished.catch(onError); // on Node it fails later
        servers.push(server);
      });
    } catch (cause) {
      const what = `handler ${first + k}: port ${where.port}`;
      errors.push(new Error(what + fault(cause as Error)[1], { cause }));
    }
  }
  const all = (done: Promise<void>[]) => Promise.all(done).then(() => {});
  const shutdown = () => all(servers.map((server) => server.shutdown()));
  if (errors.length > 0) {
    await shutdown();
    throw new AggregateError(errors, `No server started on "${hostname}"`);
  }
  const urls = servers.map(({ addr }) => `http://${host}:${addr.port}`);
  const finished = all(servers.map((server) => server.finished));
  return { urls, finished, shutdown, [Symbol.asyncDispose]: shutdown };
}

// The command line: arguments in, messages and an exit code out.
const usage = `Usage: multiserv [options] <n>
  -p, --port <port>      first port, 1024 to 65535, or 0 for any (default 1024)
  -f, --first <i>        number of the first handler (default 0)
  -H, --hostname <host>  address to listen on (default localhost)
  -v, --verbose          log every request to stderr
  -h, --help             show this help`;

type Flags = { _: unknown[] } & Record<string, unknown>;
async function run(args: string[]): Promise<void> {
  const { _, help, verbose, ...flags }: Flags = parseArgs(args, {
    string: ["_", "port", "first", "hostname"],
    collect: ["_"], // even what comes as --_
    boolean: ["verbose", "help"],
    alias: { p: "port", f: "first", H: "hostname", v: "verbose", h: "help" },
    default: { port: "1024", first: "0", hostname: "localhost" },
    unknown(arg: string, key?: string) {
      if (key !== undefined) throw new RangeError(`unknown option "${arg}"`);
    },
  });
  if (help) return console.log(usage);
  const hostname = `${flags.hostname}`;
  if (!hostname) throw new RangeError('hostname must not be empty, got ""');
  const [n, port, first] = checked(_.join(" "), flags.port, flags.first);
  const apps = newApps(n);
  for (const [k, app] of apps.entries()) {
    if (verbose) app.use(logger(first + k));
    app.all("*", handler(first + k));
  }
  const starting = serveAll(apps, { hostname, port, first });
  let stopping: Promise<void> | undefined;
  for (const [signal, code] of [["SIGINT", 130], ["SIGTERM", 143]] as const) {
    Deno.addSignalListener(signal, () => {
      if (stopping) Deno.exit(code);
      stopping = starting.then((servers) => servers.shutdown(), () => {});
    });
  }
  const { urls, finished } = await starting;
  const list = urls.map((url, k) => `handler ${first + k} listening on ${url}`);
  console.log(list.join("\n"));
  if (Deno.stderr.isTerminal()) console.error("Press Ctrl+C to stop");
  await finished.catch((cause) => {
    throw new Error(`Servers stopped${fault(cause)[1]}`, { cause });
  });
}

const logger = (i: number): Handler => async (c, next) => {
  await next();
  console.error(`handler ${i}: ${c.req.method} ${c.req.url} ${c.res.status}`);
};

function report(error: AggregateError): number {
  const { message, errors = [], cause = errors.at(-1)?.cause } = error;
  if (!(error instanceof RangeError || cause)) throw error;
  const lines = errors.slice(0, 5).map(({ message }) => message);
  if (errors.length > 5) lines.push(`… and ${errors.length - 5} more`);
  lines.push(cause ? fault(cause)[2] : "Try --help");
  console.error([`multiserv: ${message}`, ...lines].join("\n"));
  return cause ? 1 : 2;
}

/** Runs the command line, resolves to its exit code. Go: `main`. */
export const main = (args: string[]): Promise<number> =>
  run(args).then(() => 0, report);

/** What may keep a server from its port: how to tell, what to say, a hint. */
const faults: [RegExp, why: string, hint: string][] = [
  [/EADDRINUSE/, " is already in use", "Try another --port"],
  [/AVAIL|EINVAL/, ": address not on this machine", "Try another --hostname"],
  [/lookup|URIError/, ": unknown host name", "Try another --hostname"],
  [/EACCES/, ": permission denied", "Try another --port"],
  [/EMFILE|files/, ": too many open files", "Raise ulimit -n or start fewer"],
  [/NotCapable/, ": no network access", "Allow it: deno run --allow-net"],
];
const fault = (error: Error & { code?: string }) =>
  faults.find(([is]) => is.test(`${error.code} ${error}`)) ??
    [/^/, `: ${error.message}`, "Try another --port"];

function checked(n: unknown, port: unknown, first: unknown) {
  const p = `${port}` === "0" ? 0 : whole("port, unless 0,", port, 1024, 65535);
  const f = whole("first", first, 0, 65535 - (p || 1024));
  const from = p ? p + f : 1024;
  return [whole(`n, for ports from ${from} up,`, n, 1, 65536 - from), p, f];
}

function whole(name: string, value: unknown, min: number, max: number): number {
  const number = /^\d+$/.test(`${value}`) ? Number(value) : NaN;
  if (number >= min && number <= max) return number;
  const expected = `a whole number from ${min} to ${max}`;
  throw new RangeError(`${name} must be ${expected}, got "${value}"`);
}

if (import.meta.main) Deno.exit(await main(Deno.args));
