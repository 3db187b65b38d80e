// Tokens and latents of payloads, by the networks of ragged models, against what the Python package makes of the same:
// the file that PQMIM_CASES names, which tests/web/network_cases.py writes.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { EntropyModel } from "../../web/dist/entropyModel.js";
import { expectedLatent } from "../../web/dist/fill.js";
import { WeightsFile } from "../../web/dist/modelFile.js";
import { ProductQuantizer } from "../../web/dist/quantizer.js";
import { startRuntime } from "../../web/dist/session.js";
import { readTokens } from "../../web/dist/tokenGrid.js";

const bytes = (hex) => Uint8Array.from(Buffer.from(hex, "hex"));

startRuntime(1);
for (const { name, weights, numSteps, reads } of JSON.parse(readFileSync(process.env.PQMIM_CASES, "utf8"))) {
  const file = new WeightsFile(Uint8Array.from(readFileSync(weights)));
  const model = await EntropyModel.create(file);
  const quantizer = new ProductQuantizer(file);

  test(`tokens and latents of the model ${name}`, async () => {
    const levels = new Set(reads.map(({ level }) => level));
    assert.equal(levels.size, model.alphabets.numLevels);
    assert.deepEqual(Array.from(levels, (level) => model.steps(level).length), numSteps);
    for (const { height, width, level, payload, isPartial, tokens, known, latent } of reads) {
      const container = { payload: bytes(payload), isPartial, level, tokenCheck: null };
      let numRead = 0;
      const grid = await readTokens(model, container, height, width, (count) => (numRead = count));
      assert.deepEqual(Array.from(grid.tokens), tokens);
      assert.deepEqual(Array.from(grid.known), known);
      if (!isPartial) assert.equal(numRead, model.alphabets.numCoded(level) * height * width);
      const got = await expectedLatent(model, quantizer, grid, level);
      assert.equal(got.length, latent.length);
      got.forEach((value, i) => assert.ok(Math.abs(value - latent[i]) < 1e-4 + 1e-5 * Math.abs(latent[i])));
    }
  });
}
