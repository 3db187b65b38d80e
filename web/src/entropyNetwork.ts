/**
 * The parts of the entropy model's network, on chunks of rows, and the check that they are exact here.
 *
 * The residual stream h is (n, C) float32 that carries integers, activations x are (n, C) uint8 in which 128 stands
 * for 0. docs/exactness.md says why each part has the same result on every machine.
 */

import { Alphabets, type Run } from "./alphabets.js";
import { crc32 } from "./checksums.js";
import { PqmError } from "./errors.js";
import type { ModelFile } from "./modelFile.js";
import type { Rows } from "./rows.js";
import { groupBounds } from "./schedule.js";
import { Session } from "./session.js";

export class EntropyNetwork {
  readonly #parts = new Map<string, Session>();
  readonly #model: ModelFile;
  readonly #alphabets: Alphabets;
  /** What turns head outputs into logits: (N, R), (L, M), (N). */
  readonly #factors: Int8Array;
  readonly #scales: Float32Array;
  readonly #biases: Int32Array;

  private constructor(
    model: ModelFile,
    readonly kernel: string,
  ) {
    this.#model = model;
    this.#alphabets = Alphabets.of(model);
    this.#factors = model.int8("entropy.token_factors.weight");
    this.#scales = model.float32("entropy.token_factors.scale");
    this.#biases = model.int32("entropy.token_bias");
  }

