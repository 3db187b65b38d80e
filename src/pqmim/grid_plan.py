"""Where things are in a token grid: windows of attention, and neighbors whose channels are mixed in.

Mixing costs no arithmetic: half of the channels of a position come from its eight neighbors. The channels are cut into
16 chunks; a row of channels is put together from chunks of other rows by one look-up.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

OUTSIDE = -float(1 << 20)
"""Added to the score of a key that is outside of the grid."""
NUM_CHUNKS = 16


@dataclass(frozen=True)
class Windows:
    """A grid cut into W windows of T positions.

    Attributes:
        source: (W, T * 16) int32, where the 16 chunks of channels of each place in a window come from, as rows of
            `gather_chunks`; the shift of channels is in it.
        row_of: (h * w,) int64, the place of each position.
        mask: (W, 1, 1, T) float32, `OUTSIDE` for places outside of the grid.
    """

    source: NDArray[np.int32]
    row_of: NDArray[np.int64]
    mask: NDArray[np.float32]


@dataclass(frozen=True)
class GridPlan:
    """Where things are in a grid of one size.

    Attributes:
        shifted: (h * w, 16) int32, where the 16 chunks of channels of each position come from after the shift.
        windows: cut at multiples of the window, and half a window beside them.
    """

    shifted: NDArray[np.int32]
    windows: tuple[Windows, Windows]


@lru_cache(maxsize=4)
def grid_plan(height: int, width: int, window: int) -> GridPlan:
    """The plan of a grid, sides in positions."""
    shifted = _shift_sources(height, width)
    return GridPlan(
        shifted[:-1],
        (_cut(height, width, window, 0, shifted), _cut(height, width, window, window // 2, shifted)),
    )


def _shift_sources(height: int, width: int) -> NDArray[np.int32]:
    """Mixing of neighbors at no arithmetic: half of the channels move by one position, in eight directions.

    Returns:
        (h * w + 1, 16) int32: chunk of C / 16 channels that each chunk comes from; the last row is what lies outside.
    """
    count = height * width
    y, x = np.divmod(np.arange(count), width)
    rows = np.full((count + 1, NUM_CHUNKS), count)
    rows[:count, : NUM_CHUNKS // 2] = np.arange(count)[:, None]
    directions = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
    for chunk, (dy, dx) in enumerate(directions, start=NUM_CHUNKS // 2):
        from_y, from_x = y + dy, x + dx
        is_inside = (from_y >= 0) & (from_y < height) & (from_x >= 0) & (from_x < width)
        rows[:count, chunk] = np.where(is_inside, from_y * width + from_x, count)
    return (rows * NUM_CHUNKS + np.arange(NUM_CHUNKS)).astype(np.int32)


def _cut(height: int, width: int, window: int, offset: int, shifted: NDArray[np.int32]) -> Windows:
    rows, columns = (-(-(offset + side) // window) for side in (height, width))
    grid = np.full((rows * window, columns * window), height * width)
    grid[offset : offset + height, offset : offset + width] = np.arange(height * width).reshape(height, width)
    places = grid.reshape(rows, window, columns, window).transpose(0, 2, 1, 3).reshape(rows * columns, window**2)
    row_of = np.empty(height * width + 1, np.int64)
    row_of[places.ravel()] = np.arange(places.size)
    mask = np.where(places == height * width, np.float32(OUTSIDE), np.float32(0))[:, None, None]
    return Windows(shifted[places].reshape(len(places), -1), row_of[:-1], mask)


def gather_chunks(x: NDArray[np.uint8], source: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Put rows together from chunks of a sixteenth of the channels: (rows, C)."""
    return x.reshape(-1, x.shape[1] // NUM_CHUNKS).take(source.ravel(), axis=0).reshape(-1, x.shape[1])
