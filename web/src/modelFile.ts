/**
 * Weights and graphs of a token model or a decoder, as scripts/make_weights.py writes them for the page: safetensors,
 * whose metadata hold the configuration, where each graph expects its weights, and the answers to known questions.
 */

import { PqmError } from "./errors.js";

const FORMAT = "pqmim web model 3";

/** Of a token model. */
export interface ModelConfig {
  readonly width: number;
  readonly num_layers: number;
  readonly later_layers: number;
  readonly head_width: number;
  readonly attention_every: number;
  readonly window: number;
  readonly token_rank: number;
  readonly group_steps: readonly number[];
  /** Sub-quantizers of each group but the last; null = dealt out evenly. */
  readonly group_sizes: readonly number[] | null;
}

/** Of a decoder. */
export interface DecoderConfig {
  /** Positions around a tile that matter to it. */
  readonly margin: number;
}

interface Metadata<Config> {
  readonly format: string;
  readonly name: string;
  /** Id of the token model that this is, or is for. */
  readonly model_id: string;
  readonly config: Config;
  readonly kernels: readonly string[];
  /** Graph -> (tensor, offset) of its weights; "{layer}" stands for the number of a layer. */
  readonly graphs: Readonly<Record<string, readonly (readonly [string, number])[]>>;
  /** Part of the network -> CRC-32 of its answer to the known question. */
  readonly answers: Readonly<Record<string, number>>;
}

interface Entry {
  readonly dtype: string;
  readonly data_offsets: readonly [number, number];
}

export type ModelFile = WeightsFile<ModelConfig>;
export type DecoderFile = WeightsFile<DecoderConfig>;

export class WeightsFile<Config> {
  readonly metadata: Metadata<Config>;
  readonly #entries: Readonly<Record<string, Entry>>;
  readonly #data: Uint8Array;

  /** Throws a `ModelError` if the bytes are not a model file for the page. */
  constructor(bytes: Uint8Array) {
    try {
      const length = Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
      const { __metadata__, ...entries } = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length)));
      this.metadata = JSON.parse(__metadata__.pqmim);
      this.#entries = entries;
      this.#data = bytes.subarray(8 + length);
    } catch {
      throw new PqmError("ModelError", "not a model file");
    }
    if (this.metadata.format !== FORMAT) {
      throw new PqmError("ModelError", "not a model file for the page; make one with web/scripts/make_weights.py");
    }
  }

  bytes(name: string): Uint8Array {
    const [begin, end] = this.#entry(name).data_offsets;
    return this.#data.subarray(begin, end);
  }

  int8(name: string): Int8Array {
    const bytes = this.bytes(name);
    return new Int8Array(bytes.buffer, bytes.byteOffset, bytes.length);
  }

  int32(name: string): Int32Array {
    return new Int32Array(this.#copy(name));
  }

  /** A tensor of int64, whose numbers are small. */
  integers(name: string): number[] {
    return Array.from(new BigInt64Array(this.#copy(name)), Number);
  }

  /** A tensor of float32, or of float16 made wider. */
  float32(name: string): Float32Array {
    const copy = this.#copy(name);
    if (this.#entry(name).dtype === "F32") return new Float32Array(copy);
    return Float32Array.from(new Uint16Array(copy), widened);
  }

  /** The weights of a graph, each where the graph expects it. */
  weightsOf(graph: string, layer: number): Uint8Array {
    const parts = this.metadata.graphs[graph].map(([name, offset]) => ({
      offset,
      bytes: this.bytes(name.replace("{layer}", String(layer))),
    }));
    const weights = new Uint8Array(Math.max(0, ...parts.map(({ offset, bytes }) => offset + bytes.length)));
    for (const { offset, bytes } of parts) weights.set(bytes, offset);
    return weights;
  }

  /** A tensor's bytes, aligned. */
  #copy(name: string): ArrayBuffer {
    return Uint8Array.from(this.bytes(name)).buffer;
  }

  #entry(name: string): Entry {
    const entry = this.#entries[name];
    if (entry === undefined) throw new PqmError("ModelError", `the model file lacks ${name}`);
    return entry;
  }
}

/** The number whose bits as float16 these are. */
function widened(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  return exponent === 0 ? sign * fraction * 2 ** -24 : sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}
