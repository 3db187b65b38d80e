"""Evaluation: real files of every image, codec and quality, decoded again from disk, and what they are worth.

A measurement that is there is not made again, so an interrupted run goes on where it was, and codecs or
metrics can be added to a folder (laid out as `results` says) later. It counts as there if the image (SHA-256) and the
codec's description are the same and the file is on disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pqmim.errors import ConfigError
from pqmim.evaluation.dataset import find_images
from pqmim.evaluation.image_codecs import ImageCodec
from pqmim.evaluation.measurement import Measurement, measure_sets, sha256
from pqmim.evaluation.metrics import METRICS, check_weights, metric_keys, missing_metric
from pqmim.evaluation.pqmim_codec import PqmimCodec
from pqmim.evaluation.processes import thread_limits
from pqmim.evaluation.results import Evaluation, load_evaluations, write_json, write_results

DEFAULT_METRICS = ("psnr-rgb", "psnr-y", "ms-ssim-rgb")


@dataclass(frozen=True)
class EvaluationOptions:
    """What to evaluate.

    Attributes:
        dataset: folder of images (searched through), or one image.
        output: folder for everything that is made; may hold an earlier evaluation of the same data set.
        codecs: pqmim models (`PqmimCodec`) and `reference_codecs(...)`; names must differ.
        qualities: codec name -> qualities, where not the codec's own; "" stands for every pqmim model.
        metrics: names as in `metrics.metric_keys`.
        jobs: worker processes; each codes one image at a time, in one thread. Timings of parallel runs are rough.
        weights: folder of perceptual networks' weights, see `metrics.check_weights`.
        is_quiet: no progress bar.
    """

    dataset: Path
    output: Path
    codecs: tuple[ImageCodec, ...]
    qualities: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    metrics: tuple[str, ...] = DEFAULT_METRICS
    jobs: int = 1
    weights: Path | None = None
    is_quiet: bool = False


def parse_qualities(texts: Iterable[str]) -> dict[str, tuple[float, ...]]:
    """Read quality grids as the command line takes them.

    Args:
        texts: "10,30,50" for every pqmim model, "jpeg:5,10,20" for the codec of that name.

    Raises:
        ConfigError: not of that form.
    """
    grids = {}
    for text in texts:
        name, _, numbers = text.rpartition(":")
        try:
            grids[name] = tuple(sorted({float(number) for number in numbers.split(",")}))
        except ValueError:
            raise ConfigError(f"a quality grid is NUMBER,NUMBER,... or CODEC:NUMBER,..., not {text!r}") from None
    return grids


def run_evaluation(options: EvaluationOptions) -> Evaluation:
    """Measure what is not measured yet, then write results.

    Returns:
        All that the output folder holds now, this run's part and earlier ones'.

    Raises:
        ConfigError: the options contradict each other, or the folder holds another data set.
        ModelError: a model cannot be loaded.
        MissingExtraError: a perceptual metric was asked for whose package is absent.
        ImageError: an image cannot be read, or a codec fails on it.
    """
    keys = metric_keys(options.metrics)
    check_weights(keys, options.weights)
    missing = {key: reason for key in keys if (reason := missing_metric(key)) is not None}
    keys = tuple(key for key in keys if key not in missing)

    images = find_images(options.dataset)
    hashes = {name: sha256(file.read_bytes()) for name, file in images.items()}
    _open_manifest(options, hashes)  # refuses another data set's folder
    present: list[ImageCodec] = []
    for codec in options.codecs:
        reason = codec.missing()
        if reason is None:
            present.append(replace(codec, threads=1) if isinstance(codec, PqmimCodec) and options.jobs > 1 else codec)
        else:
            missing[codec.name] = reason
    if len({codec.name for codec in present}) < len(present):
        raise ConfigError("two codecs have one name: give one of the models a label")
    descriptions = {codec.name: codec.description() for codec in present}

    pixel_keys = tuple(key for key in keys if not METRICS[key].of_sets)
    tasks = [
        Measurement(images[name], name, hashes[name], codec, quality, pixel_keys, options.output)
        for codec in present
        for name in images
        for quality in _qualities(codec, options)
    ]
    _run_tasks([task for task in tasks if not task.is_done()], len(tasks), options)

    set_keys = tuple(key for key in keys if METRICS[key].of_sets)
    if set_keys:
        for codec in present:
            for quality in _qualities(codec, options):
                measure_sets(options.output, codec, quality, images, set_keys, options.weights)

    # Read again, since another run may have added codecs meanwhile.
    manifest = _open_manifest(options, hashes)
    for name in (*keys, *(codec.name for codec in present)):
        manifest["missing"].pop(name, None)
    manifest["missing"].update(missing)
    for codec in present:
        manifest["codecs"][codec.name] = {
            "description": descriptions[codec.name],
            "qualities": list(_qualities(codec, options)),
        }
    write_json(options.output / "evaluation.json", manifest)
    write_results(options.output, manifest)
    return load_evaluations((options.output,))


def _qualities(codec: ImageCodec, options: EvaluationOptions) -> tuple[float, ...]:
    own = options.qualities.get("", codec.qualities) if isinstance(codec, PqmimCodec) else codec.qualities
    return options.qualities.get(codec.name, own)


def _open_manifest(options: EvaluationOptions, hashes: Mapping[str, str]) -> dict[str, Any]:
    """Read the manifest of an earlier run into this folder, or begin one."""
    file = options.output / "evaluation.json"
    if file.exists():
        manifest: dict[str, Any] = json.loads(file.read_text("utf-8"))
        if manifest["images"] != hashes:
            raise ConfigError(f"{options.output}: holds an evaluation of other images; choose another folder")
        return manifest
    return {
        "dataset": options.dataset.resolve().name,
        "images": dict(hashes),
        "codecs": {},
        "missing": {},
    }


def _run_tasks(tasks: Sequence[Measurement], total: int, options: EvaluationOptions) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, disable=options.is_quiet) as progress:
        bar = progress.add_task("evaluate", total=total, completed=total - len(tasks))
        for done in _completed(tasks, options.jobs):
            progress.update(bar, advance=1, description=f"{done.codec.name} {done.image}")


def _completed(tasks: Sequence[Measurement], jobs: int) -> Iterator[Measurement]:
    """Run the tasks in worker processes and yield each as it is done."""
    if jobs == 1:
        for task in tasks:
            task.run()
            yield task
        return
    # Spawned, not forked: threads do not survive a fork. One thread each: the processes fill the cores.
    with thread_limits(1), ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        try:
            futures = {pool.submit(task.run): task for task in tasks}
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
