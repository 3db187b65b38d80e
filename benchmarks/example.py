"""The photo of the repository, at any size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PHOTO = ROOT / "examples" / "photo.png"


def photo_of_size(width: int, height: int, path: Path = PHOTO) -> Image.Image:
    """A photo cut, or continued by its mirror images to the right and below, so that its content stays a photo's."""
    with Image.open(path) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    missing = [(0, max(0, size - have)) for size, have in zip((height, width), pixels.shape[:2], strict=True)]
    return Image.fromarray(np.pad(pixels, [*missing, (0, 0)], mode="symmetric")[:height, :width])


def size_of(text: str) -> tuple[int, int]:
    """Read WIDTHxHEIGHT, as an argument parser's type."""
    width, height = map(int, text.split("x"))
    return width, height
