"""Codebooks of one channel each: lattices whose alphabets are as long as each level needs.

Scalar quantization chosen with its rate is as good as product codebooks of several channels at every trade-off, and far
better at fine ones, where codewords run out (docs/experiments.md). A lattice has the spacing that belongs to w, the
mean of its values as codewords, and frequencies that were counted.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pqmim.alphabets import Alphabets
from pqmim.config import QuantizerConfig
from pqmim.training.trainable_quantizer import LOG2, TrainableQuantizer

SIZES = (1, 2, 3, 5, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 511)
"""Alphabets have one of these sizes and fall along the channels, so that many neighbors are alike and coded together.
A codeword too many costs next to nothing."""
OUTSIDE = 2e-4
"""Share of the values on either side that need no codeword of their own."""
WIDER = 1.08
"""Where values are chosen with their rate, a wider lattice is better, at all trade-offs by about as much."""
START, END = 2.0, 1.12
"""Finest w that a level applies, below the w that it was made for, and coarsest w above it; in logarithms, in distances
between levels. There the curves of rate and distortion of neighboring levels cross, at all rates about the same way."""
ITERATIONS = 4
FEW = 5
"""A codeword that is used less often stays in its place."""
NUM_POINTS = 4096
"""Most different values of a channel that are looked at."""


def spacing(w: float) -> float:
    """Spacing (latent units) of the lattice for a trade-off: that whose slope at high resolution is that of w (uniform
    noise of spacing^2 / 12 halves by half a bit, so w = (ln 2 / 6) spacing^2), and a little more."""
    return WIDER * math.sqrt(6 / LOG2 * w)


def order_channels(values: Tensor, step: float, count: int) -> Tensor:
    """The `count` channels that cost most when rounded to multiples of a step, most costly first: (count,) int64.

    Args:
        values: (n, D) float32.
    """
    rates = []
    for column in (values / step).round().long().t():
        share = torch.bincount(column - column.min()).float() / len(column)
        share = share[share > 0]
        rates.append(-(share * share.log2()).sum())
    return torch.stack(rates).argsort(descending=True, stable=True)[:count]


class Histogram:
    """Values of a channel, those nearly the same put together.

    Args:
        values: (n,) float32.

    Attributes:
        points: (P,) float32, ascending, means of the values that were put together.
        counts: (P,) float32, how many they are.
    """

    def __init__(self, values: Tensor) -> None:
        low, high = values.min(), values.max()
        places = ((values - low) / (high - low).clamp_min(1e-9) * (NUM_POINTS - 1)).round().long()
        counts = torch.bincount(places, minlength=NUM_POINTS).float()
        sums = torch.zeros(NUM_POINTS, dtype=torch.float64).index_add_(0, places, values.double())
        self.points = (sums[counts > 0] / counts[counts > 0]).float()
        self.counts = counts[counts > 0]

    def mean(self, values: Tensor) -> float:
        """Mean of something known at each point."""
        return float((values.double() * self.counts).sum() / self.counts.sum())

    def quantile(self, share: float) -> float:
        """The value that a share of all is below."""
        below = self.counts.cumsum(0) / self.counts.sum()
        return float(self.points[int((below < share).sum())])

    def lattice(self, w: float, first: int, size: int) -> tuple[Tensor, Tensor, float]:
        """Fit a lattice by entropy-constrained Lloyd iterations (Chou, Lookabaugh and Gray 1989).

        Args:
            w: squared units per bit.
            first: the lowest codeword, in spacings.
            size: K, codewords.

        Returns:
            Codewords (K,), ascending; their probabilities (K,), none of them zero; squared error + w * bits.
        """
        codewords, bits = (torch.arange(size) + first) * spacing(w), torch.zeros(size)
        for _ in range(ITERATIONS):
            costs = (self.points[:, None] - codewords).square_().add_(bits, alpha=w)
            least, tokens = costs.min(1)
            counts = torch.zeros(size).index_add_(0, tokens, self.counts)
            sums = torch.zeros(size).index_add_(0, tokens, self.counts * self.points)
            codewords = torch.where(counts > FEW, sums / counts.clamp_min(1), codewords)
            probabilities = (counts + 0.1) / (counts + 0.1).sum()
            bits = -torch.log2(probabilities)
        return codewords, probabilities, self.mean(least)

    def lattice_bounds(self, w: float, config: QuantizerConfig) -> tuple[int, int]:
        """The lowest codeword (in spacings) and the number of codewords that are needed at a trade-off; 1 if telling
        values apart gains less than it costs."""
        step, half = spacing(w), (config.num_codewords - 1) // 2
        low, high = (round(self.quantile(share) / step) for share in (OUTSIDE, 1 - OUTSIDE))
        low, high = max(low, -half), min(high, half)
        if high <= low:
            return 0, 1
        variance = self.mean((self.points - self.mean(self.points)).square())
        cost = self.lattice(w, low, high - low + 1)[2] + w * config.min_channel_rate
        return (low, high - low + 1) if cost < variance else (0, 1)


@torch.no_grad()
def fit_quantizer(values: Tensor, log_w: Tensor, config: QuantizerConfig) -> TrainableQuantizer:
    """Order the channels of a latent and fit a lattice to each at each level.

    Args:
        values: (n, D) float32, latents of training crops.
        log_w: (L,) float32, in equal distances, natural logarithm of the w that each level is made for, finest first.
    """
    order = order_channels(values, spacing(math.exp(log_w[0])), config.num_subquantizers)
    histograms = [Histogram(values[:, channel]) for channel in order.tolist()]
    bounds = np.array(
        [[histogram.lattice_bounds(w, config) for histogram in histograms] for w in log_w.exp().tolist()]
    )  # (L, M, 2)
    needed = np.maximum.accumulate(bounds[:, ::-1, 1], axis=1)[:, ::-1]
    ladder = np.array([size for size in SIZES if size < config.num_codewords] + [config.num_codewords])
    sizes = ladder[np.searchsorted(ladder, needed)]
    alphabets = Alphabets(sizes, np.ones(len(order), np.int64))
    quantizer = TrainableQuantizer(values.shape[1], config, alphabets)
    quantizer.order.copy_(order)
    gap = float(log_w.diff().mean()) if len(log_w) > 1 else 1.0
    quantizer.level_range.copy_(torch.stack([log_w - START * gap, log_w + END * gap], dim=1))
    quantizer.default.copy_(values.mean(0))
    for level, w in enumerate(log_w.exp().tolist()):
        for m, histogram in enumerate(histograms):
            size, start = int(sizes[level, m]), int(alphabets.starts[level, m])
            first = int(bounds[level, m, 0]) - (size - int(bounds[level, m, 1])) // 2
            if size == 1:
                quantizer.codebook[start] = quantizer.default[order[m]]
                continue
            codewords, probabilities, _ = histogram.lattice(w, first, size)
            quantizer.codebook[start : start + size] = codewords
            quantizer.prior_logits[start : start + size] = probabilities.log()
    return quantizer
