"""The step loop: frequencies, tokens, range coder, in the same order for both directions.

Writing and reading differ only in the coder that is handed in, and in who chooses the tokens: the encoder does, inside
the loop, where it sees the very frequencies that will code them; the decoder takes what the coder reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pqmim.exact_inference import ExactEntropyModel
from pqmim.range_coding import PRECISION, IntArray, TokenCoder, TokenWriter
from pqmim.rate_control import solve
from pqmim.training.trainable_quantizer import TrainableQuantizer

CHUNK_TOKENS = 1 << 15
"""Tokens whose frequencies are in memory at a time; bounds memory for large images."""

STATIC_SHARE = 0.8
"""Weight of the static prior in the choice of tokens; chosen on the validation photos."""
BUDGET_REACH = 2.0
"""Largest factor by which a budget changes w, up or down."""
FREE_SHARE = 0.5
"""Share of the bits that is spent before a budget is looked at: what comes first is the context of the rest."""

TokenChoice = Callable[[int, Tensor, Tensor], Tensor]
"""(first sub-quantizer, positions (n,), frequencies (m, n, K)) -> tokens (m, n) int64."""


@dataclass(frozen=True)
class TokenGrid:
    """Tokens of an image, as far as they are known.

    Attributes:
        tokens: (M, h, w) int64; 0 where unknown.
        known: (M, h, w) bool.
    """

    tokens: Tensor
    known: Tensor

    @property
    def is_complete(self) -> bool:
        """Whether all tokens are known."""
        return bool(self.known.all())

    @property
    def known_share(self) -> float:
        """Share of the tokens that are known, 0 to 1."""
        return float(self.known.double().mean())


def code_tokens(
    entropy_model: ExactEntropyModel,
    coder: TokenCoder,
    height: int,
    width: int,
    level: int,
    choose: TokenChoice | None = None,
    *,
    after_step: Callable[[TokenGrid], None] | None = None,
) -> TokenGrid:
    """Code a token grid, step by step.

    Tokens of one step are coded independently given all earlier steps, so encoder and decoder see the same context.
    Within a step the leading sub-quantizer comes first, over all positions.

    Args:
        coder: writes or reads; coding ends where it takes or gives fewer tokens than it was asked for.
        height, width: of the token grid, positions.
        level: of the image, see `EntropyModel`.
        choose: what the writer sends; None when reading.
        after_step: called with the grid as it then is; the tensors change later.

    Returns:
        The tokens written or read.

    Raises:
        DamagedFileError: the reader finds impossible data.
    """
    state = entropy_model.start(height, width, level)
    shape = (entropy_model.num_subquantizers, height * width)
    tokens = torch.zeros(shape, dtype=torch.int64, device=entropy_model.device)
    known = torch.zeros(shape, dtype=torch.bool, device=entropy_model.device)
    grid = TokenGrid(tokens.view(-1, height, width), known.view(-1, height, width))
    for step in entropy_model.schedule.steps:
        positions = entropy_model.positions(state, step)
        head = entropy_model.head(entropy_model.hidden(state, positions), step.group)
        for rows, columns in _blocks(step.last - step.first, len(positions)):
            first, here = step.first + rows.start, positions[columns]
            frequencies = entropy_model.frequencies(head[rows, columns], level, first)
            chosen = None if choose is None else choose(first, here, frequencies).reshape(-1).cpu().numpy()
            coded = coder.code(frequencies.flatten(0, 1).cpu().numpy(), chosen)
            number, expected = len(coded), (rows.stop - rows.start) * len(here)
            block = torch.zeros(expected, dtype=torch.int64)
            block[:number] = torch.from_numpy(coded)
            tokens[first : step.first + rows.stop, here] = block.view(-1, len(here)).to(tokens.device)
            is_known = torch.arange(expected, device=known.device) < number
            known[first : step.first + rows.stop, here] = is_known.view(-1, len(here))
            if number < expected:
                if after_step is not None:
                    after_step(grid)
                return grid
        if len(positions):
            step_tokens = tokens[step.first : step.last, positions].t()
            entropy_model.reveal(state, positions, step.first, step.last, step_tokens)
            if after_step is not None:
                after_step(grid)
    return grid


def _blocks(num_subquantizers: int, num_positions: int) -> Iterator[tuple[slice, slice]]:
    """Cut a step into blocks of at most CHUNK_TOKENS tokens, in coding order."""
    rows = max(1, CHUNK_TOKENS // max(1, num_positions))
    columns = CHUNK_TOKENS if rows == 1 else max(1, num_positions)
    for first in range(0, num_subquantizers, rows):
        for start in range(0, num_positions, columns):
            stop = min(start + columns, num_positions)
            yield slice(first, min(first + rows, num_subquantizers)), slice(start, stop)


class RateDistortionChoice:
    """Chooses each token by latent distortion + w * bits (entropy-constrained quantization).

    "bits" is a mean of two code lengths. That of the masked model is what the token itself costs. But what is likely
    here is chosen too often by it, so later tokens learn little from their context; the static prior weighs what a
    token costs anywhere.

    Args:
        quantizer: codebooks.
        z: (1, D, h, w) float32 latent.
        w: squared latent units per bit, a number or one per position (h * w,); 0 is the nearest codeword.
        level: whose codebooks.
        budget: of bits, to be met by small changes of w on the way.
        static_share: weight of the static prior in the bits, 0 to 1.

    Attributes:
        spent: ideal code length of each block of tokens so far, bits.
    """

    def __init__(
        self,
        quantizer: TrainableQuantizer,
        z: Tensor,
        w: float | Tensor,
        level: int,
        budget: Budget | None = None,
        static_share: float = STATIC_SHARE,
    ) -> None:
        self.quantizer = quantizer
        self.columns = quantizer.columns(z)  # (1, h * w, D')
        self.w = torch.as_tensor(w, dtype=torch.float32, device=z.device).expand(self.columns.shape[1])
        self.level = torch.tensor([level], device=z.device)
        self.bits_of_frequency = bits_table(z.device)
        self.static_share = static_share
        self.static_bits = quantizer.prior_bits()[level]  # (M, K)
        self.budget = budget
        self.spent: list[float] = []

    def __call__(self, first: int, positions: Tensor, frequencies: Tensor) -> Tensor:
        """See `TokenChoice`."""
        columns, w = self.columns[:, positions], self.w[positions, None]
        distances = [
            self.quantizer.squared_distances(columns, m, self.level)[0] for m in range(first, first + len(frequencies))
        ]
        bits = self.bits_of_frequency[frequencies]
        weighed = bits.lerp(self.static_bits[first : first + len(frequencies), None], self.static_share)

        def choose(factor: float) -> Tensor:
            rows = (torch.addcmul(d, b, w * factor).argmin(1) for d, b in zip(distances, weighed, strict=True))
            return torch.stack(list(rows))

        def cost(tokens: Tensor) -> float:
            return float(bits.gather(2, tokens[:, :, None]).sum())

        share = None if self.budget is None else self.budget.share(self.spent)
        factor = 1.0
        if share is not None:
            factor = solve(lambda factor: cost(choose(factor)), share, (1 / BUDGET_REACH, BUDGET_REACH))
        tokens = choose(factor)
        self.spent.append(cost(tokens))
        return tokens


@dataclass(frozen=True)
class Budget:
    """A number of bits to be spent on a picture, and how an earlier encoding spent its own.

    Attributes:
        bits: what all tokens together may cost.
        plan: bits of each block of tokens in the earlier encoding.
    """

    bits: float
    plan: list[float]

    def share(self, spent: list[float]) -> float | None:
        """Bits for the next block, if the blocks so far cost this much; None while it is early."""
        planned = sum(self.plan[len(spent) :])
        if planned > (1 - FREE_SHARE) * sum(self.plan):
            return None
        return max(0.0, self.bits - sum(spent)) * self.plan[len(spent)] / max(1e-9, planned)


class GivenTokens:
    """Sends tokens that are already there.

    Args:
        tokens: (M, h, w) int64.
    """

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens.flatten(1)

    def __call__(self, first: int, positions: Tensor, frequencies: Tensor) -> Tensor:
        """See `TokenChoice`."""
        return self.tokens[first : first + len(frequencies), positions]


class PrefixWriter:
    """Writes tokens of which only the first ones are to be sent; a `TokenCoder`.

    Args:
        num_tokens: how many.
    """

    def __init__(self, num_tokens: int) -> None:
        self._all, self._first = TokenWriter(), TokenWriter()
        self._room = num_tokens

    def code(self, frequencies: IntArray, tokens: IntArray | None = None) -> NDArray[np.int64]:
        """Write n tokens, see `TokenCoder.code`."""
        count = min(self._room, len(frequencies))
        self._room -= count
        self._first.code(frequencies[:count], None if tokens is None else tokens[:count])
        return self._all.code(frequencies, tokens)

    def finish(self) -> bytes:
        """Return the digits of the payload of all tokens that say the first ones."""
        return self._first.prefix_of(self._all.finish())


def bits_table(device: torch.device) -> Tensor:
    """Code length in bits of every frequency: (2^16 + 1,) float32; entry 0, which does not occur, is infinite."""
    frequency = np.arange((1 << PRECISION) + 1, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return torch.from_numpy((PRECISION - np.log2(frequency)).astype(np.float32)).to(device)
