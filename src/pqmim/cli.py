"""The command line. Thin: each command turns options into calls of the library and errors into lines.

Nothing heavy is imported here; a command imports torch when it needs a network, so that `pqmim --help`,
`info` and `models` answer at once.
"""

from __future__ import annotations

import io
import math
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pqmim import bitstream
from pqmim._version import __version__
from pqmim.batch import (
    STANDARD_STREAM,
    Convert,
    Job,
    Reporter,
    Result,
    UsageError,
    check_target,
    find_files,
    plan_jobs,
    run_jobs,
    write_file,
)
from pqmim.bitstream import MAGIC, MINI_MAGIC, VERSION, Container, parse
from pqmim.errors import LimitError, ModelError, ModelMismatchError, PqmimError, TargetError

if TYPE_CHECKING:
    from PIL.Image import Image

    from pqmim.codec import Codec, DecodedImage, EncodeOptions, FillOptions
    from pqmim.encoder import Region
    from pqmim.evaluation.benchmark import Benchmark
    from pqmim.evaluation.evaluate import Evaluation, EvaluationOptions, PqmimCodec

DEFAULT_MODEL = "small"
DEFAULT_QUALITY = 50.0
BD_RATE_METRICS = ("psnr-rgb", "ms-ssim-rgb")
PQM = frozenset({".pqm"})
NO_PICTURES = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"})
"""What Pillow recognizes but cannot, or not everywhere, turn into pixels; left alone in folders."""

