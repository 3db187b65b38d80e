"""Picture of a photo beside pqmim and other codecs at equal bytes; makes docs/images/equal_bytes.png.

    python benchmarks/equal_bytes.py [--image examples/photo.png] [--quality 30] [-o docs/images/equal_bytes.png]

pqmim sets the size; every other codec gets the highest quality that does not exceed it, or its smallest file if none
does.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import pqmim
from pqmim.metrics import psnr_rgb

ROOT = Path(__file__).parents[1]
CODECS: dict[str, dict[str, object]] = {
    "JPEG": {"format": "JPEG", "optimize": True},
    "WebP": {"format": "WEBP", "method": 6},
    "AVIF": {"format": "AVIF", "speed": 4, "subsampling": "4:4:4"},
}


def largest_within(save: Callable[[int], bytes], limit: int) -> bytes:
    """Highest quality (1 to 95) whose file is not above `limit` bytes; quality 1 if none is."""
    low, high, best = 1, 95, save(1)
    while low <= high:
        quality = (low + high) // 2
        data = save(quality)
        if len(data) <= limit:
            low, best = quality + 1, data
        else:
            high = quality - 1
    return best


def save_as(image: Image.Image, options: dict[str, object], quality: int) -> bytes:
    """Encode with Pillow."""
    buffer = io.BytesIO()
    image.save(buffer, quality=quality, **options)
    return buffer.getvalue()


def main() -> None:
    """Write the sheet and print bytes and PSNR."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, default=ROOT / "examples" / "photo.png")
    parser.add_argument("--model", default="small")
    parser.add_argument("--quality", type=float, default=30.0)
    parser.add_argument("--crop", type=int, nargs=4, metavar=("X", "Y", "W", "H"), default=(60, 60, 400, 400))
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "images" / "equal_bytes.png")
    options = parser.parse_args()

    image = Image.open(options.image).convert("RGB")
    data = pqmim.encode(image, quality=options.quality, model=options.model)
    codec = pqmim.load_codec(options.model)
    panels = [("original", None, image), ("pqmim", len(data), codec.decode(data))]
    for name, settings in CODECS.items():
        file = largest_within(lambda quality, settings=settings: save_as(image, settings, quality), len(data))
        panels.append((name, len(file), Image.open(io.BytesIO(file)).convert("RGB")))

    left, top, width, height = options.crop
    caption, gap = 44, 6
    sheet = Image.new("RGB", ((width + gap) * len(panels) - gap, height + caption), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=20)
    for index, (name, size, picture) in enumerate(panels):
        x = index * (width + gap)
        sheet.paste(picture.crop((left, top, left + width, top + height)), (x, caption))
        text = name
        if size is not None:
            psnr = psnr_rgb(np.asarray(image), np.asarray(picture))
            bpp = 8 * size / (image.width * image.height)
            text = f"{name}: {size:,} B, {psnr:.2f} dB"
            print(f"{name}: {size} bytes, {bpp:.3f} bpp, {psnr:.2f} dB")
        draw.text((x + 4, 10), text, fill="black", font=font)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(options.output, optimize=True)


if __name__ == "__main__":
    main()
