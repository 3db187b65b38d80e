"""One measurement: an image through a codec at a quality, as a file on disk that is decoded again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pqmim.errors import ImageError, PqmimError
from pqmim.evaluation.image_codecs import ImageCodec
from pqmim.evaluation.metrics import METRICS, compute_metric
from pqmim.evaluation.perceptual import inception_distances, kernel_distances, load_inception, load_pooled
from pqmim.evaluation.pixel_metrics import Pixels
from pqmim.evaluation.results import record_file, set_file, write_bytes, write_json
from pqmim.image_io import load_picture


@dataclass(frozen=True)
class Measurement:
    """One measurement to be made: an image, a codec and a quality."""

    file: Path
    image: str
    image_sha256: str
    codec: ImageCodec
    quality: float
    metrics: tuple[str, ...]
    output: Path

    @property
    def record_file(self) -> Path:
        return record_file(self.output, self.codec.name, self.quality, self.image)

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
                record["metrics"][key] = compute_metric(key, original, decoded)
        write_json(self.record_file, record)

    def _code(self, original: Pixels) -> dict[str, Any]:
        image = Image.fromarray(original)
        _warm_up(self.codec, image)
        start = time.perf_counter()
        data = self.codec.encode(image, self.quality)
        encoding_time = time.perf_counter() - start
        self.coded_file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(self.coded_file, data)
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


def measure_sets(
    output: Path,
    codec: ImageCodec,
    quality: float,
    images: Mapping[str, Path],
    keys: tuple[str, ...],
    weights: Path | None,
) -> None:
    """Compute metrics of the whole set, if not stored for these very files.

    Args:
        weights: see `metrics.check_weights`.
    """
    tasks = [Measurement(file, name, "", codec, quality, (), output) for name, file in images.items()]
    digest = sha256(b"".join(task.coded_file.read_bytes() for task in tasks))
    file = set_file(output, codec.name, quality)
    record = json.loads(file.read_text("utf-8")) if file.exists() else {}
    if record.get("files_sha256") != digest:
        record = {"files_sha256": digest, "metrics": {}}

    def pairs() -> Iterator[tuple[Pixels, Pixels]]:
        for task in tasks:
            decoded = codec.decode(task.coded_file.read_bytes()).convert("RGB")
            yield load_picture(task.file).rgb, np.asarray(decoded)

    todo = [key for key in keys if key not in record["metrics"]]
    by_user = [key for key in todo if METRICS[key].needs_weights]
    by_package = [key for key in todo if not METRICS[key].needs_weights]
    if by_user:
        assert weights is not None  # `check_weights` saw to it
        record["metrics"].update(inception_distances(pairs(), by_user, load_inception(weights)))
    if by_package:
        estimates, record["patches"] = kernel_distances(pairs(), {key: load_pooled(key) for key in by_package})
        for key, estimate in estimates.items():
            record["metrics"][key] = estimate and estimate.value
            record.setdefault("intervals", {})[key] = estimate and (estimate.low, estimate.high)
    if todo:
        write_json(file, record)


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


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
