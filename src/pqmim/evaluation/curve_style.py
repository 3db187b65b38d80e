"""How curves are shown, on the page and in figures alike: which ones, in what color, on what scale."""

from __future__ import annotations

from collections.abc import Sequence

from pqmim.evaluation.metrics import METRICS
from pqmim.evaluation.results import Curve, comparable_quality

MAX_PLOTTED_BPP = 2.0
COLORS = (
    "#d1382c",
    "#1f77b4",
    "#2a9d4b",
    "#8e5bc4",
    "#e08a00",
    "#17a2b0",
    "#c0508f",
    "#7a6a4f",
    "#6b7f12",
    "#4a5a78",
)
PUBLISHED_COLORS = (
    *("#6b7280", "#8a6d3b", "#3b7a8a", "#7d3f73", "#5f7a3b", "#a05a4a", "#3f68b5", "#888d96"),
    *("#b3801f", "#2f8f83", "#9a4f8f", "#567a2f", "#b5523f", "#4f5fa8", "#7f6a2f"),
)
PUBLISHED_SHOWN = ("BPG 4:4:4", "VTM 4:4:4", "hyperprior (Ballé")


def curve_colors(curves: Sequence[Curve]) -> dict[str, str]:
    colors: dict[str, str] = {}
    for kind, palette in (("measured", COLORS), ("published", PUBLISHED_COLORS)):
        names = [curve.name for curve in curves if curve.kind == kind]
        colors.update(zip(names, cycle(palette, len(names)), strict=True))
    return colors


def cycle(palette: Sequence[str], count: int) -> list[str]:
    return [palette[i % len(palette)] for i in range(count)]


def is_plotted(curve: Curve) -> bool:
    """All that was measured, and of the published curves those that everyone knows."""
    shown = tuple(f"published {name}" for name in PUBLISHED_SHOWN)
    return curve.kind == "measured" or curve.name.startswith(shown)


def plot_label(key: str) -> str:
    return "MS-SSIM RGB (dB)" if key == "ms-ssim-rgb" else METRICS[key].label


def plot_values(curve: Curve, key: str) -> Sequence[float]:
    """Values of a metric as they are plotted: MS-SSIM in dB, where its curves can be told apart."""
    return comparable_quality(curve, key) if key == "ms-ssim-rgb" else curve.metrics[key]
