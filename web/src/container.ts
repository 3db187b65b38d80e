/**
 * The .pqm container: bytes in, fields out. Knows neither pictures nor models; docs/format.md is the authority.
 */

import { crc16, crc32 } from "./checksums.js";
import { PqmError } from "./errors.js";

/** What a .pqm file holds. */
export interface Container {
  /** Of the original picture, pixels. */
  readonly width: number;
  readonly height: number;
  /** Hexadecimal; 4 bytes, in the mini form the first 2 of them. */
  readonly modelId: string;
  /** Which of the model's codebooks and static priors the tokens are of, 0 for the finest. */
  readonly level: number;
  /** 1, 2, 4 or 8: the coded picture has ceil(width / scale) x ceil(height / scale) pixels. */
  readonly scale: number;
  readonly isMini: boolean;
  /** Whether the end of the payload is missing. */
  readonly isPartial: boolean;
  readonly payload: Uint8Array;
  /** CRC-16 of the tokens; null in the mini form and in partial files. */
  readonly tokenCheck: number | null;
  /** The coded alpha channel; null if the picture has none. */
  readonly alpha: Uint8Array | null;
  /** What the file keeps of the original's metadata; null if it keeps nothing. */
  readonly metadata: Uint8Array | null;
}

const MAGIC = [0x8d, 0x50, 0x51, 0x0a];
const MINI_MAGIC = [0x8d, 0x6d];
const VERSION = 3;
const EARLIER_MINI_MAGIC = [0x8d, 0x70];
const EARLIER_VERSION = 2;
const MADE_EARLIER = "made by pqmim 0.2 or 0.3, whose files only these releases read";
const MAX_DIMENSION = 1 << 21;
const MAX_ALPHA_BYTES = (1 << 28) - 1;
const MAX_METADATA_BYTES = 1 << 22;
const MINI_MAX_LEVEL = 31;
const MINI_MAX_PAYLOAD = 1024;
const MIN_BYTES = 16;
const MINI_MIN_BYTES = 9;
const FLAG_PARTIAL = 0b001;
const FLAG_ALPHA = 0b010;
const FLAG_METADATA = 0b100;

/** What the first bytes of a file say about the others. */
interface Form {
  isMini: boolean;
  isPartial: boolean;
  hasAlpha: boolean;
  hasMetadata: boolean;
}

/**
 * Read the bytes of a .pqm file. Each file has one reading and each reading one file.
 *
 * Throws a `PqmError` named `NotAPqmFileError`, `TruncatedFileError`, `UnsupportedFileError` or `DamagedFileError`.
 */
export function parseContainer(data: Uint8Array): Container {
  const form = readForm(data);
  const minBytes = form.isMini ? MINI_MIN_BYTES : MIN_BYTES;
  if (data.length < minBytes) {
    throw new PqmError("TruncatedFileError", `the file ends after ${data.length} bytes; the shortest has ${minBytes}`);
  }
  const checkBytes = form.isMini ? 2 : 4;
  if (!checksumFits(data, form, data.length - checkBytes)) {
    throw damaged("checksum mismatch: the file is damaged or cut short");
  }

  const fields = new FieldReader(data, data.length - checkBytes);
  const header = readHeader(fields, form);
  const alpha = form.hasAlpha ? readSection(fields, "alpha", MAX_ALPHA_BYTES) : null;
  const metadata = form.hasMetadata ? readSection(fields, "metadata", MAX_METADATA_BYTES) : null;
  const hasTokenCheck = !form.isMini && !form.isPartial;
  const payload = fields.takeBut(hasTokenCheck ? 2 : 0);
  const hasSections = form.hasAlpha || form.hasMetadata;
  const fitsMini = header.level <= MINI_MAX_LEVEL && !hasSections && payload.length <= MINI_MAX_PAYLOAD;
  if (form.isMini !== fitsMini) throw damaged("the file is not in its shortest form");
  const check = hasTokenCheck ? fields.take(2) : null;
  return {
    ...header,
    isMini: form.isMini,
    isPartial: form.isPartial,
    payload,
    tokenCheck: check && (check[0] << 8) | check[1],
    alpha,
    metadata,
  };
}

