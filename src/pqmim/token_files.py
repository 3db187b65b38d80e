"""Token grids as files for training: WebDataset shards and Parquet. Needs neither PyTorch nor the codec.

A shard is a tar file. Each picture has a running number and two to four members: `NUMBER.npy` (the grid, (M, h, w)
uint16), `NUMBER.json` (the other fields), `NUMBER.cls` (number of its class, if it has one) and, if wanted,
`NUMBER.pqm` (the file itself). A Parquet file has a row for each picture; there the grid is a list of uint16 in C order
and `shape` has its three sizes.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pqmim.errors import MissingExtraError, OutputError
from pqmim.files import write_file

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from pyarrow import Table

PER_SHARD = 1000
"""Pictures in a file."""
ROW_GROUP = 64
"""Pictures of a Parquet file that are read at a time."""
INFO = ("name", "model_id", "level", "width", "height", "scale", "label")
"""Fields of a record besides the grid and the file."""


class ShardKind(StrEnum):
    """What token grids are written as."""

    WEBDATASET = "webdataset"
    PARQUET = "parquet"

    @property
    def suffix(self) -> str:
        """Of its files."""
        return ".tar" if self is ShardKind.WEBDATASET else ".parquet"


@dataclass(frozen=True)
class TokenRecord:
    """The tokens of a picture, and what is needed to make something of them.

    Attributes:
        name: of the picture, as its path below the folder that it is from.
        tokens: (M, h, w) uint16, 65535 where a partial file holds none.
        model_id: of the model that the tokens are of, hexadecimal.
        level: whose codebooks they are from, as `Codec.embed` takes it.
        width, height: of the picture, pixels.
        scale: how many times smaller it was coded.
        label: name of its class.
        pqm: the .pqm file.
    """

    name: str
    tokens: NDArray[np.uint16]
    model_id: str
    level: int
    width: int
    height: int
    scale: int
    label: str | None = None
    pqm: bytes | None = None

    def info(self) -> dict[str, Any]:
        """All fields but the grid and the file."""
        return {name: getattr(self, name) for name in INFO}


def label_of(path: Path) -> str | None:
    """Class of a picture: the first folder of its path below the folder of all pictures, None if it lies in none."""
    return path.parts[0] if len(path.parts) > 1 else None


class ShardWriter:
    """Writes records to `shard-000000.tar` (or .parquet) and so on; each file appears whole or not at all.

    Args:
        folder: made if it is not there.
        classes: names of the classes in the order of their numbers.
        per_shard: records in a file, at least 1.
        force: shards that are in the folder are replaced, all of them, by the first that is written.

    Raises:
        OutputError: the folder has shards already.
        MissingExtraError: pyarrow is needed and not installed.
    """

    def __init__(
        self, folder: Path, kind: ShardKind, classes: Sequence[str], *, per_shard: int = PER_SHARD, force: bool = False
    ) -> None:
        if kind is ShardKind.PARQUET:
            _pyarrow()
        self._old = sorted(path for other in ShardKind for path in folder.glob(f"shard-*{other.suffix}"))
        if self._old and not force:
            raise OutputError(f"{folder} has shards already; -f replaces them")
        self._folder, self._kind, self._per_shard = folder, kind, per_shard
        self._numbers = {name: number for number, name in enumerate(classes)}
        self._records: list[TokenRecord] = []
        self.num_records = 0
        self.paths: list[Path] = []

    def add(self, record: TokenRecord) -> None:
        """Write a record, with others of its file.

        Raises:
            OutputError: the file cannot be written.
        """
        self._records.append(record)
        if len(self._records) == self._per_shard:
            self.finish()

    def finish(self) -> None:
        """Write what is left; errors as `add`."""
        if not self._records:
            return
        while self._old:
            self._old.pop().unlink(missing_ok=True)
        path = self._folder / f"shard-{len(self.paths):06}{self._kind.suffix}"
        if self._kind is ShardKind.PARQUET:
            data = parquet_bytes(self._records)
        else:
            data = _tar(self._records, self.num_records, self._numbers)
        write_file(path, data)
        self.paths.append(path)
        self.num_records += len(self._records)
        self._records = []


def tar_bytes(members: Sequence[tuple[str, bytes]]) -> bytes:
    """A tar file of members (name, content), the same bytes for the same members."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def _tar(records: Sequence[TokenRecord], first: int, numbers: dict[str, int]) -> bytes:
    import numpy as np

    members = []
    for number, record in enumerate(records, first):
        key = f"{number:09}"
        npy = io.BytesIO()
        np.save(npy, record.tokens, allow_pickle=False)
        members += [(f"{key}.npy", npy.getvalue()), (f"{key}.json", json.dumps(record.info()).encode())]
        if record.label is not None:
            members.append((f"{key}.cls", str(numbers[record.label]).encode()))
        if record.pqm is not None:
            members.append((f"{key}.pqm", record.pqm))
    return tar_bytes(members)


def parquet_bytes(records: Sequence[TokenRecord]) -> bytes:
    """A Parquet file of records.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    pyarrow = _pyarrow()
    from pyarrow.parquet import write_table

    kinds = {
        **dict.fromkeys(INFO, pyarrow.int32()),
        **dict.fromkeys(("name", "model_id", "label"), pyarrow.string()),
        "shape": pyarrow.list_(pyarrow.int32(), 3),
        "tokens": pyarrow.list_(pyarrow.uint16()),
        "pqm": pyarrow.binary(),
    }
    rows = [
        {**record.info(), "shape": record.tokens.shape, "tokens": record.tokens.ravel(), "pqm": record.pqm}
        for record in records
    ]
    columns = {name: pyarrow.array([row[name] for row in rows], kind) for name, kind in kinds.items()}
    file = io.BytesIO()
    write_table(pyarrow.table(columns), file, row_group_size=ROW_GROUP, compression="zstd")
    return file.getvalue()


def records_of(table: Table) -> list[TokenRecord]:
    """The records in rows of a Parquet file."""
    import numpy as np

    rows = table.select([*INFO, "shape", "pqm"]).to_pylist()
    grids = table.column("tokens")
    records = []
    for index, row in enumerate(rows):
        shape = row.pop("shape")
        tokens = np.array(grids[index].values.to_numpy(), np.uint16)  # a copy that can be written to
        records.append(TokenRecord(tokens=tokens.reshape(shape), **row))
    return records


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data") from error
    return pyarrow
