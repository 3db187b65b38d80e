"""What it costs to decode a file with a decoder that it was not made for.

    python benchmarks/other_decoder.py DATASET -o OUT [--decoders fast fine] [--qualities 5 25 50 75 95]

Every image is encoded for each decoder and decoded by each. OUT/other_decoder.md has the means, and BD-rates by PSNR of
files that were made for another decoder against files that were made for the one that decodes them: of the mean curves,
and the least and the greatest of one image.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
from measurements import table

from pqmim.codec import load_codec
from pqmim.evaluation.bd_rate import bd_rate
from pqmim.evaluation.dataset import find_images
from pqmim.evaluation.pixel_metrics import psnr_rgb
from pqmim.image_io import load_picture

Points = dict[tuple[str, str], list[list[tuple[float, float]]]]
"""(made for, decoded by) -> by image, by quality: bpp and PSNR."""


def measure(files: Sequence[Path], model: str, decoders: Sequence[str], qualities: Sequence[float]) -> Points:
    """Encode for each decoder, decode by each."""
    codecs = {name: load_codec(model, name, device="cpu") for name in decoders}
    points: Points = {(made_for, by): [] for made_for, by in product(decoders, repeat=2)}
    for number, file in enumerate(files, 1):
        pixels = load_picture(file).rgb
        for made_for, encoder in codecs.items():
            coded = [encoder.encode(pixels, quality=quality) for quality in qualities]
            for decoded_by, decoder in codecs.items():
                psnr = [psnr_rgb(pixels, np.asarray(decoder.decode(data))) for data in coded]
                bpp = [8 * len(data) / (pixels.shape[0] * pixels.shape[1]) for data in coded]
                points[made_for, decoded_by].append(list(zip(bpp, psnr, strict=True)))
        print(f"{number} of {len(files)}", flush=True)
    return points


def difference(anchor: np.ndarray, test: np.ndarray) -> float:
    """BD-rate, percent, between curves (quality, 2) of bpp and PSNR; NaN if they have no range in common."""
    rate = bd_rate(anchor[:, 0].tolist(), anchor[:, 1].tolist(), test[:, 0].tolist(), test[:, 1].tolist())
    return math.nan if rate.percent is None else rate.percent


def report(points: Points, decoders: Sequence[str], qualities: Sequence[float]) -> str:
    """Both tables."""
    curves = {pair: np.array(of_pair) for pair, of_pair in points.items()}  # (image, quality, 2)
    header = ["made for", "decoded by", *(f"q {quality:g}: bpp / dB" for quality in qualities)]
    rows = [[*pair, *(f"{b:.4f} / {p:.3f}" for b, p in curve.mean(0))] for pair, curve in curves.items()]
    lines = []
    for made_for, decoded_by in product(decoders, repeat=2):
        if made_for != decoded_by:
            own, other = curves[decoded_by, decoded_by], curves[made_for, decoded_by]
            each = [difference(*pair) for pair in zip(own, other, strict=True)]
            mean = difference(own.mean(0), other.mean(0))
            lines.append([decoded_by, made_for, f"{mean:+.2f} %", f"{min(each):+.2f} to {max(each):+.2f} %"])
    return table(header, rows) + "\n" + table(["decoded by", "made for", "BD-rate", "images"], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="folder of images")
    parser.add_argument("-m", "--model", default="photo", help="token model")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT")
    parser.add_argument("--decoders", nargs="+", default=["fast", "fine"], metavar="DECODER")
    parser.add_argument("--qualities", type=float, nargs="+", default=[5, 25, 50, 75, 95])
    parser.add_argument("--images", type=int, metavar="N", help="only the first N images")
    options = parser.parse_args(arguments)
    files = list(find_images(options.dataset).values())[: options.images]
    points = measure(files, options.model, options.decoders, options.qualities)
    text = report(points, options.decoders, options.qualities)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "other_decoder.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
