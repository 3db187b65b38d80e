"""Training terms."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CHROMA_SIDE = 8
"""Side, pixels, of the squares whose mean colors are compared."""
PATTERN_SIDE = 16
"""Side, pixels, of the squares whose mean shows what repeats: equal tokens give equal textures."""
DETAIL_SIDE, DETAIL_LEVELS = 16, 2
"""Side, pixels, of the squares in which the energies of detail are compared; levels of the Haar transform."""
LUMINANCE = (0.299, 0.587, 0.114)
BLUE_DIFFERENCE, RED_DIFFERENCE = (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312)
"""Y, Cb and Cr of JPEG (ITU-T T.871, section 7) as weights of red, green and blue."""


def straight_through(value: Tensor, proxy: Tensor) -> Tensor:
    """`value` in the forward pass, the gradient of `proxy` in the backward pass.

    Source: Bengio et al. 2013, arXiv:1308.3432.
    """
    return proxy + (value - proxy).detach()


def mean_squared_error(x_hat: Tensor, x: Tensor) -> Tensor:
    """Per-sample MSE in grey levels squared: (B, 3, H, W) in [0, 1] twice -> (B,) on the scale of 255^2."""
    return (x_hat.float() - x).square().mean((1, 2, 3)) * 255.0**2


def mean_psnr(mse: Tensor) -> float:
    """Mean over images of the PSNR in dB, from per-image MSE (B,) in grey levels squared."""
    return float((10 * torch.log10(255.0**2 / mse)).mean())


def chroma_error(x_hat: Tensor, x: Tensor) -> Tensor:
    """Squared error of the color of squares of 8 x 8 pixels, which a network that names objects hardly sees.

    Args:
        x_hat, x: (B, 3, H, W) float32 in [0, 1], sides multiples of 8.

    Returns:
        (B,) float32, mean over Cb and Cr, in grey levels squared.
    """
    difference = F.avg_pool2d(x_hat.float() - x, CHROMA_SIDE)
    to_chroma = torch.tensor((BLUE_DIFFERENCE, RED_DIFFERENCE), device=x.device)
    return torch.einsum("kc,bchw->bkhw", to_chroma, difference).square().mean((1, 2, 3)) * 255.0**2


def repeated_error(x_hat: Tensor, x: Tensor) -> Tensor:
    """Squared error of the mean of all squares of 16 x 16 pixels, less that of its color: what repeats.

    Args:
        x_hat, x: (B, 3, H, W) float32 in [0, 1], sides multiples of 16.

    Returns:
        (B,) float32, in grey levels squared.
    """
    return _mean_square(x_hat, x, PATTERN_SIDE).square().mean((1, 2, 3)) * 255.0**2


def excess_detail(x_hat: Tensor, x: Tensor) -> Tensor:
    """How much stronger detail is than in the original: meshes, streaks and grain that an adversary is fond of.

    Three directions of the Haar transform of the luminance at two levels, wavelengths of some 2 to 8 pixels; in squares
    of 16 x 16 pixels the square of what the RMS amplitude exceeds that of the original by. Weaker detail costs nothing.

    Args:
        x_hat, x: (B, 3, H, W) float32 in [0, 1], sides multiples of 16.

    Returns:
        (B,) float32, mean over bands and squares, in grey levels squared.
    """
    excess = [
        F.relu(a_hat - a).square().mean((1, 2, 3))
        for a_hat, a in zip(_detail_amplitudes(x_hat.float()), _detail_amplitudes(x), strict=True)
    ]
    return torch.stack(excess).mean(0)


def grid_pattern(x_hat: Tensor, x: Tensor, period: int = 16) -> Tensor:
    """Strength of a pattern that repeats in all pictures: RMS, grey levels, of the mean error at each of its places.

    Errors that do not repeat average out with the number of pictures; what a decoder adds everywhere stays.

    Args:
        x_hat, x: (B, 3, H, W) float32 in [0, 1], sides multiples of `period`.

    Returns:
        () float32.
    """
    return _mean_square(x_hat, x, period).mean(0).square().mean().sqrt() * 255.0


def _mean_square(x_hat: Tensor, x: Tensor, side: int) -> Tensor:
    """Mean over the squares of each picture of what the error has beside its mean: -> (B, 3, side, side)."""
    error = (x_hat.float() - x).unflatten(3, (-1, side)).unflatten(2, (-1, side)).mean((2, 4))
    return error - error.mean((2, 3), keepdim=True)  # type: ignore[no-any-return]


def _detail_amplitudes(x: Tensor) -> list[Tensor]:
    """RMS, grey levels, of Haar bands in squares: (B, 3, H, W) -> (B, 3, H / 16, W / 16) for each level."""
    red, green, blue = LUMINANCE
    approximation = 255.0 * (red * x[:, 0] + green * x[:, 1] + blue * x[:, 2])
    amplitudes = []
    for level in range(1, DETAIL_LEVELS + 1):
        a, b, c, d = (approximation[:, i::2, j::2] for i in (0, 1) for j in (0, 1))
        bands = torch.stack([a - b + c - d, a + b - c - d, a - b - c + d], dim=1) / 2
        energies = F.avg_pool2d(bands.square(), DETAIL_SIDE >> level)
        amplitudes.append((energies + 1).sqrt())  # a grey level squared is seen by nobody, and keeps gradients finite
        approximation = (a + b + c + d) / 2
    return amplitudes
