/** What the entropy network is told of tokens: sums of integer products, exact in any order. */

import { Alphabets } from "./alphabets.js";
import type { ModelFile } from "./modelFile.js";

/** The integer that stands for 1 in what is embedded. */
const FLAG = 16;

/** The token of a sub-quantizer at a position; null = unknown. */
export type TokenAt = (m: number, position: number) => number | null;

export class Embedding {
  readonly #model: ModelFile;
  readonly #alphabets: Alphabets;
  /** (V): features of the codewords. */
  readonly #values: Int8Array;
  /** By group, (inputs, C): a row for each channel, for each sub-quantizer, and in the first group for each level. */
  readonly #weights = new Map<number, Float32Array>();

  constructor(model: ModelFile) {
    this.#model = model;
    this.#alphabets = Alphabets.of(model);
    this.#values = model.int8("entropy.token_values");
  }

  /**
   * Products (n, C) of the features of a group's tokens with the embedding; in the first group with the bias and what
   * stands for the level.
   *
   * @param first, last sub-quantizers of the group, the second exclusive.
   */
  sums(
    group: number,
    [first, last]: readonly [number, number],
    level: number,
    positions: Int32Array,
    token: TokenAt,
  ): Float32Array {
    const { width } = this.#model.metadata.config;
    const { channels } = this.#alphabets;
    const weights = this.#weightsOf(group);
    const numChannels = channels.slice(first, last).reduce((sum, count) => sum + count, 0);
    const start = this.#start(group, level);
    const sums = new Float32Array(positions.length * width);
    positions.forEach((position, row) => {
      const at = row * width;
      sums.set(start, at);
      const add = (value: number, input: number) => {
        for (let c = 0; c < width; c++) sums[at + c] += value * weights[input * width + c];
      };
      let channel = 0;
      for (let m = first; m < last; channel += channels[m++]) {
        const codeword = token(m, position);
        if (codeword === null) continue;
        add(FLAG, numChannels + m - first);
        const from = this.#alphabets.valueStart(level, m) + codeword * channels[m];
        for (let d = 0; d < channels[m]; d++) {
          if (this.#values[from + d] !== 0) add(this.#values[from + d], channel + d);
        }
      }
    });
    return sums;
  }

  /** Sums (C) where nothing is known. */
  #start(group: number, level: number): Float32Array {
    const { width } = this.#model.metadata.config;
    const start = new Float32Array(width);
    if (group !== 0) return start;
    const weights = this.#weightsOf(group);
    const from = weights.length - (this.#alphabets.numLevels - level) * width;
    start.set(this.#model.int32("entropy.embed.0.bias"));
    return start.map((bias, c) => bias + FLAG * weights[from + c]);
  }

  #weightsOf(group: number): Float32Array {
    let weights = this.#weights.get(group);
    if (weights === undefined) {
      const { width } = this.#model.metadata.config;
      const stored = this.#model.int8(`entropy.embed.${group}.weight`); // (C, inputs)
      const numInputs = stored.length / width;
      weights = new Float32Array(stored.length);
      for (let i = 0; i < stored.length; i++) weights[(i % numInputs) * width + Math.floor(i / numInputs)] = stored[i];
      this.#weights.set(group, weights);
    }
    return weights;
  }
}
