// Deno.test for `node --test`, so that ../multiserv_test.ts is its suite too.
import { after, test } from "node:test";
import process from "node:process";
import "./hook.ts";

type Definition = Pick<Deno.TestDefinition, "name" | "ignore"> & {
  fn: () => void | Promise<void>;
};

const Deno = {
  test: ({ name, ignore = false, fn }: Definition) =>
    test(name, { skip: ignore }, fn),
  bench() {}, // measured on Deno
  permissions: { querySync: () => ({ state: "granted" }) },
};
Object.assign(globalThis, { Deno });

// What is left open would keep the suite from ending, and nobody would know why.
after(() => {
  setTimeout(() => {
    console.error("Left open:", process.getActiveResourcesInfo().join(", "));
    process.exit(1);
  }, 10_000).unref();
});
