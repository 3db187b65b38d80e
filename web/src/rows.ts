/** Rows of the network's values: (n, C) arrays, one row for each position that is worked on. */

/** The activation that stands for 0. */
export const ZERO = 128;

/** Residual stream, integers carried by float32, and its normalization. */
export type Rows = readonly [h: Float32Array, x: Uint8Array];

/** `count` rows of zeros. */
export function emptyRows(count: number, width: number): Rows {
  return [new Float32Array(count * width), new Uint8Array(count * width).fill(ZERO)];
}

/** Overwrite the rows of some positions. */
export function put([h, x]: Rows, positions: Int32Array, rows: Rows): void {
  const width = positions.length === 0 ? 0 : rows[0].length / positions.length;
  positions.forEach((position, row) => {
    h.set(rows[0].subarray(row * width, (row + 1) * width), position * width);
    x.set(rows[1].subarray(row * width, (row + 1) * width), position * width);
  });
}

/** Some rows of an (n, width) array. */
export function pick<T extends Uint8Array | Float32Array>(array: T, rows: Int32Array, width: number): T {
  const picked = emptyLike(array, rows.length * width);
  rows.forEach((row, i) => picked.set(array.subarray(row * width, (row + 1) * width), i * width));
  return picked;
}

/** One row, many times. */
export function repeated<T extends Uint8Array | Float32Array>(row: T, count: number): T {
  const rows = emptyLike(row, count * row.length);
  for (let i = 0; i < count; i++) rows.set(row, i * row.length);
  return rows;
}

/** 0 to `count`, exclusive. */
export function range(count: number): Int32Array {
  return new Int32Array(count).map((_, i) => i);
}

/** Cut rows into pieces of at most `size`, all about equal. */
export function* cuts(count: number, size: number): Generator<[begin: number, end: number]> {
  const number = Math.ceil(count / size);
  for (let i = 0; i < number; i++) yield [Math.floor((count * i) / number), Math.floor((count * (i + 1)) / number)];
}

function emptyLike<T extends Uint8Array | Float32Array>(array: T, length: number): T {
  return (array instanceof Uint8Array ? new Uint8Array(length) : new Float32Array(length)) as T;
}
