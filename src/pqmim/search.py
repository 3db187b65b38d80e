"""Search: many small steps of the latent, each judged by the picture that its tokens decode to.

Rounding to codewords has no gradient, so each step takes the gradient of the decoded picture's error at the quantized
latent for that of the latent (straight through), and that of the rate from its Moreau envelope, min over k of
|z - c_k|^2 / w + bits(k), which falls as the latent comes nearer to the cheap codeword that was chosen for it. Adam
takes the steps.

A third term holds the latent near the one that the analysis made. Without it the error falls further, but tokens become
less like their neighbors, and the masked model, whose bits a file really costs, loses more than the picture gains
(docs/experiments.md).

Tiles are searched one after the other, each with a margin, so that memory is bounded.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pqmim.distortion import Distortion, DistortionOf
from pqmim.networks import Networks
from pqmim.options import OnProgress
from pqmim.quantizer import Latent
from pqmim.transforms import assemble_tiles, crop, num_tiles

STEP = 0.35
"""Length of the first steps, in square roots of w: about a tenth of the spacing of codewords."""
DECAY, SQUARE_DECAY = 0.9, 0.9
"""Memory of Adam,"""
LEAST_GRADIENT = 1e-6
"""and what it adds to the length of gradients."""
NEARNESS = 1.0
"""Weight of the squared distance to the analyzed latent, in weights of the squared error."""


def search(
    networks: Networks,
    pixels: NDArray[np.uint8],
    z: Latent,
    w: NDArray[np.float32],
    level: int,
    distortion_of: DistortionOf,
    *,
    num_steps: int,
    deadline: float = math.inf,
    on_progress: OnProgress | None = None,
) -> Latent:
    """Move the latent to where its tokens give the best picture for their bits under the static priors.

    Args:
        pixels: (16 h, 16 w, 3) uint8, the original.
        z: (1, D, h, w), its latent.
        w: (h * w,), squared latent units per bit, as applied.
        distortion_of: what decoded tiles are judged by.
        num_steps: at least 1.
        deadline: of `time.monotonic`; what was found by then has to do.
        on_progress: told after each step.

    Returns:
        (1, D, h, w), the latent to choose tokens for.
    """
    height, width = z.shape[2:]
    grid, total, done = w.reshape(height, width), num_tiles(height, width), 0

    def search_tile(top: int, bottom: int, left: int, right: int) -> NDArray[np.float32]:
        nonlocal done
        part = np.ascontiguousarray(z[:, :, top:bottom, left:right])
        distortion = distortion_of(crop(pixels, top, bottom, left, right))
        tile = _TileSearch(networks, part, grid[top:bottom, left:right].ravel(), level, distortion)
        now = time.monotonic()

        def after_step(number: int) -> None:
            if on_progress is not None:
                on_progress("search", done * num_steps + number, total * num_steps)

        found = tile.run(num_steps, now + (deadline - now) / (total - done), after_step)
        done += 1
        return np.asarray(found[0].transpose(1, 2, 0))

    found = assemble_tiles(search_tile, height, width, 1, networks.transforms.margin)
    return np.ascontiguousarray(found.transpose(2, 0, 1)[None])


class _TileSearch:
    """The search on one tile."""

    def __init__(
        self, networks: Networks, z: Latent, w: NDArray[np.float32], level: int, distortion: Distortion
    ) -> None:
        self._transforms, self._quantizer = networks.transforms, networks.quantizer
        self._analyzed, self._w, self._level = z, w, level
        self._distortion = distortion
        # In units of the squared latent error.
        self._weight = np.float32(1 / self._transforms.energy)
        self._step = np.float32(STEP) * np.sqrt(w).reshape(z.shape[2:])

    def run(self, num_steps: int, deadline: float, after_step: Callable[[int], None]) -> Latent:
        """Take the steps, in lengths that fall along a cosine; fewer if time is over."""
        z = self._analyzed.copy()
        mean, square = np.zeros_like(z), np.zeros_like(z)
        start = time.monotonic()
        for index in range(num_steps):
            # If time will not do for all steps, their lengths fall as fast as time passes.
            share = max(index / num_steps, (time.monotonic() - start) / max(deadline - start, 1e-9))
            if share >= 1:
                break
            gradient = self._gradient(z)
            mean += (1 - DECAY) * (gradient - mean)
            square += (1 - SQUARE_DECAY) * (np.square(gradient) - square)
            direction = mean / np.float32(1 - DECAY ** (index + 1))
            direction /= np.sqrt(square / np.float32(1 - SQUARE_DECAY ** (index + 1))) + np.float32(LEAST_GRADIENT)
            z -= self._step * np.float32(0.5 + 0.5 * math.cos(math.pi * share)) * direction
            after_step(index + 1)
        return z

    def _gradient(self, z: Latent) -> Latent:
        tokens = self._quantizer.assign(self._quantizer.channels(z), self._w, self._level)
        z_q = self._quantizer.dequantize(tokens.reshape(-1, *z.shape[2:]), self._level)
        _, gradient = self._transforms.differentiate(z_q, self._distortion)
        gradient *= self._weight
        gradient += 2 * (z - z_q)  # of the rate's envelope, times w
        gradient += np.float32(2 * NEARNESS) * (z - self._analyzed)
        return gradient
