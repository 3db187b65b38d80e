/** Attention of the entropy network's layers, window by window, so that memory is bounded. */

import type { EntropyNetwork, Layer } from "./entropyNetwork.js";
import { gather, orderOf, OUTSIDE, type GridPlan } from "./gridPlan.js";
import type { ModelConfig, ModelFile } from "./modelFile.js";
import { cuts, pick } from "./rows.js";
import { NUM_QUINCUNX_STEPS } from "./schedule.js";

/** Keys in windows that are worked on at a time. */
const CHUNK_KEYS = 512;

/** Quincunx steps: the first one and the end of those that positions are of, and the end of those that are seen. */
export type Places = readonly [begin: number, end: number, seen: number];
export const EVERYWHERE: Places = [0, NUM_QUINCUNX_STEPS, NUM_QUINCUNX_STEPS];

/** Whom the rows of a layer attend to. */
export interface Attended {
  readonly places: Places;
  /** (h * w), where there is content; null = at all places that are seen. */
  readonly isKnown: Uint8Array | null;
  /** (W, T, 2 C), keys and values of content; null = those of the rows, for this time alone. */
  readonly keysValues: Uint8Array | null;
  /** Whether keys and values of the rows are to be put there. */
  readonly keeps: boolean;
}

export class Attention {
  readonly #model: ModelFile;
  readonly #network: EntropyNetwork;
  readonly #config: ModelConfig;
  readonly #biases = new Map<string, Float32Array>();

  constructor(model: ModelFile, network: EntropyNetwork) {
    this.#model = model;
    this.#network = network;
    this.#config = model.metadata.config;
  }

  /**
   * What rows take from the content of their windows: (n, C), or null for the last layer of content, which nothing
   * follows.
   *
   * @param positions of the rows.
   * @param x (n, C).
   * @param seen (h * w + 1, C / 2), what neighbors mix in.
   */
  async attend(
    plan: GridPlan,
    layer: Layer,
    positions: Int32Array,
    x: Uint8Array,
    seen: Uint8Array,
    { places, isKnown, keysValues, keeps }: Attended,
  ): Promise<Uint8Array | null> {
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
    const size = Math.max(1, Math.floor(CHUNK_KEYS / Math.max(numQueries, numKeys)));
    for (const [from, to] of cuts(windows.count, size)) {
      const at = new Int32Array((to - from) * numQueries);
      for (let w = from; w < to; w++) {
        const start = w * numPlaces;
        at.set(windows.positions.subarray(start + begin, start + end), (w - from) * numQueries);
      }
      const gathered = gather(x, at.map((position) => rowOf[position]), seen, at, plan, width);
      const own = keysValues === null || keeps ? await this.#network.keysValues(layer.number, gathered) : null;
      let here = own;
      if (keysValues !== null) {
        here = new Uint8Array((to - from) * numKeys * 2 * width);
        for (let w = from; w < to; w++) {
          const start = w * numPlaces;
          if (own !== null) {
            const part = own.subarray((w - from) * numQueries * 2 * width, (w - from + 1) * numQueries * 2 * width);
            keysValues.set(part, (start + begin) * 2 * width);
          }
          const known = keysValues.subarray(start * 2 * width, (start + numKeys) * 2 * width);
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
}