app = typer.Typer(
    help="A learned image codec: photos in, small .pqm files out, and back.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
train_app = typer.Typer(help="Train a model from a recipe.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(train_app, name="train")


class Device(StrEnum):
    """Where the networks run."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class TuneChoice(StrEnum):
    """Values of `encoder.Tune`, which needs torch."""

    PSNR = "psnr"
    MS_SSIM = "ms-ssim"


class FillChoice(StrEnum):
    """Values of `fill.Fill`, which needs torch."""

    LIKELY = "likely"
    SAMPLE = "sample"
    NONE = "none"


class ScaleChoice(StrEnum):
    """How many times smaller a picture is coded."""

    AUTO = "auto"
    ONE = "1"
    TWO = "2"
    FOUR = "4"
    EIGHT = "8"


Inputs = Annotated[list[str], typer.Argument(metavar="IN", help="Files or folders; '-' is stdin.", show_default=False)]
Output = Annotated[
    str | None,
    typer.Option("-o", "--output", metavar="OUT", help="File, folder, or '-' for stdout. [default: beside the input]"),
]
OutputFolder = Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Folder for the results.")]
Quality = Annotated[
    float, typer.Option("-q", "--quality", min=0, max=100, help="Higher is better and larger; any number.")
]
QualityOrTarget = Annotated[
    float | None,
    typer.Option("-q", "--quality", min=0, max=100, help="Higher is better and larger; any number. [default: 50]"),
]
FillOption = Annotated[FillChoice, typer.Option(help="What becomes of tokens that are not there.")]
Seed = Annotated[int, typer.Option(min=0, help="Of sampling; the same seed gives the same picture everywhere.")]
Temperature = Annotated[float, typer.Option(help="Of sampling: 1 is what the model believes, less is tamer.")]
Steps = Annotated[
    int | None,
    typer.Option(
        min=1, help="Of sampling: passes of the network. [default: as many as coding has]", show_default=False
    ),
]
EncodingModel = Annotated[
    str, typer.Option("-m", "--model", metavar="MODEL", help="Name of a shipped model, or path of a model.")
]
DecodingModel = Annotated[
    str | None,
    typer.Option("-m", "--model", metavar="MODEL", help="Name or path. [default: the one in the file]"),
]
DeviceOption = Annotated[Device, typer.Option(help="Where the networks run; auto takes a GPU if there is one.")]
MaxPixels = Annotated[int, typer.Option(min=1, help="Refuse larger images.")]
Force = Annotated[bool, typer.Option("-f", "--force", help="Overwrite existing outputs.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object per result instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
Verbose = Annotated[
    int,
    typer.Option("-v", "--verbose", count=True, help="Say more; -vv adds tracebacks.", show_default=False),
]


def main() -> None:
    """Entry point of the `pqmim` command."""
    # Threads that spin while they wait slow each other down tenfold where another process wants the same cores. OpenMP
    # reads these when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    app(prog_name="pqmim")


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"pqmim {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("-V", "--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


@app.command()
def encode(
    inputs: Inputs,
    output: Output = None,
    quality: QualityOrTarget = None,
    target_bytes: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Largest size of a file, instead of -q.", show_default=False)
    ] = None,
    target_bpp: Annotated[
        float | None,
        typer.Option(metavar="X", help="Most bits per pixel of the image, instead of -q.", show_default=False),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="A target that cannot be met is an error.")] = False,
    effort: Annotated[
        int | None, typer.Option(metavar="N", help="1 is fast; more is slower and better.", show_default=False)
    ] = None,
    tune: Annotated[TuneChoice, typer.Option(help="What the bits are spent for.")] = TuneChoice.PSNR,
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
        ScaleChoice, typer.Option(help="Code the picture this many times smaller; auto: if the target wants it.")
    ] = ScaleChoice.AUTO,
    model: EncodingModel = DEFAULT_MODEL,
    device: DeviceOption = Device.AUTO,
    max_pixels: MaxPixels = 100_000_000,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Compress images: photo.jpg becomes photo.pqm."""
    _check_quality(quality)
    _only_one_of({"-q": quality, "--target-bytes": target_bytes, "--target-bpp": target_bpp})
    _check_bpp(target_bpp, "--target-bpp")
    options = _encode_options(effort, tune, roi or [], keep, scale, strict=strict, max_pixels=max_pixels)
    reporter = Reporter(as_json, quiet, verbose)
    codecs = _Codecs(model, device, reporter)

    def convert(data: bytes, job: Job) -> Callable[[], Result]:
        codec = codecs.named(model)

        def make_result() -> Result:
            coded = codec.encode(
                data,
                quality=DEFAULT_QUALITY if quality is None else quality,
                target_bytes=target_bytes,
                target_bpp=target_bpp,
                options=options,
            )
            container = parse(coded)
            target = target_bytes if target_bpp is None else _bytes_at(target_bpp, container)
            if target is not None and len(coded) > target:
                warnings.warn(f"no file of {target:,} bytes is possible, this is the smallest", stacklevel=2)
            for region in options.regions:
                if not _is_inside(region, container):
                    warnings.warn(f"region {region.x},{region.y} lies outside the image", stacklevel=2)
            return Result(*_file_summary(container, len(coded)), coded)

        return make_result

    suffixes = _image_suffixes()
    _run(inputs, output, ".pqm", suffixes | PQM, suffixes, convert, force=force, reporter=reporter)


@app.command()
def decode(
    inputs: Inputs,
    output: Output = None,
    fill: FillOption = FillChoice.LIKELY,
    seed: Seed = 0,
    temperature: Temperature = 1.0,
    steps: Steps = None,
    salvage: Annotated[
        bool, typer.Option("--salvage", help="Decode what can be decoded of a file that was cut or damaged.")
    ] = False,
    progress_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write the picture after each step of the decoding into a folder.", show_default=False
        ),
    ] = None,
    model: DecodingModel = None,
    device: DeviceOption = Device.AUTO,
    max_pixels: MaxPixels = 100_000_000,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Decompress .pqm files: photo.pqm becomes photo.png."""
    options = _fill_options(fill, seed, temperature, steps)
    reporter = Reporter(as_json, quiet, verbose)
    codecs = _Codecs(model, device, reporter)
    progress = None if progress_dir is None else _ProgressFolder(progress_dir, force=force)

    def convert(data: bytes, job: Job) -> Callable[[], Result]:
        container = bitstream.salvage(data)[0] if salvage else parse(data)
        codec = codecs.for_file(container)

        def make_result() -> Result:
            decoded = codec.decode_with_report(
                data,
                options=options,
                salvage=salvage,
                max_pixels=max_pixels,
                after_step=None if progress is None else progress.writer(job),
            )
            if decoded.problem:
                warnings.warn(decoded.problem, stacklevel=2)
            fields, text = _file_summary(container, len(data))
            fields |= {"invented_share": round(decoded.invented_share, 6), "problem": decoded.problem or None}
            text = f"{container.width} x {container.height}  {text}"
            if decoded.invented_share:
                text += f"  {_percent(decoded.invented_share)} invented"
            return Result(fields, text, _png(decoded.image, _provenance(decoded, options)))

        return make_result

    _run(inputs, output, ".png", PQM, PQM, convert, force=force, reporter=reporter)


@app.command()
def tokens(
    inputs: Inputs,
    output: Output = None,
    quality: Quality = DEFAULT_QUALITY,
    model: DecodingModel = None,
    device: DeviceOption = Device.AUTO,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Write the token grids of images or .pqm files: photo.jpg becomes photo.npy.

    The arrays are (M, h, w) uint16, 65535 for tokens that a partial file does not hold. Those of an image are the
    tokens that `encode` sends at the same quality, with the model `small` if none is named.
    """
    _check_quality(quality)
    reporter = Reporter(as_json, quiet, verbose)
    codecs = _Codecs(model, device, reporter)

    def convert(data: bytes, job: Job) -> Callable[[], Result]:
        import numpy as np

        is_coded = data.startswith((MAGIC, MINI_MAGIC))
        codec = codecs.for_file(parse(data)) if is_coded else codecs.named(model or DEFAULT_MODEL)

        def make_result() -> Result:
            grid = codec.decode_tokens(data) if is_coded else codec.encode_tokens(data, quality=quality)
            npy = io.BytesIO()
            np.save(npy, grid.astype(np.uint16), allow_pickle=False)
            text = " x ".join(str(size) for size in grid.shape) + " tokens"
            return Result({"shape": list(grid.shape)}, text, npy.getvalue())

        return make_result

    suffixes = _image_suffixes() | PQM
    _run(inputs, output, ".npy", suffixes, suffixes, convert, force=force, reporter=reporter)


@app.command()
def truncate(
    inputs: Inputs,
    output: Output = None,
    num_bytes: Annotated[
        int | None, typer.Option("--bytes", metavar="N", min=1, help="Largest size.", show_default=False)
    ] = None,
    bpp: Annotated[
        float | None, typer.Option(metavar="X", help="Most bits per pixel of the image.", show_default=False)
    ] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Cut .pqm files to smaller ones without decoding them; the decoder fills what is missing."""
    _only_one_of({"--bytes": num_bytes, "--bpp": bpp}, is_one_needed=True)
    _check_bpp(bpp, "--bpp")
    if output is None and any(_is_folder_or_pqm(name) for name in inputs):
        raise typer.BadParameter("say where to: an input is never overwritten", param_hint="'-o' / '--output'")

    def convert(data: bytes, job: Job) -> Callable[[], Result]:
        container = parse(data)
        limit = _bytes_at(bpp, container) if bpp is not None else num_bytes
        assert limit is not None  # one of the two was given

        def make_result() -> Result:
            smallest = bitstream.smallest_size(data)
            if limit < smallest:
                raise TargetError(f"no file of {limit:,} bytes is possible; the smallest has {smallest:,}")
            cut = bitstream.truncate(data, limit)
            return Result(*_file_summary(parse(cut), len(cut)), cut)

        return make_result

    _run(inputs, output, ".pqm", PQM, PQM, convert, force=force, reporter=Reporter(as_json, quiet, verbose))


@app.command()
def info(inputs: Inputs, model: DecodingModel = None, as_json: Json = False, verbose: Verbose = 0) -> None:
    """Show what .pqm files hold, and check that they are whole.

    The share of the tokens that a partial file holds is found by decoding them, for which the model must be there.
    """
    reporter = Reporter(as_json, verbosity=verbose)
    codecs = _Codecs(model, Device.AUTO, reporter)
    with _one_line_errors(reporter):
        from pqmim.checkpoints import shipped_models

        shipped = shipped_models()

    def convert(data: bytes, job: Job) -> Callable[[], Result]:
        container = parse(data)
        fields, text = _file_summary(container, len(data))
        name = next((known.name for known in shipped if known.model_id.startswith(container.model_id)), None)
        known_share = _known_share(codecs, data, container, reporter)
        fields |= {
            "version": VERSION,
            "is_mini": container.is_mini,
            "model_id": container.model_id.hex(),
            "model": name,
            "level": container.level,
            "payload_bytes": len(container.payload),
            "alpha_bytes": len(container.alpha or b""),
            "known_share": None if known_share is None else round(known_share, 6),
            "token_check": None if container.token_check is None else f"{container.token_check:04x}",
        }
        parts = [
            f"{container.width} x {container.height}",
            text,
            "mini form" if container.is_mini else "full form",
            f"model {name or 'unknown'} ({container.model_id.hex()})",
            f"level {container.level}",
            f"payload {len(container.payload):,} B",
        ]
        if container.alpha is not None:
            parts.append(f"alpha {len(container.alpha):,} B")
        if container.is_partial:
            parts.append(f"holds {'an unknown share' if known_share is None else _percent(known_share)} of the tokens")
        return lambda: Result(fields, "  ".join(parts))

    files = find_files([Path(name) for name in inputs], PQM, reporter)
    _do([Job(source, None) for source, _ in files], convert, reporter=reporter)


@app.command()
def generate(
    output: OutputFolder,
    size: Annotated[str, typer.Option(metavar="WxH", help="Of the pictures, pixels.")],
    number: Annotated[int, typer.Option("-n", "--number", min=1, help="How many pictures.")] = 1,
    quality: Quality = DEFAULT_QUALITY,
    seed: Seed = 0,
    temperature: Temperature = 1.0,
    steps: Steps = None,
    model: EncodingModel = DEFAULT_MODEL,
    device: DeviceOption = Device.AUTO,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Draw pictures of which nothing was sent: 00.png, 01.png, ... with one seed after the other."""
    _check_quality(quality)
    width, height = _width_and_height(size)
    seeds = range(seed, seed + number)
    fillings = [_fill_options(FillChoice.SAMPLE, each, temperature, steps) for each in seeds]
    reporter = Reporter(as_json, quiet, verbose)
    codecs = _Codecs(model, device, reporter)
    with _one_line_errors(reporter):
        targets = [output / f"{index:0{max(2, len(str(number - 1)))}}.png" for index in range(number)]
        for target in targets:
            check_target(target, force=force)
        codec = codecs.named(model)
        for target, options in zip(targets, fillings, strict=True):
            start = time.perf_counter()
            image = codec.generate(width, height, quality=quality, options=options)
            comment = f"pqmim: nothing was sent, all tokens were drawn ({_how_filled(options)})"
            write_file(target, _png(image, comment))
            seconds = time.perf_counter() - start
            fields = {"output": str(target), "width": width, "height": height, "seed": options.seed}
            text = f"{width} x {height}  seed {options.seed}  {seconds:.2f} s"
            reporter.result(str(target), text, fields | {"seconds": round(seconds, 3)})


@app.command()
def inpaint(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="The picture; '-' is stdin.", show_default=False)],
    mask: Annotated[Path, typer.Option(metavar="MASK", help="Picture of the same size, bright where to draw anew.")],
    output: Annotated[str, typer.Option("-o", "--output", metavar="OUT", help="File, folder, or '-' for stdout.")],
    quality: Quality = DEFAULT_QUALITY,
    fill: FillOption = FillChoice.SAMPLE,
    seed: Seed = 0,
    temperature: Temperature = 1.0,
    steps: Steps = None,
    model: EncodingModel = DEFAULT_MODEL,
    device: DeviceOption = Device.AUTO,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Draw a part of a picture anew, from what is around it."""
    _check_quality(quality)
    if Path(output).resolve() == mask.resolve():
        raise typer.BadParameter("is the mask, which is never overwritten", param_hint="'-o' / '--output'")
    options = _fill_options(fill, seed, temperature, steps)
    reporter = Reporter(as_json, quiet, verbose)
    codecs = _Codecs(model, device, reporter)
    try:
        from pqmim.image_io import load_picture

        mask_pixels = load_picture(mask).rgb
    except PqmimError as error:
        reporter.failure(str(mask), error)
        raise typer.Exit(1) from error

    def convert(data: bytes, job: Job) -> Callable[[], Result]:
        codec = codecs.named(model)

        def make_result() -> Result:
            drawn = codec.inpaint(data, mask_pixels, quality=quality, options=options)
            comment = f"pqmim: the part under a mask was drawn by the model ({_how_filled(options)})"
            fields = {"width": drawn.width, "height": drawn.height}
            return Result(fields, f"{drawn.width} x {drawn.height}", _png(drawn, comment))

        return make_result

    suffixes = _image_suffixes()
    _run([image], output, ".png", suffixes, suffixes, convert, force=force, reporter=reporter)


@app.command()
def gallery(
    inputs: Inputs,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="The HTML page.")],
    keeps: Annotated[
        str, typer.Option(metavar="FRACTION,...", help="Shares of the tokens that are kept.")
    ] = "1,0.8,0.6,0.4,0.2,0",
    quality: Quality = DEFAULT_QUALITY,
    seed: Seed = 0,
    temperature: Temperature = 1.0,
    steps: Steps = None,
    model: EncodingModel = DEFAULT_MODEL,
    device: DeviceOption = Device.AUTO,
    max_pixels: MaxPixels = 100_000_000,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Show on one page what images become when fewer and fewer of their tokens are sent."""
    _check_quality(quality)
    shares = _fractions(keeps)
    filling = _fill_options(FillChoice.SAMPLE, seed, temperature, steps)
    reporter = Reporter(as_json, quiet, verbose)
    codecs = _Codecs(model, device, reporter)
    with _one_line_errors(reporter):
        check_target(output, force=force)
        from pqmim.evaluation.gallery import GalleryOptions, Strip, gallery_page, make_strip

        options = GalleryOptions(shares, quality, filling, max_pixels)
        strips: list[Strip] = []

        def convert(data: bytes, job: Job) -> Callable[[], Result]:
            codec = codecs.named(model)

            def make_result() -> Result:
                strip = make_strip(codec, Path(job.name).name, data, options)
                strips.append(strip)
                sizes = [kept.num_bytes for kept in strip.kept]
                return Result({"bytes": sizes}, " ".join(f"{size:,}" for size in sizes) + " B")

            return make_result

        files = find_files([Path(name) for name in inputs], _image_suffixes(), reporter)
        run_jobs([Job(source, None) for source, _ in files], convert, force=force, reporter=reporter)
        if strips:
            page = gallery_page(strips, "pqmim gallery", options, model=codecs.named(model).name).encode()
            write_file(output, page)
            fields = {"output": str(output), "images": len(strips), "page_bytes": len(page)}
            reporter.result(str(output), f"{len(strips)} images  {len(page):,} B", fields)
    _exit(reporter)


@app.command()
def models(as_json: Json = False, verbose: Verbose = 0) -> None:
    """List the models that come with the package."""
    reporter = Reporter(as_json, verbosity=verbose)
    with _one_line_errors(reporter):
        from pqmim.checkpoints import shipped_models

        for shipped in shipped_models():
            size = shipped.path.stat().st_size
            fields = {
                "name": shipped.name,
                "model_id": shipped.model_id.hex(),
                "bytes": size,
                "description": shipped.description,
            }
            text = f"{shipped.model_id.hex()}  {size / 1e6:.1f} MB  {shipped.description}"
            reporter.result(shipped.name, text, fields)


@app.command()
def selftest(device: DeviceOption = Device.AUTO, verbose: Verbose = 0) -> None:
    """Check that this machine decodes files to the tokens they were made of."""
    reporter = Reporter(verbosity=verbose)
    with _one_line_errors(reporter):
        from pqmim.selftest import run

        for check in run(device=device.value):
            if check.error is None:
                reporter.result("ok", check.name, {})
            else:
                reporter.result("FAILED", f"{check.name}: {check.error}", {})
                reporter.num_failed += 1
    _exit(reporter)


Models = Annotated[
    list[str] | None,
    typer.Option(
        "-m", "--model", metavar="MODEL", help="Name or path; repeatable. [default: small, if no --reference]"
    ),
]
References = Annotated[
    str, typer.Option(metavar="NAMES", help="Other codecs, such as jpeg,webp,avif; all = every one.")
]


@app.command("eval")
def evaluate(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="Folder of images.", show_default=False)],
    output: OutputFolder,
    models: Models = None,
    reference: References = "",
    quality_grid: Annotated[
        list[str] | None,
        typer.Option(metavar="GRID", help="10,30,50 for the models, jpeg:5,10,20 for a codec; repeatable."),
    ] = None,
    metrics: Annotated[str, typer.Option(metavar="NAMES", help="What is measured.")] = "psnr-rgb,psnr-y,ms-ssim-rgb",
    anchor: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Curve to compare with. [default: published BPG, or the first]"),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Weights of perceptual metrics.", show_default=False)
    ] = None,
    report: Annotated[bool, typer.Option(help="Write report.html and the figures.")] = True,
    ablation: Annotated[bool, typer.Option(help="Show where the models' bits go, and nothing else.")] = False,
    device: DeviceOption = Device.AUTO,
    jobs: Annotated[int, typer.Option("-j", "--jobs", min=1, help="Images at a time.")] = 1,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Measure models and other codecs on a data set: real files, decoded again."""
    reporter = Reporter(quiet=quiet, verbosity=verbose)
    is_quiet = quiet or not sys.stdout.isatty()
    with _one_line_errors(reporter):
        from pqmim.evaluation.evaluate import EvaluationOptions, parse_qualities, run_evaluation
        from pqmim.evaluation.reference_codecs import reference_codecs

        references = reference_codecs(_names(reference))
        own = _own_codecs(models, device, has_references=bool(references))
        if ablation:
            _run_ablation(dataset, output, models or ["small"], device, is_quiet=is_quiet)
            return
        options = EvaluationOptions(
            dataset=dataset,
            output=output,
            codecs=(*own, *references),
            qualities=parse_qualities(quality_grid or ()),
            metrics=_names(metrics),
            jobs=jobs,
            weights=weights,
            is_quiet=is_quiet,
        )
        evaluation = run_evaluation(options)
        _print_evaluation(evaluation, anchor, reporter)
        if report:
            _write_report(evaluation, options, anchor)


@app.command()
def bench(
    output: OutputFolder,
    models: Models = None,
    reference: References = "",
    sizes: Annotated[
        str, typer.Option(metavar="N,N,...", help="Sides of the square images, pixels.")
    ] = "256,512,1024,2048,4096",
    threads: Annotated[str, typer.Option(metavar="N,N,...", help="Numbers of threads; 0 = all cores.")] = "1,0",
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Photo to use instead of noise.", show_default=False)
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs, of which the median counts.")] = 3,
    time_limit: Annotated[float, typer.Option(metavar="S", min=0, help="Seconds for one measurement.")] = 300.0,
    device: DeviceOption = Device.AUTO,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Time encoding and decoding, and measure the memory they take."""
    reporter = Reporter(quiet=quiet, verbosity=verbose)
    side_lengths, thread_counts = (_whole_numbers(text) for text in (sizes, threads))
    with _one_line_errors(reporter):
        from pqmim.evaluation.benchmark import BenchmarkOptions, pqmim_factory, reference_factory, run_benchmark
        from pqmim.evaluation.reference_codecs import reference_codecs
        from pqmim.evaluation.report import write_benchmark_figures

        references = [codec.name for codec in reference_codecs(_names(reference))]
        own = _own_codecs(models, device, has_references=bool(references))
        options = BenchmarkOptions(
            output=output,
            codecs=(
                *(pqmim_factory(codec.model, device=codec.device) for codec in own),
                *(reference_factory(name) for name in references),
            ),
            sizes=side_lengths,
            threads=thread_counts,
            image=image,
            repeats=repeats,
            time_limit=time_limit,
            is_quiet=quiet or not sys.stdout.isatty(),
        )
        benchmark = run_benchmark(options)
        _print_benchmark(benchmark, reporter)
        write_benchmark_figures(benchmark, output)


