"""`eval` and `bench`: quality at which rate, seconds and memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pqmim.cli import options as opt
from pqmim.cli.running import one_line_errors
from pqmim.errors import MissingExtraError, PqmimError
from pqmim.files import place_identity
from pqmim.options import Device
from pqmim.reporting import Failure, Reporter

if TYPE_CHECKING:
    from pqmim.evaluation.benchmark import Benchmark
    from pqmim.evaluation.evaluate import EvaluationOptions
    from pqmim.evaluation.image_codecs import ImageCodec
    from pqmim.evaluation.pqmim_codec import PqmimCodec
    from pqmim.evaluation.results import Evaluation

BD_RATE_METRICS = ("psnr-rgb", "ms-ssim-rgb")

Models = Annotated[
    list[str] | None,
    typer.Option(
        "-m", "--model", metavar="MODEL", help="Name or path; repeatable. [default: photo, if no --reference]"
    ),
]
Decoders = Annotated[
    list[str] | None,
    typer.Option(
        "--decoder",
        metavar="DECODER[@R]",
        help="Of each model, name or path, with a realism R if it has one; repeatable. [default: fine]",
    ),
]
MadeFor = Annotated[
    str | None,
    typer.Option(
        "--for", metavar="DECODER", help="Whose pictures the encoder corrects. [default: the one that is measured]"
    ),
]
References = Annotated[
    str, typer.Option(metavar="NAMES", help="Other codecs, such as jpeg,webp,avif; all = every one.")
]


def evaluate(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="Folder of images.", show_default=False)],
    output: opt.OutputFolder,
    models: Models = None,
    decoders: Decoders = None,
    made_for: MadeFor = None,
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
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Write pairs.html, a page to compare pictures blindly, and nothing else.")
    ] = False,
    pairs_bpp: Annotated[
        list[float] | None,
        typer.Option(metavar="BPP", min=0, help="Rate of the pictures of --pairs; repeatable. [default: 0.1]"),
    ] = None,
    device: opt.DeviceOption = Device.AUTO,
    jobs: Annotated[int, typer.Option("-j", "--jobs", min=1, help="Images at a time.")] = 1,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Measure models and other codecs on a data set: real files, decoded again."""
    folder = opt.folder_of(output)
    reporter = Reporter(quiet=quiet, verbosity=verbose)
    is_quiet = quiet or not _is_terminal()
    with one_line_errors(reporter):
        if place_identity(folder) == place_identity(dataset):
            raise typer.BadParameter("is the data set: its images could be overwritten", param_hint="'-o' / '--output'")
        from pqmim.evaluation.evaluate import EvaluationOptions, parse_qualities, run_evaluation
        from pqmim.evaluation.reference_codecs import reference_codecs

        references = reference_codecs(opt.names(reference))
        own = _own_codecs(models, decoders, made_for, device, has_references=bool(references))
        if pairs:
            _write_pairs(dataset, folder, (*own, *references), tuple(pairs_bpp or (0.1,)), reporter)
            return
        if ablation:
            _run_ablation(dataset, folder, models or [opt.DEFAULT_MODEL], device, reporter, is_quiet=is_quiet)
            return
        options = EvaluationOptions(
            dataset=dataset,
            output=folder,
            codecs=(*own, *references),
            qualities=parse_qualities(quality_grid or ()),
            metrics=opt.names(metrics),
            jobs=jobs,
            weights=weights,
            is_quiet=is_quiet,
        )
        evaluation = run_evaluation(options)
        _print_evaluation(evaluation, anchor, reporter)
        if report:
            _write_report(evaluation, options, anchor)


