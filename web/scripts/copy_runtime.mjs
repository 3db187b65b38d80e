// Copies the files of ONNX Runtime that the page needs into the package, so that its users need no build step.
import { copyFileSync, mkdirSync } from "node:fs";

const web = new URL("../", import.meta.url);
mkdirSync(new URL("dist/runtime/", web), { recursive: true });
for (const name of ["ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"]) {
  copyFileSync(new URL(`node_modules/onnxruntime-web/dist/${name}`, web), new URL(`dist/runtime/${name}`, web));
}
copyFileSync(new URL("../LICENSE", web), new URL("dist/LICENSE", web));
