"""Levels: which codebooks serve which trade-off between rate and distortion.

At the same w (squared latent units per bit) the codebooks of neighboring levels differ in rate by a factor of about
1.5. For sizes to change smoothly with the trade-off that is asked for, each level applies a wider range of w than it
is asked for: coarser than asked towards the next level, which begins finer than asked, where both give about the same
rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

FIRST_END, FIRST_START = 1.0, 0.2
"""Coarsest w that the finest level applies, and finest w that the next one applies there, each in multiples of the w
that the level was made for. It ends early: its codewords are too few for it to gain much. Chosen on the validation
photos, as the next two."""
OTHER_END, OTHER_START = 2.7, 0.53
"""The same where any other level hands over to the next."""


def level_ends(num_levels: int) -> list[float]:
    """Coarsest w that each level but the last applies, in multiples of the w that it was made for."""
    return [FIRST_END if level == 0 else OTHER_END for level in range(num_levels - 1)]


def level_starts(num_levels: int) -> list[float]:
    """Finest w that each level but the first applies, in multiples of the w that it was made for."""
    return [FIRST_START if level == 1 else OTHER_START for level in range(1, num_levels)]


class Levels:
    """The levels of a model.

    Args:
        log_w: natural logarithms of the w that each level was made for, at least one, ascending.
    """

    def __init__(self, log_w: Sequence[float]) -> None:
        self._made_for = [float(value) for value in log_w]
        ends, starts = level_ends(len(log_w)), level_starts(len(log_w))
        self._ends = [made + math.log(end) for made, end in zip(self._made_for[:-1], ends, strict=True)]
        self._starts = [made + math.log(start) for made, start in zip(self._made_for[1:], starts, strict=True)]
        self._handovers = [(end + start) / 2 for end, start in zip(self._ends, self._starts, strict=True)]

    def __len__(self) -> int:
        return len(self._made_for)

    def level(self, w: float) -> int:
        """Level that serves a trade-off, squared latent units per bit."""
        return sum(math.log(w) > handover for handover in self._handovers)

    def applied_w(self, w: float, level: int) -> float:
        """The w at which the codewords of a level are chosen when another is asked for; rises with w.

        Args:
            w: asked for, squared latent units per bit.
            level: any, though those far from `level(w)` are of little use.
        """
        slope, asked, applied = self._line(level)
        return math.exp(applied + slope * (math.log(w) - asked))

    def asking_for(self, w: float) -> float:
        """What to ask for to have w itself applied, by the level made for about that w, whose codewords fit best."""
        log_w = math.log(w)
        ends, starts = [*self._ends, math.inf], [-math.inf, *self._starts]
        serving = [level for level in range(len(self)) if starts[level] <= log_w <= ends[level]]
        level = min(serving or [0], key=lambda level: abs(log_w - self._made_for[level]))
        slope, at, applied = self._line(level)
        return math.exp(at + (log_w - applied) / slope)

    def w_range(self) -> tuple[float, float]:
        """Finest and coarsest trade-off worth asking for: squared latent units per bit."""
        return math.exp(self._made_for[0]) / 2, math.exp(self._made_for[-1]) * 1.2

    def _line(self, level: int) -> tuple[float, float, float]:
        """Slope, and a point (asked for, applied), of the line that a level's w follows, in logarithms.

        The line goes through the two handovers of the level. The outermost ones have but one, and the slope of their
        neighbors; where there is no neighbor with two, it is 1.
        """
        if not self._handovers:
            return 1.0, 0.0, 0.0
        if len(self._handovers) == 1:
            return 1.0, self._handovers[0], self._ends[0] if level == 0 else self._starts[0]
        inner = min(max(level, 1), len(self._handovers) - 1)
        slope = (self._ends[inner] - self._starts[inner - 1]) / (self._handovers[inner] - self._handovers[inner - 1])
        if level == 0:
            return slope, self._handovers[0], self._ends[0]
        return slope, self._handovers[level - 1], self._starts[level - 1]
