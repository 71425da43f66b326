// Lets Node find the packages that the program names: looks a specifier up in
// the import map of ../deno.json, and an npm: specifier in node_modules here.
import { readFileSync } from "node:fs";
import { registerHooks } from "node:module";

const config = new URL("../deno.json", import.meta.url);
const imports: Record<string, string> =
  JSON.parse(readFileSync(config, "utf8")).imports;

registerHooks({
  resolve(specifier, context, nextResolve) {
    const mapped = imports[specifier] ?? specifier;
    // npm:@scope/name@version/path, of which the version is package.json's.
    const npm = /^npm:((?:@[^/]+\/)?[^@/]+)(?:@[^/]+)?(.*)$/.exec(mapped);
    return npm
      ? nextResolve(npm[1] + npm[2], { ...context, parentURL: import.meta.url })
      : nextResolve(mapped, context);
  },
});
