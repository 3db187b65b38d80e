/**
 * `<pqm-img src="x.pqm" alt="...">`, which shows a .pqm picture as `<img>` shows others.
 *
 * Attributes: `src`, `alt`, `loading="lazy"` (decode when it comes near the view). Events: `progress`, whose `loaded`
 * and `total` count the tokens, `load`, and `error`, which says why in its `message`. The size is there as soon as the
 * file is.
 */

import { decode, readHeader } from "./index.js";

const STYLE = ":host { display: inline-block } canvas { display: block; max-width: 100%; height: auto }";

export class PqmImage extends HTMLElement {
  static readonly observedAttributes = ["src", "alt"];
  readonly #canvas = document.createElement("canvas");
  readonly #observer = new IntersectionObserver((entries) => {
    if (entries.some((entry) => entry.isIntersecting)) this.#show();
  }, { rootMargin: "50%" });
  #isComplete = false;

  constructor() {
    super();
    const style = document.createElement("style");
    style.textContent = STYLE;
    this.#canvas.setAttribute("role", "img");
    this.#canvas.width = this.#canvas.height = 0;
    this.attachShadow({ mode: "open" }).append(style, this.#canvas);
  }

  get src(): string {
    return this.getAttribute("src") ?? "";
  }

  set src(url: string) {
    this.setAttribute("src", url);
  }

  get alt(): string {
    return this.getAttribute("alt") ?? "";
  }

  set alt(text: string) {
    this.setAttribute("alt", text);
  }

  /** Whether the picture is there. */
  get complete(): boolean {
    return this.#isComplete;
  }

  /** Sides of the picture in pixels, 0 as long as they are not known. */
  get naturalWidth(): number {
    return this.#canvas.width;
  }

  get naturalHeight(): number {
    return this.#canvas.height;
  }

  connectedCallback(): void {
    this.#start();
  }

  disconnectedCallback(): void {
    this.#observer.disconnect();
  }

  attributeChangedCallback(name: string): void {
    if (name === "alt") this.#canvas.setAttribute("aria-label", this.alt);
    else if (this.isConnected) this.#start();
  }

  #start(): void {
    this.#isComplete = false;
    this.#observer.disconnect();
    if (this.getAttribute("loading") === "lazy") this.#observer.observe(this);
    else this.#show();
  }

  async #show(): Promise<void> {
    this.#observer.disconnect();
    const url = this.src;
    if (url === "") return;
    const isCurrent = () => this.isConnected && this.src === url;
    try {
      const response = await fetch(url);
      if (!response.ok) throw new Error(`${url}: status ${response.status}`);
      const data = new Uint8Array(await response.arrayBuffer());
      if (!isCurrent()) return;
      const { width, height } = readHeader(data);
      this.#canvas.width = width;
      this.#canvas.height = height;
      const image = await decode(data, {
        onProgress: ({ stage, done, total }) => {
          if (stage !== "tokens" || !isCurrent()) return;
          this.dispatchEvent(new ProgressEvent("progress", { lengthComputable: true, loaded: done, total }));
        },
      });
      if (!isCurrent()) return;
      this.#canvas.getContext("2d")!.putImageData(image, 0, 0);
      this.#isComplete = true;
      this.dispatchEvent(new Event("load"));
    } catch (error) {
      if (!isCurrent()) return;
      const message = error instanceof Error ? error.message : String(error);
      this.dispatchEvent(new ErrorEvent("error", { error, message }));
    }
  }
}

customElements.define("pqm-img", PqmImage);

declare global {
  interface HTMLElementTagNameMap {
    "pqm-img": PqmImage;
  }
}
