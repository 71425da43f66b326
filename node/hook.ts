// Lets Node load ../multiserv.ts: gives it a `Deno` of its own, and looks its
// jsr: specifiers up in the import map of ../deno.json, npm: ones in node_modules.
import { readFileSync } from "node:fs";
import { registerHooks } from "node:module";

const program = new URL("../multiserv.ts", import.meta.url).href;
const shim = new URL("deno.ts", import.meta.url).href;
const shimmed = `import { Deno } from "${shim}";`;
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
  load(url, context, nextLoad) {
    if (url !== program) return nextLoad(url, context);
    // A package.json above, or tsx, might take it for CommonJS.
    const loaded = nextLoad(url, { ...context, format: "module-typescript" });
    // In place of the shebang, so that all lines keep their numbers.
    const source = `${loaded.source}`.replace(/^#!.*/, () => shimmed);
    return { ...loaded, source };
  },
});
