"""Product codebooks against scalar lattices on the latents of trained transforms, at the same trade-offs.

    python benchmarks/scalar_codebooks.py --data PHOTOS --tokenizer checkpoints/transforms-384.safetensors \
        [--w 0.0375 0.12 0.4 1.3 4 13] [--books 80x96 128x192] [--crops 600]

Codebooks and lattices are fitted to crops of training photos and judged on held-out ones: bits per pixel under static
frequencies, squared error of the latent per position, and their sum at the trade-off w, bpp + error / (256 w), the
only number that says which one is better. A lattice has one unlimited alphabet for each channel, the spacing that
belongs to w, and its means for values; values are chosen with their rate, like codewords.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from pqmim.training.checkpoints import load_tokenizer
from pqmim.training.data import STAGE_STEPS
from pqmim.training.recipes import DataConfig, RunConfig
from pqmim.training.tokenizer import Tokenizer
from pqmim.training.trainable_quantizer import LOG2, fit_codebook, order_channels
from pqmim.training.training_run import TrainingRun, open_photos

PIXELS = 256
"""Of a position."""
BATCH = 8
ITERATIONS = 6
HALF = 1024
"""Values of a lattice on either side of zero."""


def latents(tokenizer: Tokenizer, data: DataConfig, crops: int) -> tuple[Tensor, Tensor]:
    """Latents of training crops and of the held-out ones, (n, D) each."""
    with tempfile.TemporaryDirectory() as folder:
        run = TrainingRun.open(RunConfig(output=Path(folder), device="cpu"), None)
        photos = open_photos(run, data)
        batches = [photos.sampler.batch(STAGE_STEPS + index, BATCH) for index in range(-(-crops // BATCH))]
        found = []
        for images in (batches, photos.held_out.split(BATCH)):
            with torch.no_grad(), run.autocast():
                rows = [tokenizer.analysis(x).permute(0, 2, 3, 1).flatten(0, 2) for x in images]
            found.append(torch.cat(rows).float())
    return found[0], found[1]


def spacing(w: float) -> float:
    """Lattice spacing whose slope at high resolution is that of w."""
    return math.sqrt(6 / LOG2 * w)


def lattice(training: Tensor, held_out: Tensor, w: float) -> tuple[float, float]:
    """Bits and squared error per position of a lattice in every channel."""
    step = spacing(w)
    total_bits = total_error = 0.0
    for values, judged in zip(training.t(), held_out.t(), strict=True):
        index = (values / step).round().long().clamp(-HALF, HALF) + HALF
        points = (torch.arange(2 * HALF + 1) - HALF) * step
        for _ in range(2):  # frequencies and means of a choice without, then with rate
            counts = torch.bincount(index, minlength=2 * HALF + 1).float()
            sums = torch.zeros_like(points).index_add_(0, index, values)
            points = torch.where(counts > 5, sums / counts.clamp_min(1), points)
            bits = -torch.log2((counts + 0.01) / (counts + 0.01).sum())
            index = choose(values, points, bits, w, step)
        index = choose(judged, points, bits, w, step)
        total_bits += float(bits[index].mean())
        total_error += float((judged - points[index]).square().mean())
    return total_bits, total_error


def choose(values: Tensor, points: Tensor, bits: Tensor, w: float, step: float) -> Tensor:
    """Cheapest of the two values around, the one nearer to zero, and zero: (n,) int64."""
    below = torch.floor(values / step)
    candidates = torch.stack([below, below + 1, below - below.sign(), torch.zeros_like(below)], 1)
    indices = candidates.long().clamp(-HALF, HALF) + HALF
    costs = (values[:, None] - points[indices]).square() + w * bits[indices]
    return indices.gather(1, costs.argmin(1, keepdim=True))[:, 0]


def product(
    training: Tensor, held_out: Tensor, w: float, runs: tuple[Tensor, list[int]], k: int
) -> tuple[float, float]:
    """Bits and squared error per position of a product quantizer over runs of channels."""
    order, boundaries = runs
    dropped = torch.ones(training.shape[1], dtype=torch.bool)
    dropped[order] = False
    total_error = float((held_out - training.mean(0))[:, dropped].square().sum(1).mean())
    total_bits = 0.0
    for first, last in pairwise(boundaries):
        columns = order[first:last]
        generator = torch.Generator().manual_seed(0)
        codewords, probabilities = fit_codebook(training[:, columns], k, w, ITERATIONS, generator)
        judged, bits = held_out[:, columns], -torch.log2(probabilities)
        distances = torch.addmm(codewords.square().sum(1)[None], judged, codewords.t(), alpha=-2)
        tokens = (distances + w * bits).argmin(1)
        total_bits += float(bits[tokens].mean())
        total_error += float((judged - codewords[tokens]).square().sum(1).mean())
    return total_bits, total_error


def entropies(values: Tensor, step: float) -> Tensor:
    """Bits of each channel rounded to multiples of a step, (D,)."""
    found = []
    for column in (values / step).round().long().t():
        share = torch.bincount(column - column.min()).float() / len(column)
        share = share[share > 0]
        found.append(-(share * share.log2()).sum())
    return torch.stack(found)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--w", type=float, nargs="+", default=[0.0375, 0.12, 0.4, 1.3, 4, 13])
    parser.add_argument("--books", nargs="+", default=["80x96", "128x192"], metavar="MxK")
    parser.add_argument("--crops", type=int, default=600)
    options = parser.parse_args()
    tokenizer, _ = load_tokenizer(options.tokenizer)
    data = DataConfig(path=options.data, crop=192, min_scale=0.45)
    training, held_out = latents(tokenizer, data, options.crops)
    bits = entropies(training, spacing(min(options.w)))
    print("| w | quantizer | bpp | squared error | bpp + error / (256 w) |\n|---|---|---|---|---|")
    for w in options.w:
        rows = {"lattices": lattice(training, held_out, w)}
        for book in options.books:
            m, k = (int(part) for part in book.split("x"))
            rows[f"M = {m}, K = {k}"] = product(training, held_out, w, order_channels(bits, m, 0.002), k)
        for name, (rate, error) in rows.items():
            bpp = rate / PIXELS
            print(f"| {w:g} | {name} | {bpp:.4f} | {error:.1f} | {bpp + error / (PIXELS * w):.4f} |", flush=True)


if __name__ == "__main__":
    main()
