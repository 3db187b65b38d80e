"""The price of cutting a file: quality against bytes of truncated files beside freshly encoded ones.

    python benchmarks/truncation.py DATASET -o OUT [-m MODEL] [--images N] [--qualities 50 80] [--shares 5 10 20 ...]
    python benchmarks/truncation.py DATASET -o OUT --strip docs/images/truncation.png [--strip-image FILE]

Of each image a file of each quality is cut to shares of its bytes (percent) and decoded, what is missing filled as
likely; beside it the image is encoded anew to the same number of bytes. BD-rate of the first against the second is the
price: bytes that cutting costs at equal quality.

--strip also writes a picture of one image at 5, 10, 20, 40 and 100 % of a file, scaled so that the picture stays below
400 kB.

Needs `pqmim[eval]`. Writes OUT/truncation.json and .md, and OUT/measurements.jsonl as it goes; run again, it continues.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measurements import MS_SSIM, PSNR, Bench, Photo, Row, curve, make_parser, mean, number, read_photos, table, write
from panels import Panel, draw_sheet
from PIL import Image
from rich.progress import track

from pqmim import bitstream
from pqmim.evaluation.pixel_metrics import psnr_rgb
from pqmim.evaluation.results import bd_rates
from pqmim.image_io import load_picture

ROOT = Path(__file__).resolve().parents[1]
STRIP_SHARES = (5.0, 10.0, 20.0, 40.0, 100.0)
MAX_STRIP_BYTES = 400_000
CAPTION, GAP = 42, 4  # pixels


def cut(data: bytes, share: float) -> bytes:
    """A share (percent) of a file, as far as a file can be so small."""
    return bitstream.truncate(data, max(math.ceil(len(data) * share / 100), bitstream.smallest_size(data)))


def measure(bench: Bench, photo: Photo, quality: float, shares: Sequence[float]) -> Row:
    """Cut one file to all shares, and encode the image anew to the same sizes."""
    whole = bench.codec.encode(photo.pixels, quality=quality)
    points = []
    for share in shares:
        data = cut(whole, share)
        fresh = bench.codec.encode(photo.pixels, target_bytes=len(data))
        points.append(
            {
                "share": share,
                "truncated": bench.worth(photo, data),
                "fresh": bench.worth(photo, fresh),
            }
        )
    return {"quality": quality, "bytes": len(whole), "points": points}


def prices(rows: Sequence[Row], shares: Sequence[float], lowest: float) -> dict[str, str]:
    """BD-rate of truncated against fresh files, from a share upwards, as cells of a table; metric -> text."""
    indices = [index for index, share in enumerate(shares) if share >= lowest]
    curves = {
        kind: curve(kind, [[row["points"][index][kind] for row in rows] for index in indices])
        for kind in ("truncated", "fresh")
    }
    cells = {}
    for key in (PSNR, MS_SSIM):
        is_known = all(key in of.metrics for of in curves.values()) and len(indices) > 1
        rate = bd_rates([curves["truncated"]], curves["fresh"], key)["truncated"] if is_known else None
        if rate is None:
            cells[key] = ""
        elif rate.percent is None:
            cells[key] = "no common range"
        else:
            cells[key] = f"{rate.percent:+.1f} % ({rate.low:.2f} to {rate.high:.2f} dB)"
    return cells


def report(rows: dict[float, list[Row]], shares: Sequence[float]) -> str:
    """Table of BD-rates and table of the points."""
    lines = []
    for quality, of in rows.items():
        for lowest in shares:
            if sum(share >= lowest for share in shares) > 1:
                cells = prices(of, shares, lowest)
                lines.append([f"{quality:g}", f"{lowest:g} % or more", cells[PSNR], cells[MS_SSIM]])
    text = table(["quality of the file", "kept", "BD-rate PSNR", "BD-rate MS-SSIM"], lines) + "\n"
    lines = []
    for quality, of in rows.items():
        for index, share in enumerate(shares):
            points: list[dict[str, Any]] = [row["points"][index] for row in of]
            cells_of = [
                f"{quality:g}",
                f"{share:g} %",
                number(mean([point["truncated"] for point in points], "known_share"), ".1%"),
            ]
            for kind in ("truncated", "fresh"):
                worth = [point[kind] for point in points]
                cells_of += [number(mean(worth, key), form) for key, form in (("bpp", ".4f"), (PSNR, ".2f"))]
                cells_of.append(number(mean(worth, MS_SSIM), ".4f"))
            lines.append(cells_of)
    header = ["quality of the file", "bytes kept", "tokens kept", "truncated (bpp)", "PSNR (dB)", "MS-SSIM"]
    return text + table([*header, "fresh (bpp)", "PSNR (dB)", "MS-SSIM"], lines)


def write_strip(bench: Bench, image: Path, quality: float, output: Path) -> None:
    """Draw one image at several shares of a file, with bytes, rate and PSNR (of the full size) above."""
    original = load_picture(image).rgb
    whole = bench.codec.encode(original, quality=quality)
    panels = []
    for share in STRIP_SHARES:
        data = cut(whole, share)
        pixels = bench.decode(data)
        bpp = 8 * len(data) / (original.shape[0] * original.shape[1])
        caption = f"{share:g} %: {len(data):,} B\n{bpp:.3f} bpp, {psnr_rgb(original, pixels):.2f} dB"
        panels.append((caption, Image.fromarray(np.ascontiguousarray(pixels))))
    output.parent.mkdir(parents=True, exist_ok=True)
    width = min(original.shape[1], 400)
    while len(data := _drawn(panels, width, output.suffix)) >= MAX_STRIP_BYTES:
        width = int(0.95 * width)
    output.write_bytes(data)
    print(f"{output}: {len(data):,} bytes, panels {width} pixels wide")


def _drawn(panels: Sequence[Panel], width: int, suffix: str) -> bytes:
    """The strip as a file, each panel `width` pixels wide."""
    height = max(1, round(width * panels[0][1].height / panels[0][1].width))
    row = [(caption, picture.resize((width, height), Image.Resampling.LANCZOS)) for caption, picture in panels]
    sheet = draw_sheet([row], caption=CAPTION, font_size=14, gap=GAP)
    buffer = io.BytesIO()
    sheet.save(buffer, format=Image.registered_extensions()[suffix.lower()], optimize=True)
    return buffer.getvalue()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write tables and strip."""
    parser = make_parser(__doc__)
    parser.add_argument("--qualities", type=float, nargs="+", default=[50.0, 80.0], help="of the files that are cut")
    parser.add_argument("--shares", type=float, nargs="+", default=[5, 10, 20, 40, 60, 80, 100], help="percent")
    parser.add_argument("--strip", type=Path, metavar="PATH", help="picture to write, .png or .jpg")
    parser.add_argument("--strip-image", type=Path, default=ROOT / "examples" / "photo.png")
    parser.add_argument("--strip-quality", type=float, default=80.0)
    options = parser.parse_args(arguments)
    if options.strip is not None and options.strip.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        parser.error("the strip must be .png or .jpg")
    if not all(0 < share <= 100 for share in options.shares):
        parser.error("shares must be above 0 and at most 100 percent")

    bench = Bench(options.model, options.output, options.device, options.decoder)
    if options.strip is not None:
        write_strip(bench, options.strip_image, options.strip_quality, options.strip)
    shares = sorted(set(options.shares))
    rows: dict[float, list[Row]] = {quality: [] for quality in options.qualities}
    photos = read_photos(options.dataset, options.images)
    for photo, quality in track([(photo, quality) for photo in photos for quality in rows], "truncation"):
        what = f"quality {quality!r}, shares {shares}"
        rows[quality].append(bench.row(photo, what, partial(measure, bench, photo, quality, shares)))
    write(options.output, "truncation", [row for of in rows.values() for row in of], report(rows, shares))


if __name__ == "__main__":
    main()
