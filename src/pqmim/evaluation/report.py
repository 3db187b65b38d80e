"""Reports: one HTML page that needs no network, and figures for papers."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pqmim.errors import ConfigError, MissingExtraError
from pqmim.evaluation.benchmark import MEBI, Benchmark, Timing
from pqmim.evaluation.evaluate import Curve, Evaluation, bd_rates, comparable_quality, find_images
from pqmim.evaluation.metrics import METRICS, psnr_rgb
from pqmim.evaluation.reference_codecs import ImageCodec
from pqmim.image_io import load_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PAGE_BYTES = 3_000_000
EMBEDDED_QUALITIES = (92, 85, 75, 60, 40)  # of WebP; the first that keeps the page below the limit
MATCHING_STEPS = 7  # bisections of a reference codec's quality
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


@dataclass(frozen=True)
class ReportOptions:
    """What goes onto the page.

    Attributes:
        output: HTML file.
        title: heading.
        dataset: the images that were evaluated, for the viewer; None leaves the viewer out.
        codecs: able to decode the measured files; the first is the page's subject. Needed for the viewer.
        references: names of the codecs in `codecs` that the viewer puts beside the subject, at equal bytes.
        anchor: curve that BD-rates are told against at first; by default published BPG, or the first curve.
        images: how many images the viewer shows, spread over the data set.
        bpp: rates that the viewer shows them at; the subject's measured point next to each is taken.
    """

    output: Path
    title: str = "pqmim evaluation"
    dataset: Path | None = None
    codecs: tuple[ImageCodec, ...] = ()
    references: tuple[str, ...] = ("avif", "webp", "jpeg")
    anchor: str | None = None
    images: int = 4
    bpp: tuple[float, ...] = (0.1, 0.25)


def write_report(evaluation: Evaluation, options: ReportOptions) -> int:
    """Write the page.

    Returns:
        Its size in bytes; below 3 MB.

    Raises:
        ConfigError: the anchor is not a curve, the images are not those evaluated, or the page cannot be made
            small enough.
    """
    curves = [curve for curve in evaluation.curves if "psnr-rgb" in curve.metrics]
    subject = options.codecs[0].name if options.codecs else curves[0].name
    content = _numbers(evaluation, curves, subject, _anchor(curves, options.anchor))
    pictures = _pictures(evaluation, options) if options.dataset is not None and options.codecs else []
    for webp_quality in EMBEDDED_QUALITIES:
        content["pictures"] = [picture.embedded(webp_quality) for picture in pictures]
        content["view_note"] = (
            "The references were encoded anew to the same number of bytes as the first codec's file, as near "
            "as their quality scales allow. To keep this page small, all pictures in it (the original too) "
            f"are embedded as WebP of quality {webp_quality}; bytes and PSNR are those of the real files."
        )
        page = _page(options.title, content).encode()
        if len(page) < MAX_PAGE_BYTES or not pictures:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_bytes(page)
            return len(page)
    raise ConfigError("the page would be larger than 3 MB: take fewer images or rates")


def write_figures(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Draw rate-distortion curves with matplotlib, as SVG and PNG: `rd_METRIC.svg`, `rd_METRIC.png`.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    files: list[Path] = []
    colors = _curve_colors(evaluation.curves)
    for key in METRICS:
        curves = [curve for curve in evaluation.curves if key in curve.metrics and _is_plotted(curve)]
        if not any(curve.kind == "measured" for curve in curves):
            continue
        figure, (axes,) = _figure(1)
        for curve in curves:
            is_published = curve.kind == "published"
            values = _plot_values(curve, key)
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
        axes.set_ylabel(_plot_label(key))
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
            for name, color in zip(names, _cycle(COLORS, len(names)), strict=True):
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


def bd_rate_table(evaluation: Evaluation, *, anchor: str | None = None, key: str = "psnr-rgb") -> str:
    """BD-rates of all curves against an anchor as Markdown, with the range of overlap.

    Args:
        anchor: name of a curve; by default as in `ReportOptions`.

    Raises:
        ConfigError: no such curve.
    """
    curves = [curve for curve in evaluation.curves if key in curve.metrics]
    chosen = _anchor(curves, anchor)
    lines = [
        f"| codec | BD-rate against {chosen.name} | overlap, {_plot_label(key)} |",
        "| --- | --- | --- |",
    ]
    for name, rate in bd_rates(curves, chosen, key).items():
        told = "no overlap" if rate.percent is None else f"{rate.percent:+.1f} %"
        span = "" if rate.percent is None else f"{rate.low:.2f} to {rate.high:.2f}"
        lines.append(f"| {name} | {told} | {span} |")
    return "\n".join(lines) + "\n"


def match_bytes(codec: ImageCodec, image: Image.Image, target: int) -> bytes:
    """Encode an image into a file as near to `target` bytes as the codec's quality scale allows."""
    low, high = codec.qualities[0], codec.qualities[-1]
    files = [codec.encode(image, low), codec.encode(image, high)]
    for _ in range(MATCHING_STEPS):
        middle = (low + high) / 2
        files.append(codec.encode(image, middle))
        if len(files[-1]) > target:
            high = middle
        else:
            low = middle
    return min(files, key=lambda data: abs(len(data) - target))


