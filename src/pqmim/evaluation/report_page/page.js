"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const shown = new Set(data.curves.filter((c) => c.shown).map((c) => c.name));
let metric = data.metrics[0];

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function drawn(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

const bytes = (n) => n.toLocaleString("en") + " B";
const places = (key) => (key.startsWith("kid") ? 5 : /^(ms-ssim|lpips|dists)/.test(key) ? 4 : 2);
const digits = (value, key) => value.toFixed(places(key));

// ---- curves

function ticks(low, high, about) {
  const raw = (high - low) / about;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const result = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-6; v += step) result.push(Number(v.toPrecision(6)));
  return result;
}

let plotted = [];
function plot() {
  const width = Math.max(320, $("chart").clientWidth);
  const height = Math.round(Math.min(560, Math.max(320, width * 0.56)));
  const box = { left: 52, right: width - 12, top: 12, bottom: height - 44 };
  const svg = $("plot");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren();
  const curves = data.curves.filter((c) => shown.has(c.name) && c.values[metric.key]);
  const points = curves.flatMap((c) => c.bpp.map((x, i) => [x, c.values[metric.key][i]]).filter((p) => p[0] <= data.max_bpp));
  plotted = [];
  if (!points.length) {
    svg.append(drawn("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "no curve shown"));
    return;
  }
  // The rate axis is logarithmic: a codec that is x % cheaper lies the same distance to the left everywhere.
  const xs = points.map((p) => Math.log2(p[0])), ys = points.map((p) => p[1]);
  const x0 = Math.min(...xs) - 0.1, x1 = Math.max(...xs) + 0.1;
  const pad = (Math.max(...ys) - Math.min(...ys)) * 0.04 || 1;
  const y0 = Math.min(...ys) - pad, y1 = Math.max(...ys) + pad;
  const sx = (x) => box.left + ((Math.log2(x) - x0) / (x1 - x0)) * (box.right - box.left);
  const sy = (y) => box.bottom - ((y - y0) / (y1 - y0)) * (box.bottom - box.top);
  for (const y of ticks(y0, y1, 7)) {
    svg.append(drawn("line", { x1: box.left, x2: box.right, y1: sy(y), y2: sy(y), class: "grid" }));
    svg.append(drawn("text", { x: box.left - 8, y: sy(y) + 4, "text-anchor": "end" }, String(y)));
  }
  for (const x of [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]) {
    if (Math.log2(x) < x0 || Math.log2(x) > x1) continue;
    svg.append(drawn("line", { x1: sx(x), x2: sx(x), y1: box.top, y2: box.bottom, class: "grid" }));
    svg.append(drawn("text", { x: sx(x), y: box.bottom + 18, "text-anchor": "middle" }, String(x)));
  }
  svg.append(drawn("text", { x: (box.left + box.right) / 2, y: height - 6, "text-anchor": "middle", class: "axis" }, "bits per pixel"));
  svg.append(drawn("text", { x: 14, y: (box.top + box.bottom) / 2, "text-anchor": "middle", class: "axis", transform: `rotate(-90 14 ${(box.top + box.bottom) / 2})` }, metric.label));
  for (const curve of curves) {
    const line = curve.bpp.map((x, i) => ({ curve, x, y: curve.values[metric.key][i], i })).filter((p) => p.x <= data.max_bpp);
    const path = line.map((p, i) => `${i ? "L" : "M"}${sx(p.x).toFixed(1)},${sy(p.y).toFixed(1)}`).join("");
    svg.append(drawn("path", { d: path, fill: "none", stroke: curve.color, "stroke-width": curve.subject ? 3 : 1.8, "stroke-dasharray": curve.kind === "published" ? "5 4" : "none", "stroke-linejoin": "round", "data-curve": curve.name }));
    const intervals = curve.intervals[metric.key];
    for (const p of line) {
      if (intervals) {
        const [low, high] = intervals[p.i].map((y) => sy(Math.min(y1, Math.max(y0, y))));
        svg.append(drawn("line", { x1: sx(p.x), x2: sx(p.x), y1: low, y2: high, stroke: curve.color, class: "whisker" }));
      }
      svg.append(drawn("circle", { cx: sx(p.x), cy: sy(p.y), r: curve.kind === "published" ? 2 : 3.2, fill: curve.color }));
      plotted.push({ ...p, px: sx(p.x), py: sy(p.y) });
    }
  }
  svg.append(drawn("circle", { id: "mark", r: 7, fill: "none", stroke: "currentColor", "stroke-width": 2, visibility: "hidden" }));
}

function point(event) {
  const frame = $("plot").getBoundingClientRect();
  const scale = $("plot").viewBox.baseVal.width / frame.width;
  const x = (event.clientX - frame.left) * scale, y = (event.clientY - frame.top) * scale;
  let best = null, distance = 40 ** 2;
  for (const p of plotted) {
    const d = (p.px - x) ** 2 + (p.py - y) ** 2;
    if (d < distance) [best, distance] = [p, d];
  }
  const tip = $("tip"), mark = $("mark");
  tip.hidden = !best;
  if (mark) mark.setAttribute("visibility", best ? "visible" : "hidden");
  if (!best) return;
  mark.setAttribute("cx", best.px);
  mark.setAttribute("cy", best.py);
  const quality = best.curve.quality ? `, quality ${best.curve.quality[best.i]}` : "";
  const interval = best.curve.intervals[metric.key]?.[best.i];
  const range = interval ? ` (${digits(interval[0], metric.key)} to ${digits(interval[1], metric.key)})` : "";
  tip.replaceChildren(element("b", {}, best.curve.name + quality), element("br"), `${best.x.toFixed(4)} bpp, ${metric.label} ${digits(best.y, metric.key)}${range}`);
  const left = best.px / scale + 14;
  tip.style.left = Math.max(0, Math.min(left, frame.width - tip.offsetWidth)) + "px";
  tip.style.top = Math.max(0, best.py / scale - tip.offsetHeight - 12) + "px";
}

let allNames = false;
function legend() {
  const known = data.curves.filter((c) => c.values[metric.key]);
  const named = known.filter((c) => allNames || c.kind === "measured" || c.shown || shown.has(c.name));
  const chips = named.map((curve) => {
    const sample = drawn("svg", { viewBox: "0 0 20 10" });
    sample.append(drawn("line", { x1: 0, x2: 20, y1: 5, y2: 5, stroke: curve.color, "stroke-width": 3, "stroke-dasharray": curve.kind === "published" ? "5 3" : "none" }));
    return element("button", {
      "aria-pressed": shown.has(curve.name),
      onclick: () => { shown.has(curve.name) ? shown.delete(curve.name) : shown.add(curve.name); legend(); plot(); },
    }, sample, curve.name);
  });
  const others = known.length - named.length;
  if (others || allNames) {
    chips.push(element("button", { onclick: () => { allNames = !allNames; legend(); } }, allNames ? "fewer names" : `${others} more published`));
  }
  $("legend").replaceChildren(...chips);
}

function tabs(box, choices, current, choose) {
  box.replaceChildren(...choices.map(([value, label]) =>
    element("button", { "aria-pressed": value === current, onclick: () => { choose(value); tabs(box, choices, value, choose); } }, label)));
}

// ---- BD-rate

function bdTable() {
  const anchor = $("anchor").value;
  $("bdmetric").textContent = metric.label;
  const worst = (r) => r.percent ?? Infinity;
  const rates = [...((data.bd[metric.key] || {})[anchor] || [])].sort((a, b) => worst(a) - worst(b));
  const scale = Math.max(10, ...rates.map((r) => Math.abs(r.percent ?? 0)));
  const clip = Math.min(scale, 150);
  const head = element("tr", {}, ...["codec", "BD-rate", "", "range of overlap"].map((t) => element("th", {}, t)));
  const rows = rates.map((r) => {
    const curve = data.curves.find((c) => c.name === r.name);
    const meter = element("span", { class: "meter" });
    if (r.percent !== null) {
      const share = (Math.min(Math.abs(r.percent), clip) / clip) * 50;
      meter.append(element("i", { style: `width:${share}%;background:${curve.color};${r.percent < 0 ? "right:50%" : "left:50%"}` }));
    }
    const percent = r.percent === null ? "no overlap" : `${r.percent > 0 ? "+" : r.percent < 0 ? "\u2212" : ""}${Math.abs(r.percent).toFixed(1)} %`;
    const range = r.percent === null ? "" : `${digits(r.low, metric.key === "ms-ssim-rgb" ? "" : metric.key)} to ${digits(r.high, metric.key === "ms-ssim-rgb" ? "" : metric.key)}${metric.bd_unit}`;
    return element("tr", {}, element("td", {}, r.name), element("td", {}, percent), element("td", {}, meter), element("td", {}, range));
  });
  $("bdtable").replaceChildren(element("thead", {}, head), element("tbody", {}, ...rows));
}

// ---- viewer

let zoom = 0;  // 0 fits the page
let realism = 1;
function viewer() {
  const picture = data.pictures[$("picture").selectedIndex];
  const names = [...new Set(picture.versions.map((v) => v.name))];
  for (const [id, preferred] of [["left", 1], ["right", 2]]) {
    const before = $(id).value;
    $(id).replaceChildren(...names.map((n) => element("option", {}, n)));
    $(id).selectedIndex = names.includes(before) ? names.indexOf(before) : Math.min(preferred, names.length - 1);
  }
  pair();
}

/** Realisms that the pictures on the two sides are there at, rising; none for most codecs. */
function strengths(picture) {
  const names = ["left", "right"].map((id) => $(id).value);
  const versions = picture.versions.filter((v) => names.includes(v.name) && v.realism !== null);
  return [...new Set(versions.map((v) => v.realism))].sort((a, b) => a - b);
}

function slide() {
  realism = strengths(data.pictures[$("picture").selectedIndex])[$("realism").value];
  pair();
}

/** The version to show on a side: of one that has a realism, that which the slider says. */
function chosen(picture, id) {
  const versions = picture.versions.filter((v) => v.name === $(id).value);
  return versions.reduce((best, v) => (Math.abs(v.realism - realism) < Math.abs(best.realism - realism) ? v : best));
}

function pair() {
  const picture = data.pictures[$("picture").selectedIndex];
  const steps = strengths(picture);
  $("strength").hidden = steps.length < 2;
  $("realism").max = Math.max(0, steps.length - 1);
  $("realism").value = Math.max(0, steps.indexOf(realism));
  $("realismvalue").textContent = realism;
  for (const [id, image] of [["left", "over"], ["right", "under"]]) {
    const version = chosen(picture, id);
    $(image).src = version.source;
    const facts = version.bytes === null ? "" : `${bytes(version.bytes)}, ${version.bpp.toFixed(3)} bpp, ${version.psnr.toFixed(2)} dB`;
    const name = version.realism === null ? version.name : `${version.name}, realism ${version.realism}`;
    $(id + "facts").replaceChildren(element("b", {}, name), element("br"), facts);
  }
  const ratio = window.devicePixelRatio || 1;
  const canvas = $("canvas");
  canvas.style.aspectRatio = `${picture.width} / ${picture.height}`;
  canvas.style.width = zoom ? `${(picture.width * zoom) / ratio}px` : `min(100%, ${picture.width}px)`;
  canvas.classList.toggle("sharp", zoom > 1);
  wipe();
}

function wipe() {
  const share = $("slider").value / 10;
  $("over").style.clipPath = `inset(0 ${100 - share}% 0 0)`;
  $("bar").style.left = share + "%";
}

function dragWipe(event) {
  if (event.pointerType === "touch" && zoom) return;  // a finger pans an enlarged image
  const frame = $("canvas").getBoundingClientRect();
  $("slider").value = Math.round((1000 * (event.clientX - frame.left)) / frame.width);
  wipe();
}

// ---- image by image

let order = { key: "image", falling: false };
function columns() {
  return ["image", "codec", "quality", "bytes", "bpp", ...data.metrics.filter((m) => !m.of_sets).map((m) => m.key)];
}

function table() {
  const codec = $("codec").value, quality = $("quality").value;
  const rows = data.rows.filter((r) => r.codec === codec && (quality === "all" || String(r.quality) === quality));
  const sign = order.falling ? -1 : 1;
  rows.sort((a, b) => {
    const [x, y] = [a[order.key], b[order.key]];
    if (x === null || y === null) return (x === null) - (y === null);
    return sign * (typeof x === "string" ? x.localeCompare(y) : x - y);
  });
  const heads = columns().map((key) => element("th", { "aria-sort": key === order.key ? (order.falling ? "descending" : "ascending") : "none" },
    element("button", { onclick: () => { order = { key, falling: order.key === key && !order.falling }; table(); } }, key + (key === order.key ? (order.falling ? " \u25be" : " \u25b4") : ""))));
  const text = (key, v) => (v === null || v === undefined ? "\u2013" : key === "bytes" ? v.toLocaleString("en") : key === "bpp" ? v.toFixed(4) : typeof v === "number" && key !== "quality" ? digits(v, key) : String(v));
  const body = rows.map((r) => element("tr", {}, ...columns().map((key) => element("td", {}, text(key, r[key])))));
  $("table").replaceChildren(element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...body));
  $("count").textContent = `${rows.length} measurements.`;
}

function qualities() {
  const values = [...new Set(data.rows.filter((r) => r.codec === $("codec").value).map((r) => r.quality))];
  $("quality").replaceChildren(...["all", ...values].map((q) => element("option", {}, String(q))));
  $("quality").selectedIndex = Math.ceil(values.length / 2);
  table();
}

// ---- start

$("facts").textContent = data.facts;
tabs($("metrics"), data.metrics.map((m) => [m.key, m.label]), metric.key, (key) => {
  metric = data.metrics.find((m) => m.key === key);
  legend(); plot(); bdTable();
});
$("anchor").replaceChildren(...data.curves.map((c) => element("option", {}, c.name)));
$("anchor").value = data.anchor;
$("anchor").addEventListener("change", bdTable);
$("chart").addEventListener("pointermove", point);
$("chart").addEventListener("pointerdown", point);
$("chart").addEventListener("pointerleave", () => { $("tip").hidden = true; });
window.addEventListener("resize", plot);
legend(); plot(); bdTable();

if (data.pictures.length) {
  $("view").hidden = false;
  $("viewnote").textContent = data.view_note;
  $("picture").replaceChildren(...data.pictures.map((p) => element("option", {}, p.name)));
  $("picture").addEventListener("change", viewer);
  for (const id of ["left", "right"]) $(id).addEventListener("change", pair);
  tabs($("zoom"), [[0, "fit"], [1, "1:1"], [2, "2\u00d7"], [4, "4\u00d7"]], zoom, (value) => { zoom = value; pair(); });
  $("slider").addEventListener("input", wipe);
  $("realism").addEventListener("input", slide);
  $("canvas").addEventListener("pointermove", dragWipe);
  $("canvas").addEventListener("pointerdown", dragWipe);
  viewer();
}

const measured = data.curves.filter((c) => c.kind === "measured");
$("codec").replaceChildren(...measured.map((c) => element("option", {}, c.name)));
$("codec").addEventListener("change", qualities);
qualities();

$("codecs").replaceChildren(element("tbody", {}, ...data.curves.map((c) =>
  element("tr", {}, element("td", {}, c.name), element("td", { class: "wrap" }, c.description)))));
$("missing").replaceChildren(...Object.entries(data.missing).map(([name, reason]) =>
  element("li", {}, `${name}: not measured, ${reason}`)));
