"""The step loop: frequencies, tokens, range coder, in the same order for both directions.

Writing and reading differ only in the coder that is handed in, and in who chooses the tokens: the encoder does, inside
the loop, where it sees the very frequencies that will code them; the decoder takes what the coder reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from pqmim.alphabets import Block
from pqmim.exact_entropy import ExactEntropyModel
from pqmim.quantizer import Latent, ProductQuantizer, Tokens, index_of_least
from pqmim.range_coding import PRECISION, IntArray, TokenCoder, TokenWriter
from pqmim.rate_control import solve

CHUNK_FREQUENCIES = 1 << 15
"""Frequencies that are computed at a time: they fit the cache, and memory is bounded for large images."""

STATIC_SHARE = 0.8
"""Weight of the static prior in the choice of tokens; chosen on the validation photos."""
BUDGET_REACH = 2.0
"""Largest factor by which a budget changes w, up or down."""
FREE_SHARE = 0.5
"""Share of the bits that is spent before a budget is looked at: what comes first is the context of the rest."""

Frequencies = NDArray[np.int32]
"""(m, n, K)."""
TokenChoice = Callable[[int, NDArray[np.int64], Frequencies], NDArray[np.int64]]
"""(first sub-quantizer, positions (n,), frequencies (m, n, K)) -> tokens (m, n)."""


@dataclass(frozen=True)
class TokenGrid:
    """Tokens of an image, as far as they are known.

    Attributes:
        tokens: (M, h, w) int64; 0 where unknown.
        known: (M, h, w) bool.
        is_coded: (M,) bool, sub-quantizers whose tokens are sent; None = all.
    """

    tokens: Tokens
    known: NDArray[np.bool_]
    is_coded: NDArray[np.bool_] | None = None

    @classmethod
    def unknown(
        cls, num_subquantizers: int, height: int, width: int, is_coded: NDArray[np.bool_] | None = None
    ) -> TokenGrid:
        """A grid of which nothing is known."""
        shape = (num_subquantizers, height, width)
        return cls(np.zeros(shape, np.int64), np.zeros(shape, np.bool_), is_coded)

    @property
    def is_complete(self) -> bool:
        """Whether all tokens are known."""
        return bool(self.known.all())

    @property
    def known_share(self) -> float:
        """Share of the tokens to be sent that are known, 0 to 1."""
        coded = self.known if self.is_coded is None else self.known[self.is_coded]
        return float(coded.mean()) if coded.size else 1.0


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
    Within a step the leading sub-quantizer comes first, over all positions. Those of a single codeword are not coded.

    Args:
        coder: writes or reads; coding ends where it takes or gives fewer tokens than it was asked for.
        height, width: of the token grid, positions.
        level: of the image.
        choose: what the writer sends; None when reading.
        after_step: called with the grid as it then is; the arrays change later.

    Returns:
        The tokens written or read.

    Raises:
        DamagedFileError: the reader finds impossible data.
    """
    state = entropy_model.start(height, width, level)
    is_silent = entropy_model.alphabets.sizes[level] == 1
    grid = TokenGrid.unknown(entropy_model.num_subquantizers, height, width, ~is_silent)
    tokens = grid.tokens.reshape(len(grid.tokens), -1)  # views
    known = grid.known.reshape(len(grid.known), -1)
    parts = [(step, entropy_model.positions(state, step)) for step in entropy_model.steps(level)]
    parts = [(step, positions) for step, positions in parts if len(positions)]  # a small grid lacks some
    for step, positions in parts:
        head = entropy_model.head(state, step)
        blocks = list(_blocks(entropy_model.alphabets.blocks(level, step.first, step.last), len(positions)))
        known[step.first : step.last, positions] = is_silent[step.first : step.last, None]
        for (rows, columns), frequencies in zip(
            blocks, entropy_model.frequency_blocks(head, level, step.first, blocks), strict=True
        ):
            first, here = step.first + rows.start, positions[columns]
            chosen = None if choose is None else choose(first, here, frequencies).reshape(-1)
            coded = coder.code(frequencies.reshape(-1, frequencies.shape[2]), chosen)
            number, expected = len(coded), len(frequencies) * len(here)
            block = np.zeros(expected, np.int64)
            block[:number] = coded
            tokens[first : step.first + rows.stop, here] = block.reshape(-1, len(here))
            known[first : step.first + rows.stop, here] = (np.arange(expected) < number).reshape(-1, len(here))
            if number < expected:
                if after_step is not None:
                    after_step(grid)
                return grid
        if step == parts[-1][0]:
            known[step.last :] = True  # nothing is left to be said
        entropy_model.reveal(state, step, tokens[step.first : step.last, positions])
        if after_step is not None:
            after_step(grid)
    return grid


