"""Rate control: the size that was asked for, in few encodings."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pqmim.rate_control import AIM, MAX_ENCODINGS, TOLERANCE, TYPICAL_RATIO, TYPICAL_SLOPE, search

W_RANGE = (0.3, 30.0)


@dataclass(frozen=True)
class Encoding:
    w: float
    num_bytes: int


class Curve:
    """Sizes that are a power of their estimate, which falls with w as a power, with a bend.

    Args:
        largest: bytes of the payload at the lowest w, if there is no error.
        slope: of the logarithm of the estimate.
        bend: added to the slope along the curve.
        error: true size over the expected one, at the lowest w.
        gain: relative change of the true size per relative change of the estimate.
        noise: largest relative deviation of a size, from the encoder's choices.
        overhead: bytes around every payload.
    """

    def __init__(
        self,
        largest: float,
        slope: float = 0.8,
        bend: float = 0.0,
        error: float = 1.0,
        gain: float = TYPICAL_SLOPE,
        noise: float = 0.0,
        seed: int = 0,
        overhead: int = 0,
    ) -> None:
        self.largest, self.slope, self.bend = largest, slope, bend
        self.error, self.gain, self.noise = error, gain, noise
        self.random = np.random.default_rng(seed)
        self.overhead = overhead
        self.encodings: list[Encoding] = []
        self.asked: list[float] = []

    def estimate(self, w: float) -> float:
        span = math.log(W_RANGE[1] / W_RANGE[0])
        x = math.log(w / W_RANGE[0])
        return self.largest / TYPICAL_RATIO * math.exp(-x * (self.slope + self.bend * x / span))

    def size(self, w: float) -> float:
        """Bytes of the payload without noise."""
        return self.error * self.largest * (self.estimate(w) * TYPICAL_RATIO / self.largest) ** self.gain

    def encode(self, w: float, num_bytes: float) -> Encoding:
        deviation = 1 + self.noise * self.random.uniform(-1, 1)
        self.encodings.append(Encoding(w, max(1, round(self.size(w) * deviation)) + self.overhead))
        self.asked.append(num_bytes)
        return self.encodings[-1]

    def search(self, target: int) -> Encoding:
        found = search(self.encode, self.estimate, target, W_RANGE, overhead=lambda num_bytes: self.overhead)
        assert len(self.encodings) <= MAX_ENCODINGS
        assert found in self.encodings
        assert all(W_RANGE[0] * 0.999 <= encoding.w <= W_RANGE[1] * 1.001 for encoding in self.encodings)
        return found


def is_hit(found: Encoding, target: int) -> bool:
    return (1 - TOLERANCE) * target <= found.num_bytes <= target


def w_at(position: float) -> float:
    return W_RANGE[0] * (W_RANGE[1] / W_RANGE[0]) ** position


@settings(max_examples=200)
@given(
    largest=st.floats(20, 1e6),
    slope=st.floats(0.1, 1.2),
    bend=st.floats(-0.05, 0.5),
    error=st.floats(1 / 3, 3),
    gain=st.floats(0.3, 4),
    noise=st.floats(0, 0.02),
    target_share=st.floats(0.001, 2),
    overhead=st.integers(0, 30),
)
def test_never_above_the_target_if_an_encoding_is_not(
    largest: float,
    slope: float,
    bend: float,
    error: float,
    gain: float,
    noise: float,
    target_share: float,
    overhead: int,
) -> None:
    curve = Curve(largest, slope, bend, error, gain, noise, overhead=overhead)
    target = max(1, round(largest * target_share))
    found = curve.search(target)
    fitting = [encoding.num_bytes for encoding in curve.encodings if encoding.num_bytes <= target]
    if fitting:
        assert found.num_bytes == max(fitting)
    else:
        assert found.num_bytes == min(encoding.num_bytes for encoding in curve.encodings)


@settings(max_examples=300)
@given(
    size=st.floats(1e6, 1e8),  # bytes come in whole numbers, also those of a first encoding that is far off
    slope=st.floats(0.5, 1.2),
    bend=st.floats(0, 0.3),
    error=st.floats(0.01, 100),
    gain=st.floats(0.7 * TYPICAL_SLOPE, 1.3 * TYPICAL_SLOPE),
    position=st.floats(0.05, 0.95),
)
def test_smooth_curves_are_hit_within_the_tolerance(
    size: float, slope: float, bend: float, error: float, gain: float, position: float
) -> None:
    """Whatever the factor by which the estimate is off, and though that changes along the curve."""
    shape = Curve(1.0, slope, bend, error, gain)
    curve = Curve(size / shape.size(w_at(position)), slope, bend, error, gain)
    assert is_hit(curve.search(round(size)), round(size))


@settings(max_examples=200)
@given(error=st.floats(1 / 3, 3), noise=st.floats(0, 0.0035), position=st.floats(0.1, 0.9), seed=st.integers(0, 99))
def test_noise_of_a_third_of_a_percent_does_no_harm(error: float, noise: float, position: float, seed: int) -> None:
    """The noise of the encoding that is learned from and of the one that hits, together less than AIM leaves."""
    curve = Curve(100_000, error=error, noise=noise, seed=seed)
    target = round(curve.size(w_at(position)))
    assert is_hit(curve.search(target), target)


def test_a_good_estimate_needs_one_encoding() -> None:
    curve = Curve(50_000, gain=1.0)
    assert is_hit(curve.search(10_000), 10_000)
    assert len(curve.encodings) == 1


def test_a_factor_needs_two() -> None:
    for error in (0.5, 3.0):
        curve = Curve(50_000, error=error)
        assert is_hit(curve.search(10_000), 10_000)
        assert len(curve.encodings) == 2


def test_a_slope_that_is_not_typical_needs_three() -> None:
    for gain in (0.7 * TYPICAL_SLOPE, 1.3 * TYPICAL_SLOPE):
        curve = Curve(50_000, error=2.0, gain=gain)
        assert is_hit(curve.search(10_000), 10_000)
        assert len(curve.encodings) == 3


@pytest.mark.parametrize("error", [0.4, 1.0, 2.5])
def test_beyond_the_ends_of_the_range(error: float) -> None:
    curve = Curve(10_000, error=error)
    found = curve.search(1_000_000)
    assert found.w == pytest.approx(W_RANGE[0])
    assert len(curve.encodings) == 1  # no other can be larger
    curve = Curve(10_000, error=error)
    found = curve.search(1)
    assert found.w == pytest.approx(W_RANGE[1])
    assert len(curve.encodings) == 1


def test_an_end_that_only_seems_to_be_out_of_reach() -> None:
    """The estimate says that the target is beyond an end, the first encoding that it is not."""
    for error, end in ((3.0, 0), (1 / 3, 1)):
        curve = Curve(300_000, error=error, gain=1.0)
        target = round(curve.size(W_RANGE[end]) * (0.6 if end == 0 else 1.5))
        found = curve.search(target)
        assert curve.encodings[0].w == pytest.approx(W_RANGE[end])
        assert is_hit(found, target)


def test_overhead_counts() -> None:
    plain, packed = Curve(50_000, gain=1.0), Curve(50_000, gain=1.0, overhead=1000)
    w = plain.search(5000).w
    found = packed.search(6000)
    assert is_hit(found, 6000)
    assert len(packed.encodings) == 1
    assert found.w == pytest.approx(w, rel=0.01)


def test_encodings_are_asked_for_the_bytes_that_overhead_leaves() -> None:
    curve = Curve(50_000, error=3.0, gain=1.0, overhead=1000)
    curve.search(9000)
    assert len(curve.asked) > 1
    assert curve.asked == pytest.approx([AIM * 9000 - 1000] * len(curve.asked))


@pytest.mark.parametrize("error", [0.4, 1.0, 2.5])
def test_a_large_overhead_does_not_hide_how_far_the_estimate_is_off(error: float) -> None:
    """An alpha channel may be larger than the picture."""
    curve = Curve(20_000, error=error, overhead=5000)
    target = round(curve.size(3.0)) + 5000
    assert is_hit(curve.search(target), target)
    assert len(curve.encodings) <= 2


def test_sizes_that_do_not_move() -> None:
    """A picture whose every encoding is the same, larger or smaller than asked for."""
    for size in (40, 400):
        sizes = []

        def encode(w: float, num_bytes: float, size: int = size, sizes: list[int] = sizes) -> Encoding:
            sizes.append(size)
            return Encoding(w, size)

        assert search(encode, lambda w: 30.0, 100, W_RANGE).num_bytes == size
        assert len(sizes) <= MAX_ENCODINGS
    for estimate in (0.0, 1e-9):
        assert search(lambda w, num_bytes: Encoding(w, 7), lambda w, e=estimate: e, 100, W_RANGE).num_bytes == 7
