"""`generate`, `inpaint` and `gallery`: pictures that the model draws, in whole or in part."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pqmim.batch import Note, OutputCheck, Result, run_jobs
from pqmim.cli import options as opt
from pqmim.cli.kinds import check_output, image_suffixes, images
from pqmim.cli.pictures import PictureWriter, how_filled, joined, synthesis_note
from pqmim.cli.running import Codecs, do, exit_with, handling_of, one_line_errors, reading_jobs, run
from pqmim.errors import PqmimError
from pqmim.files import Place, Stream, output_of, place_identity, place_of, write
from pqmim.jobs import Job, Naming
from pqmim.options import MAX_PIXELS, Device, Fill, FillOptions
from pqmim.reporting import Reporter

if TYPE_CHECKING:
    from PIL.Image import Image

    from pqmim.evaluation.gallery import GalleryOptions, Strip

PNG = (".png",)
HTML = (".html", ".htm")
MAX_NUMBER = 1_000_000


@dataclass
class _Generate:
    codecs: Codecs
    model: str
    width: int
    height: int
    quality: float
    options: dict[Place | None, FillOptions]

    def __call__(self, data: bytes, job: Job, note: Note) -> Callable[[], Result]:
        codec = self.codecs.named(self.model, note)
        options = self.options[job.target]

        def make_result() -> Result:
            image = codec.generate(self.width, self.height, quality=self.quality, options=options)
            how = f"nothing was sent, all tokens were drawn ({how_filled(options)})"
            comment = joined(how, synthesis_note(codec))
            fields = {"width": self.width, "height": self.height, "seed": options.seed}
            text = f"{self.width} x {self.height}  seed {options.seed}"
            return Result(fields, text, PictureWriter().file(image, comment))

        return make_result


def generate(
    output: Annotated[str, typer.Option("-o", "--output", metavar="OUT", help="Folder, or '-' for stdout.")],
    size: Annotated[str, typer.Option(metavar="WxH", help="Of the pictures, pixels.")],
    number: Annotated[int, typer.Option("-n", "--number", min=1, max=MAX_NUMBER, help="How many pictures.")] = 1,
    quality: opt.Quality = opt.DEFAULT_QUALITY,
    seed: opt.Seed = 0,
    temperature: opt.Temperature = 1.0,
    steps: opt.Steps = None,
    model: opt.EncodingModel = opt.DEFAULT_MODEL,
    decoder: opt.Decoder = None,
    realism: opt.Realism = None,
    device: opt.DeviceOption = Device.AUTO,
    threads: opt.Threads = None,
    force: opt.Force = False,
    skip_existing: opt.SkipExisting = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Draw pictures of which nothing was sent: 00.png, 01.png, ... with one seed after the other."""
    opt.check_quality(quality)
    width, height = opt.width_and_height(size)
    filling = opt.fill_options(Fill.SAMPLE, seed, temperature, steps)
    place = output_of(output)
    targets: list[Place] = [place]
    if isinstance(place, Path):
        digits = max(2, len(str(number - 1)))
        targets = [place / f"{index:0{digits}}.png" for index in range(number)]
    elif number > 1:
        raise typer.BadParameter("only one picture can go to '-' (stdout)", param_hint="'-n' / '--number'")
    options: dict[Place | None, FillOptions] = {
        target: replace(filling, seed=seed + index) for index, target in enumerate(targets)
    }
    codecs = Codecs(model, device, threads, decoder=decoder, realism=realism)
    do(
        [Job(None, target) for target in targets],
        _Generate(codecs, model, width, height, quality, options),
        handling_of(force=force, skip_existing=skip_existing, codecs=codecs),
        Reporter(as_json, quiet, verbose),
    )


@dataclass
class _Inpaint:
    codecs: Codecs
    model: str
    mask: Image
    quality: float
    options: FillOptions

    def __call__(self, data: bytes, job: Job, note: Note) -> Callable[[], Result]:
        codec = self.codecs.named(self.model, note)

        def make_result() -> Result:
            drawn = codec.inpaint(data, self.mask, quality=self.quality, options=self.options)
            how = f"the part under a mask was drawn by the model ({how_filled(self.options)})"
            comment = joined(how, synthesis_note(codec))
            fields = {"width": drawn.width, "height": drawn.height}
            return Result(fields, f"{drawn.width} x {drawn.height}", PictureWriter().file(drawn, comment))

        return make_result


