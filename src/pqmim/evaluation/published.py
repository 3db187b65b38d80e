"""What others published, curves and perceptual figures; quoted, never re-measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class PublishedCurve:
    """A rate-distortion curve that others measured on Kodak; quoted, never re-measured.

    Attributes:
        name: always begins with "published".
        bpp: rising, bits per pixel.
        metrics: "psnr-rgb" in dB, "ms-ssim-rgb" in [0, 1] where the source gives it; one number per rate.
        source: repository, commit and file the figures were copied from.
    """

    name: str
    bpp: tuple[float, ...]
    metrics: Mapping[str, tuple[float, ...]]
    source: str


def published_kodak_curves() -> tuple[PublishedCurve, ...]:
    """Read the published Kodak curves that ship with the package."""
    content = _read("published_kodak.json")
    return tuple(
        PublishedCurve(
            name=f"published {curve['name']}",
            bpp=tuple(curve["bpp"]),
            metrics={key: tuple(values) for key, values in curve["metrics"].items()},
            source=curve["source"],
        )
        for curve in content["curves"]
    )


def published_perceptual_table(dataset: str) -> str:
    """Perceptual figures of others as Markdown, with their sources. Made by other protocols than pqmim's own.

    Args:
        dataset: "clic2020", or "kodak" (which is too small for FID and KID).
    """
    content = _read("published_perceptual.json")
    columns = {"fid": "FID", "kid": "KID x 1000", "lpips": "LPIPS", "dists": "DISTS", "psnr": "PSNR (dB)"}
    points = [(codec["name"], point) for codec in content["codecs"] for point in codec["points"][dataset]]
    shown = [key for key in columns if any(key in point for _, point in points)]
    lines = [
        "| " + " | ".join(("published", "bpp", *(columns[key] for key in shown))) + " |",
        "| " + " | ".join(["---"] * (2 + len(shown))) + " |",
    ]
    for name, point in points:
        cells = [name, f"{point['bpp']:.3f}"]
        for key in shown:
            value = point.get(key)
            cells.append("" if value is None else f"{1000 * value:.2f}" if key == "kid" else f"{value:g}")
        lines.append("| " + " | ".join(cells) + " |")
    sources = "; ".join(f"{codec['name']}: {codec['source']}" for codec in content["codecs"])
    return "\n".join(lines) + f"\n\n{content['protocol']} Sources: {sources}.\n"


def _read(name: str) -> Any:
    return json.loads(resources.files("pqmim.evaluation").joinpath(name).read_text("utf-8"))
