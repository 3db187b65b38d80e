/**
 * Where things are in a token grid: windows of attention, and neighbors whose channels are mixed in.
 *
 * Half of the channels of a position come from its eight neighbors, a sixteenth each. The places of a window are sorted
 * by quincunx step, so that what is known after a step comes first in every window.
 */

import { NUM_QUINCUNX_STEPS, quincunxStep } from "./schedule.js";

/** Added to the score of a key that is outside of the grid or has no content. */
export const OUTSIDE = -(2 ** 20);
const NUM_NEIGHBORS = 8;

/** A grid cut into windows of T places. */
export interface Windows {
  readonly count: number;
  /** (count, T): the position at each place; h * w outside of the grid. */
  readonly positions: Int32Array;
  /** (h * w): the place of each position, counted through all windows. */
  readonly placeOf: Int32Array;
  /** (T): where each place is in its window, in raster order. */
  readonly order: Int32Array;
  /** Number of places before each quincunx step, and of all. */
  readonly ends: readonly number[];
}

/** Where things are in a grid of one size. */
export interface GridPlan {
  /** Positions in the grid. */
  readonly count: number;
  /** (h * w + 1, 8): position that each neighbor's channels come from; h * w outside of the grid. */
  readonly neighbors: Int32Array;
  /** Cut at multiples of the window, and half a window beside them. */
  readonly windows: readonly [Windows, Windows];
}

/** The plan of a grid; sides in positions. */
export function gridPlan(height: number, width: number, window: number): GridPlan {
  return {
    count: height * width,
    neighbors: neighborsOf(height, width),
    windows: [cut(height, width, window, 0), cut(height, width, window, window >> 1)],
  };
}

/** Where each place of a window is, in raster order; `isShifted` says which windows. */
export function orderOf(window: number, isShifted: boolean): Int32Array {
  return cut(window, window, window, isShifted ? window >> 1 : 0).order;
}

function neighborsOf(height: number, width: number): Int32Array {
  const count = height * width;
  const directions = [-1, 0, 1].flatMap((dy) => [-1, 0, 1].map((dx) => [dy, dx])).filter(([dy, dx]) => dy || dx);
  const neighbors = new Int32Array((count + 1) * NUM_NEIGHBORS).fill(count);
  for (let row = 0; row < count; row++) {
    const y = Math.floor(row / width);
    const x = row % width;
    directions.forEach(([dy, dx], index) => {
      const isInside = y + dy >= 0 && y + dy < height && x + dx >= 0 && x + dx < width;
      if (isInside) neighbors[row * NUM_NEIGHBORS + index] = row + dy * width + dx;
    });
  }
  return neighbors;
}

function cut(height: number, width: number, window: number, offset: number): Windows {
  const rows = Math.ceil((offset + height) / window);
  const columns = Math.ceil((offset + width) / window);
  const numPlaces = window * window;
  const raster = Array.from({ length: numPlaces }, (_, place) => place);
  // The same in every window, whose sides are multiples of 4.
  const steps = raster.map((place) => quincunxStep(Math.floor(place / window) - offset, (place % window) - offset));
  const order = Int32Array.from(raster.sort((a, b) => steps[a] - steps[b] || a - b));
  const ends = Array.from({ length: NUM_QUINCUNX_STEPS + 1 }, (_, step) => steps.filter((s) => s < step).length);
  const positions = new Int32Array(rows * columns * numPlaces).fill(height * width);
  const placeOf = new Int32Array(height * width);
  for (let place = 0; place < positions.length; place++) {
    const index = Math.floor(place / numPlaces);
    const inWindow = order[place % numPlaces];
    const y = Math.floor(index / columns) * window + Math.floor(inWindow / window) - offset;
    const x = (index % columns) * window + (inWindow % window) - offset;
    if (y < 0 || y >= height || x < 0 || x >= width) continue;
    positions[place] = y * width + x;
    placeOf[y * width + x] = place;
  }
  return { count: rows * columns, positions, placeOf, order, ends };
}

/**
 * Put rows of `width` channels together: the first half of each from `own`, the second from neighbors.
 *
 * @param ownRows row of each in `own`; beyond its end are zeros.
 * @param seen (h * w + 1, width / 2): what positions show to others.
 * @param positions of the rows.
 */
export function gather(
  own: Uint8Array,
  ownRows: Int32Array,
  seen: Uint8Array,
  positions: Int32Array,
  plan: GridPlan,
  width: number,
): Uint8Array {
  const half = width / 2;
  const size = half / NUM_NEIGHBORS;
  const rows = new Uint8Array(positions.length * width).fill(128);
  for (let i = 0; i < positions.length; i++) {
    const at = i * width;
    const from = ownRows[i] * width;
    if (from < own.length) rows.set(own.subarray(from, from + half), at);
    for (let index = 0; index < NUM_NEIGHBORS; index++) {
      const start = plan.neighbors[positions[i] * NUM_NEIGHBORS + index] * half + index * size;
      for (let c = 0; c < size; c++) rows[at + half + index * size + c] = seen[start + c];
    }
  }
  return rows;
}
