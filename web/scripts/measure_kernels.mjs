// Says which kernels are exact in headless Chromium and how fast they are, for the kernels of dist/weights/photo.pqmw.
//
//     python web/scripts/make_weights.py --kernels qgemm qgemm-s8 matmulinteger float32
//     node web/scripts/measure_kernels.mjs CHROMIUM
//
// Prints the least milliseconds of 40 runs, taken in turn, of three parts of a layer on 512 rows.
import { fileURLToPath } from "node:url";

import { chromium } from "playwright-core";

import { serve } from "../../tests/web/servers.mjs";

const server = await serve({ "/": fileURLToPath(new URL("../", import.meta.url)) });
const browser = await chromium.launch({ executablePath: process.argv[2], args: ["--no-sandbox", "--disable-gpu"] });
const page = await browser.newPage();
await page.goto(`${server.origin}/empty.html`);
const table = await page.evaluate(async () => {
  const { startRuntime } = await import("/dist/session.js");
  const { SHIPPED_MODELS } = await import("/dist/models.js");
  const { loadWeights } = await import("/dist/weights.js");
  const { EntropyNetwork } = await import("/dist/entropyNetwork.js");
  startRuntime(1);
  const model = await loadWeights(
    SHIPPED_MODELS.find(({ name }) => name === "photo"),
    () => {},
  );
  const networks = {};
  const table = {};
  for (const kernel of [...model.metadata.kernels]) {
    model.metadata.kernels = [kernel];
    const network = await EntropyNetwork.create(model).catch(() => null);
    table[kernel] = { exact: network !== null };
    if (network !== null) networks[kernel] = network;
  }
  const { width, head_width, window } = model.metadata.config;
  const rows = 512;
  const numPlaces = window ** 2;
  const activations = (count) => new Uint8Array(count).map((_, i) => 1 + ((i * 7919) % 255));
  const h = new Float32Array(rows * width);
  const [x, kv] = [activations(rows * width), activations(2 * rows * width)];
  const [bias, mask] = [new Float32Array((width / head_width) * numPlaces ** 2), new Float32Array(rows)];
  for (let run = 0; run < 40; run++) {
    for (const [kernel, network] of Object.entries(networks)) {
      const parts = {
        attend: () => network.attend(0, rows / numPlaces, x, kv, bias, mask),
        project: () => network.project(0, h, x),
        feed: () => network.feed(0, h, x),
      };
      for (const [part, compute] of Object.entries(parts)) {
        const start = performance.now();
        await compute();
        const milliseconds = Math.round(10 * (performance.now() - start)) / 10;
        table[kernel][part] = Math.min(table[kernel][part] ?? Infinity, milliseconds);
      }
    }
  }
  return table;
});
console.table(table);
await browser.close();
server.close();
