"""Fill: what becomes of the tokens that were not sent.

The masked model gives probabilities for any unknown token given any known ones, so it can also stand in for the sender
(the hybrid of compression and generation of arXiv:2212.07372). Two ways:

- *likely*: each unknown part of the latent becomes its expectation under the model, which has the least mean squared
  error: faithful and smooth;
- *sample*: unknown tokens are drawn, a few at a time, the most confident first (iterative masked decoding of MaskGIT,
  Chang et al. 2022, arXiv:2202.04200, section 3.2): plausible detail that nobody sent.

Sampling is exact: integer frequencies, integer random numbers and integer confidences, so that a seed gives the same
tokens on every machine.
"""

from __future__ import annotations

from functools import cache
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from pqmim.exact_entropy import ExactEntropyModel
from pqmim.exact_numpy import Activations
from pqmim.quantizer import Latent, ProductQuantizer, Tokens
from pqmim.range_coding import PRECISION
from pqmim.token_coding import CHUNK_FREQUENCIES, TokenGrid

CONFIDENCE_UNIT = 1 / 256
"""Bits that one unit of an integer confidence stands for."""
NOISE_BITS = 10
"""Random bits behind a Gumbel variate."""


def expected_latent(
    entropy_model: ExactEntropyModel, quantizer: ProductQuantizer, grid: TokenGrid, level: int
) -> Latent:
    """Quantized latent of the known tokens, and its expectation where they are unknown.

    Returns:
        (1, D, h, w).
    """
    m, height, width = grid.tokens.shape
    tokens, known = grid.tokens.reshape(m, -1), grid.known.reshape(m, -1)
    latent = quantizer.dequantize(grid.tokens, level)
    if known.all():
        return latent
    z = latent.reshape(latent.shape[1], -1)
    groups = range(entropy_model.num_groups(level))
    for group, head in zip(groups, entropy_model.heads_of_known(height, width, level, tokens, known), strict=False):
        first, last = entropy_model.schedule.group_bounds(group)
        positions = np.flatnonzero((~known[first:last]).any(0))
        if len(positions) == 0:
            continue
        for index, run in enumerate(quantizer.runs[first:last]):
            size = int(quantizer.alphabets.sizes[level, first + index])
            if size == 1:
                continue  # the same whether sent or not
            codewords, channels = quantizer.codewords(first + index, level), quantizer.order[run]
            blocks = [(slice(index, index + 1), columns) for columns in _chunks(len(positions), size)]
            frequency_blocks = entropy_model.frequency_blocks(head, level, first, blocks)
            for (_, columns), frequencies in zip(blocks, frequency_blocks, strict=True):
                mean = frequencies[0].astype(np.float32) @ codewords / np.float32(1 << PRECISION)  # (n, d)
                here = positions[columns]
                is_unknown = ~known[first + index, here]
                z[channels[:, None], here[is_unknown]] = mean[is_unknown].T
    return latent


def sample(
    entropy_model: ExactEntropyModel,
    grid: TokenGrid,
    level: int,
    *,
    seed: int,
    temperature: float = 1.0,
    num_steps: int | None = None,
) -> Tokens:
    """Draw the unknown tokens.

    Group by group of sub-quantizers, in the order of the schedule: all unknown tokens of the group are drawn, those of
    the most confident positions are kept, and so on until none is left. The share still unknown after a share r of a
    group's passes is 1 - r^2, a concave schedule that integers compute.

    Args:
        level: whose probabilities and codebooks.
        seed: of the random numbers, >= 0.
        temperature: 1 draws from the model's probabilities, less sharpens them; > 0.
        num_steps: passes of the network over all groups, at least one for each; None = as many as the schedule has.

    Returns:
        (M, h, w) int64, all tokens.
    """
    schedule = entropy_model.schedule
    random = np.random.PCG64(seed)
    m, height, width = grid.tokens.shape
    tokens, known = grid.tokens.reshape(m, -1).copy(), grid.known.reshape(m, -1).copy()
    for group in range(entropy_model.num_groups(level)):
        first, last = schedule.group_bounds(group)
        share = schedule.group_steps[group] / sum(schedule.group_steps)
        num_passes = max(1, round(share * (num_steps or sum(schedule.group_steps))))
        total = int((~known[first:last]).any(0).sum())
        for index in range(num_passes):
            positions = np.flatnonzero((~known[first:last]).any(0))
            if len(positions) == 0:
                break
            heads = entropy_model.heads_of_known(height, width, level, tokens, known)
            head = next(islice(heads, group, None))
            is_new = ~known[first:last, positions]  # (m, n)
            drawn, confidence = _draw(entropy_model, head, level, first, is_new, 1 / temperature, random)
            num_left = total * (num_passes**2 - (index + 1) ** 2) // num_passes**2
            num_kept = max(1, len(positions) - num_left)
            if num_kept < len(positions):  # noise that dies away lets other positions than the surest begin
                noise = _gumbel_noise(random, len(positions))
                scale = round((1 - (index + 1) / num_passes) * temperature * 256)
                confidence = confidence * 256 // is_new.sum(0) + noise * scale
            keep = np.sort(np.argsort(-confidence, kind="stable")[:num_kept])
            here = positions[keep]
            tokens[first:last, here] = np.where(is_new[:, keep], drawn[:, keep], tokens[first:last, here])
            newly = np.zeros_like(known)
            newly[first:last, here] = is_new[:, keep]
            known |= newly
    return tokens.reshape(m, height, width)


