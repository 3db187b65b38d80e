// The file of this name is copied from onnxruntime-web when the package is built.
export * from "onnxruntime-web/wasm";
