/** .pqm file -> picture, in steps: container, tokens, what was not sent, picture. */

import { decodeAlpha } from "./alpha.js";
import { parseContainer } from "./container.js";
import { EntropyModel } from "./entropyModel.js";
import { PqmError } from "./errors.js";
import { expectedLatent } from "./fill.js";
import { ProductQuantizer } from "./quantizer.js";
import { resize } from "./resize.js";
import { STRIDE, Synthesis, type Pixels } from "./synthesis.js";
import { readTokens } from "./tokenGrid.js";
import { loadModel, modelOf, type ModelSource } from "./weights.js";

/** Stage that is being worked on, and how far it has come: bytes, tokens, or tiles of the picture. */
export interface Progress {
  readonly stage: "weights" | "tokens" | "picture";
  readonly done: number;
  readonly total: number;
}

/** A decoded file. */
export interface Decoded {
  readonly pixels: Pixels;
  /** (M, h, w); 65535 where the file holds none. */
  readonly tokens: Uint16Array<ArrayBuffer>;
  /** M, h, w. */
  readonly tokenShape: readonly [number, number, number];
  /** Share of the tokens that were not in the file and were filled, 0 to 1. */
  readonly inventedShare: number;
  /** Name of the model. */
  readonly model: string;
  /** How integer products were computed. */
  readonly kernel: string;
  /** Milliseconds: preparing the model, if it was not ready; reading the tokens; drawing the picture. */
  readonly times: { readonly model: number; readonly tokens: number; readonly picture: number };
}

/** The value of a token that the file does not hold. */
const UNKNOWN = 0xffff;

/** The networks of a model, ready to run. */
interface Networks {
  readonly entropy: EntropyModel;
  readonly quantizer: ProductQuantizer;
  readonly synthesis: Synthesis;
}

/** Decodes files of any known model; each model is loaded when the first file asks for it. */
export class Decoder {
  readonly #networks = new Map<string, Networks>();

  constructor(private readonly models: readonly ModelSource[]) {}

  /** Decode a file; throws a `PqmError`. One at a time. */
  async decode(data: Uint8Array, maxPixels: number, watch: (progress: Progress) => void): Promise<Decoded> {
    const container = parseContainer(data);
    const { width, height, level, scale } = container;
    const source = modelOf(container.modelId, this.models);
    if (width * height > maxPixels) {
      const limit = maxPixels.toLocaleString("en-US");
      throw new PqmError("LimitError", `${width} x ${height} pixels are above the limit of ${limit}`);
    }
    const start = performance.now();
    const networks = await this.#load(source, watch);
    const { entropy, quantizer, synthesis } = networks;
    if (level >= entropy.numLevels) {
      throw new PqmError("DamagedFileError", `level ${level} does not exist in this model`);
    }

    const loaded = performance.now();
    const [codedWidth, codedHeight] = [Math.ceil(width / scale), Math.ceil(height / scale)];
    const [rows, columns] = [Math.ceil(codedHeight / STRIDE), Math.ceil(codedWidth / STRIDE)];
    const total = entropy.numSubquantizers * rows * columns;
    const grid = await readTokens(entropy, container, rows, columns, (done) => watch({ stage: "tokens", done, total }));
    const alpha = container.alpha && (await decodeAlpha(container.alpha, width, height));

    const read = performance.now();
    const latent = await expectedLatent(entropy, quantizer, grid, level);
    const coded = await synthesis.synthesize(latent, rows, columns, codedWidth, codedHeight, (done, total) =>
      watch({ stage: "picture", done, total }),
    );
    const pixels = resize(coded, width, height);
    alpha?.forEach((value, i) => (pixels.data[4 * i + 3] = value));
    const numKnown = grid.known.reduce((sum, flag) => sum + flag, 0);
    return {
      pixels,
      tokens: grid.tokens.map((token, i) => (grid.known[i] ? token : UNKNOWN)),
      tokenShape: [entropy.numSubquantizers, rows, columns],
      inventedShare: 1 - numKnown / total,
      model: source.name,
      kernel: entropy.kernel,
      times: { model: loaded - start, tokens: read - loaded, picture: performance.now() - read },
    };
  }

  async #load(source: ModelSource, watch: (progress: Progress) => void): Promise<Networks> {
    let networks = this.#networks.get(source.id);
    if (networks === undefined) {
      const model = await loadModel(source, (done) => watch({ stage: "weights", done, total: source.bytes }));
      networks = {
        entropy: await EntropyModel.create(model),
        quantizer: new ProductQuantizer(model),
        synthesis: await Synthesis.create(model),
      };
      this.#networks.set(source.id, networks);
    }
    return networks;
  }
}
