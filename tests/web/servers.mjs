// Static servers on localhost for the tests of web/.
import { createReadStream, existsSync, statSync } from "node:fs";
import { createServer } from "node:http";
import { extname, join, normalize } from "node:path";

const SCRIPT = "text/javascript";
const TYPES = { ".html": "text/html", ".js": SCRIPT, ".mjs": SCRIPT, ".wasm": "application/wasm" };

/**
 * Serve folders; other origins may read them.
 *
 * @param folders path prefix -> folder.
 * @param isIsolated whether pages are cross-origin isolated.
 * @returns the origin, the paths asked for so far, and a function that ends the server.
 */
export async function serve(folders, isIsolated = false) {
  const asked = [];
  const server = createServer((request, response) => {
    const path = normalize(decodeURIComponent(new URL(request.url, "http://localhost").pathname));
    asked.push(path);
    response.setHeader("Access-Control-Allow-Origin", "*");
    if (isIsolated) {
      response.setHeader("Cross-Origin-Opener-Policy", "same-origin");
      response.setHeader("Cross-Origin-Embedder-Policy", "require-corp");
    }
    if (path === "/empty.html") {
      response.setHeader("Content-Type", "text/html");
      response.end("<!doctype html><title>empty</title><link rel=icon href=data:,>");
      return;
    }
    const prefix = Object.keys(folders).find((candidate) => path.startsWith(candidate));
    const file = prefix === undefined ? "" : join(folders[prefix], path.slice(prefix.length));
    if (prefix === undefined || !existsSync(file) || !statSync(file).isFile()) {
      response.statusCode = 404;
      response.end();
      return;
    }
    response.setHeader("Content-Type", TYPES[extname(file)] ?? "application/octet-stream");
    createReadStream(file).pipe(response);
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  return { origin: `http://127.0.0.1:${server.address().port}`, asked, close: () => server.close() };
}
