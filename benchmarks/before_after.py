"""Two versions of the package side by side: seconds, memory, bytes.

    python benchmarks/before_after.py --before WHERE [--sizes 256x256 768x512 4000x3000] [--threads 1 2] [--busy 2]
    python benchmarks/before_after.py --before WHERE --same-bytes PHOTOS -o OUT

WHERE is a folder that holds another version of the package, or a Python executable that has one installed.

The first form runs the command line of both versions in turn, as whole processes on one core and on two: encode at
every effort, decode, and what takes hardly any work (`pqmim --version`, `pqmim info`). Ratios are before / after of the
fastest runs: other work on a machine only ever adds time.

The second encodes every photo at three qualities and three efforts with both and compares the files. Where they differ,
both are decoded by this checkout, and sizes and PSNR are compared. OUT keeps the files; run again, it continues.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
from commands import MIB, PRESENT, Usage, Version, alternate, busy_loops, cores
from example import photo_of_size, size_of
from measurements import table

from pqmim.codec import load_codec
from pqmim.evaluation.dataset import find_images
from pqmim.evaluation.pixel_metrics import psnr_rgb
from pqmim.image_io import load_picture

EFFORTS = (1, 2, 3)
ENCODE_ALL = """
import json, pathlib, sys
import pqmim
if "float32" in sys.argv:
    import pqmim.tiled_transforms
    pqmim.tiled_transforms.has_fast_bf16 = lambda device: False
codec = pqmim.load_codec(*sys.argv[1].split(","), device="cpu")
for source, target, quality, effort in json.load(sys.stdin):
    data = codec.encode(source, quality=quality, options=pqmim.EncodeOptions(effort=effort))
    pathlib.Path(target).write_bytes(data)
    print(target, file=sys.stderr)
