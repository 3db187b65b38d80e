"""What a region gains and the rest loses, at equal bytes.

    python benchmarks/region.py DATASET -o OUT [-m MODEL] [--images N] [--qualities 30 50 70] [--weight 8]

Every image is encoded plainly, and again to the same number of bytes with a region of the given weight: the rectangle
of half the width and half the height in the middle. The second file is never larger; at best it is up to 3 % smaller.
If no trade-off makes it small enough, its last tokens are cut off, which costs quality: "cut" counts those.

Writes OUT/region.json and .md, and OUT/measurements.jsonl as it goes; run again, it continues.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from measurements import Bench, Photo, Row, make_parser, mean, number, read_photos, table, write
from rich.progress import track

from pqmim import bitstream
from pqmim.evaluation.pixel_metrics import Pixels, psnr_rgb
from pqmim.options import EncodeOptions, Region


def central_region(pixels: Pixels, weight: float) -> Region:
    """A quarter of the area, in the middle."""
    height, width = pixels.shape[:2]
    return Region(width // 4, height // 4, max(1, width // 2), max(1, height // 2), weight)


def psnr_inside_and_outside(original: Pixels, decoded: Pixels, region: Region) -> tuple[float, float]:
    """PSNR of the two parts, dB."""
    is_inside = np.zeros(original.shape[:2], dtype=bool)
    is_inside[region.y : region.y + region.height, region.x : region.x + region.width] = True
    inside, outside = (psnr_rgb(original[part], decoded[part]) for part in (is_inside, ~is_inside))
    return inside, outside


def measure(bench: Bench, photo: Photo, quality: float, weight: float) -> Row:
    """Encode one image both ways."""
    region = central_region(photo.pixels, weight)
    plain = bench.codec.encode(photo.pixels, quality=quality)
    options = EncodeOptions(regions=(region,), scale=1)  # the scale of the plain file
    favored = bench.codec.encode(photo.pixels, target_bytes=len(plain), options=options)
    is_cut = bitstream.parse(favored).is_partial
    row: Row = {"quality": quality, "weight": weight, "ratio": len(favored) / len(plain), "is_cut": is_cut}
    for name, data in (("plain", plain), ("region", favored)):
        inside, outside = psnr_inside_and_outside(photo.pixels, bench.decode(data), region)
        row |= {
            f"{name} bytes": len(data),
            f"{name} bpp": 8 * len(data) / photo.num_pixels,
            f"{name} inside": inside,
            f"{name} outside": outside,
        }
    return row | {f"{part} gain": row[f"region {part}"] - row[f"plain {part}"] for part in ("inside", "outside")}


def report(rows: dict[float, list[Row]]) -> str:
    """Means over the images."""
    header = ["quality", "bpp", "bytes with region / plain", "cut"]
    for part in ("inside", "outside"):
        header += [f"PSNR {part}, plain (dB)", "with region (dB)", "difference (dB)"]
    lines = []
    for quality, of in rows.items():
        cells = [f"{quality:g}", number(mean(of, "plain bpp"), ".4f"), number(mean(of, "ratio"), ".2%")]
        cells.append(f"{sum(row['is_cut'] for row in of)} of {len(of)}")
        for part in ("inside", "outside"):
            cells += [number(mean(of, f"{name} {part}"), ".2f") for name in ("plain", "region")]
            cells.append(number(mean(of, f"{part} gain"), "+.2f"))
        lines.append(cells)
    return table(header, lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--qualities", type=float, nargs="+", default=[30.0, 50.0, 70.0])
    parser.add_argument("--weight", type=float, default=8.0, help="of the region [default: 8]")
    options = parser.parse_args(arguments)

    bench = Bench(options.model, options.output, options.device, options.decoder)
    rows: dict[float, list[Row]] = {quality: [] for quality in options.qualities}
    photos = read_photos(options.dataset, options.images)
    for photo, quality in track([(photo, quality) for photo in photos for quality in rows], "region"):
        what = f"quality {quality!r}, weight {options.weight!r}"
        row = bench.row(photo, what, partial(measure, bench, photo, quality, options.weight))
        rows[quality].append(row)
    write(options.output, "region", [row for of in rows.values() for row in of], report(rows))


if __name__ == "__main__":
    main()
