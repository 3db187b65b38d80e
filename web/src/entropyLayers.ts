/** The layers of the entropy network on any positions of a grid, in chunks of rows, so that memory is bounded. */

import { Attention, EVERYWHERE, type Places } from "./attention.js";
import { layersOf, type EntropyNetwork, type Layer } from "./entropyNetwork.js";
import { gather, type GridPlan } from "./gridPlan.js";
import type { ModelConfig, ModelFile } from "./modelFile.js";
import { cuts, emptyRows, pick, range, ZERO, type Rows } from "./rows.js";

/** Positions that are worked on at a time. */
const CHUNK_ROWS = 512;

/** What the first group's layers keep of known tokens and show to others, by layer. */
export class Content {
  /** (h * w + 1, C / 2), what neighbors mix in before attention, and before the feed-forward part. */
  readonly forAttention = new Map<number, Uint8Array>();
  readonly forFeed = new Map<number, Uint8Array>();
  /** (W, T, 2 C), keys and values at the places of the layer's windows. */
  readonly keysValues = new Map<number, Uint8Array>();

  constructor(readonly plan: GridPlan) {}
}

export class EntropyLayers {
  readonly #network: EntropyNetwork;
  readonly #config: ModelConfig;
  readonly #layers: readonly (readonly Layer[])[];
  readonly #attention: Attention;

  constructor(model: ModelFile, network: EntropyNetwork) {
    this.#network = network;
    this.#config = model.metadata.config;
    this.#layers = layersOf(model);
    this.#attention = new Attention(model, network);
  }

  /**
   * The layers of the first group: rows before the last layer, and, of queries, behind it.
   *
   * @param positions of the rows.
   * @param isKnown (h * w), where there is content; null = at all places that are seen.
   * @param isContent whether the rows are content, which is kept, or queries.
   */
  async first(
    content: Content,
    positions: Int32Array,
    rows: Rows,
    places: Places,
    isKnown: Uint8Array | null,
    isContent: boolean,
  ): Promise<{ before: Rows; output: Rows }> {
    const { plan } = content;
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
        const keysValues = content.keysValues.get(layer.number) ?? new Uint8Array(numPlaces * 4 * half).fill(ZERO);
        content.keysValues.set(layer.number, keysValues);
        const seen = shown(content.forAttention, layer, rows[1]);
        const attended = { places, isKnown, keysValues, keeps: isContent };
        const mixed = await this.#attention.attend(plan, layer, positions, rows[1], seen, attended);
        if (mixed === null) break;
        rows = await this.#project(layer, rows[0], mixed);
      } else if (isContent && layer.isLast) {
        break;
      }
      const seen = layer.isLast ? null : shown(content.forFeed, layer, rows[1]);
      rows = await this.#feed(plan, layer, positions, rows, seen);
    }
    return { before, output: rows };
  }

  /** The layers of a later group, in which all positions see all; the output is for those that are wanted. */
  async later(plan: GridPlan, stream: Rows, group: number, wanted: Int32Array): Promise<Rows> {
    const { width } = this.#config;
    const all = range(plan.count);
    const shown = (x: Uint8Array) => {
      const seen = new Uint8Array(((plan.count + 1) * width) / 2).fill(ZERO);
      show(seen, all, x, width / 2);
      return seen;
    };
    const attended = { places: EVERYWHERE, isKnown: null, keysValues: null, keeps: false };
    let rows = stream;
    for (const layer of this.#layers[group]) {
      if (layer.hasAttention) {
        const mixed = await this.#attention.attend(plan, layer, all, rows[1], shown(rows[1]), attended);
        rows = await this.#project(layer, rows[0], mixed!);
      }
      if (layer.isLast) {
        const last: Rows = [pick(rows[0], wanted, width), pick(rows[1], wanted, width)];
        return this.#feed(plan, layer, wanted, last, null);
      }
      rows = await this.#feed(plan, layer, all, rows, shown(rows[1]));
    }
    return rows;
  }

  /** Add embedding sums (n, C) of tokens of a group to the residual stream. */
  async embed(group: number, h: Float32Array, sums: Float32Array): Promise<Rows> {
    return this.#rows(h.length, (begin, end) =>
      this.#network.embed(group, h.subarray(begin, end), sums.subarray(begin, end)),
    );
  }

  /** Output of the network (n, C) -> what the frequencies of the m sub-quantizers of a group are made of, (m, n, R). */
  async head(group: number, hidden: Uint8Array): Promise<Uint8Array> {
    const { width, token_rank: rank } = this.#config;
    const count = hidden.length / width;
    let head = new Uint8Array(0);
    for (const [begin, end] of cuts(count, CHUNK_ROWS)) {
      const part = await this.#network.head(group, hidden.subarray(begin * width, end * width));
      const size = (end - begin) * rank;
      const m = part.length / size;
      if (begin === 0) head = new Uint8Array(m * count * rank);
      for (let i = 0; i < m; i++) head.set(part.subarray(i * size, (i + 1) * size), (i * count + begin) * rank);
    }
    return head;
  }

  async #project(layer: Layer, h: Float32Array, mixed: Uint8Array): Promise<Rows> {
    return this.#rows(h.length, (begin, end) =>
      this.#network.project(layer.number, h.subarray(begin, end), mixed.subarray(begin, end)),
    );
  }

  /** Feed-forward part, on channels of neighbors too or on each position's own. */
  async #feed(
    plan: GridPlan,
    layer: Layer,
    positions: Int32Array,
    [h, x]: Rows,
    seen: Uint8Array | null,
  ): Promise<Rows> {
    const { width } = this.#config;
    return this.#rows(h.length, (begin, end) => {
      const own = x.subarray(begin, end);
      const here = positions.subarray(begin / width, end / width);
      const mixed = seen && gather(own, range(here.length), seen, here, plan, width);
      return this.#network.feed(layer.number, h.subarray(begin, end), mixed ?? own);
    });
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

/** Put the second halves of some positions' channels where others look. */
function show(seen: Uint8Array, positions: Int32Array, x: Uint8Array, half: number): void {
  positions.forEach((position, row) => seen.set(x.subarray((2 * row + 1) * half, (2 * row + 2) * half), position * half));
}
