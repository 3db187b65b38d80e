"""Picture of a photo beside pqmim and other codecs at equal bytes; makes docs/images/equal_bytes.png.

    python benchmarks/equal_bytes.py [--image examples/photo.png] [--quality 50] [-o docs/images/equal_bytes.png]
    python benchmarks/equal_bytes.py --image FILE --bpp 0.1 0.25 0.5 --codecs HEIC WebP -o FILE.jpg
    python benchmarks/equal_bytes.py --strip FILE 60 60 256 192 --strip ... --bpp 0.1 --decoders fine vivid -o FILE.jpg

pqmim sets the size, by a quality or by a rate for each row; every other codec gets the highest quality that does not
exceed it, or its smallest file if none does. A file is made for the first decoder and decoded by all. Strips are parts
of several pictures, all of one size, each a row (for each rate). HEIC needs the package pillow-heif (`pqmim[eval]`).
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from panels import Panel, draw_sheet
from PIL import Image

import pqmim
from pqmim.codec import Codec
from pqmim.evaluation.pixel_metrics import psnr_rgb
from pqmim.evaluation.pqmim_codec import parse_decoder

ROOT = Path(__file__).parents[1]
CODECS: dict[str, dict[str, object]] = {
    "JPEG": {"format": "JPEG", "optimize": True},
    "WebP": {"format": "WEBP", "method": 6},
    "AVIF": {"format": "AVIF", "speed": 4, "subsampling": "4:4:4"},
    "HEIC": {"format": "HEIF", "chroma": 444},
}
CAPTION, GAP = 34, 6
"""Pixels above and between the panels."""


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


Version = tuple[str, int | None, Image.Image]
"""Name, bytes of the file, picture."""


def versions_of(image: Image.Image, data: bytes, codecs: Mapping[str, Codec], names: Sequence[str]) -> list[Version]:
    """The original, what each decoder makes of pqmim's file, and the others at no more bytes."""
    versions: list[Version] = [("original", None, image)]
    versions += [(label, len(data), codec.decode(data)) for label, codec in codecs.items()]
    for name in names:
        file = largest_within(lambda quality, name=name: save_as(image, CODECS[name], quality), len(data))
        versions.append((name, len(file), Image.open(io.BytesIO(file)).convert("RGB")))
    return versions


def sheet_of(rows: Sequence[tuple[Sequence[Version], Sequence[int]]]) -> Image.Image:
    """A part of every panel, with bytes and PSNR of the whole picture above it; prints these too."""
    panels: list[list[Panel]] = []
    for versions, (left, top, width, height) in rows:
        image = versions[0][2]
        panels.append([])
        for name, size, picture in versions:
            text = name
            if size is not None:
                psnr = psnr_rgb(np.asarray(image), np.asarray(picture))
                text = f"{name}: {size:,} B, {psnr:.2f} dB"
                print(f"{text}, {8 * size / (image.width * image.height):.3f} bpp")
            panels[-1].append((text, picture.crop((left, top, left + width, top + height))))
    return draw_sheet(panels, caption=CAPTION, font_size=20, gap=GAP)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the sheet and print bytes and PSNR."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, default=ROOT / "examples" / "photo.png")
    parser.add_argument("-m", "--model", default="photo")
    parser.add_argument("--decoders", nargs="+", metavar="DECODER[@REALISM]", default=["fine"])
    parser.add_argument("--quality", type=float, default=50.0)
    parser.add_argument("--bpp", type=float, nargs="+", help="a row for each rate, in place of the quality")
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=["JPEG", "WebP", "AVIF"])
    parser.add_argument("--crop", type=int, nargs=4, metavar=("X", "Y", "W", "H"), default=(60, 60, 400, 400))
    parser.add_argument("--strip", nargs=5, action="append", metavar=("FILE", "X", "Y", "W", "H"), default=[])
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "images" / "equal_bytes.png")
    options = parser.parse_args(arguments)
    if "HEIC" in options.codecs:
        from pillow_heif import register_heif_opener

        register_heif_opener()

    parts = [(Path(file), [int(number) for number in box]) for file, *box in options.strip]
    codecs = {}
    for text in options.decoders:
        decoder, realism = parse_decoder(text)
        label = "pqmim" if len(options.decoders) == 1 else text
        codecs[label] = pqmim.load_codec(options.model, decoder, realism=realism)
    encoder = next(iter(codecs.values()))
    rows = []
    for path, crop in parts or [(options.image, options.crop)]:
        image = Image.open(path).convert("RGB")
        if options.bpp:
            files = [encoder.encode(image, target_bpp=bpp) for bpp in options.bpp]
        else:
            files = [encoder.encode(image, quality=options.quality)]
        rows += [(versions_of(image, data, codecs, options.codecs), crop) for data in files]
    sheet = sheet_of(rows)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    if options.output.suffix == ".png":
        sheet.save(options.output, optimize=True)
    else:
        sheet.save(options.output, quality=85)


if __name__ == "__main__":
    main()
