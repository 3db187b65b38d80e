/**
 * The entropy model: known tokens -> range-coder frequencies, the same integers on every machine.
 *
 * This module cuts the grid into windows and chunks of rows, so that memory is bounded.
 */

import { EntropyNetwork, type Rows } from "./entropyNetwork.js";
import { gatherChunks, gridPlan, type GridPlan, type Windows } from "./gridPlan.js";
import type { ModelFile } from "./modelFile.js";
import { groupBounds, scheduleOf, type Step } from "./schedule.js";

/** Positions, and windows, worked on at a time. */
const CHUNK_ROWS = 512;
const CHUNK_WINDOWS = 8;
const CHUNK_TOKENS = 1 << 13;
/** The integer that stands for 1 in what is embedded. */
const FLAG = 16;
/** The activation that stands for 0. */
const ZERO = 128;

/** A part of a step: sub-quantizers `first` to `last` of the model, places `begin` to `end` of the step's positions. */
export interface Block {
  readonly first: number;
  readonly last: number;
  readonly begin: number;
  readonly end: number;
}

/** What is kept between steps: the sums of what the tokens known so far add to the input of the network. */
export class EntropyState {
  readonly plan: GridPlan;

  constructor(
    readonly level: number,
    readonly embedded: Float32Array,
    height: number,
    width: number,
    window: number,
  ) {
    this.plan = gridPlan(height, width, window);
  }
}

export class EntropyModel {
  readonly numSubquantizers: number;
  readonly numCodewords: number;
  readonly numLevels: number;
  readonly steps: readonly Step[];
  /** First and last (exclusive) sub-quantizer of each group. */
  readonly groups: readonly (readonly [number, number])[];
  readonly #network: EntropyNetwork;
  readonly #config: ModelFile["metadata"]["config"];
  /** (L, K, D'): features of the codewords. */
  readonly #tokenValues: Int8Array;
  /** (C, D' + M + L): of features, of flags that say which sub-quantizers are known, of the level. */
  readonly #weight: Int8Array;
  readonly #bias: Int32Array;
  /** Columns of each sub-quantizer begin here; (M + 1). */
  readonly #boundaries: readonly number[];

  private constructor(model: ModelFile, network: EntropyNetwork) {
    const { config } = model.metadata;
    this.#config = config;
    this.#network = network;
    this.#boundaries = model.integers("tokenizer.quantizer.boundaries_tensor");
    this.#tokenValues = model.int8("entropy.token_values");
    this.#weight = model.int8("entropy.embed.weight");
    this.#bias = model.int32("entropy.embed.bias");
    this.numSubquantizers = this.#boundaries.length - 1;
    this.numCodewords = config.num_codewords;
    this.numLevels = model.size("entropy.token_values", 0);
    this.steps = scheduleOf(this.numSubquantizers, config.group_steps);
    this.groups = groupBounds(this.numSubquantizers, config.group_steps.length);
  }

  static async create(model: ModelFile): Promise<EntropyModel> {
    return new EntropyModel(model, await EntropyNetwork.create(model));
  }

  /** How integer products are computed. */
  get kernel(): string {
    return this.#network.kernel;
  }

