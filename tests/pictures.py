"""Pictures that tests make on the spot."""

from __future__ import annotations

import numpy as np


def synthetic_photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colors, an edge and some texture: (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / 64
    phase = rng.uniform(0, 6, (3, 4))
    waves = [np.sin(y * p[0] + p[1]) + np.cos(x * p[2] + p[3]) for p in phase]
    photo = 128 + 45 * np.stack(waves, axis=2)
    photo[y > x + 1] *= 0.6
    return np.clip(photo + rng.normal(0, 6, photo.shape), 0, 255).astype(np.uint8)
