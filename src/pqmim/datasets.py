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

from pqmim.bitstream import parse
from pqmim.codec import NO_TOKEN
from pqmim.errors import ConfigError, MissingExtraError
from pqmim.loaded import decoding_codec
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
            Grids are read as they are; .pqm files, also those in shards that have no grids, are decoded when they are
            asked for, without making pictures.
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
        return _TarRecords(tar, model)
    if parquet:
        return _ParquetRecords(parquet, model)
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


@dataclass(frozen=True)
class _Coded:
    """A .pqm file among others."""

    name: str
    label: str | None
    data: bytes


def _decoded(coded: _Coded, model: str | os.PathLike[str] | None) -> TokenRecord:
    """Decode a file as far as its tokens."""
    container = parse(coded.data)
    codec = decoding_codec(container.model_id, model, threads=1)
    return TokenRecord(
        coded.name,
        codec.decode_tokens(coded.data).astype(np.uint16),
        codec.model_id.hex(),
        container.level,
        container.width,
        container.height,
        container.scale,
        coded.label,
        coded.data,
    )


class _TarRecords:
    """Records of WebDataset shards, of grids or of .pqm files: members are listed once, and read when asked for."""

    def __init__(self, paths: list[Path], model: str | os.PathLike[str] | None) -> None:
        self.labels: list[str | None] = []
        self._places: list[dict[str, _Place]] = []
        self._model = model
        for path in paths:
            pictures: dict[str, dict[str, _Place]] = {}
            try:
                with tarfile.open(path) as archive:
                    for member in archive:
                        key, _, suffix = member.name.partition(".")
                        pictures.setdefault(key, {})[suffix] = _Place(path, member.offset_data, member.size)
                for places in pictures.values():
                    if not places.keys() & {"npy", "pqm"}:
                        raise ValueError("pictures without tokens")
                    self.labels.append(json.loads(places["json"].read())["label"])
                    self._places.append(places)
            except (tarfile.TarError, KeyError, ValueError) as error:
                raise ConfigError(f"{path} is not a shard of tokens: {error}") from error

    def record(self, index: int) -> TokenRecord:
        places = self._places[index]
        info = json.loads(places["json"].read())
        if "npy" not in places:
            return _decoded(_Coded(info["name"], info["label"], places["pqm"].read()), self._model)
        tokens = np.load(io.BytesIO(places["npy"].read()), allow_pickle=False)
        return TokenRecord(tokens=tokens, **{name: info[name] for name in INFO})


class _ParquetRecords:
    """Records of Parquet files, of grids or of .pqm files: a few groups of rows at a time are in memory."""

    def __init__(self, paths: list[Path], model: str | os.PathLike[str] | None) -> None:
        try:
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise MissingExtraError("pyarrow", "data") from error
        self.labels: list[str | None] = []
        self._places: list[tuple[Path, int, int]] = []
        self._model = model
        for path in paths:
            with ParquetFile(path) as file:
                names = set(file.schema_arrow.names)
                if "label" not in names or not names & {"tokens", "pqm"}:
                    raise ConfigError(f"{path} is not a shard of tokens: it has no columns label and tokens")
                self.labels += file.read(["label"]).column("label").to_pylist()
                for group in range(file.num_row_groups):
                    rows = range(file.metadata.row_group(group).num_rows)
                    self._places += [(path, group, row) for row in rows]

    def record(self, index: int) -> TokenRecord:
        path, group, row = self._places[index]
        found = _row_group(path, group)[row]
        return found if isinstance(found, TokenRecord) else _decoded(found, self._model)


@lru_cache(maxsize=4)
def _row_group(path: Path, group: int) -> Sequence[TokenRecord | _Coded]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        table = file.read_row_group(group)
    if "tokens" in table.column_names:
        return records_of(table)
    return [_Coded(row["name"], row["label"], row["pqm"]) for row in table.to_pylist()]


class _CodedRecords:
    """Records of .pqm files, decoded as far as tokens when asked for."""

    def __init__(self, folder: Path, paths: list[Path], model: str | os.PathLike[str] | None) -> None:
        self._names = [path.relative_to(folder) for path in paths]
        self._paths, self._model = paths, model
        self.labels = [label_of(name) for name in self._names]

    def record(self, index: int) -> TokenRecord:
        coded = _Coded(self._names[index].as_posix(), self.labels[index], self._paths[index].read_bytes())
        return _decoded(coded, self._model)
