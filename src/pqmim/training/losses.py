"""Training terms."""

from __future__ import annotations

import torch
from torch import Tensor


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
