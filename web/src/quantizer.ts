/** Product quantizer: tokens -> latent. */

import { Alphabets } from "./alphabets.js";
import type { ModelFile } from "./modelFile.js";
import type { TokenGrid } from "./tokenGrid.js";

export class ProductQuantizer {
  /** D, channels of the latent. */
  readonly numChannels: number;
  readonly #alphabets: Alphabets;
  /** Latent channels of each sub-quantizer. */
  readonly #channels: readonly (readonly number[])[];
  /** (V): the codewords of each level and sub-quantizer, (K, channels). */
  readonly #codebook: Float32Array;
  /** Latent mean of each channel, which a dropped channel decodes to; (D). */
  readonly #default: Float32Array;

  constructor(model: ModelFile) {
    const order = model.integers("tokenizer.quantizer.order");
    const boundaries = model.integers("tokenizer.quantizer.boundaries_tensor");
    this.#alphabets = Alphabets.of(model);
    this.#channels = boundaries.slice(1).map((end, m) => order.slice(boundaries[m], end));
    this.#codebook = model.float32("tokenizer.quantizer.codebook");
    this.#default = model.float32("tokenizer.quantizer.default");
    this.numChannels = this.#default.length;
  }

  /** Tokens -> quantized latent (D, h, w). */
  dequantize(grid: TokenGrid, level: number): Float32Array {
    const size = grid.height * grid.width;
    const latent = new Float32Array(this.numChannels * size);
    for (let d = 0; d < this.numChannels; d++) latent.fill(this.#default[d], d * size, (d + 1) * size);
    this.#channels.forEach((channels, m) => {
      const start = this.#alphabets.valueStart(level, m);
      channels.forEach((channel, index) => {
        const to = channel * size;
        for (let p = 0; p < size; p++) {
          latent[to + p] = this.#codebook[start + grid.tokens[m * size + p] * channels.length + index];
        }
      });
    });
    return latent;
  }

  /**
   * Set a sub-quantizer's part of a latent to the mean of its codewords.
   *
   * @param latent (D, h, w), changed.
   * @param weights (K), of the codewords; sum to `total`.
   */
  setExpectation(
    latent: Float32Array,
    position: number,
    m: number,
    level: number,
    weights: Int32Array,
    total: number,
  ): void {
    const size = latent.length / this.numChannels;
    const start = this.#alphabets.valueStart(level, m);
    const channels = this.#channels[m];
    channels.forEach((channel, index) => {
      let sum = 0;
      for (let k = 0; k < weights.length; k++) sum += weights[k] * this.#codebook[start + k * channels.length + index];
      latent[channel * size + position] = sum / total;
    });
  }
}
