/**
 * Alphabets: how many codewords each sub-quantizer has at each level, and where they lie among all of a model.
 *
 * What belongs to codewords is kept in flat arrays, level by level and within it sub-quantizer by sub-quantizer: one
 * entry for each of N codewords, or one for each of their V values, as many for a codeword as its sub-quantizer has
 * channels. A sub-quantizer with a single codeword is silent: its tokens are 0 and are not sent.
 */

import type { ModelFile } from "./modelFile.js";
import { cuts } from "./rows.js";

/** Frequencies that are computed at a time. */
const CHUNK_FREQUENCIES = 1 << 15;

/** Neighboring sub-quantizers with equally many codewords at a level. */
export interface Run {
  readonly first: number;
  /** Exclusive. */
  readonly last: number;
  /** K, codewords of each. */
  readonly size: number;
}

/** A part of a step: sub-quantizers, and places `begin` to `end` (exclusive) of the step's positions. */
export interface Block extends Run {
  readonly begin: number;
  readonly end: number;
}

export class Alphabets {
  /** L. */
  readonly numLevels: number;
  /** M. */
  readonly numSubquantizers: number;
  readonly #sizes: readonly number[];
  readonly #starts: readonly number[];
  readonly #valueStarts: readonly number[];

  /**
   * @param sizes (L, M), codewords of each sub-quantizer at each level, at least 1.
   * @param channels (M), of each sub-quantizer, at least 1.
   */
  constructor(
    sizes: readonly number[],
    readonly channels: readonly number[],
  ) {
    this.numSubquantizers = channels.length;
    this.numLevels = sizes.length / channels.length;
    this.#sizes = sizes;
    this.#starts = startsOf(sizes);
    this.#valueStarts = startsOf(sizes.map((size, i) => size * channels[i % channels.length]));
  }

  /** Those of a token model. */
  static of(model: ModelFile): Alphabets {
    const boundaries = model.integers("tokenizer.quantizer.boundaries_tensor");
    const channels = boundaries.slice(1).map((end, m) => end - boundaries[m]);
    return new Alphabets(model.integers("tokenizer.quantizer.sizes"), channels);
  }

  /** K, codewords of a sub-quantizer at a level. */
  size(level: number, m: number): number {
    return this.#sizes[level * this.numSubquantizers + m];
  }

  /** Where the codewords of a sub-quantizer begin in flat arrays of codewords. */
  start(level: number, m: number): number {
    return this.#starts[level * this.numSubquantizers + m];
  }

  /** Where the values of a sub-quantizer, (K, channels), begin in flat arrays of values. */
  valueStart(level: number, m: number): number {
    return this.#valueStarts[level * this.numSubquantizers + m];
  }

  /** Sub-quantizers whose tokens are sent at a level. */
  numCoded(level: number): number {
    return this.#sizesOf(level).filter((size) => size > 1).length;
  }

  /** Sub-quantizers up to the last one whose tokens are sent at a level; at least 1. */
  end(level: number): number {
    return this.#sizesOf(level).reduce((end, size, m) => (size > 1 ? m + 1 : end), 1);
  }

  /** Sub-quantizers from `first` to `last` (exclusive) at a level, in order. */
  runs(level: number, first: number, last: number): Run[] {
    const runs: Run[] = [];
    for (let begin = first, m = first + 1; m <= last; m++) {
      const size = this.size(level, begin);
      if (m < last && this.size(level, m) === size) continue;
      runs.push({ first: begin, last: m, size });
      begin = m;
    }
    return runs;
  }

  /** Cut what a step sends into blocks of bounded size, in coding order. */
  *blocks(level: number, first: number, last: number, numPositions: number): Generator<Block> {
    for (const run of this.runs(level, first, last).filter(({ size }) => size > 1)) {
      const tokens = Math.max(1, Math.floor(CHUNK_FREQUENCIES / run.size));
      const rows = Math.max(1, Math.floor(tokens / numPositions));
      for (let m = run.first; m < run.last; m += rows) {
        for (const [begin, end] of rows === 1 ? cuts(numPositions, tokens) : [[0, numPositions]]) {
          yield { first: m, last: Math.min(m + rows, run.last), size: run.size, begin, end };
        }
      }
    }
  }

  #sizesOf(level: number): readonly number[] {
    return this.#sizes.slice(level * this.numSubquantizers, (level + 1) * this.numSubquantizers);
  }
}

/** Where each of several parts begins that lie one after the other. */
function startsOf(sizes: readonly number[]): number[] {
  let end = 0;
  return sizes.map((size) => (end += size) - size);
}
