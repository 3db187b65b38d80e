"""Metrics between an 8-bit RGB image and its reconstruction that need no trained network."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pqmim.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from torch import Tensor

Pixels = NDArray[np.uint8]
"""(H, W, 3) uint8, sRGB."""
PSNR_OF_EQUAL_IMAGES = 100.0  # dB; instead of infinity, so that means stay finite
MS_SSIM_MIN_SIDE = 161  # pixels: five scales and an 11-pixel window


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
    """Return the MS-SSIM in [0, 1] of pytorch-msssim, mean over channels; None below 161 pixels a side.

    Raises:
        MissingExtraError: the package is not installed.
    """
    if min(original.shape[:2]) < MS_SSIM_MIN_SIDE:
        return None
    try:
        import torch
        from pytorch_msssim import ms_ssim
    except ImportError as error:
        raise MissingExtraError("pytorch-msssim", "eval") from error
    with torch.no_grad():
        return float(ms_ssim(to_batch(original).float(), to_batch(decoded).float(), data_range=255))


def ms_ssim_db(value: float) -> float:
    """Return -10 log10(1 - MS-SSIM): the scale on which curves of MS-SSIM are compared."""
    return -10 * math.log10(max(1 - value, 1e-10))


def ssimulacra2(original: Pixels, decoded: Pixels) -> float | None:
    """Return SSIMULACRA2 (100 is lossless, 70 high, 30 low); None below 8 pixels a side.

    By the package `ssimulacra2`, a port whose numbers may differ from libjxl's tool in the first decimal.

    Raises:
        MissingExtraError: the package is not installed.
    """
    if min(original.shape[:2]) < 8:
        return None
    try:
        from ssimulacra2 import compute_ssimulacra2  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as error:
        raise MissingExtraError("ssimulacra2", "eval") from error
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
    Image.fromarray(pixels).save(file, compress_level=1)
    return file


def to_batch(pixels: Pixels) -> Tensor:
    """(H, W, 3) uint8 array -> (1, 3, H, W) uint8 tensor."""
    import torch

    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None]