def inpaint(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="The picture; '-' is stdin.", show_default=False)],
    mask: Annotated[str, typer.Option(metavar="MASK", help="Picture of the same size, bright where to draw anew.")],
    output: Annotated[str, typer.Option("-o", "--output", metavar="OUT", help="File, folder, or '-' for stdout.")],
    quality: opt.Quality = opt.DEFAULT_QUALITY,
    fill: opt.FillOption = Fill.SAMPLE,
    seed: opt.Seed = 0,
    temperature: opt.Temperature = 1.0,
    steps: opt.Steps = None,
    model: opt.EncodingModel = opt.DEFAULT_MODEL,
    decoder: opt.Decoder = None,
    realism: opt.Realism = None,
    device: opt.DeviceOption = Device.AUTO,
    threads: opt.Threads = None,
    force: opt.Force = False,
    skip_existing: opt.SkipExisting = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Draw a part of a picture anew, from what is around it."""
    opt.check_quality(quality)
    if image == mask == "-":
        raise typer.BadParameter("only one of picture and mask can be '-' (stdin)")
    check_output([image], output, PNG, is_any_other=True)
    options = opt.fill_options(fill, seed, temperature, steps)
    reporter = Reporter(as_json, quiet, verbose)
    with one_line_errors(reporter):
        if output != "-" and place_identity(Path(output)) == place_identity(Path(mask)):
            raise typer.BadParameter("is the mask, which is never overwritten", param_hint="'-o' / '--output'")
    try:
        mask_image = _load_mask(mask)
    except (PqmimError, OSError, MemoryError) as error:
        reporter.failure(mask, error)
        raise typer.Exit(1) from error
    suffixes = image_suffixes()
    codecs = Codecs(model, device, threads, decoder=decoder, realism=realism)
    run(
        [image],
        output,
        Naming(".png", suffixes),
        images(),
        _Inpaint(codecs, model, mask_image, quality, options),
        handling=handling_of(force=force, skip_existing=skip_existing, inputs=(Path(mask),), codecs=codecs),
        reporter=reporter,
    )


def _load_mask(name: str) -> Image:
    """Read a mask, so that errors name it and not the picture."""
    from pqmim.image_io import load_picture, to_pillow

    place = place_of(name)
    if isinstance(place, Path):
        return to_pillow(load_picture(place))
    return to_pillow(load_picture(b"" if sys.stdin is None else sys.stdin.buffer.read()))


@dataclass
class _Gallery:
    codecs: Codecs
    model: str
    options: GalleryOptions
    strips: list[Strip] = field(default_factory=list)

    def __call__(self, data: bytes, job: Job, note: Note) -> Callable[[], Result]:
        from pqmim.evaluation.gallery import make_strip

        codec = self.codecs.named(self.model, note)

        def make_result() -> Result:
            strip = make_strip(codec, Path(job.name).name, data, self.options)
            self.strips.append(strip)
            sizes = [kept.num_bytes for kept in strip.kept]
            return Result({"bytes": sizes}, " ".join(f"{size:,}" for size in sizes) + " B")

        return make_result


def gallery(
    inputs: opt.Inputs,
    output: Annotated[str, typer.Option("-o", "--output", metavar="OUT", help="The HTML page, or '-' for stdout.")],
    keeps: Annotated[
        str, typer.Option(metavar="FRACTION,...", help="Shares of the tokens that are kept.")
    ] = "1,0.8,0.6,0.4,0.2,0",
    quality: opt.Quality = opt.DEFAULT_QUALITY,
    seed: opt.Seed = 0,
    temperature: opt.Temperature = 1.0,
    steps: opt.Steps = None,
    model: opt.EncodingModel = opt.DEFAULT_MODEL,
    decoder: opt.Decoder = None,
    realism: opt.Realism = None,
    device: opt.DeviceOption = Device.AUTO,
    threads: opt.Threads = None,
    max_pixels: opt.MaxPixels = MAX_PIXELS,
    force: opt.Force = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Show on one page what images become when fewer and fewer of their tokens are sent."""
    opt.check_quality(quality)
    shares = opt.fractions(keeps)
    filling = opt.fill_options(Fill.SAMPLE, seed, temperature, steps)
    check_output(["-"], output, HTML, is_any_other=False)
    target = output_of(output)
    reporter = Reporter(as_json, quiet, verbose, to_stderr=isinstance(target, Stream))
    codecs = Codecs(model, device, threads, decoder=decoder, realism=realism)
    handling = handling_of(force=force, codecs=codecs)
    with one_line_errors(reporter):
        jobs = reading_jobs(inputs, images(), reporter)
        OutputCheck(jobs, handling).require(target)
        from pqmim.evaluation.gallery import GalleryOptions, gallery_page

        options = GalleryOptions(shares, quality, filling, max_pixels)
        convert = _Gallery(codecs, model, options)
        run_jobs(jobs, convert, handling, reporter)
        if convert.strips:
            codec = convert.codecs.named(model, reporter.detail)
            page = gallery_page(convert.strips, "pqmim gallery", options, model=codec.name).encode()
            write(target, page)
            name = Job(None, target).target_name
            fields = {"output": name, "images": len(convert.strips), "page_bytes": len(page)}
            reporter.result(name, f"{len(convert.strips)} images  {len(page):,} B", fields)
    exit_with(reporter)
