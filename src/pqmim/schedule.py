"""The order in which tokens are coded: quincunx in space, crossed with groups of sub-quantizers.

The leading group is coded over all positions before the next one begins, so that a prefix of the file is a coarse
picture. Within a group five steps code 1/16, 1/16, 1/8, 1/4 and 1/2 of the positions, each halving the density of
what is unknown. On every 4 x 4 tile of positions (number = quincunx step)::

    4 2 4 0
    3 4 3 4
    4 1 4 2
    3 4 3 4
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

QUINCUNX = np.array([[4, 2, 4, 0], [3, 4, 3, 4], [4, 1, 4, 2], [3, 4, 3, 4]])
NUM_QUINCUNX_STEPS = 5


@dataclass(frozen=True)
class Step:
    """Tokens coded together: sub-quantizers `first` to `last` (exclusive) at the positions of one quincunx step."""

    group: int
    first: int
    last: int
    quincunx: int


@dataclass(frozen=True)
class Schedule:
    """The ordered steps for M sub-quantizers in `num_groups` groups."""

    num_subquantizers: int
    num_groups: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_groups <= self.num_subquantizers:
            raise ValueError(f"num_groups must be 1 to {self.num_subquantizers}, not {self.num_groups}")

    def group_bounds(self, group: int) -> tuple[int, int]:
        """First and last (exclusive) sub-quantizer of a group."""
        m, g = self.num_subquantizers, self.num_groups
        return m * group // g, m * (group + 1) // g

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps in coding order."""
        return tuple(
            Step(group, *self.group_bounds(group), quincunx)
            for group in range(self.num_groups)
            for quincunx in range(NUM_QUINCUNX_STEPS)
        )


def quincunx_steps(height: int, width: int) -> NDArray[np.int64]:
    """Quincunx step of every position: (height, width) int64 in [0, 5)."""
    return QUINCUNX[np.arange(height)[:, None] % 4, np.arange(width)[None, :] % 4]


def positions_of(quincunx: int, height: int, width: int) -> NDArray[np.int64]:
    """Positions of a quincunx step as (n,) int64 indices into the flattened height x width grid, in raster order.

    May be empty: a small grid need not hold every step.
    """
    return np.flatnonzero(quincunx_steps(height, width).ravel() == quincunx)
