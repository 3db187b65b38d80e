"""What commands share: the way from inputs and an output to `batch.run_jobs`, the codecs of a call, errors and exit."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pqmim.batch import Convert, Handling, Note, run_jobs
from pqmim.bitstream import Container
from pqmim.cores import num_usable_cores
from pqmim.errors import ModelError
from pqmim.files import Place, Stream, output_of, place_of
from pqmim.jobs import Job, Kinds, Naming, UsageError, find_files, plan_jobs
from pqmim.options import Device
from pqmim.reporting import Reporter

if TYPE_CHECKING:
    from pqmim.codec import Codec


@dataclass
class Codecs:
    """The codecs of one call, each loaded once; worker processes load their own.

    Attributes:
        model: name or path of the token model that decodes all files, None = the shipped one that a file names.
        decoder: name or path, None = the default one of the token model.
        realism: of the decoder, if it has one.
        threads: of the networks; None = the cores, shared by the processes.
        workers: processes that share the cores.
    """

    model: str | None
    device: Device = Device.AUTO
    threads: int | None = None
    workers: int = 1
    decoder: str | None = None
    realism: float | None = None
    _loaded: dict[str, Codec] = field(default_factory=dict, init=False, repr=False)

    def named(self, model: str, note: Note) -> Codec:
        """Codec of a model.

        Raises:
            ModelError, ConfigError: the model, the decoder or the device cannot be used.
        """
        if model not in self._loaded:
            start = time.perf_counter()
            from pqmim.codec import load_codec

            threads = self.threads_of_each()
            try:
                codec = load_codec(model, self.decoder, realism=self.realism, device=self.device.value, threads=threads)
            except OSError as error:
                raise ModelError(f"{model}: {error.strerror or error}") from error
            self._loaded[model] = codec
            files = f"model {codec.name} ({codec.model_id.hex()}), decoder {codec.decoder_name}"
            note(f"{files} loaded in {time.perf_counter() - start:.2f} s")
        return self._loaded[model]

    def threads_of_each(self) -> int | None:
        """Threads of each process; None = as many as there are cores."""
        if self.threads is None and self.workers > 1:
            return max(1, num_usable_cores() // self.workers)
        return self.threads

    def for_file(self, container: Container, note: Note) -> Codec:
        """Codec that decodes a .pqm file; errors as `named`.

        Raises:
            ModelMismatchError: no shipped model does.
        """
        if self.model is not None:
            return self.named(self.model, note)
        from pqmim.model_files import shipped_model_of

        return self.named(shipped_model_of(container.model_id).name, note)


def run(
    inputs: list[str],
    output: str | None,
    naming: Naming,
    kinds: Kinds,
    convert: Convert,
    *,
    handling: Handling,
    reporter: Reporter,
) -> None:
    """Plan and do the jobs of a command that writes a file for each input, and exit as they went.

    Args:
        output: as the user gave it.
        naming: of the outputs.
        kinds: what is taken from folders.
    """
    with one_line_errors(reporter):
        jobs = plan_jobs(
            [place_of(name) for name in inputs],
            None if output is None else output_of(output),
            into_folder=output is not None and output.endswith(("/", os.sep)),
            naming=naming,
            kinds=kinds,
            reporter=reporter,
        )
    do(jobs, convert, handling, reporter)


def do(jobs: list[Job], convert: Convert, handling: Handling, reporter: Reporter) -> None:
    """Do jobs and exit as they went."""
    with one_line_errors(reporter):
        run_jobs(jobs, convert, handling, reporter)
    exit_with(reporter)


def reading_jobs(inputs: list[str], kinds: Kinds, reporter: Reporter) -> list[Job]:
    """Jobs that read the inputs, and write nothing for each."""
    places: list[Place] = [place_of(name) for name in inputs]
    jobs: list[Job] = []
    for place in dict.fromkeys(places):
        jobs += [Job(place, None)] if isinstance(place, Stream) else []
    paths = [place for place in places if isinstance(place, Path)]
    return jobs + [Job(source, None) for source, _ in find_files(paths, kinds, reporter)]


def handling_of(
    *,
    force: bool,
    skip_existing: bool = False,
    workers: int = 1,
    inputs: tuple[Path, ...] = (),
    codecs: Codecs | None = None,
) -> Handling:
    """How jobs are done, from the options of a command.

    Args:
        inputs: besides the files that the jobs read.
        codecs: whose files are inputs as well.
    """
    if force and skip_existing:
        raise typer.BadParameter("give -f or --skip-existing, not both")
    if codecs is not None and codecs.model is not None:
        from pqmim.model_files import MODEL_FILE

        inputs = (*inputs, Path(codecs.model), Path(codecs.model, MODEL_FILE))
    if codecs is not None and codecs.decoder is not None:
        inputs = (*inputs, Path(codecs.decoder))
    return Handling(force, skip_existing, workers, inputs)


@contextmanager
def one_line_errors(reporter: Reporter) -> Iterator[None]:
    """Turn an error that ends the whole call into one line and exit code 1, wrong usage into exit code 2."""
    try:
        yield
    except UsageError as error:
        raise typer.BadParameter(str(error)) from error
    except (typer.Exit, typer.BadParameter, BrokenPipeError):  # typer ends quietly when nobody reads stdout any more
        raise
    except Exception as error:
        reporter.failure(None, error)
        raise typer.Exit(1) from error


def exit_with(reporter: Reporter) -> None:
    """Exit with code 1 if anything failed."""
    if reporter.num_failed:
        raise typer.Exit(1)
