"""The adversary of a decoder's training: a small U-Net that knows what was sent, and labels of our own tokens.

What was sent can reach it in two ways. As *labels*, after Muckley et al. 2023, "Improving statistical fidelity for
neural image compression with implicit local likelihood models" (MS-ILLM), arXiv:2301.11189: the network tells which of
N kinds of content it sees at each position, or that it sees a decoded picture. The kinds are clusters of what the
leading sub-quantizers of a position were decoded to, where that paper has the tokens of a network of its own. Or as an
input, after Mentzer et al. 2020, "High-fidelity generative image compression" (HiFiC), arXiv:2006.09965: the sent
values lie beside the features, and the network tells real from decoded by the hinge loss.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from pqmim.training.trainable_quantizer import TrainableQuantizer, fit_codebook

Kind = Literal["labels", "hinge"]

WIDTHS = (48, 96, 160, 224)
"""Channels at strides 2, 4, 8 and 16."""
OUTPUT_STRIDE, SENT_STRIDE = 8, 16
SENT_WIDTH = 32
"""Channels that sent values are given where they are an input."""


class Discriminator(nn.Module):
    """Judges pictures at stride 8, by features down to stride 16.

    Args:
        kind: how it learns what was sent.
        num_values: C, values per position that it is told.
        num_labels: N, kinds of content; of no effect on `hinge`.

    Attributes:
        scale: (C,) float32, typical size of each sent value.
        centers: (N, C) float32, of the clusters, in multiples of `scale`.
    """

    scale: Tensor
    centers: Tensor

    def __init__(self, kind: Kind, num_values: int, num_labels: int) -> None:
        super().__init__()
        self.kind = kind
        c2, c4, c8, c16 = WIDTHS
        self.down2 = _convolution(3, c2, 4)
        self.down4 = _convolution(c2, c4, 4)
        self.same4 = _convolution(c4, c4, 3)
        self.down8 = _convolution(c4, c8, 4)
        self.down16 = _convolution(c8, c16, 4)
        self.sent = _convolution(num_values, SENT_WIDTH, 1) if kind == "hinge" else None
        self.up8 = _convolution(c16 + c8 + (SENT_WIDTH if kind == "hinge" else 0), c8, 3)
        # Not normalized: what it says may be as certain as it is.
        self.head = nn.Conv2d(c8, num_labels + 1 if kind == "labels" else 1, 1)
        self.register_buffer("scale", torch.ones(num_values))
        self.register_buffer("centers", torch.zeros(num_labels if kind == "labels" else 0, num_values))

    def forward(self, x: Tensor, values: Tensor) -> Tensor:
        """Judge pictures.

        Args:
            x: (B, 3, H, W) float32, in [0, 1] or nearly so.
            values: (B, C, H / 16, W / 16) float32, what was sent.

        Returns:
            Logits at stride 8, (B, N + 1, H / 8, W / 8) of the labels and, last, of "decoded"; or (B, 1, H / 8, W / 8),
            high for real.
        """
        x4 = _rectified(self.same4(_rectified(self.down4(_rectified(self.down2(2 * x - 1))))))
        x8 = _rectified(self.down8(x4))
        features = [F.interpolate(_rectified(self.down16(x8)), scale_factor=2.0), x8]
        if self.sent is not None:
            sent = _rectified(self.sent(values / self.scale[:, None, None]))
            features.append(F.interpolate(sent, scale_factor=2.0).to(x8.dtype))
        return self.head(_rectified(self.up8(torch.cat(features, dim=1))))  # type: ignore[no-any-return]

    @torch.no_grad()
    def labels(self, values: Tensor) -> Tensor:
        """Nearest cluster of what was sent, at the stride of the logits: (B, C, h, w) -> (B, 2 h, 2 w) int64."""
        places = (values / self.scale[:, None, None]).permute(0, 2, 3, 1)
        with torch.autocast(values.device.type, enabled=False):
            nearest = torch.cdist(places.flatten(0, 2), self.centers).argmin(1).view(places.shape[:3])
        ratio = SENT_STRIDE // OUTPUT_STRIDE
        return nearest.repeat_interleave(ratio, dim=1).repeat_interleave(ratio, dim=2)

    def own_loss(self, real: Tensor, decoded: Tensor, values: Tensor) -> Tensor:
        """What the discriminator learns by, for logits of originals and of decoded pictures: -> (B,) float32."""
        real, decoded = real.float(), decoded.float()
        if self.kind == "hinge":
            return (F.relu(1 - real) + F.relu(1 + decoded)).mean((1, 2, 3))
        labels = self.labels(values)
        is_decoded = torch.full_like(labels, len(self.centers))
        losses = F.cross_entropy(real, labels, reduction="none")
        losses = losses + F.cross_entropy(decoded, is_decoded, reduction="none")
        return losses.mean((1, 2))

    def decoder_loss(self, decoded: Tensor, values: Tensor) -> Tensor:
        """What the decoder learns by, for logits of decoded pictures: to be taken for real, (B,) float32."""
        if self.kind == "hinge":
            return -decoded.float().mean((1, 2, 3))
        return F.cross_entropy(decoded.float(), self.labels(values), reduction="none").mean((1, 2))


def leading_values(quantizer: TrainableQuantizer, z_q: Tensor, num_subquantizers: int) -> Tensor:
    """What the leading sub-quantizers of each position were decoded to: (B, D, h, w) -> (B, C, h, w)."""
    return z_q[:, quantizer.order[: quantizer.boundaries[num_subquantizers]]]


@torch.no_grad()
def fit_labels(discriminator: Discriminator, values: Tensor, iterations: int, generator: torch.Generator) -> None:
    """Set the scale of the sent values, and find their clusters by k-means.

    Args:
        values: (n, C) float32, of many positions of training photos, more than there are labels.
        iterations: of k-means.
    """
    discriminator.scale.copy_(values.std(0).clamp_min(1e-6))
    if count := len(discriminator.centers):
        values = values / discriminator.scale.to(values.device)
        start = values[torch.randperm(len(values), generator=generator)[:count]]
        shares = torch.full((count,), 1 / count)
        centers, _ = fit_codebook(values, count, 0.0, iterations, generator, (start, shares))  # bits are free: k-means
        discriminator.centers.copy_(centers)


def _convolution(inputs: int, outputs: int, kernel: int) -> nn.Module:
    """Spectrally normalized (Miyato et al. 2018, arXiv:1802.05957); a kernel of 4 halves the sides."""
    return spectral_norm(nn.Conv2d(inputs, outputs, kernel, stride=2 if kernel == 4 else 1, padding=(kernel - 1) // 2))


def _rectified(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)
