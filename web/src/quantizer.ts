/** Product quantizer: tokens -> latent. */

import type { ModelFile } from "./modelFile.js";
import type { TokenGrid } from "./tokenGrid.js";

export class ProductQuantizer {
  /** D, channels of the latent. */
  readonly numChannels: number;
  readonly #numCodewords: number;
  /** Latent channel of each codebook column; (D'). */
  readonly #order: readonly number[];
  /** Columns of each sub-quantizer begin here; (M + 1). */
  readonly #boundaries: readonly number[];
  /** By level, (D', K): each row has the values of one column of the codebook. */
  readonly #columns: readonly Float32Array[];
  /** Latent mean of each channel, which a dropped channel decodes to; (D). */
  readonly #default: Float32Array;

  constructor(model: ModelFile) {
    this.#numCodewords = model.metadata.config.num_codewords;
    this.#order = model.integers("tokenizer.quantizer.order");
    this.#boundaries = model.integers("tokenizer.quantizer.boundaries_tensor");
    this.#columns = transposed(model.float32("tokenizer.quantizer.codebook"), this.#numCodewords, this.#order.length);
    this.#default = model.float32("tokenizer.quantizer.default");
    this.numChannels = this.#default.length;
  }

  /** Tokens -> quantized latent (D, h, w). */
  dequantize(grid: TokenGrid, level: number): Float32Array {
    const size = grid.height * grid.width;
    const latent = new Float32Array(this.numChannels * size);
    for (let d = 0; d < this.numChannels; d++) latent.fill(this.#default[d], d * size, (d + 1) * size);
    const columns = this.#columns[level];
    for (let m = 0; m + 1 < this.#boundaries.length; m++) {
      for (let d = this.#boundaries[m]; d < this.#boundaries[m + 1]; d++) {
        const to = this.#order[d] * size;
        const from = d * this.#numCodewords;
        for (let p = 0; p < size; p++) latent[to + p] = columns[from + grid.tokens[m * size + p]];
      }
    }
    return latent;
  }

  /**
   * Set a sub-quantizer's part of a latent to the mean of its codewords.
   *
   * @param latent (D, h, w), changed.
   * @param weights (K) of the codewords, from `start` on; sum to `total`.
   */
  setExpectation(
    latent: Float32Array,
    position: number,
    m: number,
    level: number,
    weights: Int32Array,
    start: number,
    total: number,
  ): void {
    const size = latent.length / this.numChannels;
    const columns = this.#columns[level];
    for (let d = this.#boundaries[m]; d < this.#boundaries[m + 1]; d++) {
      const from = d * this.#numCodewords;
      let sum = 0;
      for (let k = 0; k < this.#numCodewords; k++) sum += weights[start + k] * columns[from + k];
      latent[this.#order[d] * size + position] = sum / total;
    }
  }
}

/** (L, K, D') -> by level, (D', K). */
function transposed(codebook: Float32Array, numCodewords: number, numColumns: number): Float32Array[] {
  const size = numCodewords * numColumns;
  return Array.from({ length: codebook.length / size }, (_, level) =>
    Float32Array.from(
      { length: size },
      (_, i) => codebook[level * size + (i % numCodewords) * numColumns + Math.floor(i / numCodewords)],
    ),
  );
}
