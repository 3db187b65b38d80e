"""Kernel distance between the originals of a data set and what a codec makes of them, with an interval.

The distance (KID where the features are Inception's) is the squared maximum mean discrepancy under the kernel
(x . y / d + 1)^3. Unlike FID it has no bias that grows as sets get small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
INTERVAL = (2.5, 97.5)  # percentiles


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % bootstrap interval over pictures."""

    value: float
    low: float
    high: float


def kernel_distance(
    originals: NDArray[np.float32], others: NDArray[np.float32], pictures: Sequence[int]
) -> Estimate | None:
    """Estimate the distance between originals and their reconstructions, patch by patch in the same order.

    The sets are paired, and patches of one picture overlap: only patches of different pictures are compared, in all
    three terms. The estimate is unbiased for pictures drawn independently, so for (nearly) equal distributions it may
    fall below zero; for equal sets it is zero.

    Args:
        originals: (n, d) features of the originals' patches.
        others: the same of the reconstructions'.
        pictures: n numbers; patches of one picture have the same one.

    Returns:
        None if there are fewer than two pictures. The interval draws pictures again, with their patches.

    Source: Binkowski et al. 2018, arXiv:1801.01401, section 4. Differs: pairs within a picture are left out.
    """
    x, y = originals.astype(np.float64), others.astype(np.float64)
    membership = np.unique(np.asarray(pictures), return_inverse=True)[1]
    number = int(membership.max(initial=-1)) + 1
    if number < 2:
        return None
    cross = _kernel(x, y)
    terms = _kernel(x, x) + _kernel(y, y) - cross - cross.T
    indicator = np.eye(number)[membership]  # (n, pictures)
    sums = indicator.T @ terms @ indicator
    counts = indicator.sum(0)
    pairs = np.outer(counts, counts)
    np.fill_diagonal(sums, 0)
    np.fill_diagonal(pairs, 0)
    draws = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), size=RESAMPLES).astype(float)
    totals = np.einsum("ri,ij,rj->r", draws, pairs, draws)
    resampled = np.einsum("ri,ij,rj->r", draws, sums, draws)[totals > 0] / totals[totals > 0]
    low, high = np.percentile(resampled, INTERVAL)
    return Estimate(float(sums.sum() / pairs.sum()), float(low), float(high))


def bootstrap_mean(values: NDArray[np.float64], pictures: Sequence[int]) -> Estimate:
    """Mean over patches with its 95 % bootstrap interval over pictures.

    Args:
        values: (n,), one per patch.
        pictures: see `kernel_distance`.
    """
    membership = np.unique(np.asarray(pictures), return_inverse=True)[1]
    sums, counts = np.bincount(membership, values), np.bincount(membership)
    number = len(counts)
    draws = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), size=RESAMPLES)
    low, high = np.percentile(draws @ sums / (draws @ counts), INTERVAL)
    return Estimate(float(values.mean()), float(low), float(high))


def _kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = (x @ y.T / x.shape[1] + 1) ** 3
    return result
