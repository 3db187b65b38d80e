"""Photos streamed from tar shards, for sets that do not fit into memory.

The set is dealt to a fixed number of *lanes*. In every epoch the shards are put in a random order and dealt to the
lanes; each lane reads its shards from front to back through a shuffle buffer. Sample i of the batch of step s is sample
g = s * batch_size + i of the stage, and is cut from photo g // lanes of lane g % lanes. So the batches depend on the
seed, the batch size and the number of lanes alone, not on how many processes share the lanes, nor on their readers.

Nothing needs to be saved to resume: the number of photos in each shard is known from the headers, so past epochs are
skipped by counting, and what is past of the current epoch is read again but not decoded.
"""

from __future__ import annotations

import hashlib
import random
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pqmim.errors import ConfigError, MissingExtraError
from pqmim.training.data import (
    ALL,
    IMAGE_SUFFIXES,
    STAGE_STEPS,
    Cuts,
    PhotoStore,
    decode_photo,
    decode_photos,
    evenly_spread,
    is_excluded,
    shrink,
)

META_FILE = re.compile(r"__[^/]*__($|/)")
"""Members that webdataset leaves out."""


@dataclass(frozen=True)
class ShardSet:
    """Tar shards and what is in them.

    Attributes:
        paths: the shards, sorted.
        names: names of the images in each.
        num_bytes: their encoded sizes together.
    """

    paths: tuple[Path, ...]
    names: tuple[tuple[str, ...], ...]
    num_bytes: int

    @classmethod
    def scan(cls, path: Path) -> ShardSet:
        """Read the headers of a shard, or of all shards below a folder; those without images are left out.

        Raises:
            ConfigError: there is no shard with an image.
        """
        paths, names, num_bytes = [], [], 0
        for shard in [path] if path.is_file() else sorted(path.rglob("*.tar")):
            with tarfile.open(shard) as archive:
                found = [m for m in archive if m.isreg() and _is_image(m.name)]
            if found:
                paths.append(shard)
                names.append(tuple(member.name for member in found))
                num_bytes += sum(member.size for member in found)
        if not paths:
            raise ConfigError(f"{path}: data.stream needs tar shards with images, and there are none")
        return cls(tuple(paths), tuple(names), num_bytes)

    def __len__(self) -> int:
        return sum(map(len, self.names))

    @cached_property
    def manifest_hash(self) -> str:
        """SHA-256 over names and total size (16 hex digits): says which data a model saw."""
        digest = hashlib.sha256(f"{self.num_bytes}\n".encode())
        for names in self.names:
            digest.update("".join(f"{name}\n" for name in names).encode())
        return digest.hexdigest()[:16]

    def hold_out(self, count: int, min_side: int) -> tuple[ShardSet, PhotoStore]:
        """The set without `count` evenly spread photos, and those of them that are usable, decoded.

        Raises:
            ConfigError: nothing usable is held out, or nothing left to train on.
        """
        if not 0 < count < len(self):
            raise ConfigError(f"data.validation_photos must be between 1 and {len(self) - 1} for {len(self)} photos")
        starts = np.cumsum([0, *map(len, self.names)])
        indices = evenly_spread(count, len(self))
        held_out = [
            {names[index - start] for index in indices if start <= index < start + len(names)}
            for names, start in zip(self.names, starts, strict=False)
        ]
        photos = decode_photos(self._read_names(held_out), min_side=min_side)
        if not photos.names:
            raise ConfigError(f"no held-out photo has a short side of at least {min_side} pixels")
        left = [
            (path, tuple(name for name in names if name not in out))
            for path, names, out in zip(self.paths, self.names, held_out, strict=True)
        ]
        left = [(path, names) for path, names in left if names]
        return ShardSet(tuple(path for path, _ in left), tuple(names for _, names in left), self.num_bytes), photos

    def without(self, patterns: Sequence[str]) -> ShardSet:
        """The photos whose names fit no pattern (`data.is_excluded`).

        Raises:
            ConfigError: there is none.
        """
        names = [tuple(name for name in part if not is_excluded(name, patterns)) for part in self.names]
        left = [(path, part) for path, part in zip(self.paths, names, strict=True) if part]
        if not left:
            raise ConfigError("data.exclude leaves nothing to train on")
        return ShardSet(tuple(path for path, _ in left), tuple(part for _, part in left), self.num_bytes)

    def _read_names(self, wanted: list[set[str]]) -> Iterator[tuple[str, bytes]]:
        for path, names in zip(self.paths, wanted, strict=True):
            if names:
                with tarfile.open(path) as archive:
                    for name in sorted(names):
                        content = archive.extractfile(name)
                        assert content is not None  # only regular files are in the list
                        yield name, content.read()


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES and not META_FILE.match(name)


@dataclass(frozen=True)
class StreamSettings:
    """How a set is streamed.

    Attributes:
        lanes: number of lanes; at most the number of shards.
        readers: processes that read and decode, per training process; 0 = the training process itself.
        shuffle_buffer: encoded photos that each lane holds to draw from.
        crop, min_scale, seed: as for `CropSampler`.
    """

    lanes: int
    readers: int
    shuffle_buffer: int
    crop: int
    min_scale: float
    seed: int


