"""The metrics that evaluation knows, by name: what they need, and how to compute them.

Pixel metrics compare one image with its reconstruction. Perceptual ones need a trained network, whose
weights the user names; two of them (FID, KID) compare whole sets. Heavy packages are imported when a metric
is first used.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from pqmim.errors import ConfigError, MissingExtraError
from pqmim.evaluation.perceptual import WEIGHT_FILES, load_perceptual_network, perceptual_distance
from pqmim.evaluation.pixel_metrics import Pixels, butteraugli, ms_ssim_rgb, psnr_rgb, psnr_y, ssimulacra2


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
_PIXEL_METRICS: dict[str, Callable[[Pixels, Pixels], float | None]] = {
    "psnr-rgb": psnr_rgb,
    "psnr-y": psnr_y,
    "ms-ssim-rgb": ms_ssim_rgb,
    "ssimulacra2": ssimulacra2,
    "butteraugli": butteraugli,
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
        if not (weights / WEIGHT_FILES[key]).is_file():
            raise ConfigError(f"{key} needs {weights / WEIGHT_FILES[key]}, which is not there")


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
