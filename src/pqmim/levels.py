"""Levels: which codebooks serve which trade-off between rate and distortion.

At the same w (squared latent units per bit) the codebooks of neighboring levels differ in rate. For sizes to change
smoothly with the trade-off that is asked for, each level applies a wider range of w than it is asked for: coarser than
asked towards the next level, which begins finer than asked, where both give about the same rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


class Levels:
    """The levels of a model.

    Args:
        applied: of each level, at least one, the natural logarithms of the finest and the coarsest w that it applies,
            both ascending; each ends coarser than the next one begins.
    """

    def __init__(self, applied: Sequence[Sequence[float]]) -> None:
        self._applied = [(float(start), float(end)) for start, end in applied]
        self._starts, self._ends = ([bounds[side] for bounds in self._applied] for side in (0, 1))
        self._handovers = [(end + start) / 2 for end, start in zip(self._ends, self._starts[1:], strict=False)]
        self._lines = [self._line(level) for level in range(len(self))]

    def __len__(self) -> int:
        return len(self._starts)

    def level(self, w: float) -> int:
        """Level that serves a trade-off, squared latent units per bit."""
        return sum(math.log(w) > handover for handover in self._handovers)

    def applied_w(self, w: float, level: int) -> float:
        """The w at which the codewords of a level are chosen when another is asked for; rises with w.

        Args:
            w: asked for, squared latent units per bit.
            level: any, though those far from `level(w)` are of little use.
        """
        slope, asked, applied = self._lines[level]
        return math.exp(applied + slope * (math.log(w) - asked))

    def handover(self, level: int) -> tuple[float, float]:
        """The w that a level applies where it hands over to the next, and the one that this applies there."""
        return math.exp(self._ends[level]), math.exp(self._starts[level + 1])

    def moved(self, shifts: Mapping[int, float]) -> Levels:
        """Levels that take turns where these do, but hand over to the next at another w.

        Args:
            shifts: level -> what is added to the logarithm of its coarsest w, and taken from that of the next one's
                finest.
        """
        applied = [list(bounds) for bounds in self._applied]
        for level, shift in shifts.items():
            applied[level][1] += shift
            applied[level + 1][0] -= shift
        return Levels(applied)

    def w_range(self) -> tuple[float, float]:
        """Finest and coarsest trade-off worth asking for, squared latent units per bit."""
        return self._asked(self._starts[0], 0), self._asked(self._ends[-1], len(self) - 1)

    def _asked(self, applied: float, level: int) -> float:
        """What is asked for when a level applies this (logarithm of w)."""
        slope, asked, there = self._lines[level]
        return math.exp(asked + (applied - there) / slope)

    def _line(self, level: int) -> tuple[float, float, float]:
        """Slope, and a point (asked for, applied), of the line that a level's w follows, in logarithms.

        The line goes through the two handovers of the level. The outermost ones have but one, and the slope of their
        neighbors; where there is no neighbor with two, it is 1.
        """
        handovers, starts, ends = self._handovers, self._starts, self._ends
        slope = 1.0
        if len(handovers) > 1:
            inner = min(max(level, 1), len(handovers) - 1)
            slope = (ends[inner] - starts[inner]) / (handovers[inner] - handovers[inner - 1])
        if level > 0:
            return slope, handovers[level - 1], starts[level]
        return (slope, handovers[0], ends[0]) if handovers else (slope, starts[0], starts[0])
