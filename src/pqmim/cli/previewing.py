"""`preview`: pictures in a few hundred bytes, as files, as data URLs, or on a page beside what others make of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pqmim.batch import Note, OutputCheck, Result, run_jobs
from pqmim.bitstream import parse
from pqmim.cli import options as opt
from pqmim.cli.kinds import check_output, image_suffixes, images
from pqmim.cli.running import Codecs, exit_with, handling_of, one_line_errors, reading_jobs, run
from pqmim.files import Stream, output_of, write
from pqmim.jobs import Job, Naming
from pqmim.options import Device
from pqmim.reporting import Reporter

if TYPE_CHECKING:
    from pqmim.codec import Codec
    from pqmim.evaluation.preview_page import Row

HTML = (".html", ".htm")
DEFAULT_PAGE = "previews.html"


@dataclass
class _Preview:
    codecs: Codecs
    model: str
    max_bytes: int

    def __call__(self, data: bytes, job: Job, note: Note) -> Callable[[], Result]:
        from pqmim import preview

        codec = self.codecs.named(self.model, note)
        return lambda: self._result(data, job, preview.encode(data, self.max_bytes, model=codec), codec)

    def _result(self, data: bytes, job: Job, coded: bytes, codec: Codec) -> Result:
        container = parse(coded)
        fields = {"width": container.width, "height": container.height, "bytes": len(coded)}
        return Result(fields, f"{container.width} x {container.height}  {len(coded):,} B", coded)


@dataclass
class _DataUrl(_Preview):
    max_side: int

    def _result(self, data: bytes, job: Job, coded: bytes, codec: Codec) -> Result:
        from pqmim import preview

        result = super()._result(data, job, coded, codec)
        url = preview.to_data_url(coded, self.max_side, model=codec)
        text = f"{result.text}  data URL of {len(url):,} characters"
        return Result({**result.fields, "data_url": url}, text, f"{url}\n".encode())


@dataclass
class _Page(_Preview):
    rows: list[Row] = field(default_factory=list)

    def _result(self, data: bytes, job: Job, coded: bytes, codec: Codec) -> Result:
        from pqmim.evaluation.preview_page import make_row

        self.rows.append(make_row(Path(job.name).name, data, coded, model=codec))
        return super()._result(data, job, coded, codec)


def preview(
    inputs: opt.Inputs,
    output: opt.Output = None,
    max_bytes: Annotated[int, typer.Option("--bytes", metavar="N", min=1, help="Largest size of a preview.")] = 200,
    data_url: Annotated[
        bool, typer.Option("--data-url", help="Write data URLs of the decoded previews: photo.preview.txt.")
    ] = False,
    max_side: Annotated[
        int, typer.Option(metavar="N", min=1, help="Longer side of the picture in a data URL, pixels.")
    ] = 64,
    html: Annotated[
        bool,
        typer.Option("--html", help=f"Write one page that shows originals and previews. [default OUT: {DEFAULT_PAGE}]"),
    ] = False,
    model: opt.EncodingModel = opt.DEFAULT_MODEL,
    decoder: opt.Decoder = None,
    realism: opt.Realism = None,
    jobs: opt.Jobs = 1,
    force: opt.Force = False,
    skip_existing: opt.SkipExisting = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Make previews, pictures in a few hundred bytes: photo.jpg becomes photo.preview.pqm."""
    opt.only_one_of({"--data-url": data_url or None, "--html": html or None})
    codecs = Codecs(model, Device.CPU, threads=1, decoder=decoder, realism=realism)
    if html:
        if jobs > 1:
            raise typer.BadParameter("give --html or -j, not both")
        page = _Page(codecs, model, max_bytes)
        _write_page(inputs, output, page, force=force, reporter=Reporter(as_json, quiet, verbose))
        return
    suffix, convert = ".pqm", _Preview(codecs, model, max_bytes)
    if data_url:
        suffix, convert = ".txt", _DataUrl(codecs, model, max_bytes, max_side)
    check_output(inputs, output, (suffix,), is_any_other=data_url)
    run(
        inputs,
        output,
        Naming(f".preview{suffix}", image_suffixes()),
        images(),
        convert,
        handling=handling_of(force=force, skip_existing=skip_existing, workers=jobs, codecs=codecs),
        reporter=Reporter(as_json, quiet, verbose),
    )


def _write_page(inputs: list[str], output: str | None, convert: _Page, *, force: bool, reporter: Reporter) -> None:
    output = DEFAULT_PAGE if output is None else output
    check_output(["-"], output, HTML, is_any_other=False)
    target = output_of(output)
    reporter.to_stderr = isinstance(target, Stream)
    handling = handling_of(force=force, codecs=convert.codecs)
    with one_line_errors(reporter):
        jobs = reading_jobs(inputs, images(), reporter)
        OutputCheck(jobs, handling).require(target)
        run_jobs(jobs, convert, handling, reporter)
        if convert.rows:
            from pqmim.evaluation.preview_page import preview_page

            page = preview_page(convert.rows, "pqmim preview", max_bytes=convert.max_bytes).encode()
            write(target, page)
            name = Job(None, target).target_name
            fields = {"output": name, "images": len(convert.rows), "page_bytes": len(page)}
            reporter.result(name, f"{len(convert.rows)} images  {len(page):,} B", fields)
    exit_with(reporter)
