/**
 * The entropy model: known tokens -> range-coder frequencies, the same integers on every machine.
 *
 * This module goes through the steps and keeps what is computed for known tokens: content of the first group's tokens is
 * worked on once, when the step that codes it is over; later groups pass over all positions.
 */

import { Alphabets, type Block } from "./alphabets.js";
import { EVERYWHERE, type Places } from "./attention.js";
import { Embedding, type TokenAt } from "./embedding.js";
import { Content, EntropyLayers } from "./entropyLayers.js";
import { EntropyNetwork } from "./entropyNetwork.js";
import { gridPlan, type GridPlan } from "./gridPlan.js";
import type { ModelConfig, ModelFile } from "./modelFile.js";
import { emptyRows, pick, put, range, repeated, type Rows } from "./rows.js";
import { groupBounds, scheduleOf, type Step } from "./schedule.js";
import type { TokenGrid } from "./tokenGrid.js";

/** What is known of a grid while it is read. */
export class EntropyState {
  readonly plan: GridPlan;
  readonly content: Content;
  /** Residual stream of all positions, as the next pass of a later group begins with it. */
  stream: Rows;
  /** That of the positions which the present later group has coded, as the group after it begins. */
  output: Rows | null = null;
  /** Tokens of the first group whose content is not yet computed. */
  waiting: { step: Step; positions: Int32Array; sums: Float32Array } | null = null;

  constructor(
    readonly level: number,
    height: number,
    width: number,
    { window, width: channels }: ModelConfig,
  ) {
    this.plan = gridPlan(height, width, window);
    this.content = new Content(this.plan);
    this.stream = emptyRows(height * width, channels);
  }
}

export class EntropyModel {
  readonly alphabets: Alphabets;
  /** First and last (exclusive) sub-quantizer of each group. */
  readonly groups: readonly (readonly [number, number])[];
  readonly #steps: readonly Step[];
  readonly #network: EntropyNetwork;
  readonly #config: ModelConfig;
  readonly #layers: EntropyLayers;
  readonly #embedding: Embedding;
  /** (N): those of the first step. */
  readonly #staticFrequencies: Int32Array;

  private constructor(model: ModelFile, network: EntropyNetwork) {
    const { config } = model.metadata;
    this.alphabets = Alphabets.of(model);
    this.groups = groupBounds(this.alphabets.numSubquantizers, config.group_steps.length, config.group_sizes);
    this.#steps = scheduleOf(this.groups, config.group_steps);
    this.#network = network;
    this.#config = config;
    this.#layers = new EntropyLayers(model, network);
    this.#embedding = new Embedding(model);
    this.#staticFrequencies = model.int32("entropy.static_frequencies");
  }

  static async create(model: ModelFile): Promise<EntropyModel> {
    return new EntropyModel(model, await EntropyNetwork.create(model));
  }

  /** How integer products are computed. */
  get kernel(): string {
    return this.#network.kernel;
  }

  /** Steps in which there is anything to code at a level, or in a later step. */
  steps(level: number): readonly Step[] {
    const end = this.alphabets.end(level);
    return this.#steps.filter((step) => step.first < end);
  }