@dataclass(frozen=True)
class _Version:
    """An image as one codec gives it back; `size` in bytes is None for the original."""

    name: str
    pixels: np.ndarray
    size: int | None
    psnr: float | None


@dataclass(frozen=True)
class _Picture:
    """All versions of an image at one rate."""

    name: str
    versions: tuple[_Version, ...]

    def embedded(self, webp_quality: int) -> dict[str, Any]:
        height, width = self.versions[0].pixels.shape[:2]
        return {
            "name": self.name,
            "width": width,
            "height": height,
            "versions": [
                {
                    "name": version.name,
                    "bytes": version.size,
                    "bpp": None if version.size is None else 8 * version.size / (width * height),
                    "psnr": version.psnr,
                    "source": data_uri(version.pixels, webp_quality),
                }
                for version in self.versions
            ],
        }


def _pictures(evaluation: Evaluation, options: ReportOptions) -> list[_Picture]:
    """Decode the subject's files and make the references' at equal bytes."""
    assert options.dataset is not None  # the caller looked
    subject, *others = options.codecs
    references = [codec for codec in others if codec.name in options.references and codec.missing() is None]
    files = find_images(options.dataset)
    if files.keys() != evaluation.images.keys():
        raise ConfigError(f"{options.dataset}: not the images that were evaluated")
    rows = [row for row in evaluation.rows if row["codec"] == subject.name]
    if not rows:
        raise ConfigError(f"{subject.name} was not evaluated, so the viewer cannot show it")
    count = min(options.images, len(files))
    spread = [list(files)[round(i)] for i in np.linspace(0, len(files) - 1, count)]
    pictures = []
    for bpp in options.bpp:
        for name in spread:
            original = load_picture(files[name]).rgb
            image = Image.fromarray(original)
            row = min((r for r in rows if r["image"] == name), key=lambda r: abs(r["bpp"] - bpp))
            folder = Path(row["folder"], "files", subject.name, f"{row['quality']:g}")
            data = (folder / f"{name}.{subject.extension}").read_bytes()
            versions = [_Version("original", original, None, None), _version(subject, data, original)]
            for codec in references:
                versions.append(_version(codec, match_bytes(codec, image, len(data)), original))
            pictures.append(_Picture(f"{name}, {row['bpp']:.2f} bpp", tuple(versions)))
    return pictures


def _version(codec: ImageCodec, data: bytes, original: np.ndarray) -> _Version:
    pixels = np.asarray(codec.decode(data).convert("RGB"))
    return _Version(codec.name, pixels, len(data), psnr_rgb(original, pixels))


