// Uses web/ in headless Chromium and writes down what happens; tests/web/test_browser.py reads it.
//
//     node tests/web/browser.mjs CHROMIUM FOLDER
//
// FOLDER holds .pqm files, of which each is decoded to NAME.rgba, and models.json: further models by name; "own" is that
// of the files own-*.pqm. Nothing but localhost is asked for anything. The outcome is FOLDER/outcome.json: by scenario,
// what it returned or {failure}.
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

import { serve } from "./servers.mjs";

/** A host whose pages are no secure context. */
const INSECURE = "insecure.test";
const WEB = fileURLToPath(new URL("../../web/", import.meta.url));
const { chromium } = createRequire(join(WEB, "package.json"))("playwright-core");
const [executablePath, folder] = process.argv.slice(2);
const { own, ...models } = JSON.parse(readFileSync(join(folder, "models.json"), "utf8"));
const files = readdirSync(folder).filter((name) => name.endsWith(".pqm"));
const names = files.filter((name) => !name.startsWith("own-"));

const folders = { "/files/": folder, "/": WEB };
const plain = await serve(folders);
const other = await serve(folders);
const isolated = await serve(folders, true);
const browser = await chromium.launch({
  executablePath,
  args: [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    `--host-resolver-rules=MAP ${INSECURE} 127.0.0.1`,
  ],
});

/** Addresses outside of this machine that a page asked for. */
const foreign = [];

/** A page of a profile of its own. */
async function openPage(origin) {
  const context = await browser.newContext();
  context.on("request", (request) => {
    const { protocol, hostname } = new URL(request.url());
    const isLocal = ["127.0.0.1", INSECURE].includes(hostname) || ["blob:", "data:"].includes(protocol);
    if (!isLocal) foreign.push(request.url());
  });
  const page = await context.newPage();
  page.on("pageerror", (error) => process.stderr.write(`page: ${error.message}\n`));
  page.on("console", (message) => process.stderr.write(`console: ${message.text()}\n`));
  await page.goto(`${origin}/empty.html`);
  return page;
}

/** Decode a file in a page: facts, or the error; the pixels are kept in the page. */
function decodeIn(page, name, { module = "/dist/index.js", settings = {}, options = {} } = {}) {
  return page.evaluate(
    async ({ name, module, settings, options }) => {
      const pqmim = await import(module);
      if (Object.keys(settings).length) pqmim.configure(settings);
      const stages = [];
      const onProgress = ({ stage, done, total }) => {
        if (stages.at(-1)?.stage !== stage) stages.push({ stage });
        Object.assign(stages.at(-1), { done, total });
      };
      try {
        const data = await (await fetch(`/files/${name}`)).arrayBuffer();
        const { image, tokens, ...facts } = await pqmim.decodeWithReport(data, { ...options, onProgress });
        globalThis.pixels = image.data;
        const tokenHash = await pqmim.tokenHash(tokens);
        return { ...facts, width: image.width, height: image.height, tokenHash, stages };
      } catch (error) {
        return { error: error.name, message: error.message };
      }
    },
    { name, module, settings, options },
  );
}

/** Decode files to NAME.rgba: by name, what `decodeIn` returns. */
async function decodeAll(page, names, settings = {}) {
  const outcome = {};
  for (const name of names) {
    outcome[name] = await decodeIn(page, name, { settings });
    if (outcome[name].error === undefined) writeFileSync(join(folder, `${name}.rgba`), await pixelsIn(page));
  }
  return outcome;
}

/** The pixels of the last picture. */
async function pixelsIn(page) {
  const base64 = await page.evaluate(async () => {
    const url = await new Promise((resolve) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result);
      reader.readAsDataURL(new Blob([globalThis.pixels]));
    });
    return url.slice(url.indexOf(",") + 1);
  });
  return Buffer.from(base64, "base64");
}

