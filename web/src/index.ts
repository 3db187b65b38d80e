/**
 * Decodes .pqm pictures in the page.
 *
 *     import * as pqmim from "pqmim";
 *     const image = await pqmim.decode(bytes);
 *
 * The work is done by a worker, which starts with the first picture and fetches the weights of its token model and of a decoder.
 */

import { parseContainer, type Container } from "./container.js";
import type { Decoded, Progress } from "./decoder.js";
import { PqmError, type PqmErrorName } from "./errors.js";
import { SHIPPED_MODELS } from "./models.js";
import type { Reply, Request, Start } from "./protocol.js";
import { littleEndian } from "./tokenGrid.js";
import type { ModelSource, WeightsSource } from "./weights.js";

export { PqmError, SHIPPED_MODELS };
export type { ModelSource, PqmErrorName, Progress, WeightsSource };

/** A file's bytes, or what holds them. */
export type Source = ArrayBuffer | Uint8Array | Blob;

export interface DecodeOptions {
  /** Told how far the work has come. */
  readonly onProgress?: (progress: Progress) => void;
  /** Larger pictures are refused, before any memory is taken; 100 million if it is not given. */
  readonly maxPixels?: number;
}

/** A decoded picture, and how it came about. */
export interface DecodedPicture extends Omit<Decoded, "pixels"> {
  /** RGBA of the original size, alpha not multiplied into the colors. */
  readonly image: ImageData;
}

/** What the first bytes of a file say. */
export type Header = Omit<Container, "payload" | "alpha" | "tokenCheck" | "metadata"> & { readonly hasAlpha: boolean };

export interface Settings {
  /** Threads that share the work; more than one needs a page that is cross-origin isolated. */
  readonly threads?: number;
  /** Token models beside the shipped ones, or shipped ones at other addresses. */
  readonly models?: readonly ModelSource[];
  /** Name of the decoder that makes the pictures: "fast", which it is unless given, or "fine". */
  readonly decoder?: string;
}

const MAX_PIXELS = 100_000_000;
const DEFAULT_DECODER = "fast";
/** Threads wait by spinning: as many as there are cores would take them from everything else. */
const MAX_THREADS = 4;

interface Pending {
  readonly resolve: (decoded: Decoded) => void;
  readonly reject: (error: Error) => void;
  readonly onProgress: ((progress: Progress) => void) | undefined;
}

let settings: Settings = {};
let worker: Worker | undefined;
let lastId = 0;
const pending = new Map<number, Pending>();

/** Change settings. A worker that is there is ended, and what it was at is refused. */
export function configure(changed: Settings): void {
  settings = { ...settings, ...changed };
  close();
}

/** End the worker and free its memory; the next picture starts another. */
export function close(): void {
  worker?.terminate();
  worker = undefined;
  rejectAll(new Error("the decoder was closed"));
}

/**
 * Decode a .pqm file.
 *
 * @returns RGBA of the original size, alpha not multiplied into the colors.
 * @throws PqmError damaged, truncated, not a .pqm file, of a model that is not known, or above `maxPixels`.
 */
export async function decode(source: Source, options: DecodeOptions = {}): Promise<ImageData> {
  return (await decodeWithReport(source, options)).image;
}

/** Decode a .pqm file, and say how: its tokens, the share of them that was invented, the time that it took. */
export async function decodeWithReport(source: Source, options: DecodeOptions = {}): Promise<DecodedPicture> {
  const data = await bytesOf(source);
  const { pixels, ...facts } = await ask(data, options);
  return { image: new ImageData(pixels.data, pixels.width, pixels.height), ...facts };
}

/** Read the header of a .pqm file, without any network; throws a `PqmError`. */
export function readHeader(data: Uint8Array): Header {
  const { payload, alpha, tokenCheck, metadata, ...header } = parseContainer(data);
  return { ...header, hasAlpha: alpha !== null };
}

/** SHA-256 (hexadecimal) of tokens, which is equal on every machine; needs a secure context (HTTPS or localhost). */
export async function tokenHash(tokens: Uint16Array): Promise<string> {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", littleEndian(tokens)));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function bytesOf(source: Source): Promise<Uint8Array> {
  if (source instanceof Uint8Array) return source;
  return new Uint8Array(source instanceof ArrayBuffer ? source : await source.arrayBuffer());
}

function ask(data: Uint8Array, options: DecodeOptions): Promise<Decoded> {
  worker ??= startWorker();
  const { onProgress, maxPixels = MAX_PIXELS } = options;
  const id = ++lastId;
  const request: Request = { id, data, maxPixels };
  worker.postMessage(request);
  return new Promise((resolve, reject) => pending.set(id, { resolve, reject, onProgress }));
}

function startWorker(): Worker {
  const started = newWorker();
  started.onmessage = ({ data }: MessageEvent<Reply>) => receive(data);
  started.onerror = (event) => {
    const reason = event.message ?? "is worker.js served?"; // what cannot be fetched has no message
    rejectAll(new PqmError("ModelError", `the worker cannot be started: ${reason}`));
    worker = undefined;
  };
  const start: Start = {
    models: [...(settings.models ?? []).map(atAbsoluteUrls), ...SHIPPED_MODELS],
    decoder: settings.decoder ?? DEFAULT_DECODER,
    threads: globalThis.crossOriginIsolated ? (settings.threads ?? defaultThreads()) : 1,
  };
  started.postMessage(start);
  return started;
}

/** Addresses may be relative to the page, of which the worker knows nothing. */
function atAbsoluteUrls(model: ModelSource): ModelSource {
  const absolute = (url: string) => new URL(url, location.href).href;
  const decoders = model.decoders.map((decoder) => ({ ...decoder, url: absolute(decoder.url) }));
  return { ...model, url: absolute(model.url), decoders };
}

function newWorker(): Worker {
  const here = import.meta.url;
  if (new URL(here).origin === location.origin) {
    return new Worker(new URL("./worker.js", import.meta.url), { type: "module" }); // written as bundlers want it
  }
  // A worker's script must have the origin of the page; what it imports need not.
  const script = `import ${JSON.stringify(new URL("worker.js", here).href)};`;
  return new Worker(URL.createObjectURL(new Blob([script], { type: "text/javascript" })), { type: "module" });
}

function defaultThreads(): number {
  return Math.max(1, Math.min(MAX_THREADS, Math.floor(navigator.hardwareConcurrency / 2)));
}

function receive(reply: Reply): void {
  const request = pending.get(reply.id);
  if (request === undefined) return;
  if ("progress" in reply) {
    request.onProgress?.(reply.progress);
    return;
  }
  pending.delete(reply.id);
  if ("decoded" in reply) {
    request.resolve(reply.decoded);
  } else {
    const { name, message, isPqmError } = reply.error;
    request.reject(isPqmError ? new PqmError(name as PqmErrorName, message) : new Error(`${name}: ${message}`));
  }
}

function rejectAll(error: Error): void {
  for (const { reject } of pending.values()) reject(error);
  pending.clear();
}
