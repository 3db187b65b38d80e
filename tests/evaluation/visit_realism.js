// Runs at the end of a report page (test_report.py): moves the slider of realism, and notes what is shown.
"use strict";
{
  const one = (id) => document.getElementById(id);
  const set = (id, value, event) => {
    one(id).value = value;
    one(id).dispatchEvent(new Event(event));
  };
  const seen = () => ({
    hidden: getComputedStyle(one("strength")).display === "none",
    value: one("realismvalue").textContent,
    caption: one("rightfacts").querySelector("b").textContent,
    source: data.pictures[0].versions.findIndex((version) => version.source === one("under").src),
  });
  const findings = { names: [...one("right").options].map((option) => option.value), before: seen() };
  set("realism", 0, "input");
  findings.lowest = seen();
  set("realism", 1, "input");
  findings.middle = seen();
  set("right", "webp", "change");
  findings.without = seen();
  one("findings").textContent = JSON.stringify(findings);
}
