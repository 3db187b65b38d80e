// Runs at the end of a page of pairs (test_pairs.py): answers as a reader does, and notes what is saved.
"use strict";
{
  const one = (id) => document.getElementById(id);
  const key = (name) => dispatchEvent(new KeyboardEvent("keydown", { key: name, cancelable: true }));
  const findings = { first: one("facts").textContent };
  key("ArrowLeft");
  findings.second = one("facts").textContent;
  key("ArrowUp");
  findings.undone = one("facts").textContent;
  one("choose-right").click();
  key("ArrowDown");
  key("z");
  findings.zoomed = one("trial").className;
  key("ArrowLeft");
  findings.last = one("facts").textContent;
  key("ArrowLeft"); // there is nothing left to answer
  findings.saved = JSON.parse(report());
  const images = [...document.images];
  Promise.all(images.map((image) => image.decode())).then(() => {
    findings.sizes = images.map((image) => `${image.naturalWidth}x${image.naturalHeight}`);
    one("findings").textContent = JSON.stringify(findings);
  });
}
