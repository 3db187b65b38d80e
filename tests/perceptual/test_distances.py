"""LPIPS and DISTS: the published weights, and the formulas written out once more in NumPy."""

from __future__ import annotations

from importlib import resources

import numpy as np
import pytest
import torch
from torch import Tensor

from pqmim.errors import ModelError
from pqmim.perceptual.backbones import AlexNet, Vgg16, load_backbone, load_weights
from pqmim.perceptual.dists import load_dists
from pqmim.perceptual.lpips import load_lpips
from pqmim.perceptual.packages import DISTS, LPIPS, is_installed, package_file, read_numpy_pickle

pytestmark = pytest.mark.skipif(
    not (is_installed(LPIPS) and is_installed(DISTS)), reason="the weights are not installed"
)


def pictures(seed: int, height: int = 64, width: int = 80) -> Tensor:
    """Two smooth pictures."""
    small = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(small, (height, width), mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize(("network", "backbone"), [("alex", AlexNet), ("vgg", Vgg16)])
def test_heads_are_those_of_the_lpips_project(network: str, backbone: type[AlexNet] | type[Vgg16]) -> None:
    """torchmetrics carries the project's own files."""
    file = resources.files("torchmetrics").joinpath("functional", "image", "lpips_models", f"{network}.pth")
    with resources.as_file(file) as path:
        published = torch.load(path, map_location="cpu", weights_only=True)
    heads = load_weights(backbone())
    for depth in range(5):
        assert torch.equal(heads[depth], published[f"lin{depth}.model.1.weight"].reshape(-1))


@pytest.mark.parametrize("network", ["alex", "vgg"])
def test_lpips_is_its_formula(network: str) -> None:
    """Features in PyTorch, everything behind them in NumPy, with the arrays as the package holds them."""
    file = {"alex": "weights/alexnet.ckpt", "vgg": "weights/vgg16.ckpt"}[network]
    published = read_numpy_pickle(package_file(LPIPS, file))
    lpips = load_lpips(network)
    originals, others = pictures(0), pictures(1)
    shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    expected = np.zeros(2)
    ours = [lpips.backbone._features((2 * images - 1 - shift) / scale) for images in (originals, others)]
    for depth, (x, y) in enumerate(zip(*ours, strict=True)):
        a, b = x.double().numpy(), y.double().numpy()
        a, b = (v / (np.linalg.norm(v, axis=1, keepdims=True) + 1e-10) for v in (a, b))
        weight = published[f"NetLinLayer_{depth}"]["Conv_0"]["kernel"].reshape(1, -1, 1, 1)
        expected += ((a - b) ** 2 * weight).sum(1).mean((1, 2))
    np.testing.assert_allclose(lpips(originals, others).numpy(), expected, rtol=1e-4)
    assert lpips(originals, originals).tolist() == [0, 0]


def test_backbone_is_the_published_convolutions() -> None:
    """AlexNet's first two layers, window by window."""
    published = read_numpy_pickle(package_file(LPIPS, "weights/alexnet.ckpt"))["AlexNet_0"]
    backbone = AlexNet()
    load_weights(backbone)
    image = torch.rand(1, 3, 31, 31, generator=torch.Generator().manual_seed(3))
    first, second = (each[0].detach().double().numpy() for each in backbone._features(image)[:2])
    padded = np.pad(image[0].double().numpy(), ((0, 0), (2, 2), (2, 2)))
    kernel, bias = (published["Conv_0"][part].astype(float) for part in ("kernel", "bias"))
    window = padded[:, 4:15, 8:19]  # of the output at row 1, column 2
    np.testing.assert_allclose(
        first[:, 1, 2], np.maximum(0, np.einsum("cij,ijco->o", window, kernel) + bias), atol=1e-4
    )
    pooled = np.array(
        [[first[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((1, 2)) for j in range(3)] for i in range(3)]
    )
    kernel, bias = (published["Conv_1"][part].astype(float) for part in ("kernel", "bias"))
    centre = np.einsum("ijc,ijco->o", pooled, kernel[1:4, 1:4]) + bias  # beyond the 3 x 3 is padding
    np.testing.assert_allclose(second[:, 1, 1], np.maximum(0, centre), atol=1e-4)


def test_dists_is_its_formula() -> None:
    weights = torch.load(package_file(DISTS, "weights.pt"), weights_only=True)
    alpha, beta = (weights[name].double().numpy().reshape(-1) for name in ("alpha", "beta"))
    alpha, beta = alpha / (alpha.sum() + beta.sum()), beta / (alpha.sum() + beta.sum())
    dists = load_dists()
    originals, others = pictures(0), pictures(1)
    features = [[each.double().numpy() for each in dists.features(images)] for images in (originals, others)]
    score, start = np.ones(2), 0
    for x, y in zip(*features, strict=True):
        for channel in range(x.shape[1]):
            for i in range(2):
                a, b = x[i, channel].ravel(), y[i, channel].ravel()
                means = (2 * a.mean() * b.mean() + 1e-6) / (a.mean() ** 2 + b.mean() ** 2 + 1e-6)
                covariance = np.mean((a - a.mean()) * (b - b.mean()))
                likeness = (2 * covariance + 1e-6) / (a.var() + b.var() + 1e-6)
                score[i] -= alpha[start + channel] * means + beta[start + channel] * likeness
        start += x.shape[1]
    assert start == 1475
    np.testing.assert_allclose(dists(originals, others).numpy(), score, rtol=1e-3)
    np.testing.assert_allclose(dists(originals, originals).numpy(), [0, 0], atol=1e-5)


def test_dists_pools_with_a_window_that_keeps_a_constant() -> None:
    pool = load_dists().backbone.pooling[0]
    x = torch.full((1, 64, 8, 8), 3.0)
    assert pool(x).shape == (1, 64, 4, 4)
    torch.testing.assert_close(pool(x)[:, :, 1:, 1:], torch.full((1, 64, 3, 3), 3.0))


@pytest.mark.parametrize("load", [lambda: load_lpips("alex"), load_dists])
def test_gradients_reach_the_pictures_only(load: object) -> None:
    network = load()  # type: ignore[operator]
    others = pictures(1).requires_grad_()
    network(pictures(0), others).sum().backward()
    assert others.grad is not None
    assert float(others.grad.abs().max()) > 0
    assert all(not parameter.requires_grad for parameter in network.parameters())


def test_pooled_features_are_means_of_the_deepest() -> None:
    alex = load_backbone("alex")
    expected = alex(pictures(0))[4].flatten(2).mean(2)
    assert expected.shape == (2, 256)
    torch.testing.assert_close(alex.pooled(pictures(0)), expected)


def test_weights_of_another_network_are_refused() -> None:
    from pqmim.perceptual import backbones

    with pytest.raises(ModelError, match="does not hold the weights of VGG16_0"):
        backbones._converted(Vgg16(), package_file(LPIPS, "weights/alexnet.ckpt"))
