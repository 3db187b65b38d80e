"""`tokens --shards`: the token grids of many pictures as one data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pqmim.batch import Handling, Note, Result, run_jobs
from pqmim.bitstream import is_pqm, parse
from pqmim.cli import options as opt
from pqmim.cli.running import Codecs, exit_with, one_line_errors
from pqmim.files import Stream, place_of
from pqmim.jobs import Job, Kinds, find_files
from pqmim.reporting import Reporter

if TYPE_CHECKING:
    from pqmim.token_files import ShardKind, TokenRecord


@dataclass(frozen=True)
class _RecordResult(Result):
    record: TokenRecord | None = None


@dataclass
class RecordMaker:
    """Makes the record of a picture, which is encoded, or of a .pqm file, which is decoded as far as tokens.

    Attributes:
        quality: of pictures.
        with_files: the record has the .pqm file, too.
        places: path of each input below its folder.
    """

    codecs: Codecs
    quality: float
    with_files: bool = False
    places: dict[Path, Path] = field(default_factory=dict)

    def __call__(self, data: bytes, job: Job, note: Note) -> Callable[[], Result]:
        import numpy as np

        from pqmim.token_files import TokenRecord, label_of

        is_coded = is_pqm(data)
        codec = (
            self.codecs.for_file(parse(data), note)
            if is_coded
            else self.codecs.named(self.codecs.model or opt.DEFAULT_MODEL, note)
        )
        assert isinstance(job.source, Path)
        place = self.places[job.source]

        def make_result() -> Result:
            file, tokens = (
                (data, codec.decode_tokens(data)) if is_coded else codec.encode_with_tokens(data, quality=self.quality)
            )
            container = parse(file)
            record = TokenRecord(
                place.as_posix(),
                tokens.astype(np.uint16),
                codec.model_id.hex(),
                container.level,
                container.width,
                container.height,
                container.scale,
                label_of(place),
                file if self.with_files else None,
            )
            text = " x ".join(str(size) for size in tokens.shape) + " tokens"
            return _RecordResult({"shape": list(tokens.shape), "label": record.label}, text, record=record)

        return make_result


def write_token_shards(
    inputs: list[str],
    kinds: Kinds,
    maker: RecordMaker,
    folder: Path,
    kind: ShardKind,
    per_shard: int,
    handling: Handling,
    reporter: Reporter,
) -> None:
    """Write the shards, and exit as it went."""
    from pqmim.token_files import ShardWriter, label_of

    with one_line_errors(reporter):
        paths = [place for place in map(place_of, inputs) if not isinstance(place, Stream)]
        if len(paths) < len(inputs):
            raise typer.BadParameter("--shards takes files and folders, not '-' (stdin)")
        found = find_files(paths, kinds, reporter)
        places = sorted((place / source.name, source) for source, place in found)
        maker = replace(maker, places={source: place for place, source in places})
        classes = sorted({label for place in maker.places.values() if (label := label_of(place)) is not None})
        writer = ShardWriter(folder, kind, classes, per_shard=per_shard, force=handling.force)

        def take(result: Result) -> None:
            assert isinstance(result, _RecordResult)
            assert result.record is not None
            writer.add(result.record)

        run_jobs([Job(source, None) for _, source in places], maker, handling, reporter, take=take)
        writer.finish()
        if not (reporter.as_json or reporter.quiet):
            reporter.text(f"{folder}  {len(writer.paths):,} shards  {writer.num_records:,} pictures")
    exit_with(reporter)
