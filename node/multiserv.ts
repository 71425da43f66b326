/**
 * Runs ../multiserv.ts on Node: as a command, `node node/multiserv.ts 3`, and
 * as a module, `import { newApps, serveAll } from "./node/multiserv.ts"`, which
 * changes nothing for the program that imports it.
 *
 * @module
 */
import process from "node:process";

const [major = 0, minor = 0] = process.versions.node.split(".").map(Number);
if (major < 22 || major === 22 && minor < 18) {
  console.error(
    `multiserv: needs Node 22.18 or newer, this is ${process.versions.node}`,
  );
  process.exit(1);
}

await import("./hook.ts"); // first: what comes later needs it
const program = await import("../multiserv.ts");

export type {
  App,
  Faults,
  MultiServer,
  ServeAllOptions,
} from "../multiserv.ts";
export const { handler, newApps, serveAll, withFaults } = program;

if (import.meta.main) {
  const { options } = await import("./deno.ts");
  options.overrideGlobalObjects = true; // saves a third of the CPU time
  // As on Deno, the servers outlive who reads what they print.
  process.stdout.on("error", () => {});
  process.stderr.on("error", () => {});
  process.exit(await program.main(process.argv.slice(2)));
}
