// What a Node program sees of ../multiserv.ts, which names its packages as Deno
// does and so tells tsc nothing. multiserv_test.ts here checks that the two agree.
/// <reference lib="esnext.disposable" />
import type { Handler } from "hono";
import type { Hono } from "hono/tiny";

/** Makes n apps, each a router without routes. */
export function newApps(n: number): Hono[];

/** Makes a handler that answers with its number. */
export function handler(i: number): Handler;

/** Wraps a handler, so that a request can ask for a late or failing answer. */
export function withFaults(handler: Handler, faults?: string): Handler;

/** Serves each app on a port of its own, all of them or none. */
export function serveAll(
  apps: readonly App[],
  options?: ServeAllOptions,
): Promise<MultiServer>;

/** A Hono app, or anything else with a `fetch`. */
export interface App {
  fetch(request: Request, info?: unknown): Response | Promise<Response>;
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
  /** Resolves when all servers have stopped, rejects when one lost its port. */
  readonly finished: Promise<void>;
  /** Stops accepting connections; resolves when all requests are answered. */
  shutdown(): Promise<void>;
}
