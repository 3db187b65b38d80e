"""Distortion metrics between 8-bit RGB images, and BD-rate between curves.

Pixel metrics compare one image with its reconstruction. Perceptual ones need a trained network, whose
weights the user names; two of them (FID, KID) compare whole sets. Heavy packages are imported when a metric
is first used.
"""

from __future__ import annotations

import importlib
import math
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pqmim.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from torch import Tensor, nn

Pixels = NDArray[np.uint8]
"""(H, W, 3) uint8, sRGB."""

PSNR_OF_EQUAL_IMAGES = 100.0  # dB; instead of infinity, so that means stay finite
MS_SSIM_MIN_SIDE = 161  # pixels: five scales and an 11-pixel window
HIFIC_PATCH = 256  # pixels per side


@dataclass(frozen=True)
class Metric:
    """A metric that evaluation knows.

    Attributes:
        key: name in results files; CompressAI's where it has one.
        label: for a plot's axis, with the unit.
        is_better_higher: direction.
        needs_weights: a trained network, see `check_weights`.
        of_sets: compares all images of a data set at once, not image by image.
    """

    key: str
    label: str
    is_better_higher: bool = True
    needs_weights: bool = False
    of_sets: bool = False


METRICS = {
    metric.key: metric
    for metric in (
        Metric("psnr-rgb", "PSNR RGB (dB)"),
        Metric("psnr-y", "PSNR Y (dB)"),
        Metric("ms-ssim-rgb", "MS-SSIM RGB"),
        Metric("ssimulacra2", "SSIMULACRA2"),
        Metric("butteraugli", "Butteraugli (3-norm)", is_better_higher=False),
        Metric("lpips", "LPIPS (AlexNet)", is_better_higher=False, needs_weights=True),
        Metric("dists", "DISTS", is_better_higher=False, needs_weights=True),
        Metric("fid256", "FID/256", is_better_higher=False, needs_weights=True, of_sets=True),
        Metric("kid256", "KID/256", is_better_higher=False, needs_weights=True, of_sets=True),
    )
}
_ALIASES = {"psnr": "psnr-rgb", "ms-ssim": "ms-ssim-rgb", "fid": "fid256", "kid": "kid256"}

# What torchmetrics and torch-fidelity look for in torch's hub folder.
_WEIGHT_FILES = {
    "lpips": "checkpoints/alexnet-owt-7be5be79.pth",
    "dists": "checkpoints/vgg16-397923af.pth",
    "fid256": "checkpoints/weights-inception-2015-12-05-6726825d.pth",
    "kid256": "checkpoints/weights-inception-2015-12-05-6726825d.pth",
}


def metric_keys(names: Iterable[str]) -> tuple[str, ...]:
    """Turn the names that users write (`psnr`, `ms-ssim`, ...) into keys, each once.

    Raises:
        ConfigError: no such metric.
    """
    keys: dict[str, None] = {}
    for name in names:
        key = _ALIASES.get(name, name)
        if key not in METRICS:
            raise ConfigError(f"no metric {name!r}; there are {', '.join(METRICS)}")
        keys[key] = None
    return tuple(keys)


def missing_metric(key: str) -> str | None:
    """Say why a metric cannot be computed here; None if it can. Weights are checked by `check_weights`."""
    if key == "butteraugli":
        return None if shutil.which("butteraugli_main") else "the program butteraugli_main is not installed"
    packages = {
        "ms-ssim-rgb": ("pytorch_msssim",),
        "ssimulacra2": ("ssimulacra2",),
        "lpips": ("torchmetrics", "torchvision"),
        "dists": ("torchmetrics", "torchvision"),
        "fid256": ("torchmetrics", "torch_fidelity"),
        "kid256": ("torchmetrics", "torch_fidelity"),
    }
    for package in packages.get(key, ()):
        try:
            importlib.import_module(package)
        except ImportError:
            return f"the package {package.replace('_', '-')} is not installed"
    return None


def check_weights(keys: Iterable[str], weights: Path | None) -> None:
    """Refuse perceptual metrics that cannot be computed, before hours are spent.

    Args:
        weights: folder laid out as torch's hub folder: weight files, under their published names, in its
            sub-folder `checkpoints`.

    Raises:
        ConfigError: no folder given, or a file is not in it.
        MissingExtraError: a package is not installed.
    """
    for key in keys:
        if not METRICS[key].needs_weights:
            continue
        absent = missing_metric(key)
        if absent is not None:
            raise MissingExtraError(absent.removeprefix("the package ").split()[0], "perceptual")
        if weights is None:
            raise ConfigError(f"{key} needs the weights of a trained network: name their folder")
        if not (weights / _WEIGHT_FILES[key]).is_file():
            raise ConfigError(f"{key} needs {weights / _WEIGHT_FILES[key]}, which is not there")


