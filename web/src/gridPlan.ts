/**
 * Where things are in a token grid: windows of attention, and neighbors whose channels are mixed in.
 *
 * Half of the channels of a position come from its eight neighbors. The channels are cut into 16 chunks; a row of
 * channels is put together from chunks of other rows.
 */

/** Added to the score of a key that is outside of the grid. */
const OUTSIDE = -(2 ** 20);
export const NUM_CHUNKS = 16;

/** A grid cut into windows of T positions. */
export interface Windows {
  readonly count: number;
  /** (count, T * 16): chunks of channels that each place of a window is put together from; see `gatherChunks`. */
  readonly source: Int32Array;
  /** (h * w): the place of each position. */
  readonly rowOf: Int32Array;
  /** (count, T): `OUTSIDE` for places outside of the grid, else 0. */
  readonly mask: Float32Array;
}

/** Where things are in a grid of one size. */
export interface GridPlan {
  /** (h * w, 16): chunks of channels that each position is put together from after the shift. */
  readonly shifted: Int32Array;
  /** Cut at multiples of the window, and half a window beside them. */
  readonly windows: readonly [Windows, Windows];
}

/** The plan of a grid; sides in positions. */
export function gridPlan(height: number, width: number, window: number): GridPlan {
  const shifted = shiftSources(height, width);
  return {
    shifted: shifted.subarray(0, height * width * NUM_CHUNKS),
    windows: [cut(height, width, window, 0, shifted), cut(height, width, window, window >> 1, shifted)],
  };
}

/** (h * w + 1, 16): the chunk that each chunk comes from; the last row is what lies outside. */
function shiftSources(height: number, width: number): Int32Array {
  const count = height * width;
  const directions = [-1, 0, 1].flatMap((dy) => [-1, 0, 1].map((dx) => [dy, dx])).filter(([dy, dx]) => dy || dx);
  const sources = new Int32Array((count + 1) * NUM_CHUNKS);
  for (let row = 0; row <= count; row++) {
    const y = Math.floor(row / width);
    const x = row % width;
    for (let chunk = 0; chunk < NUM_CHUNKS; chunk++) {
      let from = row;
      if (row < count && chunk >= NUM_CHUNKS / 2) {
        const [dy, dx] = directions[chunk - NUM_CHUNKS / 2];
        const isInside = y + dy >= 0 && y + dy < height && x + dx >= 0 && x + dx < width;
        from = isInside ? row + dy * width + dx : count;
      }
      sources[row * NUM_CHUNKS + chunk] = from * NUM_CHUNKS + chunk;
    }
  }
  return sources;
}

function cut(height: number, width: number, window: number, offset: number, shifted: Int32Array): Windows {
  const rows = Math.ceil((offset + height) / window);
  const columns = Math.ceil((offset + width) / window);
  const numPlaces = rows * columns * window * window;
  const source = new Int32Array(numPlaces * NUM_CHUNKS);
  const rowOf = new Int32Array(height * width);
  const mask = new Float32Array(numPlaces);
  for (let place = 0; place < numPlaces; place++) {
    const inWindow = place % (window * window);
    const index = (place - inWindow) / (window * window);
    const y = Math.floor(index / columns) * window + Math.floor(inWindow / window) - offset;
    const x = (index % columns) * window + (inWindow % window) - offset;
    const isInside = y >= 0 && y < height && x >= 0 && x < width;
    const position = isInside ? y * width + x : height * width;
    if (isInside) rowOf[position] = place;
    else mask[place] = OUTSIDE;
    source.set(shifted.subarray(position * NUM_CHUNKS, (position + 1) * NUM_CHUNKS), place * NUM_CHUNKS);
  }
  return { count: rows * columns, source, rowOf, mask };
}

/** Put rows of `width` channels together from chunks of a sixteenth of the channels. */
export function gatherChunks(x: Uint8Array, source: Int32Array, width: number): Uint8Array {
  const size = width / NUM_CHUNKS;
  const rows = new Uint8Array(source.length * size);
  for (let i = 0, to = 0; i < source.length; i++) {
    for (let from = source[i] * size, end = from + size; from < end; ) rows[to++] = x[from++];
  }
  return rows;
}
