/** What becomes of the tokens that were not sent: each unknown part of the latent is set to its expectation. */

import { blocksOf, type EntropyModel } from "./entropyModel.js";
import type { ProductQuantizer } from "./quantizer.js";
import { TOTAL } from "./rangeDecoder.js";
import type { TokenGrid } from "./tokenGrid.js";

/** Quantized latent (D, h, w) of the known tokens, and its expectation under the model where they are unknown. */
export async function expectedLatent(
  model: EntropyModel,
  quantizer: ProductQuantizer,
  grid: TokenGrid,
  level: number,
): Promise<Float32Array> {
  const latent = quantizer.dequantize(grid, level);
  const size = grid.height * grid.width;
  const isKnown = (m: number, position: number) => grid.known[m * size + position] === 1;
  const all = Int32Array.from({ length: size }, (_, position) => position);
  const subquantizers = Array.from({ length: model.numSubquantizers }, (_, m) => m);
  const unknown = all.filter((position) => subquantizers.some((m) => !isKnown(m, position)));
  if (unknown.length === 0) return latent;

  const state = model.start(grid.height, grid.width, level);
  for (const m of subquantizers) {
    const positions = all.filter((position) => isKnown(m, position));
    model.reveal(state, positions, m, m + 1, grid.tokens);
  }
  const hidden = await model.hidden(state, unknown);
  for (const [group, [first, last]] of model.groups.entries()) {
    if (grid.known.subarray(first * size, last * size).every((flag) => flag === 1)) continue;
    const head = await model.head(hidden, group);
    for (const block of blocksOf(first, last, unknown.length)) {
      const frequencies = await model.frequencies(head, group, level, block);
      let row = 0;
      for (let m = block.first; m < block.last; m++) {
        for (const position of unknown.subarray(block.begin, block.end)) {
          if (!isKnown(m, position)) {
            quantizer.setExpectation(latent, position, m, level, frequencies, row * model.numCodewords, TOTAL);
          }
          row++;
        }
      }
    }
  }
  return latent;
}