def _draw(
    entropy_model: ExactEntropyModel,
    head: Activations,
    level: int,
    first: int,
    is_new: NDArray[np.bool_],
    sharpness: float,
    random: np.random.PCG64,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw a token for every row of a head.

    Returns:
        Tokens (m, n), and the confidence of each position (n,): log-probability of its new tokens.
    """
    log_table = _log_table()
    confidence = np.zeros(head.shape[1], np.int64)
    drawn = np.zeros(head.shape[:2], np.int64)
    sizes = entropy_model.alphabets.sizes[level, first : first + len(head)]
    for index in np.flatnonzero(sizes > 1).tolist():
        for columns in _chunks(head.shape[1], int(sizes[index])):
            frequencies = entropy_model.frequencies(
                np.ascontiguousarray(head[index : index + 1, columns]), level, first + index, sharpness=sharpness
            )[0]
            target = _random_bits(random, len(frequencies), PRECISION)
            tokens = (frequencies.cumsum(1) <= target[:, None]).sum(1)  # integers
            logs = log_table[np.take_along_axis(frequencies, tokens[:, None], 1)[:, 0]]
            confidence[columns] += np.where(is_new[index, columns], logs, 0)
            drawn[index, columns] = tokens
    return drawn, confidence


def _chunks(count: int, size: int) -> list[slice]:
    """Cut positions so that each part has a bounded number of frequencies of `size` codewords."""
    most = max(1, CHUNK_FREQUENCIES // size)
    return [slice(start, min(start + most, count)) for start in range(0, count, most)]


def _random_bits(random: np.random.PCG64, count: int, num_bits: int) -> NDArray[np.int64]:
    """(count,), uniform in [0, 2^num_bits). The raw stream, which NumPy promises never to change."""
    return (random.random_raw(count) >> np.uint64(64 - num_bits)).astype(np.int64)


@cache
def _log_table() -> NDArray[np.int64]:
    """log2 of every frequency over 2^16, in CONFIDENCE_UNIT: (2^16 + 1,).

    No entry is near a half before rounding, so that any logarithm good to 1e-9 gives the same table.
    """
    frequency = np.arange(1, (1 << PRECISION) + 1, dtype=np.float64)
    units = np.rint((np.log2(frequency) - PRECISION) / CONFIDENCE_UNIT)
    return np.concatenate([units[:1], units]).astype(np.int64)


@cache
def _gumbel_table() -> NDArray[np.int64]:
    """Quantiles of the Gumbel distribution in bits, in CONFIDENCE_UNIT: (2^NOISE_BITS,), as exact."""
    u = (np.arange(1 << NOISE_BITS) + 0.5) / (1 << NOISE_BITS)
    return np.rint(-np.log2(-np.log2(u)) / CONFIDENCE_UNIT).astype(np.int64)


def _gumbel_noise(random: np.random.PCG64, count: int) -> NDArray[np.int64]:
    """(count,) Gumbel variates in CONFIDENCE_UNIT."""
    return _gumbel_table()[_random_bits(random, count, NOISE_BITS)]
