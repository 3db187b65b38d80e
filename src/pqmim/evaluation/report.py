"""The report of an evaluation: one HTML page that needs no network, and the table of BD-rates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image

from pqmim.errors import ConfigError
from pqmim.evaluation.curve_style import MAX_PLOTTED_BPP, curve_colors, is_plotted, plot_label, plot_values
from pqmim.evaluation.dataset import find_images
from pqmim.evaluation.image_codecs import DecoderCodec, ImageCodec
from pqmim.evaluation.matching import SizeMatcher
from pqmim.evaluation.metrics import METRICS
from pqmim.evaluation.pages import data_uri, page_part
from pqmim.evaluation.perceptual import HIFIC_PATCH
from pqmim.evaluation.pixel_metrics import Pixels, psnr_rgb
from pqmim.evaluation.results import Curve, Evaluation, bd_rates
from pqmim.image_io import load_picture

MAX_PAGE_BYTES = 3_000_000
EMBEDDED_QUALITIES = (92, 85, 75, 60, 40)  # of WebP; the first that keeps the page below the limit


@dataclass(frozen=True)
class ReportOptions:
    """What goes onto the page.

    Attributes:
        output: HTML file.
        title: heading.
        dataset: the images that were evaluated, for the viewer; None leaves the viewer out.
        codecs: able to decode the measured files; the first is the page's subject. Needed for the viewer.
        references: names of the codecs in `codecs` that the viewer puts beside the subject, at equal bytes. Other
            decoders of the subject's files (`DecoderCodec`) are there always, several realisms of one behind a slider.
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
            "as their quality scales allow; other decoders show that very file. "
            "To keep this page small, all pictures in it (the original too) "
            f"are embedded as WebP of quality {webp_quality}; bytes and PSNR are those of the real files."
        )
        page = _page(options.title, content).encode()
        if len(page) < MAX_PAGE_BYTES or not pictures:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_bytes(page)
            return len(page)
    raise ConfigError("the page would be larger than 3 MB: take fewer images or rates")


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
        f"| codec | BD-rate against {chosen.name} | overlap, {plot_label(key)} |",
        "| --- | --- | --- |",
    ]
    for name, rate in bd_rates(curves, chosen, key).items():
        told = "no overlap" if rate.percent is None else f"{rate.percent:+.1f} %"
        span = "" if rate.percent is None else f"{rate.low:.2f} to {rate.high:.2f}"
        lines.append(f"| {name} | {told} | {span} |")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class _Version:
    """An image as one codec gives it back; `size` in bytes is None for the original."""

    name: str
    pixels: Pixels
    size: int | None
    psnr: float | None
    realism: float | None = None


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
                    "realism": version.realism,
                    "source": data_uri(version.pixels, webp_quality),
                }
                for version in self.versions
            ],
        }


def _pictures(evaluation: Evaluation, options: ReportOptions) -> list[_Picture]:
    """Decode the subject's files and make the references' at equal bytes."""
    assert options.dataset is not None  # the caller looked
    subject, *others = options.codecs
    decoders = [codec for codec in others if isinstance(codec, DecoderCodec) and codec.takes_files_of(subject)]
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
            versions = [_Version("original", original, None, None)]
            versions += [_version(codec, data, original) for codec in (subject, *decoders)]
            for codec in references:
                versions.append(_version(codec, SizeMatcher(codec, image).match(len(data))[1], original))
            pictures.append(_Picture(f"{name}, {row['bpp']:.2f} bpp", tuple(versions)))
    return pictures


def _version(codec: ImageCodec, data: bytes, original: Pixels) -> _Version:
    pixels = np.asarray(codec.decode(data).convert("RGB"))
    name, realism = (codec.decoder_name, codec.strength) if isinstance(codec, DecoderCodec) else (codec.name, None)
    return _Version(name, pixels, len(data), psnr_rgb(original, pixels), realism)


def _numbers(evaluation: Evaluation, curves: Sequence[Curve], subject: str, anchor: Curve) -> dict[str, Any]:
    """Everything on the page that is not a picture."""
    keys = [key for key in METRICS if any(key in c.metrics for c in curves if c.kind == "measured")]
    colors = curve_colors(curves)
    of_images = [key for key in keys if not METRICS[key].of_sets]
    fields = ("codec", "quality", "image", "bytes", "bpp", *of_images)
    facts = f"{evaluation.dataset}, {len(evaluation.images)} images; means over images, bits of files on disk"
    if patches := {curve.num_patches for curve in curves if curve.num_patches is not None}:
        facts += f"; KID over {max(patches)} patches of {HIFIC_PATCH} pixels, whiskers 95 % bootstrap over images"
    return {
        "facts": facts,
        "metrics": [
            {
                "key": key,
                "label": plot_label(key),
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
                "shown": is_plotted(curve),
                "bpp": [round(bpp, 5) for bpp in curve.bpp],
                "quality": list(curve.qualities) or None,
                "values": {
                    key: [_short(value) for value in plot_values(curve, key)] for key in keys if key in curve.metrics
                },
                "intervals": {
                    key: [[_short(low), _short(high)] for low, high in intervals]
                    for key, intervals in curve.intervals.items()
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
                        "low": _short(rate.low),
                        "high": _short(rate.high),
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


def _short(value: float) -> float:
    """Six significant digits, which keeps the page small."""
    return float(f"{value:.6g}")


def _page(title: str, content: Mapping[str, Any]) -> str:
    # "<" is escaped so that no text in the data can end the script element.
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return Template(page_part("page.html")).substitute(
        title=title.replace("&", "&amp;").replace("<", "&lt;"),
        style=page_part("page.css"),
        script=page_part("page.js"),
        data=data,
    )


def _anchor(curves: Sequence[Curve], name: str | None) -> Curve:
    if name is None:
        return next((curve for curve in curves if curve.name.startswith("published BPG")), curves[0])
    for curve in curves:
        if curve.name == name:
            return curve
    raise ConfigError(f"no curve {name!r}; there are {', '.join(curve.name for curve in curves)}")
