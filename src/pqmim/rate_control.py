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
AIM = 0.99
"""Share of the target aimed at: what is left is for the error of the estimate."""
TYPICAL_RATIO = 0.75
"""Bytes under the masked model per byte under the static priors, before anything is known of the image."""


class Sized(Protocol):
    """A result that has a size."""

    @property
    def num_bytes(self) -> int: ...


Encoding = TypeVar("Encoding", bound=Sized)


def search(
    encode: Callable[[float], Encoding],
    estimate: Callable[[float], float],
    target: int,
    w_range: tuple[float, float],
    *,
    overhead: Callable[[int], int] = lambda num_bytes: 0,
) -> Encoding:
    """Encode at trade-offs until the size is right.

    Each encoding says how far the estimate is off, which the next one takes into account.

    Args:
        encode: w -> encoding; the size falls as w rises, about.
        estimate: w -> bytes of the payload, cheap, wrong by a factor that changes little with w; falls as w rises.
        target: bytes.
        w_range: lowest and highest w.
        overhead: bytes of the payload -> bytes around it.

    Returns:
        The largest encoding not above the target, or the smallest of all if none fits.
    """
    best: Encoding | None = None
    low, high = (math.log(w) for w in w_range)
    ratio, tried = TYPICAL_RATIO, set[float]()

    def expected_bytes(log_w: float) -> float:
        payload = ratio * estimate(math.exp(log_w))
        return payload + overhead(round(payload))

    for _ in range(MAX_ENCODINGS):
        log_w = _solve(expected_bytes, AIM * target, low, high)
        if log_w in tried:  # at an end of the range
            break
        tried.add(log_w)
        encoding = encode(math.exp(log_w))
        if best is None or _is_better(encoding.num_bytes, best.num_bytes, target):
            best = encoding
        if (1 - TOLERANCE) * target <= encoding.num_bytes <= target:
            break
        payload = max(1, encoding.num_bytes - overhead(encoding.num_bytes))
        ratio = payload / max(1, estimate(math.exp(log_w)))
    assert best is not None  # there was at least one encoding
    return best


def _is_better(candidate: int, best: int, target: int) -> bool:
    """Whether a size is nearer to the target from below, or else the smaller one above it."""
    if candidate <= target:
        return best > target or candidate > best
    return candidate < best


def _solve(function: Callable[[float], float], value: float, low: float, high: float) -> float:
    """Where a falling function takes a value, by bisection to 1/500; an end if it does so nowhere between."""
    if function(low) <= value:
        return low
    if function(high) >= value:
        return high
    while high - low > 0.002:
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > value else (low, middle)
    return high
