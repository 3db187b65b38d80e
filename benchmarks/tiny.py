"""A picture in 100 to 500 bytes: pqmim beside WebP, AVIF, JPEG XL, BlurHash and ThumbHash.

    python benchmarks/tiny.py KODAK -m small -o results/tiny [--strip docs/images/tiny.jpg] [--speed]

Every picture is coded whole and as its 256 x 256 center crop, in at most 100, 150, 200, 300 and 500 bytes. Without
`-m` only the other codecs are measured; what OUT holds is not measured again, so that models can be added later and an
interrupted run goes on. `--views whole` and `--views crop` may run side by side.

The other codecs get their best chance: the picture is scaled down 1 to 32 times (Lanczos), coded at every low quality,
and scaled up again (Lanczos) to a size that the file does not even say. Of all files within the budget the one with the
best MS-SSIM counts, and for the column "best PSNR" the one with the best PSNR. BlurHash and ThumbHash have the size
that they have: a BlurHash the length of its text, a ThumbHash its bytes.

Needs `pip install 'pqmim[eval]' pillow-jxl-plugin`; what is missing is listed as not measured. Writes OUT/tiny.json,
OUT/tiny.md, OUT/files and OUT/records; `--speed` OUT/speed.json and OUT/speed.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from panels import Panel, draw_sheet
from PIL import Image

from pqmim import __version__
from pqmim.evaluation.dataset import find_images
from pqmim.evaluation.image_codecs import ImageCodec, PillowCodec
from pqmim.evaluation.metrics import METRICS, compute_metric, metric_keys, missing_metric
from pqmim.evaluation.pixel_metrics import Pixels, ms_ssim_rgb, psnr_rgb
from pqmim.evaluation.pqmim_codec import PqmimCodec
from pqmim.evaluation.reference_codecs import reference_codec
from pqmim.evaluation.results import write_bytes, write_json
from pqmim.evaluation.tiny_hashes import blurhash_of, picture_of_blurhash, picture_of_thumbhash, thumbhash_of
from pqmim.options import EncodeOptions, Tune

BUDGETS = (100, 150, 200, 300, 500)
"""Bytes on disk."""
SCALES = (32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
"""How many times the pictures of the other codecs are scaled down."""
CROP = 256
"""Pixels per side of the center crop."""
VIEWS = ("whole", "crop")
METRIC_KEYS = ("ms-ssim-rgb", "psnr-rgb", "ssimulacra2")
BEST_PSNR = "best-psnr-rgb"
"""PSNR of the file that was chosen for its PSNR."""
TABLE_KEYS = ("ms-ssim-rgb", "ssimulacra2", "psnr-rgb", BEST_PSNR)
QUALITIES = tuple(map(float, range(96)))
"""Tried of every other codec; all have a scale of 0 to 100."""
SWEEP_MARGIN = 1.3
"""A sweep over rising qualities ends where a file is so many times above the largest budget: sizes are not quite
monotonic."""
PSNR_MARGIN = 1.0
"""dB. MS-SSIM, which takes long, is computed of files whose PSNR is so near to the best one's."""
BLURHASH_COMPONENTS = ((4, 3), (6, 4), (9, 9))
STRIP_IMAGES = ("kodim05", "kodim15", "kodim20", "kodim23")
STRIP_BUDGET = 200
STRIP_CODECS = ("pqmim", "jxl", "webp", "blurhash-4x3")
STRIP_WIDTH = 312
"""Pixels of one picture of the strip."""
STRIP_MAX_BYTES = 500_000
SPEED_AIM = 0.5
"""Seconds to decode a file of 200 bytes."""
SPEED_REPEATS = 15


@dataclass(frozen=True)
class TinyFile:
    """A file made of one picture.

    Attributes:
        data: its content.
        budget: the one that it was made for; None = it may be chosen for any that it fits.
        details: how it was made.
    """

    data: bytes
    budget: int | None = None
    details: Mapping[str, object] = field(default_factory=dict)