Recipe = Annotated[Path, typer.Option("-c", "--config", metavar="RECIPE", help="YAML file of settings.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Change a setting; repeatable.", show_default=False),
]
Resume = Annotated[
    str | None,
    typer.Option(metavar="auto|PATH", help="Go on from a checkpoint; auto: the run's own if there is one."),
]
MaxMinutes = Annotated[
    float | None,
    typer.Option(metavar="N", min=0, help="Write a checkpoint and stop after N minutes.", show_default=False),
]


@train_app.command("tokenizer")
def train_tokenizer(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Resume = None,
    max_minutes: MaxMinutes = None,
    verbose: Verbose = 0,
) -> None:
    """Train transforms and codebooks."""
    with _one_line_errors(Reporter(verbosity=verbose)):
        from pqmim.training.recipes import TokenizerTraining, load_config

        config = load_config(TokenizerTraining, recipe, _with_limit(overrides, max_minutes))
        from pqmim.training.train_tokenizer import train

        _train(lambda: train(config, resume=resume))


@train_app.command("entropy")
def train_entropy(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Resume = None,
    max_minutes: MaxMinutes = None,
    verbose: Verbose = 0,
) -> None:
    """Train the entropy model on the tokens of a trained tokenizer."""
    with _one_line_errors(Reporter(verbosity=verbose)):
        from pqmim.training.recipes import EntropyTraining, load_config

        config = load_config(EntropyTraining, recipe, _with_limit(overrides, max_minutes))
        from pqmim.training.train_entropy_model import train

        _train(lambda: train(config, resume=resume))


