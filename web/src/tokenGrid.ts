/** The tokens of a picture, and the step loop that reads them. */

import { crc16 } from "./checksums.js";
import type { Container } from "./container.js";
import type { EntropyModel } from "./entropyModel.js";
import { PqmError } from "./errors.js";
import { PrefixReader, TokenReader, type TokenSource } from "./rangeDecoder.js";
import { positionsOf } from "./schedule.js";

/** Tokens of a picture, as far as they are known. */
export interface TokenGrid {
  readonly height: number;
  readonly width: number;
  /** (M, h, w); 0 where unknown. */
  readonly tokens: Uint16Array;
  /** (M, h, w); 1 where known. */
  readonly known: Uint8Array;
  /** Tokens that were sent. */
  readonly numRead: number;
}

/** Called with the number of tokens read so far. */
type Watch = (numTokens: number) => void;

/**
 * Tokens of a file, checked.
 *
 * Throws a `DamagedFileError` or a `TokenCheckError`.
 *
 * @param height, width of the token grid.
 */
export async function readTokens(
  model: EntropyModel,
  container: Container,
  height: number,
  width: number,
  watch: Watch,
): Promise<TokenGrid> {
  if (container.isPartial) {
    return decodeTokens(model, new PrefixReader(container.payload), height, width, container.level, watch);
  }
  const reader = new TokenReader(container.payload);
  const grid = await decodeTokens(model, reader, height, width, container.level, watch);
  reader.finish();
  if (container.tokenCheck !== null && crc16(littleEndian(grid.tokens)) !== container.tokenCheck) {
    throw new PqmError("TokenCheckError", "decoded tokens differ from those that were encoded");
  }
  return grid;
}

/**
 * Decode a token grid, step by step. Tokens of one step are independent given all earlier steps. Those of a single
 * codeword are not coded. Ends where the source gives fewer tokens than it was asked for.
 */
async function decodeTokens(
  model: EntropyModel,
  source: TokenSource,
  height: number,
  width: number,
  level: number,
  watch: Watch,
): Promise<TokenGrid> {
  const { alphabets } = model;
  const size = height * width;
  const tokens = new Uint16Array(alphabets.numSubquantizers * size);
  const known = new Uint8Array(tokens.length);
  const state = model.start(height, width, level);
  const steps = model.steps(level);
  let numTokens = 0;
  for (const step of steps) {
    const positions = positionsOf(step, height, width);
    if (positions.length === 0) continue;
    const head = await model.head(state, step, positions);
    for (let m = step.first; m < step.last; m++) {
      if (alphabets.size(level, m) > 1) continue;
      for (const position of positions) known[m * size + position] = 1;
    }
    for (const block of alphabets.blocks(level, step.first, step.last, positions.length)) {
      const frequencies = await model.frequencies(head, step.group, level, block);
      const numColumns = block.end - block.begin;
      const wanted = (block.last - block.first) * numColumns;
      const read = new Uint16Array(wanted);
      const count = source.read(frequencies, block.size, wanted, read);
      for (let i = 0; i < count; i++) {
        const at = (block.first + Math.floor(i / numColumns)) * size + positions[block.begin + (i % numColumns)];
        tokens[at] = read[i];
        known[at] = 1;
      }
      numTokens += count;
      watch(numTokens);
      if (count < wanted) return { height, width, tokens, known, numRead: numTokens };
    }
    if (step === steps[steps.length - 1]) known.fill(1, step.last * size); // nothing is left to be said
    await model.reveal(state, step, positions, tokens);
  }
  return { height, width, tokens, known, numRead: numTokens };
}

/** Tokens as little-endian 16-bit integers, over which check and hash are computed. */
export function littleEndian(tokens: Uint16Array): Uint8Array<ArrayBuffer> {
  const bytes = new DataView(new ArrayBuffer(tokens.length * 2));
  tokens.forEach((token, i) => bytes.setUint16(2 * i, token, true));
  return new Uint8Array(bytes.buffer);
}
