"""The command line. Thin: each command turns options into calls of the library and errors into lines.

Nothing heavy is imported here; a command imports torch when it needs a network, so that `pqmim --help`,
`info` and `models` answer at once.
"""

from __future__ import annotations

import io
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pqmim._version import __version__
from pqmim.batch import Job, Reporter, Result, UsageError, find_files, plan_jobs, run_jobs
from pqmim.bitstream import MAGIC, VERSION, Container, parse

if TYPE_CHECKING:
    from pqmim.benchmark import Benchmark
    from pqmim.codec import Codec
    from pqmim.evaluate import Evaluation, EvaluationOptions, PqmimCodec

DEFAULT_MODEL = "small"
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


Inputs = Annotated[list[str], typer.Argument(metavar="IN", help="Files or folders; '-' is stdin.", show_default=False)]
Output = Annotated[
    str | None,
    typer.Option("-o", "--output", metavar="OUT", help="File, folder, or '-' for stdout. [default: beside the input]"),
]
Quality = Annotated[
    float, typer.Option("-q", "--quality", min=0, max=100, help="Higher is better and larger; any number.")
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
    quality: Quality = 50.0,
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
    reporter = Reporter(as_json, quiet, verbose)
    codecs = _Codecs(model, device, reporter)

    def convert(data: bytes) -> Callable[[], Result]:
        from pqmim.codec import EncodeOptions

        codec = codecs.named(model)

        def make_result() -> Result:
            coded = codec.encode(data, quality=quality, options=EncodeOptions(max_pixels=max_pixels))
            return Result(*_file_summary(parse(coded), len(coded)), coded)

        return make_result

    suffixes = _image_suffixes()
    _run(inputs, output, ".pqm", suffixes | PQM, suffixes, convert, force=force, reporter=reporter)


@app.command()
def decode(
    inputs: Inputs,
    output: Output = None,
    model: DecodingModel = None,
    device: DeviceOption = Device.AUTO,
    max_pixels: MaxPixels = 100_000_000,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Decompress .pqm files: photo.pqm becomes photo.png."""
    reporter = Reporter(as_json, quiet, verbose)
    codecs = _Codecs(model, device, reporter)

    def convert(data: bytes) -> Callable[[], Result]:
        from pqmim.image_io import save_png

        container = parse(data)
        codec = codecs.for_file(container)

        def make_result() -> Result:
            png = io.BytesIO()
            save_png(codec.decode(data, max_pixels=max_pixels), png)
            fields, text = _file_summary(container, len(data))
            return Result(fields, f"{container.width} x {container.height}  {text}", png.getvalue())

        return make_result

    _run(inputs, output, ".png", PQM, PQM, convert, force=force, reporter=reporter)


@app.command()
def tokens(
    inputs: Inputs,
    output: Output = None,
    quality: Quality = 50.0,
    model: DecodingModel = None,
    device: DeviceOption = Device.AUTO,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Write the token grids of images or .pqm files: photo.jpg becomes photo.npy.

    The arrays are (M, h, w) uint16. Those of an image are the tokens that `encode` sends at the same quality,
    with the model `small` if none is named.
    """
    _check_quality(quality)
    reporter = Reporter(as_json, quiet, verbose)
    codecs = _Codecs(model, device, reporter)

    def convert(data: bytes) -> Callable[[], Result]:
        import numpy as np

        is_coded = data.startswith(MAGIC)
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
def info(inputs: Inputs, as_json: Json = False, verbose: Verbose = 0) -> None:
    """Show what .pqm files hold, and check that they are whole."""
    reporter = Reporter(as_json, verbosity=verbose)
    with _one_line_errors(reporter):
        from pqmim.checkpoints import shipped_models

        names = {shipped.model_id: shipped.name for shipped in shipped_models()}

    def convert(data: bytes) -> Callable[[], Result]:
        container = parse(data)
        fields, text = _file_summary(container, len(data))
        name = names.get(container.model_id)
        fields |= {
            "version": VERSION,
            "model_id": container.model_id.hex(),
            "model": name,
            "level": container.level,
            "payload_bytes": len(container.payload),
            "alpha_bytes": len(container.alpha or b""),
            "is_partial": container.is_partial,
            "scale": container.scale,
            "token_check": None if container.token_check is None else f"{container.token_check:04x}",
        }
        parts = [
            f"{container.width} x {container.height}",
            text,
            f"model {name or 'unknown'} ({container.model_id.hex()})",
            f"level {container.level}",
            f"payload {len(container.payload):,} B",
        ]
        if container.alpha is not None:
            parts.append(f"alpha {len(container.alpha):,} B")
        if container.is_partial:
            parts.append("partial")
        return lambda: Result(fields, "  ".join(parts))

    files = find_files([Path(name) for name in inputs], PQM, reporter)
    _do([Job(source, None) for source, _ in files], convert, reporter=reporter)


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


OutputFolder = Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Folder for the results.")]
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
        from pqmim.evaluate import EvaluationOptions, parse_qualities, run_evaluation
        from pqmim.reference_codecs import reference_codecs

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
        from pqmim.benchmark import BenchmarkOptions, pqmim_factory, reference_factory, run_benchmark
        from pqmim.reference_codecs import reference_codecs
        from pqmim.report import write_benchmark_figures

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
        from pqmim.config import TokenizerTraining, load_config

        config = load_config(TokenizerTraining, recipe, _with_limit(overrides, max_minutes))
        from pqmim.train_tokenizer import train

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
        from pqmim.config import EntropyTraining, load_config

        config = load_config(EntropyTraining, recipe, _with_limit(overrides, max_minutes))
        from pqmim.train_entropy_model import train

        _train(lambda: train(config, resume=resume))


def _with_limit(overrides: list[str] | None, max_minutes: float | None) -> list[str]:
    """Add `--max-minutes` to the changed settings; the last one counts."""
    return [*(overrides or ()), *([] if max_minutes is None else [f"run.max_minutes={max_minutes}"])]


def _train(train: Callable[[], Path]) -> None:
    """Say what was written, or that the run ended at its time limit, which is no error."""
    from pqmim.training_run import TimeIsUp

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
    from pqmim.evaluate import PqmimCodec

    names = models or ([] if has_references else [DEFAULT_MODEL])
    codecs = [PqmimCodec(name, device.value) for name in names]
    for codec in codecs:
        codec.loaded()  # a model that is not there is an error, a reference codec that is not there is none
    return codecs


def _print_evaluation(evaluation: Evaluation, anchor: str | None, reporter: Reporter) -> None:
    """Print BD-rates, and what could not be measured."""
    from pqmim.report import bd_rate_table

    for key in BD_RATE_METRICS:
        if not reporter.quiet and any(key in curve.metrics for curve in evaluation.curves):
            typer.echo(bd_rate_table(evaluation, anchor=anchor, key=key))
    for name, reason in evaluation.missing.items():
        reporter.warning(name, f"not measured: {reason}")


def _write_report(evaluation: Evaluation, options: EvaluationOptions, anchor: str | None) -> None:
    """Write the page and the figures into the folder of the evaluation."""
    from pqmim.report import ReportOptions, write_figures, write_report

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
    from pqmim.ablation import AblationOptions, ablation_table, run_ablation, variants_of

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
    convert: Callable[[bytes], Callable[[], Result]],
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
    convert: Callable[[bytes], Callable[[], Result]],
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
    fields = {"width": container.width, "height": container.height, "bytes": num_bytes, "bpp": round(bpp, 6)}
    return fields, f"{num_bytes:,} B  {bpp:.3f} bpp"


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


def _check_quality(quality: float) -> None:
    if math.isnan(quality):  # neither below 0 nor above 100
        raise typer.BadParameter("nan is not in the range 0<=x<=100", param_hint="'-q' / '--quality'")
