"""Does jobs: reads inputs, has their results made, here or by worker processes, writes and reports them in order.

Knows nothing of images and codecs. One file that fails is reported and does not keep the others from being done.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pqmim.errors import OutputError
from pqmim.files import Place, Stream, check_target, identities, write
from pqmim.jobs import Job
from pqmim.reporting import Failure, Reporter
from pqmim.workers import run_in_workers


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


Note = Callable[[str], None]
"""Takes what is going on, for those who want to know."""
Convert = Callable[[bytes, Job, Note], Callable[[], Result]]
"""(bytes of an input, its job, note) -> what makes its result; only the latter is timed, so that a model can be loaded
in the former. Worker processes get a pickled copy."""


@dataclass(frozen=True)
class Outcome:
    """What came of one job; one of `result` and `failure` is there.

    Attributes:
        seconds: that the result took.
        warnings: about it.
        notes: of what went on.
    """

    result: Result | None = None
    failure: Failure | None = None
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Handling:
    """How jobs are done.

    Attributes:
        force: existing outputs are replaced.
        skip_existing: jobs whose output exists are left out.
        workers: processes; 1 = this one does all.
        inputs: files besides the sources that must not be overwritten.
    """

    force: bool = False
    skip_existing: bool = False
    workers: int = 1
    inputs: tuple[Path, ...] = field(default=())


def run_jobs(
    jobs: Sequence[Job],
    convert: Convert,
    handling: Handling,
    reporter: Reporter,
    *,
    take: Callable[[Result], None] | None = None,
) -> None:
    """Do jobs, with a progress bar if there are several.

    Args:
        jobs: from `jobs.plan_jobs`.
        convert: makes the results.
        reporter: told of each result and failure, in the order of the jobs.
        take: gets the results of jobs without a target, in their order; may raise OutputError.

    Raises:
        BrokenPipeError: nobody reads stdout any more.
    """
    reporter.to_stderr |= any(isinstance(job.target, Stream) for job in jobs)
    wanted = [job for job in jobs if not (handling.skip_existing and _exists(job))]
    if len(wanted) < len(jobs):
        _report_skipped(set(jobs) - set(wanted), jobs, reporter)
    check = OutputCheck(jobs, handling)
    outcomes = _outcomes(wanted, convert, check, handling.workers, reporter)
    with closing(outcomes), reporter.progress(len(wanted)) as advance:
        for job, outcome in outcomes:
            if not _finish(job, outcome, reporter, take):
                return
            advance()


def run_job(job: Job, convert: Convert, note: Note) -> Outcome:
    """Make the result of one job. Whatever goes wrong is in the outcome."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        start = time.perf_counter()
        try:
            make_result = convert(_content(job), job, note)
            start = time.perf_counter()
            result, failure = make_result(), None
        except Exception as error:
            result, failure = None, Failure.of(error)
        seconds = time.perf_counter() - start
    # Warnings of other categories are for developers.
    texts = tuple(str(warning.message) for warning in caught if issubclass(warning.category, UserWarning))
    return Outcome(result, failure, seconds, texts)


def _outcomes(
    jobs: Sequence[Job], convert: Convert, check: OutputCheck, num_workers: int, reporter: Reporter
) -> Generator[tuple[Job, Outcome], None, None]:
    """Do the jobs that can be done; yields all of them with what came of them, in their order."""
    num_workers = min(num_workers, len(jobs))
    if num_workers > 1:
        yield from run_in_workers(jobs, _Work(convert), num_workers, refused=check.refused, crashed=_crashed)
        return
    for job in jobs:
        yield job, check.refused(job) or run_job(job, convert, reporter.detail)


@dataclass
class _Work:
    """What a worker process does: it reads inputs and makes results, and writes nothing."""

    convert: Convert

    def __call__(self, job: Job) -> Outcome:
        notes: list[str] = []
        outcome = run_job(job, self.convert, notes.append)
        return replace(outcome, notes=tuple(notes))


def _crashed(reason: str) -> Outcome:
    return Outcome(failure=Failure(f"its worker process died ({reason})"))


class OutputCheck:
    """Finds out what is wrong with an output before anything is made for it.

    Args:
        jobs: whose sources must not be overwritten.
    """

    def __init__(self, jobs: Iterable[Job], handling: Handling) -> None:
        self._force = handling.force
        sources = (job.source for job in jobs if isinstance(job.source, Path))
        self._inputs = set().union(*map(identities, (*sources, *handling.inputs)))

    def require(self, target: Place) -> None:
        """Nothing is wrong with an output.

        Raises:
            OutputError: it is an input, or what `check_target` finds.
        """
        if isinstance(target, Path) and identities(target) & self._inputs:
            raise OutputError(f"{target} is an input and is not overwritten")
        check_target(target, force=self._force)

    def refused(self, job: Job) -> Outcome | None:
        """What comes of a job whose output cannot be written; None if it can."""
        try:
            if job.target is not None:
                self.require(job.target)
        except OutputError as error:
            return Outcome(failure=Failure.of(error))
        return None


def _content(job: Job) -> bytes:
    if job.source is None:
        return b""
    if isinstance(job.source, Path):
        return job.source.read_bytes()
    return b"" if sys.stdin is None else sys.stdin.buffer.read()


def _finish(job: Job, outcome: Outcome, reporter: Reporter, take: Callable[[Result], None] | None) -> bool:
    """Write and report one result; False if the others must not be done either."""
    for note in outcome.notes:
        reporter.detail(note)
    for text in outcome.warnings:
        reporter.warning(job.name, text)
    if outcome.failure is not None and outcome.failure.is_fatal:
        reporter.failure(None, outcome.failure)
        return False
    try:
        if outcome.result is None:
            assert outcome.failure is not None
            _report_failure(job, outcome.failure, reporter)
        else:
            if job.target is None and take is not None:
                take(outcome.result)
            _deliver(job, outcome, outcome.result, reporter)
    except OutputError as error:
        _report_failure(job, Failure.of(error), reporter)
    return True


def _report_failure(job: Job, failure: Failure, reporter: Reporter) -> None:
    """Name the input, or the output if there is no input, but not twice."""
    is_named = job.source is None and failure.cause.startswith(job.name)
    reporter.failure(None if is_named else job.name, failure)


def _deliver(job: Job, outcome: Outcome, result: Result, reporter: Reporter) -> None:
    start = time.perf_counter()
    if job.target is not None:
        write(job.target, result.data)
    seconds = outcome.seconds + time.perf_counter() - start
    record: dict[str, Any] = {} if job.source is None else {"input": job.name}
    if job.target is not None:
        record["output"] = job.target_name
    record |= result.fields | {"warnings": list(outcome.warnings)}
    if job.target is None:
        reporter.result(job.name, result.text, record)
    else:
        reporter.result(job.target_name, f"{result.text}  {seconds:.2f} s", record | {"seconds": round(seconds, 3)})


def _exists(job: Job) -> bool:
    return isinstance(job.target, Path) and os.path.isfile(job.target)


def _report_skipped(skipped: set[Job], jobs: Sequence[Job], reporter: Reporter) -> None:
    if not reporter.as_json and not reporter.quiet:
        reporter.message(f"{len(skipped):,} of {len(jobs):,} outputs exist already and are left as they are")
    for job in jobs:
        if reporter.as_json and job in skipped:
            reporter.result(job.name, "", {"input": job.name, "output": job.target_name, "skipped": True})
