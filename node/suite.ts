// Deno.test for `node --test`, so that ../multiserv_test.ts is its suite too.
import { serve } from "@hono/node-server";
import { once } from "node:events";
import type { Server } from "node:http";
import process from "node:process";
import { after, afterEach, test } from "node:test";
import "./hook.ts";

type Options = Parameters<typeof serve>[0];

const denoTest = ({ name, ignore, timeout, fn }: Deno.TestDefinition) =>
  test(name, { skip: ignore, timeout }, fn as () => Promise<void>);
const Deno = {
  test: Object.assign(denoTest, { afterEach }),
  bench() {}, // measured on Deno
  permissions: { querySync: () => ({ state: "granted" }) },
  /** The bare runtime, for the suite to compare with. */
  async serve(options: Options, fetch: Options["fetch"]) {
    const bare = { ...options, fetch, overrideGlobalObjects: false };
    const server = serve(bare) as Server;
    await once(server, "listening");
    const shutdown = () => new Promise((closed) => server.close(closed));
    return { addr: server.address(), shutdown };
  },
};
Object.assign(globalThis, { Deno });

// What is left open would keep the suite from ending, and nobody would know why.
after(() => {
  setTimeout(() => {
    console.error("Left open:", process.getActiveResourcesInfo().join(", "));
    process.exit(1);
  }, 10_000).unref();
});
