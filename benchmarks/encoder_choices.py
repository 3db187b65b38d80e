"""What the encoder's choices are worth: nearest codeword, whose bits count, every effort, every tuning.

    python benchmarks/encoder_choices.py DATASET -o OUT [-m MODEL] [--decoder D] [--images N] [--qualities 20 40 60 80]
        [--for DECODER] [--variants NAME...] [--metrics psnr ms-ssim ssimulacra2] [--threads 1 2]

Every variant is a curve of real files, decoded again. All use the same model, so files differ only by which tokens
were sent. Nearest codewords know no trade-off; their curve has a point for each level, with that level's codebooks.
"masked model" chooses by the bits that a token takes where it is, "static prior" by those that it takes anywhere;
effort 1 weighs both. These four make no corrections, so that they differ in the choice alone. The tune `vivid` is for
`--decoder vivid` and needs `pqmim[perceptual]`; it is measured where --variants names it. With --for the files of all
others are made for another decoder.

With --threads a second table has the seconds of the clock that one encoding at --timed-quality takes with so many
threads: the median of three, mean over --timed-images pictures. Other work on the machine is in them.

Needs `pqmim[eval]`. Writes OUT/encoder_choices.json and .md, and OUT/measurements.jsonl as it goes; run again, it
continues.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
from measurements import MS_SSIM, PSNR, Bench, Photo, Row, curve, make_parser, mean, number, read_photos, table, write
from numpy.typing import NDArray
from rich.progress import track

from pqmim import encoder
from pqmim.codec import Codec, load_codec
from pqmim.evaluation.bd_rate import BdRate
from pqmim.evaluation.metrics import METRICS, metric_keys
from pqmim.evaluation.results import bd_rates
from pqmim.options import DEFAULT_EFFORT, MAX_EFFORT, EncodeOptions, Tune
from pqmim.perceptual.tuning import vivid_judge
from pqmim.quantizer import Latent, ProductQuantizer
from pqmim.token_coding import RateDistortionChoice

MAX_PERCENT = 1000.0
"""A larger BD-rate says nothing."""

MakeChoice = Callable[..., RateDistortionChoice]
"""Arguments of `RateDistortionChoice`; no file here has a budget."""


def nearest(
    quantizer: ProductQuantizer, z: Latent, w: NDArray[np.float32], level: int, *_: object
) -> RateDistortionChoice:
    """Choose by distance alone."""
    return RateDistortionChoice(quantizer, z, np.zeros_like(w), level)


def with_static_share(static_share: float) -> MakeChoice:
    """Choose by bits of which the static prior has another share."""

    def choose(
        quantizer: ProductQuantizer, z: Latent, w: NDArray[np.float32], level: int, *_: object
    ) -> RateDistortionChoice:
        return RateDistortionChoice(quantizer, z, w, level, static_share=static_share)

    return choose


@dataclass(frozen=True)
class Variant:
    """A way to choose tokens.

    Attributes:
        choice: in place of the choice inside the loop.
        by_level: measured at the trade-off of each level, not at the qualities.
    """

    name: str
    options: EncodeOptions
    choice: MakeChoice = RateDistortionChoice
    by_level: bool = False


def effort_name(effort: int) -> str:
    """Name of the variant."""
    return f"effort {effort}"


NEAREST = Variant("nearest codeword", EncodeOptions(effort=1), nearest, by_level=True)
MASKED = Variant("masked model", EncodeOptions(effort=1), with_static_share(0.0))
STATIC = Variant("static prior", EncodeOptions(effort=1), with_static_share(1.0))
EFFORTS = tuple(Variant(effort_name(n), EncodeOptions(effort=n)) for n in range(1, MAX_EFFORT + 1))
TUNED = Variant("tune ms-ssim", EncodeOptions(tune=Tune.MS_SSIM))
TUNED_SEARCH = Variant("tune ms-ssim, effort 3", EncodeOptions(effort=MAX_EFFORT, tune=Tune.MS_SSIM))
VIVID = tuple(Variant(f"tune vivid, effort {n}", EncodeOptions(effort=n, tune=Tune.VIVID)) for n in (2, 3))
DEFAULT_VARIANTS = (NEAREST, MASKED, STATIC, *EFFORTS, TUNED, TUNED_SEARCH)
VARIANTS = {variant.name: variant for variant in (*DEFAULT_VARIANTS, *VIVID)}
COMPARISONS = (
    (effort_name(1), NEAREST.name),
    (effort_name(1), MASKED.name),
    (STATIC.name, MASKED.name),
    *((effort_name(n), effort_name(1)) for n in range(2, MAX_EFFORT + 1)),
    (TUNED.name, effort_name(DEFAULT_EFFORT)),
    (TUNED_SEARCH.name, effort_name(1)),
    (TUNED_SEARCH.name, effort_name(MAX_EFFORT)),
    *((variant.name, effort_name(n)) for variant in VIVID for n in (1, DEFAULT_EFFORT)),
)
"""(variant, what it is compared with), where both are measured."""
NUM_REPEATS = 3
"""Encodings of which the median is a time."""


def choosing(choice: MakeChoice) -> AbstractContextManager[object]:
    """Have the encoder choose tokens in another way for a while."""
    return patch.object(encoder, "RateDistortionChoice", choice)


def level_qualities(codec: Codec) -> list[float]:
    """One quality in the middle of each level, as far as it is in the range; lowest first."""
    networks, of_level = codec._networks, dict[int, list[float]]()
    for quality in np.linspace(0, 100, 401).tolist():
        of_level.setdefault(networks.quantizer.levels.level(networks.w(quality)), []).append(quality)
    return sorted(statistics.median_low(group) for group in of_level.values())


@dataclass(frozen=True)
class Makers:
    """Who makes files: the codec with the decoder that is measured for the tune `vivid`, maybe another for all else."""

    for_vivid: Codec
    for_others: Codec

    def encode(self, photo: Photo, variant: Variant, quality: float) -> bytes:
        """One file."""
        is_vivid = variant.options.tune == Tune.VIVID
        codec, judge = (self.for_vivid, vivid_judge()) if is_vivid else (self.for_others, None)
        with choosing(variant.choice):
            return codec.encode(photo.pixels, quality=quality, options=variant.options, judge=judge)


def makers(options: argparse.Namespace, threads: int | None = None) -> Makers:
    """The codecs that the arguments ask for."""
    names = (options.decoder, options.made_for or options.decoder)
    return Makers(*(load_codec(options.model, name, device=options.device, threads=threads) for name in names))


def measure(bench: Bench, made_by: Makers, photo: Photo, variant: Variant, quality: float, keys: Sequence[str]) -> Row:
    """Size, time and worth of one file."""
    data, seconds = bench.timed(lambda: made_by.encode(photo, variant, quality))
    return {"variant": variant.name, "quality": quality, "seconds": seconds, **bench.worth(photo, data, keys)}


def clocked(made_by: Makers, photos: Sequence[Photo], variant: Variant, quality: float) -> float:
    """Seconds of the clock for one encoding: the median of a few, mean over the photos."""
    medians = []
    for photo in photos:
        seconds = []
        for _ in range(NUM_REPEATS):
            start = time.perf_counter()
            made_by.encode(photo, variant, quality)
            seconds.append(time.perf_counter() - start)
        medians.append(statistics.median(seconds))
    return statistics.fmean(medians)


def clock_table(options: argparse.Namespace, photos: Sequence[Photo], variants: Sequence[Variant]) -> str:
    """Times of each variant with each number of threads."""
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for threads in options.threads:
        torch.set_num_threads(threads)
        made_by = makers(options, threads)
        for variant in variants:
            made_by.encode(photos[0], variant, options.timed_quality)  # loads what it needs
            seconds[variant.name].append(clocked(made_by, photos, variant, options.timed_quality))
    header = ["tokens", *(f"encode (s), {n} thread{'s' * (n > 1)}" for n in options.threads)]
    return table(header, [[name, *(f"{value:.2f}" for value in values)] for name, values in seconds.items()])


def percent(rate: BdRate) -> str:
    """A BD-rate in words. Nearest codewords make curves that are far from smooth, whose interpolation may explode."""
    if rate.percent is None:
        return "no common range"
    return f"{rate.percent:+.2f} %" if abs(rate.percent) < MAX_PERCENT else "curve not smooth"


def span(rate: BdRate, key: str) -> str:
    """Where two curves were compared."""
    if key in (PSNR, MS_SSIM):
        return f"{rate.low:.2f} to {rate.high:.2f} dB"
    low, high = sorted(abs(value) for value in (rate.low, rate.high))
    return f"{low:.3g} to {high:.3g}"


def label(key: str) -> str:
    """Name of a metric without its unit."""
    return METRICS[key].label.removesuffix(" (dB)").removesuffix(" RGB")


def report(points: dict[str, dict[float, list[Row]]], keys: Sequence[str]) -> str:
    """BD-rates and means."""
    curves = {name: curve(name, list(by_quality.values()), keys) for name, by_quality in points.items()}
    seconds = {name: sum(row["seconds"] for rows in of.values() for row in rows) for name, of in points.items()}
    lines = []
    for name, anchor in COMPARISONS:
        if name not in points or anchor not in points:
            continue
        cells = [name, anchor]
        for key in keys:
            rate = bd_rates([curves[name]], curves[anchor], key).get(name) if key in curves[anchor].metrics else None
            cells += ["", ""] if rate is None else [percent(rate), span(rate, key)]
        same_points = list(points[name]) == list(points[anchor])
        lines.append([*cells, f"{seconds[name] / seconds[anchor]:.2f}" if same_points else ""])
    columns = [cell for key in keys for cell in (f"BD-rate {label(key)}", "over")]
    header = ["tokens", "against", *columns, "encode time, ratio"]
    text = table(header, lines) + "\n"
    lines = [
        [
            name,
            f"{quality:.4g}",
            number(mean(rows, "bpp"), ".4f"),
            *(number(mean(rows, key), "#.5g") for key in keys),
            number(mean(rows, "seconds"), ".2f"),
        ]
        for name, by_quality in points.items()
        for quality, rows in by_quality.items()
    ]
    return text + table(["tokens", "quality", "bpp", *map(label, keys), "encode (s)"], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--qualities", type=float, nargs="+", default=[20.0, 40.0, 60.0, 80.0])
    names = [variant.name for variant in DEFAULT_VARIANTS]
    parser.add_argument(
        "--for", dest="made_for", metavar="DECODER", help="that files but those of the tune vivid are for"
    )
    parser.add_argument("--variants", nargs="+", metavar="NAME", choices=VARIANTS, default=names)
    parser.add_argument("--metrics", nargs="+", metavar="NAME", default=[PSNR, MS_SSIM])
    parser.add_argument("--threads", type=int, nargs="+", metavar="N", default=[])
    parser.add_argument("--timed-images", type=int, metavar="N", default=2)
    parser.add_argument("--timed-quality", type=float, metavar="Q", default=50.0)
    options = parser.parse_args(arguments)
    variants, keys = [VARIANTS[name] for name in options.variants], metric_keys(options.metrics)

    bench = Bench(options.model, options.output, options.device, options.decoder)
    made_by = makers(options)
    qualities = {
        variant.name: level_qualities(bench.codec) if variant.by_level else sorted(set(options.qualities))
        for variant in variants
    }
    points: dict[str, dict[float, list[Row]]] = {
        name: {quality: [] for quality in grid} for name, grid in qualities.items()
    }
    # Variants of one image come one after another, so that their times are of the same minutes.
    photos = read_photos(options.dataset, options.images)
    tasks = [
        (photo, variant, quality) for photo in photos for variant in variants for quality in qualities[variant.name]
    ]
    for photo, variant, quality in track(tasks, "encoder choices"):
        what = f"{variant.name}, quality {quality!r}, {' '.join(keys)}, for {made_by.for_others.decoder_id.hex()}"
        row = bench.row(photo, what, partial(measure, bench, made_by, photo, variant, quality, keys))
        points[variant.name][quality].append(row)
    rows = [row for by_quality in points.values() for of in by_quality.values() for row in of]
    text = report(points, keys)
    if options.threads:
        text += "\n" + clock_table(options, photos[: options.timed_images], variants)
    write(options.output, "encoder_choices", rows, text)


if __name__ == "__main__":
    main()
