"""Tokens as a data set for PyTorch.

    from pqmim.datasets import TokenDataset
    dataset = TokenDataset("shards")    # what `pqmim tokens PHOTOS --shards shards` wrote; or a folder of .pqm files
    dataset[0]["tokens"]                # (M, h, w) int64 tensor

Writing does without PyTorch: `token_files`. docs/datasets.md shows the ways in and out.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol, TypedDict

import numpy as np

from pqmim.codec import NO_TOKEN
from pqmim.errors import ConfigError, MissingExtraError
from pqmim.token_files import INFO, ShardKind, TokenRecord, label_of, records_of

try:
    import torch
    from torch import Tensor
    from torch.utils.data import Dataset
except ImportError as error:
    raise MissingExtraError("torch", "data") from error

__all__ = ["NO_LABEL", "Sample", "TokenDataset"]

NO_LABEL = -1
"""Number of the class of a picture that has none."""


class Sample(TypedDict):
    """What `TokenDataset` gives for a picture.

    `tokens` is (M, h, w) int64, -1 where a partial file holds none; `label` the number of its class, NO_LABEL without
    one; the others are those of `token_files.TokenRecord`.
    """

    tokens: Tensor
    label: int
    level: int
    width: int
    height: int
    scale: int
    name: str


class TokenDataset(Dataset[Sample]):
    """The token grids of pictures, for `torch.utils.data.DataLoader`, with any number of workers.

    Pictures of different sizes have grids of different sizes: give the loader a `collate_fn` that crops or pads, or
    batches of one.

    Args:
        source: a shard (.tar or .parquet), a .pqm file, or a folder with files of one of these kinds in it or below.
            Shards are read as they are; .pqm files are decoded as they are asked for, without making pictures.
        model: of .pqm files: name or path; None = the shipped one that a file names.
        classes: names of the classes in the order of their numbers; None = those there are, sorted.

    Attributes:
        classes: as above.

    Raises:
        ConfigError: there is nothing to read, or a label that `classes` lacks.
        MissingExtraError: pyarrow is needed and not installed.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        model: str | os.PathLike[str] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self._records = _open(Path(source), model)
        found = sorted({label for label in self._records.labels if label is not None})
        self.classes = tuple(found if classes is None else classes)
        self._numbers: dict[str | None, int] = {None: NO_LABEL}
        self._numbers |= {name: number for number, name in enumerate(self.classes)}
        unknown = [label for label in found if label not in self._numbers]
        if unknown:
            raise ConfigError(f"{source} has pictures of the class {unknown[0]}, which is not in the list")

    def __len__(self) -> int:
        return len(self._records.labels)

    @property
    def labels(self) -> list[int]:
        """Number of the class of each picture, without reading its tokens."""
        return [self._numbers[label] for label in self._records.labels]

    def record(self, index: int) -> TokenRecord:
        """Everything about a picture.

        Raises:
            BitstreamError, ModelError: a .pqm file cannot be decoded.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        return self._records.record(index)

    def __getitem__(self, index: int) -> Sample:
        record = self.record(index)
        tokens = torch.from_numpy(record.tokens.astype(np.int64))
        return {
            "tokens": tokens.masked_fill_(tokens == NO_TOKEN, -1),
            "label": self._numbers[record.label],
            "level": record.level,
            "width": record.width,
            "height": record.height,
            "scale": record.scale,
            "name": record.name,
        }


class _Records(Protocol):
    """Where records come from; `labels` has one for each."""

    labels: list[str | None]

    def record(self, index: int) -> TokenRecord: ...


def _open(source: Path, model: str | os.PathLike[str] | None) -> _Records:
    """Find out what there is to read."""
    tar, parquet = (_files(source, kind.suffix) for kind in (ShardKind.WEBDATASET, ShardKind.PARQUET))
    coded = _files(source, ".pqm")
    if sum(map(bool, (tar, parquet, coded))) > 1:
        raise ConfigError(f"{source} has files of several kinds; name a folder of one: .tar, .parquet or .pqm")
    if tar:
        return _TarRecords(tar)
    if parquet:
        return _ParquetRecords(parquet)
    if coded:
        return _CodedRecords(source if source.is_dir() else source.parent, coded, model)
    raise ConfigError(f"{source}: no .tar, .parquet or .pqm file")


def _files(source: Path, suffix: str) -> list[Path]:
    if source.is_dir():
        return sorted(path for path in source.rglob(f"*{suffix}") if path.is_file())
    return [source] if source.suffix == suffix and source.is_file() else []


@dataclass(frozen=True)
class _Place:
    """A run of bytes in a file."""

    path: Path
    start: int
    size: int

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.size)


class _TarRecords:
    """Records of WebDataset shards: their members are listed once, grids are read when asked for."""

    def __init__(self, paths: list[Path]) -> None:
        self.labels: list[str | None] = []
        self._infos: list[_Place] = []
        self._grids: list[_Place] = []
        for path in paths:
            infos: dict[str, _Place] = {}
            grids: dict[str, _Place] = {}
            try:
                with tarfile.open(path) as archive:
                    for member in archive:
                        key, _, suffix = member.name.partition(".")
                        if suffix in ("json", "npy"):
                            place = _Place(path, member.offset_data, member.size)
                            (infos if suffix == "json" else grids)[key] = place
                for key, info in infos.items():
                    self._grids.append(grids[key])
                    self._infos.append(info)
                    self.labels.append(json.loads(info.read())["label"])
            except (tarfile.TarError, KeyError, ValueError) as error:
                raise ConfigError(f"{path} is not a shard of tokens: {error}") from error

    def record(self, index: int) -> TokenRecord:
        info = json.loads(self._infos[index].read())
        tokens = np.load(io.BytesIO(self._grids[index].read()), allow_pickle=False)
        return TokenRecord(tokens=tokens, **{name: info[name] for name in INFO})


class _ParquetRecords:
    """Records of Parquet files, read a group of rows at a time, the last few of which are kept."""

    def __init__(self, paths: list[Path]) -> None:
        try:
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise MissingExtraError("pyarrow", "data") from error
        self.labels: list[str | None] = []
        self._places: list[tuple[Path, int, int]] = []
        for path in paths:
            with ParquetFile(path) as file:
                self.labels += file.read(["label"]).column("label").to_pylist()
                for group in range(file.num_row_groups):
                    rows = range(file.metadata.row_group(group).num_rows)
                    self._places += [(path, group, row) for row in rows]

    def record(self, index: int) -> TokenRecord:
        path, group, row = self._places[index]
        return _row_group(path, group)[row]


@lru_cache(maxsize=4)
def _row_group(path: Path, group: int) -> list[TokenRecord]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        return records_of(file.read_row_group(group))


class _CodedRecords:
    """Records of .pqm files, decoded as far as tokens when asked for."""

    def __init__(self, folder: Path, paths: list[Path], model: str | os.PathLike[str] | None) -> None:
        self._names = [path.relative_to(folder) for path in paths]
        self._paths, self._model = paths, model
        self.labels = [label_of(name) for name in self._names]

    def record(self, index: int) -> TokenRecord:
        from pqmim.bitstream import parse
        from pqmim.loaded import decoding_codec

        data = self._paths[index].read_bytes()
        container = parse(data)
        codec = decoding_codec(container.model_id, self._model, threads=1)
        return TokenRecord(
            self._names[index].as_posix(),
            codec.decode_tokens(data).astype(np.uint16),
            codec.model_id.hex(),
            container.level,
            container.width,
            container.height,
            container.scale,
            self.labels[index],
            data,
        )
