"""Metrics and BD-rate."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from pqmim.errors import ConfigError, MissingExtraError
from pqmim.evaluation import metrics, perceptual
from pqmim.evaluation.bd_rate import bd_rate
from pqmim.evaluation.metrics import compute_metric, metric_keys
from pqmim.evaluation.perceptual import hific_patches
from pqmim.evaluation.pixel_metrics import psnr_rgb, psnr_y
from pqmim.perceptual import packages


def photo(height: int = 180, width: int = 200, seed: int = 0) -> np.ndarray:
    """Smooth colors with some noise, (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 17), np.cos(y / 23), np.sin((x + y) / 31)], axis=2)
    return np.clip(128 + 80 * waves + rng.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8)


def test_psnr_of_a_known_error():
    original = np.zeros((4, 4, 3), np.uint8)
    decoded = original.copy()
    decoded[..., 1] = 5
    assert psnr_rgb(original, decoded) == pytest.approx(10 * math.log10(255**2 / (25 / 3)))
    assert psnr_y(original, decoded) == pytest.approx(10 * math.log10(255**2 / (5 * 0.587) ** 2))


@pytest.mark.parametrize(("key", "value"), [("psnr-rgb", 100.0), ("psnr-y", 100.0), ("ms-ssim-rgb", 1.0)])
def test_equal_images(key: str, value: float):
    image = photo()
    assert compute_metric(key, image, image) == pytest.approx(value)


def test_more_noise_is_worse():
    image = photo()
    noise = np.random.default_rng(1).normal(0, 1, image.shape)
    slight, strong = (np.clip(image + s * noise, 0, 255).astype(np.uint8) for s in (4, 16))
    for key in ("psnr-rgb", "psnr-y", "ms-ssim-rgb"):
        assert compute_metric(key, image, slight) > compute_metric(key, image, strong)


def test_ssimulacra2_follows_quality():
    pytest.importorskip("ssimulacra2")
    image = photo(64, 72)
    noise = np.random.default_rng(1).normal(0, 1, image.shape)
    scores = [
        compute_metric("ssimulacra2", image, np.clip(image + s * noise, 0, 255).astype(np.uint8)) for s in (0, 4, 16)
    ]
    assert scores[0] == pytest.approx(100)
    assert scores == sorted(scores, reverse=True)


def test_small_images_have_no_ms_ssim():
    image = photo(160, 300)
    assert compute_metric("ms-ssim-rgb", image, image) is None


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="cannot be compared"):
        compute_metric("psnr-rgb", photo(8, 8), photo(8, 9))


