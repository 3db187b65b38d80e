"""Distortions: their gradients against differences, their values against definitions."""

import numpy as np
import pytest
from pictures import synthetic_photo

from pqmim.distortion import DistortionOf, SquaredError, StructuralDissimilarity, planes_of


def noisy(pixels: np.ndarray, deviation: float) -> np.ndarray:
    planes = planes_of(pixels)
    return (planes + np.random.default_rng(1).normal(0, deviation, planes.shape)).astype(np.float32)


@pytest.mark.parametrize("size", [(16, 16), (48, 33), (96, 200)])
@pytest.mark.parametrize("distortion_of", [SquaredError, StructuralDissimilarity])
def test_gradients_are_those_of_the_values(distortion_of: DistortionOf, size: tuple[int, int]) -> None:
    pixels = synthetic_photo(*size)
    picture = noisy(pixels, 0.05)
    distortion = distortion_of(pixels)
    _, gradient = distortion(picture)
    rng = np.random.default_rng(2)
    for _ in range(3):
        direction = rng.normal(0, 1, picture.shape).astype(np.float32) + np.sign(gradient)
        step = 1e-3
        ahead, behind = (distortion(picture + sign * step * direction)[0] for sign in (1, -1))
        along = float((gradient.astype(np.float64) * direction).sum())
        assert (ahead - behind) / (2 * step) == pytest.approx(along, rel=0.02)


@pytest.mark.parametrize("distortion_of", [SquaredError, StructuralDissimilarity])
def test_the_original_has_none(distortion_of: DistortionOf) -> None:
    pixels = synthetic_photo(64, 48)
    distortion = distortion_of(pixels)
    distortion(noisy(pixels, 0.05))
    value, _ = distortion(planes_of(pixels))
    assert value == pytest.approx(0, abs=1e-4)


def test_structure_is_on_the_scale_of_the_squared_error() -> None:
    pixels = synthetic_photo(64, 48)
    picture = noisy(pixels, 0.05)
    lengths = [np.linalg.norm(of(pixels)(picture)[1]) for of in (SquaredError, StructuralDissimilarity)]
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-4)


def test_structure_notices_what_blurs_and_forgives_what_brightens() -> None:
    pixels = synthetic_photo(192, 192)
    planes = planes_of(pixels)
    brighter = planes + np.float32(0.02)
    blurred = planes.copy()
    blurred[..., 1:-1] = (planes[..., :-2] + planes[..., 1:-1] + planes[..., 2:]) / 3
    squared, structural = SquaredError(pixels), StructuralDissimilarity(pixels)
    structural(noisy(pixels, 0.05))
    by_error, by_structure = (d(blurred)[0] / d(brighter)[0] for d in (squared, structural))
    assert by_structure > 2 * by_error
