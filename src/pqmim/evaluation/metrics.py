"""The metrics that evaluation knows, by name: what they need, and how to compute them.

Pixel metrics compare one image with its reconstruction. Perceptual ones need a trained network: its weights come with
a package, or the user names them. Those of sets (FID, KID) compare whole data sets. Heavy packages are imported when
a metric is first used.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from pqmim.errors import ConfigError, MissingExtraError
from pqmim.evaluation.perceptual import INCEPTION_FILE, load_distance, perceptual_distance
from pqmim.evaluation.pixel_metrics import Pixels, butteraugli, ms_ssim_rgb, psnr_rgb, psnr_y, ssimulacra2
from pqmim.perceptual.packages import DISTS, EFFICIENTNET_LITE0, LPIPS, WeightPackage, require


@dataclass(frozen=True)
class Metric:
    """A metric that evaluation knows.

    Attributes:
        key: name in results files; CompressAI's where it has one.
        label: for a plot's axis, with the unit.
        is_better_higher: direction.
        packages: that hold the weights of its trained network.
        needs_weights: the user names its network's weights, see `check_weights`.
        of_sets: compares all images of a data set at once, not image by image.
    """

    key: str
    label: str
    is_better_higher: bool = True
    packages: tuple[WeightPackage, ...] = ()
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
        Metric("lpips-alex", "LPIPS (AlexNet)", is_better_higher=False, packages=(LPIPS,)),
        Metric("lpips-vgg", "LPIPS (VGG16)", is_better_higher=False, packages=(LPIPS,)),
        Metric("dists", "DISTS", is_better_higher=False, packages=(LPIPS, DISTS)),
        Metric(
            "kid-lite0",
            "KID (EfficientNet-Lite0, 256)",
            is_better_higher=False,
            packages=(EFFICIENTNET_LITE0,),
            of_sets=True,
        ),
        Metric("kid-alex", "KID (AlexNet, 256)", is_better_higher=False, packages=(LPIPS,), of_sets=True),
        Metric("kid-vgg", "KID (VGG16, 256)", is_better_higher=False, packages=(LPIPS,), of_sets=True),
        Metric("fid256", "FID/256", is_better_higher=False, needs_weights=True, of_sets=True),
        Metric("kid256", "KID/256", is_better_higher=False, needs_weights=True, of_sets=True),
    )
}
_ALIASES = {"psnr": "psnr-rgb", "ms-ssim": "ms-ssim-rgb", "lpips": "lpips-alex", "fid": "fid256", "kid": "kid256"}
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
    needed = {"ms-ssim-rgb": ("pytorch_msssim",), "ssimulacra2": ("ssimulacra2",)}
    for package in needed.get(key, ()):
        try:
            importlib.import_module(package)
        except ImportError:
            return f"the package {package.replace('_', '-')} is not installed"
    return None


def check_weights(keys: Iterable[str], weights: Path | None) -> None:
    """Refuse metrics of trained networks that cannot be computed, before hours are spent.

    Args:
        weights: folder laid out as torch's hub folder: weight files, under their published names, in its
            sub-folder `checkpoints`.

    Raises:
        ConfigError: no folder given, or a file is not in it.
        MissingExtraError: a package is not installed.
    """
    for key in keys:
        metric = METRICS[key]
        for package in metric.packages:
            require(package)
        if metric.packages:
            _require_modules("eval", "torch")
        if not metric.needs_weights:
            continue
        _require_modules("fid", "torchmetrics", "torch_fidelity")
        if weights is None:
            raise ConfigError(f"{key} needs the weights of a trained network: name their folder")
        if not (weights / INCEPTION_FILE).is_file():
            raise ConfigError(f"{key} needs {weights / INCEPTION_FILE}, which is not there")


def _require_modules(extra: str, *modules: str) -> None:
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError:
            raise MissingExtraError(module.replace("_", "-"), extra) from None


def compute_metric(key: str, original: Pixels, decoded: Pixels) -> float | None:
    """Compare an image with its reconstruction.

    Args:
        original: (H, W, 3) uint8.
        decoded: same shape.

    Returns:
        None where the metric is not defined, as for MS-SSIM of images below 161 pixels.

    Raises:
        ValueError: the shapes differ.
    """
    if original.shape != decoded.shape:
        raise ValueError(f"images of shapes {original.shape} and {decoded.shape} cannot be compared")
    if METRICS[key].packages:
        return perceptual_distance(load_distance(key), original, decoded)
    return _PIXEL_METRICS[key](original, decoded)
