"""EfficientNet-Lite0, trained on ImageNet: features at five depths for losses, pooled ones for distances of sets."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqmim.perceptual.packages import EFFICIENTNET_LITE0, Tensors, converted_weights, package_file

STEM_CHANNELS, HEAD_CHANNELS = 32, 1280
FEATURE_CHANNELS = (16, 24, 40, 112, 320)
_BATCH_NORM_EPSILON = 1e-3
_WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"


class _Stage(NamedTuple):
    """Blocks of one shape; only the first has the stride."""

    kernel: int
    stride: int
    expansion: int
    channels: int
    blocks: int
    is_tapped: bool


_STAGES = (
    _Stage(3, 1, 1, 16, 1, True),
    _Stage(3, 2, 6, 24, 2, True),
    _Stage(5, 2, 6, 40, 2, True),
    _Stage(3, 2, 6, 80, 3, False),
    _Stage(5, 1, 6, 112, 3, True),
    _Stage(5, 2, 6, 192, 4, False),
    _Stage(3, 1, 6, 320, 1, True),
)


class EfficientNetLite0(nn.Module):
    """The network without its classifier, its batch norms folded into the convolutions.

    Source: Tan and Le 2019, arXiv:1905.11946, table 1; Lite: no squeeze-and-excitation, ReLU6, pixels (v - 127) / 128.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Conv(3, STEM_CHANNELS, 3, stride=2)
        self.blocks = nn.ModuleList()
        self._taps: set[int] = set()
        channels = STEM_CHANNELS
        for stage in _STAGES:
            for index in range(stage.blocks):
                stride = stage.stride if index == 0 else 1
                self.blocks.append(_Block(channels, stage.channels, stage.kernel, stride, stage.expansion))
                channels = stage.channels
            if stage.is_tapped:
                self._taps.add(len(self.blocks) - 1)
        self.head = _Conv(channels, HEAD_CHANNELS, 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute features at strides 2, 4, 8, 16 and 32.

        Args:
            images: (B, 3, H, W) float in [0, 1].

        Returns:
            Five (B, FEATURE_CHANNELS[i], ceil(H / 2^(i + 1)), ceil(W / 2^(i + 1))), outputs of linear layers.
        """
        x = F.relu6(self.stem(images * (255 / 128) - 127 / 128))
        features = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self._taps:
                features.append(x)
        return features

    def pooled(self, images: Tensor) -> Tensor:
        """Compute what the classifier sees: (B, 3, H, W) in [0, 1] -> (B, 1280), each number in [0, 6]."""
        return F.relu6(self.head(self.forward(images)[-1])).mean((2, 3))


def load_efficientnet_lite0() -> EfficientNetLite0:
    """Return the trained network, frozen and in eval mode, on the CPU.

    Raises:
        MissingExtraError: its package is not installed.
        ModelError: the package's weights cannot be used.
    """
    source = package_file(EFFICIENTNET_LITE0, _WEIGHTS_FILE)
    weights = converted_weights(source, "efficientnet-lite0-folded-1", fold_batch_norms)
    network = EfficientNetLite0()
    network.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in weights.items()})
    return network.eval().requires_grad_(False)


def fold_batch_norms(file: Path) -> Tensors:
    """Read the package's file and fold each batch norm into the convolution before it, in float64."""
    published: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    pairs = [("stem", "_conv_stem", "_bn0"), ("head", "_conv_head", "_bn1")]
    for block in range(sum(stage.blocks for stage in _STAGES)):
        for ours, convolution, norm in (
            ("expand", "_expand_conv", "_bn0"),
            ("depthwise", "_depthwise_conv", "_bn1"),
            ("project", "_project_conv", "_bn2"),
        ):
            theirs = f"_blocks.{block}."
            if f"{theirs}{convolution}.weight" in published:  # the first block expands nothing
                pairs.append((f"blocks.{block}.{ours}", theirs + convolution, theirs + norm))
    folded: Tensors = {}
    for ours, convolution, norm in pairs:
        gain, shift, mean, variance = (
            published[f"{norm}.{part}"].double().numpy() for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gain / np.sqrt(variance + _BATCH_NORM_EPSILON)
        weight = published[f"{convolution}.weight"].double().numpy()
        folded[f"{ours}.weight"] = (weight * scale[:, None, None, None]).astype(np.float32)
        folded[f"{ours}.bias"] = (shift - mean * scale).astype(np.float32)
    return folded


class _Conv(nn.Conv2d):
    """Convolution with the padding that the network was trained with: as little as covers the input, more at the end.

    Where the stride is 2 and the side even, padding is uneven; PyTorch's own would shift the features by a pixel.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride=stride, groups=groups)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name in nn.Conv2d)
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        if stride == 1:
            return F.conv2d(input, self.weight, self.bias, padding=kernel // 2, groups=self.groups)
        padding = []
        for side in (input.shape[-1], input.shape[-2]):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            padding += [total // 2, total - total // 2]
        return F.conv2d(F.pad(input, padding), self.weight, self.bias, stride=stride, groups=self.groups)


class _Block(nn.Module):
    """Inverted bottleneck: expand, filter each channel, project; added to its input where shapes allow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expand = _Conv(inputs, inner, 1) if expansion > 1 else None
        self.depthwise = _Conv(inner, inner, kernel, stride=stride, groups=inner)
        self.project = _Conv(inner, outputs, 1)
        self._is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        inner = x if self.expand is None else F.relu6(self.expand(x))
        result: Tensor = self.project(F.relu6(self.depthwise(inner)))
        return x + result if self._is_residual else result
