"""`bulk`: very many pictures, by processes here or by a cluster."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from importlib.util import find_spec
from typing import Annotated

import typer

from pqmim.bulk import BATCH_SIZES, Bulk, BulkFormat, BulkOptions, ManifestFormat, Row
from pqmim.cli import options as opt
from pqmim.cli.kinds import image_suffixes
from pqmim.cli.running import exit_with, one_line_errors
from pqmim.cores import num_usable_cores
from pqmim.errors import MissingExtraError, ModelError
from pqmim.options import DEFAULT_EFFORT, MAX_EFFORT, MAX_PIXELS, Device, EncodeOptions
from pqmim.reporting import Failure, Reporter


def bulk(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder of pictures, or its URL.", show_default=False)],
    output: Annotated[
        str, typer.Argument(metavar="OUT", help="Folder for the results, or its URL.", show_default=False)
    ],
    to: Annotated[BulkFormat, typer.Option(help="What the .pqm files are written to.")] = BulkFormat.FILES,
    quality: opt.Quality = opt.DEFAULT_QUALITY,
    target_bytes: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Largest size of a file, instead of -q.", show_default=False)
    ] = None,
    target_bpp: Annotated[
        float | None, typer.Option(metavar="X", help="Most bits per pixel, instead of -q.", show_default=False)
    ] = None,
    effort: Annotated[
        int, typer.Option(metavar="N", min=1, max=MAX_EFFORT, help="1 is fast; more is slower and better.")
    ] = DEFAULT_EFFORT,
    concurrency: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Pictures at a time, each by a worker. [default: the cores]"),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Pictures of a batch, which is a shard. [default: 16, of shards 256]"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what an earlier run left, and try again what failed.")
    ] = False,
    manifest: Annotated[
        ManifestFormat, typer.Option(help="Of the list with a row for each picture.")
    ] = ManifestFormat.CSV,
    model: opt.EncodingModel = opt.DEFAULT_MODEL,
    made_for: opt.MadeFor = None,
    device: opt.DeviceOption = Device.AUTO,
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Threads of each worker. [default: the cores, shared]"),
    ] = None,
    max_pixels: opt.MaxPixels = MAX_PIXELS,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Compress all pictures of a folder or a URL with Ray: files, Parquet or WebDataset, and a manifest.

    A worker that dies costs nothing but time, and --resume does what a run that was ended has not done. Without a
    cluster (RAY_ADDRESS) the workers are processes of this machine.
    """
    opt.check_quality(quality)
    opt.only_one_of({"--target-bytes": target_bytes, "--target-bpp": target_bpp})
    opt.check_bpp(target_bpp, "--target-bpp")
    workers = concurrency or num_usable_cores()
    options = BulkOptions(
        to,
        model,
        made_for,
        quality,
        target_bytes,
        target_bpp,
        EncodeOptions(effort=effort, max_pixels=max_pixels),
        device.value,
        threads or max(1, num_usable_cores() // workers),
        batch_size or BATCH_SIZES[to],
    )
    reporter = Reporter(as_json, quiet, verbose)
    with one_line_errors(reporter):
        if find_spec("ray") is None:
            raise MissingExtraError("ray", "ray")
        _check_model(model, made_for)
        work = Bulk(source, output, options, suffixes=image_suffixes(), resume=resume)
        if resume and not (as_json or quiet):
            reporter.message(f"{len(work.done):,} of {len(work.done) + len(work.todo):,} pictures are done already")
        with reporter.progress(len(work.todo)) as advance, closing(work.run(workers)) as rows:
            for row in rows:
                _report(row, reporter)
                advance()
        name = work.write_manifest(manifest)
        if not (as_json or quiet):
            reporter.text(f"{output.rstrip('/')}/{name}  {len(work.done):,} pictures")
    exit_with(reporter)


def _check_model(model: str, decoder: str | None) -> None:
    """Find out before workers do whether a model and a decoder can be used."""
    from pqmim.decoder_files import check_fits, find_decoder, load_decoder
    from pqmim.model_files import find_model, load_model

    try:
        path = find_model(model)
        check_fits(load_decoder(find_decoder(decoder, path)), load_model(path))
    except OSError as error:
        raise ModelError(f"{model}: {error.strerror or error}") from error


def _report(row: Row, reporter: Reporter) -> None:
    if row.error:
        reporter.failure(row.path, Failure(row.error))
    else:
        text = f"{row.output}  {row.bytes:,} B  {row.bpp:.3f} bpp  {row.seconds:.2f} s"
        reporter.result(row.path, text, {"input": row.path, **asdict(row)})