  /** The first kernel of the model file that is exact here; throws a `ModelError` if none is. */
  static async create(model: ModelFile): Promise<EntropyNetwork> {
    for (const kernel of model.metadata.kernels) {
      const network = new EntropyNetwork(model, kernel);
      await network.#prepare();
      if (await network.#isExact()) return network;
    }
    throw new PqmError("ModelError", "this browser does not compute exact products, so it cannot decode the file");
  }

  /** Add the embedding sums (n, C) of tokens of a group to the residual stream. */
  async embed(group: number, h: Float32Array, embedded: Float32Array): Promise<Rows> {
    const [hOut, xOut] = await this.#part(`embed.${group}`).run({
      h: [h, this.#shape(h)],
      embedded: [embedded, this.#shape(embedded)],
    });
    return [hOut as Float32Array, xOut as Uint8Array];
  }

  /** Keys and values (n, 2 C) of content (n, C). */
  async keysValues(layer: number, x: Uint8Array): Promise<Uint8Array> {
    const [kv] = await this.#part(`keys_values.${layer}`).run({ x: [x, this.#shape(x)] });
    return kv as Uint8Array;
  }

  /**
   * What queries take from the content of their windows: (windows * Q, C).
   *
   * @param x (windows, Q, C).
   * @param kv (windows, T, 2 C).
   * @param bias (heads, Q, T).
   * @param mask (windows, T).
   */
  async attend(
    layer: number,
    count: number,
    x: Uint8Array,
    kv: Uint8Array,
    bias: Float32Array,
    mask: Float32Array,
  ): Promise<Uint8Array> {
    const { width, head_width: headWidth } = this.#model.metadata.config;
    const numQueries = x.length / width / count;
    const numKeys = kv.length / (2 * width) / count;
    const [mixed] = await this.#part(`attend.${layer}`).run({
      x: [x, [count, numQueries, width]],
      kv: [kv, [count, numKeys, 2 * width]],
      bias: [bias, [width / headWidth, numQueries, numKeys]],
      mask: [mask, [count, 1, 1, numKeys]],
    });
    return mixed as Uint8Array;
  }

  /** Add the attention's output to the residual stream. */
  async project(layer: number, h: Float32Array, mixed: Uint8Array): Promise<Rows> {
    return this.#update(`project.${layer}`, h, "mixed", mixed);
  }

  /** Add the feed-forward part's output to the residual stream. */
  async feed(layer: number, h: Float32Array, x: Uint8Array): Promise<Rows> {
    return this.#update(`feed.${layer}`, h, "x", x);
  }

  /** Output of the network -> (m, n, R), what the frequencies of the m sub-quantizers of a group are made of. */
  async head(group: number, x: Uint8Array): Promise<Uint8Array> {
    const [head] = await this.#part(`head.${group}`).run({ x: [x, this.#shape(x)] });
    return head as Uint8Array;
  }

  /** Frequencies (m, n, K) of neighbors with equally many codewords: their part (m, n, R) of a head. */
  async frequencies(head: Uint8Array, level: number, { first, last, size: k }: Run): Promise<Int32Array> {
    const { token_rank: r } = this.#model.metadata.config;
    const m = last - first;
    const scale = level * this.#alphabets.numSubquantizers + first;
    const start = this.#alphabets.start(level, first);
    const end = start + m * k;
    const [frequencies] = await this.#part("frequencies").run({
      head: [head, [m, head.length / m / r, r]],
      factors: [this.#factors.subarray(start * r, end * r), [m, k, r]],
      scale: [this.#scales.subarray(scale, scale + m), [m, 1, 1]],
      bias: [this.#biases.subarray(start, end), [m, 1, k]],
    });
    return frequencies as Int32Array;
  }

  async #prepare(): Promise<void> {
    const groups = this.#model.metadata.config.group_steps;
    const add = async (part: string, graph: string, layer = 0) => {
      this.#parts.set(part, await Session.create(this.#model, graph, layer, true));
    };
    for (const group of groups.keys()) await add(`embed.${group}`, "embed", group);
    for (const { number, hasAttention } of layersOf(this.#model).flat()) {
      if (hasAttention) {
        await add(`keys_values.${number}`, `${this.kernel}/keys_values`, number);
        await add(`attend.${number}`, `${this.kernel}/attend`, number);
        await add(`project.${number}`, `${this.kernel}/project`, number);
      }
      await add(`feed.${number}`, `${this.kernel}/feed`, number);
    }
    for (const group of groups.keys()) await add(`head.${group}`, `${this.kernel}/head.${group}`);
    await add("frequencies", "frequencies");
  }

  /** Whether each part gives the known answer to the known question, which has extreme operands in it. */
  async #isExact(): Promise<boolean> {
    const { config, answers } = this.#model.metadata;
    const x = this.#model.bytes("question.x");
    const h = this.#model.float32("question.h");
    const [kv, bias, mask] = [
      this.#model.bytes("question.kv"),
      this.#model.float32("question.bias"),
      this.#model.float32("question.mask"),
    ];
    const few = x.subarray(0, h.length);
    const { numSubquantizers } = this.#alphabets;
    const [[, last]] = groupBounds(numSubquantizers, config.group_steps.length, config.group_sizes);
    const frequencies = async (head: Uint8Array) => {
      const found: Int32Array[] = [];
      for (const run of this.#alphabets.runs(0, 0, last)) {
        const part = head.subarray((head.length * run.first) / last, (head.length * run.last) / last);
        found.push(await this.frequencies(part, 0, run));
      }
      return Int32Array.from(found.flatMap((part) => Array.from(part)));
    };
    const ask = async (part: string): Promise<Rows | Uint8Array | Int32Array> => {
      const [kind, index] = part.split(".");
      switch (kind) {
        case "embed":
          return this.embed(Number(index), h, this.#model.float32("question.embedded"));
        case "keys_values":
          return this.keysValues(Number(index), few);
        case "attend":
          return this.attend(Number(index), 2, x.subarray(0, 2 * h.length), kv, bias, mask);
        case "project":
          return this.project(Number(index), h, few);
        case "feed":
          return this.feed(Number(index), h, few);
        case "head":
          return this.head(Number(index), few);
        default:
          return frequencies(await this.head(0, few));
      }
    };
    for (const part of this.#parts.keys()) {
      if (checksum(await ask(part)) !== answers[part]) return false;
    }
    return true;
  }

  async #update(part: string, h: Float32Array, name: string, x: Uint8Array): Promise<Rows> {
    const [hOut, xOut] = await this.#part(part).run({ h: [h, this.#shape(h)], [name]: [x, this.#shape(x)] });
    return [hOut as Float32Array, xOut as Uint8Array];
  }

  #part(name: string): Session {
    return this.#parts.get(name)!;
  }

  #shape(rows: { length: number }): [number, number] {
    const { width } = this.#model.metadata.config;
    return [rows.length / width, width];
  }
}

/** A layer of the network. */
export interface Layer {
  readonly number: number;
  readonly hasAttention: boolean;
  /** Whether the windows of its attention are shifted by half. */
  readonly isShifted: boolean;
  /** Whether it is the last one of its group. */
  readonly isLast: boolean;
}

/** The layers of each group of sub-quantizers; they are numbered through. */
export function layersOf(model: ModelFile): Layer[][] {
  const { num_layers: first, later_layers: later, attention_every: every, group_steps: groups } = model.metadata.config;
  return groups.map((_, group) => {
    const start = group === 0 ? 0 : first + (group - 1) * later;
    const count = group === 0 ? first : later;
    return Array.from({ length: count }, (_, index) => ({
      number: start + index,
      hasAttention: index % every === 0,
      isShifted: (Math.floor(index / every) + group) % 2 === 1,
      isLast: index === count - 1,
    }));
  });
}

/** CRC-32 of an answer; integers that are carried by float32 as int32, which has but one zero. */
function checksum(answer: Rows | Uint8Array | Int32Array): number {
  if (answer instanceof Uint8Array) return crc32(answer);
  if (answer instanceof Int32Array) return crc32(new Uint8Array(answer.buffer, answer.byteOffset, answer.byteLength));
  return crc32(answer[1], checksum(Int32Array.from(answer[0])));
}