"""
"""Program that both versions understand."""


def model_options(options: argparse.Namespace, option: str, *, is_before: bool) -> list[str]:
    """Model and decoder as options of a command; `option` names the decoder."""
    if is_before and options.before_model:
        return ["-m", options.before_model]
    return ["-m", options.model, *([option, options.decoder] if options.decoder else [])]


def model_arguments(options: argparse.Namespace, *, is_before: bool) -> str:
    """The same for the program above."""
    if is_before and options.before_model:
        return str(options.before_model)
    return ",".join(filter(None, (options.model, options.decoder)))


def row(name: str, threads: int, usages: Sequence[Sequence[Usage]]) -> list[str]:
    """A line of the table of times."""
    fastest = [min(usage.seconds for usage in of) for of in usages]
    medians = [statistics.median(usage.seconds for usage in of) for of in usages]
    peaks = [max(usage.peak_bytes for usage in of) for of in usages]
    seconds = [f"{least:.3f} / {median:.3f}" for least, median in zip(fastest, medians, strict=True)]
    memory = [f"{peak / MIB:.0f}" for peak in peaks]
    return [
        *(name, str(threads), *seconds, f"{fastest[0] / fastest[1]:.2f}"),
        *(*memory, f"{peaks[0] / peaks[1]:.2f}"),
    ]


def measure_times(versions: Sequence[Version], options: argparse.Namespace) -> str:
    """Table of seconds and memory."""
    lines: list[list[str]] = []

    def add(name: str, commands: Sequence[Sequence[str | Path]], repeats: int = options.repeats) -> None:
        lines.append(row(name, threads, alternate(versions, commands, repeats)))
        print(" | ".join(lines[-1]), flush=True)

    how_encoded = [model_options(options, "--for", is_before=before) for before in (True, False)]
    how_decoded = [model_options(options, "--decoder", is_before=before) for before in (True, False)]
    with tempfile.TemporaryDirectory() as folder, busy_loops(options.busy):
        for threads in options.threads:
            with cores(threads):
                add("--version", [["--version"]] * 2)
                for width, height in options.sizes:
                    photo, decoded = Path(folder, "photo.png"), Path(folder, "decoded.png")
                    photo_of_size(width, height).save(photo, compress_level=1)
                    coded = [Path(folder, f"{index}.pqm") for index in range(2)]
                    size, repeats = f"{width} x {height}", options.repeats if width * height < 2e6 else 2
                    for effort in options.efforts:
                        how = ("-q", f"{options.quality:g}", "--effort", str(effort), "-f")
                        commands = [
                            ["encode", photo, "-o", file, *model, *how]
                            for file, model in zip(coded, how_encoded, strict=True)
                        ]
                        add(f"encode {size}, effort {effort}", commands, repeats)
                    # Each decodes its own file, since the format may have changed.
                    commands = [
                        ["decode", file, "-o", decoded, *how, "-f"]
                        for file, how in zip(coded, how_decoded, strict=True)
                    ]
                    add(f"decode {size}", commands, repeats)
                add("info", [["info", file] for file in coded])
    header = ["command", "cores", "before, s (min / median)", "after, s", "before / after"]
    return table([*header, "before, MiB", "after, MiB", "before / after"], lines)


def compare_bytes(versions: Sequence[Version], options: argparse.Namespace) -> str:
    """Encode all photos with both versions; a summary, and a table of the files that differ."""
    images = dict(list(find_images(options.same_bytes).items())[: options.images])
    points = list(product(images, options.qualities, options.efforts))
    files: list[list[Path]] = []
    for name, version in zip(("before", "after"), versions, strict=True):
        folder = options.output / name
        folder.mkdir(parents=True, exist_ok=True)
        files.append([folder / f"{Path(i).stem}-q{quality:g}-e{effort}.pqm" for i, quality, effort in points])
        tasks = [
            (str(images[image]), str(file), quality, effort)
            for (image, quality, effort), file in zip(points, files[-1], strict=True)
            if not file.exists()
        ]
        command = [version.python, "-c", ENCODE_ALL, model_arguments(options, is_before=name == "before")]
        if name == "before" and options.before_float32:
            command.append("float32")
        subprocess.run(command, input=json.dumps(tasks).encode(), env=version.environment(), check=True)

    codec, lines, ratios, gains = load_codec(options.model, options.decoder, device="cpu"), [], [], []
    for (image, quality, effort), *pair in zip(points, *files, strict=True):
        before, after = (file.read_bytes() for file in pair)
        if before != after:
            original = load_picture(images[image]).rgb
            psnr = [psnr_rgb(original, np.asarray(codec.decode(data).convert("RGB"))) for data in (before, after)]
            ratios.append(len(after) / len(before) - 1)
            gains.append(psnr[1] - psnr[0])
            sizes = [f"{len(before):,}", f"{len(after):,}", f"{ratios[-1]:+.3%}"]
            lines.append([image, f"{quality:g}", str(effort), *sizes, f"{psnr[0]:.3f}", f"{gains[-1]:+.4f}"])
    text = f"{len(points) - len(lines)} of {len(points)} files have the same bytes.\n"
    if lines:
        text += (
            f"Of the others the size differs by {min(ratios):+.3%} to {max(ratios):+.3%}, mean {np.mean(ratios):+.4%}; "
            f"PSNR by {min(gains):+.4f} to {max(gains):+.4f} dB, mean {np.mean(gains):+.5f}.\n\n"
        )
        header = ["image", "quality", "effort", "before, bytes", "after", "size", "before, dB", "PSNR"]
        text += table(header, lines)
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table; write it too if there is an OUT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Version.at, required=True, metavar="WHERE")
    parser.add_argument("--after", type=Version.at, default=PRESENT, metavar="WHERE", help="default: this checkout")
    parser.add_argument("-m", "--model", default="photo", help="token model")
    parser.add_argument("--decoder", help="name or path [default: fine]")
    parser.add_argument("--before-model", help="of the earlier version, in place of token model and decoder")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT", help="folder for files and tables")
    parser.add_argument("--efforts", type=int, nargs="+", default=EFFORTS)
    times = parser.add_argument_group("times")
    times.add_argument("--sizes", type=size_of, nargs="+", default=[(256, 256), (768, 512)], metavar="WxH")
    times.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="cores that a process may use")
    times.add_argument("--repeats", type=int, default=7, help="of each command; two at 2 megapixels and more")
    times.add_argument("--quality", type=float, default=50.0)
    times.add_argument("--busy", type=int, default=0, metavar="N", help="busy loops beside it")
    same = parser.add_argument_group("bytes")
    same.add_argument("--same-bytes", type=Path, metavar="PHOTOS", help="compare files, not times")
    same.add_argument("--qualities", type=float, nargs="+", default=[25.0, 50.0, 75.0])
    same.add_argument(
        "--before-float32",
        action="store_true",
        help="versions before 0.3 make corrections in bfloat16 where that is fast: have them made in float32",
    )
    same.add_argument("--images", type=int, metavar="N", help="only the first N photos")
    options = parser.parse_args(arguments)
    if options.same_bytes is not None and options.output is None:
        parser.error("--same-bytes needs -o OUT")

    versions = (options.before, options.after)
    is_times = options.same_bytes is None
    text = measure_times(versions, options) if is_times else compare_bytes(versions, options)
    print(text)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / f"{'times' if is_times else 'bytes'}.md").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
