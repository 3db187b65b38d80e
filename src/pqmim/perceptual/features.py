"""How far apart two pictures are for a network that names objects, and a judge of decoded pictures made of that."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pqmim.distortion import Planes, SquaredError
from pqmim.perceptual.efficientnet import load_efficientnet_lite0

SQUARED_ERROR_SHARE = 0.5
"""Weight of the squared error in the distortion; chosen on the validation photos."""
TEXTURE_SIDE, SMALLEST_TEXTURE = 32, 4
"""Side of the squares whose textures are compared, pixels; fewer features along it than the second are no texture."""


def feature_distance(decoded: Sequence[Tensor], original: Sequence[Tensor]) -> Tensor:
    """How far apart two pictures are for a network: the mean over its depths of |a - b|^2, a and b of unit length.

    Source: Zhang et al. 2018 (LPIPS), arXiv:1801.03924, section 3; differs: channels have equal weights, which asks
    for no judgements by people.

    Args:
        decoded, original: features of each depth, (B, C, h, w).

    Returns:
        (B,) float32 in [0, 4].
    """
    distances = [
        (F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).square().sum(1).mean((1, 2))
        for a, b in zip(decoded, original, strict=True)
    ]
    return torch.stack(distances).mean(0)


def texture_distance(decoded: Sequence[Tensor], original: Sequence[Tensor]) -> Tensor:
    """How differently two pictures are textured for a network, wherever the texture's details lie.

    Means and standard deviations of the features, each of unit length as for `feature_distance`, in squares of
    `TEXTURE_SIDE` pixels, at the strides below it; the squared distance of two normal distributions that have them.
    Source: Qiu et al. 2024, "Wasserstein distortion", arXiv:2310.03629; differs: another network, one size of squares.

    Args:
        decoded, original: features of each depth, (B, C, h, w), the finest at stride 2, each next one at twice that.

    Returns:
        (B,) float32, mean over depths and squares.
    """
    distances = []
    for depth, features in enumerate(zip(decoded, original, strict=True)):
        side = TEXTURE_SIDE >> (depth + 1)
        if side < SMALLEST_TEXTURE:
            break
        means, deviations = [], []
        for unit in (F.normalize(f.float(), dim=1) for f in features):
            mean = F.avg_pool2d(unit, side, side // 2)
            variance = F.avg_pool2d(unit.square(), side, side // 2) - mean.square()
            means.append(mean)
            deviations.append((variance.clamp_min(0) + 1e-4).sqrt())  # the constant keeps gradients finite
        squares = [(a - b).square().sum(1).mean((1, 2)) for a, b in (means, deviations)]
        distances.append(squares[0] + squares[1])
    return torch.stack(distances).mean(0)


class FeatureErrors:
    """Makes the distortion of a decoded picture for EfficientNet-Lite0; a `distortion.DistortionOf`.

    It computes on the CPU, with as many threads as PyTorch has.

    Raises:
        MissingExtraError: the package with the network's weights is not installed.
        ModelError: its weights cannot be used.
    """

    def __init__(self) -> None:
        self._network = load_efficientnet_lite0()

    def __call__(self, pixels: NDArray[np.uint8]) -> FeatureError:
        """Original (H, W, 3) uint8 -> what its decoded picture is judged by."""
        return FeatureError(self._network, pixels)


class FeatureError:
    """Distance of features and a share of the squared error, on the scale of the squared error of the first picture.

    The first call fixes the scale of the distance: there its gradient is as long as that of the squared error, so that
    the trade-off between rate and distortion keeps its meaning.

    Args:
        network: (1, 3, H, W) in [0, 1] -> features at several depths; frozen.
        pixels: (H, W, 3) uint8, the original.
    """

    def __init__(self, network: nn.Module, pixels: NDArray[np.uint8]) -> None:
        self._network = network
        self._squared_error = SquaredError(pixels)
        with torch.no_grad():
            self._features: list[Tensor] = network(torch.from_numpy(self._squared_error.original))
        self._unit: float | None = None

    def __call__(self, picture: Planes) -> tuple[float, Planes]:
        """See `distortion.Distortion`."""
        error, gradient = self._squared_error(picture)
        shown = torch.from_numpy(picture).requires_grad_()
        distance = feature_distance(self._network(shown.clamp(0, 1)), self._features).sum()
        (of_distance,) = torch.autograd.grad(distance, shown)
        if self._unit is None:
            length = float(of_distance.norm())
            self._unit = float(np.linalg.norm(gradient)) / length if length > 0 else 0.0
        weight = (1 - SQUARED_ERROR_SHARE) * self._unit
        gradient *= np.float32(SQUARED_ERROR_SHARE)
        gradient += np.float32(weight) * of_distance.numpy()
        return SQUARED_ERROR_SHARE * error + weight * float(distance.detach()), gradient
