// What a Node program sees of ../multiserv.ts, which names its packages as Deno
// does and so tells tsc nothing. multiserv_test.ts here checks that the two agree.
/// <reference lib="esnext.disposable" />
import type { Handler, Hono } from "hono";

/** Makes n Hono apps, each a router without routes. */
export function newApps(n: number): Hono[];

/** Makes a handler that answers with its number. */
export function handler(i: number): Handler;

/** Wraps a handler, so that its answers are late or failing on request. */
export function withFaults(inner: Handler, usual?: Faults): Handler;

/** What can be wrong with answers, all of them or, as in `"503:10"`, 10 %. */
export interface Faults {
  /** Milliseconds before an answer comes, 0 to 60000. */
  delay?: number | `${number}:${number}`;
  /** Its status, 200 to 599. Without one, it is the handler's. */
  status?: number | `${number}:${number}`;
}

/** Serves each app on a port of its own, all of them or none. */
export function serveAll(
  apps: readonly App[],
  options?: ServeAllOptions,
): Promise<MultiServer>;

/** A Hono app, or anything else that can `fetch`. */
export interface App {
  /** Answers a request; `info` is what the runtime knows of it. */
  fetch(request: Request, info: object): Response | Promise<Response>;
}

/** Options of `serveAll`. */
export interface ServeAllOptions {
  /** Address to listen on, 127.0.0.1 by default. */
  hostname?: string;
  /** App i gets port + i, 1024 by default; with 0, every app a free port. */
  port?: number;
}

/** What `serveAll` has started. */
export interface MultiServer extends AsyncDisposable {
  /** Where the apps listen, in their order, such as `http://127.0.0.1:1024`. */
  readonly urls: string[];
  /** Resolves when all servers have been shut down. */
  readonly finished: Promise<void>;
  /** Stops accepting connections; resolves when all requests are answered. */
  shutdown(): Promise<void>;
}