function readForm(data: Uint8Array): Form {
  if (data.length === 0) throw new PqmError("NotAPqmFileError", "the file is empty");
  const begins = (bytes: readonly number[]) => bytes.every((byte, i) => i >= data.length || data[i] === byte);
  const magic = [MINI_MAGIC, EARLIER_MINI_MAGIC, MAGIC].find(begins);
  if (magic === undefined) throw new PqmError("NotAPqmFileError", "not a .pqm file");
  if (data.length <= magic.length) {
    throw new PqmError("TruncatedFileError", `the file ends after ${data.length} bytes`);
  }
  const byte = data[magic.length];
  const version = byte >> 4;
  if (magic === EARLIER_MINI_MAGIC || (magic === MAGIC && version === EARLIER_VERSION)) throw unsupported(MADE_EARLIER);
  if (magic === MINI_MAGIC) {
    return { isMini: true, isPartial: (byte & 1) === 1, hasAlpha: false, hasMetadata: false };
  }
  const flags = byte & 0b1111;
  if (version !== VERSION) throw unsupported(`format version ${version}; this release reads version ${VERSION}`);
  if (flags & ~(FLAG_PARTIAL | FLAG_ALPHA | FLAG_METADATA)) {
    throw unsupported(`unknown flags ${binary(flags, 4)}; a newer release may read this file`);
  }
  const has = (flag: number) => (flags & flag) !== 0;
  const [isPartial, hasAlpha, hasMetadata] = [has(FLAG_PARTIAL), has(FLAG_ALPHA), has(FLAG_METADATA)];
  return { isMini: false, isPartial, hasAlpha, hasMetadata };
}

function readHeader(
  fields: FieldReader,
  form: Form,
): Pick<Container, "width" | "height" | "modelId" | "level" | "scale"> {
  let level: number;
  let logScale: number;
  let modelId: string;
  if (form.isMini) {
    const settings = fields.take(MINI_MAGIC.length + 1)[MINI_MAGIC.length];
    logScale = (settings >> 1) & 0b11;
    level = settings >> 3;
    modelId = hex(fields.take(2));
  } else {
    fields.take(MAGIC.length + 1);
    modelId = hex(fields.take(4));
    const settings = fields.take(1)[0];
    logScale = settings >> 6;
    level = settings & 0b111111;
  }
  const width = fields.varint(MAX_DIMENSION - 1) + 1;
  const height = fields.varint(MAX_DIMENSION - 1) + 1;
  return { width, height, modelId, level, scale: 1 << logScale };
}

/** Length and bytes of a section. */
function readSection(fields: FieldReader, name: string, maxBytes: number): Uint8Array {
  const section = fields.take(fields.varint(maxBytes));
  if (section.length === 0) throw damaged(`the ${name} section is empty`);
  return section;
}

function checksumFits(data: Uint8Array, form: Form, end: number): boolean {
  const body = data.subarray(0, end);
  const stored = data.subarray(end).reduce((value, byte) => value * 256 + byte, 0);
  return stored === (form.isMini ? crc16(body, 0xffff) ^ 0xffff : crc32(body));
}

/** Reads fields of the bytes before `end` in turn, and never past it. */
class FieldReader {
  #position = 0;

  constructor(
    private readonly data: Uint8Array,
    private readonly end: number,
  ) {}

  take(count: number): Uint8Array {
    if (count < 0 || count > this.end - this.#position) throw damaged("a field runs past the end of the file");
    this.#position += count;
    return this.data.subarray(this.#position - count, this.#position);
  }

  /** All that is left but the last `count` bytes. */
  takeBut(count: number): Uint8Array {
    return this.take(this.end - this.#position - count);
  }

  varint(maxValue: number): number {
    const maxBits = 32 - Math.clz32(maxValue);
    let value = 0;
    let shift = 0;
    for (;;) {
      const byte = this.take(1)[0];
      value += (byte & 0x7f) * 2 ** shift;
      if (value > maxValue) throw damaged(`a field is above its limit of ${maxValue}`);
      if (byte < 0x80) {
        if (byte === 0 && shift > 0) throw damaged("an integer field is not in its shortest form");
        return value;
      }
      shift += 7;
      if (shift > maxBits) throw damaged("an integer field is too long");
    }
  }
}

function hex(bytes: Uint8Array): string {
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function binary(value: number, digits: number): string {
  return `0b${value.toString(2).padStart(digits, "0")}`;
}

function damaged(message: string): PqmError {
  return new PqmError("DamagedFileError", message);
}

function unsupported(message: string): PqmError {
  return new PqmError("UnsupportedFileError", message);
}
