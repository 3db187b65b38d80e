// Measures the decoder in headless Chromium: bytes to fetch, milliseconds to prepare a model and to decode.
//
//     node web/scripts/measure.mjs CHROMIUM [RUNS] FILE.pqm...
//
// Each file is decoded RUNS times (5 unless given) by a page that has its model ready, with 1 thread, then, where pages
// are cross-origin isolated, with 2; the least and the median of the milliseconds are printed.
import { readFileSync, readdirSync } from "node:fs";
import { loadavg } from "node:os";
import { basename, dirname, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { gzipSync } from "node:zlib";

import { chromium } from "playwright-core";

import { serve } from "../../tests/web/servers.mjs";

const WEB = fileURLToPath(new URL("../", import.meta.url));
const [executablePath, ...rest] = process.argv.slice(2);
const runs = /^\d+$/.test(rest[0]) ? Number(rest.shift()) : 5;

const RUNTIME = ["ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"];
const MODULES = readdirSync(`${WEB}dist`).filter((name) => name.endsWith(".js"));
const sizes = (paths) => {
  const contents = paths.map((path) => readFileSync(`${WEB}dist/${path}`));
  const total = (parts) => parts.reduce((sum, part) => sum + part.length, 0);
  return { bytes: total(contents), gzip: total(contents.map((content) => gzipSync(content, { level: 9 }))) };
};
console.table({
  "modules of this package": sizes(MODULES),
  runtime: sizes(RUNTIME.map((name) => `runtime/${name}`)),
  "weights of photo": sizes(["weights/photo.pqmw"]),
  "weights of its decoder fast": sizes(["weights/photo-fast.pqmw"]),
  "weights of its decoder fine": sizes(["weights/photo-fine.pqmw"]),
});

const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"] });
for (const threads of [1, 2]) {
  const rows = {};
  for (const file of rest) {
    const server = await serve({ "/files/": dirname(resolve(file)), "/": WEB }, threads > 1);
    const page = await (await browser.newContext()).newPage();
    await page.goto(`${server.origin}/empty.html`);
    const times = await page.evaluate(
      async ({ url, runs, threads }) => {
        const pqmim = await import("/dist/index.js");
        pqmim.configure({ threads });
        const data = await (await fetch(url)).arrayBuffer();
        const reports = [];
        for (let i = 0; i <= runs; i++) reports.push((await pqmim.decodeWithReport(data.slice(0))).times);
        return reports;
      },
      { url: `/files/${basename(file)}`, runs, threads },
    );
    const statistics = (values) => {
      const sorted = [...values].sort((a, b) => a - b);
      return `${Math.round(sorted[0])} / ${Math.round(sorted[sorted.length >> 1])}`;
    };
    rows[basename(file)] = {
      "model, first time": Math.round(times[0].model),
      "tokens, first time": Math.round(times[0].tokens),
      "tokens, least / median": statistics(times.slice(1).map((time) => time.tokens)),
      "picture, least / median": statistics(times.slice(1).map((time) => time.picture)),
      "both, least / median": statistics(times.slice(1).map((time) => time.tokens + time.picture)),
      load: loadavg()[0].toFixed(1),
    };
    await page.context().close();
    server.close();
  }
  console.log(`milliseconds, ${threads} thread${threads > 1 ? "s" : ""}`);
  console.table(rows);
}
await browser.close();