def test_butteraugli_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The program is called with two image files and its 3-norm is read."""
    program = tmp_path / "butteraugli_main"
    program.write_text(
        f"#!{sys.executable}\nimport sys\n"
        "assert all(open(f, 'rb').read(4) == b'\\x89PNG' for f in sys.argv[1:3])\n"
        "print('7.5\\n3-norm: 2.25')\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert metrics.missing_metric("butteraugli") is None
    assert compute_metric("butteraugli", photo(8, 8), photo(8, 8)) == 2.25
    monkeypatch.setenv("PATH", "")
    assert "butteraugli_main" in (metrics.missing_metric("butteraugli") or "")


def test_names():
    assert metric_keys(["psnr", "ms-ssim", "psnr-rgb"]) == ("psnr-rgb", "ms-ssim-rgb")
    with pytest.raises(ConfigError, match="no metric 'vmaf'"):
        metric_keys(["vmaf"])


def test_perceptual_metrics_are_refused_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics, "_require_modules", lambda *names: None)
    with pytest.raises(ConfigError, match="name their folder"):
        metrics.check_weights(["psnr-rgb", "fid256"], None)
    with pytest.raises(ConfigError, match=r"inception.*not there"):
        metrics.check_weights(["fid256"], tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth").touch()
    metrics.check_weights(["fid256", "kid256"], tmp_path)


def test_perceptual_metrics_name_the_missing_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(MissingExtraError, match=r"torch-fidelity .*pqmim\[fid\]"):
        metrics.check_weights(["fid256"], None)
    monkeypatch.setattr(packages, "is_installed", lambda package: package is not packages.DISTS)
    with pytest.raises(MissingExtraError, match=r"dists-pytorch .*pip install --no-deps .* dists-pytorch==0\.1"):
        metrics.check_weights(["lpips-alex", "dists"], None)


def test_what_needs_an_extra_names_it(monkeypatch: pytest.MonkeyPatch):
    for package in ("pytorch_msssim", "ssimulacra2", "bjontegaard"):
        monkeypatch.setitem(sys.modules, package, None)
    image = photo()
    for key, name in (("ms-ssim-rgb", "pytorch-msssim"), ("ssimulacra2", "ssimulacra2")):
        assert metrics.missing_metric(key) == f"the package {name} is not installed"
        with pytest.raises(MissingExtraError, match=rf"{name} .*pqmim\[eval\]"):
            compute_metric(key, image, image)
    with pytest.raises(MissingExtraError, match=r"bjontegaard .*pqmim\[eval\]"):
        bd_rate(RATES, QUALITIES, RATES, QUALITIES)


def test_perceptual_distance_with_a_stand_in_network():
    """A network gets both images as float batches in [0, 1]."""
    import torch

    def network(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert a.shape == b.shape == (1, 3, 6, 7)
        assert a.dtype == torch.float32
        return (a - b).abs().max()

    black, white = np.zeros((6, 7, 3), np.uint8), np.full((6, 7, 3), 255, np.uint8)
    assert perceptual.perceptual_distance(network, black, white) == 1.0


def test_hific_patches():
    """Kodak: 6 patches at the origin and 2 shifted by half a patch."""
    image = photo(512, 768)
    patches = list(hific_patches(image))
    assert len(patches) == 8
    assert np.array_equal(patches[6], image[128:384, 128:384])
    assert list(hific_patches(photo(255, 700))) == []


def test_inception_distances_with_a_stand_in_network():
    pytest.importorskip("torchmetrics")
    import torch

    class Features(torch.nn.Module):
        """Eight numbers per patch: mean and spread of the channels, and two mixtures."""

        num_features = 8

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            assert images.dtype == torch.uint8
            x = images.float().flatten(2)
            mean, spread = x.mean(2), x.std(2)
            return torch.cat([mean, spread, mean[:, :2] * spread[:, :2] / 100], dim=1)

    keys = ("fid256", "kid256")
    originals = [photo(256, 512, seed) for seed in range(8)]
    noisy = [np.clip(p + 40.0 * (p > 128), 0, 255).astype(np.uint8) for p in originals]
    same = perceptual.inception_distances(zip(originals, originals, strict=True), keys, Features())
    other = perceptual.inception_distances(zip(originals, noisy, strict=True), keys, Features())
    assert same["fid256"] == pytest.approx(0, abs=1e-2)
    assert other["fid256"] > 1
    assert other["kid256"] > same["kid256"]
    assert perceptual.inception_distances([(photo(9, 9), photo(9, 9))], keys, Features()) == dict.fromkeys(keys)


RATES = (0.1, 0.2, 0.4, 0.8, 1.6)
QUALITIES = (26.0, 28.5, 31.2, 34.0, 37.1)


def test_bd_rate_of_equal_curves_is_zero():
    result = bd_rate(RATES, QUALITIES, RATES, QUALITIES)
    assert result.percent == pytest.approx(0, abs=1e-9)
    assert (result.low, result.high) == (26.0, 37.1)


def test_bd_rate_of_a_cheaper_curve():
    cheaper = [0.9 * rate for rate in RATES]
    assert bd_rate(RATES, QUALITIES, cheaper, QUALITIES).percent == pytest.approx(-10)
    assert bd_rate(cheaper, QUALITIES, RATES, QUALITIES).percent == pytest.approx(100 / 9)


def test_bd_rate_by_hand():
    """Straight lines of log rate over quality, so that the integral can be done on paper.

    From 30 to 40 dB the anchor goes from 1 to 2 bpp and the test from 0.5 to 2: the log2 of their ratio goes
    linearly from -1 to 0, on average -1/2, hence a rate of 2^-0.5 = 70.71 %.
    """
    result = bd_rate((1, 2), (30, 40), (0.5, 2), (30, 40))
    assert result.percent == pytest.approx(-29.2893, abs=1e-4)


def test_bd_rate_uses_only_the_overlap():
    """The test reaches from 35 to 45 dB: between 35 and 40 its log2 rate is 1 below the anchor's."""
    result = bd_rate((1, 2), (30, 40), (2**-0.5, 2**0.5), (35, 45))
    assert (result.low, result.high) == (35, 40)
    assert result.percent == pytest.approx(-50)


def test_bd_rate_without_overlap():
    assert bd_rate((1, 2), (30, 40), (1, 2), (41, 45)).percent is None


def test_bd_rate_takes_unsorted_points_and_drops_useless_ones():
    rates, qualities = [*RATES[::-1], 0.5], [*QUALITIES[::-1], 31.0]  # 0.5 bpp for less than 0.4 bpp gave
    assert bd_rate(RATES, QUALITIES, rates, qualities).percent == pytest.approx(0, abs=1e-9)
