"""What a decoded picture is judged by while tokens are chosen: a number, and its gradient.

Pictures are (1, 3, H, W) float32, nominally in [0, 1], as the synthesis gives them. All distortions are on the scale of
a sum of squared errors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Planes = NDArray[np.float32]


class Distortion(Protocol):
    """Distortion against one original."""

    def __call__(self, picture: Planes) -> tuple[float, Planes]:
        """Decoded picture -> distortion, and its gradient, a new array of the same shape."""
        ...


DistortionOf = Callable[[NDArray[np.uint8]], Distortion]
"""Original (H, W, 3) uint8 -> what its decoded picture is judged by."""


def planes_of(pixels: NDArray[np.uint8]) -> Planes:
    """(H, W, 3) uint8 -> (1, 3, H, W) in [0, 1]."""
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], np.float32) * np.float32(1 / 255)


class SquaredError:
    """Sum of squared errors.

    Attributes:
        original: what pictures are compared with.
    """

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        self.original = planes_of(pixels)

    def __call__(self, picture: Planes) -> tuple[float, Planes]:
        """See `Distortion`."""
        error = picture - self.original
        value = float(np.square(error, dtype=np.float64).sum())
        error *= 2
        return value, error


WINDOW = 11
"""Taps of the Gaussian window,"""
WINDOW_DEVIATION = 1.5
"""its standard deviation, pixels."""
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
STABILIZERS = (0.01**2, 0.03**2)
SMALLEST_MEAN = 1e-3
"""What the mean structure of a scale is at least taken for: its power must have a gradient."""


class StructuralDissimilarity:
    """1 - MS-SSIM over RGB, on the scale of the squared error that the first picture has.

    The first call fixes the scale: there the gradient is as long as that of the squared error, so that the trade-off
    between rate and distortion keeps its meaning.

    Source: Wang, Simoncelli and Bovik 2003, "Multiscale structural similarity for image quality assessment". Differs:
    small pictures have fewer scales, as many as the window fits.
    """

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        self._squared_error = SquaredError(pixels)
        levels = [planes_of(pixels)]
        while len(levels) < len(SCALE_WEIGHTS) and min(levels[-1].shape[2:]) // 2 >= WINDOW:
            levels.append(_halved(levels[-1]))
        weights = np.array(SCALE_WEIGHTS[: len(levels)])
        self._weights = weights / weights.sum()
        self._scales = [_Scale(level) for level in levels]
        self._unit: float | None = None

    def __call__(self, picture: Planes) -> tuple[float, Planes]:
        """See `Distortion`."""
        similarity, gradient = self._similarity(picture)
        if self._unit is None:
            _, of_error = self._squared_error(picture)
            length = float(np.linalg.norm(gradient))
            self._unit = float(np.linalg.norm(of_error)) / length if length > 0 else 0.0
        gradient *= np.float32(-self._unit)
        return self._unit * (1 - similarity), gradient

    def _similarity(self, picture: Planes) -> tuple[float, Planes]:
        """MS-SSIM, the mean over the three planes, and its gradient."""
        pictures = [picture]
        for _ in self._scales[1:]:
            pictures.append(_halved(pictures[-1]))
        means, gradients = [], []  # (3,) and (1, 3, H, W) at each scale
        for scale, halved in zip(self._scales, pictures, strict=True):
            mean, gradient = scale(halved, has_luminance=scale is self._scales[-1])
            means.append(np.maximum(mean, SMALLEST_MEAN))
            gradients.append(gradient)
        similarity = np.prod([mean**weight for mean, weight in zip(means, self._weights, strict=True)], axis=0)
        total = np.zeros_like(pictures[-1])
        for index in reversed(range(len(means))):
            if index < len(means) - 1:
                total = _doubled(total, pictures[index].shape)
            share = similarity * self._weights[index] / means[index] / len(similarity)
            total += share.astype(np.float32)[:, None, None] * gradients[index]
        return float(similarity.mean()), total


class _Scale:
    """Structural similarity at one scale."""

    def __init__(self, original: Planes) -> None:
        self._original = original
        self._mean = _filtered(original)
        self._variance = _filtered(np.square(original)) - np.square(self._mean)

    def __call__(self, picture: Planes, *, has_luminance: bool) -> tuple[NDArray[np.float64], Planes]:
        """Mean of contrast and structure over the positions of the window, times luminance if wanted, of each plane.

        Returns:
            (3,), and the gradient of the planes' means with respect to the picture (1, 3, H, W).
        """
        mean = _filtered(picture)
        variance = _filtered(np.square(picture)) - np.square(mean)
        covariance = _filtered(picture * self._original) - mean * self._mean
        below = self._variance + variance + np.float32(STABILIZERS[1])
        structure = (2 * covariance + np.float32(STABILIZERS[1])) / below
        by_covariance, by_variance, by_mean = np.float32(2) / below, -structure / below, np.zeros_like(mean)
        value = structure
        if has_luminance:
            below = np.square(self._mean) + np.square(mean) + np.float32(STABILIZERS[0])
            luminance = (2 * mean * self._mean + np.float32(STABILIZERS[0])) / below
            by_mean = structure * 2 * (self._mean - luminance * mean) / below
            by_covariance, by_variance = by_covariance * luminance, by_variance * luminance
            value = structure * luminance
        by_mean -= by_covariance * self._mean + 2 * by_variance * mean
        gradient = _spread(by_covariance) * self._original + 2 * _spread(by_variance) * picture + _spread(by_mean)
        gradient *= np.float32(1 / value[0, 0].size)
        return value.mean((0, 2, 3), dtype=np.float64), gradient


_TAPS = np.exp(-np.square(np.arange(WINDOW) - WINDOW // 2) / (2 * WINDOW_DEVIATION**2))
_TAPS = (_TAPS / _TAPS.sum()).astype(np.float32)


def _filtered(x: Planes) -> Planes:
    """Weighted means over the window, where it fits: (1, 3, H, W) -> (1, 3, H - 10, W - 10)."""
    for axis in (2, 3):
        length, ahead = x.shape[axis] - WINDOW + 1, (slice(None),) * axis
        lines = [x[(*ahead, slice(tap, tap + length))] for tap in range(WINDOW)]
        total = lines[WINDOW // 2] * _TAPS[WINDOW // 2]
        for tap in range(WINDOW // 2):  # the window is symmetric
            pair = lines[tap] + lines[WINDOW - 1 - tap]
            pair *= _TAPS[tap]
            total += pair
        x = total
    return x


def _spread(gradient: Planes) -> Planes:
    """Adjoint of `_filtered`."""
    margin = WINDOW - 1
    return _filtered(np.pad(gradient, ((0, 0), (0, 0), (margin, margin), (margin, margin))))


def _halved(x: Planes) -> Planes:
    """Means of 2 x 2 pixels; odd sides lose a line."""
    height, width = x.shape[2] // 2, x.shape[3] // 2
    return x[:, :, : 2 * height, : 2 * width].reshape(1, -1, height, 2, width, 2).mean((3, 5))  # type: ignore[no-any-return]


def _doubled(gradient: Planes, shape: tuple[int, ...]) -> Planes:
    """Adjoint of `_halved` for pictures of a shape."""
    out = np.zeros(shape, np.float32)
    wide = np.repeat(np.repeat(gradient, 2, 2), 2, 3) * np.float32(0.25)
    out[:, :, : wide.shape[2], : wide.shape[3]] = wide
    return out
