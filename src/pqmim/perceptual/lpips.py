"""LPIPS, the learned perceptual distance of two pictures, version 0.1 of its weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from pqmim.perceptual.backbones import BACKBONES, Backbone, load_weights

_EPSILON = 1e-10


class Lpips(nn.Module):
    """Weighted squared differences of features whose vectors have length 1, averaged over the picture.

    Source: Zhang et al. 2018, arXiv:1801.03924, equation 1.

    Args:
        heads: a weight per channel for each of the backbone's five features.
    """

    def __init__(self, backbone: Backbone, heads: Sequence[Tensor]) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ParameterList([nn.Parameter(head) for head in heads])

    def features(self, images: Tensor) -> list[Tensor]:
        """The backbone's features of (B, 3, H, W) images in [0, 1]; all that `distance` needs of a picture."""
        features: list[Tensor] = self.backbone(images)
        return features

    def distance(self, originals: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
        """Compare what `features` gave for B pictures each -> (B,); 0 for equal ones."""
        total = originals[0].new_zeros(originals[0].shape[0])
        for original, other, head in zip(originals, others, self.heads, strict=True):
            difference = (_unit(original) - _unit(other)).square()
            total = total + (difference * head[:, None, None]).sum(1).mean((1, 2))
        return total

    def forward(self, originals: Tensor, others: Tensor) -> Tensor:
        """Compare (B, 3, H, W) images in [0, 1] with others -> (B,)."""
        return self.distance(self.features(originals), self.features(others))


def load_lpips(network: str) -> Lpips:
    """Return LPIPS with its published weights, frozen and in eval mode, on the CPU.

    Args:
        network: "alex", or "vgg" (VGG16).

    Raises:
        MissingExtraError: the package with the weights is not installed.
        ModelError: its weights cannot be used.
    """
    backbone = BACKBONES[network]()
    return Lpips(backbone, load_weights(backbone)).eval().requires_grad_(False)


def _unit(features: Tensor) -> Tensor:
    """(B, C, h, w) with the vector of each position divided by its length."""
    return features / (features.square().sum(1, keepdim=True).sqrt() + _EPSILON)
