/** What becomes of the tokens that were not sent: each unknown part of the latent is set to its expectation. */

import type { EntropyModel } from "./entropyModel.js";
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
  if (grid.known.every((flag) => flag === 1)) return latent;
  let group = 0;
  for await (const { head, positions } of model.headsOfKnown(grid, level)) {
    const [first, last] = model.groups[group];
    // Silent sub-quantizers are in no block: the latent has their part already.
    for (const block of positions.length === 0 ? [] : model.alphabets.blocks(level, first, last, positions.length)) {
      const frequencies = await model.frequencies(head, group, level, block);
      let row = 0;
      for (let m = block.first; m < block.last; m++) {
        for (const position of positions.subarray(block.begin, block.end)) {
          if (!isKnown(m, position)) {
            const weights = frequencies.subarray(row * block.size, (row + 1) * block.size);
            quantizer.setExpectation(latent, position, m, level, weights, TOTAL);
          }
          row++;
        }
      }
    }
    group++;
  }
  return latent;
}
