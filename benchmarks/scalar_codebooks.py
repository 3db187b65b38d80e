"""Product codebooks against scalar lattices on the latents of trained transforms, at the same trade-offs.

    python benchmarks/scalar_codebooks.py --data PHOTOS --tokenizer src/pqmim/weights/photo/fast.safetensors \
        [--w 0.0375 0.12 0.4 1.3 4 13] [--books 80x96 128x192] [--crops 600]

Codebooks and lattices are fitted to crops of training photos and judged on held-out ones: bits per pixel under static
frequencies, squared error of the latent per position, and their sum at the trade-off w, bpp + error / (256 w), the
only number that says which one is better. Lattices are those of training, one for each channel, as long as w asks for.
Product codebooks are of runs of channels with about equal rate, fitted by Lloyd iterations for vectors.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from pqmim.alphabets import MAX_CODEWORDS
from pqmim.config import QuantizerConfig
from pqmim.training.checkpoints import load_tokenizer
from pqmim.training.codebook_fitting import fit_quantizer, spacing
from pqmim.training.data import STAGE_STEPS
from pqmim.training.recipes import DataConfig, RunConfig
from pqmim.training.tokenizer import Tokenizer
from pqmim.training.training_run import TrainingRun, open_photos

PIXELS = 256
"""Of a position."""
BATCH = 8
ITERATIONS = 6
ROWS = 512
"""Positions whose tokens are chosen at a time."""


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


def lattices(training: Tensor, held_out: Tensor, w: float) -> tuple[float, float]:
    """Bits and squared error per position of a lattice in every channel."""
    sizes = QuantizerConfig(training.shape[1], MAX_CODEWORDS, num_levels=1)
    quantizer = fit_quantizer(training, torch.tensor([math.log(w)]), sizes)
    total_bits = total_error = 0.0
    level = torch.tensor([0])
    with torch.no_grad():
        for part in held_out.split(ROWS):
            z = part.t()[None, :, None]  # (1, D, 1, n)
            tokens = quantizer.assign(z, w, level)
            total_bits += float(quantizer.static_bits(tokens, level))
            total_error += float((quantizer.dequantize(tokens, level) - z).square().sum())
    return total_bits / len(held_out), total_error / len(held_out)


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
        codewords, probabilities = fit_codebook(training[:, columns], k, w, generator)
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


def equal_runs(bits: Tensor, num_subquantizers: int, min_rate: float) -> tuple[Tensor, list[int]]:
    """Order channels by rate and cut the list into runs of about equal rate.

    Args:
        bits: (D,) float32, mean bits per position of each channel.
        num_subquantizers: M, number of runs.
        min_rate: channels below this many bits are left out, as long as M channels remain.

    Returns:
        Channels in order, most costly first (D',) int64; M + 1 boundaries into it.
    """
    order = bits.argsort(descending=True, stable=True)
    num_kept = max(num_subquantizers, int((bits > min_rate).sum()))
    order = order[:num_kept]
    rates = bits[order].double().tolist()
    boundaries = [0]
    remaining = sum(rates)
    for m in range(num_subquantizers):
        runs_left = num_subquantizers - m
        start = boundaries[-1]
        share, end, taken = remaining / runs_left, start, 0.0
        while end < num_kept - (runs_left - 1) and (end == start or taken + 0.5 * rates[end] < share):
            taken += rates[end]
            end += 1
        if runs_left == 1:
            end = num_kept
        remaining -= taken
        boundaries.append(end)
    return order, boundaries


def fit_codebook(values: Tensor, num_codewords: int, w: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Entropy-constrained Lloyd iterations for vectors (Chou, Lookabaugh and Gray 1989).

    Args:
        values: (n, d) float32 training vectors.
        w: squared units per bit.

    Returns:
        Codewords (K, d) and their probabilities (K,), none of them zero.
    """
    codewords = _initial_codewords(values, num_codewords, w, generator)
    probabilities = torch.full((num_codewords,), 1 / num_codewords)
    for iteration in range(ITERATIONS):
        distances = torch.addmm(codewords.square().sum(1)[None], values, codewords.t(), alpha=-2)
        costs, tokens = (distances - w * torch.log2(probabilities)).min(dim=1)
        usage = torch.bincount(tokens, minlength=num_codewords).float()
        sums = torch.zeros_like(codewords).index_add_(0, tokens, values)
        codewords = torch.where(usage[:, None] > 0, sums / usage[:, None].clamp_min(1), codewords)
        probabilities = (usage + 0.1) / (usage + 0.1).sum()
        unused = (usage == 0).nonzero()[:, 0]
        if len(unused) and iteration < ITERATIONS - 2:  # restart them where the cost is high
            errors = (costs + values.square().sum(1)).clamp_min(1e-9)
            codewords[unused] = values[_draw(errors, len(unused), generator)]
    return codewords, probabilities


def _initial_codewords(values: Tensor, num_codewords: int, w: float, generator: torch.Generator) -> Tensor:
    """The fullest cells of a cubic lattice, and vectors far from all of them: (K, d).

    Entropy-constrained cells are of nearly equal size, dense and sparse regions alike, so a lattice with the spacing
    that belongs to w is a far better start than a random sample, which crowds into the center.
    """
    step = spacing(w)
    cells, counts = torch.unique((values / step).round(), dim=0, return_counts=True)
    if len(cells) > num_codewords:
        cells = cells[counts.argsort(descending=True, stable=True)[: 3 * num_codewords // 4]]
    codewords = cells * step
    distances = torch.addmm(codewords.square().sum(1)[None], values, codewords.t(), alpha=-2).amin(1)
    errors = (distances + values.square().sum(1)).clamp_min(1e-9)
    return torch.cat([codewords, values[_draw(errors, num_codewords - len(codewords), generator)]])


def _draw(chances: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` different indices, (count,) int64, drawn in proportion to `chances`."""
    if count == 0:
        return torch.empty(0, dtype=torch.int64)
    population = min(len(chances), 1 << 20)  # multinomial has a limit
    return torch.multinomial(chances[:population], min(count, population), generator=generator)


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
        rows = {"lattices": lattices(training, held_out, w)}
        for book in options.books:
            m, k = (int(part) for part in book.split("x"))
            rows[f"M = {m}, K = {k}"] = product(training, held_out, w, equal_runs(bits, m, 0.002), k)
        for name, (rate, error) in rows.items():
            bpp = rate / PIXELS
            print(f"| {w:g} | {name} | {bpp:.4f} | {error:.1f} | {bpp + error / (PIXELS * w):.4f} |", flush=True)


if __name__ == "__main__":
    main()
