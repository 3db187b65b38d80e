/** The worker: decodes one file after the other, beside the page. */

import { Decoder } from "./decoder.js";
import { PqmError } from "./errors.js";
import type { Reply, Request, Start } from "./protocol.js";
import { startRuntime } from "./session.js";

let decoder: Decoder | undefined;
let queue: Promise<void> = Promise.resolve();

self.onmessage = ({ data }: MessageEvent<Start | Request>) => {
  if ("models" in data) {
    startRuntime(data.threads);
    decoder = new Decoder(data.models, data.decoder);
  } else {
    queue = queue.then(() => answer(data));
  }
};

async function answer({ id, data, maxPixels }: Request): Promise<void> {
  try {
    const decoded = await decoder!.decode(data, maxPixels, (progress) => reply({ id, progress }));
    reply({ id, decoded }, [decoded.pixels.data.buffer, decoded.tokens.buffer]);
  } catch (error) {
    const { name, message } = error instanceof Error ? error : new Error(String(error));
    reply({ id, error: { name, message, isPqmError: error instanceof PqmError } });
  }
}

function reply(message: Reply, transfer: Transferable[] = []): void {
  self.postMessage(message, { transfer });
}
