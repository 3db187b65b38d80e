"""Seconds per part of encode and decode, and the entropy model by kernel; for docs/performance.md.

    python benchmarks/performance.py [--image examples/photo.png] [--threads 1 2] [--megapixels 0.4 12]

"correction" is what the encoder takes to look at the decoded picture and to correct the latent, "choice" is what it
takes to choose tokens. Parts are timed by wrapping the methods that do them, in the thread that waits for them; the
best of several runs counts, because other work on a machine only ever adds time. Kernels alternate.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from example import PHOTO, photo_of_size
from PIL import Image

from pqmim import load_codec
from pqmim.codec import Codec
from pqmim.entropy_kernels import exact_kernels
from pqmim.model_files import find_model, load_model
from pqmim.options import DEFAULT_EFFORT, EncodeOptions
from pqmim.range_coding import TokenReader
from pqmim.token_coding import RateDistortionChoice

PARTS = ("analysis", "correction", "choice", "network", "frequencies", "range coder", "synthesis")
ENTROPY_PARTS = ("network", "frequencies", "range coder")
Seconds = dict[str, float]


def timed(seconds: Seconds, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, adding what it takes to `seconds[part]`; of a generator, what each item takes."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            result = function(*args, **kwargs)
        finally:
            seconds[part] += time.perf_counter() - start
        return items(result) if isinstance(result, Iterator) else result

    def items(iterator: Iterator[Any]) -> Iterator[Any]:
        fetch = timed(seconds, part, lambda: next(iterator, None))
        while (item := fetch()) is not None:
            yield item

    return wrapper


def instrument(codec: Codec, seconds: Seconds) -> None:
    """Wrap the parts of a codec."""
    networks = codec._networks
    for owner, names in (
        (
            networks.entropy_model,
            {"head": "network", "reveal": "network", "frequency_blocks": "frequencies"},
        ),
        (networks.transforms, {"analyze": "analysis", "correct": "correction", "synthesize": "synthesis"}),
        (networks.quantizer, {"assign": "choice"}),
    ):
        for name, part in names.items():
            setattr(owner, name, timed(seconds, part, getattr(owner, name)))


def instrument_classes(seconds: Seconds) -> None:
    """Wrap what codecs make anew for each picture, once for all."""
    RateDistortionChoice.__call__ = timed(seconds, "choice", RateDistortionChoice.__call__)  # type: ignore[method-assign]
    # The reader hands what it read to a writer of its own: wrapping both would count that twice.
    TokenReader.code = timed(seconds, "range coder", TokenReader.code)  # type: ignore[method-assign]


def best_parts(run: Callable[[], object], seconds: Seconds, repeats: int) -> Seconds:
    """Parts of the fastest of several runs, with "total" and what is left as "rest"."""
    best: Seconds = {"total": float("inf")}
    for _ in range(repeats):
        seconds.clear()
        start = time.perf_counter()
        run()
        total = time.perf_counter() - start
        if total < best["total"]:
            best = {**seconds, "total": total, "rest": total - sum(seconds.values())}
    return best


def print_parts(options: argparse.Namespace, photo: Image.Image, seconds: Seconds) -> None:
    """Table of encode and decode at every size and number of threads."""
    how = EncodeOptions(effort=options.effort)
    columns = (*PARTS, "rest", "total")
    print("| pixels | threads | direction | " + " | ".join(columns) + " |")
    print("|---" * (3 + len(columns)) + "|")
    for megapixels in options.megapixels:
        side = int((megapixels * 1e6 / (4 * 3)) ** 0.5)
        image = photo if megapixels == 0.4 else photo_of_size(4 * side, 3 * side, options.image)
        repeats = options.repeats if megapixels < 2 else 2
        for threads in options.threads:
            codec = load_codec(options.model, options.decoder, device="cpu", threads=threads)
            instrument(codec, seconds)
            data = codec.encode(image, quality=options.quality, options=how)  # the first one makes the sessions
            codec.decode(data)
            runs: list[tuple[str, Callable[[], object]]] = [
                ("encode", lambda: codec.encode(image, quality=options.quality, options=how)),  # noqa: B023
                ("decode", lambda: codec.decode(data)),  # noqa: B023
            ]
            for direction, run in runs:
                best = best_parts(run, seconds, repeats)
                cells = " | ".join(f"{best[part]:.3f}" if part in best else "-" for part in columns)
                print(f"| {image.width} x {image.height} | {threads} | {direction} | {cells} |", flush=True)


def print_kernels(options: argparse.Namespace, photo: Image.Image, seconds: Seconds) -> None:
    """Table of the entropy model's part of decoding by every kernel that is exact here."""
    kernels = exact_kernels(load_model(find_model(options.model)))
    print("\n| threads | " + " | ".join(f"{kernel}, s" for kernel in kernels) + " |")
    print("|---" * (1 + len(kernels)) + "|")
    for threads in options.threads:
        codecs = [
            load_codec(options.model, options.decoder, device="cpu", threads=threads, kernel=kernel)
            for kernel in kernels
        ]
        for codec in codecs:
            instrument(codec, seconds)
        data = codecs[0].encode(photo, quality=options.quality)
        best = [float("inf")] * len(codecs)
        for _ in range(options.repeats):
            for index, codec in enumerate(codecs):
                seconds.clear()
                codec.decode_tokens(data)
                best[index] = min(best[index], sum(seconds[part] for part in ENTROPY_PARTS))
        print(f"| {threads} | " + " | ".join(f"{value:.3f}" for value in best) + " |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, default=PHOTO)
    parser.add_argument("--model", default="photo")
    parser.add_argument("--decoder", help="name or path [default: fine]")
    parser.add_argument("--quality", type=float, default=50.0)
    parser.add_argument("--effort", type=int, default=DEFAULT_EFFORT)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--megapixels", type=float, nargs="+", default=[0.4, 12.0])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)

    seconds: Seconds = defaultdict(float)
    instrument_classes(seconds)
    with Image.open(options.image) as opened:
        photo = opened.convert("RGB")
    print_parts(options, photo, seconds)
    print_kernels(options, photo, seconds)


if __name__ == "__main__":
    main()