def compute_metric(key: str, original: Pixels, decoded: Pixels, *, weights: Path | None = None) -> float | None:
    """Compare an image with its reconstruction.

    Args:
        original: (H, W, 3) uint8.
        decoded: same shape.
        weights: see `check_weights`.

    Returns:
        None where the metric is not defined, as for MS-SSIM of images below 161 pixels.

    Raises:
        ValueError: the shapes differ.
    """
    if original.shape != decoded.shape:
        raise ValueError(f"images of shapes {original.shape} and {decoded.shape} cannot be compared")
    if METRICS[key].needs_weights:
        assert weights is not None  # `check_weights` comes first
        return perceptual_distance(load_perceptual_network(key, weights), original, decoded)
    return _PIXEL_METRICS[key](original, decoded)


def psnr_rgb(original: Pixels, decoded: Pixels) -> float:
    """Return the PSNR over all samples of the three channels, in dB; 100 dB for equal images."""
    return _psnr(original.astype(np.float64) - decoded.astype(np.float64))


def psnr_y(original: Pixels, decoded: Pixels) -> float:
    """Return the PSNR of luma (ITU-R BT.601, full range, not rounded), in dB; 100 dB for equal images."""
    weights = np.array([0.299, 0.587, 0.114])
    return _psnr((original.astype(np.float64) - decoded.astype(np.float64)) @ weights)


def _psnr(difference: NDArray[np.float64]) -> float:
    mse = float(np.mean(difference**2))
    return PSNR_OF_EQUAL_IMAGES if mse == 0 else 10 * math.log10(255**2 / mse)


def ms_ssim_rgb(original: Pixels, decoded: Pixels) -> float | None:
    """Return the MS-SSIM in [0, 1] of pytorch-msssim, mean over channels; None below 161 pixels a side."""
    import torch
    from pytorch_msssim import ms_ssim

    if min(original.shape[:2]) < MS_SSIM_MIN_SIDE:
        return None
    with torch.no_grad():
        return float(ms_ssim(_to_batch(original).float(), _to_batch(decoded).float(), data_range=255))


def ms_ssim_db(value: float) -> float:
    """Return -10 log10(1 - MS-SSIM): the scale on which curves of MS-SSIM are compared."""
    return -10 * math.log10(max(1 - value, 1e-10))


def ssimulacra2(original: Pixels, decoded: Pixels) -> float | None:
    """Return SSIMULACRA2 (100 is lossless, 70 high, 30 low); None below 8 pixels a side.

    By the package `ssimulacra2`, a port whose numbers may differ from libjxl's tool in the first decimal.
    """
    from ssimulacra2 import compute_ssimulacra2  # type: ignore[import-not-found,import-untyped,unused-ignore]

    if min(original.shape[:2]) < 8:
        return None
    with tempfile.TemporaryDirectory() as folder:  # the package reads files only
        files = [_save(pixels, Path(folder, name)) for name, pixels in _pair(original, decoded)]
        return float(compute_ssimulacra2(*files))


def butteraugli(original: Pixels, decoded: Pixels) -> float:
    """Return the 3-norm of libjxl's `butteraugli_main`: 0 for equal images, 1 for just noticeable damage."""
    with tempfile.TemporaryDirectory() as folder:
        files = [str(_save(pixels, Path(folder, name))) for name, pixels in _pair(original, decoded)]
        done = subprocess.run(["butteraugli_main", *files], capture_output=True, text=True, timeout=600, check=True)
    found = re.search(r"3-norm:\s*([0-9.eE+-]+)", done.stdout + done.stderr)
    if found is None:
        raise ConfigError("butteraugli_main printed no 3-norm")
    return float(found.group(1))


def _pair(original: Pixels, decoded: Pixels) -> tuple[tuple[str, Pixels], tuple[str, Pixels]]:
    return ("original.png", original), ("decoded.png", decoded)


def _save(pixels: Pixels, file: Path) -> Path:
    from PIL import Image

    Image.fromarray(pixels).save(file, compress_level=1)
    return file


_PIXEL_METRICS: dict[str, Callable[[Pixels, Pixels], float | None]] = {
    "psnr-rgb": psnr_rgb,
    "psnr-y": psnr_y,
    "ms-ssim-rgb": ms_ssim_rgb,
    "ssimulacra2": ssimulacra2,
    "butteraugli": butteraugli,
}


def _to_batch(pixels: Pixels) -> Tensor:
    """(H, W, 3) uint8 array -> (1, 3, H, W) uint8 tensor."""
    import torch

    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None]


def perceptual_distance(network: Callable[[Tensor, Tensor], Tensor], original: Pixels, decoded: Pixels) -> float:
    """Run a two-image network.

    Args:
        network: (1, 3, H, W) float32 in [0, 1], twice -> one number.
    """
    import torch

    with torch.no_grad():
        return float(network(_to_batch(original).float() / 255, _to_batch(decoded).float() / 255))


