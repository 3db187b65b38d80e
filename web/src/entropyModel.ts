/**
 * The entropy model: known tokens -> range-coder frequencies, the same integers on every machine.
 *
 * This module cuts the grid into windows and chunks of rows, so that memory is bounded, and keeps what is computed for
 * known tokens: content of the first group's tokens is worked on once, when the step that codes it is over; later groups
 * pass over all positions.
 */

import { EntropyNetwork, layersOf, type Layer, type Rows } from "./entropyNetwork.js";
import { gather, gridPlan, orderOf, OUTSIDE, type GridPlan } from "./gridPlan.js";
import type { ModelFile } from "./modelFile.js";
import { groupBounds, NUM_QUINCUNX_STEPS, scheduleOf, type Step } from "./schedule.js";
import type { TokenGrid } from "./tokenGrid.js";

/** Positions that are worked on at a time, and keys in windows. */
const CHUNK_ROWS = 512;
const CHUNK_TOKENS = 1 << 11;
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

/** Quincunx steps: the first one and the end of those that positions are of, and the end of those that are seen. */
type Places = readonly [begin: number, end: number, seen: number];
const EVERYWHERE: Places = [0, NUM_QUINCUNX_STEPS, NUM_QUINCUNX_STEPS];

/** What the first group's layers keep of known tokens, by layer. */
interface Content {
  /** (h * w + 1, C / 2), what neighbors mix in before attention, and before the feed-forward part. */
  readonly forAttention: Map<number, Uint8Array>;
  readonly forFeed: Map<number, Uint8Array>;
  /** (W, T, 2 C). */
  readonly keysValues: Map<number, Uint8Array>;
}

/** What is known of a grid while it is read. */
export class EntropyState {
  readonly plan: GridPlan;
  /** Residual stream of all positions, as the next pass of a later group begins with it. */
  stream: Rows;
  /** That of the positions which the present later group has coded. */
  output: Rows | null = null;
  content: Content = { forAttention: new Map(), forFeed: new Map(), keysValues: new Map() };
  /** Tokens of the first group whose content is not yet computed. */
  waiting: { step: Step; positions: Int32Array; sums: Float32Array } | null = null;

  constructor(
    readonly level: number,
    height: number,
    width: number,
    window: number,
    channels: number,
  ) {
    this.plan = gridPlan(height, width, window);
    this.stream = emptyRows(height * width, channels);
  }
}

export class EntropyModel {
  readonly numSubquantizers: number;
  readonly numCodewords: number;
  readonly numLevels: number;
  readonly steps: readonly Step[];
  /** First and last (exclusive) sub-quantizer of each group. */
  readonly groups: readonly (readonly [number, number])[];
  readonly #model: ModelFile;
  readonly #network: EntropyNetwork;
  readonly #config: ModelFile["metadata"]["config"];
  readonly #layers: readonly (readonly Layer[])[];
  /** (L, K, D'): features of the codewords. */
  readonly #tokenValues: Int8Array;
  /** (L, m, K): of the first step. */
  readonly #firstFrequencies: Int32Array;
  /** Columns of each sub-quantizer begin here; (M + 1). */
  readonly #boundaries: readonly number[];
  readonly #biases = new Map<string, Float32Array>();

