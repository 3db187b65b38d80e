"""BD-rate over parts of the range of rates, from what `pqmim eval` measured.

    pqmim eval KODAK --decoder fine --decoder fast --reference webp,heic,avif -o OUT
    python benchmarks/bd_ranges.py OUT [--codecs pqmim-fine pqmim-fast] [--rates 0.05 0.8 2.0] [--published]

Prints a table: bits of each codec against every other curve, PSNR (RGB) / MS-SSIM, negative = smaller files. A part of
the range is what both curves have between the qualities that the other codec has at the two rates; a curve that covers
less than a quarter of it, in logarithms, has no number. With --published the package's curves for Kodak are rows too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from measurements import table

from pqmim.evaluation.bd_rate import BdRate, bd_rate, rising
from pqmim.evaluation.pixel_metrics import ms_ssim_db
from pqmim.evaluation.published import published_kodak_curves

Curve = tuple[list[float], list[float]]
"""Rates, bits per pixel, and qualities, rising."""
METRICS = ("psnr-rgb", "ms-ssim-rgb")


def read_curves(results: Path, metric: str) -> dict[str, Curve]:
    """Curves by codec, of the files that an evaluation left in `results/`."""
    curves = {}
    for path in sorted(results.glob("*.json")):
        content = json.loads(path.read_text("utf-8"))
        values = content["results"].get(metric)
        if values:
            curves[content["name"]] = curve_of(content["results"]["bpp"], values, metric)
    return curves


def curve_of(bpp: Sequence[float], values: Sequence[float], metric: str) -> Curve:
    """A curve of what was measured, MS-SSIM in dB."""
    return rising(bpp, [ms_ssim_db(value) for value in values] if metric == METRICS[1] else values)


def part(curve: Curve, low: float, high: float) -> Curve:
    """The curve between two qualities, its ends interpolated in the logarithm of the rate."""
    log_rates, qualities = np.log(curve[0]), np.asarray(curve[1])
    low, high = max(low, qualities[0]), min(high, qualities[-1])
    inner = [q for q in qualities if low < q < high]
    wanted = [low, *inner, high]
    return np.exp(np.interp(wanted, qualities, log_rates)).tolist(), wanted


def compare(other: Curve, own: Curve, rates: tuple[float, float]) -> BdRate | None:
    """Bits of `own` against `other` where the other has these rates; None if it has less than a quarter of them."""
    log_rates = np.log(other[0])
    low, high = np.interp(np.log(rates), log_rates, other[1])
    covered = min(np.log(rates[1]), log_rates[-1]) - max(np.log(rates[0]), log_rates[0])
    if covered < 0.25 * np.log(rates[1] / rates[0]):
        return None
    return bd_rate(*part(other, low, high), *part(own, low, high))


def cell(found: Sequence[BdRate | None]) -> str:
    """Both metrics."""
    texts = ["-" if each is None or each.percent is None else f"{each.percent:+.1f}" for each in found]
    return "" if set(texts) == {"-"} else " / ".join(texts) + " %"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="OUT", help="folder of an evaluation")
    parser.add_argument("--codecs", nargs="+", metavar="NAME", help="[default: all of pqmim]")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.05, 0.8, 2.0], help="bounds of the parts, bpp")
    parser.add_argument("--published", action="store_true", help="Kodak's published curves are rows too")
    options = parser.parse_args(arguments)
    curves = {metric: read_curves(options.output / "results", metric) for metric in METRICS}
    own = options.codecs or [name for name in curves[METRICS[0]] if name.startswith("pqmim")]
    others = {name for found in curves.values() for name in found} - set(own)
    ranges = list(pairwise(options.rates))
    if options.published:
        for curve in published_kodak_curves():
            for metric in METRICS:
                if values := curve.metrics.get(metric):
                    curves[metric][curve.name] = curve_of(curve.bpp, values, metric)
                    others.add(curve.name)
    rows = []
    for other in sorted(others):
        row = [other]
        for name in own:
            for rates in ranges:
                pairs = [(curves[m].get(other), curves[m].get(name)) for m in METRICS]
                row.append(cell([compare(a, b, rates) if a and b else None for a, b in pairs]))
        rows.append(row)
    header = [f"{name}, {low:g} to {high:g} bpp" for name in own for low, high in ranges]
    print(table(["against", *header], rows))


if __name__ == "__main__":
    main()
