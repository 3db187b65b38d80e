"""The range coder of docs/format.md in Python alone, for machines that constriction has no package for.

It has the names and the signatures of what `range_coding` uses of constriction, and writes the same bytes; per token it
takes about a microsecond more.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LEFT_BITS = 24
"""Left ends of tokens' intervals are integers below 2**24."""
_WORD_BITS, _STATE_BITS = 32, 64
_LEFT_MAX, _WORD_MAX, _STATE_MAX = (1 << _LEFT_BITS) - 1, (1 << _WORD_BITS) - 1, (1 << _STATE_BITS) - 1
_CHUNK = 1 << 18
"""Left ends that are in memory at a time."""


class RangeEncoder:
    """Tokens -> words of 32 bits."""

    def __init__(self) -> None:
        self._words: list[int] = []
        self._low, self._width = 0, _STATE_MAX

    def encode(self, tokens: NDArray[np.int32], model_family: Any, probabilities: NDArray[np.float32]) -> None:
        """Append n tokens.

        Args:
            tokens: (n,).
            model_family: has no say; there is one here.
            probabilities: (n, K) multiples of 2**-16, above 0, each row of sum 1.
        """
        low, width = self._low, self._width
        for rows, ends in _left_ends(probabilities):
            chosen = tokens[rows].astype(np.int64)[:, None]
            lefts, rights = (np.take_along_axis(ends, chosen + side, axis=1)[:, 0] for side in (0, 1))
            for left, share in zip(lefts.tolist(), (rights - lefts).tolist(), strict=True):
                scale = width >> _LEFT_BITS
                low += scale * left
                width = scale * share
                if low > _STATE_MAX:
                    low &= _STATE_MAX
                    self._carry()
                if width <= _WORD_MAX:
                    self._words.append(low >> _WORD_BITS)
                    low = low << _WORD_BITS & _STATE_MAX
                    width <<= _WORD_BITS
        self._low, self._width = low, width

    def _carry(self) -> None:
        """Add one to the number that the words are."""
        place = len(self._words) - 1
        while self._words[place] == _WORD_MAX:
            self._words[place] = 0
            place -= 1
        self._words[place] += 1

    def is_empty(self) -> bool:
        """Whether no token was encoded."""
        return self._width == _STATE_MAX and not self._words

    def get_compressed(self) -> NDArray[np.uint32]:
        """Words that decode to the tokens so far."""
        return np.array([*self._words, self._low >> _WORD_BITS, self._low & _WORD_MAX], np.uint32)

    def pos(self) -> tuple[int, tuple[int, int]]:
        """Number of words that are fixed but for a carry; the lower end and the width of the interval below them."""
        return len(self._words), (self._low, self._width)


class RangeDecoder:
    """Words of 32 bits -> tokens; behind the words are zeros."""

    def __init__(self, words: NDArray[np.uint32]) -> None:
        self._words: list[int] = words.tolist()
        self._next = 0
        self._width = _STATE_MAX
        self._offset = self._word() << _WORD_BITS | self._word()

    def _word(self) -> int:
        self._next += 1
        return self._words[self._next - 1] if self._next <= len(self._words) else 0

    def decode(self, model_family: Any, probabilities: NDArray[np.float32]) -> NDArray[np.int32]:
        """The next n tokens, (n,); arguments as of `RangeEncoder.encode`.

        Raises:
            AssertionError: no tokens have these words; the decoder is then of no further use.
        """
        offset, width = self._offset, self._width
        tokens = []
        for _, ends in _left_ends(probabilities):
            step = ends.shape[1]
            flat = ends.reshape(-1).data  # a list would take longer
            for first in range(0, len(flat), step):
                scale = width >> _LEFT_BITS
                place = offset // scale
                if place > _LEFT_MAX:
                    raise AssertionError("no token has these words")
                found = bisect_right(flat, place, first, first + step) - 1
                left = flat[found]
                offset -= scale * left
                width = scale * (flat[found + 1] - left)
                if width <= _WORD_MAX:
                    width <<= _WORD_BITS
                    offset = offset << _WORD_BITS | self._word()
                tokens.append(found - first)
        self._offset, self._width = offset, width
        return np.array(tokens, np.int32)

    def clone(self) -> RangeDecoder:
        """A decoder that goes on from here by itself."""
        copy = RangeDecoder(np.empty(0, np.uint32))
        copy.__dict__.update(self.__dict__)
        return copy


def _left_ends(probabilities: NDArray[np.float32]) -> Iterator[tuple[slice, NDArray[np.int64]]]:
    """The left end of each token's interval, and 2**24: some rows, and K + 1 integers for each of them."""
    num_rows, size = probabilities.shape
    count = max(1, _CHUNK // size)
    for first in range(0, num_rows, count):
        rows = slice(first, first + count)
        chunk = probabilities[rows].astype(np.float64)
        before = np.cumsum(chunk, axis=1) - chunk
        shares = (before * ((1 << _LEFT_BITS) - size)).astype(np.float32)  # exact, then rounded once
        ends = np.full((len(chunk), size + 1), 1 << _LEFT_BITS, np.int64)
        ends[:, :size] = shares.astype(np.int64) + np.arange(size)
        yield rows, ends
