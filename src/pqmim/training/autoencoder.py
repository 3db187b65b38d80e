"""Analysis and synthesis transforms: image <-> latent, stride 16, convolutions only.

Each transform is the sum of two paths:

- a *linear path*, one 16 x 16 block transform started as an orthonormal DCT over decorrelated colours, which makes an
  untrained autoencoder as good as a block-transform codec and leaves only the difference to be learned;
- a *convolutional path* of residual blocks at strides 4, 8 and 16, whose last layer starts at zero.

No normalization, attention or position code looks at the whole image, so a tile with a margin of
`TransformConfig.margin` positions gives the same result as the whole picture, and any size works.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pqmim.config import STRIDE, SynthesisConfig, TransformConfig
from pqmim.training.integer_layers import ExactConv2d, ExactLinear, IntegerConv2d, RoundedRectifier, Rounding


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside an identity; starts as the identity.

    Args:
        is_integer: both are products of 8-bit integers (`integer_layers`); the identity and the sum stay float32.
    """

    def __init__(self, channels: int, *, is_integer: bool = False) -> None:
        super().__init__()
        convolution = IntegerConv2d if is_integer else nn.Conv2d
        self.expand = convolution(channels, channels, 3, padding=1)
        self.project = convolution(channels, channels, 3, padding=1)
        self.is_integer = is_integer
        if is_integer:
            self.read, self.between, self.add = Rounding(), RoundedRectifier(), Rounding()
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        if not self.is_integer:
            return x + self.project(F.leaky_relu(self.expand(x), 0.1))  # type: ignore[no-any-return]
        return x + self.add(self.project(self.between(self.expand(self.read(x)))))  # type: ignore[no-any-return]


def block_dct_basis(num_channels: int) -> Tensor:
    """Orthonormal basis of 16 x 16 x 3 blocks: DCT-II over decorrelated colours, most energetic functions first.

    Colours are the grey axis and two axes orthogonal to it. Natural images have power falling with the square of the
    frequency and far less of it in the colour differences; the order follows that rule of thumb.

    Returns:
        (num_channels, 768) float32 with orthonormal rows; columns ordered by color, row, column.
    """
    n = torch.arange(STRIDE, dtype=torch.float64)
    dct = torch.cos(math.pi * (n[None, :] + 0.5) * n[:, None] / STRIDE) * math.sqrt(2 / STRIDE)
    dct[0] /= math.sqrt(2)
    colors = torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64)
    colors /= colors.norm(dim=1, keepdim=True)
    basis = torch.einsum("aC,uy,vx->auvCyx", colors, dct, dct).reshape(3 * STRIDE**2, 3 * STRIDE**2)
    frequency = (n[:, None] + 0.5) ** 2 + (n[None, :] + 0.5) ** 2
    cost = torch.stack([frequency, 8 * frequency, 8 * frequency]).flatten()  # 8: colour energy is about 1/8 of grey
    return basis[cost.argsort(stable=True)[:num_channels]].float()


def full_precision_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply the channels at each place by a matrix: (B, C, h, w), (D, C) -> (B, D, h, w), not in bfloat16."""
    with torch.autocast(x.device.type, enabled=False):
        return F.conv2d(x, weight[:, :, None, None])


class Analysis(nn.Module):
    """Image -> latent."""

    def __init__(self, config: TransformConfig) -> None:
        super().__init__()
        self.config = config
        c4, c8, c16 = config.channels
        n4, n8, n16 = config.blocks
        self.linear = nn.Parameter(block_dct_basis(config.latent_channels))
        self.linear_gain = 255 / config.latent_unit
        self.convolutional = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, c4, 3, padding=1),
            *[ResidualBlock(c4) for _ in range(n4)],
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * c4, c8, 1),
            *[ResidualBlock(c8) for _ in range(n8)],
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * c8, c16, 1),
            *[ResidualBlock(c16) for _ in range(n16)],
        )
        self.head = nn.Conv2d(c16, config.latent_channels, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Transform a batch of images.

        Args:
            x: (B, 3, H, W) float32 in [0, 1], H and W multiples of 16.

        Returns:
            (B, D, H / 16, W / 16) float32; one unit is the quantization step of the finest rate trained for.
        """
        x = x - 0.5
        learned = self.head(self.convolutional(x))
        # Few operations, but they carry the means.
        linear = full_precision_linear(F.pixel_unshuffle(x, STRIDE), self.linear_gain * self.linear)
        return linear + learned.float()  # type: ignore[no-any-return]


