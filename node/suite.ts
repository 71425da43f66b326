// Deno.test for `node --test`, so that ../multiserv_test.ts is its suite too.
import { test } from "node:test";
import "./hook.ts";
import "./deno.ts";

type Definition = Pick<Deno.TestDefinition, "name" | "ignore"> & {
  fn: () => void | Promise<void>;
};

Object.assign(Deno, {
  test: ({ name, ignore = false, fn }: Definition) =>
    test(name, { skip: ignore }, fn),
  bench() {}, // measured on Deno
});
