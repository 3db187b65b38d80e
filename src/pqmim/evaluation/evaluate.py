"""Evaluation: real files of every image, codec and quality, decoded again from disk, and what they are worth.

::

    OUT/evaluation.json                         data set, codecs, qualities; what was missing and why
    OUT/files/CODEC/QUALITY/IMAGE.EXTENSION     the files that were measured
    OUT/measurements/CODEC/QUALITY/IMAGE.json   one measurement, written when it is done
    OUT/results/CODEC.json                      means over the images, in the shape of CompressAI's results
    OUT/per_image.csv, OUT/per_image.json       every measurement

A measurement that is there is not made again, so an interrupted run goes on where it was, and codecs or
metrics can be added to a folder later. It counts as there if the image (SHA-256) and the codec's description
are the same and the file is on disk.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pqmim._version import __version__
from pqmim.errors import ConfigError, ImageError, PqmimError
from pqmim.evaluation.metrics import (
    METRICS,
    BdRate,
    Pixels,
    bd_rate,
    check_weights,
    compute_metric,
    load_inception,
    metric_keys,
    missing_metric,
    ms_ssim_db,
    set_distances,
)
from pqmim.evaluation.reference_codecs import ImageCodec, published_kodak_curves
from pqmim.image_io import load_picture

if TYPE_CHECKING:
    from pqmim.codec import Codec

DEFAULT_METRICS = ("psnr-rgb", "psnr-y", "ms-ssim-rgb")
TIMING_KEYS = ("encoding_time", "decoding_time")
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".ppm", ".jp2"})


@dataclass(frozen=True)
class PqmimCodec:
    """A pqmim model as an `ImageCodec`.

    Attributes:
        model: name of a shipped model, or path of a weights file.
        device: "auto", "cpu" or "cuda".
        label: name in results and legends; by default `pqmim-` and the name of the model or its folder.
    """

    model: str
    device: str = "auto"
    label: str | None = None
    extension: str = "pqm"
    qualities: tuple[float, ...] = (0.0, 15.0, 30.0, 45.0, 60.0, 75.0, 90.0, 100.0)

    @property
    def name(self) -> str:
        if self.label is not None:
            return self.label
        path = Path(self.model)
        # Training writes every model as "model.safetensors": the folder is what tells them apart.
        return f"pqmim-{path.resolve().parent.name if path.stem == 'model' else path.stem}"

    def loaded(self) -> Codec:
        """The codec itself; loaded once per process."""
        return _load_codec(self.model, self.device)

    def missing(self) -> str | None:
        return None  # a model that cannot be loaded is an error, which `description` raises

    def description(self) -> str:
        codec = self.loaded()
        return f"pqmim {__version__}, model {codec.name} ({codec.model_id.hex()}), device {self.device}"

    def encode(self, image: Image.Image, quality: float) -> bytes:
        return self.loaded().encode(image, quality=quality)

    def decode(self, data: bytes) -> Image.Image:
        return self.loaded().decode(data).convert("RGB")


@dataclass(frozen=True)
class EvaluationOptions:
    """What to evaluate.

    Attributes:
        dataset: folder of images (searched through), or one image.
        output: folder for everything that is made; may hold an earlier evaluation of the same data set.
        codecs: pqmim models (`PqmimCodec`) and `reference_codecs(...)`; names must differ.
        qualities: codec name -> qualities, where not the codec's own; "" stands for every pqmim model.
        metrics: names as in `metrics.metric_keys`.
        jobs: worker processes; each codes one image at a time. Timings of parallel runs are rough.
        weights: folder of perceptual networks' weights, see `metrics.check_weights`.
        is_quiet: no progress bar.
    """

    dataset: Path
    output: Path
    codecs: tuple[ImageCodec, ...]
    qualities: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    metrics: tuple[str, ...] = DEFAULT_METRICS
    jobs: int = 1
    weights: Path | None = None
    is_quiet: bool = False


@dataclass(frozen=True)
class Curve:
    """Means of one codec over a data set, by rising rate.

    Attributes:
        kind: "measured" here, or "published" by others.
        description: settings and versions, or the source.
        bpp: bits per pixel of real files.
        metrics: metric key -> one value per rate.
        qualities: the codec's setting at each rate; empty for published curves.
    """

    name: str
    kind: str
    description: str
    bpp: tuple[float, ...]
    metrics: Mapping[str, tuple[float, ...]]
    qualities: tuple[float, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """An evaluation read back from its folder.

    Attributes:
        dataset: name of the data set.
        images: image name -> SHA-256.
        curves: pqmim models, other measured codecs as they were added, published ones last.
        rows: every measurement (see `per_image.json`).
        missing: codec or metric -> why there are no numbers of it.
        folders: where the measured files are.
    """

    dataset: str
    images: Mapping[str, str]
    curves: tuple[Curve, ...]
    rows: tuple[Mapping[str, Any], ...]
    missing: Mapping[str, str]
    folders: tuple[Path, ...]


def parse_qualities(texts: Iterable[str]) -> dict[str, tuple[float, ...]]:
    """Read quality grids as the command line takes them.

    Args:
        texts: "10,30,50" for every pqmim model, "jpeg:5,10,20" for the codec of that name.

    Raises:
        ConfigError: not of that form.
    """
    grids = {}
    for text in texts:
        name, _, numbers = text.rpartition(":")
        try:
            grids[name] = tuple(sorted({float(number) for number in numbers.split(",")}))
        except ValueError:
            raise ConfigError(f"a quality grid is NUMBER,NUMBER,... or CODEC:NUMBER,..., not {text!r}") from None
    return grids


def find_images(dataset: Path) -> dict[str, Path]:
    """Find the images of a data set: name relative to the folder -> file, sorted.

    Raises:
        ConfigError: there is none.
    """
    if dataset.is_file():
        return {dataset.name: dataset}
    files = sorted(file for file in dataset.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ConfigError(f"{dataset}: no images there")
    return {file.relative_to(dataset).as_posix(): file for file in files}


def run_evaluation(options: EvaluationOptions) -> Evaluation:
    """Measure what is not measured yet, then write results.

    Returns:
        All that the output folder holds now, this run's part and earlier ones'.

    Raises:
        ConfigError: the options contradict each other, or the folder holds another data set.
        ModelError: a model cannot be loaded.
        MissingExtraError: a perceptual metric was asked for whose package is absent.
        ImageError: an image cannot be read, or a codec fails on it.
    """
    keys = metric_keys(options.metrics)
    check_weights(keys, options.weights)
    missing = {key: reason for key in keys if (reason := missing_metric(key)) is not None}
    keys = tuple(key for key in keys if key not in missing)

    images = find_images(options.dataset)
    hashes = {name: _sha256(file.read_bytes()) for name, file in images.items()}
    _open_manifest(options, hashes)  # refuses another data set's folder
    present: list[ImageCodec] = []
    for codec in options.codecs:
        reason = codec.missing()
        if reason is None:
            present.append(codec)
        else:
            missing[codec.name] = reason
    if len({codec.name for codec in present}) < len(present):
        raise ConfigError("two codecs have one name: give one of the models a label")
    descriptions = {codec.name: codec.description() for codec in present}

    pixel_keys = tuple(key for key in keys if not METRICS[key].of_sets)
    tasks = [
        _Task(images[name], name, hashes[name], codec, quality, pixel_keys, options.weights, options.output)
        for codec in present
        for name in images
        for quality in _qualities(codec, options)
    ]
    _run_tasks([task for task in tasks if not task.is_done()], len(tasks), options)

    set_keys = tuple(key for key in keys if METRICS[key].of_sets)
    if set_keys:
        assert options.weights is not None  # `check_weights` saw to it
        for codec in present:
            for quality in _qualities(codec, options):
                _measure_sets(options.output, codec, quality, images, set_keys, options.weights)

    # Read again, since another run may have added codecs meanwhile.
    manifest = _open_manifest(options, hashes)
    for name in (*keys, *(codec.name for codec in present)):
        manifest["missing"].pop(name, None)
    manifest["missing"].update(missing)
    for codec in present:
        manifest["codecs"][codec.name] = {
            "description": descriptions[codec.name],
            "qualities": list(_qualities(codec, options)),
        }
    _write_json(options.output / "evaluation.json", manifest)
    _write_results(options.output, manifest)
    return load_evaluations((options.output,))


def load_evaluations(folders: Sequence[Path]) -> Evaluation:
    """Read one or more evaluations of one data set; of codecs with one name the first folder's counts.

    Published Kodak curves are added if the data set is Kodak.

    Raises:
        ConfigError: a folder holds no evaluation, or they are of different data sets.
    """
    curves: dict[str, Curve] = {}
    rows: list[Mapping[str, Any]] = []
    missing: dict[str, str] = {}
    images: dict[str, str] | None = None
    dataset = ""
    for folder in folders:
        try:
            manifest = json.loads((folder / "evaluation.json").read_text("utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{folder}: no finished evaluation there") from None
        if images is not None and images != manifest["images"]:
            raise ConfigError(f"{folder}: holds an evaluation of other images than {folders[0]}")
        images, dataset = manifest["images"], dataset or manifest["dataset"]
        missing = {**manifest["missing"], **missing}
        new = [name for name in manifest["codecs"] if name not in curves]
        for name in new:
            content = json.loads((folder / "results" / f"{name}.json").read_text("utf-8"))
            results = content["results"]
            curves[name] = Curve(
                name=name,
                kind="measured",
                description=content["description"],
                bpp=tuple(results["bpp"]),
                metrics={key: tuple(results[key]) for key in METRICS if key in results},
                qualities=tuple(results["quality"]),
            )
        rows += [
            {**row, "folder": str(folder)}
            for row in json.loads((folder / "per_image.json").read_text("utf-8"))
            if row["codec"] in new
        ]
    assert images is not None  # at least one folder
    missing = {name: reason for name, reason in missing.items() if name not in curves}
    if _is_kodak(images):
        for published in published_kodak_curves():
            curves[published.name] = Curve(
                published.name, "published", published.source, published.bpp, published.metrics
            )
    in_order = sorted(curves.values(), key=lambda curve: not curve.name.startswith("pqmim"))
    return Evaluation(dataset, images, tuple(in_order), tuple(rows), missing, tuple(folders))


def bd_rates(curves: Iterable[Curve], anchor: Curve, key: str) -> dict[str, BdRate]:
    """BD-rate of every curve against an anchor; curves without this metric are left out.

    Args:
        key: of the metric. MS-SSIM is compared in dB; a metric that falls with quality is negated.
    """
    return {
        curve.name: bd_rate(anchor.bpp, comparable_quality(anchor, key), curve.bpp, comparable_quality(curve, key))
        for curve in curves
        if key in curve.metrics and curve.name != anchor.name
    }


def comparable_quality(curve: Curve, key: str) -> list[float]:
    """Values of a metric on the scale where curves are compared: rising, MS-SSIM in dB."""
    if key == "ms-ssim-rgb":
        return [ms_ssim_db(value) for value in curve.metrics[key]]
    return [value if METRICS[key].is_better_higher else -value for value in curve.metrics[key]]


def without_timings(results: Mapping[str, Any]) -> dict[str, Any]:
    """Drop from a results file what differs from run to run: `encoding_time` and `decoding_time`.

    The rest (name, description, qualities, rates and metrics, to the last digit) is the same in every run
    over one data set with one quality grid and one version of the codec, interrupted or not.
    """
    kept = {key: value for key, value in results["results"].items() if key not in TIMING_KEYS}
    return {**results, "results": kept}


@lru_cache(maxsize=2)
def _load_codec(model: str, device: str) -> Codec:
    from pqmim.codec import load_codec  # brings torch

    return load_codec(model, device=device)


def _qualities(codec: ImageCodec, options: EvaluationOptions) -> tuple[float, ...]:
    own = options.qualities.get("", codec.qualities) if isinstance(codec, PqmimCodec) else codec.qualities
    return options.qualities.get(codec.name, own)


def _open_manifest(options: EvaluationOptions, hashes: Mapping[str, str]) -> dict[str, Any]:
    """Read the manifest of an earlier run into this folder, or begin one."""
    file = options.output / "evaluation.json"
    if file.exists():
        manifest: dict[str, Any] = json.loads(file.read_text("utf-8"))
        if manifest["images"] != hashes:
            raise ConfigError(f"{options.output}: holds an evaluation of other images; choose another folder")
        return manifest
    return {
        "dataset": options.dataset.resolve().name,
        "images": dict(hashes),
        "codecs": {},
        "missing": {},
    }


@dataclass(frozen=True)
class _Task:
    """One measurement to be made: an image, a codec and a quality."""

    file: Path
    image: str
    image_sha256: str
    codec: ImageCodec
    quality: float
    metrics: tuple[str, ...]
    weights: Path | None
    output: Path

    @property
    def record_file(self) -> Path:
        return _record_file(self.output, self.codec.name, self.quality, self.image)

    @property
    def coded_file(self) -> Path:
        folder = self.output / "files" / self.codec.name / f"{self.quality:g}"
        return folder / f"{self.image}.{self.codec.extension}"

    def stored(self) -> dict[str, Any] | None:
        """The stored measurement, if it is of this very image and codec and its file is still there."""
        try:
            record: dict[str, Any] = json.loads(self.record_file.read_text("utf-8"))
        except FileNotFoundError:
            return None
        same = (record["image_sha256"], record["description"]) == (
            self.image_sha256,
            _description(self.codec),
        )
        return record if same and self.coded_file.exists() else None

    def is_done(self) -> bool:
        record = self.stored()
        return record is not None and set(self.metrics) <= set(record["metrics"])

    def run(self) -> None:
        """Measure and store; of a stored measurement only the metrics that it lacks."""
        try:
            original = load_picture(self.file).rgb
            record = self.stored()
            if record is None:
                record = self._code(original)
            decoded = self._decode(record)
        except PqmimError as error:
            raise ImageError(f"{self.image}, {self.codec.name} at {self.quality:g}: {error}") from error
        for key in self.metrics:
            if key not in record["metrics"]:
                record["metrics"][key] = compute_metric(key, original, decoded, weights=self.weights)
        _write_json(self.record_file, record)

    def _code(self, original: Pixels) -> dict[str, Any]:
        image = Image.fromarray(original)
        _warm_up(self.codec, image)
        start = time.perf_counter()
        data = self.codec.encode(image, self.quality)
        encoding_time = time.perf_counter() - start
        self.coded_file.parent.mkdir(parents=True, exist_ok=True)
        _write_bytes(self.coded_file, data)
        return {
            "codec": self.codec.name,
            "description": _description(self.codec),
            "quality": self.quality,
            "image": self.image,
            "image_sha256": self.image_sha256,
            "width": image.width,
            "height": image.height,
            "bytes": len(data),
            "bpp": 8 * len(data) / (image.width * image.height),
            "metrics": {},
            "encoding_time": encoding_time,
        }

    def _decode(self, record: dict[str, Any]) -> Pixels:
        """Decode the file on disk; the first time is the one that counts."""
        data = self.coded_file.read_bytes()
        start = time.perf_counter()
        decoded = self.codec.decode(data)
        record.setdefault("decoding_time", time.perf_counter() - start)
        if decoded.size != (record["width"], record["height"]):
            raise ImageError(f"the image came back as {decoded.width}x{decoded.height}")
        return np.asarray(decoded.convert("RGB"))


def _run_tasks(tasks: Sequence[_Task], total: int, options: EvaluationOptions) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, disable=options.is_quiet) as progress:
        bar = progress.add_task("evaluate", total=total, completed=total - len(tasks))
        for done in _completed(tasks, options.jobs):
            progress.update(bar, advance=1, description=f"{done.codec.name} {done.image}")


def _completed(tasks: Sequence[_Task], jobs: int) -> Iterator[_Task]:
    """Run the tasks in worker processes and yield each as it is done."""
    if jobs == 1:
        for task in tasks:
            task.run()
            yield task
        return
    # Spawned, not forked: torch's threads do not survive a fork.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_start_worker) as pool:
        try:
            futures = {pool.submit(task.run): task for task in tasks}
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _start_worker() -> None:
    """One thread per worker process, before torch is imported: the processes fill the cores."""
    os.environ["OMP_NUM_THREADS"] = "1"


_warm: set[str] = set()


def _warm_up(codec: ImageCodec, image: Image.Image) -> None:
    """Code a small piece once per process, so that loading libraries and weights is not timed."""
    if codec.name not in _warm:
        codec.decode(codec.encode(image.crop((0, 0, 64, 64)), codec.qualities[0]))
        _warm.add(codec.name)


_descriptions: dict[str, str] = {}


def _description(codec: ImageCodec) -> str:
    """`codec.description()`, asked once: some run a program to learn a version."""
    key = repr(codec)
    if key not in _descriptions:
        _descriptions[key] = codec.description()
    return _descriptions[key]


def _measure_sets(
    output: Path,
    codec: ImageCodec,
    quality: float,
    images: Mapping[str, Path],
    keys: tuple[str, ...],
    weights: Path,
) -> None:
    """Compute metrics of the whole set, if not stored for these very files."""
    tasks = [_Task(file, name, "", codec, quality, (), weights, output) for name, file in images.items()]
    digest = _sha256(b"".join(task.coded_file.read_bytes() for task in tasks))
    file = _set_file(output, codec.name, quality)
    record = json.loads(file.read_text("utf-8")) if file.exists() else {}
    if record.get("files_sha256") != digest:
        record = {"files_sha256": digest, "metrics": {}}
    todo = tuple(key for key in keys if key not in record["metrics"])
    if todo:
        pairs = (
            (
                load_picture(task.file).rgb,
                np.asarray(codec.decode(task.coded_file.read_bytes()).convert("RGB")),
            )
            for task in tasks
        )
        record["metrics"].update(set_distances(pairs, todo, load_inception(weights)))
        _write_json(file, record)


def _write_results(output: Path, manifest: Mapping[str, Any]) -> None:
    """Write means per codec and the table of all measurements."""
    rows: list[dict[str, Any]] = []
    for name, entry in manifest["codecs"].items():
        points = []
        for quality in entry["qualities"]:
            records = [
                json.loads(_record_file(output, name, quality, image).read_text("utf-8"))
                for image in manifest["images"]
            ]
            rows += [_row(record) for record in records]
            points.append(_mean_point(records, output, quality))
        points.sort(key=lambda point: point["bpp"] or 0.0)
        # A metric that is not defined for some image has no mean: it is left out.
        defined = [key for key in points[0] if all(point.get(key) is not None for point in points)]
        results = {key: [point[key] for point in points] for key in defined}
        content = {"name": name, "description": entry["description"], "results": results}
        _write_json(output / "results" / f"{name}.json", content)
    _write_json(output / "per_image.json", rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (output / "per_image.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    first = ("codec", "quality", "image", "width", "height", "bytes", "bpp")
    timings = {key: record[key] for key in TIMING_KEYS}
    return {**{key: record[key] for key in first}, **record["metrics"], **timings}


def _mean_point(records: Sequence[Mapping[str, Any]], output: Path, quality: float) -> dict[str, float | None]:
    """Means over images: of bpp and of every metric that is defined for all of them."""
    point: dict[str, float | None] = {"quality": quality}
    point["bpp"] = float(np.mean([record["bpp"] for record in records]))
    for key in METRICS:
        values = [record["metrics"].get(key) for record in records]
        point[key] = None if None in values else float(np.mean(values))
    sets = _set_file(output, records[0]["codec"], quality)
    if sets.exists():
        point.update(json.loads(sets.read_text("utf-8"))["metrics"])
    for key in TIMING_KEYS:
        point[key] = float(np.mean([record[key] for record in records]))
    return point


def _record_file(output: Path, codec: str, quality: float, image: str) -> Path:
    return output / "measurements" / codec / f"{quality:g}" / f"{image}.json"


def _set_file(output: Path, codec: str, quality: float) -> Path:
    return output / "measurements" / codec / f"{quality:g}.json"


def _is_kodak(images: Iterable[str]) -> bool:
    return {Path(name).stem.lower() for name in images} == {f"kodim{i:02d}" for i in range(1, 25)}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write_json(file: Path, content: Any) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    _write_bytes(file, (text + "\n").encode())


def _write_bytes(file: Path, data: bytes) -> None:
    """Write through a temporary file, so that an interruption leaves no half of one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(file)
