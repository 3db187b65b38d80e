// Copies the files of ONNX Runtime that the page needs into the package, so that its users need no build step.
import { copyFileSync, mkdirSync } from "node:fs";

const from = new URL("../node_modules/onnxruntime-web/dist/", import.meta.url);
const to = new URL("../dist/runtime/", import.meta.url);
mkdirSync(to, { recursive: true });
for (const name of ["ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"]) {
  copyFileSync(new URL(name, from), new URL(name, to));
}
