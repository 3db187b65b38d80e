"""Seconds and peak memory of encoding and decoding, over image sizes and numbers of threads.

Every measurement runs in a process of its own: its peak memory is its own, and one thread means one core (by
CPU affinity where the system has it), whatever pool of threads a library keeps.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image
from rich.progress import track

from pqmim.cores import num_usable_cores
from pqmim.evaluation.image_codecs import ImageCodec
from pqmim.evaluation.machine import describe_machine
from pqmim.evaluation.pixel_metrics import Pixels
from pqmim.evaluation.pqmim_codec import PqmimCodec
from pqmim.evaluation.processes import MEBI, MemoryMeter, in_process
from pqmim.evaluation.reference_codecs import reference_codec
from pqmim.image_io import load_picture


class CodecFactory(Protocol):
    """Makes a codec for a number of threads; can be pickled."""

    def __call__(self, *, threads: int) -> ImageCodec:
        """Return the codec."""


def pqmim_factory(
    model: str, *, decoder: str | None = None, realism: float | None = None, device: str = "auto"
) -> CodecFactory:
    """Factory of a token model and a decoder."""
    return partial(_pqmim_codec, model, decoder, realism, device)


def reference_factory(name: str) -> CodecFactory:
    """Factory of a reference codec, see `reference_codecs.reference_codec`."""
    return partial(reference_codec, name)


@dataclass(frozen=True)
class BenchmarkOptions:
    """What to time.

    Attributes:
        output: folder for `bench.json`, `bench.csv` and the plots.
        codecs: made by `pqmim_factory` and `reference_factory`.
        sizes: sides of the square images, in pixels.
        threads: numbers of threads; 0 stands for all cores.
        qualities: codec name -> quality; otherwise the middle one of the codec's own.
        image: photo that is mirrored and repeated to each size; without one, colored noise with a photo's
            spectrum.
        repeats: runs of which the median counts; beyond 1 megapixel one run fewer per doubling, at least one.
        time_limit: seconds to encode, or decode, all repeats of an image; past it larger ones are left out.
        is_quiet: no progress bar.
    """

    output: Path
    codecs: tuple[CodecFactory, ...]
    sizes: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    threads: tuple[int, ...] = (1, 0)
    qualities: Mapping[str, float] = field(default_factory=dict)
    image: Path | None = None
    repeats: int = 3
    time_limit: float = 300.0
    is_quiet: bool = False


@dataclass(frozen=True)
class Timing:
    """One measurement.

    Attributes:
        threads: number of cores the process was given.
        encode_seconds: median; None if `problem` says why not.
        encode_memory: bytes that encoding added to the process at its peak.
        process_memory: bytes of the whole process at its peak, with interpreter, libraries and weights.
    """

    codec: str
    description: str
    size: int
    threads: int
    quality: float
    file_bytes: int | None = None
    encode_seconds: float | None = None
    decode_seconds: float | None = None
    encode_memory: int | None = None
    decode_memory: int | None = None
    process_memory: int | None = None
    problem: str | None = None

    @property
    def megapixels(self) -> float:
        """Millions of pixels of the image."""
        return self.size**2 / 1e6


@dataclass(frozen=True)
class Benchmark:
    """All measurements of one run.

    Attributes:
        machine: what it ran on, and how busy that was.
        missing: codec -> why it could not run.
    """

    machine: Mapping[str, str]
    timings: tuple[Timing, ...]
    missing: Mapping[str, str]


def run_benchmark(options: BenchmarkOptions) -> Benchmark:
    """Time all codecs and write `bench.json`, `bench.csv`."""
    machine = describe_machine()
    all_cores = num_usable_cores()
    thread_counts = tuple(dict.fromkeys(count or all_cores for count in options.threads))
    missing: dict[str, str] = {}
    factories: list[CodecFactory] = []
    for factory in options.codecs:
        codec = factory(threads=1)
        reason = codec.missing()
        if reason is None:
            factories.append(factory)
        else:
            missing[codec.name] = reason
    photo = None if options.image is None else load_picture(options.image).rgb
    jobs = [
        (factory, threads, size) for size in sorted(options.sizes) for factory in factories for threads in thread_counts
    ]
    timings: list[Timing] = []
    too_slow: set[tuple[str, int]] = set()
    for factory, threads, size in track(jobs, "bench", disable=options.is_quiet):
        codec = factory(threads=threads)
        quality = options.qualities.get(codec.name, codec.qualities[len(codec.qualities) // 2])
        blank = Timing(codec.name, codec.description(), size, threads, quality)
        if (codec.name, threads) in too_slow:
            problem = f"left out: a smaller image took longer than {options.time_limit:g} s"
            timings.append(replace(blank, problem=problem))
            continue
        timing = _time_in_processes(factory, blank, square_image(size, photo), options)
        if timing.problem is not None:
            too_slow.add((codec.name, threads))
        timings.append(timing)
    benchmark = Benchmark(machine, tuple(timings), missing)
    _write(options.output, benchmark)
    return benchmark


def square_image(size: int, photo: Pixels | None) -> Pixels:
    """Make a square image of the same texture at every size.

    Args:
        size: pixels per side.
        photo: (H, W, 3) uint8, mirrored at its borders until it fills the square. None gives noise whose
            amplitude falls as 1 / frequency, as it does in photos, the same in every run.

    Returns:
        (size, size, 3) uint8.
    """
    if photo is not None:
        rows, columns = (
            np.pad(np.arange(length), (0, max(0, size - length)), mode="symmetric")[:size] for length in photo.shape[:2]
        )
        filled: Pixels = photo[rows][:, columns]
        return filled
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = np.inf
    planes = []
    for strength in (1.0, 0.3, 0.3):  # luma, and two color differences
        phases = rng.normal(size=(2, *frequency.shape))
        plane = np.fft.irfft2((phases[0] + 1j * phases[1]) / frequency, s=(size, size))
        planes.append(plane / plane.std() * 45 * strength)
    luma, blue, red = planes
    rgb = np.stack([luma + red, luma - 0.5 * red - 0.2 * blue, luma + blue], axis=2)
    noise: Pixels = np.clip(rgb + 118, 0, 255).astype(np.uint8)
    return noise


def growth_exponent(timings: Sequence[Timing], name: str) -> float | None:
    """Fit seconds ~ pixels^x to the three largest sizes; 1 is linear.

    Args:
        timings: of one codec and number of threads.
        name: "encode_seconds" or "decode_seconds".

    Returns:
        x, or None with fewer than two sizes.
    """
    points = [(t.megapixels, getattr(t, name)) for t in timings if getattr(t, name) is not None]
    if len(points) < 2:
        return None
    largest = np.log(sorted(points)[-3:])
    return float(np.polyfit(largest[:, 0], largest[:, 1], 1)[0])


def _pqmim_codec(model: str, decoder: str | None, realism: float | None, device: str, *, threads: int) -> ImageCodec:
    return PqmimCodec(model, device=device, threads=threads, decoder=decoder, realism=realism)


def _time_in_processes(factory: CodecFactory, blank: Timing, image: Pixels, options: BenchmarkOptions) -> Timing:
    """Encode in one fresh process and decode in another, so that neither uses memory that the other freed."""
    repeats = max(1, options.repeats - max(0, math.floor(math.log2(blank.megapixels))))
    encoded = in_process(_encode, blank.threads, options.time_limit, factory, blank, image, repeats)
    if isinstance(encoded, str):
        return replace(blank, problem=f"encode: {encoded}")
    decoded = in_process(_decode, blank.threads, options.time_limit, factory, blank, encoded.data, repeats)
    if isinstance(decoded, str):
        return replace(blank, problem=f"decode: {decoded}")
    return replace(
        blank,
        file_bytes=len(encoded.data),
        encode_seconds=encoded.seconds,
        decode_seconds=decoded.seconds,
        encode_memory=encoded.memory,
        decode_memory=decoded.memory,
        process_memory=max(encoded.process_memory, decoded.process_memory),
    )


@dataclass(frozen=True)
class _Half:
    """What encoding or decoding took, and the file."""

    data: bytes
    seconds: float
    memory: int
    process_memory: int


def _encode(factory: CodecFactory, blank: Timing, pixels: Pixels, repeats: int) -> _Half:
    codec, image = _ready_codec(factory, blank), Image.fromarray(pixels)
    meter = MemoryMeter()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        data = codec.encode(image, blank.quality)
        seconds.append(time.perf_counter() - start)
    return _Half(data, statistics.median(seconds), *meter.read())


def _decode(factory: CodecFactory, blank: Timing, data: bytes, repeats: int) -> _Half:
    codec = _ready_codec(factory, blank)
    meter = MemoryMeter()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        codec.decode(data)
        seconds.append(time.perf_counter() - start)
    return _Half(data, statistics.median(seconds), *meter.read())


def _ready_codec(factory: CodecFactory, blank: Timing) -> ImageCodec:
    """Make the codec, and let it load its libraries and weights."""
    codec = factory(threads=blank.threads)
    codec.decode(codec.encode(Image.fromarray(square_image(64, None)), blank.quality))
    return codec


def _write(folder: Path, benchmark: Benchmark) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [_row(timing) for timing in benchmark.timings]
    content = {
        "machine": benchmark.machine,
        "missing": benchmark.missing,
        "growth": _growth(benchmark.timings),
        "timings": rows,
    }
    (folder / "bench.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    with (folder / "bench.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["codec"])
        writer.writeheader()
        writer.writerows(rows)


def _growth(timings: Sequence[Timing]) -> list[dict[str, object]]:
    """Exponents of growth with pixels, a row for each codec and number of threads."""
    rows: list[dict[str, object]] = []
    for codec, threads in dict.fromkeys((timing.codec, timing.threads) for timing in timings):
        own = [timing for timing in timings if (timing.codec, timing.threads) == (codec, threads)]
        exponents = {way: growth_exponent(own, f"{way}_seconds") for way in ("encode", "decode")}
        rows.append({"codec": codec, "threads": threads, **exponents})
    return rows


def _row(timing: Timing) -> dict[str, object]:
    """A measurement with its figures per megapixel: seconds, and MiB."""
    row: dict[str, object] = asdict(timing)
    for way in ("encode", "decode"):
        seconds, memory = getattr(timing, f"{way}_seconds"), getattr(timing, f"{way}_memory")
        row[f"{way}_seconds_per_megapixel"] = None if seconds is None else seconds / timing.megapixels
        row[f"{way}_mib_per_megapixel"] = None if memory is None else memory / MEBI / timing.megapixels
    return row
