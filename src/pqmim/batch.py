"""Many files in, many files out: names of outputs, how they are written, and what is said of them.

Knows nothing of images, codecs or torch. One file that fails is reported and does not keep the others from
being done. An output appears whole or not at all: it is written to a temporary file beside it, which is then
renamed.
"""

import json
import os
import sys
import time
import traceback
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pqmim.errors import ConfigError, ModelError, OutputError, PqmimError

STANDARD_STREAM = Path("-")
"""Stands for stdin among the inputs and for stdout as output."""

TRACEBACK_VERBOSITY = 2


class UsageError(Exception):
    """The inputs and the output of a call do not go together."""


@dataclass(frozen=True)
class Job:
    """One input and its output.

    Attributes:
        source: file to read, or STANDARD_STREAM.
        target: file to write, STANDARD_STREAM, or None if nothing is written.
    """

    source: Path
    target: Path | None

    @property
    def name(self) -> str:
        """What reports call the input."""
        return "stdin" if self.source == STANDARD_STREAM else str(self.source)


@dataclass(frozen=True)
class Result:
    """What was made of one input.

    Attributes:
        fields: for the JSON record.
        text: for people; follows the name of the output.
        data: bytes of the output; not looked at if the job has no target.
    """

    fields: dict[str, Any]
    text: str
    data: bytes = b""


Convert = Callable[[bytes, Job], Callable[[], Result]]
"""(bytes of an input, its job) -> what makes its result; only the latter is timed, so that a model can be loaded in the
former."""


@dataclass
class Reporter:
    """Writes one line per file, for people or as JSON, and counts the failures.

    Attributes:
        as_json: results are JSON objects, one per line.
        quiet: neither results nor warnings; errors are always reported.
        verbosity: number of -v; 1 tells what is going on, 2 adds tracebacks.
        to_stderr: results go to stderr, since an output occupies stdout.
        num_failed: inputs that failed so far.
    """

    as_json: bool = False
    quiet: bool = False
    verbosity: int = 0
    to_stderr: bool = False
    num_failed: int = field(default=0, init=False)

    @property
    def _stream(self) -> TextIO:
        return sys.stderr if self.to_stderr else sys.stdout

    def result(self, name: str, text: str, fields: dict[str, Any]) -> None:
        """Report a success: `name  text`, or the fields as JSON."""
        if self.as_json:
            _print(json.dumps(fields), self._stream)
        elif not self.quiet:
            _print(f"{name}  {text}", self._stream)

    def failure(self, name: str | None, error: BaseException) -> None:
        """Report an error in one line on stderr (and as JSON), and count it.

        Args:
            name: the input it concerns, None if it concerns the whole call.
            error: its cause.
        """
        self.num_failed += 1
        cause = _one_line(error)
        if self.as_json:
            _print(json.dumps({"input": name, "error": cause}), self._stream)
        self._message(cause if name is None else f"{name}: {cause}")
        if self.verbosity >= TRACEBACK_VERBOSITY:
            traceback.print_exception(error, file=sys.stderr)

    def warning(self, name: str, text: str) -> None:
        """Say on stderr what may surprise."""
        if not self.quiet:
            self._message(f"{name}: warning: {' '.join(text.split())}")

    def detail(self, text: str) -> None:
        """Say on stderr what only -v wants to know."""
        if self.verbosity:
            self._message(text)

    @staticmethod
    def _message(text: str) -> None:
        _print(f"pqmim: {text}", sys.stderr)


