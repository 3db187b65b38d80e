"""Training terms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

CHROMA_SIDE = 8
"""Side, pixels, of the squares whose mean colors are compared."""
BLUE_DIFFERENCE, RED_DIFFERENCE = (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312)
"""Cb and Cr of JPEG (ITU-T T.871, section 7) as weights of red, green and blue."""


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


def feature_distance(decoded: Sequence[Tensor], original: Sequence[Tensor]) -> Tensor:
    """How far apart two pictures are for a network: the mean over its depths of |a - b|^2, a and b of unit length.

    Source: Zhang et al. 2018 (LPIPS), arXiv:1801.03924, section 3; differs: channels have equal weights, which asks
    for no judgements by people.

    Args:
        decoded, original: features of each depth, (B, C, h, w).

    Returns:
        (B,) float32 in [0, 4].
    """
    distances = [
        (F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).square().sum(1).mean((1, 2))
        for a, b in zip(decoded, original, strict=True)
    ]
    return torch.stack(distances).mean(0)


def grid_pattern(x_hat: Tensor, x: Tensor, period: int = 16) -> Tensor:
    """Strength of a pattern that repeats: RMS, grey levels, of the mean error at each of period x period places.

    Errors that do not repeat average out with the number of pictures; what a decoder adds everywhere stays.

    Args:
        x_hat, x: (B, 3, H, W) float32 in [0, 1], sides multiples of `period`.

    Returns:
        () float32.
    """
    error = (x_hat.float() - x).unflatten(3, (-1, period)).unflatten(2, (-1, period)).mean((0, 2, 4))  # (3, p, p)
    return (error - error.mean((1, 2), keepdim=True)).square().mean().sqrt() * 255.0  # type: ignore[no-any-return]
