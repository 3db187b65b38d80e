"""`encode` and `decode`: what becomes of many files.

Each command has a class that makes the result of one input; worker processes get a copy of it.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pqmim import bitstream
from pqmim.batch import Handling, Note, OutputCheck, Result
from pqmim.bitstream import Container, parse
from pqmim.cli import options as opt
from pqmim.cli.kinds import PQM, check_output, image_suffixes, images
from pqmim.cli.pictures import (
    SUFFIXES,
    PictureFormat,
    PictureWriter,
    joined,
    percent,
    picture_writer,
    provenance,
    synthesis_note,
)
from pqmim.cli.running import Codecs, handling_of, one_line_errors, run
from pqmim.files import STANDARD_STREAM, write_file
from pqmim.jobs import Job, Kinds, Naming
from pqmim.options import (
    DEFAULT_EFFORT,
    MAX_EFFORT,
    MAX_PIXELS,
    Device,
    EncodeOptions,
    Fill,
    FillOptions,
    OnProgress,
    Region,
    Tune,
)
from pqmim.reporting import Reporter

if TYPE_CHECKING:
    from PIL.Image import Image


class Scale(StrEnum):
    """How many times smaller a picture is coded."""

    AUTO = "auto"
    ONE = "1"
    TWO = "2"
    FOUR = "4"
    EIGHT = "8"


def file_summary(container: Container, num_bytes: int) -> tuple[dict[str, Any], str]:
    """Size and rate of a file of `num_bytes` bytes, as fields and as text."""
    bpp = 8 * num_bytes / (container.width * container.height)
    fields = {
        "width": container.width,
        "height": container.height,
        "bytes": num_bytes,
        "bpp": round(bpp, 6),
        "scale": container.scale,
        "is_partial": container.is_partial,
    }
    text = f"{num_bytes:,} B  {bpp:.3f} bpp"
    if container.scale > 1:
        text += f"  scale {container.scale}"
    if container.is_partial:
        text += "  partial"
    return fields, text


@dataclass
class _Encode:
    codecs: Codecs
    model: str
    quality: float
    target_bytes: int | None
    target_bpp: float | None
    options: EncodeOptions
    on_progress: OnProgress | None

    def __call__(self, data: bytes, job: Job, note: Note) -> Callable[[], Result]:
        codec = self.codecs.named(self.model, note)
        judge = None
        if self.options.tune == Tune.VIVID:
            from pqmim.perceptual.tuning import vivid_judge

            judge = vivid_judge(self.codecs.threads_of_each())

        def make_result() -> Result:
            coded = codec.encode(
                data,
                quality=self.quality,
                target_bytes=self.target_bytes,
                target_bpp=self.target_bpp,
                options=self.options,
                judge=judge,
                on_progress=self.on_progress,
            )
            container = parse(coded)
            self._warn(container, len(coded))
            return Result(*file_summary(container, len(coded)), coded)

        return make_result

    def _warn(self, container: Container, num_bytes: int) -> None:
        """Say what of the wishes could not be fulfilled."""
        target = self.target_bytes if self.target_bpp is None else opt.bytes_at(self.target_bpp, container)
        if target is not None and num_bytes > target:
            warnings.warn(f"no file of {target:,} bytes is possible, this is the smallest", stacklevel=2)
        for region in self.options.regions:
            if not _is_inside(region, container):
                warnings.warn(f"region {region.x},{region.y} lies outside the image", stacklevel=2)


def _is_inside(region: Region, container: Container) -> bool:
    """Whether at least a part of a region lies in the image."""
    return (
        region.x < container.width
        and region.y < container.height
        and region.x + region.width > 0
        and region.y + region.height > 0
    )


def encode(
    inputs: opt.Inputs,
    output: opt.Output = None,
    quality: Annotated[
        float | None,
        typer.Option("-q", "--quality", min=0, max=100, help="Higher is better and larger; any number. [default: 50]"),
    ] = None,
    target_bytes: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Largest size of a file, instead of -q.", show_default=False)
    ] = None,
    target_bpp: Annotated[
        float | None,
        typer.Option(metavar="X", help="Most bits per pixel of the image, instead of -q.", show_default=False),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="A target that cannot be met is an error.")] = False,
    effort: Annotated[
        int, typer.Option(metavar="N", min=1, max=MAX_EFFORT, help="1 is fast; more is slower and better.")
    ] = DEFAULT_EFFORT,
    tune: Annotated[Tune, typer.Option(help="What the bits are spent for.")] = Tune.PSNR,
    roi: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X,Y,W,H[,WEIGHT]", help="Part of the picture that matters more; repeatable.", show_default=False
        ),
    ] = None,
    keep: Annotated[
        float, typer.Option(metavar="FRACTION", help="Share of the tokens to send; the decoder fills the rest.")
    ] = 1.0,
    scale: Annotated[
        Scale, typer.Option(help="Code the picture this many times smaller; auto: if the target wants it.")
    ] = Scale.AUTO,
    keep_metadata: Annotated[
        bool, typer.Option("--keep-metadata", help="Keep EXIF, ICC profile and XMP in the file.")
    ] = False,
    model: opt.EncodingModel = opt.DEFAULT_MODEL,
    made_for: opt.MadeFor = None,
    device: opt.DeviceOption = Device.AUTO,
    threads: opt.Threads = None,
    jobs: opt.Jobs = 1,
    max_seconds: Annotated[
        float | None,
        typer.Option(metavar="S", help="End a search through the decoder after this long.", show_default=False),
    ] = None,
    max_pixels: opt.MaxPixels = MAX_PIXELS,
    force: opt.Force = False,
    skip_existing: opt.SkipExisting = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Compress images: photo.jpg becomes photo.pqm."""
    opt.check_quality(quality)
    opt.only_one_of({"-q": quality, "--target-bytes": target_bytes, "--target-bpp": target_bpp})
    opt.check_bpp(target_bpp, "--target-bpp")
    check_output(inputs, output, PQM, is_any_other=False)
    with opt.bad_values():
        options = EncodeOptions(
            effort=effort,
            tune=tune,
            regions=tuple(opt.region(text) for text in roi or ()),
            keep=keep,
            scale=None if scale is Scale.AUTO else int(scale),
            strict=strict,
            max_pixels=max_pixels,
            max_seconds=math.inf if max_seconds is None else max_seconds,
            keep_metadata=keep_metadata,
        )
    reporter = Reporter(as_json, quiet, verbose)
    if tune is Tune.VIVID:
        from pqmim.perceptual.tuning import VIVID, require_vivid

        made_for = made_for or VIVID
        with one_line_errors(reporter):
            require_vivid(model, made_for)
    codecs = Codecs(model, device, threads, jobs, made_for)
    convert = _Encode(
        codecs,
        model,
        opt.DEFAULT_QUALITY if quality is None else quality,
        target_bytes,
        target_bpp,
        options,
        reporter.part if jobs == 1 else None,
    )
    run(
        inputs,
        output,
        Naming(".pqm", image_suffixes() | PQM),
        images(),
        convert,
        handling=handling_of(force=force, skip_existing=skip_existing, workers=jobs, codecs=codecs),
        reporter=reporter,
    )


