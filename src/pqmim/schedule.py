"""The order in which tokens are coded: quincunx in space, crossed with groups of sub-quantizers.

The leading group is coded over all positions before the next one begins, so that a prefix of the file is a coarse
picture. Within a group five steps code 1/16, 1/16, 1/8, 1/4 and 1/2 of the positions, each halving the density of
what is unknown. On every 4 x 4 tile of positions (number = quincunx step)::

    4 2 4 0
    3 4 3 4
    4 1 4 2
    3 4 3 4

A group with fewer than five steps codes the first ones together: where the leading groups are known everywhere, order
in space matters less, and a step costs a pass of the network.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

QUINCUNX = np.array([[4, 2, 4, 0], [3, 4, 3, 4], [4, 1, 4, 2], [3, 4, 3, 4]])
NUM_QUINCUNX_STEPS = 5


@dataclass(frozen=True)
class Step:
    """Tokens coded together: sub-quantizers `first` to `last` (exclusive) of `group` at the positions of quincunx steps
    `begin` to `end` (exclusive)."""

    group: int
    first: int
    last: int
    begin: int
    end: int


@dataclass(frozen=True)
class Schedule:
    """The ordered steps for M sub-quantizers.

    Attributes:
        num_subquantizers: M, dealt to the groups in order.
        group_steps: steps of each group, 1 to 5.
        group_sizes: sub-quantizers of each group but the last, which has the rest; None = dealt evenly.
    """

    num_subquantizers: int
    group_steps: tuple[int, ...]
    group_sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.group_steps) <= self.num_subquantizers:
            raise ValueError(f"there must be 1 to {self.num_subquantizers} groups, not {len(self.group_steps)}")
        if not all(1 <= count <= NUM_QUINCUNX_STEPS for count in self.group_steps):
            raise ValueError(f"a group has 1 to {NUM_QUINCUNX_STEPS} steps, not {self.group_steps}")
        if self.group_sizes is not None and len(self.group_sizes) != self.num_groups - 1:
            raise ValueError(f"all of {self.num_groups} groups but the last have a size, not {self.group_sizes}")
        if any(first >= last for first, last in map(self.group_bounds, range(self.num_groups))):
            raise ValueError(f"a group has at least 1 of {self.num_subquantizers} sub-quantizers: {self.group_sizes}")

    @property
    def num_groups(self) -> int:
        """Number of groups of sub-quantizers."""
        return len(self.group_steps)

    def group_bounds(self, group: int) -> tuple[int, int]:
        """First and last (exclusive) sub-quantizer of a group."""
        m, g = self.num_subquantizers, self.num_groups
        if self.group_sizes is None:
            return m * group // g, m * (group + 1) // g
        ends = [0, *accumulate(self.group_sizes), m]
        return ends[group], ends[group + 1]

    def steps_of(self, group: int) -> tuple[Step, ...]:
        """Steps of one group in coding order."""
        merged = NUM_QUINCUNX_STEPS - self.group_steps[group]  # leading quincunx steps that join the next one
        bounds = [0, *range(merged + 1, NUM_QUINCUNX_STEPS + 1)]
        return tuple(Step(group, *self.group_bounds(group), begin, end) for begin, end in pairwise(bounds))

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps in coding order."""
        return tuple(step for group in range(self.num_groups) for step in self.steps_of(group))


def quincunx_steps(height: int, width: int) -> NDArray[np.int64]:
    """Quincunx step of every position: (height, width) int64 in [0, 5)."""
    return QUINCUNX[np.arange(height)[:, None] % 4, np.arange(width)[None, :] % 4]


def positions_of(step: Step, height: int, width: int) -> NDArray[np.int64]:
    """Positions of a step as (n,) int64 indices into the flattened height x width grid, in raster order.

    May be empty: a small grid need not hold every quincunx step.
    """
    quincunx = quincunx_steps(height, width).ravel()
    return np.flatnonzero((quincunx >= step.begin) & (quincunx < step.end))