class Contender(Protocol):
    """What makes tiny files."""

    @property
    def name(self) -> str:
        """For file names."""

    @property
    def label(self) -> str:
        """For people."""

    @property
    def extension(self) -> str:
        """Suffix of its files, without a dot."""

    @property
    def budgets(self) -> tuple[int | None, ...]:
        """Sizes that it aims at; None = its own."""

    def missing(self) -> str | None:
        """Why it cannot run here; None if it can."""

    def description(self) -> str:
        """Settings and versions."""

    def files(self, image: Image.Image) -> Iterator[TinyFile]:
        """Files worth comparing, some of them above a budget."""

    def decode(self, data: bytes, size: tuple[int, int]) -> Image.Image:
        """A file -> RGB picture of the original's size (width, height)."""


@dataclass(frozen=True)
class ScaledCodec:
    """An image codec on a picture scaled down.

    Attributes:
        codecs: one format with several settings.
        is_swept: try every quality; otherwise search for the highest that fits.
    """

    name: str
    label: str
    codecs: tuple[ImageCodec, ...]
    is_swept: bool = True

    @property
    def budgets(self) -> tuple[int | None, ...]:
        return BUDGETS

    @property
    def extension(self) -> str:
        return self.codecs[0].extension

    def missing(self) -> str | None:
        return self.codecs[0].missing()

    def description(self) -> str:
        return " | ".join(codec.description() for codec in self.codecs)

    def files(self, image: Image.Image) -> Iterator[TinyFile]:
        for codec in self.codecs:
            for scale in SCALES:
                size = (max(1, round(image.width / scale)), max(1, round(image.height / scale)))
                coded = self._code(codec, image.resize(size, Image.Resampling.LANCZOS))
                if all(len(data) > BUDGETS[-1] for data in coded.values()):
                    break  # larger pictures need more
                for budget in BUDGETS:
                    fitting = [(len(data), quality) for quality, data in coded.items() if len(data) <= budget]
                    if fitting:  # of one scale, the largest is the best
                        quality = max(fitting)[1]
                        details = {"setting": codec.name, "scale": scale, "quality": quality}
                        yield TinyFile(coded[quality], None, details)

    def decode(self, data: bytes, size: tuple[int, int]) -> Image.Image:
        return self.codecs[0].decode(data).resize(size, Image.Resampling.LANCZOS)

    def _code(self, codec: ImageCodec, image: Image.Image) -> dict[float, bytes]:
        """Quality -> file, for the qualities whose files are about as large as the budgets."""
        coded: dict[float, bytes] = {}

        def size(quality: float) -> int:
            if quality not in coded:
                coded[quality] = codec.encode(image, quality)
            return len(coded[quality])

        if self.is_swept:
            for quality in codec.qualities:
                if size(quality) > SWEEP_MARGIN * BUDGETS[-1]:
                    break
            return coded
        for budget in BUDGETS:
            low, high = 0, len(codec.qualities)  # the first fits, the last does not
            if size(codec.qualities[0]) > budget:
                continue
            while high - low > 1:
                middle = (low + high) // 2
                if size(codec.qualities[middle]) <= budget:
                    low = middle
                else:
                    high = middle
        return coded


@dataclass(frozen=True)
class Pqmim:
    """The codec of this package."""

    codec: PqmimCodec
    tune: Tune = Tune.PSNR
    name: str = "pqmim"
    label: str = "pqmim"
    extension: str = "pqm"

    @property
    def budgets(self) -> tuple[int | None, ...]:
        return BUDGETS

    def missing(self) -> str | None:
        return None

    def description(self) -> str:
        return f"{self.codec.description()}, tune {self.tune.value}, fill likely"

    def files(self, image: Image.Image) -> Iterator[TinyFile]:
        codec = self.codec.loaded()
        for budget in BUDGETS:
            data = codec.encode(image, target_bytes=budget, options=EncodeOptions(tune=self.tune, strict=False))
            yield TinyFile(data, budget, {"invented_share": codec.decode_with_report(data).invented_share})

    def decode(self, data: bytes, size: tuple[int, int]) -> Image.Image:
        return self.codec.decode(data)


