"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const answers = [];
let since = performance.now();

function show() {
  const pair = data.pairs[answers.length];
  $("facts").textContent = pair
    ? `${answers.length + 1} of ${data.pairs.length}`
    : `All ${data.pairs.length} are answered. Save the answers.`;
  $("trial").hidden = !pair;
  for (const id of ["choose-left", "choose-tie", "choose-right"]) $(id).disabled = !pair;
  $("back").disabled = answers.length === 0;
  $("save").disabled = answers.length === 0;
  if (!pair) return;
  const [picture, left, right] = pair;
  const { original, versions } = data.pictures[picture];
  $("left").src = versions[left].source;
  $("original").src = original;
  $("right").src = versions[right].source;
  since = performance.now();
}

function choose(choice) {
  if (answers.length === data.pairs.length) return;
  const [index, left, right] = data.pairs[answers.length];
  const picture = data.pictures[index];
  answers.push({
    picture: picture.name,
    bpp: picture.bpp,
    left: data.codecs[left],
    right: data.codecs[right],
    choice,
    seconds: Math.round((performance.now() - since) / 100) / 10,
  });
  show();
}

function back() {
  answers.pop();
  show();
}

function zoom() {
  const isReal = $("trial").classList.toggle("real");
  $("zoom").setAttribute("aria-pressed", isReal);
}

/** The file of answers, as text. */
function report() {
  return JSON.stringify({ dataset: data.dataset, seed: data.seed, codecs: data.codecs, answers }, null, 1) + "\n";
}

function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([report()], { type: "application/json" }));
  link.download = `answers-${data.dataset}.json`;
  link.click();
  URL.revokeObjectURL(link.href);
}

const panes = [...document.querySelectorAll(".pane")];
for (const pane of panes) {
  pane.addEventListener("scroll", () => {
    for (const other of panes) other.scrollTo(pane.scrollLeft, pane.scrollTop);
  });
}
const actions = {
  ArrowLeft: () => choose("left"),
  ArrowRight: () => choose("right"),
  ArrowDown: () => choose("tie"),
  ArrowUp: back,
  z: zoom,
};
addEventListener("keydown", (event) => {
  if (!(event.key in actions) || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  event.preventDefault();
  actions[event.key]();
});
$("choose-left").addEventListener("click", () => choose("left"));
$("choose-right").addEventListener("click", () => choose("right"));
$("choose-tie").addEventListener("click", () => choose("tie"));
$("back").addEventListener("click", back);
$("zoom").addEventListener("click", zoom);
$("save").addEventListener("click", save);
addEventListener("beforeunload", (event) => {
  if (answers.length) event.preventDefault();
});
show();
