"""What HTML pages of this package are made of; they need no network."""

from __future__ import annotations

import base64
import io
from importlib import resources

from PIL import Image

from pqmim.evaluation.pixel_metrics import Pixels


def page_part(name: str) -> str:
    """Return one of the files that pages are made of."""
    return resources.files("pqmim.evaluation").joinpath("report_page", name).read_text("utf-8")


def data_uri(pixels: Pixels, webp_quality: int) -> str:
    """Return (H, W, 3) uint8 pixels as the source of an <img>, lossy."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", quality=webp_quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def lossless_uri(pixels: Pixels) -> str:
    """Return (H, W, 3) uint8 pixels as the source of an <img>, every one as it is."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", lossless=True, quality=50, method=4)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