def plan_jobs(
    inputs: Sequence[Path],
    output: Path | None,
    *,
    into_folder: bool,
    suffix: str,
    replaced_suffixes: frozenset[str],
    folder_suffixes: frozenset[str],
    reporter: Reporter,
) -> list[Job]:
    """Find the inputs and name the outputs.

    Folders stand for the files below them. Each output lies beside its input, or, if `output` is a folder, at
    the same place in it as the input has in its own. `photo.jpg` becomes `photo` + `suffix`; where two inputs
    would get one name, `photo.jpg` + `suffix`.

    Args:
        inputs: files, folders, or STANDARD_STREAM alone.
        output: a file if there is one input file, else a folder; STANDARD_STREAM for one input file;
            None for beside the inputs (stdout for stdin).
        into_folder: `output` is a folder even if it does not exist yet.
        suffix: of the outputs, with its dot.
        replaced_suffixes: lower-case suffixes of inputs that `suffix` replaces; it is appended to others.
        folder_suffixes: lower-case suffixes of the files that are taken from folders.
        reporter: told of empty and unreadable folders, and of inputs whose outputs would still have one name.

    Raises:
        UsageError: inputs and output do not go together.
    """
    if STANDARD_STREAM in inputs:
        if len(inputs) > 1:
            raise UsageError("'-' (stdin) cannot be one of several inputs")
        if into_folder or (output is not None and output.is_dir()):
            raise UsageError("with '-' (stdin) as input, the output must be a file or '-'")
        return [Job(STANDARD_STREAM, output or STANDARD_STREAM)]

    found = find_files(inputs, folder_suffixes, reporter)
    is_one_file = len(inputs) == 1 and not inputs[0].is_dir()
    if output == STANDARD_STREAM:
        if not is_one_file:
            raise UsageError("only one file can go to '-' (stdout)")
        return [Job(source, output) for source, _ in found]
    if output is not None and is_one_file and not into_folder and not output.is_dir():
        return [Job(source, output) for source, _ in found]
    if output is not None and output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file; several outputs need a folder")

    def target(source: Path, place: Path, *, keep_suffix: bool) -> Path:
        is_replaced = source.suffix.lower() in replaced_suffixes and not keep_suffix
        name = (source.stem if is_replaced else source.name) + suffix
        return source.with_name(name) if output is None else output / place / name

    wanted = Counter(_identity(target(source, place, keep_suffix=False)) for source, place in found)
    taken: dict[str, Path] = {}
    jobs = []
    for source, place in found:
        path = target(source, place, keep_suffix=False)
        if wanted[_identity(path)] > 1:
            path = target(source, place, keep_suffix=True)
        other = taken.setdefault(_identity(path), source)
        if other is source:
            jobs.append(Job(source, path))
        else:
            reporter.failure(str(source), OutputError(f"its output {path} is that of {other} too"))
    return jobs


def find_files(inputs: Sequence[Path], suffixes: frozenset[str], reporter: Reporter) -> list[tuple[Path, Path]]:
    """Replace folders by the files below them that have one of the suffixes and do not begin with a dot.

    Returns:
        (file, its folder relative to the input folder), in the order of the inputs and then by name, each
        file once. The second part begins with the name of the input folder if there are several inputs.
    """
    found: dict[str, tuple[Path, Path]] = {}
    for path in inputs:
        if not path.is_dir():
            found.setdefault(os.path.abspath(path), (path, Path()))
            continue
        prefix = Path(path.resolve().name) if len(inputs) > 1 else Path()
        is_empty = True
        for folder, names in _walk(path, reporter):
            for name in names:
                if Path(name).suffix.lower() in suffixes:
                    is_empty = False
                    place = prefix / folder.relative_to(path)
                    found.setdefault(os.path.abspath(folder / name), (folder / name, place))
        if is_empty:
            reporter.failure(str(path), PqmimError("no file of the wanted kind in this folder"))
    return list(found.values())


def _walk(top: Path, reporter: Reporter) -> Iterator[tuple[Path, list[str]]]:
    """Yield (folder, sorted names of its files) for `top` and all below it; hidden names are left out."""

    def unreadable(error: OSError) -> None:
        reporter.failure(str(error.filename), error)

    for folder, subfolders, names in os.walk(top, onerror=unreadable):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield Path(folder), sorted(name for name in names if not name.startswith("."))


