"""Seconds and peak memory of encoding and decoding, over image sizes and numbers of threads.

Every measurement runs in a process of its own: its peak memory is its own, and one thread means one core (by
CPU affinity where the system has it), whatever pool of threads a library keeps.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image
from rich.progress import track

from pqmim._version import __version__
from pqmim.errors import PqmimError
from pqmim.evaluation.evaluate import PqmimCodec
from pqmim.evaluation.metrics import Pixels
from pqmim.evaluation.reference_codecs import ImageCodec, reference_codec
from pqmim.image_io import load_picture

MEBI = 2**20
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
LOAD_OF_AN_IDLE_MACHINE = 0.5  # runnable processes, mean of a minute


class CodecFactory(Protocol):
    """Makes a codec for a number of threads; can be pickled."""

    def __call__(self, *, threads: int) -> ImageCodec:
        """Return the codec."""


def pqmim_factory(model: str, *, device: str = "auto") -> CodecFactory:
    """Factory of a pqmim model; torch takes as many threads as the process may use cores."""
    return partial(_pqmim_codec, model, device)


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
        gpu_memory: bytes on the GPU at the peak, 0 without one.
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
    gpu_memory: int = 0
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


def num_usable_cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe_machine() -> dict[str, str]:
    """Say what the numbers were measured on, and whether it had other work to do."""
    machine = {
        "pqmim": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(num_usable_cores()),
    }
    if hasattr(os, "getloadavg"):
        load = os.getloadavg()[0]
        machine["load at the start"] = f"{load:.1f}"
        if load > LOAD_OF_AN_IDLE_MACHINE:
            machine["warning"] = "the machine was busy with other work: timings are too long"
    return machine


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _pqmim_codec(model: str, device: str, *, threads: int) -> ImageCodec:
    return PqmimCodec(model, device=device)


def _time_in_processes(factory: CodecFactory, blank: Timing, image: Pixels, options: BenchmarkOptions) -> Timing:
    """Encode in one fresh process and decode in another, so that neither uses memory that the other freed."""
    repeats = max(1, options.repeats - max(0, math.floor(math.log2(blank.megapixels))))
    encoded = _in_process(_encode, options.time_limit, factory, blank, image, repeats)
    if isinstance(encoded, str):
        return replace(blank, problem=f"encode: {encoded}")
    decoded = _in_process(_decode, options.time_limit, factory, blank, encoded.data, repeats)
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
        gpu_memory=max(encoded.gpu_memory, decoded.gpu_memory),
    )


@dataclass(frozen=True)
class _Half:
    """What encoding or decoding took, and the file."""

    data: bytes
    seconds: float
    memory: int
    process_memory: int
    gpu_memory: int


def _in_process(work: Callable[..., _Half], time_limit: float, *arguments: object) -> _Half | str:
    """Run one half in a fresh process; what went wrong is returned as text."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, work, *arguments), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(time_limit):
            return f"took longer than {time_limit:g} s"
        result: _Half | str = receiver.recv()
        return result
    except EOFError:
        process.join()
        return f"the process ended with code {process.exitcode} (out of memory?)"
    finally:
        process.terminate()
        process.join()


def _send(sender: Connection, work: Callable[..., _Half], *arguments: object) -> None:
    """Body of the measuring process."""
    try:
        sender.send(work(*arguments))
    except (PqmimError, MemoryError, OSError) as error:
        sender.send(f"{type(error).__name__}: {error}")


def _encode(factory: CodecFactory, blank: Timing, pixels: Pixels, repeats: int) -> _Half:
    codec, image = _ready_codec(factory, blank), Image.fromarray(pixels)
    meter, seconds = _MemoryMeter(), []
    for _ in range(repeats):
        start = time.perf_counter()
        data = codec.encode(image, blank.quality)
        seconds.append(time.perf_counter() - start)
    return meter.half(data, seconds)


def _decode(factory: CodecFactory, blank: Timing, data: bytes, repeats: int) -> _Half:
    codec = _ready_codec(factory, blank)
    meter, seconds = _MemoryMeter(), []
    for _ in range(repeats):
        start = time.perf_counter()
        codec.decode(data)
        seconds.append(time.perf_counter() - start)
    return meter.half(data, seconds)


def _ready_codec(factory: CodecFactory, blank: Timing) -> ImageCodec:
    """Make the codec, and let it load its libraries and weights."""
    _limit_threads(blank.threads)
    codec = factory(threads=blank.threads)
    codec.decode(codec.encode(Image.fromarray(square_image(64, None)), blank.quality))
    return codec


def _limit_threads(threads: int) -> None:
    """Give this process `threads` cores, before any library starts its own threads."""
    if threads < num_usable_cores() and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    for variable in THREAD_VARIABLES:
        os.environ[variable] = str(threads)


class _MemoryMeter:
    """Peak memory since its making, of this process or of a program that it ran."""

    def __init__(self) -> None:
        # Resets the peak that Linux keeps; elsewhere it stays, and what is added is told too low.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self.before = _status("VmRSS") or _peak_memory()
        self._programs_before = _programs_memory()

    def half(self, data: bytes, seconds: Sequence[float]) -> _Half:
        """Read the meter: memory above what was in use at its making."""
        programs = _programs_memory()
        # The maximum over all programs only ever rises: if it did, it is a peak of those just run.
        added = max(0, _peak_memory() - self.before, programs if programs > self._programs_before else 0)
        whole = max(_peak_memory(), self.before + added)
        return _Half(data, statistics.median(seconds), added, whole, _peak_gpu_memory())


def _peak_memory() -> int:
    """Peak resident memory of this process, bytes."""
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _programs_memory() -> int:
    """Peak resident memory of the largest program that ended so far, bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(name: str) -> int | None:
    """A size that Linux keeps of this process, bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), None)


def _peak_gpu_memory() -> int:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return int(torch.cuda.max_memory_allocated())


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
