/**
 * Entropy decoding: frequencies and a payload in, tokens out; docs/format.md, section "Payload".
 *
 * Offset and range are below 2^64, so they are BigInt.
 */

import { PqmError } from "./errors.js";

/** Frequencies of one token sum to this. */
export const TOTAL = 1 << 16;
const LEFT_TOTAL = 1 << 24;
const BITS = 64n;

/** Reads tokens; the step loop does not know whether the payload is complete. */
export interface TokenSource {
  /**
   * Read tokens, which are independent given the frequencies.
   *
   * @param frequencies (count, numCodewords), each row at least 1 and summing to 2^16.
   * @param tokens receives them.
   * @returns how many the payload determines; after fewer than `count`, none at all.
   */
  read(frequencies: Int32Array, numCodewords: number, count: number, tokens: Uint16Array): number;
}

/** A payload whose digits go on with one digit without end. */
class Decoder {
  offset = 0n;
  range = (1n << BITS) - 1n;
  /** Digits looked at so far. */
  position = 0;

  constructor(
    private readonly payload: Uint8Array,
    private readonly continuation: number,
  ) {
    this.offset = (this.#word() << 32n) | this.#word();
  }

  /** The next token, -1 if no token is possible here; then the decoder is of no further use. */
  next(frequencies: Int32Array, start: number, numCodewords: number): number {
    const scale = this.range >> 24n;
    const quotient = Number(this.offset / scale);
    if (quotient >= LEFT_TOTAL) return -1;
    const factor = (LEFT_TOTAL - numCodewords) / TOTAL;
    let cumulative = 0;
    let left = 0;
    for (let token = 0; ; token++) {
      cumulative += frequencies[start + token];
      const isLast = token === numCodewords - 1;
      const right = isLast ? LEFT_TOTAL : Math.floor(Math.fround(cumulative * factor)) + token + 1;
      if (quotient < right) {
        this.offset -= scale * BigInt(left);
        this.range = scale * BigInt(right - left);
        if (this.range < 1n << 32n) {
          this.range <<= 32n;
          this.offset = (this.offset << 32n) | this.#word();
        }
        return token;
      }
      left = right;
    }
  }

  #word(): bigint {
    let word = 0;
    for (let i = 0; i < 4; i++, this.position++) {
      word = word * 256 + (this.position < this.payload.length ? this.payload[this.position] : this.continuation);
    }
    return BigInt(word);
  }
}

/** Reads the payload of a complete file. */
export class TokenReader implements TokenSource {
  readonly #payload: Uint8Array;
  readonly #decoder: Decoder;

  constructor(payload: Uint8Array) {
    this.#payload = payload;
    this.#decoder = new Decoder(payload, 0);
  }

  /** See `TokenSource`; throws a `DamagedFileError` if no tokens have this payload. */
  read(frequencies: Int32Array, numCodewords: number, count: number, tokens: Uint16Array): number {
    for (let i = 0; i < count; i++) {
      const token = this.#decoder.next(frequencies, i * numCodewords, numCodewords);
      if (token < 0) throw new PqmError("DamagedFileError", "the payload cannot be decoded");
      tokens[i] = token;
    }
    return count;
  }

  /** Check that the payload is the one that a writer makes of the tokens read; else throws a `DamagedFileError`. */
  finish(): void {
    const { offset, range, position } = this.#decoder;
    // The tokens are told by any number in [low, low + range), where the payload is low + offset. A writer takes the
    // one with the most zero bytes at its end, up to eight, and leaves them away.
    let tail = 0n;
    for (let i = position - 8; i < position; i++) tail = (tail << 8n) | BigInt(this.#payload[i] ?? 0);
    const low = BigInt.asUintN(64, tail - offset);
    let shortest = 0n;
    for (let zeroBits = 8; zeroBits <= 64; zeroBits += 8) {
      const step = BigInt.asUintN(zeroBits, -low);
      if (step >= range) break;
      shortest = step;
    }
    const endsInZero = this.#payload.length > 0 && this.#payload[this.#payload.length - 1] === 0;
    if (offset !== shortest || endsInZero || this.#payload.length > position) {
      throw new PqmError("DamagedFileError", "the payload does not end where its tokens end");
    }
  }
}

/**
 * Reads the first digits of a payload: the tokens that they determine, whatever the missing digits are. These lie
 * between zeros and 0xFF without end; a token is determined as long as both ends give the same.
 */
export class PrefixReader implements TokenSource {
  readonly #low: Decoder;
  readonly #high: Decoder;
  #hasEnded = false;

  constructor(payload: Uint8Array) {
    this.#low = new Decoder(payload, 0);
    this.#high = new Decoder(payload, 0xff);
  }

  /** See `TokenSource`. */
  read(frequencies: Int32Array, numCodewords: number, count: number, tokens: Uint16Array): number {
    for (let i = 0; i < count; i++) {
      if (this.#hasEnded) return i;
      const token = this.#low.next(frequencies, i * numCodewords, numCodewords);
      this.#hasEnded = token < 0 || this.#high.next(frequencies, i * numCodewords, numCodewords) !== token;
      if (this.#hasEnded) return i;
      tokens[i] = token;
    }
    return count;
  }
}
