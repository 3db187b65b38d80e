"""The kernel distance of paired sets: by its definition, unbiased, with intervals over pictures."""

from itertools import product

import numpy as np
import pytest

from pqmim.evaluation import perceptual
from pqmim.evaluation.kid import bootstrap_mean, kernel_distance
from pqmim.perceptual.packages import EFFICIENTNET_LITE0, LPIPS, is_installed

RANDOM = np.random.default_rng(5)


def features(number: int, dimensions: int = 6) -> np.ndarray:
    return np.random.default_rng(number).normal(0.5, 1, (number, dimensions)).astype(np.float32)


def test_distance_by_its_definition():
    """All pairs of patches of different pictures, term by term."""
    x = features(7)
    y = x + features(8)[:7] * 0.3
    pictures = [3, 3, 0, 0, 0, 1, 9]

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.dot(a.astype(float), b.astype(float)) / 6 + 1) ** 3

    terms = [
        kernel(x[i], x[j]) + kernel(y[i], y[j]) - kernel(x[i], y[j]) - kernel(y[i], x[j])
        for i, j in product(range(7), repeat=2)
        if pictures[i] != pictures[j]
    ]
    assert kernel_distance(x, y, pictures).value == pytest.approx(np.mean(terms))


def test_equal_sets_have_no_distance():
    x = features(12)
    estimate = kernel_distance(x, x, range(12))
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0, 0, 0), abs=1e-9)


def test_one_picture_tells_nothing():
    x = features(5)
    assert kernel_distance(x, x + 1, [4] * 5) is None
    assert kernel_distance(x[:0], x[:0], []) is None


def test_estimate_is_unbiased_where_the_biased_one_is_not():
    """Reconstructions with noise of their own and nothing else: the mean over many small sets is the distance.

    With x of one dimension, standard normal, and y = x + e, e of variance 1, both kernels' means are known:
    E k(x, x') = 1 + 3 E(xx')^2 = 4, E k(y, y') = 1 + 3 * 2 * 2 = 13, E k(x, y') = 1 + 3 * 1 * 2 = 7.
    """
    random = np.random.default_rng(1)
    values = []
    for _ in range(4000):
        x = random.normal(size=(6, 1)).astype(np.float32)
        y = x + random.normal(size=(6, 1)).astype(np.float32)
        cross = (x @ y.T + 1) ** 3
        terms = (x @ x.T + 1) ** 3 + (y @ y.T + 1) ** 3 - cross - cross.T
        values.append((terms.sum() - np.trace(terms)) / 30)
        assert len(values) > 3 or kernel_distance(x, y, range(6)).value == pytest.approx(values[-1], rel=1e-4)
    assert np.mean(values) == pytest.approx(4 + 13 - 2 * 7, abs=4 * float(np.std(values)) / 4000**0.5)


def test_interval_holds_the_value_and_narrows():
    x, noise = features(200), features(201)[:200]
    few = kernel_distance(x[:40], x[:40] + 0.5 + 0.2 * noise[:40], range(40))
    many = kernel_distance(x, x + 0.5 + 0.2 * noise, range(200))
    for estimate in (few, many):
        assert estimate.low < estimate.value < estimate.high
    assert many.high - many.low < few.high - few.low


def test_mean_with_its_interval():
    estimate = bootstrap_mean(np.array([1.0, 3.0, 5.0, 7.0]), [0, 0, 1, 1])
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((4, 2, 6))


@pytest.mark.parametrize("key", ["kid-lite0", "kid-alex"])
def test_networks_tell_damage_from_none(key: str):
    """Two photos of three patches each, once as they are and once in blocks of 8 pixels."""
    if not is_installed(EFFICIENTNET_LITE0 if key == "kid-lite0" else LPIPS):
        pytest.skip("the weights are not installed")
    photos = [RANDOM.integers(0, 256, (256, 768, 3)).astype(np.uint8) for _ in range(3)]
    blocks = [np.repeat(np.repeat(photo[4::8, 4::8], 8, 0), 8, 1) for photo in photos]
    networks = {key: perceptual.load_pooled(key)}
    same, number = perceptual.kernel_distances(zip(photos, photos, strict=True), networks)
    assert number == 9
    assert same[key].value == pytest.approx(0, abs=1e-9)
    damaged, _ = perceptual.kernel_distances(zip(photos, blocks, strict=True), networks)
    assert damaged[key].low > 0.01
    tiny = [np.zeros((9, 9, 3), np.uint8)] * 2
    assert perceptual.kernel_distances([tuple(tiny)], networks) == ({key: None}, 0)
