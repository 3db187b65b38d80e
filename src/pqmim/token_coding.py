"""The step loop: frequencies, tokens, range coder, in the same order for both directions.

Writing and reading differ only in the coder that is handed in, and in who chooses the tokens: the encoder does, inside
the loop, with the very frequencies that will code them; the decoder takes what the coder reads.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pqmim.exact_inference import ExactEntropyModel
from pqmim.quantizer import ProductQuantizer
from pqmim.range_coding import PRECISION, TokenCoder
from pqmim.schedule import Step

CHUNK_POSITIONS = 2048
"""Positions whose frequencies are in memory at a time; bounds memory for large images."""

TokenChoice = Callable[[Step, Tensor, Tensor], Tensor]
"""(step, positions (n,), frequencies (n, m, K)) -> tokens (n, m) int64."""


def code_tokens(
    entropy_model: ExactEntropyModel,
    coder: TokenCoder,
    height: int,
    width: int,
    level: int,
    choose: TokenChoice | None = None,
) -> Tensor:
    """Code a token grid, step by step.

    Tokens of one step are coded independently given all earlier steps, so encoder and decoder see the same context.

    Args:
        coder: writes or reads.
        height, width: of the token grid, positions.
        level: of the image, see `EntropyModel`.
        choose: what the writer sends; None when reading.

    Returns:
        (M, h, w) int64, the tokens written or read.

    Raises:
        DamagedFileError: the reader finds impossible data.
    """
    state = entropy_model.start(height, width, level)
    grid = torch.zeros(entropy_model.num_subquantizers, height * width, dtype=torch.int64, device=entropy_model.device)
    for step in entropy_model.schedule.steps:
        positions = entropy_model.positions(state, step)
        hidden = entropy_model.hidden(state, positions)
        for start in range(0, len(positions), CHUNK_POSITIONS):
            chunk = slice(start, start + CHUNK_POSITIONS)
            frequencies = entropy_model.frequencies(hidden[chunk], level, step.group)
            chosen = None if choose is None else choose(step, positions[chunk], frequencies)
            rows = frequencies.reshape(-1, entropy_model.num_codewords).cpu().numpy()
            coded = coder.code(rows, None if chosen is None else chosen.reshape(-1).cpu().numpy())
            grid[step.first : step.last, positions[chunk]] = (
                torch.from_numpy(coded).to(grid.device).view(-1, step.last - step.first).t()
            )
        if len(positions):
            tokens = grid[step.first : step.last, positions].t()
            entropy_model.reveal(state, positions, step.first, step.last, tokens)
    return grid.view(-1, height, width)


class RateDistortionChoice:
    """Chooses each token by latent distortion + w * bits (entropy-constrained quantization).

    Args:
        quantizer: codebooks.
        z: (1, D, h, w) float32 latent.
        w: squared latent units per bit; 0 is the nearest codeword.
    """

    def __init__(self, quantizer: ProductQuantizer, z: Tensor, w: float) -> None:
        self.quantizer = quantizer
        self.columns = quantizer.columns(z)  # (h * w, D')
        self.w = w
        self.bits_of_frequency = bits_table(z.device)

    def __call__(self, step: Step, positions: Tensor, frequencies: Tensor) -> Tensor:
        """See `TokenChoice`."""
        columns = self.columns[positions]
        tokens = []
        for m in range(step.first, step.last):
            bits = self.bits_of_frequency[frequencies[:, m - step.first]]
            tokens.append((self.quantizer.squared_distances(columns, m) + self.w * bits).argmin(dim=1))
        return torch.stack(tokens, dim=1)


class GivenTokens:
    """Sends tokens that are already there.

    Args:
        tokens: (M, h, w) int64.
    """

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens.flatten(1)

    def __call__(self, step: Step, positions: Tensor, frequencies: Tensor) -> Tensor:
        """See `TokenChoice`."""
        return self.tokens[step.first : step.last, positions].t()


def bits_table(device: torch.device) -> Tensor:
    """Code length in bits of every frequency: (2^16 + 1,) float32; entry 0, which does not occur, is infinite."""
    frequency = np.arange((1 << PRECISION) + 1, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return torch.from_numpy((PRECISION - np.log2(frequency)).astype(np.float32)).to(device)
