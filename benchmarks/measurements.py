"""What the scripts beside it share: arguments, photos, rows that survive an interruption, means and tables."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pqmim import __version__
from pqmim.codec import load_codec
from pqmim.evaluation.dataset import find_images
from pqmim.evaluation.metrics import compute_metric
from pqmim.evaluation.pixel_metrics import Pixels
from pqmim.evaluation.results import Curve
from pqmim.image_io import load_picture

PSNR, MS_SSIM = "psnr-rgb", "ms-ssim-rgb"

Row = dict[str, Any]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Photo:
    """An image to measure on.

    Attributes:
        name: relative to the data set.
        pixels: (H, W, 3) uint8.
        sha256: of its file, hex.
    """

    name: str
    pixels: Pixels
    sha256: str

    @property
    def num_pixels(self) -> int:
        return int(self.pixels.shape[0] * self.pixels.shape[1])


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Parser with the arguments that all these scripts take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="folder of images, or one image")
    parser.add_argument("-m", "--model", default="photo", help="shipped token model, or path of one")
    parser.add_argument("--decoder", help="name or path [default: fine]")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="folder for the results")
    parser.add_argument("--images", type=int, metavar="N", help="only the first N images")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    return parser


def read_photos(dataset: Path, number: int | None) -> list[Photo]:
    """The first images of a data set; all of them if no number is given."""
    files = list(find_images(dataset).items())[:number]
    return [Photo(name, load_picture(file).rgb, hashlib.sha256(file.read_bytes()).hexdigest()) for name, file in files]


class Bench:
    """A codec and the rows that were measured with it.

    Rows are appended to OUT/measurements.jsonl as they are made. One that is there, of the same image, model and
    release, is not made again; delete the file after a change of the encoder.

    Args:
        model, decoder: as `load_codec` takes them.
        output: folder, made if need be.
    """

    def __init__(self, model: str, output: Path, device: str, decoder: str | None = None) -> None:
        self.codec = load_codec(model, decoder, device=device)
        self._clock = time.process_time if device == "cpu" else time.perf_counter
        output.mkdir(parents=True, exist_ok=True)
        self._file = output / "measurements.jsonl"
        self._maker = f"pqmim {__version__} {self.codec.model_id.hex()} {self.codec.decoder_id.hex()} {device}"
        self._rows = {row["key"]: row for row in _read_rows(self._file)}
        self._is_warm = False

    def row(self, photo: Photo, what: str, measure: Callable[[], Mapping[str, Any]]) -> Row:
        """Measure, unless that is done: `what` is told from the image's other rows by its text."""
        key = f"{self._maker} {photo.sha256} {what}"
        if key not in self._rows:
            self._warm_up(photo)
            row = {"key": key, "image": photo.name, **measure()}
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self._rows[key] = row
        return self._rows[key]

    def timed(self, function: Callable[[], Result]) -> tuple[Result, float]:
        """A result and the seconds that it took; on a CPU those of the process, which other work adds little to."""
        start = self._clock()
        result = function()
        return result, self._clock() - start

    def decode(self, data: bytes) -> Pixels:
        """(H, W, 3) uint8; what is missing is filled as likely."""
        return np.asarray(self.codec.decode(data))

    def worth(self, photo: Photo, data: bytes, keys: Sequence[str] = (PSNR, MS_SSIM)) -> Row:
        """Bytes, bits per pixel, share of the tokens that are there, and metrics (MS-SSIM: None below 161 pixels)."""
        report = self.codec.decode_with_report(data)
        decoded = np.asarray(report.image)
        metrics = {key: compute_metric(key, photo.pixels, decoded) for key in keys}
        return {
            "bytes": len(data),
            "bpp": 8 * len(data) / photo.num_pixels,
            "known_share": 1 - report.invented_share,
        } | metrics

    def _warm_up(self, photo: Photo) -> None:
        """Code a small piece, so that the first row's time is not that of loading libraries."""
        if not self._is_warm:
            self.codec.decode(self.codec.encode(photo.pixels[:64, :64]))
            self._is_warm = True


def _read_rows(file: Path) -> list[Row]:
    """Rows of an earlier run. A last line that was cut off by an interruption is removed from the file."""
    if not file.exists():
        return []
    text = file.read_text("utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole, "utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def mean(rows: Iterable[Mapping[str, Any]], key: str) -> float | None:
    """Mean of a column; None if it is not defined for some row."""
    values = [row[key] for row in rows]
    return None if None in values else float(np.mean(values))


def curve(name: str, points: Sequence[Sequence[Row]], keys: Sequence[str] = (PSNR, MS_SSIM)) -> Curve:
    """A curve through the means over images at each point."""
    means = {key: [mean(rows, key) for rows in points] for key in ("bpp", *keys)}
    known = {key: tuple(v for v in values if v is not None) for key, values in means.items() if None not in values}
    return Curve(name, "measured", "", known.pop("bpp"), known)


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, ["---"] * len(header), *lines))


def number(value: float | None, form: str, *, unit: str = "") -> str:
    """A cell of a table, empty if there is no value."""
    return "" if value is None else f"{value:{form}}{unit}"


def write(output: Path, name: str, content: Any, text: str) -> None:
    """Write OUT/NAME.json and OUT/NAME.md, and print the latter."""
    (output / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    (output / f"{name}.md").write_text(text, "utf-8")
    print(text)
