/** Networks at run time: the only module that knows ONNX Runtime. */

import * as ort from "./runtime/ort.wasm.min.mjs";

import { PqmError } from "./errors.js";
import type { WeightsFile } from "./modelFile.js";

/** A tensor: what is in it, and its shape. */
export type Value = readonly [data: Uint8Array | Int8Array | Int32Array | Float32Array, shape: readonly number[]];

/**
 * Say where the runtime's files are, and how many threads share the work; before the first session is made.
 *
 * @param threads more than one needs a page that is cross-origin isolated.
 */
export function startRuntime(threads: number): void {
  ort.env.logLevel = "error";
  ort.env.wasm.numThreads = threads;
  ort.env.wasm.wasmPaths = {
    mjs: new URL("./runtime/ort-wasm-simd-threaded.mjs", import.meta.url).href,
    wasm: new URL("./runtime/ort-wasm-simd-threaded.wasm", import.meta.url).href,
  };
}

/** One graph, ready to run. */
export class Session {
  private constructor(
    private readonly session: ort.InferenceSession,
    readonly outputs: readonly string[],
  ) {}

  /**
   * Prepare a graph of a token model or a decoder.
   *
   * @param layer whose weights a graph that several layers share gets.
   * @param isExact whether the runtime must leave the arithmetic as the graph has it.
   */
  static async create<Config>(
    file: WeightsFile<Config>,
    graph: string,
    layer: number,
    isExact: boolean,
  ): Promise<Session> {
    try {
      const session = await ort.InferenceSession.create(file.bytes(`graph.${graph}`), {
        executionProviders: ["wasm"],
        graphOptimizationLevel: isExact ? "basic" : "all",
        externalData: [{ path: "weights", data: file.weightsOf(graph, layer) }],
        // Both round differently from what a graph says. The graphs give them no occasion; this is a second lock.
        extra: isExact ? { optimization: { disable_specified_optimizers: "MatMulScaleFusion;DivMulFusion" } } : {},
      });
      return new Session(session, session.outputNames);
    } catch (error) {
      const reason = String(error instanceof Error ? error.message : error).split("\n")[0];
      throw new PqmError("ModelError", `its graph ${graph} cannot be used: ${reason}`);
    }
  }

  /** Outputs, in the graph's order. */
  async run(inputs: Readonly<Record<string, Value>>): Promise<ort.Tensor["data"][]> {
    const feeds = Object.fromEntries(Object.entries(inputs).map(([name, value]) => [name, tensorOf(value)]));
    const results = await this.session.run(feeds);
    return this.outputs.map((name) => results[name].data);
  }
}

function tensorOf([data, shape]: Value): ort.Tensor {
  if (data instanceof Uint8Array) return new ort.Tensor("uint8", data, shape);
  if (data instanceof Int8Array) return new ort.Tensor("int8", data, shape);
  if (data instanceof Int32Array) return new ort.Tensor("int32", data, shape);
  return new ort.Tensor("float32", data, shape);
}
