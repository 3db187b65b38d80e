/** Weights of token models and decoders: fetched once, kept in the browser's cache. */

import { crc32 } from "./checksums.js";
import { PqmError } from "./errors.js";
import { WeightsFile } from "./modelFile.js";

const CACHE = "pqmim-weights";

/** Where weights are; scripts/make_weights.py prints it. */
export interface WeightsSource {
  readonly name: string;
  /** Of the token model, as .pqm files name it, or of the decoder; hexadecimal. */
  readonly id: string;
  readonly url: string;
  /** Of the file, which is compressed with gzip. */
  readonly bytes: number;
  /** CRC-32 of the file. */
  readonly crc32: number;
}

/** A token model and its decoders. */
export interface ModelSource extends WeightsSource {
  readonly decoders: readonly WeightsSource[];
}

/** The model that decodes files with this id, or an id that begins so; else throws a `ModelMismatchError`. */
export function modelOf(id: string, models: readonly ModelSource[]): ModelSource {
  const model = models.find((candidate) => candidate.id.startsWith(id));
  if (model === undefined) {
    const message = `made with model ${id}, which is not a shipped one; name it with configure`;
    throw new PqmError("ModelMismatchError", message);
  }
  return model;
}

/** The decoder of this name; else throws a `ModelError`. */
export function decoderOf(name: string, model: ModelSource): WeightsSource {
  const decoder = model.decoders.find((candidate) => candidate.name === name);
  if (decoder === undefined) {
    const names = model.decoders.map((candidate) => candidate.name).join(", ");
    throw new PqmError("ModelError", `${name}: no such decoder (${model.name} has ${names || "none"})`);
  }
  return decoder;
}

/**
 * Load weights from the cache, or fetch them.
 *
 * Throws a `ModelError` if they cannot be fetched or are damaged.
 *
 * @param watch called with the number of bytes fetched so far.
 */
export async function loadWeights<Config>(
  source: WeightsSource,
  watch: (bytes: number) => void,
): Promise<WeightsFile<Config>> {
  const cache = await openCache();
  // Not the fetched URL: after an update of the package the same one holds other weights.
  const key = new URL(`?crc32=${source.crc32}`, source.url).href;
  const cached = await cache?.match(key);
  const compressed = cached ? new Uint8Array(await cached.arrayBuffer()) : await fetchBytes(source, watch);
  if (crc32(compressed) !== source.crc32) {
    await cache?.delete(key);
    throw new PqmError("ModelError", `the weights of ${source.name} are damaged or of another version`);
  }
  if (cache !== undefined && !cached) {
    for (const request of await cache.keys()) {
      if (request.url.split("?")[0] === source.url) await cache.delete(request); // of an earlier version
    }
    await cache.put(key, new Response(compressed)).catch(() => undefined); // no room: fetched again next time
  }
  const stream = new Blob([compressed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new WeightsFile(new Uint8Array(await new Response(stream).arrayBuffer()));
}

/** The browser's cache, which insecure and private pages do not have. */
async function openCache(): Promise<Cache | undefined> {
  try {
    return await globalThis.caches?.open(CACHE);
  } catch {
    return undefined;
  }
}

async function fetchBytes(source: WeightsSource, watch: (bytes: number) => void): Promise<Uint8Array<ArrayBuffer>> {
  const bytes = new Uint8Array(source.bytes);
  let count = 0;
  try {
    const response = await fetch(source.url, { cache: "no-cache" }); // what HTTP kept may be of an earlier version
    if (!response.ok) throw new Error(`status ${response.status}`);
    const reader = response.body!.getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return bytes.subarray(0, count);
      if (count + value.length > bytes.length) throw new Error("longer than it should be");
      bytes.set(value, count);
      count += value.length;
      watch(count);
    }
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error);
    throw new PqmError("ModelError", `the weights of ${source.name} cannot be fetched: ${reason}`);
  }
}