@dataclass(frozen=True)
class _Windows(IterableDataset[tuple[np.ndarray, bool]]):
    """Windows of the samples `first`, `first + stride`, ... of a stage, ready to be shrunk.

    With n readers, reader k yields every n-th of them from the k-th on, and n divides the number of lanes in use, so
    each lane is read by one reader.
    """

    shards: ShardSet
    settings: StreamSettings
    stage: int
    batch_size: int
    first: int
    stride: int

    def __iter__(self) -> Iterator[tuple[np.ndarray, bool]]:
        reader = get_worker_info()
        skipped, every = (0, 1) if reader is None else (reader.id, reader.num_workers)
        sample = self.first + skipped * self.stride
        crop, seed, lanes = self.settings.crop, self.settings.seed, self.settings.lanes
        photos: dict[int, Iterator[np.ndarray]] = {}
        cuts, step = None, -1
        while True:
            lane = sample % lanes
            if lane not in photos:
                photos[lane] = self._photos(lane, sample // lanes)
            if cuts is None or sample // self.batch_size != step:
                step = sample // self.batch_size
                cuts = Cuts.draw(seed, self.stage * STAGE_STEPS + step, self.batch_size)
            index = sample % self.batch_size
            rgb = next(photos[lane])
            top, left, side = cuts.window(index, rgb.shape[:2], crop, self.settings.min_scale)
            yield np.ascontiguousarray(rgb[top : top + side, left : left + side]), bool(cuts.mirror[index])
            sample += every * self.stride

    def _photos(self, lane: int, position: int) -> Iterator[np.ndarray]:
        """Photos of a lane from a position on; the next usable one stands in for one that is not.

        Raises:
            ConfigError: none is usable.
        """
        unusable = 0
        for content in self._files(lane, position):
            rgb = decode_photo(content, self.settings.crop)
            if rgb is None:
                unusable += 1
                if unusable > len(self.shards):
                    raise ConfigError(f"no photo with a short side of at least {self.settings.crop} pixels")
                continue
            for _ in range(unusable + 1):
                yield rgb
            unusable = 0

    def _files(self, lane: int, position: int) -> Iterator[bytes]:
        """Encoded photos of a lane, epoch after epoch, from a position on."""
        from webdataset import shuffle

        settings, epoch = self.settings, 0
        while True:
            order = np.random.default_rng((settings.seed, self.stage, epoch)).permutation(len(self.shards.paths))
            dealt = order[lane :: settings.lanes]
            count = sum(len(self.shards.names[shard]) for shard in dealt)
            if position < count:
                mixer = random.Random(f"{settings.seed} {self.stage} {epoch} {lane}")
                buffer = settings.shuffle_buffer
                mixed = shuffle(buffer, initial=buffer, rng=mixer)(self._read(dealt))
                yield from islice(mixed, position, None)
                position = count
            position -= count
            epoch += 1

    def _read(self, dealt: np.ndarray) -> Iterator[bytes]:
        """Encoded photos of some shards, in order."""
        from webdataset.tariterators import tar_file_expander

        for shard in dealt:
            path, names = self.shards.paths[shard], set(self.shards.names[shard])
            with path.open("rb") as file:
                source: dict[str, Any] = {"url": str(path), "stream": file}
                for member in tar_file_expander([source], select_files=names.__contains__, eof_value=None):
                    yield member["data"]


class ShardSampler:
    """Random crops of streamed photos; as `CropSampler` it gives the batch of any step, and steps in a row fast.

    Args:
        shards: what to train on.
        settings: how to read it.
        device: where the crops end up.

    Raises:
        ConfigError: fewer shards than lanes.
        MissingExtraError: webdataset is not installed.
    """

    def __init__(self, shards: ShardSet, settings: StreamSettings, device: torch.device) -> None:
        try:
            import webdataset  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("webdataset", "train") from error
        if settings.lanes > len(shards.paths):
            raise ConfigError(f"data.stream_lanes must be at most the number of shards, {len(shards.paths)}")
        self.shards = shards
        self.settings = settings
        self.device = device
        self._next: tuple[int, int, int, int] | None = None
        self._windows: Iterator[tuple[np.ndarray, bool]] = iter(())

    def batch(self, step: int, batch_size: int, part: slice = ALL) -> Tensor:
        """See `data.Sampler`.

        Raises:
            ConfigError: the stride of `part`, the number of processes, does not divide the number of lanes.
        """
        first, stride = part.start or 0, part.step or 1
        if self.settings.lanes % stride:
            raise ConfigError(f"data.stream_lanes must be a multiple of the {stride} processes")
        if self._next != (step, batch_size, first, stride):
            self._windows = self._open(step, batch_size, first, stride)
        self._next = (step + 1, batch_size, first, stride)
        windows, mirror = zip(*islice(self._windows, len(range(batch_size)[part])), strict=True)
        return shrink([torch.from_numpy(w) for w in windows], np.array(mirror), self.settings.crop, self.device)

    def _open(self, step: int, batch_size: int, first: int, stride: int) -> Iterator[tuple[np.ndarray, bool]]:
        stage, step = divmod(step, STAGE_STEPS)
        windows = _Windows(self.shards, self.settings, stage, batch_size, step * batch_size + first, stride)
        lanes = self.settings.lanes // stride
        readers = max((n for n in range(1, self.settings.readers + 1) if lanes % n == 0), default=0)
        ahead = max(2, 2 * batch_size // (stride * readers)) if readers else None  # two batches
        return iter(
            DataLoader(
                windows,
                batch_size=None,
                num_workers=readers,
                prefetch_factor=ahead,
                collate_fn=_as_it_is,
                generator=torch.Generator(),  # else it would draw from the global one
            )
        )


def _as_it_is(window: Any) -> Any:
    """NumPy arrays are copied between processes; tensors would each hold a file open."""
    return window
