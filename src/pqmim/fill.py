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

from enum import StrEnum
from functools import cache

import numpy as np
import torch
from torch import Tensor

from pqmim.exact_inference import ExactEntropyModel
from pqmim.range_coding import PRECISION
from pqmim.token_coding import CHUNK_TOKENS, TokenGrid
from pqmim.training.trainable_quantizer import TrainableQuantizer

CONFIDENCE_UNIT = 1 / 256
"""Bits that one unit of an integer confidence stands for."""
NOISE_BITS = 10
"""Random bits behind a Gumbel variate."""


class Fill(StrEnum):
    """What becomes of unknown tokens."""

    LIKELY = "likely"
    """Expectation of the latent."""
    SAMPLE = "sample"
    """Drawn from the model."""
    NONE = "none"
    """The mean of all pictures, whatever is known."""


def expected_latent(
    entropy_model: ExactEntropyModel, quantizer: TrainableQuantizer, grid: TokenGrid, level: int
) -> Tensor:
    """Quantized latent of the known tokens, and its expectation where they are unknown.

    Returns:
        (1, D, h, w) float32.
    """
    m, height, width = grid.tokens.shape
    tokens, known = grid.tokens.view(m, -1), grid.known.view(m, -1)
    levels = torch.tensor([level], device=tokens.device)
    z = quantizer.dequantize(grid.tokens[None], levels)
    positions = (~known).any(0).nonzero()[:, 0]
    if len(positions) == 0:
        return z
    state = entropy_model.start(height, width, level)
    entropy_model.reveal_grid(state, tokens, known)
    hidden = entropy_model.hidden(state, positions)
    z = z.flatten(2)
    for group in range(entropy_model.schedule.num_groups):
        first, last = entropy_model.schedule.group_bounds(group)
        if bool(known[first:last].all()):
            continue
        head = entropy_model.head(hidden, group)
        for index, run in enumerate(quantizer.runs()[first:last]):
            codewords = quantizer.codebook[level][:, run]
            channels = quantizer.order[run]
            for columns in torch.arange(len(positions), device=tokens.device).split(CHUNK_TOKENS):
                frequencies = entropy_model.frequencies(head[index : index + 1, columns], level, first + index)[0]
                mean = frequencies.float() @ codewords / (1 << PRECISION)  # (n, d)
                here = positions[columns]
                is_known = known[first + index, here]
                sent = z[0][channels[:, None], here]
                z[0, channels[:, None], here] = torch.where(is_known, sent, mean.t())
    return z.view(1, -1, height, width)


def sample(
    entropy_model: ExactEntropyModel,
    grid: TokenGrid,
    level: int,
    *,
    seed: int,
    temperature: float = 1.0,
    num_steps: int | None = None,
) -> Tensor:
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
    tokens, known = grid.tokens.reshape(m, -1).clone(), grid.known.reshape(m, -1).clone()
    state = entropy_model.start(height, width, level)
    entropy_model.reveal_grid(state, tokens, known)
    for group in range(schedule.num_groups):
        first, last = schedule.group_bounds(group)
        share = schedule.group_steps[group] / sum(schedule.group_steps)
        num_passes = max(1, round(share * (num_steps or sum(schedule.group_steps))))
        total = int((~known[first:last]).any(0).sum())
        for index in range(num_passes):
            positions = (~known[first:last]).any(0).nonzero()[:, 0]
            if len(positions) == 0:
                break
            head = entropy_model.head(entropy_model.hidden(state, positions), group)
            is_new = ~known[first:last, positions]  # (m, n)
            drawn, confidence = _draw(entropy_model, head, level, first, is_new, 1 / temperature, random)
            num_left = total * (num_passes**2 - (index + 1) ** 2) // num_passes**2
            num_kept = max(1, len(positions) - num_left)
            if num_kept < len(positions):  # noise that dies away lets other positions than the surest begin
                noise = _gumbel_noise(random, len(positions)).to(confidence.device)
                scale = round((1 - (index + 1) / num_passes) * temperature * 256)
                confidence = confidence * 256 // is_new.sum(0) + noise * scale
            keep = confidence.argsort(descending=True, stable=True)[:num_kept].sort().values
            here = positions[keep]
            block = tokens[first:last]
            block[:, here] = torch.where(is_new[:, keep], drawn[:, keep], block[:, here])
            newly = torch.zeros_like(known)
            newly[first:last, here] = is_new[:, keep]
            entropy_model.reveal_grid(state, tokens, newly)
            known |= newly
    return tokens.view(m, height, width)


def _draw(
    entropy_model: ExactEntropyModel,
    head: Tensor,
    level: int,
    first: int,
    is_new: Tensor,
    sharpness: float,
    random: np.random.PCG64,
) -> tuple[Tensor, Tensor]:
    """Draw a token for every row of a head.

    Returns:
        Tokens (m, n) int64, and the confidence of each position (n,) int64: log-probability of its new tokens.
    """
    log_table = _log_table().to(head.device)
    confidence = torch.zeros(head.shape[1], dtype=torch.int64, device=head.device)
    drawn = []
    for index in range(len(head)):
        parts = []
        for columns in torch.arange(head.shape[1], device=head.device).split(CHUNK_TOKENS):
            frequencies = entropy_model.frequencies(
                head[index : index + 1, columns], level, first + index, sharpness=sharpness
            )[0]
            target = _random_bits(random, len(columns), PRECISION).to(head.device)
            upper = frequencies.cumsum(1)  # integers
            part = (upper <= target[:, None]).sum(1)
            logs = log_table[frequencies.gather(1, part[:, None])[:, 0].long()]
            confidence[columns] += torch.where(is_new[index, columns], logs, 0)
            parts.append(part)
        drawn.append(torch.cat(parts))
    return torch.stack(drawn), confidence


def _random_bits(random: np.random.PCG64, count: int, num_bits: int) -> Tensor:
    """(count,) int64, uniform in [0, 2^num_bits). The raw stream, which NumPy promises never to change."""
    raw = random.random_raw(count) >> np.uint64(64 - num_bits)
    return torch.from_numpy(raw.astype(np.int64))


@cache
def _log_table() -> Tensor:
    """log2 of every frequency over 2^16, in CONFIDENCE_UNIT: (2^16 + 1,) int64.

    No entry is near a half before rounding, so that any logarithm good to 1e-9 gives the same table.
    """
    frequency = np.arange(1, (1 << PRECISION) + 1, dtype=np.float64)
    units = np.rint((np.log2(frequency) - PRECISION) / CONFIDENCE_UNIT)
    return torch.from_numpy(np.concatenate([units[:1], units]).astype(np.int64))


@cache
def _gumbel_table() -> Tensor:
    """Quantiles of the Gumbel distribution in bits, in CONFIDENCE_UNIT: (2^NOISE_BITS,) int64, as exact."""
    u = (np.arange(1 << NOISE_BITS) + 0.5) / (1 << NOISE_BITS)
    return torch.from_numpy(np.rint(-np.log2(-np.log2(u)) / CONFIDENCE_UNIT).astype(np.int64))


def _gumbel_noise(random: np.random.PCG64, count: int) -> Tensor:
    """(count,) int64 Gumbel variates in CONFIDENCE_UNIT."""
    return _gumbel_table()[_random_bits(random, count, NOISE_BITS)]
