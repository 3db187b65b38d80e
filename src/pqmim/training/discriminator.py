"""The adversary of a decoder's training: small heads on the features of a trained network, which know what was sent.

A discriminator that has to learn to see from nothing learns slower than a decoder is fine-tuned. Judging by features
of a network trained on photographs, which the distance of features needs anyhow, it learns within some hundred steps
(Sauer et al. 2021, "Projected GANs converge faster", arXiv:2111.01007; differs: features as they are, no random
mixing). Two more heads see what that network is blind to: patterns of a few pixels, in the pixels themselves, and
regularity, meshes and stripes that nature does not draw, as peaks of local spectra.

What was sent can reach it in two ways. As an input beside the features, after Mentzer et al. 2020, "High-fidelity
generative image compression" (HiFiC), arXiv:2006.09965; real is told from decoded by the hinge loss. Or as *labels*,
after Muckley et al. 2023, "Improving statistical fidelity for neural image compression with implicit local likelihood
models" (MS-ILLM), arXiv:2301.11189: it tells which of N kinds of content it sees at each position, or that it sees a
decoded picture. The kinds are clusters of what the leading sub-quantizers of a position were decoded to, where that
paper has the tokens of a network of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from pqmim.config import STRIDE
from pqmim.training.losses import LUMINANCE
from pqmim.training.trainable_quantizer import TrainableQuantizer

Kind = Literal["hinge", "labels"]

KMEANS_ROWS = 4096
"""Rows whose distances are computed at a time."""
WIDTH = 64
DEPTHS = 4
"""Features that have a head, from the finest on; deeper ones see objects, not textures."""


MARGIN = 8
"""Pixels by which the trained network sees less than a crop: room to shift what it sees."""
SPECTRUM_SIDE, SPECTRUM_STRIDE = 16, 8
"""Side of the squares whose spectra are taken, and how far they are apart, pixels."""
SPECTRUM_FLOOR = 36.0
"""Added to the power: that of noise of one grey level under the window, which nobody sees."""
SCALES = (0.75, 1.25)
"""It sees crops scaled at random, for it reads every second pixel, then every second of these: dots that please it at
one place and scale do not at another."""


@dataclass(frozen=True)
class Window:
    """What of a square crop is seen, and how large.

    Attributes:
        top, left, side: pixels of the crop.
        seen_side: pixels, after scaling.
    """

    top: int
    left: int
    side: int
    seen_side: int

    @classmethod
    def middle(cls, crop: int) -> Window:
        """All but the border, as it is."""
        return cls(MARGIN // 2, MARGIN // 2, crop - MARGIN, crop - MARGIN)

    @classmethod
    def draw(cls, crop: int, generator: torch.Generator) -> Window:
        """A random place and scale."""
        top, left = torch.randint(0, MARGIN + 1, (2,), generator=generator).tolist()
        smallest, largest = SCALES
        scale = smallest + (largest - smallest) * float(torch.rand((), generator=generator))
        return cls(top, left, crop - MARGIN, round(scale * (crop - MARGIN)))


@dataclass(frozen=True)
class View:
    """Pictures as the discriminator sees them.

    Attributes:
        pixels: (B, 3, H, W), in [0, 1] or nearly so.
        features: (B, C, h, w) for each depth.
    """

    pixels: Tensor
    features: Sequence[Tensor]

    def detached(self) -> View:
        """The same, nothing of which has a gradient."""
        return View(self.pixels.detach(), [f.detach() for f in self.features])


def local_spectra(pixels: Tensor) -> Tensor:
    """Logarithms of the power spectra of overlapping squares of the luminance under a Hann window.

    Args:
        pixels: (B, 3, H, W) in [0, 1] or nearly so, sides at least `SPECTRUM_SIDE`.

    Returns:
        (B, SIDE * (SIDE / 2 + 1), h, w) float32.
    """
    with torch.autocast(pixels.device.type, enabled=False):
        luminance = torch.einsum("c,bchw->bhw", torch.tensor(LUMINANCE, device=pixels.device), pixels.float()) * 255
        squares = luminance.unfold(1, SPECTRUM_SIDE, SPECTRUM_STRIDE).unfold(2, SPECTRUM_SIDE, SPECTRUM_STRIDE)
        window = torch.hann_window(SPECTRUM_SIDE, device=pixels.device)
        spectrum = torch.fft.rfft2((squares - squares.mean((3, 4), keepdim=True)) * window[:, None] * window)
        power = spectrum.real.square() + spectrum.imag.square()
        spectra: Tensor = (power + SPECTRUM_FLOOR).log().flatten(3).permute(0, 3, 1, 2)
        return spectra


@dataclass(frozen=True)
class SentValues:
    """What was sent for these pictures.

    Attributes:
        values: (B, V, rows, columns) float32, of the leading sub-quantizers.
        window: what is seen of the pictures.
    """

    values: Tensor
    window: Window

    def on_grid(self, grid: Tensor, sent: Tensor) -> Tensor:
        """Something per position, (B, ..., rows, columns), at the places of `grid`, (B, C, h, w), a map of the view."""
        rows, columns = (
            ((torch.arange(count, device=sent.device) + 0.5) * self.window.side / count + start).long() // STRIDE
            for count, start in zip(grid.shape[2:], (self.window.top, self.window.left), strict=True)
        )
        return sent[..., rows[:, None], columns]


class Head(nn.Module):
    """Judges features, at most every fourth pixel.

    Args:
        look: features -> (B, WIDTH, h, w).
        num_values: V, sent values that lie beside them.
        outputs: numbers for each place.
    """

    def __init__(self, look: nn.Module, num_values: int, outputs: int) -> None:
        super().__init__()
        self.look = look
        self.judge = _convolution(WIDTH + num_values, WIDTH, 3)
        self.say = nn.Conv2d(WIDTH, outputs, 1)  # not normalized: as certain as it likes


class Discriminator(nn.Module):
    """Tells photographs from decoded pictures.

    Args:
        kind: how it learns what was sent.
        channels: of the features at each depth, finest first.
        num_values: V, values per position that are sent.
        num_labels: N, kinds of content; of no effect on `hinge`.

    Attributes:
        scale: (V,) float32, typical size of each sent value.
        centers: (N, V) float32, of the clusters, in multiples of `scale`.
        mean0, deviation0, ...: (C,) float32, of the features at a depth; the last, of the spectra.
    """

    scale: Tensor
    centers: Tensor

    def __init__(self, kind: Kind, channels: Sequence[int], num_values: int, num_labels: int) -> None:
        super().__init__()
        self.kind = kind
        self.channels = (*channels[:DEPTHS], SPECTRUM_SIDE * (SPECTRUM_SIDE // 2 + 1))
        has_labels = kind == "labels"
        self.register_buffer("scale", torch.ones(num_values))
        self.register_buffer("centers", torch.zeros(num_labels if has_labels else 0, num_values))
        inputs, outputs = (0, num_labels + 1) if has_labels else (num_values, 1)
        pixels = nn.Sequential(
            _convolution(3, WIDTH // 2, 4), nn.LeakyReLU(0.2), _convolution(WIDTH // 2, WIDTH, 4), nn.LeakyReLU(0.2)
        )
        self.heads = nn.ModuleList([Head(pixels, inputs, outputs)])
        for depth, count in enumerate(self.channels):
            self.register_buffer(f"mean{depth}", torch.zeros(count))
            self.register_buffer(f"deviation{depth}", torch.ones(count))
            look = nn.Sequential(_convolution(count, WIDTH, 4 if depth == 0 else 1), nn.LeakyReLU(0.2))
            self.heads.append(Head(look, inputs, outputs))

    def forward(self, view: View, sent: SentValues) -> list[Tensor]:
        """Judge pictures.

        Returns:
            Logits of each head: (B, N + 1, h, w) of the labels and, last, of "decoded"; or (B, 1, h, w), high for real.
        """
        inputs = [2 * view.pixels - 1]
        for depth, features in enumerate(features_and_spectra(view)):
            mean, deviation = self.get_buffer(f"mean{depth}"), self.get_buffer(f"deviation{depth}")
            inputs.append((features - mean[:, None, None]) / deviation[:, None, None])
        logits = []
        for head, entry in zip(self.heads, inputs, strict=True):
            assert isinstance(head, Head)
            seen = head.look(entry)
            if self.kind == "hinge":
                values = sent.on_grid(seen, sent.values / self.scale[:, None, None])
                seen = torch.cat([seen, values.to(seen.dtype)], dim=1)
            logits.append(head.say(F.leaky_relu(head.judge(seen), 0.2)))
        return logits

    @torch.no_grad()
    def labels(self, values: Tensor) -> Tensor:
        """Nearest cluster of what was sent: (B, V, rows, columns) float32 -> (B, rows, columns) int64."""
        places = (values / self.scale[:, None, None]).permute(0, 2, 3, 1)
        with torch.autocast(values.device.type, enabled=False):
            return torch.cdist(places.flatten(0, 2), self.centers).argmin(1).view(places.shape[:3])

    def own_loss(self, real: Sequence[Tensor], decoded: Sequence[Tensor], sent: SentValues) -> Tensor:
        """What the discriminator learns by, for logits of originals and of decoded pictures: -> (B,) float32."""
        losses = []
        labels = self.labels(sent.values) if self.kind == "labels" else None
        for is_real, is_decoded in zip(real, decoded, strict=True):
            if labels is None:
                places = F.relu(1 - is_real.float()) + F.relu(1 + is_decoded.float())
            else:
                wanted = sent.on_grid(is_real, labels)
                places = F.cross_entropy(is_real.float(), wanted, reduction="none")
                fake = torch.full_like(wanted, len(self.centers))
                places = places + F.cross_entropy(is_decoded.float(), fake, reduction="none")
            losses.append(places.flatten(1).mean(1))
        return torch.stack(losses).mean(0)

    def decoder_loss(self, decoded: Sequence[Tensor], sent: SentValues) -> Tensor:
        """What the decoder learns by, for logits of decoded pictures: to be taken for real, (B,) float32."""
        losses = []
        labels = self.labels(sent.values) if self.kind == "labels" else None
        for is_decoded in decoded:
            if labels is None:
                places = -is_decoded.float()
            else:
                wanted = sent.on_grid(is_decoded, labels)
                places = F.cross_entropy(is_decoded.float(), wanted, reduction="none")
            losses.append(places.flatten(1).mean(1))
        return torch.stack(losses).mean(0)


def leading_values(quantizer: TrainableQuantizer, z_q: Tensor, num_subquantizers: int) -> Tensor:
    """What the leading sub-quantizers of each position were decoded to: (B, D, h, w) -> (B, V, h, w)."""
    return z_q[:, quantizer.order[: quantizer.boundaries[num_subquantizers]]]


def features_and_spectra(view: View) -> list[Tensor]:
    """What heads look at beside the pixels: (B, C, h, w) each."""
    return [*view.features[:DEPTHS], local_spectra(view.pixels)]


@torch.no_grad()
def fit_features(discriminator: Discriminator, view: View) -> None:
    """Set mean and deviation of what heads look at, from some training photos."""
    for depth, values in enumerate(features_and_spectra(view)):
        discriminator.get_buffer(f"mean{depth}").copy_(values.float().mean((0, 2, 3)))
        discriminator.get_buffer(f"deviation{depth}").copy_(values.float().std((0, 2, 3)).clamp_min(1e-6))


@torch.no_grad()
def fit_labels(discriminator: Discriminator, values: Tensor, iterations: int, generator: torch.Generator) -> None:
    """Set the scale of the sent values, and find their clusters by k-means.

    Args:
        values: (n, V) float32, of many positions of training photos, more than there are labels.
        iterations: of k-means.
    """
    discriminator.scale.copy_(values.std(0).clamp_min(1e-6))
    if count := len(discriminator.centers):
        values = values / discriminator.scale.to(values.device)
        centers = values[torch.randperm(len(values), generator=generator)[:count]]
        for _ in range(iterations):
            nearest = torch.cat([torch.cdist(part, centers).argmin(1) for part in values.split(KMEANS_ROWS)])
            used = torch.bincount(nearest, minlength=count)[:, None]
            sums = torch.zeros_like(centers).index_add_(0, nearest, values)
            centers = torch.where(used > 0, sums / used.clamp_min(1), centers)
        discriminator.centers.copy_(centers)


def _convolution(inputs: int, outputs: int, kernel: int) -> nn.Module:
    """Spectrally normalized (Miyato et al. 2018, arXiv:1802.05957); a kernel of 4 halves the sides."""
    return spectral_norm(nn.Conv2d(inputs, outputs, kernel, stride=2 if kernel == 4 else 1, padding=(kernel - 1) // 2))
