"""Training photos: folders and tar shards, decoded once and cropped in batches.

The photos are decoded a single time into one flat uint8 array (a `PhotoStore`), held by the GPU where it fits, so that
no step ever waits for JPEG. `CropSampler` then cuts, flips and rescales on the training device. Every batch is a pure
function of (seed, step), so a resumed run sees exactly the crops that an uninterrupted one would have seen, and several
processes can each take their part of it. Sets that do not fit into memory are streamed (`streaming`).
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pqmim.errors import ConfigError, PqmimError
from pqmim.image_io import load_picture

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".ppm"})
STAGE_STEPS = 1_000_000_000
"""Stages draw their crops at steps this far apart, so that none sees the crops of another."""
GPU_SHARE = 0.5
"""Largest part of a GPU's free memory that the photos may take; beyond it they stay in host memory."""
ALL = slice(None)


class Sampler(Protocol):
    """Where the training loops get their crops from."""

    def batch(self, step: int, batch_size: int, part: slice = ALL) -> Tensor:
        """The samples `part` of the batch of a step: (n, 3, crop, crop) float32 in [0, 1], channels last.

        The batch is a pure function of (step, batch_size); `part` is `ALL` or `slice(first, None, stride)` with a
        stride that divides `batch_size`.
        """
        ...


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

    def on(self, device: torch.device) -> PhotoStore:
        """The same photos in the memory of a GPU if they fit, else unchanged."""
        if device.type != "cuda" or self.pixels.numel() > GPU_SHARE * torch.cuda.mem_get_info(device)[0]:
            return self
        return PhotoStore(self.pixels.to(device), self.sizes, self.offsets, self.names)

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
        # Mapped, not read: processes on one machine share the pages. Copy-on-write, since torch wants a writable array.
        pixels = torch.from_numpy(np.load(cache / "pixels.npy", mmap_mode="c"))
        return PhotoStore(pixels, index["sizes"], index["offsets"], tuple(index["names"].tolist()))
    photos = decode_photos(iterate_files(path), min_side=min_side)
    if not photos.names:
        raise ConfigError(f"{path}: no photo with a short side of at least {min_side} pixels")
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        np.save(cache / "pixels.npy", photos.pixels.numpy())
        np.savez(cache / "index.npz", sizes=photos.sizes, offsets=photos.offsets, names=np.array(photos.names))
    return photos


def decode_photo(content: bytes, min_side: int) -> np.ndarray | None:
    """Encoded image -> (H, W, 3) uint8; None if it cannot be read or its short side is below `min_side` pixels."""
    try:
        rgb = load_picture(content).rgb
    except PqmimError:
        return None  # one unreadable photo must not stop a training; `names` records what was used
    return rgb if min(rgb.shape[:2]) >= min_side else None


def decode_photos(files: Iterable[tuple[str, bytes]], *, min_side: int) -> PhotoStore:
    """Decode all usable photos among (name, encoded bytes) pairs; there may be none."""
    arrays: list[np.ndarray] = []
    names: list[str] = []
    for name, content in files:
        rgb = decode_photo(content, min_side)
        if rgb is not None:
            arrays.append(rgb)
            names.append(name)
    sizes = np.array([a.shape[:2] for a in arrays], dtype=np.int64).reshape(-1, 2)
    lengths = sizes.prod(axis=1) * 3
    offsets = np.cumsum(lengths) - lengths
    flat = np.concatenate([np.empty(0, np.uint8), *[a.reshape(-1) for a in arrays]])
    return PhotoStore(torch.from_numpy(flat), sizes, offsets, tuple(names))


def split_photos(photos: PhotoStore, num_validation: int) -> tuple[PhotoStore, PhotoStore]:
    """Training and validation photos: every n-th of the list is held out, so the split does not depend on a seed.

    Raises:
        ConfigError: fewer than two photos, or nothing left to train on.
    """
    total = len(photos)
    if not 0 < num_validation < total:
        raise ConfigError(f"data.validation_photos must be between 1 and {total - 1} for {total} photos")
    held_out = evenly_spread(num_validation, total)
    return photos.subset(np.setdiff1d(np.arange(total), held_out)), photos.subset(held_out)


def is_excluded(name: str, patterns: Sequence[str]) -> bool:
    """Whether a photo's file name, without folders, fits one of the patterns (of `fnmatch`, case counts)."""
    return any(fnmatchcase(PurePosixPath(name).name, pattern) for pattern in patterns)


def without(photos: PhotoStore, patterns: Sequence[str]) -> PhotoStore:
    """The photos whose names fit no pattern.

    Raises:
        ConfigError: there is none.
    """
    kept = [index for index, name in enumerate(photos.names) if not is_excluded(name, patterns)]
    if not kept:
        raise ConfigError("data.exclude leaves nothing to train on")
    return photos.subset(np.array(kept))


def evenly_spread(count: int, total: int) -> np.ndarray:
    """Indices of `count` of `total` list entries, evenly spread: (count,) int64."""
    return np.arange(count) * total // count