def _with_limit(overrides: list[str] | None, max_minutes: float | None) -> list[str]:
    """Add `--max-minutes` to the changed settings; the last one counts."""
    return [*(overrides or ()), *([] if max_minutes is None else [f"run.max_minutes={max_minutes}"])]


def _train(train: Callable[[], Path]) -> None:
    """Say what was written, or that the run ended at its time limit, which is no error."""
    from pqmim.training.training_run import TimeIsUp

    try:
        message = str(train())
    except TimeIsUp as stop:
        message = str(stop)
    if os.environ.get("RANK", "0") == "0":  # set by torchrun and accelerate; one of the processes is enough
        typer.echo(message)


def _names(text: str) -> tuple[str, ...]:
    """Split a list of names at its commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers such as 1,2,4") from None


def _own_codecs(models: list[str] | None, device: Device, *, has_references: bool) -> list[PqmimCodec]:
    """Return the pqmim models to measure, after a look whether they can be loaded."""
    from pqmim.evaluation.evaluate import PqmimCodec

    names = models or ([] if has_references else [DEFAULT_MODEL])
    codecs = [PqmimCodec(name, device.value) for name in names]
    for codec in codecs:
        codec.loaded()  # a model that is not there is an error, a reference codec that is not there is none
    return codecs


def _print_evaluation(evaluation: Evaluation, anchor: str | None, reporter: Reporter) -> None:
    """Print BD-rates, and what could not be measured."""
    from pqmim.evaluation.report import bd_rate_table

    for key in BD_RATE_METRICS:
        if not reporter.quiet and any(key in curve.metrics for curve in evaluation.curves):
            typer.echo(bd_rate_table(evaluation, anchor=anchor, key=key))
    for name, reason in evaluation.missing.items():
        reporter.warning(name, f"not measured: {reason}")


def _write_report(evaluation: Evaluation, options: EvaluationOptions, anchor: str | None) -> None:
    """Write the page and the figures into the folder of the evaluation."""
    from pqmim.evaluation.report import ReportOptions, write_figures, write_report

    if any("psnr-rgb" in curve.metrics for curve in evaluation.curves):
        page = ReportOptions(
            output=options.output / "report.html",
            title=f"pqmim on {evaluation.dataset}",
            dataset=options.dataset,
            codecs=tuple(codec for codec in options.codecs if codec.missing() is None),
            anchor=anchor,
        )
        write_report(evaluation, page)
    write_figures(evaluation, options.output)


def _run_ablation(dataset: Path, output: Path, models: list[str], device: Device, *, is_quiet: bool) -> None:
    """Write and print the table of where the bits go."""
    from pqmim.evaluation.ablation import AblationOptions, ablation_table, run_ablation, variants_of

    variants = tuple(variant for model in models for variant in variants_of(model, device.value))
    typer.echo(ablation_table(run_ablation(AblationOptions(dataset, output, variants, is_quiet=is_quiet))))


def _print_benchmark(benchmark: Benchmark, reporter: Reporter) -> None:
    """Print one line for each measurement."""
    for timing in benchmark.timings:
        if timing.encode_seconds is None or timing.decode_seconds is None:
            text = timing.problem or ""
        else:
            text = f"encode {timing.encode_seconds:.2f} s  decode {timing.decode_seconds:.2f} s"
            text += f"  peak memory {(timing.process_memory or 0) / 2**20:,.0f} MiB"
        where = f"{timing.size} x {timing.size}  {timing.threads} threads"
        reporter.result(timing.codec, f"{where}  {text}", {})
    for name, reason in benchmark.missing.items():
        reporter.warning(name, f"not measured: {reason}")
    if "warning" in benchmark.machine:
        reporter.warning("machine", benchmark.machine["warning"])


def _encode_options(
    effort: int | None,
    tune: TuneChoice,
    regions: list[str],
    keep: float,
    scale: ScaleChoice,
    *,
    strict: bool,
    max_pixels: int,
) -> EncodeOptions:
    """Turn the options of `encode` into those of the codec."""
    from pqmim.codec import EncodeOptions
    from pqmim.encoder import Tune

    with _bad_values():
        return EncodeOptions(
            effort=EncodeOptions.effort if effort is None else effort,
            tune=Tune(tune.value),
            regions=tuple(_region(text) for text in regions),
            keep=keep,
            scale=None if scale is ScaleChoice.AUTO else int(scale.value),
            strict=strict,
            max_pixels=max_pixels,
        )


def _fill_options(fill: FillChoice, seed: int, temperature: float, steps: int | None) -> FillOptions:
    """Turn the options about filling into those of the codec."""
    from pqmim.codec import FillOptions
    from pqmim.fill import Fill

    with _bad_values():
        return FillOptions(Fill(fill.value), seed, temperature, steps)


@contextmanager
def _bad_values() -> Iterator[None]:
    """Turn what the codec says of a value that is out of range into wrong usage."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _region(text: str) -> Region:
    """Read a region: X,Y,W,H or X,Y,W,H,WEIGHT."""
    from pqmim.encoder import Region

    try:
        numbers = [float(part) if index == 4 else int(part) for index, part in enumerate(text.split(","))]
    except ValueError:
        numbers = []
    if not 4 <= len(numbers) <= 5:
        raise typer.BadParameter(f"{text!r} is not X,Y,W,H or X,Y,W,H,WEIGHT", param_hint="'--roi'")
    x, y, width, height = (int(number) for number in numbers[:4])
    return Region(x, y, width, height, *numbers[4:])