  private constructor(model: ModelFile, network: EntropyNetwork) {
    const { config } = model.metadata;
    this.#model = model;
    this.#config = config;
    this.#network = network;
    this.#layers = layersOf(model);
    this.#boundaries = model.integers("tokenizer.quantizer.boundaries_tensor");
    this.#tokenValues = model.int8("entropy.token_values");
    this.#firstFrequencies = model.int32("entropy.first_frequencies");
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
    return new EntropyState(level, height, width, this.#config.window, this.#config.width);
  }

  /**
   * Run the network for a step, with all tokens of earlier steps revealed: (m, n, R), what `frequencies` are made of;
   * null for the first step, which needs no network.
   */
  async head(state: EntropyState, step: Step, positions: Int32Array): Promise<Uint8Array | null> {
    if (step === this.steps[0]) return null;
    await this.#finishContent(state);
    let output: Rows;
    if (step.group === 0) {
      const sums = this.#sums(0, state.level, new Int32Array(1), () => null);
      const [h, x] = await this.#network.embed(0, new Float32Array(sums.length), sums);
      const queries: Rows = [repeated(h, positions.length), repeated(x, positions.length)];
      const places: Places = [step.begin, step.end, step.begin];
      output = (await this.#firstLayers(state, positions, queries, places, null, false)).output;
    } else {
      state.output ??= emptyRows(state.plan.count, this.#config.width);
      output = await this.#laterLayers(state, step.group, positions);
      put(state.output, positions, output);
    }
    return this.#head(output[1], step.group);
  }

  /**
   * Make the tokens of a step known.
   *
   * @param tokens (M, h * w).
   */
  async reveal(state: EntropyState, step: Step, positions: Int32Array, tokens: Uint16Array): Promise<void> {
    const isEnd = !this.steps.some((other) => other.group === step.group && other.begin > step.begin);
    if (isEnd && step.group === this.groups.length - 1) return; // nobody asks for more
    const { count } = state.plan;
    const sums = this.#sums(step.group, state.level, positions, (m, position) => tokens[m * count + position]);
    if (step.group === 0) {
      await this.#finishContent(state);
      state.waiting = { step, positions, sums };
      return;
    }
    for (const stream of isEnd ? [state.output!] : [state.output!, state.stream]) {
      const h = pick(stream[0], positions, this.#config.width);
      put(stream, positions, await this.#embed(step.group, h, sums));
    }
    if (isEnd) [state.stream, state.output] = [state.output!, null];
  }

  /**
   * Run the network for any set of known tokens: for each group the head (m, n, R) at the n positions where any of its
   * tokens are unknown; each when it is asked for.
   */
  async *headsOfKnown(
    grid: TokenGrid,
    level: number,
  ): AsyncGenerator<{ head: Uint8Array; positions: Int32Array }> {
    const state = this.start(grid.height, grid.width, level);
    const { count } = state.plan;
    const all = Int32Array.from({ length: count }, (_, position) => position);
    const token = (m: number, position: number) => {
      const at = m * count + position;
      return grid.known[at] === 1 ? grid.tokens[at] : null;
    };
    const numKnown = (group: number, position: number) => {
      let number = 0;
      for (let m = this.groups[group][0]; m < this.groups[group][1]; m++) number += grid.known[m * count + position];
      return number;
    };
    const size = (group: number) => this.groups[group][1] - this.groups[group][0];
    const content = all.filter((position) => numKnown(0, position) > 0);
    const queries = all.filter((position) => numKnown(0, position) < size(0));
    const isKnown = new Uint8Array(count);
    for (const position of content) isKnown[position] = 1;
    const run = async (positions: Int32Array, isContent: boolean) => {
      const sums = this.#sums(0, level, positions, token);
      const rows = await this.#embed(0, new Float32Array(sums.length), sums);
      return this.#firstLayers(state, positions, rows, EVERYWHERE, isKnown, isContent);
    };
    put(state.stream, content, (await run(content, true)).before);
    const { before, output } = await run(queries, false);
    put(state.stream, queries, before);
    yield { head: await this.#head(output[1], 0), positions: queries };
    for (let group = 1; group < this.groups.length; group++) {
      const here = all.filter((position) => numKnown(group, position) > 0);
      const sums = this.#sums(group, level, here, token);
      put(state.stream, here, await this.#embed(group, pick(state.stream[0], here, this.#config.width), sums));
      state.stream = await this.#laterLayers(state, group, all);
      const positions = all.filter((position) => numKnown(group, position) < size(group));
      yield { head: await this.#head(pick(state.stream[1], positions, this.#config.width), group), positions };
    }
  }

  /** Frequencies (m, n, K) of a block: `head` is that of the block's group, null that of the first step. */
  async frequencies(head: Uint8Array | null, group: number, level: number, block: Block): Promise<Int32Array> {
    const rows = block.last - block.first;
    const columns = block.end - block.begin;
    const [first, last] = this.groups[group];
    if (head === null) {
      const k = this.numCodewords;
      const static_ = this.#firstFrequencies.subarray(level * last * k, (level + 1) * last * k);
      const frequencies = new Int32Array(rows * columns * k);
      for (let row = 0; row < rows * columns; row++) {
        const m = block.first + Math.floor(row / columns);
        frequencies.set(static_.subarray(m * k, (m + 1) * k), row * k);
      }
      return frequencies;
    }
    const rank = this.#config.token_rank;
    const count = head.length / rank / (last - first);
    const start = ((block.first - first) * count + block.begin) * rank; // one run: more rows only with all columns
    return this.#network.frequencies(head.subarray(start, start + rows * columns * rank), level, block.first, rows);
  }

  /** Run the content that waits through the layers of the first group. */
  async #finishContent(state: EntropyState): Promise<void> {
    if (state.waiting === null) return;
    const { step, positions, sums } = state.waiting;
    state.waiting = null;
    const rows = await this.#embed(0, new Float32Array(sums.length), sums);
    const places: Places = [step.begin, step.end, step.end];
    put(state.stream, positions, (await this.#firstLayers(state, positions, rows, places, null, true)).before);
  }

  /**
   * The layers of the first group: rows before the last layer, and, of queries, behind it.
   *
   * @param isKnown (h * w), where there is content; null = at all places that are seen.
   * @param isContent whether the rows are content, which is kept, or queries.
   */
  async #firstLayers(
    state: EntropyState,
    positions: Int32Array,
    rows: Rows,
    places: Places,
    isKnown: Uint8Array | null,
    isContent: boolean,
  ): Promise<{ before: Rows; output: Rows }> {
    const { content, plan } = state;
    const half = this.#config.width / 2;
    const shown = (kept: Map<number, Uint8Array>, layer: Layer, x: Uint8Array) => {
      const seen = kept.get(layer.number) ?? new Uint8Array((plan.count + 1) * half).fill(ZERO);
      kept.set(layer.number, seen);
      if (isContent) show(seen, positions, x, half);
      return seen;
    };
    let before = rows;
    for (const layer of this.#layers[0]) {
      if (layer.isLast) before = rows;
      if (layer.hasAttention) {
        const numPlaces = plan.windows[Number(layer.isShifted)].positions.length;
        const kv = content.keysValues.get(layer.number) ?? new Uint8Array(numPlaces * 4 * half).fill(ZERO);
        content.keysValues.set(layer.number, kv);
        const seen = shown(content.forAttention, layer, rows[1]);
        const mixed = await this.#attend(state, layer, positions, rows[1], seen, places, isKnown, kv, isContent);
        if (mixed === null) break;
        rows = await this.#project(layer, rows[0], mixed);
      } else if (isContent && layer.isLast) {
        break;
      }
      rows = await this.#feed(state, layer, positions, rows, layer.isLast ? null : shown(content.forFeed, layer, rows[1]));
    }
    return { before, output: rows };
  }

  /** The layers of a later group, in which all positions see all; the output is for those that are wanted. */
  async #laterLayers(state: EntropyState, group: number, wanted: Int32Array): Promise<Rows> {
    const { count } = state.plan;
    const { width } = this.#config;
    const all = Int32Array.from({ length: count }, (_, position) => position);
    const shown = (x: Uint8Array) => {
      const seen = new Uint8Array(((count + 1) * width) / 2).fill(ZERO);
      show(seen, all, x, width / 2);
      return seen;
    };
    let rows = state.stream;
    for (const layer of this.#layers[group]) {
      if (layer.hasAttention) {
        const mixed = await this.#attend(state, layer, all, rows[1], shown(rows[1]), EVERYWHERE, null, null, false);
        rows = await this.#project(layer, rows[0], mixed!);
      }
      if (layer.isLast) {
        const last: Rows = [pick(rows[0], wanted, width), pick(rows[1], wanted, width)];
        return this.#feed(state, layer, wanted, last, null);
      }
      rows = await this.#feed(state, layer, all, rows, shown(rows[1]));
    }
    return rows;
  }

  /**
   * Attention of a layer: (n, C), or null for the last one of content, which nothing follows.
   *
   * @param kv keys and values of content; null = those of the positions, for this time alone.
   * @param keeps whether those of the positions are to be put there.
   */
  async #attend(
    state: EntropyState,
    layer: Layer,
    positions: Int32Array,
    x: Uint8Array,
    seen: Uint8Array,
    places: Places,
    isKnown: Uint8Array | null,
    kv: Uint8Array | null,
    keeps: boolean,
  ): Promise<Uint8Array | null> {
    const { plan } = state;
    const { width } = this.#config;
    const windows = plan.windows[Number(layer.isShifted)];
    const [begin, end, numKeys] = places.map((place) => windows.ends[place]);
    const numPlaces = windows.order.length;
    const numQueries = end - begin;
    const rowOf = new Int32Array(plan.count + 1).fill(positions.length);
    positions.forEach((position, row) => (rowOf[position] = row));
    const bias = this.#bias(layer, begin, end, numKeys);
    const isWanted = !(keeps && layer.isLast);
    const mixed = new Uint8Array(isWanted ? windows.count * numQueries * width : 0);
    const size = Math.max(1, Math.floor(CHUNK_ROWS / Math.max(numQueries, numKeys)));
    for (const [from, to] of cuts(windows.count, size)) {
      const at = new Int32Array((to - from) * numQueries);
      for (let w = from; w < to; w++) {
        const start = w * numPlaces;
        at.set(windows.positions.subarray(start + begin, start + end), (w - from) * numQueries);
      }
      const gathered = gather(x, at.map((position) => rowOf[position]), seen, at, plan, width);
      const own = kv === null || keeps ? await this.#network.keysValues(layer.number, gathered) : null;
      let here = own;
      if (kv !== null) {
        here = new Uint8Array((to - from) * numKeys * 2 * width);
        for (let w = from; w < to; w++) {
          const start = w * numPlaces;
          if (own !== null) {
            const part = own.subarray((w - from) * numQueries * 2 * width, (w - from + 1) * numQueries * 2 * width);
            kv.set(part, (start + begin) * 2 * width);
          }
          const known = kv.subarray(start * 2 * width, (start + numKeys) * 2 * width);
          here.set(known, (w - from) * numKeys * 2 * width);
        }
      }
      if (!isWanted) continue;
      const mask = new Float32Array((to - from) * numKeys);
      for (let key = 0; key < mask.length; key++) {
        const position = windows.positions[(from + Math.floor(key / numKeys)) * numPlaces + (key % numKeys)];
        if (position === plan.count || (isKnown !== null && isKnown[position] === 0)) mask[key] = OUTSIDE;
      }
      mixed.set(
        await this.#network.attend(layer.number, to - from, gathered, here!, bias, mask),
        from * numQueries * width,
      );
    }
    if (!isWanted) return null;
    const rows = positions.map((position) => {
      const place = windows.placeOf[position];
      return Math.floor(place / numPlaces) * numQueries + (place % numPlaces) - begin;
    });
    return pick(mixed, rows, width);
  }

  /** Position bias (heads, Q, T) of the places from `begin` to `end` towards the first ones. */
  #bias(layer: Layer, begin: number, end: number, numKeys: number): Float32Array {
    const key = [layer.number, begin, end, numKeys].join();
    const made = this.#biases.get(key);
    if (made !== undefined) return made;
    const { window, width, head_width: headWidth } = this.#config;
    const table = this.#model.int32(`entropy.layers.${layer.number}.attention.position_bias`);
    const order = orderOf(window, layer.isShifted);
    const heads = width / headWidth;
    const bias = new Float32Array(heads * (end - begin) * numKeys);
    for (let head = 0, i = 0; head < heads; head++) {
      for (let query = begin; query < end; query++) {
        for (let place = 0; place < numKeys; place++) {
          const dy = Math.floor(order[query] / window) - Math.floor(order[place] / window);
          const dx = (order[query] % window) - (order[place] % window);
          bias[i++] = table[((dy + window - 1) * (2 * window - 1) + dx + window - 1) * heads + head];
        }
      }
    }
    this.#biases.set(key, bias);
    return bias;
  }

  async #project(layer: Layer, h: Float32Array, mixed: Uint8Array): Promise<Rows> {
    return this.#rows(h.length, (begin, end) =>
      this.#network.project(layer.number, h.subarray(begin, end), mixed.subarray(begin, end)),
    );
  }

  /** Feed-forward part, on channels of neighbors too or on each position's own. */
  async #feed(
    state: EntropyState,
    layer: Layer,
    positions: Int32Array,
    [h, x]: Rows,
    seen: Uint8Array | null,
  ): Promise<Rows> {
    const { width } = this.#config;
    return this.#rows(h.length, (begin, end) => {
      const own = x.subarray(begin, end);
      const here = positions.subarray(begin / width, end / width);
      const mixed = seen && gather(own, here.map((_, row) => row), seen, here, state.plan, width);
      return this.#network.feed(layer.number, h.subarray(begin, end), mixed ?? own);
    });
  }