@dataclass(frozen=True)
class Cuts:
    """How the samples of one batch are cut, whatever photos they come from.

    Attributes:
        photo, scale, top, left: (B,) float64 in [0, 1): which photo, and where in the range each is.
        mirror: (B,) bool.
    """

    photo: np.ndarray
    scale: np.ndarray
    top: np.ndarray
    left: np.ndarray
    mirror: np.ndarray

    @classmethod
    def draw(cls, seed: int, step: int, batch_size: int) -> Cuts:
        """The cuts of a step, a pure function of the arguments."""
        photo, scale, top, left, mirror = np.random.default_rng((seed, step)).random((5, batch_size))
        return cls(photo, scale, top, left, mirror < 0.5)

    def window(self, index: int, size: tuple[int, ...], crop: int, min_scale: float) -> tuple[int, int, int]:
        """Top, left and side, pixels, of the square that sample `index` takes from a photo of this height and width."""
        height, width = size
        side = min(height, width, int(crop / (min_scale + (1 - min_scale) * self.scale[index])))
        return int(self.top[index] * (height - side + 1)), int(self.left[index] * (width - side + 1)), side


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

    def batch(self, step: int, batch_size: int, part: slice = ALL) -> Tensor:
        """See `Sampler`."""
        cuts = Cuts.draw(self.seed, step, batch_size)
        indices = range(batch_size)[part]
        windows = []
        for index in indices:
            photo = self.photos.photo(int(cuts.photo[index] * len(self.photos)))
            top, left, side = cuts.window(index, photo.shape[:2], self.crop, self.min_scale)
            windows.append(photo[top : top + side, left : left + side])
        return shrink(windows, cuts.mirror[part], self.crop, self.device)


def shrink(windows: Sequence[Tensor], mirror: np.ndarray, crop: int, device: torch.device) -> Tensor:
    """Windows of different sizes -> crops of one size, by an area filter, in one batch.

    Args:
        windows: (side, side, 3) uint8 each, side >= crop, on one device.
        mirror: (B,) bool, which crops to turn into their mirror image.
        device: where the filter runs and the crops end up.

    Returns:
        (B, 3, crop, crop) float32 in [0, 1], channels last.
    """
    sides = torch.tensor([len(window) for window in windows])
    largest = int(sides.max())
    stack = torch.zeros(len(windows), largest, largest, 3, dtype=torch.uint8, device=windows[0].device)
    for room, window in zip(stack, windows, strict=True):
        room[: len(window), : len(window)] = window
    stack = stack.to(device)
    taps, weights = _area_filter(sides, crop, largest, device)
    rows = _filter_rows(stack.flatten(2), taps, weights).view(len(stack), crop, largest, 3)
    turned = torch.from_numpy(mirror.copy()).to(device)[:, None, None]
    taps, weights = (torch.where(turned, values.flip(1), values) for values in (taps, weights))
    columns = _filter_rows(rows.transpose(1, 2).flatten(2), taps, weights / 255)
    crops = columns.view(len(columns), crop, crop, 3)  # (B, x, y, color)
    return crops.permute(0, 3, 2, 1).contiguous(memory_format=torch.channels_last)


def _area_filter(sides: Tensor, crop: int, largest: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which samples of a line of `sides` samples make up each of `crop` samples, and their shares.

    Returns:
        Indices (B, crop, T) int64 and weights (B, crop, T) float32 that sum to 1; T covers the longest line.
    """
    ratio = sides.double()[:, None, None] / crop
    begin = torch.arange(crop, dtype=torch.float64)[:, None] * ratio  # (B, crop, 1)
    taps = begin.floor() + torch.arange(1 if largest == crop else -(-largest // crop) + 1)
    overlap = torch.minimum(taps + 1, begin + ratio) - torch.maximum(taps, begin)
    weights = (overlap.clamp_min(0) / ratio).float()
    return taps.long().clamp_max(largest - 1).to(device), weights.to(device)


def _filter_rows(x: Tensor, taps: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows: (B, rows, n), indices and weights (B, crop, T) -> (B, crop, n) float32."""
    batch = torch.arange(len(x), device=x.device)[:, None]
    total = x[batch, taps[..., 0]] * weights[..., :1]
    for tap in range(1, taps.shape[2]):
        total += x[batch, taps[..., tap]] * weights[..., tap, None]
    return total


def validation_crops(photos: PhotoStore, crop: int, device: torch.device) -> Tensor:
    """The center crop of every photo at full scale: (n, 3, crop, crop) float32 in [0, 1]."""
    crops = []
    for index in range(len(photos)):
        photo = photos.photo(index)
        top, left = (photo.shape[0] - crop) // 2, (photo.shape[1] - crop) // 2
        crops.append(photo[top : top + crop, left : left + crop])
    return torch.stack(crops).to(device).permute(0, 3, 1, 2).float() / 255
