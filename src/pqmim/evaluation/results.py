"""Results of an evaluation: how its folder is laid out, means over the images, and reading it all back.

::

    OUT/evaluation.json                         data set, codecs, qualities; what was missing and why
    OUT/files/CODEC/QUALITY/IMAGE.EXTENSION     the files that were measured
    OUT/measurements/CODEC/QUALITY/IMAGE.json   one measurement, written when it is done
    OUT/results/CODEC.json                      means over the images, in the shape of CompressAI's results
    OUT/per_image.csv, OUT/per_image.json       every measurement
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pqmim.errors import ConfigError
from pqmim.evaluation.bd_rate import BdRate, bd_rate
from pqmim.evaluation.metrics import METRICS
from pqmim.evaluation.pixel_metrics import ms_ssim_db
from pqmim.evaluation.published import published_kodak_curves

INTERVAL_SUFFIX = "-interval"
TIMING_KEYS = ("encoding_time", "decoding_time")


@dataclass(frozen=True)
class Curve:
    """Means of one codec over a data set, by rising rate.

    Attributes:
        kind: "measured" here, or "published" by others.
        description: settings and versions, or the source.
        bpp: bits per pixel of real files.
        metrics: metric key -> one value per rate.
        qualities: the codec's setting at each rate; empty for published curves.
        intervals: metric key -> 95 % interval at each rate, of metrics of sets that have one.
        num_patches: that metrics of sets were computed from; None = there are none.
    """

    name: str
    kind: str
    description: str
    bpp: tuple[float, ...]
    metrics: Mapping[str, tuple[float, ...]]
    qualities: tuple[float, ...] = ()
    intervals: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    num_patches: int | None = None


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
                intervals={
                    key: tuple((low, high) for low, high in results[key + INTERVAL_SUFFIX])
                    for key in METRICS
                    if key + INTERVAL_SUFFIX in results
                },
                num_patches=results["num-patches"][0] if "num-patches" in results else None,
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


def write_results(output: Path, manifest: Mapping[str, Any]) -> None:
    """Write means per codec and the table of all measurements."""
    rows: list[dict[str, Any]] = []
    for name, entry in manifest["codecs"].items():
        points = []
        for quality in entry["qualities"]:
            records = [
                json.loads(record_file(output, name, quality, image).read_text("utf-8")) for image in manifest["images"]
            ]
            rows += [_row(record) for record in records]
            points.append(_mean_point(records, output, quality))
        points.sort(key=lambda point: point["bpp"] or 0.0)
        # A metric that is not defined for some image has no mean: it is left out.
        defined = [key for key in points[0] if all(point.get(key) is not None for point in points)]
        results = {key: [point[key] for point in points] for key in defined}
        content = {"name": name, "description": entry["description"], "results": results}
        write_json(output / "results" / f"{name}.json", content)
    write_json(output / "per_image.json", rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (output / "per_image.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    first = ("codec", "quality", "image", "width", "height", "bytes", "bpp")
    timings = {key: record[key] for key in TIMING_KEYS}
    return {**{key: record[key] for key in first}, **record["metrics"], **timings}


def _mean_point(records: Sequence[Mapping[str, Any]], output: Path, quality: float) -> dict[str, Any]:
    """Means over images: of bpp and of every metric that is defined for all of them; what is known of the set."""
    point: dict[str, Any] = {"quality": quality}
    point["bpp"] = float(np.mean([record["bpp"] for record in records]))
    for key in METRICS:
        values = [record["metrics"].get(key) for record in records]
        point[key] = None if None in values else float(np.mean(values))
    sets = set_file(output, records[0]["codec"], quality)
    if sets.exists():
        record = json.loads(sets.read_text("utf-8"))
        point.update(record["metrics"])
        point.update({key + INTERVAL_SUFFIX: interval for key, interval in record.get("intervals", {}).items()})
        point["num-patches"] = record.get("patches")
    for key in TIMING_KEYS:
        point[key] = float(np.mean([record[key] for record in records]))
    return point


def record_file(output: Path, codec: str, quality: float, image: str) -> Path:
    return output / "measurements" / codec / f"{quality:g}" / f"{image}.json"


def set_file(output: Path, codec: str, quality: float) -> Path:
    return output / "measurements" / codec / f"{quality:g}.json"


def _is_kodak(images: Iterable[str]) -> bool:
    return {Path(name).stem.lower() for name in images} == {f"kodim{i:02d}" for i in range(1, 25)}


def write_json(file: Path, content: Any) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    write_bytes(file, (text + "\n").encode())


def write_bytes(file: Path, data: bytes) -> None:
    """Write through a temporary file, so that an interruption leaves no half of one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(file)