@dataclass(frozen=True)
class BlurHash:
    """Wolt's BlurHash: a few cosine waves as a text."""

    components: tuple[int, int]
    extension: str = "txt"
    budgets: tuple[int | None, ...] = (None,)

    @property
    def name(self) -> str:
        return f"blurhash-{self.components[0]}x{self.components[1]}"

    @property
    def label(self) -> str:
        return f"BlurHash {self.components[0]} x {self.components[1]}"

    def missing(self) -> str | None:
        return None

    def description(self) -> str:
        return f"{self.label}, pqmim.evaluation.tiny_hashes {__version__}"

    def files(self, image: Image.Image) -> Iterator[TinyFile]:
        yield TinyFile(blurhash_of(image, *self.components).encode("ascii"))

    def decode(self, data: bytes, size: tuple[int, int]) -> Image.Image:
        return Image.fromarray(picture_of_blurhash(data.decode("ascii"), *size))


@dataclass(frozen=True)
class ThumbHash:
    """ThumbHash: a few cosine waves as bytes."""

    name: str = "thumbhash"
    label: str = "ThumbHash"
    extension: str = "thumbhash"
    budgets: tuple[int | None, ...] = (None,)

    def missing(self) -> str | None:
        return None

    def description(self) -> str:
        return f"ThumbHash, pqmim.evaluation.tiny_hashes {__version__}"

    def files(self, image: Image.Image) -> Iterator[TinyFile]:
        yield TinyFile(thumbhash_of(image))

    def decode(self, data: bytes, size: tuple[int, int]) -> Image.Image:
        return Image.fromarray(picture_of_thumbhash(data, *size)).convert("RGB")


def contenders(model: PqmimCodec | None, tune: Tune) -> list[Contender]:
    """All that are measured, pqmim first."""
    webp = reference_codec("webp")
    assert isinstance(webp, PillowCodec)
    others: list[Contender] = [
        ScaledCodec("jxl", "JPEG XL", (_jxl(),)),
        ScaledCodec("webp", "WebP", (replace(webp, qualities=QUALITIES),)),
        ScaledCodec("avif", "AVIF", (_avif("4:2:0", "psnr"), _avif("4:4:4", "ssim")), is_swept=False),
        *(BlurHash(components) for components in BLURHASH_COMPONENTS),
        ThumbHash(),
    ]
    return others if model is None else [Pqmim(model, tune), *others]


def _jxl() -> PillowCodec:
    summary = "JPEG XL, effort 9"
    return PillowCodec("jxl", "jxl", "JXL", QUALITIES, _jxl_settings, summary, None, "pillow_jxl")


def _jxl_settings(quality: float) -> dict[str, Any]:
    return {"quality": round(quality), "effort": 9, "num_threads": 1}


def _avif(subsampling: str, tune: str) -> PillowCodec:
    summary = f"AVIF {subsampling}, libaom speed 4, tune {tune}"
    settings = partial(_avif_settings, subsampling, tune)
    return PillowCodec(f"avif-{tune}", "avif", "AVIF", QUALITIES, settings, summary, "avif")


def _avif_settings(subsampling: str, tune: str, quality: float) -> dict[str, Any]:
    return {
        "quality": round(quality),
        "subsampling": subsampling,
        "codec": "aom",
        "speed": 4,
        "max_threads": 1,
        "autotiling": False,
        "advanced": {"tune": tune},
    }


def view_of(image: Image.Image, view: str) -> Image.Image:
    """The whole picture, or its center."""
    if view == "whole":
        return image
    left, top = (image.width - CROP) // 2, (image.height - CROP) // 2
    return image.crop((left, top, left + CROP, top + CROP))