def bench(
    output: opt.OutputFolder,
    models: Models = None,
    decoders: Decoders = None,
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
    device: opt.DeviceOption = Device.AUTO,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Time encoding and decoding, and measure the memory they take."""
    folder = opt.folder_of(output)
    reporter = Reporter(quiet=quiet, verbosity=verbose)
    side_lengths = opt.whole_numbers(sizes, "'--sizes'", least=1)
    thread_counts = opt.whole_numbers(threads, "'--threads'", least=0)
    with one_line_errors(reporter):
        from pqmim.evaluation.benchmark import BenchmarkOptions, pqmim_factory, reference_factory, run_benchmark
        from pqmim.evaluation.figures import write_benchmark_figures
        from pqmim.evaluation.reference_codecs import reference_codecs

        if image is not None:
            _check_image(image)
        references = [codec.name for codec in reference_codecs(opt.names(reference))]
        own = _own_codecs(models, decoders, None, device, has_references=bool(references))
        options = BenchmarkOptions(
            output=folder,
            codecs=(
                *(
                    pqmim_factory(codec.model, decoder=codec.decoder, realism=codec.realism, device=codec.device)
                    for codec in own
                ),
                *(reference_factory(name) for name in references),
            ),
            sizes=side_lengths,
            threads=thread_counts,
            image=image,
            repeats=repeats,
            time_limit=time_limit,
            is_quiet=quiet or not _is_terminal(),
        )
        benchmark = run_benchmark(options)
        _print_benchmark(benchmark, reporter)
        try:
            write_benchmark_figures(benchmark, folder)
        except MissingExtraError as error:
            reporter.warning("figures", f"not drawn: {error}")


def _is_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()


def _check_image(path: Path) -> None:
    """Read an image at once, so that an error names it."""
    from pqmim.image_io import load_picture

    try:
        load_picture(path)
    except (PqmimError, OSError, MemoryError) as error:
        raise PqmimError(f"{path}: {Failure.of(error).cause}") from error


def _own_codecs(
    models: list[str] | None,
    decoders: list[str] | None,
    made_for: str | None,
    device: Device,
    *,
    has_references: bool,
) -> list[PqmimCodec]:
    """Return the models to measure, each with each decoder, after a look whether they can be loaded."""
    from pqmim.evaluation.pqmim_codec import PqmimCodec, parse_decoder

    names = models or ([] if has_references and not decoders else [opt.DEFAULT_MODEL])
    chosen: list[tuple[str | None, float | None]] = [parse_decoder(text) for text in decoders or ()]
    codecs = [
        PqmimCodec(name, device.value, decoder=decoder, realism=realism, made_for=made_for)
        for name in names
        for decoder, realism in chosen or [(None, None)]
    ]
    for codec in codecs:
        codec.description()  # a model that is not there is an error, a reference codec that is not there is none
    return codecs


def _print_evaluation(evaluation: Evaluation, anchor: str | None, reporter: Reporter) -> None:
    """Print BD-rates, and what could not be measured."""
    from pqmim.evaluation.report import bd_rate_table

    for key in BD_RATE_METRICS:
        if not reporter.quiet and any(key in curve.metrics for curve in evaluation.curves):
            reporter.lines(bd_rate_table(evaluation, anchor=anchor, key=key))
    for name, reason in evaluation.missing.items():
        reporter.warning(name, f"not measured: {reason}")


def _write_report(evaluation: Evaluation, options: EvaluationOptions, anchor: str | None) -> None:
    """Write the page and the figures into the folder of the evaluation."""
    from pqmim.evaluation.figures import write_figures
    from pqmim.evaluation.report import ReportOptions, write_report

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


def _write_pairs(
    dataset: Path, output: Path, codecs: tuple[ImageCodec, ...], rates: tuple[float, ...], reporter: Reporter
) -> None:
    """Write the page of blind comparisons."""
    from pqmim.evaluation.pairs import PairsOptions, write_pairs

    present = []
    for codec in codecs:
        reason = codec.missing()
        if reason is None:
            present.append(codec)
        else:
            reporter.warning(codec.name, f"left out: {reason}")
    page = output / "pairs.html"
    number = write_pairs(PairsOptions(dataset, tuple(present), bpp=rates), page)
    reporter.result(str(page), f"{number} pairs", {"pairs": number})


def _run_ablation(
    dataset: Path, output: Path, models: list[str], device: Device, reporter: Reporter, *, is_quiet: bool
) -> None:
    """Write and print the table of where the bits go."""
    from pqmim.evaluation.ablation import AblationOptions, ablation_table, run_ablation, variants_of

    variants = tuple(variant for model in models for variant in variants_of(model, device.value))
    reporter.lines(ablation_table(run_ablation(AblationOptions(dataset, output, variants, is_quiet=is_quiet))))


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