def _blocks(alphabets: Sequence[Block], num_positions: int) -> Iterator[tuple[slice, slice]]:
    """Cut a step into blocks of at most CHUNK_FREQUENCIES, of tokens with equally many codewords, in coding order.

    Args:
        alphabets: of the step's sub-quantizers.

    Yields:
        Sub-quantizers, counted from the first one of the step, and positions.
    """
    for block in alphabets:
        if block.size == 1:
            continue
        rows = max(1, CHUNK_FREQUENCIES // (block.size * num_positions))
        columns = max(1, CHUNK_FREQUENCIES // block.size) if rows == 1 else num_positions
        begin, end = block.first - alphabets[0].first, block.last - alphabets[0].first
        for first in range(begin, end, rows):
            for start in range(0, num_positions, columns):
                yield slice(first, min(first + rows, end)), slice(start, min(start + columns, num_positions))


class RateDistortionChoice:
    """Chooses each token by latent distortion + w * bits (entropy-constrained quantization).

    "bits" is a mean of two code lengths. That of the masked model is what the token itself costs. But what is likely
    here is chosen too often by it, so later tokens learn little from their context; the static prior weighs what a
    token costs anywhere.

    Args:
        quantizer: codebooks.
        z: (1, D, h, w) latent.
        w: squared latent units per bit, one per position (h * w,); 0 is the nearest codeword.
        level: whose codebooks.
        budget: of bits, to be met by small changes of w on the way.
        static_share: weight of the static prior in the bits, 0 to 1.

    Attributes:
        spent: ideal code length of each block of tokens so far, bits.
    """

    def __init__(
        self,
        quantizer: ProductQuantizer,
        z: Latent,
        w: NDArray[np.float32],
        level: int,
        budget: Budget | None = None,
        static_share: float = STATIC_SHARE,
    ) -> None:
        self._quantizer = quantizer
        self._channels = quantizer.channels(z)  # (D', h * w)
        self._w = w
        self._level = level
        self._static_share = np.float32(static_share)
        self._budget = budget
        self.spent: list[float] = []

    def __call__(self, first: int, positions: NDArray[np.int64], frequencies: Frequencies) -> NDArray[np.int64]:
        """See `TokenChoice`."""
        w, own = self._w[positions], range(first, first + len(frequencies))
        bits = bits_table().take(frequencies.transpose(0, 2, 1))  # short alphabets: nothing runs well along them
        weighed = bits * (1 - self._static_share)
        weighed += self._static_share * self._static_bits(first, len(frequencies))
        weighed *= w
        values = [self._channels[self._quantizer.runs[m]][:, positions] for m in own]
        distances = [self._quantizer.distances(v, m, self._level) for m, v in zip(own, values, strict=True)]

        def choose(factor: float) -> NDArray[np.int64]:
            costs = weighed if factor == 1.0 else weighed * np.float32(factor)
            return np.stack([index_of_least(d + c) for d, c in zip(distances, costs, strict=True)])

        def cost(tokens: NDArray[np.int64]) -> float:
            return float(np.take_along_axis(bits, tokens[:, None], 1).sum(dtype=np.float64))

        share = None if self._budget is None else self._budget.share(self.spent)
        factor = 1.0
        if share is not None:
            factor = solve(lambda factor: cost(choose(factor)), share, (1 / BUDGET_REACH, BUDGET_REACH))
        tokens = choose(factor)
        self.spent.append(cost(tokens))
        return tokens

    def _static_bits(self, first: int, count: int) -> NDArray[np.float32]:
        """(m, K, 1) of sub-quantizers that have equally many codewords."""
        own = self._quantizer.alphabets.codewords(self._level, first, count)
        return self._quantizer.prior_bits[own].reshape(count, -1, 1)


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

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens.reshape(len(tokens), -1)

    def __call__(self, first: int, positions: NDArray[np.int64], frequencies: Frequencies) -> NDArray[np.int64]:
        """See `TokenChoice`."""
        return self._tokens[first : first + len(frequencies), positions]


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


@cache
def bits_table() -> NDArray[np.float32]:
    """Code length in bits of every frequency: (2^16 + 1,); entry 0, which does not occur, is infinite."""
    frequency = np.arange((1 << PRECISION) + 1, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return (PRECISION - np.log2(frequency)).astype(np.float32)


def token_bytes(tokens: Tokens) -> bytes:
    """Token grid as little-endian uint16, C order."""
    return tokens.astype("<u2").tobytes()
