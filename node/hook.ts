// Lets Node find the packages that the program names as Deno does: looks up
// jsr: specifiers in the import map of ../deno.json, npm: ones in node_modules.
import { readFileSync } from "node:fs";
import { registerHooks } from "node:module";

const config = new URL("../deno.json", import.meta.url);
const imports: Record<string, string> =
  JSON.parse(readFileSync(config, "utf8")).imports;

registerHooks({
  resolve(specifier, context, nextResolve) {
    if (!/^(jsr|npm):/.test(specifier)) return nextResolve(specifier, context);
    const mapped = imports[specifier] ?? specifier;
    // npm:@scope/name@version/path, of which the version is package.json's.
    const found = mapped.replace(/^npm:((@[^/]+\/)?[^@/]+)(@[^/]+)?/, "$1");
    return nextResolve(found, { ...context, parentURL: import.meta.url });
  },
});
