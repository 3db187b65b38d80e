"""Many pictures by many processes or machines, with Ray Data: a folder or a URL in, files or shards out.

Pictures are dealt out in batches. The worker that encodes a batch also reads its pictures and writes what becomes of
them, so that no picture passes through the driver, and one that cannot be read costs its own row only. When all of a
batch is written, a *record* of it follows, a file in `_records` with a row for each picture: what has a record is done,
whatever happens next to worker or driver. `resume` does what has none.

A batch whose worker dies is done again; if that kills others too, its pictures are tried one by one in the end.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Any

from pqmim.errors import OutputError, PqmimError
from pqmim.options import DEFAULT_MODEL, EncodeOptions
from pqmim.ray_session import ray_session
from pqmim.remote_files import Place
from pqmim.reporting import Failure
from pqmim.token_files import label_of, tar_bytes

RECORDS = "_records"
SETTINGS = f"{RECORDS}/settings.json"
MANIFEST = "manifest"
MAX_RETRIES = 2
"""Times that a batch is given to another worker, before its pictures are tried one by one."""
DIED = "its worker process died, for which too little memory is the usual reason"


class BulkFormat(StrEnum):
    """What .pqm files are written to."""

    FILES = "files"
    PARQUET = "parquet"
    WEBDATASET = "webdataset"


class ManifestFormat(StrEnum):
    """What the list of all pictures is written as."""

    CSV = "csv"
    PARQUET = "parquet"


BATCH_SIZES = {BulkFormat.FILES: 16, BulkFormat.PARQUET: 256, BulkFormat.WEBDATASET: 256}


@dataclass(frozen=True)
class Row:
    """What came of a picture: a row of the manifest.

    Attributes:
        path: of the picture below the source.
        output: file that has what became of it, below the output; empty if there was an error.
        bytes: of the .pqm file, 0 if there was an error, as the next three.
        width, height: pixels.
        bpp: bits per pixel.
        seconds: that encoding took.
        error: what went wrong in one line, else empty.
    """

    path: str
    output: str = ""
    bytes: int = 0
    width: int = 0
    height: int = 0
    bpp: float = 0.0
    seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class BulkOptions:
    """How pictures are encoded and written.

    Attributes:
        to: what is written; a Parquet file or a tar file for each batch.
        model, decoder, quality, target_bytes, target_bpp, options, device, threads: as `ray.Encode` takes them.
        batch_size: pictures that a worker takes at a time.
    """

    to: BulkFormat = BulkFormat.FILES
    model: str = DEFAULT_MODEL
    decoder: str | None = None
    quality: float = 50.0
    target_bytes: int | None = None
    target_bpp: float | None = None
    options: EncodeOptions = EncodeOptions()  # noqa: RUF009 (it is frozen)
    device: str = "auto"
    threads: int = 1
    batch_size: int = BATCH_SIZES[BulkFormat.FILES]

    def settings(self) -> dict[str, Any]:
        """What must be the same for outputs of two runs to go together."""
        effort = {"effort": self.options.effort, "tune": self.options.tune.value}
        names = ("to", "model", "decoder", "quality", "target_bytes", "target_bpp")
        return {name: getattr(self, name) for name in names} | effort


class Bulk:
    """The encoding of all pictures of a folder.

    Args:
        source: path or URL of the folder.
        output: path or URL of a folder that is empty or not there; with `resume`, what an earlier run left.
        suffixes: of pictures, in lower case.
        resume: pictures that an earlier run has done are left as they are.

    Attributes:
        todo: pictures to be done, as paths below the source.
        done: rows of those that are done, by their paths.

    Raises:
        OutputError: the output has files already; or it was written with other settings.
        PqmimError: there are no pictures.
    """

    def __init__(
        self, source: str, output: str, options: BulkOptions, *, suffixes: Collection[str], resume: bool = False
    ) -> None:
        self._source, self._output, self._options = Place(source), Place(output), options
        if not self._source.is_folder():
            raise PqmimError(f"{source} is not a folder")
        paths = [name for name in self._source.names() if PurePosixPath(name).suffix.lower() in suffixes]
        if not paths:
            raise PqmimError(f"{source}: no pictures in this folder")
        self._check_output(resume)
        wanted = Counter(_output_name(path).lower() for path in paths)
        self._names = {
            path: f"{path}.pqm" if wanted[_output_name(path).lower()] > 1 else _output_name(path) for path in paths
        }
        self.done = {row.path: row for row in self._recorded() if not row.error}
        self.todo = [path for path in paths if path not in self.done]

    def _check_output(self, resume: bool) -> None:
        """Refuse an output that does not fit."""
        present, settings = self._output.names(), self._options.settings()
        if SETTINGS in present and resume:
            before = json.loads(self._output.read(SETTINGS))
            changed = [name for name in settings if before.get(name) != settings[name]]
            if changed:
                raise OutputError(
                    f"{self._output.url} was written with {changed[0]} {before.get(changed[0])}, "
                    f"not {settings[changed[0]]}; name another folder"
                )
        elif present:
            advice = "--resume goes on with them" if SETTINGS in present else "name an empty folder"
            raise OutputError(f"{self._output.url} has files already; {advice}")

    def start(self) -> None:
        """Note the settings in the output; `run` does so when its workers are there. Raises OSError, OutputError."""
        self._output.write(SETTINGS, json.dumps(self._options.settings()).encode())

    def run(self, concurrency: int) -> Generator[Row, None, None]:
        """Do what is to be done.

        Args:
            concurrency: workers.

        Yields:
            A row for each picture of `todo`, as they come.
        """
        if not self.todo:
            return
        with ray_session(concurrency):
            self.start()
            for batch_size in dict.fromkeys((self._options.batch_size, 1)):
                yield from self._round(batch_size, concurrency)
        for path in self._left():
            yield self._take(Row(path, error=DIED))

    def _round(self, batch_size: int, concurrency: int) -> Iterator[Row]:
        """Do what is left in batches of a size; what no worker survived is left again."""
        left = self._left()
        if not left:
            return
        self._remove_orphans()
        for row in self._rows_of(left, batch_size, concurrency):
            yield self._take(row)
        if self._left():
            recorded = {row.path: row for row in self._recorded() if not row.error}
            for path in self._left():
                if path in recorded:  # its worker died after that
                    yield self._take(recorded[path])

    def _left(self) -> list[str]:
        return [path for path in self.todo if path not in self.done]

    def _take(self, row: Row) -> Row:
        self.done[row.path] = row
        return row

    def write_manifest(self, kind: ManifestFormat) -> str:
        """Write a row for each picture; returns the name of the file."""
        rows = [asdict(self.done[path]) for path in sorted(self.done)]
        columns = [field.name for field in fields(Row)]
        if kind is ManifestFormat.PARQUET:
            import pyarrow
            from pyarrow.parquet import write_table

            file = io.BytesIO()
            write_table(pyarrow.table({name: [row[name] for row in rows] for name in columns}), file)
            data = file.getvalue()
        else:
            text = io.StringIO()
            writer = csv.DictWriter(text, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            data = text.getvalue().encode()
        name = f"{MANIFEST}.{kind}"
        self._output.write(name, data)
        return name

    def _recorded(self) -> list[Row]:
        names = [name for name in self._output.names(RECORDS) if name != SETTINGS]
        return [Row(**row) for name in names for row in json.loads(self._output.read(name))]

    def _remove_orphans(self) -> None:
        """Remove shards of batches that have no record: their pictures are done again, in other batches."""
        if self._options.to is BulkFormat.FILES:
            return
        present = self._output.names()
        records = {PurePosixPath(name).stem for name in present if name.startswith(f"{RECORDS}/")}
        for name in present:
            path = PurePosixPath(name)
            if path.name.startswith("part-") and len(path.parts) == 1 and path.stem not in records:
                self._output.remove(name)

    def _rows_of(self, paths: Sequence[str], batch_size: int, concurrency: int) -> Iterator[Row]:
        """Have workers do pictures; those of batches that no worker survived are left out."""
        import ray.data

        items = [{"path": path, "name": self._names[path]} for path in paths]
        batches = ray.data.from_items(items, override_num_blocks=-(-len(items) // batch_size))
        batches.context.enable_progress_bars = False
        batches.context.max_errored_blocks = -1
        rows = batches.map_batches(
            BatchStep,
            fn_constructor_args=(self._source.url, self._output.url, self._options),
            batch_size=batch_size,
            compute=ray.data.ActorPoolStrategy(size=min(concurrency, len(items))),
            ray_remote_args_fn=_worker_settings,
        )
        for batch in rows.iter_batches(batch_size=None, batch_format="numpy"):
            yield from (Row(**json.loads(text)) for text in batch["row"])


def _worker_settings() -> dict[str, Any]:
    return {"max_restarts": -1, "max_task_retries": MAX_RETRIES}


def _output_name(path: str) -> str:
    return PurePosixPath(path).with_suffix(".pqm").as_posix()


class BatchStep:
    """What a worker does with a batch: reads its pictures, encodes them, writes what became of them, and a record.

    Args:
        source, output: paths or URLs.
    """

    def __init__(self, source: str, output: str, options: BulkOptions) -> None:
        from pqmim.ray import Encode

        self._source, self._output, self._options = Place(source), Place(output), options
        self._encode = Encode(
            options.model,
            decoder=options.decoder,
            quality=options.quality,
            target_bytes=options.target_bytes,
            target_bpp=options.target_bpp,
            options=options.options,
            device=options.device,
            threads=options.threads,
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """`path` and `name` of pictures -> `row`, a Row as JSON for each."""
        names = dict(zip(map(str, batch["path"]), map(str, batch["name"]), strict=True))
        return {"row": [json.dumps(asdict(row)) for row in self.rows_of(names)]}

    def rows_of(self, names: dict[str, str]) -> list[Row]:
        """Do a batch.

        Args:
            names: path of each picture -> of its .pqm file.
        """
        part = f"part-{hashlib.sha256(json.dumps(sorted(names)).encode()).hexdigest()[:16]}"
        files: dict[str, bytes] = {}
        rows = [self._row(path, name, part, files) for path, name in names.items()]
        try:
            if self._options.to is not BulkFormat.FILES and files:
                done = [row for row in rows if not row.error]
                self._output.write(done[0].output, _shard(self._options.to, done, files))
            self._output.write(f"{RECORDS}/{part}.json", json.dumps([asdict(row) for row in rows]).encode())
        except Exception as error:
            return [Row(path, error=Failure.of(error).about(None)) for path in names]
        return rows

    def _row(self, path: str, name: str, part: str, files: dict[str, bytes]) -> Row:
        """Do a picture; its file is written, or put among those of a shard."""
        try:
            coded = self._encode.encode(self._source.read(path))
            if coded.error:
                return Row(path, seconds=round(coded.seconds, 3), error=coded.error)
            output = name
            if self._options.to is BulkFormat.FILES:
                self._output.write(name, coded.bytes)
            else:
                output = part + (".parquet" if self._options.to is BulkFormat.PARQUET else ".tar")
                files[path] = coded.bytes
        except Exception as error:
            return Row(path, error=Failure.of(error).about(None))
        size = len(coded.bytes)
        return Row(path, output, size, coded.width, coded.height, round(coded.bpp, 6), round(coded.seconds, 3))


def _info(row: Row) -> dict[str, Any]:
    return {"name": row.path, "label": label_of(Path(row.path)), "width": row.width, "height": row.height}


def _shard(kind: BulkFormat, rows: Sequence[Row], files: dict[str, bytes]) -> bytes:
    """A Parquet file with a row for each picture, or a tar file with NUMBER.pqm and NUMBER.json."""
    infos = [_info(row) for row in rows]
    if kind is BulkFormat.PARQUET:
        import pyarrow
        from pyarrow.parquet import write_table

        columns: dict[str, Any] = {name: [info[name] for info in infos] for name in infos[0]}
        columns["label"] = pyarrow.array(columns["label"], pyarrow.string())  # also where none has one
        file = io.BytesIO()
        write_table(pyarrow.table({**columns, "pqm": [files[row.path] for row in rows]}), file)
        return file.getvalue()
    part, members = PurePosixPath(rows[0].output).stem, []
    for number, info in enumerate(infos):
        key = f"{part}-{number:06}"
        members += [(f"{key}.pqm", files[info["name"]]), (f"{key}.json", json.dumps(info).encode())]
    return tar_bytes(members)
