"""What other work on the machine does to encode and decode: whole processes alone, beside busy loops, two at once.

    python benchmarks/busy.py [--loops 2] [--repeats 5] [--before WHERE]

Ratios are against the same command alone, in one run, by medians; `--before` measures another version of the package
too (a folder that holds it, or a Python executable). With as many busy loops as cores a fair system leaves a process
half of its time, so a ratio of 2 is what other work costs by itself; two at once, each with threads for all cores, too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from commands import PRESENT, Version, busy_loops
from example import photo_of_size, size_of
from measurements import table


def seconds_alone(version: Version, command: Sequence[str | Path], repeats: int) -> float:
    """Median seconds of a whole process."""
    return statistics.median(version.run(*command).seconds for _ in range(repeats))


def seconds_of_two(version: Version, commands: Sequence[Sequence[str | Path]], repeats: int) -> float:
    """Median seconds until two processes, started together, have both ended."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        processes = [version.start(*command) for command in commands]
        for process in processes:
            _, errors = process.communicate()
            if process.returncode:
                raise SystemExit(errors.decode(errors="replace").strip())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def rows_of(name: str, version: Version, folder: Path, options: argparse.Namespace) -> list[list[str]]:
    """Encode and decode of every size under the three circumstances."""
    rows = []
    for width, height in options.sizes:
        photo = folder / f"{width}x{height}.png"
        photo_of_size(width, height).save(photo)
        coded = [folder / f"{index}.pqm" for index in range(2)]
        how = ("-m", options.model, "-f")
        encode = [["encode", photo, "-o", file, *how] for file in coded]
        decode = [["decode", file, "-o", file.with_suffix(".png"), *how] for file in coded]
        for what, commands in (("encode", encode), ("decode", decode)):
            seconds_of_two(version, commands, 1)  # fills caches of files, and makes both files for decode
            alone = seconds_alone(version, commands[0], options.repeats)
            together = seconds_of_two(version, commands, options.repeats)
            with busy_loops(options.loops):
                busy = seconds_alone(version, commands[0], options.repeats)
            texts = [f"{value:.2f} s ({value / alone:.2f})" for value in (busy, together)]
            rows.append([name, f"{what} {width} x {height}", f"{alone:.2f} s", *texts])
            print(" | ".join(rows[-1]), flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Version.at, metavar="WHERE")
    parser.add_argument("-m", "--model", default="photo", help="model that both versions have")
    parser.add_argument("--sizes", type=size_of, nargs="+", default=[(384, 256), (768, 512)], metavar="WxH")
    parser.add_argument("--loops", type=int, default=2, help="busy loops [default: 2]")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)

    versions = {"this": PRESENT} if options.before is None else {"before": options.before, "this": PRESENT}
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for name, version in versions.items() for row in rows_of(name, version, Path(folder), options)]
    header = ["version", "command", "alone", f"beside {options.loops} busy loops (ratio)", "two at once (ratio)"]
    print("\n" + table(header, rows))


if __name__ == "__main__":
    main()
