"""Rate control: the trade-off at which a file has the size that was asked for.

Knows neither networks nor files: it calls a function that encodes and a cheap one that estimates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, TypeVar

MAX_ENCODINGS = 3
"""Encodings that a search may cost."""
TOLERANCE = 0.03
"""A file is good enough within this share below the target."""
AIM = 0.992
"""Share of the target aimed at: what is left is for the error of the last encoding."""
TYPICAL_RATIO = 0.82
"""Real bytes per estimated byte, before anything is known of the image."""
TYPICAL_SLOPE = 1.0
"""Relative change of the real size per relative change of its estimate, before two sizes are known."""
SLOPES = (0.7, 2.5)
"""Range of slopes believed."""


class Sized(Protocol):
    """A result that has a size."""

    @property
    def num_bytes(self) -> int: ...


Encoding = TypeVar("Encoding", bound=Sized)


def search(
    encode: Callable[[float, float], Encoding],
    estimate: Callable[[float], float],
    target: int,
    w_range: tuple[float, float],
    *,
    overhead: Callable[[int], int] = lambda num_bytes: 0,
) -> Encoding:
    """Encode at trade-offs until the size is right.

    Each encoding says how far the estimate is off; two say how that changes with the size.

    Args:
        encode: (w, bytes that the payload should have) -> encoding; the size falls as w rises, about, and a second
            encoding may come nearer to what it should have.
        estimate: w -> bytes of the payload, cheap, wrong by a factor that changes slowly with w; falls as w rises.
        target: bytes.
        w_range: lowest and highest w.
        overhead: bytes of the payload -> bytes around it.

    Returns:
        The largest encoding not above the target, or the smallest of all if none fits.
    """
    best: Encoding | None = None
    tried = set[float]()
    known: list[tuple[float, float]] = []  # logarithms of estimated and real payload
    slope = TYPICAL_SLOPE

    def expected_bytes(w: float) -> float:
        estimated = math.log(max(1.0, estimate(w)))
        at, real = known[-1] if known else (estimated, estimated + math.log(TYPICAL_RATIO))
        payload = math.exp(real + slope * (estimated - at))
        return payload + overhead(round(payload))

    for _ in range(MAX_ENCODINGS):
        w = solve(expected_bytes, AIM * target, w_range)
        if w in tried:  # at an end of the range
            break
        tried.add(w)
        encoding = encode(w, AIM * target - overhead(round(AIM * target)))
        if best is None or _is_better(encoding.num_bytes, best.num_bytes, target):
            best = encoding
        if (1 - TOLERANCE) * target <= encoding.num_bytes <= target:
            break
        payload = max(1, encoding.num_bytes - overhead(encoding.num_bytes))
        known.append((math.log(max(1.0, estimate(w))), math.log(payload)))
        if len(known) > 1 and known[-1][0] != known[-2][0]:
            measured = (known[-1][1] - known[-2][1]) / (known[-1][0] - known[-2][0])
            slope = min(max(measured, SLOPES[0]), SLOPES[1])
    assert best is not None  # there was at least one encoding
    return best


def _is_better(candidate: int, best: int, target: int) -> bool:
    """Whether a size is nearer to the target from below, or else the smaller one above it."""
    if candidate <= target:
        return best > target or candidate > best
    return candidate < best


def solve(function: Callable[[float], float], value: float, w_range: tuple[float, float]) -> float:
    """The w at which a falling function takes a value, to 0.2 %; an end of the range if it does so nowhere inside."""
    low, high = w_range
    if function(low) <= value:
        return low
    if function(high) >= value:
        return high
    while high / low > 1.002:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if function(middle) > value else (low, middle)
    return high
