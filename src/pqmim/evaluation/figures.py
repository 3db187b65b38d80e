"""Figures for papers, by matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pqmim.errors import MissingExtraError
from pqmim.evaluation.benchmark import Benchmark, Timing
from pqmim.evaluation.curve_style import (
    COLORS,
    MAX_PLOTTED_BPP,
    curve_colors,
    cycle,
    is_plotted,
    plot_label,
    plot_values,
)
from pqmim.evaluation.metrics import METRICS
from pqmim.evaluation.processes import MEBI
from pqmim.evaluation.results import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def write_figures(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Draw rate-distortion curves with matplotlib, as SVG and PNG: `rd_METRIC.svg`, `rd_METRIC.png`.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    files: list[Path] = []
    colors = curve_colors(evaluation.curves)
    for key in METRICS:
        curves = [curve for curve in evaluation.curves if key in curve.metrics and is_plotted(curve)]
        if not any(curve.kind == "measured" for curve in curves):
            continue
        figure, (axes,) = _figure(1)
        for curve in curves:
            is_published = curve.kind == "published"
            values = plot_values(curve, key)
            points = [(x, y) for x, y in zip(curve.bpp, values, strict=True) if x <= MAX_PLOTTED_BPP]
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                color=colors[curve.name],
                label=curve.name,
                linestyle="--" if is_published else "-",
                linewidth=1.0 if is_published else 1.6,
                marker=None if is_published else "o",
                markersize=3,
            )
        _log_axis(axes, "x")
        axes.set_xlabel("bits per pixel")
        axes.set_ylabel(plot_label(key))
        axes.set_title(f"{evaluation.dataset}, {len(evaluation.images)} images", fontsize=10)
        axes.legend(fontsize=7, handlelength=3)
        files += _save(figure, folder / f"rd_{key}")
    return files


def write_benchmark_figures(benchmark: Benchmark, folder: Path) -> list[Path]:
    """Draw how seconds and memory grow with pixels: `bench_seconds` and `bench_memory`, as SVG and PNG.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    names = list(dict.fromkeys(timing.codec for timing in benchmark.timings))
    counts = sorted({timing.threads for timing in benchmark.timings})
    quantities: tuple[tuple[str, str, Callable[[Timing, str], float | None]], ...] = (
        ("seconds", "seconds", lambda timing, way: getattr(timing, f"{way}_seconds")),
        (
            "memory",
            "added peak memory (MiB)",
            lambda timing, way: (getattr(timing, f"{way}_memory") or 0) / MEBI or None,
        ),
    )
    files: list[Path] = []
    for file_name, label, value in quantities:
        figure, panels = _figure(2)
        for axes, way in zip(panels, ("encode", "decode"), strict=True):
            for name, color in zip(names, cycle(COLORS, len(names)), strict=True):
                for count in counts:
                    points = [
                        (timing.megapixels, y)
                        for timing in benchmark.timings
                        if (timing.codec, timing.threads) == (name, count) and (y := value(timing, way)) is not None
                    ]
                    if points:
                        axes.plot(
                            [x for x, _ in points],
                            [y for _, y in points],
                            color=color,
                            label=f"{name}, {count} thread{'s' if count > 1 else ''}",
                            linestyle="-" if count == counts[0] else "--",
                            marker="o",
                            markersize=3,
                        )
            _log_axis(axes, "x")
            _log_axis(axes, "y")
            axes.set_xlabel("megapixels")
            axes.set_ylabel(label)
            axes.set_title(way, fontsize=10)
        panels[-1].legend(fontsize=7, handlelength=4, loc="upper left", bbox_to_anchor=(1.02, 1))
        files += _save(figure, folder / f"bench_{file_name}")
    return files


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "eval") from None
    figure = Figure(figsize=(6.4 if panels == 1 else 10.5, 4.4), layout="constrained")
    axes = [figure.add_subplot(1, panels, i + 1) for i in range(panels)]
    for panel in axes:
        panel.grid(visible=True, which="major", color="#e3e6ea", linewidth=0.7)
        panel.set_axisbelow(True)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    return figure, axes


def _log_axis(axes: Axes, which: str) -> None:
    """A logarithmic axis labelled 0.1, 0.2, 0.5, 1, ... instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _save(figure: Figure, stem: Path) -> list[Path]:
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = [stem.with_suffix(".svg"), stem.with_suffix(".png")]
    figure.savefig(files[0])
    figure.savefig(files[1], dpi=200)
    return files