@dataclass(frozen=True)
class Task:
    """One contender on one view of one picture."""

    output: Path
    contender: Contender
    view: str
    image: str
    source: Path
    metrics: tuple[str, ...]

    @property
    def record_file(self) -> Path:
        return self.output / "records" / self.contender.name / self.view / f"{self.image}.json"

    def coded_file(self, budget: int | None) -> Path:
        ending = f"{'' if budget is None else f'-{budget}'}.{self.contender.extension}"
        return self.output / "files" / self.contender.name / self.view / f"{self.image}{ending}"

    def original(self) -> Image.Image:
        with Image.open(self.source) as image:
            return view_of(image.convert("RGB"), self.view)

    def rows(self, description: str) -> list[dict[str, Any]]:
        """What was measured, from an earlier run if it was the same; metrics that it lacks are added."""
        digest = hashlib.sha256(self.source.read_bytes()).hexdigest()
        identity = {"description": description, "image_sha256": digest}
        rows: list[dict[str, Any]] | None = None
        if self.record_file.exists():
            record = json.loads(self.record_file.read_text("utf-8"))
            if all(record[key] == value for key, value in identity.items()):
                rows = record["rows"]
        is_new = rows is None
        if rows is None:
            rows = self._measure()
        if self._add_metrics(rows) or is_new:
            write_json(self.record_file, {**identity, "rows": rows})
        return rows

    def _measure(self) -> list[dict[str, Any]]:
        """Choose and write a file for every budget."""
        image = self.original()
        original = np.asarray(image)
        files = list(self.contender.files(image))
        decoded = {file.data: _pixels(self.contender.decode(file.data, image.size)) for file in files}
        psnr = {data: psnr_rgb(original, pixels) for data, pixels in decoded.items()}

        @cache
        def ms_ssim(data: bytes) -> float:
            return ms_ssim_rgb(original, decoded[data]) or 0.0

        rows: list[dict[str, Any]] = []
        for budget in self.contender.budgets:
            row: dict[str, Any] = {"codec": self.contender.name, "view": self.view, "image": self.image}
            row |= {"budget": budget, "bytes": None}
            fitting = [
                file for file in files if file.budget in (None, budget) and (budget is None or len(file.data) <= budget)
            ]
            if fitting:
                best_psnr = max(psnr[file.data] for file in fitting)
                close = [file for file in fitting if psnr[file.data] >= best_psnr - PSNR_MARGIN]
                chosen = max(close, key=lambda file: ms_ssim(file.data))
                coded = self.coded_file(budget)
                write_bytes(coded, chosen.data)
                row |= {"bytes": coded.stat().st_size, **chosen.details}
                row |= {"ms-ssim-rgb": ms_ssim(chosen.data), "psnr-rgb": psnr[chosen.data], BEST_PSNR: best_psnr}
            rows.append(row)
        return rows

    def _add_metrics(self, rows: Sequence[dict[str, Any]]) -> bool:
        """Compute metrics that are missing from the files on disk; whether there were any."""
        wanted = [row for row in rows if row["bytes"] is not None and not set(self.metrics) <= set(row)]
        if not wanted:
            return False
        image = self.original()
        for row in wanted:
            data = self.coded_file(row["budget"]).read_bytes()
            decoded = _pixels(self.contender.decode(data, image.size))
            row |= {key: compute_metric(key, np.asarray(image), decoded) for key in self.metrics if key not in row}
        return True


def _pixels(image: Image.Image) -> Pixels:
    return np.asarray(image.convert("RGB"))


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the pictures for which there is a file."""
    fitting = [row for row in rows if row["bytes"] is not None]
    result: dict[str, Any] = {"images": len(rows), "fitting": len(fitting)}
    for key in ("bytes", *METRIC_KEYS, BEST_PSNR):
        values = [row[key] for row in fitting if row.get(key) is not None]
        result[key] = statistics.fmean(values) if values and len(values) == len(fitting) else None
    return result


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means of every view, budget and codec."""
    groups: dict[tuple[str, int | None, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["view"], row["budget"], row["codec"]), []).append(row)
    return [
        {"view": view, "budget": budget, "codec": codec, **means(members)}
        for (view, budget, codec), members in groups.items()
    ]


