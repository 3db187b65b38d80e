/** What page and worker say to each other. */

import type { Decoded, Progress } from "./decoder.js";
import type { ModelSource } from "./weights.js";

/** The first message to the worker. */
export interface Start {
  readonly models: readonly ModelSource[];
  /** Name of the decoder that makes the pictures. */
  readonly decoder: string;
  readonly threads: number;
}

/** Every later message to the worker. */
export interface Request {
  readonly id: number;
  readonly data: Uint8Array;
  readonly maxPixels: number;
}

/** Message of the worker about a request. */
export type Reply = { readonly id: number } & (
  | { readonly progress: Progress }
  | { readonly decoded: Decoded }
  | { readonly error: { readonly name: string; readonly message: string; readonly isPqmError: boolean } }
);
