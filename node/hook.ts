// Lets Node load ../multiserv.ts: gives it a `Deno` of its own, and looks its
// jsr: specifiers up in the import map of ../deno.json, npm: ones in node_modules.
import { readFileSync, realpathSync } from "node:fs";
import { registerHooks } from "node:module";
import { pathToFileURL } from "node:url";

const here = (path: string) => new URL(path, import.meta.url);
// Node knows a file by where it is, not by a link that leads there.
const program = pathToFileURL(realpathSync(here("../multiserv.ts"))).href;
const tests = [
  here("../multiserv_test.ts").href,
  here("multiserv_test.ts").href,
];
const ours = new Set<string | undefined>([program, ...tests]);
const shimmed = `import { Deno } from "${here("deno.ts")}";`;
const imports: Record<string, string> =
  JSON.parse(readFileSync(here("../deno.json"), "utf8")).imports;

registerHooks({
  resolve(specifier, context, nextResolve) {
    if (!ours.has(context.parentURL) || !/^(jsr|npm):/.test(specifier)) {
      return nextResolve(specifier, context);
    }
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
