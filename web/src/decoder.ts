/** .pqm file -> picture, in steps: container, tokens, what was not sent, picture. */

import { decodeAlpha } from "./alpha.js";
import { parseContainer } from "./container.js";
import { EntropyModel } from "./entropyModel.js";
import { PqmError } from "./errors.js";
import { expectedLatent } from "./fill.js";
import type { DecoderConfig, ModelConfig } from "./modelFile.js";
import { ProductQuantizer } from "./quantizer.js";
import { resize } from "./resize.js";
import { STRIDE, Synthesis, type Pixels } from "./synthesis.js";
import { readTokens } from "./tokenGrid.js";
import { decoderOf, loadWeights, modelOf, type ModelSource, type WeightsSource } from "./weights.js";

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
  /** Names of the token model and of the decoder. */
  readonly model: string;
  readonly decoder: string;
  /** How integer products were computed. */
  readonly kernel: string;
  /** Milliseconds: preparing the model, if it was not ready; reading the tokens; drawing the picture. */
  readonly times: { readonly model: number; readonly tokens: number; readonly picture: number };
}

/** The value of a token that the file does not hold. */
const UNKNOWN = 0xffff;

/** The networks of a token model and a decoder, ready to run. */
interface Networks {
  readonly entropy: EntropyModel;
  readonly quantizer: ProductQuantizer;
  readonly synthesis: Synthesis;
}

/** Decodes files of any known token model; each is loaded, with its decoder, when the first file asks for it. */
export class Decoder {
  readonly #networks = new Map<string, Networks>();

  /** @param decoder name of the decoder that makes the pictures. */
  constructor(
    private readonly models: readonly ModelSource[],
    private readonly decoder: string,
  ) {}

  /** Decode a file; throws a `PqmError`. One at a time. */
  async decode(data: Uint8Array, maxPixels: number, watch: (progress: Progress) => void): Promise<Decoded> {
    const container = parseContainer(data);
    const { width, height, level, scale } = container;
    const source = modelOf(container.modelId, this.models);
    const decoder = decoderOf(this.decoder, source);
    if (width * height > maxPixels) {
      const limit = maxPixels.toLocaleString("en-US");
      throw new PqmError("LimitError", `${width} x ${height} pixels are above the limit of ${limit}`);
    }
    const start = performance.now();
    const networks = await this.#load(source, decoder, watch);
    const { entropy, quantizer, synthesis } = networks;
    if (level >= entropy.alphabets.numLevels) {
      throw new PqmError("DamagedFileError", `level ${level} does not exist in this model`);
    }

    const loaded = performance.now();
    const [codedWidth, codedHeight] = [Math.ceil(width / scale), Math.ceil(height / scale)];
    const [rows, columns] = [Math.ceil(codedHeight / STRIDE), Math.ceil(codedWidth / STRIDE)];
    const total = entropy.alphabets.numCoded(level) * rows * columns;
    const grid = await readTokens(entropy, container, rows, columns, (done) => watch({ stage: "tokens", done, total }));
    const alpha = container.alpha && (await decodeAlpha(container.alpha, width, height));

    const read = performance.now();
    const latent = await expectedLatent(entropy, quantizer, grid, level);
    const coded = await synthesis.synthesize(latent, rows, columns, codedWidth, codedHeight, (done, total) =>
      watch({ stage: "picture", done, total }),
    );
    const pixels = resize(coded, width, height);
    alpha?.forEach((value, i) => (pixels.data[4 * i + 3] = value));
    return {
      pixels,
      tokens: grid.tokens.map((token, i) => (grid.known[i] ? token : UNKNOWN)),
      tokenShape: [entropy.alphabets.numSubquantizers, rows, columns],
      inventedShare: total ? 1 - grid.numRead / total : 0,
      model: source.name,
      decoder: decoder.name,
      kernel: entropy.kernel,
      times: { model: loaded - start, tokens: read - loaded, picture: performance.now() - read },
    };
  }

  async #load(
    source: ModelSource,
    decoder: WeightsSource,
    watch: (progress: Progress) => void,
  ): Promise<Networks> {
    let networks = this.#networks.get(source.id);
    if (networks === undefined) {
      const total = source.bytes + decoder.bytes;
      const model = await loadWeights<ModelConfig>(source, (done) => watch({ stage: "weights", done, total }));
      const pictures = await loadWeights<DecoderConfig>(decoder, (done) =>
        watch({ stage: "weights", done: source.bytes + done, total }),
      );
      if (pictures.metadata.model_id !== model.metadata.model_id) {
        throw new PqmError("ModelError", `the decoder ${decoder.name} is for another token model than ${source.name}`);
      }
      networks = {
        entropy: await EntropyModel.create(model),
        quantizer: new ProductQuantizer(model),
        synthesis: await Synthesis.create(pictures),
      };
      this.#networks.set(source.id, networks);
    }
    return networks;
  }
}
