/**
 * Scaling with a Lanczos filter of three lobes, rounded as Pillow does: weights are integers of 22 fractional bits, and
 * the picture between the horizontal and the vertical pass has 8 bits.
 */

import { emptyPixels, type Pixels } from "./synthesis.js";

const LOBES = 3;
const ONE = 1 << 22;

/** For each output sample, the first input sample that it is made of, and the weights from there on. */
interface Filter {
  readonly starts: readonly number[];
  readonly weights: readonly (readonly number[])[];
}

/** Scale an opaque picture. */
export function resize(pixels: Pixels, width: number, height: number): Pixels {
  return resizedRows(resizedColumns(pixels, width), height);
}

function resizedColumns(pixels: Pixels, width: number): Pixels {
  if (width === pixels.width) return pixels;
  const out = emptyPixels(width, pixels.height);
  const { starts, weights } = filterOf(pixels.width, width);
  for (let y = 0; y < pixels.height; y++) {
    for (let x = 0; x < width; x++) {
      const from = (y * pixels.width + starts[x]) * 4;
      for (let c = 0; c < 3; c++) out.data[(y * width + x) * 4 + c] = weighed(pixels.data, from + c, 4, weights[x]);
    }
  }
  return out;
}

function resizedRows(pixels: Pixels, height: number): Pixels {
  if (height === pixels.height) return pixels;
  const out = emptyPixels(pixels.width, height);
  const { starts, weights } = filterOf(pixels.height, height);
  const stride = pixels.width * 4;
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < pixels.width; x++) {
      const from = starts[y] * stride + x * 4;
      for (let c = 0; c < 3; c++) out.data[y * stride + x * 4 + c] = weighed(pixels.data, from + c, stride, weights[y]);
    }
  }
  return out;
}

function weighed(data: Uint8ClampedArray, start: number, stride: number, weights: readonly number[]): number {
  let sum = ONE / 2;
  for (let i = 0, from = start; i < weights.length; i++, from += stride) sum += weights[i] * data[from];
  return Math.floor(sum / ONE); // the array clamps
}

function filterOf(sizeIn: number, sizeOut: number): Filter {
  const scale = sizeIn / sizeOut;
  const stretch = Math.max(scale, 1);
  const support = LOBES * stretch;
  const starts: number[] = [];
  const weights: number[][] = [];
  for (let i = 0; i < sizeOut; i++) {
    const center = (i + 0.5) * scale;
    const start = Math.max(0, Math.trunc(center - support + 0.5));
    const end = Math.min(sizeIn, Math.trunc(center + support + 0.5));
    const values = Array.from({ length: end - start }, (_, j) => lanczos((start + j - center + 0.5) / stretch));
    const sum = values.reduce((total, value) => total + value, 0);
    starts.push(start);
    weights.push(values.map((value) => Math.sign(value / sum) * Math.floor(Math.abs(value / sum) * ONE + 0.5)));
  }
  return { starts, weights };
}

function lanczos(x: number): number {
  return Math.abs(x) < LOBES ? sinc(x) * sinc(x / LOBES) : 0;
}

function sinc(x: number): number {
  return x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x);
}
