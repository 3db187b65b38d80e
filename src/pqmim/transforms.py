"""The transforms on pictures of any size: tile by tile with a margin, in bounded memory.

Three graphs of the model file do the work: analysis, synthesis, and synthesis in two halves, forward and the
vector-Jacobian product, for whoever wants to know how the decoded picture follows the latent.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pqmim.config import STRIDE
from pqmim.decoder_files import DecoderFile
from pqmim.distortion import Distortion, Planes, SquaredError
from pqmim.model_files import ModelFile, NetworkFile
from pqmim.options import Device
from pqmim.quantizer import Latent
from pqmim.runtime import Session, providers_of

TILE_POSITIONS = 48
"""Side of the tiles that the transforms work on, positions, without margin."""
MOST_UNDONE = 15.0
"""Largest error that a correction may promise to undo around a position, in multiples of the error that is there."""


class Transforms:
    """Analysis and synthesis for whole pictures.

    Args:
        model: whose analysis it is.
        decoder: whose synthesis it is.
        threads: that work on one tile.
        device: where they run.

    Attributes:
        margin: positions around a tile that matter to the synthesis.
        energy: what a latent step of one moves the sum of squared errors (pixels in [0, 1]) by, if the synthesis were
            linear and orthonormal.
    """

    def __init__(self, model: ModelFile, decoder: DecoderFile, *, threads: int, device: Device = Device.CPU) -> None:
        self._model, self._decoder = model, decoder
        self._threads, self._providers = threads, providers_of(device)
        self._analysis_margin = model.config.tokenizer.analysis.margin
        self.margin = decoder.config.margin
        self.energy = (decoder.config.latent_unit / 255) ** 2

    def analyze(self, pixels: NDArray[np.uint8]) -> Latent:
        """(H, W, 3) uint8, sides multiples of the stride -> latent (1, D, h, w)."""

        def analyze(top: int, bottom: int, left: int, right: int) -> NDArray[np.float32]:
            (z,) = self._analysis.run(rgb=crop(pixels, top, bottom, left, right))
            return np.asarray(z[0].transpose(1, 2, 0))

        height, width = pixels.shape[0] // STRIDE, pixels.shape[1] // STRIDE
        z = assemble_tiles(analyze, height, width, 1, self._analysis_margin)
        return np.ascontiguousarray(z.transpose(2, 0, 1)[None])

    def synthesize(
        self, latent_of: Callable[[int, int, int, int], Latent], height: int, width: int
    ) -> NDArray[np.uint8]:
        """Reconstruct a picture.

        Args:
            latent_of: (top, bottom, left, right) in positions -> quantized latent (1, D, rows, columns).
            height, width: of the token grid.

        Returns:
            (16 h, 16 w, 3) uint8.
        """

        def synthesize(top: int, bottom: int, left: int, right: int) -> NDArray[np.uint8]:
            return self._synthesis.run(z=latent_of(top, bottom, left, right))[0]

        return assemble_tiles(synthesize, height, width, STRIDE, self.margin)

    def correct(self, z_q: Latent, pixels: NDArray[np.uint8]) -> Latent:
        """Latent that would undo the error of a reconstruction: one Newton step in the decoded picture.

        For an orthonormal synthesis this is the original latent; for the learned one it says what the synthesis, at
        this very quantized latent, lacks. Where the synthesis is much steeper than an orthonormal one, a step would
        undo more error than there is; it is shortened to `MOST_UNDONE` times that.

        Args:
            z_q: (1, D, h, w), quantized latent.
            pixels: (16 h, 16 w, 3) uint8, the original.

        Returns:
            (1, D, h, w).
        """

        def correct(top: int, bottom: int, left: int, right: int) -> NDArray[np.float32]:
            part = np.ascontiguousarray(z_q[:, :, top:bottom, left:right])
            original = SquaredError(crop(pixels, top, bottom, left, right))
            errors: NDArray[np.float32] | None = None

            def squared_error(picture: Planes) -> tuple[float, Planes]:
                nonlocal errors
                value, slope = original(picture)
                blocks = np.square(slope[0] / 2).sum(0).reshape(bottom - top, STRIDE, right - left, STRIDE)
                errors = blocks.sum((1, 3))
                return value, slope

            _, gradient = self.differentiate(part, squared_error)
            assert errors is not None
            gradient *= np.float32(-1 / (2 * self.energy))
            undone = np.float32(self.energy) * np.square(gradient[0]).sum(0)
            there = np.float32(MOST_UNDONE) * sums_of_neighbors(errors)
            gradient *= np.minimum(1, there / np.maximum(sums_of_neighbors(undone), np.float32(1e-12)))
            gradient += part
            return np.asarray(gradient[0].transpose(1, 2, 0))

        z = assemble_tiles(correct, z_q.shape[2], z_q.shape[3], 1, self.margin)
        return np.ascontiguousarray(z.transpose(2, 0, 1)[None])

    def differentiate(self, z_q: Latent, distortion: Distortion) -> tuple[float, Latent]:
        """Distortion of the picture that a quantized latent (1, D, h, w) of one tile decodes to, and its gradient with
        respect to the latent."""
        picture, *saved = self._forward.run(z=z_q)
        value, of_picture = distortion(picture)
        (gradient,) = self._vjp.run(gradient=of_picture, **dict(zip(self._forward.outputs[1:], saved, strict=True)))
        return value, gradient

    # Made when first used: a decoder needs one of them, an encoder without corrections another.

    @cached_property
    def _analysis(self) -> Session:
        return self._session(self._model, "analysis")

    @cached_property
    def _synthesis(self) -> Session:
        return self._session(self._decoder, "synthesis")

    @cached_property
    def _forward(self) -> Session:
        return self._session(self._decoder, "synthesis_forward")

    @cached_property
    def _vjp(self) -> Session:
        return self._session(self._decoder, "synthesis_vjp")

    def _session(self, file: NetworkFile, name: str) -> Session:
        return Session(file, name, threads=self._threads, providers=self._providers, level="all")


def sums_of_neighbors(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sum over each position and its eight neighbors, (h, w); the border repeats."""
    padded = np.pad(values, 1, mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    sums: NDArray[np.float32] = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    return sums


def crop(pixels: NDArray[np.uint8], top: int, bottom: int, left: int, right: int) -> NDArray[np.uint8]:
    """Part of a picture, given in positions."""
    return np.ascontiguousarray(pixels[top * STRIDE : bottom * STRIDE, left * STRIDE : right * STRIDE])


def num_tiles(height: int, width: int) -> int:
    """Tiles of a grid, sides in positions."""
    return -(-height // TILE_POSITIONS) * -(-width // TILE_POSITIONS)


def assemble_tiles(
    transform: Callable[[int, int, int, int], NDArray[Any]], height: int, width: int, scale: int, margin: int
) -> NDArray[Any]:
    """Apply a transform tile by tile, with a margin that is cut off again: the result of the whole, in bounded memory.

    Args:
        transform: (top, bottom, left, right) in positions -> (scale * rows, scale * columns, C).
        height, width: of the token grid, positions.
        scale: output samples per side of a position.
        margin: positions around a tile that the transform is given too.

    Returns:
        (scale * height, scale * width, C).
    """
    out: NDArray[Any] | None = None
    for top in range(0, height, TILE_POSITIONS):
        bottom = min(top + TILE_POSITIONS, height)
        for left in range(0, width, TILE_POSITIONS):
            right = min(left + TILE_POSITIONS, width)
            outer_top, outer_left = max(0, top - margin), max(0, left - margin)
            outer_bottom, outer_right = min(height, bottom + margin), min(width, right + margin)
            tile = transform(outer_top, outer_bottom, outer_left, outer_right)
            if out is None:
                out = np.empty((scale * height, scale * width, tile.shape[2]), tile.dtype)
            rows = slice(scale * (top - outer_top), scale * (bottom - outer_top))
            columns = slice(scale * (left - outer_left), scale * (right - outer_left))
            out[scale * top : scale * bottom, scale * left : scale * right] = tile[rows, columns]
    assert out is not None  # a grid has at least one position
    return out