def run_jobs(jobs: Sequence[Job], convert: Convert, *, force: bool, reporter: Reporter) -> None:
    """Do the jobs one after another, with a progress bar if there are several.

    Args:
        jobs: from `plan_jobs`.
        convert: makes the results.
        force: existing outputs are replaced.
        reporter: told of each result and failure.

    Raises:
        ModelError, ConfigError: the model or the device cannot be used, so no other file can be done either.
        BrokenPipeError: nobody reads stdout any more.
    """
    sources = {_identity(job.source) for job in jobs}
    reporter.to_stderr = any(job.target == STANDARD_STREAM for job in jobs)
    with _progress_bar(len(jobs), reporter) as advance:
        for job in jobs:
            try:
                _run_job(job, convert, sources=sources, force=force, reporter=reporter)
            except (ModelError, ConfigError, BrokenPipeError):
                raise
            except Exception as error:
                reporter.failure(job.name, error)
            advance()


def _run_job(
    job: Job,
    convert: Convert,
    *,
    sources: set[str],
    force: bool,
    reporter: Reporter,
) -> None:
    if job.target is not None and job.target != STANDARD_STREAM:
        if _identity(job.target) in sources:
            raise OutputError(f"{job.target} is an input and is not overwritten")
        check_target(job.target, force=force)
    data = sys.stdin.buffer.read() if job.source == STANDARD_STREAM else job.source.read_bytes()
    make_result = convert(data, job)
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        result = make_result()
    for warning in caught:
        if issubclass(warning.category, UserWarning):  # others are for developers
            reporter.warning(job.name, str(warning.message))
    if job.target is None:
        reporter.result(job.name, result.text, {"input": job.name, **result.fields})
        return
    if job.target == STANDARD_STREAM:
        target_name = "stdout"
        sys.stdout.buffer.write(result.data)
        sys.stdout.buffer.flush()
    else:
        target_name = str(job.target)
        write_file(job.target, result.data)
    seconds = time.perf_counter() - start
    record = {"input": job.name, "output": target_name, **result.fields, "seconds": round(seconds, 3)}
    reporter.result(target_name, f"{result.text}  {seconds:.2f} s", record)


def write_file(path: Path, data: bytes) -> None:
    """Write a file, all or nothing; its folder is made if it is not there.

    Raises:
        OutputError: it cannot be written.
    """
    temporary = path.with_name(f".pqmim-{os.getpid()}.tmp")
    try:
        if path.exists() and not path.is_file():  # a device or a pipe, which must not be replaced
            path.write_bytes(data)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink()
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or error}") from error


def check_target(target: Path, *, force: bool) -> None:
    """Find out early what would keep an output from being written.

    Raises:
        OutputError: it is a folder, or a file that must not be overwritten.
    """
    if target.is_dir():
        raise OutputError(f"{target} is a folder")
    if target.is_file() and not force:
        raise OutputError(f"{target} exists already; -f overwrites it")


@contextmanager
def _progress_bar(total: int, reporter: Reporter) -> Iterator[Callable[[], None]]:
    """Show a bar on stderr if it is a terminal and there is more than one file; yields what moves it."""
    if total < 2 or reporter.quiet or not sys.stderr.isatty():
        yield lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Result lines go above the bar if they share its terminal; what goes to a file is left alone.
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty()) as progress:
        task = progress.add_task("files", total=total)
        yield lambda: progress.advance(task)


def _identity(path: Path) -> str:
    """Return a string that two paths of one file share."""
    return os.path.normcase(os.path.realpath(path))


def _one_line(error: BaseException) -> str:
    """Return the cause of an error in one line; for an unexpected one, also its type."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    if isinstance(error, PqmimError):
        return text
    if isinstance(error, MemoryError):
        return "out of memory"
    return f"internal error: {type(error).__name__}: {text} (-vv shows where)"


def _print(line: str, stream: TextIO) -> None:
    """Print one line; control characters and what the stream cannot encode (odd file names) become '?'."""
    line = "".join("?" if unicodedata.category(character) == "Cc" else character for character in line)
    encoding = stream.encoding or "utf-8"
    print(line.encode(encoding, "replace").decode(encoding), file=stream, flush=True)
