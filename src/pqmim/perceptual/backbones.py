"""AlexNet and VGG16 up to their last convolution, trained on ImageNet: what LPIPS and DISTS look with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqmim.errors import ModelError
from pqmim.perceptual.packages import LPIPS, Tensors, converted_weights, package_file, read_numpy_pickle

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Backbone(nn.Module):
    """A network that gives features at five depths.

    Attributes:
        channels: of the five features.
    """

    channels: tuple[int, int, int, int, int]
    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList()
        self.register_buffer("mean", torch.tensor(_IMAGENET_MEAN).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_IMAGENET_STD).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute features.

        Args:
            images: (B, 3, H, W) float in [0, 1].

        Returns:
            Five (B, channels[i], h, w), all >= 0.
        """
        return self._features((images - self.mean) / self.std)

    def pooled(self, images: Tensor) -> Tensor:
        """Return the deepest features' means over the picture: (B, 3, H, W) in [0, 1] -> (B, channels[4])."""
        return self.forward(images)[-1].mean((2, 3))

    def _features(self, x: Tensor) -> list[Tensor]:
        raise NotImplementedError


class AlexNet(Backbone):
    """Source: Krizhevsky 2014, arXiv:1404.5997; features behind each of its five convolutions."""

    channels = (64, 192, 384, 256, 256)

    def __init__(self) -> None:
        super().__init__()
        kernels, inputs = (11, 5, 3, 3, 3), (3, *self.channels[:-1])
        for index, (kernel, source, outputs) in enumerate(zip(kernels, inputs, self.channels, strict=True)):
            stride, padding = (4, 2) if index == 0 else (1, kernel // 2)
            self.convolutions.append(nn.Conv2d(source, outputs, kernel, stride=stride, padding=padding))

    def _features(self, x: Tensor) -> list[Tensor]:
        features = []
        for index, convolution in enumerate(self.convolutions):
            if index in (1, 2):
                x = F.max_pool2d(x, 3, stride=2)
            x = F.relu(convolution(x))
            features.append(x)
        return features


class Vgg16(Backbone):
    """Source: Simonyan and Zisserman 2015, arXiv:1409.1556; features behind the last convolution of each stage.

    Args:
        pooling: one module for each of the four steps between stages, halving the sides; by default the network's own.
    """

    channels = (64, 128, 256, 512, 512)
    _CONVOLUTIONS = (2, 2, 3, 3, 3)

    def __init__(self, pooling: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.pooling = nn.ModuleList(pooling or [nn.MaxPool2d(2) for _ in range(4)])
        source = 3
        for outputs, number in zip(self.channels, self._CONVOLUTIONS, strict=True):
            for _ in range(number):
                self.convolutions.append(nn.Conv2d(source, outputs, 3, padding=1))
                source = outputs

    def _features(self, x: Tensor) -> list[Tensor]:
        features = []
        convolutions = iter(self.convolutions)
        for stage, number in enumerate(self._CONVOLUTIONS):
            if stage > 0:
                x = self.pooling[stage - 1](x)
            for _ in range(number):
                x = F.relu(next(convolutions)(x))
            features.append(x)
        return features


BACKBONES: dict[str, type[Backbone]] = {"alex": AlexNet, "vgg": Vgg16}
_FILES: dict[type[Backbone], tuple[str, str]] = {
    AlexNet: ("weights/alexnet.ckpt", "AlexNet_0"),
    Vgg16: ("weights/vgg16.ckpt", "VGG16_0"),
}


def load_weights(backbone: Backbone) -> list[Tensor]:
    """Give a backbone its trained weights.

    Returns:
        LPIPS' heads for it: five vectors of a weight >= 0 per channel.

    Raises:
        MissingExtraError: the package with the weights is not installed.
        ModelError: its weights cannot be used.
    """
    file, _ = _FILES[type(backbone)]
    name = Path(file).stem

    def convert(source: Path) -> Tensors:
        return _converted(backbone, source)

    tensors = converted_weights(package_file(LPIPS, file), f"lpips-{name}-1", convert)
    weights = {key: torch.from_numpy(tensor) for key, tensor in tensors.items()}
    heads = [weights.pop(f"head.{depth}") for depth in range(5)]
    backbone.convolutions.load_state_dict(weights)
    return heads


def _converted(backbone: Backbone, source: Path) -> Tensors:
    """Turn the package's arrays, (height, width, inputs, outputs), into PyTorch's order."""
    _, network = _FILES[type(backbone)]
    published = read_numpy_pickle(source)
    tensors: Tensors = {}
    try:
        for index in range(len(backbone.convolutions)):
            layer = published[network][f"Conv_{index}"]
            tensors[f"{index}.weight"] = layer["kernel"].transpose(3, 2, 0, 1)
            tensors[f"{index}.bias"] = layer["bias"]
        for depth in range(5):
            tensors[f"head.{depth}"] = published[f"NetLinLayer_{depth}"]["Conv_0"]["kernel"].reshape(-1)
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{source} does not hold the weights of {network}: {error}") from error
    return tensors


def load_backbone(network: str) -> Backbone:
    """Return a trained network by itself, frozen and in eval mode, on the CPU.

    Args:
        network: "alex", or "vgg" (VGG16).

    Raises: as `load_weights`.
    """
    backbone = BACKBONES[network]()
    load_weights(backbone)
    return backbone.eval().requires_grad_(False)
