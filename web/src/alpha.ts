/**
 * The alpha channel of a file: one byte, or a lossless WebP or grey PNG file, which the browser decodes.
 *
 * Such a file is opaque, so that no value is lost to premultiplication on the way.
 */

import { PqmError } from "./errors.js";

const PNG = "\x89PNG\r\n\x1a\n";
const WEBP = "RIFF";

/**
 * Decode an alpha channel: (height, width).
 *
 * Throws a `DamagedFileError` if the bytes are anything else than docs/format.md allows.
 */
export async function decodeAlpha(data: Uint8Array, width: number, height: number): Promise<Uint8Array> {
  if (data.length === 1) return new Uint8Array(width * height).fill(data[0]);
  const isPng = text(data, 0, 8) === PNG;
  if (!isPng && text(data, 0, 4) !== WEBP) throw damaged("cannot be decoded: neither PNG nor WebP");
  // Checked before any pixel is decoded, so that a small section cannot ask for much memory.
  const size = isPng ? sizeOfPng(data) : sizeOfWebp(data);
  if (size === null || size[0] !== width || size[1] !== height) {
    throw damaged("does not fit the image");
  }
  try {
    const type = isPng ? "image/png" : "image/webp";
    const bytes = Uint8Array.from(data);
    const rgba =
      typeof ImageDecoder === "undefined"
        ? await readCanvas(bytes, type, width, height)
        : await readFrame(bytes, type, width, height);
    return Uint8Array.from({ length: width * height }, (_, i) => rgba[4 * i]);
  } catch (error) {
    const reason = error instanceof Error ? error.message.split("\n")[0] : String(error);
    throw damaged(`cannot be decoded: ${reason}`);
  }
}

/** Width and height of a whole 8-bit grey PNG file, null if it is none. */
function sizeOfPng(data: Uint8Array): [number, number] | null {
  if (data.length < 45 || text(data, 12, 4) !== "IHDR") return null;
  const view = new DataView(data.buffer, data.byteOffset, data.length);
  const isGrey = data[24] === 8 && data[25] === 0;
  // Some browsers show what there is of a cut file, without a word.
  const isWhole = text(data, data.length - 8, 4) === "IEND";
  return isGrey && isWhole ? [view.getUint32(16), view.getUint32(20)] : null;
}

/** Width and height of a whole lossless WebP file without alpha and animation, null if it is none. */
function sizeOfWebp(data: Uint8Array): [number, number] | null {
  if (data.length < 26 || text(data, 8, 8) !== "WEBPVP8L") return null;
  const view = new DataView(data.buffer, data.byteOffset, data.length);
  const bits = view.getUint32(21, true);
  const hasAlpha = (bits >>> 28) & 1;
  const isWhole = view.getUint32(4, true) + 8 === data.length;
  return !hasAlpha && isWhole ? [(bits & 0x3fff) + 1, ((bits >>> 14) & 0x3fff) + 1] : null;
}

/** Pixels of a picture file. Not by way of a canvas, which some browsers make inexact to foil fingerprinting. */
async function readFrame(
  data: Uint8Array<ArrayBuffer>,
  type: string,
  width: number,
  height: number,
): Promise<Uint8Array> {
  const decoder = new ImageDecoder({ data, type, colorSpaceConversion: "none" });
  try {
    const { image } = await decoder.decode();
    const rgba = new Uint8Array(width * height * 4);
    await image.copyTo(rgba, { format: "RGBA" });
    image.close();
    return rgba;
  } finally {
    decoder.close();
  }
}

async function readCanvas(
  data: Uint8Array<ArrayBuffer>,
  type: string,
  width: number,
  height: number,
): Promise<Uint8ClampedArray> {
  const bitmap = await createImageBitmap(new Blob([data], { type }), { colorSpaceConversion: "none" });
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true })!;
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return context.getImageData(0, 0, width, height).data;
}

function damaged(what: string): PqmError {
  return new PqmError("DamagedFileError", `the alpha section ${what}`);
}

function text(data: Uint8Array, start: number, length: number): string {
  return String.fromCharCode(...data.subarray(start, start + length));
}
