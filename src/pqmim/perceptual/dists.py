"""DISTS, the distance of two pictures that forgives one texture for another of its kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqmim.errors import ModelError
from pqmim.perceptual.backbones import Vgg16, load_weights
from pqmim.perceptual.packages import DISTS, Tensors, converted_weights, package_file

_STABILIZER = 1e-6  # c1 and c2 of the paper, as its authors' program has them
_CHANNELS = (3, *Vgg16.channels)


class Dists(nn.Module):
    """One minus the weighted likeness of the means and of the correlations of every feature map, pixels among them.

    Source: Ding et al. 2020, arXiv:2004.07728, equations 5 to 8.

    Args:
        alpha, beta: (1475,), weights of means and of correlations; they are scaled to a sum of 1.
    """

    alpha: Tensor
    beta: Tensor

    def __init__(self, backbone: Vgg16, alpha: Tensor, beta: Tensor) -> None:
        super().__init__()
        self.backbone = backbone
        total = alpha.sum() + beta.sum()
        self.register_buffer("alpha", alpha / total)
        self.register_buffer("beta", beta / total)

    def features(self, images: Tensor) -> list[Tensor]:
        """The images, (B, 3, H, W) in [0, 1], and the backbone's features of them."""
        return [images, *self.backbone(images)]

    def distance(self, originals: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
        """Compare what `features` gave for B pictures each -> (B,); 0 for equal ones."""
        likeness = originals[0].new_zeros(originals[0].shape[0])
        weights = zip(self.alpha.split(_CHANNELS), self.beta.split(_CHANNELS), strict=True)
        for x, y, (alpha, beta) in zip(originals, others, weights, strict=True):
            x_mean, y_mean = x.mean((2, 3)), y.mean((2, 3))
            x_variance = (x - x_mean[..., None, None]).square().mean((2, 3))
            y_variance = (y - y_mean[..., None, None]).square().mean((2, 3))
            covariance = (x * y).mean((2, 3)) - x_mean * y_mean
            means = (2 * x_mean * y_mean + _STABILIZER) / (x_mean.square() + y_mean.square() + _STABILIZER)
            correlations = (2 * covariance + _STABILIZER) / (x_variance + y_variance + _STABILIZER)
            likeness = likeness + (alpha * means + beta * correlations).sum(1)
        return 1 - likeness

    def forward(self, originals: Tensor, others: Tensor) -> Tensor:
        """Compare (B, 3, H, W) images in [0, 1] with others -> (B,).

        They are taken as they are; the authors shrink theirs to 256 pixels on the shorter side first.
        """
        return self.distance(self.features(originals), self.features(others))


def load_dists() -> Dists:
    """Return DISTS with its published weights, frozen and in eval mode, on the CPU.

    Raises:
        MissingExtraError: a package with the weights is not installed.
        ModelError: the weights cannot be used.
    """
    source = package_file(DISTS, "weights.pt")
    weights = converted_weights(source, "dists-1", _converted)
    backbone = Vgg16([_HannPool(channels) for channels in Vgg16.channels[:-1]])
    load_weights(backbone)
    network = Dists(backbone, torch.from_numpy(weights["alpha"]), torch.from_numpy(weights["beta"]))
    return network.eval().requires_grad_(False)


def _converted(source: Path) -> Tensors:
    published: dict[str, Tensor] = torch.load(source, map_location="cpu", weights_only=True)
    tensors: Tensors = {name: published[name].reshape(-1).numpy() for name in ("alpha", "beta") if name in published}
    if any(tensors.get(name, np.empty(0)).shape != (sum(_CHANNELS),) for name in ("alpha", "beta")):
        raise ModelError(f"{source} does not hold the weights of DISTS")
    return tensors


class _HannPool(nn.Module):
    """Halve the sides: root of the mean square under a 3 x 3 Hann window; no aliasing, unlike maximum pooling."""

    window: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        side = torch.hann_window(5, periodic=False)[1:-1]
        window = side[:, None] * side[None, :]
        self.register_buffer("window", (window / window.sum()).expand(channels, 1, 3, 3).clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        energy = F.conv2d(x.square(), self.window, stride=2, padding=1, groups=x.shape[1])
        return (energy + 1e-12).sqrt()
