// Runs at the end of a report page (test_report.py): presses what a reader presses, and notes what is seen.
"use strict";
{
  const all = (selector) => [...document.querySelectorAll(selector)];
  const one = (id) => document.getElementById(id);
  const press = (box, label) => all(`${box} button`).find((b) => b.textContent.startsWith(label)).click();
  const set = (id, value, event) => {
    one(id).value = value;
    one(id).dispatchEvent(new Event(event));
  };
  const curves = () => all("#plot path").map((path) => path.dataset.curve);
  const bytes = () => all("#table tbody tr").map((row) => row.cells[3].textContent);
  const findings = {};

  findings.curves = curves();
  press("#legend", "webp");
  findings.hidden = curves();
  press("#legend", "webp");

  press("#metrics", "MS-SSIM");
  findings.axis = all("#plot .axis").map((label) => label.textContent);
  press("#metrics", "PSNR RGB");

  const dot = document.querySelector("#plot circle").getBoundingClientRect();
  one("chart").dispatchEvent(new PointerEvent("pointermove", { clientX: dot.x + 3, clientY: dot.y + 3 }));
  findings.tip = one("tip").textContent;

  set("anchor", "jpeg", "change");
  findings.bd = all("#bdtable tbody tr").map((row) => [row.cells[0].textContent, row.cells[1].textContent]);

  press("#table", "bytes");
  findings.rising = bytes();
  press("#table", "bytes");
  findings.falling = bytes();

  set("slider", 250, "input");
  findings.clip = one("over").style.clipPath;
  press("#zoom", "2");
  findings.width = one("canvas").getBoundingClientRect().width * devicePixelRatio;
  findings.captions = all(".captions b").map((name) => name.textContent);
  findings.overflow = document.documentElement.scrollWidth - window.innerWidth;

  const images = [...document.images];
  Promise.all(images.map((image) => image.decode())).then(() => {
    findings.sizes = images.map((image) => `${image.naturalWidth}x${image.naturalHeight}`);
    one("findings").textContent = JSON.stringify(findings);
  });
}
