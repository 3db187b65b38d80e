/** The synthesis transform on pictures of any size: tile by tile with a margin, in bounded memory. */

import type { DecoderFile } from "./modelFile.js";
import { Session } from "./session.js";

/** Pixels per side of a position. */
export const STRIDE = 16;
/** Side of a tile without margin, positions. */
const TILE = 48;

/** Pixels (height, width, 4): red, green, blue, alpha. */
export interface Pixels {
  readonly data: Uint8ClampedArray<ArrayBuffer>;
  readonly width: number;
  readonly height: number;
}

export function emptyPixels(width: number, height: number): Pixels {
  return { data: new Uint8ClampedArray(width * height * 4).fill(255), width, height };
}

export class Synthesis {
  private constructor(
    private readonly session: Session,
    private readonly margin: number,
  ) {}

  static async create(decoder: DecoderFile): Promise<Synthesis> {
    return new Synthesis(await Session.create(decoder, "synthesis", 0, false), decoder.metadata.config.margin);
  }

  /**
   * Reconstruct a picture, opaque.
   *
   * @param latent (D, rows, columns).
   * @param width, height of the picture; at most 16 times the latent's.
   * @param watch called with the number of tiles done and of all.
   */
  async synthesize(
    latent: Float32Array,
    rows: number,
    columns: number,
    width: number,
    height: number,
    watch: (done: number, total: number) => void,
  ): Promise<Pixels> {
    const pixels = emptyPixels(width, height);
    const total = Math.ceil(rows / TILE) * Math.ceil(columns / TILE);
    let done = 0;
    for (let top = 0; top < rows; top += TILE) {
      for (let left = 0; left < columns; left += TILE) {
        const outer = {
          top: Math.max(0, top - this.margin),
          left: Math.max(0, left - this.margin),
          bottom: Math.min(rows, top + TILE + this.margin),
          right: Math.min(columns, left + TILE + this.margin),
        };
        const tile = crop(latent, rows, columns, outer);
        const shape = [1, tile.length / (outer.bottom - outer.top) / (outer.right - outer.left)];
        const [rgb] = await this.session.run({
          z: [tile, [...shape, outer.bottom - outer.top, outer.right - outer.left]],
        });
        const bottom = Math.min(height, STRIDE * (top + TILE));
        const right = Math.min(width, STRIDE * (left + TILE));
        for (let y = STRIDE * top; y < bottom; y++) {
          const rowStart = (y - STRIDE * outer.top) * STRIDE * (outer.right - outer.left) - STRIDE * outer.left;
          for (let x = STRIDE * left; x < right; x++) {
            const from = (rowStart + x) * 3;
            const to = (y * width + x) * 4;
            for (let c = 0; c < 3; c++) pixels.data[to + c] = (rgb as Uint8Array)[from + c];
          }
        }
        watch(++done, total);
      }
    }
    return pixels;
  }
}

/** Part of a latent (D, rows, columns), contiguous. */
function crop(
  latent: Float32Array,
  rows: number,
  columns: number,
  part: { top: number; left: number; bottom: number; right: number },
): Float32Array {
  const numChannels = latent.length / rows / columns;
  const width = part.right - part.left;
  const tile = new Float32Array(numChannels * (part.bottom - part.top) * width);
  let to = 0;
  for (let channel = 0; channel < numChannels; channel++) {
    for (let y = part.top; y < part.bottom; y++, to += width) {
      const from = (channel * rows + y) * columns;
      tile.set(latent.subarray(from + part.left, from + part.right), to);
    }
  }
  return tile;
}
