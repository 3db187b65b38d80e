"""Rate control: the size that was asked for, in few encodings."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pqmim.rate_control import MAX_ENCODINGS, TOLERANCE, TYPICAL_RATIO, search

W_RANGE = (0.3, 30.0)


@dataclass(frozen=True)
class Encoding:
    w: float
    num_bytes: int


class Curve:
    """Sizes that fall with w as a power, with a bend; noise from the encoder's choices; an estimate that is off.

    Args:
        largest: bytes at the lowest w.
        slope: of the logarithms.
        bend: added to the slope along the curve.
        error: true size over the expected one, at the lowest w.
        drift: factor by which the error changes up to the highest w.
        noise: largest relative deviation of a size.
    """

    def __init__(
        self,
        largest: float,
        slope: float = 0.8,
        bend: float = 0.0,
        error: float = 1.0,
        drift: float = 1.0,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.largest, self.slope, self.bend = largest, slope, bend
        self.error, self.drift, self.noise = error, drift, noise
        self.random = np.random.default_rng(seed)
        self.encodings: list[Encoding] = []

    def _position(self, w: float) -> float:
        return math.log(w / W_RANGE[0]) / math.log(W_RANGE[1] / W_RANGE[0])

    def estimate(self, w: float) -> float:
        t = self._position(w)
        x = t * math.log(W_RANGE[1] / W_RANGE[0])
        return self.largest / TYPICAL_RATIO * math.exp(-x * (self.slope + self.bend * t))

    def size(self, w: float) -> float:
        return self.estimate(w) * TYPICAL_RATIO * self.error * self.drift ** self._position(w)

    def encode(self, w: float) -> Encoding:
        deviation = 1 + self.noise * self.random.uniform(-1, 1)
        self.encodings.append(Encoding(w, max(1, round(self.size(w) * deviation))))
        return self.encodings[-1]

    def search(self, target: int, overhead: int = 0) -> Encoding:
        found = search(self.encode, self.estimate, target, W_RANGE, overhead=lambda num_bytes: overhead)
        assert len(self.encodings) <= MAX_ENCODINGS
        assert found in self.encodings
        assert all(W_RANGE[0] * 0.999 <= encoding.w <= W_RANGE[1] * 1.001 for encoding in self.encodings)
        return found


@settings(max_examples=200)
@given(
    largest=st.floats(20, 1e6),
    slope=st.floats(0.1, 1.2),
    bend=st.floats(-0.05, 0.5),
    error=st.floats(1 / 3, 3),
    drift=st.floats(0.8, 1.25),
    noise=st.floats(0, 0.02),
    target_share=st.floats(0.001, 2),
    overhead=st.integers(0, 30),
)
def test_never_above_the_target_if_an_encoding_is_not(
    largest: float,
    slope: float,
    bend: float,
    error: float,
    drift: float,
    noise: float,
    target_share: float,
    overhead: int,
) -> None:
    curve = Curve(largest, slope, bend, error, drift, noise)
    target = max(1, round(largest * target_share))
    found = curve.search(target, overhead)
    fitting = [encoding.num_bytes for encoding in curve.encodings if encoding.num_bytes <= target]
    if fitting:
        assert found.num_bytes == max(fitting)
    else:
        assert found.num_bytes == min(encoding.num_bytes for encoding in curve.encodings)


@settings(max_examples=300)
@given(
    largest=st.floats(3000, 1e6),
    slope=st.floats(0.5, 1.2),
    bend=st.floats(0, 0.3),
    error=st.floats(1 / 3, 3),
    drift=st.floats(0.9, 1.1),
    position=st.floats(0.05, 0.95),
)
def test_smooth_curves_are_hit_within_the_tolerance(
    largest: float, slope: float, bend: float, error: float, drift: float, position: float
) -> None:
    curve = Curve(largest, slope, bend, error, drift)
    target = round(curve.size(W_RANGE[0] * (W_RANGE[1] / W_RANGE[0]) ** position))
    if target < 500:  # bytes come in whole numbers
        target = 500
        if not curve.size(W_RANGE[1]) < target < curve.size(W_RANGE[0]):
            return
    found = curve.search(target)
    assert (1 - TOLERANCE) * target <= found.num_bytes <= target


@settings(max_examples=200)
@given(error=st.floats(1 / 3, 3), noise=st.floats(0, 0.005), position=st.floats(0.1, 0.9), seed=st.integers(0, 99))
def test_noise_of_half_a_percent_does_no_harm(error: float, noise: float, position: float, seed: int) -> None:
    curve = Curve(50_000, error=error, noise=noise, seed=seed)
    target = round(curve.size(W_RANGE[0] * (W_RANGE[1] / W_RANGE[0]) ** position))
    found = curve.search(target)
    assert (1 - TOLERANCE) * target <= found.num_bytes <= target


def test_a_good_estimate_needs_one_encoding() -> None:
    curve = Curve(50_000)
    curve.search(10_000)
    assert len(curve.encodings) == 1


def test_a_factor_needs_two() -> None:
    for error in (0.5, 2.0):
        curve = Curve(50_000, error=error)
        curve.search(10_000)
        assert len(curve.encodings) == 2


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
        curve = Curve(30_000, error=error)
        target = round(curve.size(W_RANGE[end]) * (0.6 if end == 0 else 1.5))
        found = curve.search(target)
        assert (1 - TOLERANCE) * target <= found.num_bytes <= target


def test_overhead_counts() -> None:
    plain, packed = Curve(50_000), Curve(50_000)
    w = plain.search(5000).w
    overhead = 1000
    found = search(
        lambda w: Encoding(w, packed.encode(w).num_bytes + overhead),
        packed.estimate,
        5000 + overhead,
        W_RANGE,
        overhead=lambda num_bytes: overhead,
    )
    assert found.num_bytes <= 5000 + overhead
    assert len(packed.encodings) == 1
    assert found.w == pytest.approx(w, rel=0.01)


@pytest.mark.parametrize("error", [0.4, 1.0, 2.5])
def test_a_large_overhead_does_not_hide_how_far_the_estimate_is_off(error: float) -> None:
    """An alpha channel may be larger than the picture."""
    curve = Curve(20_000, error=error)
    overhead = 5000
    target = round(curve.size(3.0)) + overhead

    found = search(
        lambda w: Encoding(w, curve.encode(w).num_bytes + overhead),
        curve.estimate,
        target,
        W_RANGE,
        overhead=lambda num_bytes: overhead,
    )
    assert (1 - TOLERANCE) * target <= found.num_bytes <= target
    assert len(curve.encodings) <= 2


def test_sizes_that_do_not_move() -> None:
    """A picture whose every encoding is the same, larger or smaller than asked for."""
    for size in (40, 400):
        sizes = []

        def encode(w: float, size: int = size, sizes: list[int] = sizes) -> Encoding:
            sizes.append(size)
            return Encoding(w, size)

        assert search(encode, lambda w: 30.0, 100, W_RANGE).num_bytes == size
        assert len(sizes) <= MAX_ENCODINGS
    for estimate in (0.0, 1e-9):
        assert search(lambda w: Encoding(w, 7), lambda w, e=estimate: e, 100, W_RANGE).num_bytes == 7