def markdown(summary: Sequence[Mapping[str, Any]], labels: Mapping[str, str], missing: Mapping[str, str]) -> str:
    """A table per view and size."""
    lines = ["# A picture in 100 to 500 bytes", ""]
    for view in VIEWS:
        for budget in (*BUDGETS, None):
            rows = [row for row in summary if row["view"] == view and row["budget"] == budget]
            if not rows:
                continue
            size = "sizes of their own" if budget is None else f"at most {budget} bytes"
            lines += [
                f"## {view.capitalize()} pictures, {size}"
                if view == "whole"
                else f"## Crops of {CROP} x {CROP}, {size}",
                "",
                "| codec | pictures | bytes (mean) | MS-SSIM | SSIMULACRA2 | PSNR (dB) | best PSNR (dB) |",
                "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
            ]
            for row in rows:
                start = f"| {labels[row['codec']]} | {row['fitting']} of {row['images']} |"
                if not row["fitting"]:
                    lines.append(f"{start} no file fits | | | | |")
                    continue
                cells = [
                    "not computed" if row[key] is None else format(row[key], form)
                    for key, form in zip(("bytes", *TABLE_KEYS), (".1f", ".4f", ".1f", ".2f", ".2f"), strict=True)
                ]
                lines.append(f"{start} {' | '.join(cells)} |")
            lines.append("")
    lines += [f"- {name}: not measured, {reason}" for name, reason in missing.items()]
    return "\n".join(lines).rstrip() + "\n"


def strip(tasks: Sequence[Task], descriptions: Mapping[str, str], output: Path) -> None:
    """Write pictures side by side, each with its bytes and MS-SSIM."""
    by_key = {(task.contender.name, task.image): task for task in tasks if task.view == "whole"}
    names = list(dict.fromkeys(image for _, image in by_key))
    chosen = [name for name in names if Path(name).stem in STRIP_IMAGES] or names[: len(STRIP_IMAGES)]
    columns = [name for name in STRIP_CODECS if (name, chosen[0]) in by_key]
    rows: list[list[Panel]] = []
    for name in chosen:
        original = by_key[columns[0], name].original()
        panels: list[Panel] = [(f"original {original.width} x {original.height}", original)]
        for codec in columns:
            task = by_key[codec, name]
            budget = None if None in task.contender.budgets else STRIP_BUDGET
            row = next(row for row in task.rows(descriptions[codec]) if row["budget"] == budget)
            if row["bytes"] is None:
                panels.append((f"{task.contender.label}: no file fits", Image.new("RGB", original.size, "gray")))
                continue
            data = task.coded_file(budget).read_bytes()
            label = f"{task.contender.label}: {len(data)} bytes, {row['ms-ssim-rgb']:.3f}"
            panels.append((label, task.contender.decode(data, original.size).convert("RGB")))
        height = round(STRIP_WIDTH * original.height / original.width)
        size = (STRIP_WIDTH, height)
        rows.append([(label, picture.resize(size, Image.Resampling.LANCZOS)) for label, picture in panels])
    montage = draw_sheet(rows, caption=24, font_size=15, gap=6)
    output.parent.mkdir(parents=True, exist_ok=True)
    for quality in range(92, 40, -4):
        montage.save(output, quality=quality, optimize=True)
        if output.stat().st_size < STRIP_MAX_BYTES:
            break
    print(f"{output}: {output.stat().st_size:,} bytes")


def measure_speed(task: Task, threads: Sequence[int]) -> list[dict[str, Any]]:
    """Seconds to decode a picture's file of 200 bytes, the median of repeats, for some numbers of threads."""
    size, data = task.original().size, task.coded_file(STRIP_BUDGET).read_bytes()
    rows: list[dict[str, Any]] = []
    for count in threads:
        contender = task.contender
        if isinstance(contender, Pqmim):  # the others have one thread
            contender = replace(contender, codec=replace(contender.codec, threads=count))
        contender.decode(data, size)  # the first one loads the model
        seconds: list[float] = []
        for _ in range(SPEED_REPEATS):
            start = time.perf_counter()
            contender.decode(data, size)
            seconds.append(time.perf_counter() - start)
        rows.append(
            {
                "codec": task.contender.name,
                "image": task.image,
                "threads": count,
                "bytes": len(data),
                "seconds": statistics.median(seconds),
                "fastest": min(seconds),
                "slowest": max(seconds),
            }
        )
    return rows


