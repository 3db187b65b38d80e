"""Training photos: folders and tar shards, decoded once and cropped in batches.

The photos are decoded a single time into one flat uint8 array (a `PhotoStore`), so that no step ever waits for JPEG.
`CropSampler` then cuts, flips and rescales on the training device. Every batch is a pure function of (seed, step), so a
resumed run sees exactly the crops that an uninterrupted one would have seen.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pqmim.errors import ConfigError, PqmimError
from pqmim.image_io import load_picture

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".ppm"})


@dataclass(frozen=True)
class PhotoStore:
    """Decoded photos in one buffer.

    Attributes:
        pixels: (total,) uint8, photos one after the other, each as H x W x 3.
        sizes: (n, 2) int64, height and width of each photo.
        offsets: (n,) int64, where each photo starts in `pixels`.
        names: file name of each photo.
    """

    pixels: Tensor
    sizes: np.ndarray
    offsets: np.ndarray
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def photo(self, index: int) -> Tensor:
        """Photo `index` as (H, W, 3) uint8, a view."""
        height, width = self.sizes[index]
        start = int(self.offsets[index])
        return self.pixels[start : start + int(height * width * 3)].view(int(height), int(width), 3)

    def subset(self, indices: np.ndarray) -> PhotoStore:
        """The photos `indices`, sharing memory."""
        names = tuple(self.names[i] for i in indices)
        return PhotoStore(self.pixels, self.sizes[indices], self.offsets[indices], names)

    @property
    def manifest_hash(self) -> str:
        """SHA-256 over names and sizes (16 hex digits): says which data a model saw."""
        digest = hashlib.sha256()
        for name, (height, width) in zip(self.names, self.sizes, strict=True):
            digest.update(f"{name}\t{height}x{width}\n".encode())
        return digest.hexdigest()[:16]


def iterate_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, encoded bytes) of every image in a folder tree, a tar shard, or a folder of tar shards, sorted."""
    if not path.exists():
        raise ConfigError(f"{path}: no such training data (set data.path)")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        if file.suffix == ".tar":
            with tarfile.open(file) as shard:
                for member in shard:
                    if member.isfile() and Path(member.name).suffix.lower() in IMAGE_SUFFIXES:
                        content = shard.extractfile(member)
                        assert content is not None  # isfile() was checked
                        yield member.name, content.read()
        elif file.suffix.lower() in IMAGE_SUFFIXES:
            yield str(file.relative_to(path) if path.is_dir() else file.name), file.read_bytes()


def load_photos(path: Path, *, min_side: int, cache: Path | None = None) -> PhotoStore:
    """Decode every photo under `path` whose short side is at least `min_side` pixels.

    Args:
        path: image folder, tar shard, or folder of shards.
        min_side: smaller photos are left out (a crop could not be cut from them).
        cache: `.npz`-like folder where the decoded pixels are kept for the next start; None = decode anew.

    Raises:
        ConfigError: nothing usable was found.
    """
    if cache is not None and (cache / "pixels.npy").exists() and (cache / "index.npz").exists():
        index = np.load(cache / "index.npz")
        pixels = torch.from_numpy(np.load(cache / "pixels.npy"))
        return PhotoStore(pixels, index["sizes"], index["offsets"], tuple(index["names"].tolist()))
    arrays: list[np.ndarray] = []
    names: list[str] = []
    for name, content in iterate_files(path):
        try:
            rgb = load_picture(content).rgb
        except PqmimError:
            continue  # one unreadable photo must not stop a training; `names` records what was used
        if min(rgb.shape[:2]) >= min_side:
            arrays.append(rgb)
            names.append(name)
    if not arrays:
        raise ConfigError(f"{path}: no photo with a short side of at least {min_side} pixels")
    sizes = np.array([a.shape[:2] for a in arrays], dtype=np.int64)
    lengths = sizes.prod(axis=1) * 3
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    flat = np.concatenate([a.reshape(-1) for a in arrays])
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        np.save(cache / "pixels.npy", flat)
        np.savez(cache / "index.npz", sizes=sizes, offsets=offsets, names=np.array(names))
    return PhotoStore(torch.from_numpy(flat), sizes, offsets, tuple(names))


def split_photos(photos: PhotoStore, num_validation: int) -> tuple[PhotoStore, PhotoStore]:
    """Training and validation photos: every n-th of the list is held out, so the split does not depend on a seed.

    Raises:
        ConfigError: fewer than two photos, or nothing left to train on.
    """
    total = len(photos)
    if not 0 < num_validation < total:
        raise ConfigError(f"data.validation_photos must be between 1 and {total - 1} for {total} photos")
    held_out = np.arange(num_validation) * total // num_validation
    return photos.subset(np.setdiff1d(np.arange(total), held_out)), photos.subset(held_out)


class CropSampler:
    """Random square crops: place, scale and mirror image drawn anew; a pure function of (seed, step).

    Args:
        photos: what to draw from, each photo in proportion to nothing but its presence.
        crop: side of the crops, pixels.
        min_scale: the crop is cut up to 1 / min_scale larger (as far as the photo allows) and shrunk by an area filter.
    """

    def __init__(self, photos: PhotoStore, *, crop: int, min_scale: float, seed: int, device: torch.device) -> None:
        self.photos = photos
        self.crop = crop
        self.min_scale = min_scale
        self.seed = seed
        self.device = device

    def batch(self, step: int, batch_size: int) -> Tensor:
        """The batch of a step: (B, 3, crop, crop) float32 in [0, 1]."""
        rng = np.random.default_rng((self.seed, step))
        crops = [self._crop(rng) for _ in range(batch_size)]
        return torch.cat(crops).contiguous(memory_format=torch.channels_last)

    def _crop(self, rng: np.random.Generator) -> Tensor:
        """One crop, (1, 3, crop, crop)."""
        photo = self.photos.photo(int(rng.integers(len(self.photos))))
        height, width = photo.shape[:2]
        side = min(height, width, int(self.crop / rng.uniform(self.min_scale, 1.0)))
        top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        return _to_crop(photo[top : top + side, left : left + side], self.crop, rng.random() < 0.5, self.device)


def validation_crops(photos: PhotoStore, crop: int, device: torch.device) -> Tensor:
    """The centre crop of every photo at full scale: (n, 3, crop, crop) float32 in [0, 1]."""
    crops = []
    for index in range(len(photos)):
        photo = photos.photo(index)
        top, left = (photo.shape[0] - crop) // 2, (photo.shape[1] - crop) // 2
        crops.append(_to_crop(photo[top : top + crop, left : left + crop], crop, False, device))
    return torch.cat(crops)


def _to_crop(pixels: Tensor, crop: int, mirror: bool, device: torch.device) -> Tensor:
    """(side, side, 3) uint8 -> (1, 3, crop, crop) float32 in [0, 1], shrunk by area averaging."""
    x = pixels.to(device).permute(2, 0, 1)[None].float() / 255
    if x.shape[-1] != crop:
        x = F.interpolate(x, size=(crop, crop), mode="area")
    return x.flip(3) if mirror else x
