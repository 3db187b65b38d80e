"""Seconds and peak memory of encoding and decoding one large photo.

    python benchmarks/large_image.py [--size 4000x3000] [--decoder fine] [--threads N] [--json FILE]

The photo of the repository is mirrored at its edges until it has the size asked for. Encoding and decoding
run in a process of their own each, so that the peak of one does not hide that of the other; the peak is of
the whole process, Python and its libraries included. Linux and macOS only (it needs the module `resource`).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from example import PHOTO, photo_of_size, size_of

MIB = 1 << 20


def measure(
    command: str, source: Path, target: Path, decoder: str, quality: float, threads: int | None
) -> dict[str, float]:
    """Encode or decode one file in this process.

    Returns:
        "load_seconds" of the model, "seconds" of the work from file to file, "peak_bytes" of the process.
    """
    import pqmim

    start = time.perf_counter()
    codec = pqmim.load_codec(decoder=decoder, device="cpu", threads=threads)
    loaded = time.perf_counter()
    if command == "encode":
        target.write_bytes(codec.encode(source, quality=quality))
    else:
        codec.decode(source.read_bytes()).save(target)
    done = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform != "darwin":
        peak *= 1024  # Linux counts KiB, macOS bytes
    return {"load_seconds": loaded - start, "seconds": done - loaded, "peak_bytes": peak}


def measure_in_child(options: argparse.Namespace, command: str, source: Path, target: Path) -> dict[str, float]:
    """Run `measure` in a process of its own."""
    arguments = [command, str(source), str(target), options.decoder, str(options.quality), str(options.threads)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # as the command line has it
    child = subprocess.run(
        [sys.executable, __file__, "--child", *arguments], env=environment, stdout=subprocess.PIPE, check=True
    )
    figures: dict[str, float] = json.loads(child.stdout)
    return figures


def main() -> None:
    """Print a table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description="Seconds and peak memory of one large photo.")
    parser.add_argument("--photo", type=Path, default=PHOTO)
    parser.add_argument("--size", type=size_of, default=(4000, 3000), metavar="WxH", help="pixels [default: 4000x3000]")
    parser.add_argument("--decoder", default="fine")
    parser.add_argument("--quality", type=float, default=50.0)
    parser.add_argument("--threads", type=int, default=0, help="0 = as many as the codec takes by itself [default]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file too")
    options = parser.parse_args()
    width, height = options.size

    with tempfile.TemporaryDirectory() as folder:
        source, coded, decoded = (Path(folder, name) for name in ("photo.ppm", "photo.pqm", "decoded.ppm"))
        photo_of_size(width, height, options.photo).save(source)  # not compressed: only the codec is timed
        report: dict[str, Any] = {"width": width, "height": height, "threads": options.threads}
        report["encode"] = measure_in_child(options, "encode", source, coded)
        report["decode"] = measure_in_child(options, "decode", coded, decoded)
        report["bytes"] = coded.stat().st_size
    bpp = 8 * report["bytes"] / (width * height)
    print(f"{width} x {height}, {width * height / 1e6:.1f} megapixels, {report['bytes']:,} B, {bpp:.3f} bpp")
    for command in ("encode", "decode"):
        figures = report[command]
        print(
            f"{command}  {figures['seconds']:7.2f} s  peak memory {figures['peak_bytes'] / MIB:,.0f} MiB"
            f"  (loading the model {figures['load_seconds']:.2f} s)"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        name, source_name, target_name, decoder_name, quality_text, count = sys.argv[2:]
        result = measure(
            name, Path(source_name), Path(target_name), decoder_name, float(quality_text), int(count) or None
        )
        print(json.dumps(result))
    else:
        main()
