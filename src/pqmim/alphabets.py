"""Alphabets: how many codewords each sub-quantizer has at each level, and where they lie among all of a model.

What belongs to codewords is kept in flat arrays, level by level and within it sub-quantizer by sub-quantizer: one entry
for each of N *codewords*, or one for each of their V *values*, as many for a codeword as its sub-quantizer has
channels. A sub-quantizer with a single codeword says nothing; its tokens are not sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_CODEWORDS = 511
"""Most codewords of a sub-quantizer: their masses, below 2^15 each, then add up exactly in float32."""


@dataclass(frozen=True)
class Block:
    """Neighboring sub-quantizers with equally many codewords, of equally many channels, at one level.

    Attributes:
        first, last: sub-quantizers, the second exclusive.
        size: K, codewords of each.
        channels: d of each.
        codewords: where they lie in flat arrays of codewords, which reshape to (m, K).
        values: where they lie in flat arrays of values, which reshape to (m, K, d).
    """

    first: int
    last: int
    size: int
    channels: int
    codewords: slice
    values: slice


class Alphabets:
    """The alphabets of a model.

    Args:
        sizes: (L, M) integers >= 1, codewords of each sub-quantizer at each level.
        channels: (M,) integers >= 1, channels of each sub-quantizer.

    Attributes:
        sizes, channels: as given, int64.
        starts: (L, M), where the codewords of each sub-quantizer begin in flat arrays of codewords.
        value_starts: (L, M), the same in flat arrays of values.
        num_codewords, num_values: N, V.
    """

    def __init__(self, sizes: NDArray[Any], channels: NDArray[Any]) -> None:
        self.sizes: NDArray[np.int64] = np.asarray(sizes, np.int64)
        self.channels: NDArray[np.int64] = np.asarray(channels, np.int64)
        ends = self.sizes.cumsum().reshape(self.sizes.shape)
        value_ends = (self.sizes * self.channels).cumsum().reshape(self.sizes.shape)
        self.starts: NDArray[np.int64] = ends - self.sizes
        self.value_starts: NDArray[np.int64] = value_ends - self.sizes * self.channels
        self.num_codewords, self.num_values = int(ends[-1, -1]), int(value_ends[-1, -1])
        self._blocks: dict[tuple[int, int, int], tuple[Block, ...]] = {}

    @classmethod
    def of(cls, tensors: Mapping[str, NDArray[Any]]) -> Alphabets:
        """Those of a model file, checked (`quantizer.check_quantizer_weights`)."""
        boundaries = tensors["tokenizer.quantizer.boundaries_tensor"]
        return cls(tensors["tokenizer.quantizer.sizes"], np.diff(boundaries))

    @property
    def num_levels(self) -> int:
        """L."""
        return len(self.sizes)

    @property
    def num_subquantizers(self) -> int:
        """M."""
        return len(self.channels)

    def num_coded(self, level: int) -> int:
        """Sub-quantizers whose tokens are sent at a level."""
        return int((self.sizes[level] > 1).sum())

    def end(self, level: int) -> int:
        """Sub-quantizers up to the last one whose tokens are sent at a level; at least 1."""
        return int(np.flatnonzero(self.sizes[level] > 1).max(initial=0)) + 1

    def codewords(self, level: int, first: int, count: int) -> slice:
        """Where the codewords of `count` sub-quantizers from `first` on lie in flat arrays."""
        start = int(self.starts[level, first])
        return slice(start, start + int(self.sizes[level, first : first + count].sum()))

    def blocks(self, level: int, first: int, last: int) -> tuple[Block, ...]:
        """The sub-quantizers from `first` to `last` (exclusive) at a level, in order."""
        key = (level, first, last)
        if key not in self._blocks:
            shape = np.stack([self.sizes[level, first:last], self.channels[first:last]])
            cuts = first + 1 + np.flatnonzero((shape[:, 1:] != shape[:, :-1]).any(0))
            bounds = [first, *cuts.tolist(), last]
            self._blocks[key] = tuple(self._block(level, begin, end) for begin, end in pairwise(bounds))
        return self._blocks[key]

    def _block(self, level: int, first: int, last: int) -> Block:
        size, channels = int(self.sizes[level, first]), int(self.channels[first])
        start, value_start, count = int(self.starts[level, first]), int(self.value_starts[level, first]), last - first
        codewords = slice(start, start + count * size)
        values = slice(value_start, value_start + count * size * channels)
        return Block(first, last, size, channels, codewords, values)