  /** State of a grid of which nothing is known but its level. */
  start(height: number, width: number, level: number): EntropyState {
    return new EntropyState(level, height, width, this.#config);
  }

  /**
   * Run the network for a step, with all tokens of earlier steps revealed: (m, n, R), what `frequencies` are made of;
   * null for the first step, which needs no network.
   */
  async head(state: EntropyState, step: Step, positions: Int32Array): Promise<Uint8Array | null> {
    if (step === this.#steps[0]) return null;
    await this.#finishContent(state);
    let output: Rows;
    if (step.group === 0) {
      const sums = this.#sums(0, state.level, new Int32Array(1), () => null);
      const [h, x] = await this.#layers.embed(0, new Float32Array(sums.length), sums);
      const queries: Rows = [repeated(h, positions.length), repeated(x, positions.length)];
      const places: Places = [step.begin, step.end, step.begin];
      output = (await this.#layers.first(state.content, positions, queries, places, null, false)).output;
    } else {
      output = await this.#layers.later(state.plan, state.stream, step.group, positions);
      if (step.group < this.groups.length - 1) {
        state.output ??= emptyRows(state.plan.count, this.#config.width);
        put(state.output, positions, output);
      }
    }
    return this.#layers.head(step.group, output[1]);
  }

  /**
   * Make the tokens of a step known.
   *
   * @param tokens (M, h * w).
   */
  async reveal(state: EntropyState, step: Step, positions: Int32Array, tokens: Uint16Array): Promise<void> {
    const steps = this.steps(state.level);
    if (step === steps[steps.length - 1]) return; // nobody asks for more
    const isEnd = !steps.some(({ group, begin }) => group === step.group && begin > step.begin);
    const { count } = state.plan;
    const sums = this.#sums(step.group, state.level, positions, (m, position) => tokens[m * count + position]);
    if (step.group === 0) {
      await this.#finishContent(state);
      state.waiting = { step, positions, sums };
      return;
    }
    for (const stream of [state.output, isEnd ? null : state.stream]) {
      if (stream === null) continue;
      const h = pick(stream[0], positions, this.#config.width);
      put(stream, positions, await this.#layers.embed(step.group, h, sums));
    }
    if (isEnd && state.output !== null) [state.stream, state.output] = [state.output, null];
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
    const all = range(count);
    const token: TokenAt = (m, position) => {
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
      const rows = await this.#layers.embed(0, new Float32Array(sums.length), sums);
      return this.#layers.first(state.content, positions, rows, EVERYWHERE, isKnown, isContent);
    };
    put(state.stream, content, (await run(content, true)).before);
    const { before, output } = await run(queries, false);
    put(state.stream, queries, before);
    yield { head: await this.#layers.head(0, output[1]), positions: queries };
    for (let group = 1; group < this.groups.length; group++) {
      const here = all.filter((position) => numKnown(group, position) > 0);
      const h = pick(state.stream[0], here, this.#config.width);
      put(state.stream, here, await this.#layers.embed(group, h, this.#sums(group, level, here, token)));
      state.stream = await this.#layers.later(state.plan, state.stream, group, all);
      const positions = all.filter((position) => numKnown(group, position) < size(group));
      const hidden = pick(state.stream[1], positions, this.#config.width);
      yield { head: await this.#layers.head(group, hidden), positions };
    }
  }

  /** Frequencies (m, n, K) of a block: `head` is that of the block's group, null that of the first step. */
  async frequencies(head: Uint8Array | null, group: number, level: number, block: Block): Promise<Int32Array> {
    const rows = block.last - block.first;
    const columns = block.end - block.begin;
    if (head === null) {
      const frequencies = new Int32Array(rows * columns * block.size);
      for (let row = 0; row < rows * columns; row++) {
        const start = this.alphabets.start(level, block.first + Math.floor(row / columns));
        frequencies.set(this.#staticFrequencies.subarray(start, start + block.size), row * block.size);
      }
      return frequencies;
    }
    const rank = this.#config.token_rank;
    const [first, last] = this.groups[group];
    const count = head.length / rank / (last - first);
    const start = ((block.first - first) * count + block.begin) * rank; // one stretch: more rows only with all columns
    return this.#network.frequencies(head.subarray(start, start + rows * columns * rank), level, block);
  }

  /** Run the content that waits through the layers of the first group. */
  async #finishContent(state: EntropyState): Promise<void> {
    if (state.waiting === null) return;
    const { step, positions, sums } = state.waiting;
    state.waiting = null;
    const rows = await this.#layers.embed(0, new Float32Array(sums.length), sums);
    const places: Places = [step.begin, step.end, step.end];
    const { before } = await this.#layers.first(state.content, positions, rows, places, null, true);
    put(state.stream, positions, before);
  }

  #sums(group: number, level: number, positions: Int32Array, token: TokenAt): Float32Array {
    return this.#embedding.sums(group, this.groups[group], level, positions, token);
  }
}
