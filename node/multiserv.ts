/**
 * Runs ../multiserv.ts on Node: as a command, `node node/multiserv.ts 3`, and
 * as a module, `import { newApps, serveAll } from "./node/multiserv.ts"`, for
 * which it defines a global `Deno` with the few members that the module uses.
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

// One after the other: what comes later needs what comes before.
await import("./hook.ts");
await import("./deno.ts");
const program = await import("../multiserv.ts");

export type { App, MultiServer, ServeAllOptions } from "../multiserv.ts";
export const { handler, newApps, serveAll, withFaults } = program;

if (import.meta.main) {
  // As on Deno, the servers outlive who reads what they print.
  process.stdout.on("error", () => {});
  process.stderr.on("error", () => {});
  process.exit(await program.main(Deno.args));
}
