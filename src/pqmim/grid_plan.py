"""Where things are in a token grid: windows of attention, and neighbors whose channels are mixed in.

Mixing costs no arithmetic: half of the channels of a position come from its eight neighbors, a sixteenth each.

The places of a window are sorted by quincunx step, so that what is known after a step comes first in every window.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pqmim.schedule import NUM_QUINCUNX_STEPS, QUINCUNX

OUTSIDE = -float(1 << 20)
"""Added to the score of a key that is outside of the grid or has no content."""
NUM_NEIGHBORS = 8


@dataclass(frozen=True)
class Windows:
    """A grid cut into W windows of T places.

    Attributes:
        positions: (W, T) int64, the position at each place; h * w outside of the grid.
        place_of: (h * w,) int64, the place of each position, counted through all windows.
        order: (T,) int64, where each place is in its window, in raster order.
        ends: (6,) int64, number of places before each quincunx step, and of all.
    """

    positions: NDArray[np.int64]
    place_of: NDArray[np.int64]
    order: NDArray[np.int64]
    ends: NDArray[np.int64]


@dataclass(frozen=True)
class GridPlan:
    """Where things are in a grid of one size.

    Attributes:
        neighbors: (h * w + 1, 8) int32, rows of `gather` that the second half of a position's channels comes from; the
            last row is for what lies outside.
        windows: cut at multiples of the window, and half a window beside them.
    """

    neighbors: NDArray[np.int32]
    windows: tuple[Windows, Windows]

    @property
    def count(self) -> int:
        """Positions of the grid."""
        return len(self.neighbors) - 1


@lru_cache(maxsize=4)
def grid_plan(height: int, width: int, window: int) -> GridPlan:
    """The plan of a grid, sides in positions."""
    windows = (_cut(height, width, window, 0), _cut(height, width, window, window // 2))
    return GridPlan(_neighbors(height, width), windows)


def _neighbors(height: int, width: int) -> NDArray[np.int32]:
    count = height * width
    y, x = np.divmod(np.arange(count), width)
    rows = np.full((count + 1, NUM_NEIGHBORS), count)
    directions = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
    for chunk, (dy, dx) in enumerate(directions):
        from_y, from_x = y + dy, x + dx
        is_inside = (from_y >= 0) & (from_y < height) & (from_x >= 0) & (from_x < width)
        rows[:count, chunk] = np.where(is_inside, from_y * width + from_x, count)
    return (rows * NUM_NEIGHBORS + np.arange(NUM_NEIGHBORS)).astype(np.int32)


def _cut(height: int, width: int, window: int, offset: int) -> Windows:
    rows, columns = (-(-(offset + side) // window) for side in (height, width))
    grid = np.full((rows * window, columns * window), height * width)
    grid[offset : offset + height, offset : offset + width] = np.arange(height * width).reshape(height, width)
    y, x = (axis.ravel() - offset for axis in np.mgrid[:window, :window])
    steps = QUINCUNX[y % 4, x % 4]  # the same in every window, whose sides are multiples of 4
    order = np.argsort(steps, kind="stable")
    positions = grid.reshape(rows, window, columns, window).transpose(0, 2, 1, 3).reshape(rows * columns, window**2)
    positions = np.ascontiguousarray(positions[:, order])
    place_of = np.empty(height * width + 1, np.int64)
    place_of[positions.ravel()] = np.arange(positions.size)
    ends = np.searchsorted(steps[order], np.arange(NUM_QUINCUNX_STEPS + 1))
    return Windows(positions, place_of[:-1], order, ends)


def gather(own: NDArray[np.uint8], seen: NDArray[np.uint8], neighbors: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Put channels together: the first half of each position's own, the second from its neighbors.

    Args:
        own: (n, C).
        seen: (rows, C / 2), second halves of what positions show to others.
        neighbors: (n, 8), sixteenths of channels in `seen`.
    """
    half = own.shape[1] // 2
    mixed = np.empty_like(own)
    mixed[:, :half] = own[:, :half]
    mixed[:, half:] = seen.reshape(-1, half // NUM_NEIGHBORS).take(neighbors.ravel(), axis=0).reshape(-1, half)
    return mixed