class Synthesis(nn.Module):
    """Quantized latent -> reconstruction."""

    def __init__(self, config: SynthesisConfig) -> None:
        super().__init__()
        self.config = config
        c4, c8, c16 = config.channels
        n4, n8, n16 = config.blocks
        self.linear = nn.Parameter(block_dct_basis(config.latent_channels).t().contiguous())
        self.linear_gain = config.latent_unit / 255
        is_integer = bool(config.integer_blocks)
        convolution = ExactConv2d if is_integer else nn.Conv2d
        self.linear_sums = ExactLinear() if is_integer else None
        self.convolutional = nn.Sequential(
            convolution(config.latent_channels, c16, 1),
            *[ResidualBlock(c16, is_integer=is_integer) for _ in range(n16)],
            convolution(c16, 4 * c8, 1),
            nn.PixelShuffle(2),
            *[ResidualBlock(c8, is_integer=is_integer) for _ in range(n8)],
            convolution(c8, 4 * c4, 1),
            nn.PixelShuffle(2),
            *[ResidualBlock(c4, is_integer=is_integer) for _ in range(n4)],
        )
        self.head = convolution(c4, 48, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(self, z: Tensor) -> Tensor:
        """Reconstruct a batch of images.

        Args:
            z: (B, D, h, w) float32, quantized latent.

        Returns:
            (B, 3, 16 h, 16 w) float32, nominally in [0, 1]; not clamped.
        """
        # The latent's scale (tens of units) would swamp the first layer; a fixed factor keeps its inputs near one.
        learned = F.pixel_shuffle(self.head(self.convolutional(0.1 * z)), 4)
        product = self.linear_sums or full_precision_linear
        linear = F.pixel_shuffle(product(z, self.linear_gain * self.linear), STRIDE)
        return linear + learned.float() + 0.5


@torch.no_grad()
def grow(transform: Analysis | Synthesis, earlier: Analysis | Synthesis) -> None:
    """Make a new transform the same function as an earlier one that is at most as wide and as deep.

    New channels are computed, but no old one reads them yet, and new blocks add nothing yet; gradients reach these
    zeros at once. Source: Chen, Goodfellow and Shlens 2016, "Net2Net", arXiv:1511.05641; differs: zeros for copies.

    New channels of the latent hold the next functions of the block transform, which the linear paths see already.

    Args:
        transform: as it is made.

    Raises:
        ValueError: the earlier transform is wider or deeper, or has a latent of another unit.
    """
    if transform.linear_gain != earlier.linear_gain:
        raise ValueError("another latent")
    rows, columns = earlier.linear.shape
    if rows > transform.linear.shape[0] or columns > transform.linear.shape[1]:
        raise ValueError("fewer latent channels")
    transform.linear[:rows, :columns] = earlier.linear
    (layers, blocks), (layers_before, blocks_before) = _layers_and_blocks(transform), _layers_and_blocks(earlier)
    if any(len(before) > len(new) for new, before in zip(blocks, blocks_before, strict=True)):
        raise ValueError("fewer blocks")
    pairs = list(zip(layers, layers_before, strict=True))
    sums = [each.linear_sums for each in (transform, earlier) if isinstance(each, Synthesis) and each.linear_sums]
    if len(sums) == 2:
        pairs.append((sums[0], sums[1]))
    for new, before in zip(blocks, blocks_before, strict=True):
        pairs += zip(new, before, strict=False)
    for module, module_before in pairs:
        for layer, layer_before in zip(_convolutions(module), _convolutions(module_before), strict=True):
            _grow_convolution(layer, layer_before)
        # Only one of the two may have steps of integers.
        for buffer, buffer_before in zip(module.buffers(), module_before.buffers(), strict=False):
            buffer.copy_(buffer_before)


def _layers_and_blocks(transform: Analysis | Synthesis) -> tuple[list[nn.Module], list[list[nn.Module]]]:
    """Modules of the convolutional path and the head that are no residual blocks; the blocks before each of them."""
    layers: list[nn.Module] = []
    blocks: list[list[nn.Module]] = [[]]
    for module in [*transform.convolutional, transform.head]:
        if isinstance(module, ResidualBlock):
            blocks[-1].append(module)
        else:
            layers.append(module)
            blocks.append([])
    return layers, blocks


def _convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [m for m in module.modules() if isinstance(m, nn.Conv2d)]


def _grow_convolution(layer: nn.Conv2d, before: nn.Conv2d) -> None:
    rows, columns = before.weight.shape[:2]
    if rows > layer.weight.shape[0] or columns > layer.weight.shape[1]:
        raise ValueError("fewer channels")
    layer.weight[:rows, columns:] = 0
    layer.weight[:rows, :columns] = before.weight
    assert layer.bias is not None
    assert before.bias is not None
    layer.bias[:rows] = before.bias