def speed_markdown(rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> str:
    """The times as a table."""
    lines = [
        f"# Decoding a picture of {STRIP_BUDGET} bytes",
        "",
        f"Median of {SPEED_REPEATS} runs from bytes to the picture in full size; model loaded, missing tokens filled",
        f"as `likely`. The aim is at most {SPEED_AIM:g} s on two cores.",
        "",
        "| codec | picture | bytes | threads | seconds | fastest | slowest |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        times = " | ".join(f"{row[key]:.4f}" for key in ("seconds", "fastest", "slowest"))
        lines.append(f"| {labels[row['codec']]} | {row['image']} | {row['bytes']} | {row['threads']} | {times} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is not measured yet and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="folder of pictures of at least 256 x 256 pixels")
    parser.add_argument("-m", "--model", help="shipped token model, or path of one; without it no pqmim")
    parser.add_argument("--decoder", help="name or path [default: fine]")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--images", type=int, help="take only so many pictures")
    parser.add_argument("--views", nargs="+", choices=VIEWS, default=VIEWS)
    parser.add_argument("--metrics", nargs="+", choices=METRIC_KEYS, default=METRIC_KEYS, help="others are left out")
    parser.add_argument("--tune", choices=[tune.value for tune in Tune], default=Tune.PSNR.value, help="of pqmim")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--strip", type=Path, metavar="FILE.jpg", help="write pictures side by side, at 200 bytes")
    parser.add_argument("--speed", action="store_true", help="time decoding of the first picture's 200-byte file")
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2), help="for --speed")
    options = parser.parse_args(arguments)

    images = dict(list(find_images(options.dataset).items())[: options.images])
    model = None if options.model is None else PqmimCodec(options.model, options.device, decoder=options.decoder)
    missing: dict[str, str] = {}
    metrics: list[str] = []
    for key in metric_keys(options.metrics):
        if (reason := missing_metric(key)) is None:
            metrics.append(key)
        else:
            missing[METRICS[key].label] = reason
    present: list[Contender] = []
    for contender in contenders(model, Tune(options.tune)):
        if (reason := contender.missing()) is None:
            present.append(contender)
        else:
            missing[contender.label] = reason
    descriptions = {contender.name: contender.description() for contender in present}
    labels = {contender.name: contender.label for contender in present}
    tasks = [
        Task(options.output, contender, view, name, file, tuple(metrics))
        for view in options.views
        for name, file in images.items()
        for contender in present
    ]
    rows: list[dict[str, Any]] = []
    for number, task in enumerate(tasks, 1):
        rows += task.rows(descriptions[task.contender.name])
        print(f"{number} of {len(tasks)}: {task.image} {task.view} {task.contender.label}", file=sys.stderr, flush=True)
    rows.sort(key=lambda row: list(descriptions).index(row["codec"]))
    summary = summarize(rows)
    text = markdown(summary, labels, missing)
    content = {"codecs": descriptions, "missing": missing, "means": summary, "pictures": rows}
    # A part of the views has a report of its own: the other part may be running.
    stem = "tiny" if set(options.views) == set(VIEWS) else f"tiny-{options.views[0]}"
    write_json(options.output / f"{stem}.json", content)
    write_bytes(options.output / f"{stem}.md", text.encode())
    print(text)

    if options.strip is not None:
        strip(tasks, descriptions, options.strip)
    if options.speed:
        first = [task for task in tasks if task.view == options.views[0] and task.image == next(iter(images))]
        timed = [task for task in first if task.contender.name in ("pqmim", "webp")]
        times = [row for task in timed for row in measure_speed(task, options.threads)]
        text = speed_markdown(times, labels)
        write_json(options.output / "speed.json", {"codecs": descriptions, "times": times})
        write_bytes(options.output / "speed.md", text.encode())
        print(text)


if __name__ == "__main__":
    main()