@lru_cache(maxsize=4)
def load_perceptual_network(key: str, weights: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """Load LPIPS or DISTS as torchmetrics builds them, with the user's weights and no download.

    Args:
        weights: see `check_weights`, which has passed.
    """
    metric: Callable[[Tensor, Tensor], Tensor]
    with _hub_folder(weights):
        if key == "lpips":
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
        else:
            from torchmetrics.image.dists import DeepImageStructureAndTextureSimilarity

            metric = DeepImageStructureAndTextureSimilarity()
    return metric  # called with two images, it returns the distance of these two


@lru_cache(maxsize=1)
def load_inception(weights: Path) -> nn.Module:
    """Load torch-fidelity's Inception v3 (the network of the original FID) from the user's file.

    Returns:
        (n, 3, H, W) uint8 -> (n, 2048) float32.
    """
    from torchmetrics.image.fid import NoTrainInceptionV3

    return NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights / _WEIGHT_FILES["fid256"]))


def hific_patches(pixels: Pixels, size: int = HIFIC_PATCH) -> Iterator[Pixels]:
    """Cut an image into patches as HiFiC does for FID and KID.

    All whole patches of the grid at the origin, then those of the grid shifted by half a patch both ways.
    Source: Mentzer et al. 2020, arXiv:2006.09965, appendix A.7. An image smaller than a patch gives none.
    """
    for start in (0, size // 2):
        for top in range(start, pixels.shape[0] - size + 1, size):
            for left in range(start, pixels.shape[1] - size + 1, size):
                yield pixels[top : top + size, left : left + size]


def set_distances(
    pairs: Iterable[tuple[Pixels, Pixels]], keys: Sequence[str], features: nn.Module
) -> Mapping[str, float | None]:
    """Compute FID/256 and KID/256 of reconstructions against originals.

    Args:
        pairs: originals and their reconstructions.
        keys: of the metrics wanted.
        features: (n, 3, 256, 256) uint8 -> (n, d) float32, see `load_inception`.

    Returns:
        A value per key; None if there are fewer than two patches. FID of a few hundred patches is biased
        upwards: compare codecs by it on the same images only.
    """
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    patch_pairs = [
        patch_pair
        for original, decoded in pairs
        for patch_pair in zip(hific_patches(original), hific_patches(decoded), strict=True)
    ]
    if len(patch_pairs) < 2:
        return dict.fromkeys(keys)
    distances: dict[str, float | None] = {}
    for key in keys:
        if key == "fid256":
            metric: Any = FrechetInceptionDistance(feature=features)
        else:
            # HiFiC's subsets of 1000 do not exist in a small data set: then all patches are the one subset.
            subset = min(1000, len(patch_pairs))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save")
                metric = KernelInceptionDistance(feature=features, subset_size=subset)
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            torch.manual_seed(0)  # KID draws its subsets
            for original, decoded in patch_pairs:
                metric.update(_to_batch(original), real=True)
                metric.update(_to_batch(decoded), real=False)
            value = metric.compute()
        distances[key] = float(value if key == "fid256" else value[0])
    return distances


@contextmanager
def _hub_folder(folder: Path) -> Iterator[None]:
    """Let torch find weights in the user's folder for a while."""
    import torch

    before = torch.hub.get_dir()
    torch.hub.set_dir(str(folder))
    try:
        yield
    finally:
        torch.hub.set_dir(before)


@dataclass(frozen=True)
class BdRate:
    """Average difference in rate at equal quality.

    Attributes:
        percent: of the anchor's rate; negative is a saving. None if the curves do not overlap.
        low: lower end of the qualities that both curves reach, in units of the metric.
        high: upper end; nothing outside [low, high] was used.
    """

    percent: float | None
    low: float
    high: float


def bd_rate(
    anchor_bpp: Sequence[float],
    anchor_quality: Sequence[float],
    test_bpp: Sequence[float],
    test_quality: Sequence[float],
) -> BdRate:
    """Compute BD-rate with Akima interpolation over the overlap of two curves, without extrapolation.

    Args:
        anchor_bpp: rates of the anchor, bits per pixel, in any order.
        anchor_quality: quality at those rates, higher is better (MS-SSIM in dB, see `ms_ssim_db`).

    Source: Bjontegaard, VCEG-M33; interpolation as advised by Herglotz et al. 2022 (package `bjontegaard`).
    Differs: a point that costs more bits for no more quality is left out, since the curve must be a function.
    """
    from bjontegaard import bd_rate as package_bd_rate

    anchor = _rising(anchor_bpp, anchor_quality)
    test = _rising(test_bpp, test_quality)
    low, high = max(anchor[1][0], test[1][0]), min(anchor[1][-1], test[1][-1])
    if low >= high or min(len(anchor[0]), len(test[0])) < 2:
        return BdRate(None, low, high)
    percent = package_bd_rate(*anchor, *test, method="akima", require_matching_points=False, min_overlap=0)
    return BdRate(float(percent), low, high)


def _rising(bpp: Sequence[float], quality: Sequence[float]) -> tuple[list[float], list[float]]:
    """Sort a curve by rate and keep the points that are better than all cheaper ones."""
    rates: list[float] = []
    qualities: list[float] = []
    for rate, value in sorted(zip(bpp, quality, strict=True)):
        if not qualities or value > qualities[-1]:
            rates.append(rate)
            qualities.append(value)
    return rates, qualities