@dataclass
class _Decode:
    codecs: Codecs
    options: FillOptions
    salvage: bool
    max_pixels: int
    writer: PictureWriter
    progress: _ProgressFolder | None

    def __call__(self, data: bytes, job: Job, note: Note) -> Callable[[], Result]:
        container = bitstream.salvage(data)[0] if self.salvage else parse(data)
        codec = self.codecs.for_file(container, note)

        def make_result() -> Result:
            decoded = codec.decode_with_report(
                data,
                options=self.options,
                salvage=self.salvage,
                max_pixels=self.max_pixels,
                after_step=None if self.progress is None else self.progress.writer(job, synthesis_note(codec)),
            )
            if decoded.problem:
                warnings.warn(decoded.problem, stacklevel=2)
            fields, text = file_summary(container, len(data))
            fields |= {"invented_share": round(decoded.invented_share, 6), "problem": decoded.problem or None}
            fields |= {"decoder": codec.decoder_name, "realism": codec.realism}
            text = f"{container.width} x {container.height}  {text}"
            if decoded.invented_share:
                text += f"  {percent(decoded.invented_share)} invented"
            file = self.writer.file(decoded.image, provenance(decoded, self.options, codec), decoded.metadata)
            return Result(fields, text, file)

        return make_result


class _ProgressFolder:
    """Pictures of the decoding, step by step: NAME.step01.png and so on for each input."""

    def __init__(self, folder: Path, *, force: bool) -> None:
        self._folder = folder
        self._force = force
        self._names = Counter[str]()

    def writer(self, job: Job, note: str) -> Callable[[Image], None]:
        """What writes the pictures of one input, named as its output; `note` is said of each."""
        place = job.source if job.target in (None, STANDARD_STREAM) else job.target
        name = place.stem if isinstance(place, Path) else "stdin"
        self._names[name] += 1
        if self._names[name] > 1:  # another folder has a file of this name
            name = f"{name}-{self._names[name]}"
        num_steps = 0
        check = OutputCheck([job], Handling(self._force))

        def write(image: Image) -> None:
            nonlocal num_steps
            num_steps += 1
            target = self._folder / f"{name}.step{num_steps:02}.png"
            check.require(target)
            comment = joined(f"step {num_steps} of the decoding, what is missing filled (likely)", note)
            write_file(target, PictureWriter().file(image, comment))

        return write


