"""Benchmark: processes, memory, time limit."""

import csv
import json
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stand_in_codec import StandInCodec

from pqmim.errors import ImageError
from pqmim.evaluation.benchmark import (
    MEBI,
    BenchmarkOptions,
    Timing,
    growth_exponent,
    reference_factory,
    run_benchmark,
    square_image,
)


@dataclass(frozen=True)
class HungryCodec(StandInCodec):
    """Takes 16 bytes per pixel and a millisecond per 1000 pixels to encode."""

    def encode(self, image: Image.Image, quality: float) -> bytes:
        time.sleep(image.width * image.height / 1e6)
        np.ones(2 * image.width * image.height).sum()
        return super().encode(image, quality)


@dataclass(frozen=True)
class FailingCodec(StandInCodec):
    def encode(self, image: Image.Image, quality: float) -> bytes:
        if image.width > 64:
            raise ImageError("no luck")
        return super().encode(image, quality)


@dataclass(frozen=True)
class DyingCodec(StandInCodec):
    def encode(self, image: Image.Image, quality: float) -> bytes:
        sys.exit(3)


def factory(kind: type[StandInCodec], name: str = "stand-in", *, threads: int) -> StandInCodec:
    return kind(name=name)


def options(folder: Path, *codecs: object, **changes: object) -> BenchmarkOptions:
    settings: dict = {"sizes": (128, 512), "threads": (1,), "repeats": 1, "is_quiet": True, **changes}
    return BenchmarkOptions(output=folder, codecs=codecs, **settings)


def test_seconds_and_memory(tmp_path: Path):
    benchmark = run_benchmark(options(tmp_path, partial(factory, HungryCodec)))
    small, large = benchmark.timings
    assert (small.size, large.size) == (128, 512)
    assert large.problem is None
    assert large.encode_seconds >= 0.262
    assert large.file_bytes > small.file_bytes
    if sys.platform == "linux":
        assert 4 * MEBI <= large.encode_memory <= 24 * MEBI
        assert large.process_memory > large.encode_memory
    content = json.loads((tmp_path / "bench.json").read_text())
    row = content["timings"][1]
    assert row["encode_seconds_per_megapixel"] == pytest.approx(large.encode_seconds / 0.262144)
    assert "cores" in content["machine"]
    (growth,) = content["growth"]
    assert 0.5 < growth["encode"] < 2
    with (tmp_path / "bench.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2


def test_missing_failing_dying_and_slow_codecs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    benchmark = run_benchmark(
        options(
            tmp_path,
            reference_factory("mozjpeg"),
            partial(factory, FailingCodec, "failing"),
            partial(factory, DyingCodec, "dying"),
        )
    )
    assert benchmark.missing == {"mozjpeg": "the program cjpeg is not installed"}
    problems = {(t.codec, t.size): t.problem for t in benchmark.timings}
    assert problems["failing", 128] == "encode: ImageError: no luck"
    assert problems["dying", 128] == "encode: the process ended with code 3 (out of memory?)"
    assert "left out" in problems["dying", 512]

    slow = options(tmp_path, partial(factory, HungryCodec), sizes=(2000,), time_limit=0.5)
    problem = run_benchmark(slow).timings[0].problem
    assert problem == "encode: took longer than 0.5 s"


def test_square_image():
    noise = square_image(96, None)
    assert noise.shape == (96, 96, 3)
    assert np.array_equal(noise, square_image(96, None))
    assert 30 < noise.std() < 70
    photo = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
    filled = square_image(9, photo)
    assert np.array_equal(filled[:5, :4], photo)
    assert np.array_equal(filled[:5, 4:8], photo[:, ::-1])
    assert square_image(3, photo).shape == (3, 3, 3)


def test_growth_exponent():
    timings = [
        Timing("c", "", size, 1, 50.0, encode_seconds=seconds)
        for size, seconds in ((100, 9.0), (256, 1.0), (512, 8.0), (1024, 64.0))
    ]
    assert growth_exponent(timings, "encode_seconds") == pytest.approx(1.5)
    assert growth_exponent(timings, "decode_seconds") is None
