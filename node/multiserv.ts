/**
 * Runs ../multiserv.ts on Node: as a command, `node node/multiserv.ts 3`, and
 * as a module, `import { newApps, serveAll } from "./node/multiserv.ts"`, which
 * changes nothing for the program that imports it.
 *
 * @module
 */
import process from "node:process";
import { options } from "./deno.ts";
import "./hook.ts";

// Not before the hook is there, as a static import would be.
const program = await import("../multiserv.ts");

export type {
  App,
  Faults,
  MultiServer,
  ServeAllOptions,
} from "../multiserv.ts";
export const { handler, newApps, serveAll, withFaults } = program;

if (import.meta.main) {
  options.overrideGlobalObjects = true; // saves a third of the CPU time
  process.stderr.on("error", () => {}); // nobody reads the log any more
  process.exit(await program.main(process.argv.slice(2)));
}
