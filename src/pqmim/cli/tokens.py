"""`tokens`: token grids of images and .pqm files, one by one or as a data set."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pqmim.batch import Note, Result
from pqmim.bitstream import is_pqm, parse
from pqmim.cli import options as opt
from pqmim.cli.kinds import PQM, check_output, images
from pqmim.cli.running import Codecs, handling_of, run
from pqmim.cli.token_shards import RecordMaker, write_token_shards
from pqmim.jobs import Job, Kinds, Naming
from pqmim.options import Device
from pqmim.reporting import Reporter
from pqmim.token_files import PER_SHARD, ShardKind


@dataclass
class _Tokens:
    codecs: Codecs
    model: str | None
    quality: float

    def __call__(self, data: bytes, job: Job, note: Note) -> Callable[[], Result]:
        import numpy as np

        is_coded = is_pqm(data)
        codec = (
            self.codecs.for_file(parse(data), note)
            if is_coded
            else self.codecs.named(self.model or opt.DEFAULT_MODEL, note)
        )

        def make_result() -> Result:
            grid = codec.decode_tokens(data) if is_coded else codec.encode_tokens(data, quality=self.quality)
            npy = io.BytesIO()
            np.save(npy, grid.astype(np.uint16), allow_pickle=False)
            text = " x ".join(str(size) for size in grid.shape) + " tokens"
            return Result({"shape": list(grid.shape)}, text, npy.getvalue())

        return make_result


def tokens(
    inputs: opt.Inputs,
    output: opt.Output = None,
    quality: opt.Quality = opt.DEFAULT_QUALITY,
    model: opt.DecodingModel = None,
    made_for: opt.MadeFor = None,
    device: opt.DeviceOption = Device.AUTO,
    threads: opt.Threads = None,
    jobs: opt.Jobs = 1,
    shards: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write all grids as a data set into a folder.", show_default=False),
    ] = None,
    to: Annotated[ShardKind, typer.Option(help="What --shards writes.")] = ShardKind.WEBDATASET,
    per_shard: Annotated[int, typer.Option(metavar="N", min=1, help="Pictures in a shard.")] = PER_SHARD,
    with_files: Annotated[bool, typer.Option("--with-files", help="Put the .pqm files into shards, too.")] = False,
    force: opt.Force = False,
    skip_existing: opt.SkipExisting = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Write the token grids of images or .pqm files: photo.jpg becomes photo.npy.

    The arrays are (M, h, w) uint16, 65535 for tokens that a partial file does not hold. Those of an image are the
    tokens that `encode` sends at the same quality, with the model `photo` if none is named. With --shards they become
    a data set with sizes, levels and, as labels, the names of the folders that the pictures lie in.
    """
    opt.check_quality(quality)
    check_output(inputs, output, (".npy",), is_any_other=False)
    kinds = images()
    kinds = Kinds(kinds.suffixes | PQM, kinds.left_out)
    codecs = Codecs(model, device, threads, jobs, made_for)
    handling = handling_of(force=force, skip_existing=skip_existing, workers=jobs, codecs=codecs)
    reporter = Reporter(as_json, quiet, verbose)
    if shards is not None:
        opt.only_one_of({"-o": output, "--shards": shards})
        opt.only_one_of({"--skip-existing": skip_existing or None, "--shards": shards})
        maker = RecordMaker(codecs, quality, with_files)
        write_token_shards(inputs, kinds, maker, shards, to, per_shard, handling, reporter)
        return
    run(
        inputs,
        output,
        Naming(".npy", kinds.suffixes),
        kinds,
        _Tokens(codecs, model, quality),
        handling=handling,
        reporter=reporter,
    )
