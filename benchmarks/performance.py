"""Seconds per part of encode and decode, and the exact entropy model against its float32 form; for docs/performance.md.

    python benchmarks/performance.py [--image examples/photo.png] [--threads 1 2] [--megapixels 0.4 12]

"correction" is what the encoder takes to look at the decoded picture and to correct the latent.
Parts are timed by wrapping the methods that do them; the best of several runs counts, because other work on a machine
only ever adds time. Ratios come from runs that alternate.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pqmim import load_codec
from pqmim.bitstream import parse
from pqmim.codec import Codec, EncodeOptions
from pqmim.encoder import DEFAULT_EFFORT
from pqmim.range_coding import PRECISION, TokenReader, TokenWriter
from pqmim.training.entropy_model import EntropyModel


def timed(seconds: dict[str, float], part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, adding what it takes to `seconds[part]`."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[part] += time.perf_counter() - start

    return wrapper


def instrument(codec: Codec, seconds: dict[str, float]) -> None:
    """Wrap the parts of a codec; the range coder's classes are wrapped once for all."""
    model = codec._entropy_model
    for part, name in (("network", "hidden"), ("frequencies", "frequencies"), ("reveal", "reveal")):
        setattr(model, name, timed(seconds, part, getattr(model, name)))
    transforms = codec._transforms
    for part, name in (("analysis", "analyze"), ("correction", "correct"), ("synthesis", "synthesize")):
        setattr(transforms, name, timed(seconds, part, getattr(transforms, name)))
    # The reader hands what it read to a writer of its own: wrapping both would count that twice.
    TokenReader.code = timed(seconds, "range coder", TokenReader.code)  # type: ignore[method-assign]


def best_parts(run: Callable[[], object], seconds: dict[str, float], repeats: int) -> dict[str, float]:
    """Parts of the fastest of several runs, with "total" and what is left as "rest"."""
    best: dict[str, float] = {"total": float("inf")}
    for _ in range(repeats):
        seconds.clear()
        start = time.perf_counter()
        run()
        total = time.perf_counter() - start
        if total < best["total"]:
            best = {**seconds, "total": total, "rest": total - sum(seconds.values())}
    return best


def enlarge(image: Image.Image, megapixels: float) -> Image.Image:
    """Mirror-tile a photo to a size, so that the content stays that of a photo."""
    pixels = np.asarray(image.convert("RGB"))
    side = int((megapixels * 1e6 / (4 * 3)) ** 0.5)
    height, width = 3 * side, 4 * side
    repeat = (-(-height // pixels.shape[0]), -(-width // pixels.shape[1]))
    rows = [pixels if i % 2 == 0 else pixels[::-1] for i in range(repeat[0])]
    tall = np.concatenate(rows)
    columns = [tall if i % 2 == 0 else tall[:, ::-1] for i in range(repeat[1])]
    return Image.fromarray(np.ascontiguousarray(np.concatenate(columns, axis=1)[:height, :width]))


@torch.inference_mode()
def float_entropy_seconds(codec: Codec, tokens: torch.Tensor, level: int) -> float:
    """Entropy part of decoding in plain float32: same network, schedule and coder, softmax in place of the tables."""
    exact = codec._entropy_model
    quantizer = codec._tokenizer.quantizer
    model = EntropyModel.for_quantizer(exact.config, quantizer).eval()  # its speed does not depend on the weights
    _, height, width = tokens.shape
    known = torch.zeros(1, *tokens.shape, dtype=torch.bool)
    state = exact.start(height, width, level)
    levels = torch.tensor([level])
    writer = TokenWriter()
    start = time.perf_counter()
    for step in model.schedule.steps:
        positions = exact.positions(state, step)
        hidden = model.hidden(model.features(tokens[None], known, levels))[0].flatten(0, 1)[positions]
        probabilities = model.logits(hidden, levels.expand(len(hidden)), step.first, step.last).softmax(-1)
        frequencies = (probabilities * ((1 << PRECISION) - model.num_codewords)).floor_().to(torch.int32) + 1
        rest = (1 << PRECISION) - frequencies.sum(-1, keepdim=True, dtype=torch.int32)
        frequencies.scatter_add_(-1, probabilities.argmax(-1, keepdim=True), rest)
        sent = tokens[step.first : step.last].flatten(1)[:, positions].t().reshape(-1)
        writer.code(frequencies.reshape(-1, model.num_codewords).numpy(), sent.numpy())
        known.flatten(2)[0, step.first : step.last, positions] = True
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, default=Path(__file__).parents[1] / "examples" / "photo.png")
    parser.add_argument("--model", default="small")
    parser.add_argument("--quality", type=float, default=50.0)
    parser.add_argument("--effort", type=int, default=DEFAULT_EFFORT)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--megapixels", type=float, nargs="+", default=[0.4, 12.0])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)

    codec = load_codec(options.model, device="cpu")
    how = EncodeOptions(effort=options.effort)
    seconds: dict[str, float] = defaultdict(float)
    instrument(codec, seconds)
    photo = Image.open(options.image)
    parts = ("analysis", "correction", "network", "frequencies", "reveal", "range coder", "synthesis", "rest", "total")
    print("| pixels | threads | direction | " + " | ".join(parts) + " |")
    print("|---" * (3 + len(parts)) + "|")
    for megapixels in options.megapixels:
        image = photo if megapixels == 0.4 else enlarge(photo, megapixels)
        repeats = options.repeats if megapixels < 2 else 2
        for threads in options.threads:
            torch.set_num_threads(threads)
            data = codec.encode(image, quality=options.quality)
            runs: list[tuple[str, Callable[[], object]]] = [
                ("encode", lambda image=image: codec.encode(image, quality=options.quality, options=how)),
                ("decode", lambda data=data: codec.decode(data)),
            ]
            for direction, run in runs:
                best = best_parts(run, seconds, repeats)
                cells = " | ".join(f"{best[part]:.3f}" if part in best else "-" for part in parts)
                print(f"| {image.width} x {image.height} | {threads} | {direction} | {cells} |", flush=True)

    print("\n| threads | exact entropy part, s | float32, s | float32 / exact |\n|---|---|---|---|")
    data = codec.encode(photo, quality=options.quality)
    tokens = torch.from_numpy(codec.decode_tokens(data))
    for threads in options.threads:
        torch.set_num_threads(threads)
        exact, floating = [], []
        for _ in range(options.repeats):
            seconds.clear()
            codec.decode_tokens(data)
            exact.append(sum(seconds.values()))
            floating.append(float_entropy_seconds(codec, tokens, parse(data).level))
        print(f"| {threads} | {min(exact):.3f} | {min(floating):.3f} | {min(floating) / min(exact):.2f} |")


if __name__ == "__main__":
    main()
