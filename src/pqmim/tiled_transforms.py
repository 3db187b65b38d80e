"""The transforms on pictures of any size: tile by tile with a margin, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pqmim.training.autoencoder import STRIDE
from pqmim.training.tokenizer import Tokenizer

TILE_POSITIONS = 48
"""Side of the tiles that the transforms work on, positions, without margin."""


class TiledTransforms:
    """Analysis and synthesis of a tokenizer for whole pictures.

    Args:
        tokenizer: on its device.
        device: of the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, device: torch.device) -> None:
        self._tokenizer = tokenizer
        self._device = device
        self._margin = tokenizer.config.autoencoder.margin
        self._fast_bf16 = has_fast_bf16(device)
        # A latent step of one moves the sum of squared errors (pixels in [0, 1]) by this, if the synthesis were linear
        # and orthonormal.
        self._energy = (tokenizer.config.autoencoder.latent_unit / 255) ** 2

    @torch.no_grad()
    def analyze(self, pixels: NDArray[np.uint8]) -> Tensor:
        """(H, W, 3) uint8, sides multiples of the stride -> latent (1, D, h, w) float32."""

        def analyze(top: int, bottom: int, left: int, right: int) -> Tensor:
            x = self._crop(pixels, top, bottom, left, right)
            return self._tokenizer.analysis(x)[0]  # type: ignore[no-any-return]

        height, width = pixels.shape[0] // STRIDE, pixels.shape[1] // STRIDE
        return assemble_tiles(analyze, height, width, 1, self._margin)[None]

    @torch.no_grad()
    def synthesize(
        self, latent_of: Callable[[int, int, int, int], Tensor], height: int, width: int
    ) -> NDArray[np.uint8]:
        """Reconstruct a picture.

        Args:
            latent_of: (top, bottom, left, right) in positions -> quantized latent (1, D, rows, columns).
            height, width: of the token grid.

        Returns:
            (16 h, 16 w, 3) uint8.
        """

        def synthesize(top: int, bottom: int, left: int, right: int) -> Tensor:
            x_hat = self._tokenizer.synthesis(latent_of(top, bottom, left, right))[0]
            return x_hat.clamp_(0, 1).mul_(255).round_().to(torch.uint8)  # type: ignore[no-any-return]

        rgb = assemble_tiles(synthesize, height, width, STRIDE, self._margin)
        return np.ascontiguousarray(rgb.permute(1, 2, 0).cpu().numpy())

    def correct(self, z_q: Tensor, pixels: NDArray[np.uint8]) -> Tensor:
        """Latent that would undo the error of a reconstruction: one Newton step in the decoded picture.

        For an orthonormal synthesis this is the original latent; for the learned one it says what the synthesis, at
        this very quantized latent, lacks.

        Args:
            z_q: (1, D, h, w) float32, quantized latent.
            pixels: (16 h, 16 w, 3) uint8, the original.

        Returns:
            (1, D, h, w) float32.
        """

        def correct(top: int, bottom: int, left: int, right: int) -> Tensor:
            with torch.inference_mode(False), torch.enable_grad():
                part = z_q[:, :, top:bottom, left:right].detach().clone().requires_grad_(True)
                # Half the time, and a correction need not be exact: only the encoder sees it.
                with torch.autocast(self._device.type, torch.bfloat16, enabled=self._fast_bf16):
                    picture = self._tokenizer.synthesis(part)
                error = picture - self._crop(pixels, top, bottom, left, right)
                (gradient,) = torch.autograd.grad(error.square().sum(), part)
            return (part.detach() - gradient / (2 * self._energy))[0]

        return assemble_tiles(correct, z_q.shape[2], z_q.shape[3], 1, self._margin)[None]

    def _crop(self, pixels: NDArray[np.uint8], top: int, bottom: int, left: int, right: int) -> Tensor:
        """Part of a picture, given in positions: (1, 3, H, W) float32 in [0, 1]."""
        part = pixels[top * STRIDE : bottom * STRIDE, left * STRIDE : right * STRIDE]
        x = torch.from_numpy(np.ascontiguousarray(part)).to(self._device).permute(2, 0, 1)[None].float() / 255
        return x.contiguous(memory_format=torch.channels_last)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether convolutions in bfloat16 are faster than in float32: a GPU that has it, or a CPU with AVX-512 BF16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    is_supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # no public name yet
    return is_supported is not None and bool(is_supported())


def assemble_tiles(
    transform: Callable[[int, int, int, int], Tensor], height: int, width: int, scale: int, margin: int
) -> Tensor:
    """Apply a transform tile by tile, with a margin that is cut off again: the result of the whole, in bounded memory.

    Args:
        transform: (top, bottom, left, right) in positions -> (C, scale * rows, scale * columns).
        height, width: of the token grid, positions.
        scale: output samples per side of a position.
        margin: positions around a tile that the transform is given too.

    Returns:
        (C, scale * height, scale * width).
    """
    out: Tensor | None = None
    for top in range(0, height, TILE_POSITIONS):
        bottom = min(top + TILE_POSITIONS, height)
        for left in range(0, width, TILE_POSITIONS):
            right = min(left + TILE_POSITIONS, width)
            outer_top, outer_left = max(0, top - margin), max(0, left - margin)
            outer_bottom, outer_right = min(height, bottom + margin), min(width, right + margin)
            tile = transform(outer_top, outer_bottom, outer_left, outer_right)
            if out is None:
                out = tile.new_empty(tile.shape[0], scale * height, scale * width)
            rows = slice(scale * (top - outer_top), scale * (bottom - outer_top))
            columns = slice(scale * (left - outer_left), scale * (right - outer_left))
            out[:, scale * top : scale * bottom, scale * left : scale * right] = tile[:, rows, columns]
    assert out is not None  # a grid has at least one position
    return out