def data_uri(pixels: np.ndarray, webp_quality: int) -> str:
    """Return (H, W, 3) uint8 pixels as the source of an <img>, lossy."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", quality=webp_quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def _numbers(evaluation: Evaluation, curves: Sequence[Curve], subject: str, anchor: Curve) -> dict[str, Any]:
    """Everything on the page that is not a picture."""
    keys = [key for key in METRICS if any(key in c.metrics for c in curves if c.kind == "measured")]
    colors = _curve_colors(curves)
    of_images = [key for key in keys if not METRICS[key].of_sets]
    fields = ("codec", "quality", "image", "bytes", "bpp", *of_images)
    facts = f"{evaluation.dataset}, {len(evaluation.images)} images; means over images, bits of files on disk"
    return {
        "facts": facts,
        "metrics": [
            {
                "key": key,
                "label": _plot_label(key),
                "of_sets": METRICS[key].of_sets,
                "bd_unit": " dB" if "psnr" in key or key == "ms-ssim-rgb" else "",
            }
            for key in keys
        ],
        "max_bpp": MAX_PLOTTED_BPP,
        "anchor": anchor.name,
        "curves": [
            {
                "name": curve.name,
                "kind": curve.kind,
                "description": curve.description,
                "color": colors[curve.name],
                "subject": curve.name == subject,
                "shown": _is_plotted(curve),
                "bpp": [round(bpp, 5) for bpp in curve.bpp],
                "quality": list(curve.qualities) or None,
                "values": {
                    key: [round(value, 5) for value in _plot_values(curve, key)] for key in keys if key in curve.metrics
                },
            }
            for curve in curves
        ],
        "bd": {
            key: {
                base.name: [
                    {
                        "name": name,
                        "percent": None if rate.percent is None else round(rate.percent, 3),
                        "low": round(rate.low, 4),
                        "high": round(rate.high, 4),
                    }
                    for name, rate in bd_rates(curves, base, key).items()
                ]
                for base in curves
                if key in base.metrics
            }
            for key in keys
        },
        "rows": [
            {field: round(v, 5) if isinstance(v := row.get(field), float) else v for field in fields}
            for row in evaluation.rows
        ],
        "missing": dict(evaluation.missing),
    }


def _plot_label(key: str) -> str:
    return "MS-SSIM RGB (dB)" if key == "ms-ssim-rgb" else METRICS[key].label


def _plot_values(curve: Curve, key: str) -> Sequence[float]:
    """Values of a metric as they are plotted: MS-SSIM in dB, where its curves can be told apart."""
    return comparable_quality(curve, key) if key == "ms-ssim-rgb" else curve.metrics[key]


def _page(title: str, content: Mapping[str, Any]) -> str:
    # "<" is escaped so that no text in the data can end the script element.
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return Template(page_part("page.html")).substitute(
        title=title.replace("&", "&amp;").replace("<", "&lt;"),
        style=page_part("page.css"),
        script=page_part("page.js"),
        data=data,
    )


def page_part(name: str) -> str:
    """Return one of the files that pages are made of."""
    return resources.files("pqmim.evaluation").joinpath("report_page", name).read_text("utf-8")


def _anchor(curves: Sequence[Curve], name: str | None) -> Curve:
    if name is None:
        return next((curve for curve in curves if curve.name.startswith("published BPG")), curves[0])
    for curve in curves:
        if curve.name == name:
            return curve
    raise ConfigError(f"no curve {name!r}; there are {', '.join(curve.name for curve in curves)}")


def _is_plotted(curve: Curve) -> bool:
    """All that was measured, and of the published curves those that everyone knows."""
    shown = tuple(f"published {name}" for name in PUBLISHED_SHOWN)
    return curve.kind == "measured" or curve.name.startswith(shown)


def _curve_colors(curves: Sequence[Curve]) -> dict[str, str]:
    colors: dict[str, str] = {}
    for kind, palette in (("measured", COLORS), ("published", PUBLISHED_COLORS)):
        names = [curve.name for curve in curves if curve.kind == kind]
        colors.update(zip(names, _cycle(palette, len(names)), strict=True))
    return colors


def _cycle(palette: Sequence[str], count: int) -> list[str]:
    return [palette[i % len(palette)] for i in range(count)]


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