  async #embed(group: number, h: Float32Array, sums: Float32Array): Promise<Rows> {
    return this.#rows(h.length, (begin, end) =>
      this.#network.embed(group, h.subarray(begin, end), sums.subarray(begin, end)),
    );
  }

  /**
   * Products (n, C) of the features of a group's tokens with the embedding; in the first group with what stands for the
   * level.
   *
   * @param token of a sub-quantizer at a position; null = unknown.
   */
  #sums(
    group: number,
    level: number,
    positions: Int32Array,
    token: (m: number, position: number) => number | null,
  ): Float32Array {
    const { width } = this.#config;
    const [first, last] = this.groups[group];
    const weight = this.#model.int8(`entropy.embed.${group}.weight`);
    const numInputs = weight.length / width;
    const numKept = this.#boundaries[this.numSubquantizers];
    const begin = this.#boundaries[first];
    const flags = this.#boundaries[last] - begin;
    const columns = new Float32Array(weight.length); // transposed
    for (let c = 0; c < width; c++) {
      for (let d = 0; d < numInputs; d++) columns[d * width + c] = weight[c * numInputs + d];
    }
    const sums = new Float32Array(positions.length * width);
    const start = new Float32Array(width);
    if (group === 0) {
      start.set(this.#model.int32("entropy.embed.0.bias"));
      const column = (numInputs - this.numLevels + level) * width;
      for (let c = 0; c < width; c++) start[c] += FLAG * columns[column + c];
    }
    positions.forEach((position, row) => {
      const at = row * width;
      sums.set(start, at);
      const add = (value: number, column: number) => {
        for (let c = 0; c < width; c++) sums[at + c] += value * columns[column * width + c];
      };
      for (let m = first; m < last; m++) {
        const codeword = token(m, position);
        if (codeword === null) continue;
        add(FLAG, flags + m - first);
        const values = (level * this.numCodewords + codeword) * numKept;
        for (let d = this.#boundaries[m]; d < this.#boundaries[m + 1]; d++) {
          if (this.#tokenValues[values + d] !== 0) add(this.#tokenValues[values + d], d - begin);
        }
      }
    });
    return sums;
  }

  /** Output of the network (n, C) -> what the frequencies of a group are made of, (m, n, R). */
  async #head(hidden: Uint8Array, group: number): Promise<Uint8Array> {
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

  /** Run a part on all rows of `length` values together, in chunks that are told as ranges of values. */
  async #rows(length: number, compute: (begin: number, end: number) => Promise<Rows>): Promise<Rows> {
    const { width } = this.#config;
    const rows = emptyRows(length / width, width);
    for (const [begin, end] of cuts(length / width, CHUNK_ROWS)) {
      const [h, x] = await compute(begin * width, end * width);
      rows[0].set(h, begin * width);
      rows[1].set(x, begin * width);
    }
    return rows;
  }
}

function emptyRows(count: number, width: number): Rows {
  return [new Float32Array(count * width), new Uint8Array(count * width).fill(ZERO)];
}

/** Overwrite some rows. */
function put([h, x]: Rows, positions: Int32Array, rows: Rows): void {
  const width = positions.length === 0 ? 0 : rows[0].length / positions.length;
  positions.forEach((position, row) => {
    h.set(rows[0].subarray(row * width, (row + 1) * width), position * width);
    x.set(rows[1].subarray(row * width, (row + 1) * width), position * width);
  });
}

/** Put the second halves of some positions' channels where others look. */
function show(seen: Uint8Array, positions: Int32Array, x: Uint8Array, half: number): void {
  positions.forEach((position, row) => seen.set(x.subarray((2 * row + 1) * half, (2 * row + 2) * half), position * half));
}

/** One row, many times. */
function repeated<T extends Uint8Array | Float32Array>(row: T, count: number): T {
  const rows = row instanceof Uint8Array ? new Uint8Array(count * row.length) : new Float32Array(count * row.length);
  for (let i = 0; i < count; i++) rows.set(row, i * row.length);
  return rows as T;
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