def decode(
    inputs: opt.Inputs,
    output: opt.Output = None,
    picture_format: Annotated[
        PictureFormat | None,
        typer.Option("--format", help="Of the pictures. [default: as OUT says, or png]", show_default=False),
    ] = None,
    quality: Annotated[
        int | None,
        typer.Option(
            "-q", "--quality", min=0, max=100, help="Of lossy formats. [default: 95, AVIF 90]", show_default=False
        ),
    ] = None,
    fill: opt.FillOption = Fill.LIKELY,
    seed: opt.Seed = 0,
    temperature: opt.Temperature = 1.0,
    steps: opt.Steps = None,
    salvage: Annotated[
        bool, typer.Option("--salvage", help="Decode what can be decoded of a file that was cut or damaged.")
    ] = False,
    progress_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Write the picture after each step of the decoding into a folder.", show_default=False
        ),
    ] = None,
    model: opt.DecodingModel = None,
    decoder: opt.Decoder = None,
    realism: opt.Realism = None,
    device: opt.DeviceOption = Device.AUTO,
    threads: opt.Threads = None,
    jobs: opt.Jobs = 1,
    max_pixels: opt.MaxPixels = MAX_PIXELS,
    force: opt.Force = False,
    skip_existing: opt.SkipExisting = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Decompress .pqm files: photo.pqm becomes photo.png."""
    progress = None
    if progress_dir is not None:
        if jobs > 1:
            raise typer.BadParameter("give --progress-dir or -j, not both")
        progress = _ProgressFolder(opt.folder_of(progress_dir, "'--progress-dir'"), force=force)
    check_output(inputs, output, SUFFIXES, is_any_other=True)
    writer = picture_writer(output, picture_format, quality)
    codecs = Codecs(model, device, threads, jobs, decoder, realism)
    convert = _Decode(codecs, opt.fill_options(fill, seed, temperature, steps), salvage, max_pixels, writer, progress)
    run(
        inputs,
        output,
        Naming(f".{writer.format}", PQM),
        Kinds(PQM),
        convert,
        handling=handling_of(force=force, skip_existing=skip_existing, workers=jobs, codecs=codecs),
        reporter=Reporter(as_json, quiet, verbose),
    )