  /** State of a grid of which nothing is known but its level. */
  start(height: number, width: number, level: number): EntropyState {
    const channels = this.#config.width;
    const row = new Float32Array(channels);
    const flag = this.#numKept + this.numSubquantizers + level;
    for (let c = 0; c < channels; c++) row[c] = this.#bias[c] + FLAG * this.#weight[c * this.#numInputs + flag];
    const embedded = new Float32Array(height * width * channels);
    for (let p = 0; p < height * width; p++) embedded.set(row, p * channels);
    return new EntropyState(level, embedded, height, width, this.#config.window);
  }

  /**
   * Make the tokens of sub-quantizers `first` to `last` known at some positions.
   *
   * @param tokens (M, h * w).
   */
  reveal(state: EntropyState, positions: Int32Array, first: number, last: number, tokens: Uint16Array): void {
    const { embedded, level } = state;
    const channels = this.#config.width;
    const numPositions = embedded.length / channels;
    const begin = this.#boundaries[first];
    const flags = new Float32Array(channels);
    const columns = new Float32Array((this.#boundaries[last] - begin) * channels); // of the weight, transposed
    for (let c = 0; c < channels; c++) {
      const row = c * this.#numInputs;
      for (let m = first; m < last; m++) flags[c] += FLAG * this.#weight[row + this.#numKept + m];
      for (let d = begin; d < this.#boundaries[last]; d++) columns[(d - begin) * channels + c] = this.#weight[row + d];
    }
    for (const position of positions) {
      const at = position * channels;
      for (let c = 0; c < channels; c++) embedded[at + c] += flags[c];
      for (let m = first; m < last; m++) {
        const codeword = (level * this.numCodewords + tokens[m * numPositions + position]) * this.#numKept;
        for (let d = this.#boundaries[m]; d < this.#boundaries[m + 1]; d++) {
          const value = this.#tokenValues[codeword + d];
          if (value === 0) continue;
          const column = (d - begin) * channels;
          for (let c = 0; c < channels; c++) embedded[at + c] += value * columns[column + c];
        }
      }
    }
  }

  /** Run the network: (n, C), input of `head`, for the positions where the output is wanted. */
  async hidden(state: EntropyState, positions: Int32Array): Promise<Uint8Array> {
    const { num_layers: numLayers, attention_every: every, width: channels } = this.#config;
    let [h, x] = await this.#rows(state.embedded.length / channels, (begin, end) =>
      this.#network.embed(state.embedded.subarray(begin * channels, end * channels)),
    );
    for (let layer = 0; layer < numLayers; layer++) {
      // After the attention of the last layer nothing looks at other positions.
      const wanted = layer === numLayers - 1 ? positions : null;
      if (layer % every === 0) {
        [h, x] = await this.#attend(layer, h, x, state.plan.windows[(layer / every) % 2], wanted);
      } else if (wanted !== null) {
        [h, x] = [pick(h, wanted, channels), pick(x, wanted, channels)];
      }
      [h, x] = await this.#feed(layer, h, x, wanted === null ? state.plan.shifted : null);
    }
    return x.subarray(0, positions.length * channels);
  }

  /** Inputs of `frequencies` for a group of sub-quantizers: (m, n, R) from `hidden`. */
  async head(hidden: Uint8Array, group: number): Promise<Uint8Array> {
    const { width: channels, token_rank: rank } = this.#config;
    const count = hidden.length / channels;
    const [first, last] = this.groups[group];
    const head = new Uint8Array((last - first) * count * rank);
    for (const [begin, end] of cuts(count, CHUNK_ROWS)) {
      const part = await this.#network.head(group, hidden.subarray(begin * channels, end * channels));
      const size = (end - begin) * rank;
      for (let m = 0; m < last - first; m++) {
        head.set(part.subarray(m * size, (m + 1) * size), (m * count + begin) * rank);
      }
    }
    return head;
  }

  /** Frequencies (m, n, K) of a block: `head` is that of the block's group. */
  async frequencies(head: Uint8Array, group: number, level: number, block: Block): Promise<Int32Array> {
    const [first, last] = this.groups[group];
    const rank = this.#config.token_rank;
    const count = head.length / rank / (last - first);
    const rows = block.last - block.first;
    const start = ((block.first - first) * count + block.begin) * rank; // one run: more rows only with all columns
    const part = head.subarray(start, start + rows * (block.end - block.begin) * rank);
    return this.#network.frequencies(part, level, block.first, rows);
  }

  async #attend(
    layer: number,
    h: Float32Array,
    x: Uint8Array,
    windows: Windows,
    wanted: Int32Array | null,
  ): Promise<Rows> {
    const channels = this.#config.width;
    const numKeys = this.#config.window ** 2;
    const mixed = new Uint8Array(windows.count * numKeys * channels);
    const numSources = windows.source.length / windows.count;
    for (const [begin, end] of cuts(windows.count, CHUNK_WINDOWS)) {
      const gathered = gatherChunks(x, windows.source.subarray(begin * numSources, end * numSources), channels);
      const mask = windows.mask.subarray(begin * numKeys, end * numKeys);
      mixed.set(await this.#network.attend(layer, gathered, mask), begin * numKeys * channels);
    }
    const rowOf = wanted === null ? windows.rowOf : wanted.map((position) => windows.rowOf[position]);
    const stream = wanted === null ? h : pick(h, wanted, channels);
    return this.#rows(rowOf.length, (begin, end) =>
      this.#network.project(
        layer,
        stream.subarray(begin * channels, end * channels),
        pick(mixed, rowOf.subarray(begin, end), channels),
      ),
    );
  }

  /** Feed-forward part, on shifted channels or on each position's own. */
  async #feed(layer: number, h: Float32Array, x: Uint8Array, shifted: Int32Array | null): Promise<Rows> {
    const channels = this.#config.width;
    const numSources = shifted === null ? 0 : shifted.length / (h.length / channels);
    return this.#rows(h.length / channels, (begin, end) => {
      const rows = h.subarray(begin * channels, end * channels);
      const own = x.subarray(begin * channels, end * channels);
      return this.#network.feed(
        layer,
        rows,
        shifted === null ? own : gatherChunks(x, shifted.subarray(begin * numSources, end * numSources), channels),
      );
    });
  }

  /** Run a part on all rows, in chunks: h (n, C), and x (n + 1, C) with a last row for what lies outside. */
  async #rows(count: number, compute: (begin: number, end: number) => Promise<Rows>): Promise<Rows> {
    const channels = this.#config.width;
    const h = new Float32Array(count * channels);
    const x = new Uint8Array((count + 1) * channels).fill(ZERO);
    for (const [begin, end] of cuts(count, CHUNK_ROWS)) {
      const [hPart, xPart] = await compute(begin, end);
      h.set(hPart, begin * channels);
      x.set(xPart, begin * channels);
    }
    return [h, x];
  }

  get #numKept(): number {
    return this.#boundaries[this.numSubquantizers];
  }

  get #numInputs(): number {
    return this.#weight.length / this.#config.width;
  }
}

/** Cut sub-quantizers and positions into blocks of bounded size, in coding order. */
export function* blocksOf(first: number, last: number, numPositions: number): Generator<Block> {
  const rows = Math.max(1, Math.floor(CHUNK_TOKENS / numPositions));
  for (let m = first; m < last; m += rows) {
    for (const [begin, end] of rows === 1 ? cuts(numPositions, CHUNK_TOKENS) : [[0, numPositions]]) {
      yield { first: m, last: Math.min(m + rows, last), begin, end };
    }
  }
}

/** Cut rows into pieces of at most `size`, all about equal. */
function* cuts(count: number, size: number): Generator<[number, number]> {
  const number = Math.ceil(count / size);
  for (let i = 0; i < number; i++) yield [Math.floor((count * i) / number), Math.floor((count * (i + 1)) / number)];
}

/** Rows of an (n, width) array. */
function pick<T extends Uint8Array | Float32Array>(array: T, rows: Int32Array, width: number): T {
  const size = rows.length * width;
  const picked = array instanceof Uint8Array ? new Uint8Array(size) : new Float32Array(size);
  rows.forEach((row, i) => picked.set(array.subarray(row * width, (row + 1) * width), i * width));
  return picked as T;
}