const scenarios = {
  async files() {
    return decodeAll(await openPage(plain.origin), names);
  },

  async ownModel() {
    const ownFiles = files.filter((name) => name.startsWith("own-"));
    return decodeAll(await openPage(plain.origin), ownFiles, { models: [own] });
  },

  async weightsAreFetchedOnce() {
    const page = await openPage(plain.origin);
    plain.asked.length = 0;
    const first = await decodeIn(page, "fast-pixel.pqm");
    await page.reload();
    const second = await decodeIn(page, "fast-pixel.pqm");
    const fetched = plain.asked.filter((path) => path.endsWith(".pqmw"));
    const keys = await page.evaluate(async () => (await (await caches.open("pqmim-weights")).keys()).length);
    return { first, second, fetched, keys };
  },

  async staysResponsive() {
    const page = await openPage(plain.origin);
    return page.evaluate(async () => {
      const pqmim = await import("/dist/index.js");
      const data = await (await fetch("/files/fast-crop-q60.pqm")).arrayBuffer();
      let ticks = 0;
      const timer = setInterval(() => ticks++, 5);
      const both = await Promise.all([pqmim.decode(data.slice(0)), pqmim.decode(data)]);
      clearInterval(timer);
      return { ticks, sizes: both.map((image) => [image.width, image.height]) };
    });
  },

  async threads() {
    const page = await openPage(isolated.origin);
    const isIsolated = await page.evaluate(() => crossOriginIsolated);
    const outcome = await decodeIn(page, "fast-crop-q60.pqm", { settings: { threads: 2 } });
    return { isIsolated, outcome };
  },

  async fromAnotherOrigin() {
    const page = await openPage(plain.origin);
    return decodeIn(page, "fast-odd.pqm", { module: `${other.origin}/dist/index.js` });
  },

  async withoutHttps() {
    const page = await openPage(plain.origin.replace("127.0.0.1", INSECURE));
    return page.evaluate(async () => {
      const pqmim = await import("/dist/index.js");
      const { data } = await pqmim.decode(await (await fetch("/files/alpha-webp.pqm")).blob());
      return { isSecure: isSecureContext, pixels: Array.from(data) };
    });
  },

  async alphaByCanvas() {
    const page = await openPage(plain.origin);
    const outcome = {};
    for (const name of names.filter((candidate) => candidate.startsWith("alpha-"))) {
      outcome[name] = await page.evaluate(async (file) => {
        const { decodeAlpha } = await import("/dist/alpha.js");
        const { parseContainer } = await import("/dist/container.js");
        globalThis.ImageDecoder = undefined;
        const container = parseContainer(new Uint8Array(await (await fetch(`/files/${file}`)).arrayBuffer()));
        const { alpha, width, height } = container;
        return decodeAlpha(alpha, width, height).then(Array.from, (error) => error.message);
      }, name);
    }
    return outcome;
  },

  async otherModels() {
    const outcome = {};
    for (const [name, model] of Object.entries(models)) {
      const page = await openPage(plain.origin);
      outcome[name] = await decodeIn(page, "fast-odd.pqm", { settings: { models: [model] } });
    }
    return outcome;
  },

  async otherDecoders() {
    const outcome = {};
    for (const decoder of ["fine", "slow"]) {
      const page = await openPage(plain.origin);
      outcome[decoder] = await decodeIn(page, "fast-odd.pqm", { settings: { decoder } });
      if (outcome[decoder].error === undefined) {
        writeFileSync(join(folder, `${decoder}.rgba`), await pixelsIn(page));
      }
    }
    return outcome;
  },

  async limit() {
    const page = await openPage(plain.origin);
    plain.asked.length = 0;
    const outcome = await decodeIn(page, "fast-odd.pqm", { options: { maxPixels: 1000 } });
    return { ...outcome, fetched: plain.asked.filter((path) => path.endsWith(".pqmw")) };
  },

  async element() {
    const page = await openPage(plain.origin);
    return page.evaluate(async () => {
      await import("/dist/element.js");
      const show = (attributes, place = document.body) =>
        new Promise((resolve) => {
          const element = Object.assign(document.createElement("pqm-img"), attributes);
          const heard = [];
          const hear = (event) => {
            if (heard.at(-1) !== event.type) heard.push(event.type);
            if (event.type === "progress") return;
            const canvas = element.shadowRoot.querySelector("canvas");
            const pixel = canvas.width ? Array.from(canvas.getContext("2d").getImageData(5, 5, 1, 1).data) : null;
            const { complete, naturalWidth, naturalHeight } = element;
            const label = canvas.getAttribute("aria-label");
            resolve({ heard, complete, naturalWidth, naturalHeight, label, pixel, message: event.message ?? null });
          };
          for (const kind of ["progress", "load", "error"]) element.addEventListener(kind, hear);
          place.append(element);
        });
      const picture = await show({ src: "/files/fast-odd.pqm", alt: "trees" });
      const damaged = await show({ src: "/files/damaged.pqm" });
      const missing = await show({ src: "/files/nothing.pqm" });
      // Far below the view a lazy picture waits until it is scrolled to.
      const far = document.body.appendChild(document.createElement("div"));
      far.style.paddingTop = "10000px";
      const asked = () => performance.getEntriesByName(new URL("/files/fast-row.pqm", location).href).length;
      const element = document.createElement("pqm-img");
      element.setAttribute("loading", "lazy");
      element.src = "/files/fast-row.pqm";
      far.append(element);
      await new Promise((resolve) => setTimeout(resolve, 300));
      const before = asked();
      const loaded = new Promise((resolve) => element.addEventListener("load", resolve));
      element.scrollIntoView();
      await loaded;
      return { picture, damaged, missing, lazy: { before, width: element.naturalWidth } };
    });
  },

  async demo() {
    const page = await openPage(plain.origin);
    await page.goto(`${plain.origin}/demo/index.html`);
    await page.setInputFiles("#file", join(folder, "fast-odd.pqm"));
    const hash = await page.locator("#token-hash").textContent();
    const picture = await page.locator("#picture").textContent();
    await page.setInputFiles("#file", join(folder, "damaged.pqm"));
    const status = page.locator("#status", { hasText: "mismatch" });
    return { hash, picture, error: await status.textContent() };
  },
};

const outcome = { foreign };
for (const [name, scenario] of Object.entries(scenarios)) {
  try {
    outcome[name] = await scenario();
  } catch (error) {
    outcome[name] = { failure: String(error?.stack ?? error) };
  }
}
writeFileSync(join(folder, "outcome.json"), JSON.stringify(outcome));
await browser.close();
for (const server of [plain, other, isolated]) server.close();
