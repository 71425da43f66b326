/**
 * Runs ../multiserv.ts on Node: as a command, `node node/multiserv.ts 3`, and
 * as a module, `import { newApps, serveAll } from "./node/multiserv.ts"`.
 *
 * @module
 */
import { existsSync, realpathSync } from "node:fs";
import process from "node:process";

const [major, minor] = process.versions.node.split(".").map(Number);
if (major < 22 || major === 22 && minor < 18) {
  console.error(
    `multiserv: needs Node 22.18 or newer, this is ${process.versions.node}`,
  );
  process.exit(1);
}

// One after the other: what comes later needs what comes before.
await import("./hook.ts");
await import("./deno.ts");
const { handler, main, newApps, serveAll } = await import("../multiserv.ts");
export { handler, newApps, serveAll };

// Node 22 has no import.meta.main.
const script = process.argv[1] ?? "";
const started = import.meta.main ??
  (existsSync(script) && realpathSync(script) === import.meta.filename);
if (started) {
  // As on Deno, the servers outlive who reads their log.
  process.stderr.on("error", () => {});
  process.exit(await main(Deno.args));
}
