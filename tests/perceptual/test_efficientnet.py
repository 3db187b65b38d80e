"""EfficientNet-Lite0: the folded network is the published one, and sees what is in a picture."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pqmim.perceptual import efficientnet
from pqmim.perceptual.efficientnet import FEATURE_CHANNELS, EfficientNetLite0, load_efficientnet_lite0
from pqmim.perceptual.packages import EFFICIENTNET_LITE0, is_installed, package_file

needs_weights = pytest.mark.skipif(not is_installed(EFFICIENTNET_LITE0), reason="the weights are not installed")


@pytest.mark.parametrize(("height", "width"), [(256, 256), (37, 50), (1, 1)])
def test_features_have_strides_2_to_32_for_any_size(height: int, width: int) -> None:
    features = EfficientNetLite0()(torch.rand(2, 3, height, width))
    assert [tuple(each.shape) for each in features] == [
        (2, channels, -(-height // stride), -(-width // stride))
        for channels, stride in zip(FEATURE_CHANNELS, (2, 4, 8, 16, 32), strict=True)
    ]


def test_uneven_padding_is_at_the_end() -> None:
    """A stride of 2 over an even side: the first window begins at the first pixel."""
    convolution = efficientnet._Conv(1, 1, 3, stride=2)
    with torch.no_grad():
        convolution.weight.zero_()
        convolution.weight[0, 0, 0, 0] = 1
        convolution.bias.zero_()
        picture = torch.arange(16.0).reshape(1, 1, 4, 4)
        assert torch.equal(convolution(picture)[0, 0], picture[0, 0, ::2, ::2])


@needs_weights
def test_folding_keeps_what_the_published_layers_compute() -> None:
    """The first block, written out with its batch norms."""
    file = package_file(EFFICIENTNET_LITE0, "models/efficientnet-lite0-57934424.pth")
    published = torch.load(file, weights_only=True)

    def normed(x: torch.Tensor, name: str) -> torch.Tensor:
        mean, variance, gain, shift = (
            published[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, variance, gain, shift, eps=1e-3)

    images = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    x = F.pad((images * 255 - 127) / 128, (0, 1, 0, 1))
    x = F.relu6(normed(F.conv2d(x, published["_conv_stem.weight"], stride=2), "_bn0"))
    x = F.conv2d(x, published["_blocks.0._depthwise_conv.weight"], padding=1, groups=32)
    x = F.relu6(normed(x, "_blocks.0._bn1"))
    x = normed(F.conv2d(x, published["_blocks.0._project_conv.weight"]), "_blocks.0._bn2")
    torch.testing.assert_close(load_efficientnet_lite0()(images)[0], x, rtol=1e-4, atol=1e-4)


@needs_weights
def test_network_is_frozen_and_passes_gradients_to_pictures() -> None:
    network = load_efficientnet_lite0()
    images = torch.rand(1, 3, 64, 64, requires_grad=True)
    sum(each.square().mean() for each in network(images)).backward()
    assert not network.training
    assert all(not parameter.requires_grad for parameter in network.parameters())
    assert images.grad is not None
    assert images.grad.abs().max() > 0


@needs_weights
def test_pooled_features_are_a_vector_for_each_picture() -> None:
    network = load_efficientnet_lite0()
    images = torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    pooled = network.pooled(images)
    assert pooled.shape == (2, 1280)
    assert 0 <= float(pooled.min()) < float(pooled.max()) <= 6
    torch.testing.assert_close(pooled[:1], network.pooled(images[:1]), rtol=1e-4, atol=1e-5)