def _is_inside(region: Region, container: Container) -> bool:
    """Whether at least a part of a region lies in the image."""
    return (
        region.x < container.width
        and region.y < container.height
        and region.x + region.width > 0
        and region.y + region.height > 0
    )


def _only_one_of(values: dict[str, object], *, is_one_needed: bool = False) -> None:
    """Refuse options that contradict each other."""
    given = [name for name, value in values.items() if value is not None]
    if len(given) > 1:
        raise typer.BadParameter(f"give {' or '.join(given)}, not {'both' if len(given) == 2 else 'all'}")
    if is_one_needed and not given:
        raise typer.BadParameter(f"give {' or '.join(values)}")


def _check_bpp(bpp: float | None, name: str) -> None:
    if bpp is not None and not 0 < bpp < math.inf:
        raise typer.BadParameter(f"{bpp:g} is not a number above 0", param_hint=f"'{name}'")


def _bytes_at(bpp: float, container: Container) -> int:
    """Return the largest size of a file that has no more bits per pixel than this."""
    return max(1, int(bpp * container.width * container.height / 8))


def _is_folder_or_pqm(name: str) -> bool:
    return Path(name).is_dir() or Path(name).suffix.lower() in PQM


def _width_and_height(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a size such as 768x512", param_hint="'--size'")
    return int(match[1]), int(match[2])


def _fractions(text: str) -> tuple[float, ...]:
    try:
        fractions = tuple(float(part) for part in text.split(","))
    except ValueError:
        fractions = (math.nan,)
    if not all(0 <= fraction <= 1 for fraction in fractions):
        raise typer.BadParameter(f"{text!r} is not a list of shares such as 1,0.5,0", param_hint="'--keeps'")
    return fractions


def _png(image: Image, comment: str) -> bytes:
    from pqmim.image_io import save_png

    png = io.BytesIO()
    save_png(image, png, comment=comment)
    return png.getvalue()


def _provenance(decoded: DecodedImage, options: FillOptions) -> str:
    """Say what of a picture was not in its file; empty if everything was."""
    parts = []
    if decoded.invented_share:
        share = _percent(decoded.invented_share)
        parts.append(f"{share} of the tokens were not in the file and were filled ({_how_filled(options)})")
    if decoded.problem:
        parts.append(f"salvaged: {decoded.problem}")
    return f"pqmim: {'; '.join(parts)}" if parts else ""


def _how_filled(options: FillOptions) -> str:
    """Say how tokens were filled, so that it can be done again."""
    if options.fill.value != FillChoice.SAMPLE.value:
        return options.fill.value
    text = f"sample, seed {options.seed}, temperature {options.temperature:g}"
    return text if options.num_steps is None else f"{text}, {options.num_steps} steps"


def _percent(share: float) -> str:
    """Write a share so that neither next to nothing looks like nothing, nor nearly all like all."""
    percent = 100 * share
    if 0 < share < 1:
        percent = min(max(percent, 0.1), 99.9)
    return f"{percent:.1f} %"


def _known_share(codecs: _Codecs, data: bytes, container: Container, reporter: Reporter) -> float | None:
    """Return the share of the tokens that a file holds; None if nobody here can tell."""
    if not container.is_partial:
        return 1.0
    if codecs.model is not None:
        codecs.named(codecs.model)  # a model that was named must be there
    try:
        grid = codecs.for_file(container).decode_tokens(data)
    except (ModelError, ModelMismatchError, LimitError) as error:
        reporter.detail(f"share of the tokens unknown: {error}")
        return None
    return float((grid >= 0).mean())


class _ProgressFolder:
    """Pictures of the decoding, step by step: NAME.step01.png and so on for each input."""

    def __init__(self, folder: Path, *, force: bool) -> None:
        self._folder = folder
        self._force = force
        self._names = Counter[str]()

    def writer(self, job: Job) -> Callable[[Image], None]:
        """Return what writes the pictures of one input, named as its output."""
        path = job.source if job.target in (None, STANDARD_STREAM) else job.target
        name = "stdin" if path is None or path == STANDARD_STREAM else path.stem
        self._names[name] += 1
        if self._names[name] > 1:  # another folder has a file of this name
            name = f"{name}-{self._names[name]}"
        num_steps = 0

        def write(image: Image) -> None:
            nonlocal num_steps
            num_steps += 1
            target = self._folder / f"{name}.step{num_steps:02}.png"
            check_target(target, force=self._force)
            write_file(target, _png(image, f"pqmim: step {num_steps} of the decoding, what is missing filled (likely)"))

        return write


class _Codecs:
    """The codecs of one call, each loaded once.

    Attributes:
        model: name or path of the model that decodes all files, None = the shipped one that a file names.
    """

    def __init__(self, model: str | None, device: Device, reporter: Reporter) -> None:
        self.model = model
        self._device = device
        self._reporter = reporter
        self._loaded: dict[str, Codec] = {}

    def named(self, model: str) -> Codec:
        """Return the codec of a model."""
        if model not in self._loaded:
            start = time.perf_counter()
            from pqmim.codec import load_codec

            codec = self._loaded[model] = load_codec(model, device=self._device.value)
            seconds = time.perf_counter() - start
            self._reporter.detail(f"model {codec.name} ({codec.model_id.hex()}) loaded in {seconds:.2f} s")
        return self._loaded[model]

    def for_file(self, container: Container) -> Codec:
        """Return the codec for a .pqm file."""
        if self.model is not None:
            return self.named(self.model)
        from pqmim.checkpoints import shipped_model_of

        return self.named(shipped_model_of(container.model_id).name)


def _run(
    inputs: list[str],
    output: str | None,
    suffix: str,
    replaced_suffixes: frozenset[str],
    folder_suffixes: frozenset[str],
    convert: Convert,
    *,
    force: bool,
    reporter: Reporter,
) -> None:
    """Plan and do the jobs of a command that writes files ending in `suffix`, and exit as they went."""
    target = None if output is None else Path(output)
    is_folder = output is not None and output.endswith(("/", os.sep))
    if target is not None and not is_folder and not target.is_dir():
        other_kinds = (_image_suffixes() | PQM) - {suffix}
        if target.suffix.lower() in other_kinds:
            raise typer.BadParameter(f"{target}: this command writes {suffix} files")
    try:
        jobs = plan_jobs(
            [Path(name) for name in inputs],
            target,
            into_folder=is_folder,
            suffix=suffix,
            replaced_suffixes=replaced_suffixes,
            folder_suffixes=folder_suffixes,
            reporter=reporter,
        )
    except UsageError as error:
        raise typer.BadParameter(str(error)) from error
    _do(jobs, convert, force=force, reporter=reporter)


def _do(
    jobs: list[Job],
    convert: Convert,
    *,
    force: bool = False,
    reporter: Reporter,
) -> None:
    with _one_line_errors(reporter):
        run_jobs(jobs, convert, force=force, reporter=reporter)
    _exit(reporter)


def _file_summary(container: Container, num_bytes: int) -> tuple[dict[str, Any], str]:
    """Return size and rate of a file of `num_bytes` bytes, as fields and as text."""
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


def _image_suffixes() -> frozenset[str]:
    """Return the lower-case suffixes of the pictures that Pillow opens."""
    from PIL import Image

    suffixes = Image.registered_extensions()  # loads all plugins, without which Image.OPEN is empty
    openable = Image.OPEN.keys() - NO_PICTURES
    return frozenset(suffix for suffix, name in suffixes.items() if name in openable)


@contextmanager
def _one_line_errors(reporter: Reporter) -> Iterator[None]:
    """Turn an error that ends the whole call into one line and exit code 1."""
    try:
        yield
    except (typer.Exit, BrokenPipeError):  # typer ends quietly when nobody reads stdout any more
        raise
    except Exception as error:
        reporter.failure(None, error)
        raise typer.Exit(1) from error


def _exit(reporter: Reporter) -> None:
    if reporter.num_failed:
        raise typer.Exit(1)


def _check_quality(quality: float | None) -> None:
    if quality is not None and math.isnan(quality):  # neither below 0 nor above 100
        raise typer.BadParameter("nan is not in the range 0<=x<=100", param_hint="'-q' / '--quality'")
