"""Rate-distortion curves that others published; quoted, never re-measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources


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
    content = json.loads(resources.files("pqmim.evaluation").joinpath("published_kodak.json").read_text("utf-8"))
    return tuple(
        PublishedCurve(
            name=f"published {curve['name']}",
            bpp=tuple(curve["bpp"]),
            metrics={key: tuple(values) for key, values in curve["metrics"].items()},
            source=curve["source"],
        )
        for curve in content["curves"]
    )
