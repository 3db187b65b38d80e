"""Rate and distortion of files that hold a part of the tokens, by what the decoder makes of the rest.

    python benchmarks/fill.py KODAK -m small -o results/fill

Every picture is encoded with 20, 40, 60, 80 and 100 % of its tokens, in coding order, at qualities 30 and 60, and every
file is decoded with the fills `likely`, `sample` (seed 0, temperatures 1 and 0.7) and `none`. Writes OUT/fill.json and
OUT/fill.md, and a record per picture to OUT/records: an interrupted run goes on where it stopped.

Needs `pip install 'pqmim[eval]'`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pqmim.codec import Codec
from pqmim.evaluation.dataset import find_images
from pqmim.evaluation.pixel_metrics import ms_ssim_rgb, psnr_rgb
from pqmim.evaluation.pqmim_codec import PqmimCodec
from pqmim.evaluation.results import write_bytes, write_json
from pqmim.options import EncodeOptions, Fill, FillOptions

QUALITIES = (30.0, 60.0)
KEPT = (0.2, 0.4, 0.6, 0.8, 1.0)
FILLS = {
    "likely": FillOptions(Fill.LIKELY),
    "sample, temperature 1": FillOptions(Fill.SAMPLE, seed=0, temperature=1.0),
    "sample, temperature 0.7": FillOptions(Fill.SAMPLE, seed=0, temperature=0.7),
    "none": FillOptions(Fill.NONE),
}


def measure(codec: Codec, image: Image.Image) -> list[dict[str, Any]]:
    """Code one picture in every way."""
    original = np.asarray(image)
    rows: list[dict[str, Any]] = []
    for quality in QUALITIES:
        for keep in KEPT:
            data = codec.encode(image, quality=quality, options=EncodeOptions(keep=keep))
            row: dict[str, Any] = {"quality": quality, "keep": keep, "bytes": len(data)}
            row["bpp"] = 8 * len(data) / (image.width * image.height)
            scores: tuple[float, float | None] | None = None
            for fill, options in FILLS.items():
                if scores is None or keep < 1:  # a complete file has one picture
                    decoded = np.asarray(codec.decode(data, options=options).convert("RGB"))
                    scores = psnr_rgb(original, decoded), ms_ssim_rgb(original, decoded)
                rows.append({**row, "fill": fill, "psnr-rgb": scores[0], "ms-ssim-rgb": scores[1]})
    return rows


def rows_of(codec: Codec, description: str, source: Path, record_file: Path) -> list[dict[str, Any]]:
    """What was measured of a picture, from an earlier run if it was the same."""
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    identity = {"description": description, "image_sha256": digest}
    if record_file.exists():
        record = json.loads(record_file.read_text("utf-8"))
        if all(record[key] == value for key, value in identity.items()):
            earlier: list[dict[str, Any]] = record["rows"]
            return earlier
    with Image.open(source) as image:
        rows = measure(codec, image.convert("RGB"))
    write_json(record_file, {**identity, "rows": rows})
    return rows


def means(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over the pictures; MS-SSIM is None where a picture is too small for it."""
    groups: dict[tuple[float, float, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["quality"], row["keep"], row["fill"]), []).append(row)
    summary: list[dict[str, Any]] = []
    for (quality, keep, fill), members in groups.items():
        mean: dict[str, Any] = {"quality": quality, "keep": keep, "fill": fill, "pictures": len(members)}
        for key in ("bytes", "bpp", "psnr-rgb", "ms-ssim-rgb"):
            values = [row[key] for row in members]
            mean[key] = None if None in values else statistics.fmean(values)
        summary.append(mean)
    return summary


def markdown(summary: Sequence[Mapping[str, Any]], description: str) -> str:
    """A table per quality: a row per share of the tokens, PSNR and MS-SSIM of every fill."""
    lines = ["# Files that hold a part of the tokens", "", f"{description}. PSNR RGB in dB / MS-SSIM RGB.", ""]
    for quality in QUALITIES:
        lines += [
            f"## Quality {quality:g}",
            "",
            f"| tokens kept | bytes (mean) | bpp | {' | '.join(FILLS)} |",
            f"| ---: | ---: | ---: | {' | '.join('---:' for _ in FILLS)} |",
        ]
        for keep in KEPT:
            cells = {row["fill"]: row for row in summary if (row["quality"], row["keep"]) == (quality, keep)}
            first = cells[next(iter(FILLS))]
            texts = [
                f"{cells[fill]['psnr-rgb']:.2f} / "
                + ("not defined" if cells[fill]["ms-ssim-rgb"] is None else f"{cells[fill]['ms-ssim-rgb']:.4f}")
                for fill in FILLS
            ]
            lines.append(f"| {keep:.0%} | {first['bytes']:,.0f} | {first['bpp']:.4f} | {' | '.join(texts)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is not measured yet and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="folder of pictures")
    parser.add_argument("-m", "--model", default="photo", help="shipped token model, or path of one")
    parser.add_argument("--decoder", help="name or path [default: fine]")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--images", type=int, help="take only so many pictures")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)

    images = dict(list(find_images(options.dataset).items())[: options.images])
    model = PqmimCodec(options.model, options.device, decoder=options.decoder)
    description = model.description()
    rows: list[dict[str, Any]] = []
    for number, (name, file) in enumerate(images.items(), 1):
        measured = rows_of(model.loaded(), description, file, options.output / "records" / f"{name}.json")
        rows += [{"image": name, **row} for row in measured]
        print(f"{number} of {len(images)}: {name}", file=sys.stderr, flush=True)
    summary = means(rows)
    text = markdown(summary, f"Means over {len(images)} pictures; {description}")
    content = {"codec": description, "means": summary, "pictures": rows}
    write_json(options.output / "fill.json", content)
    write_bytes(options.output / "fill.md", text.encode())
    print(text)


if __name__ == "__main__":
    main()
