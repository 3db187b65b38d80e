"""Throughput of many pictures: one process, several, and `pqmim bulk`, in turn, as ratios in one run.

    python benchmarks/bulk.py FOLDER [--workers 2] [--repeats 3] [-- -q 50 ...]

Whole commands, from start to end: loading the model, and starting Ray, is part of it, so a small folder shows what that
costs and a large one what is left of it. `--copies N` makes N copies of each picture first. What follows `--` is handed
to `encode` and `bulk` alike.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from commands import PRESENT, Version
from measurements import table


def ways_of(workers: int) -> dict[str, tuple[str, ...]]:
    """Name of each way to encode a folder -> its command, between the folders and the options that all share."""
    return {
        "encode -j 1": ("encode", "-j", "1"),
        f"encode -j {workers}": ("encode", "-j", str(workers)),
        f"bulk --concurrency {workers}": ("bulk", "--concurrency", str(workers)),
    }


def command_of(way: tuple[str, ...], photos: Path, output: Path, options: Sequence[str]) -> list[str | Path]:
    """The whole command; `encode` names its output by an option."""
    places = [photos, output] if way[0] == "bulk" else [photos, "-o", output]
    return [way[0], *places, *way[1:], *options]


def measure(
    version: Version, photos: Path, workers: int, repeats: int, options: Sequence[str]
) -> tuple[dict[str, float], int]:
    """Median seconds of each way, measured in turn, and the number of pictures; all must write the same files.

    Raises:
        SystemExit: a command failed, or two ways wrote different files.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways_of(workers)}
    for _ in range(repeats):
        written = {}
        for name, way in ways_of(workers).items():
            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder, "out")
                start = time.perf_counter()
                version.run(*command_of(way, photos, output, options))
                seconds[name].append(time.perf_counter() - start)
                written[name] = {
                    path.relative_to(output).as_posix(): path.read_bytes() for path in sorted(output.rglob("*.pqm"))
                }
        if any(files != written["encode -j 1"] for files in written.values()):
            raise SystemExit("the ways wrote different files")
    return {name: statistics.median(times) for name, times in seconds.items()}, len(written["encode -j 1"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="pictures that Pillow reads")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("options", nargs="*", help="of encode and bulk")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.copies):
            shutil.copytree(arguments.folder, Path(folder, str(number)))
        seconds, num_photos = measure(PRESENT, Path(folder), arguments.workers, arguments.repeats, arguments.options)
    alone = seconds["encode -j 1"]
    print(f"{num_photos} pictures, medians of {arguments.repeats}\n")
    lines = [
        (f"`{name}`", f"{taken:.1f} s", f"{num_photos / taken:.2f}", f"{alone / taken:.2f}")
        for name, taken in seconds.items()
    ]
    print(table(("command", "seconds", "pictures per second", "throughput against -j 1"), lines))


if __name__ == "__main__":
    main()
