"""Worker processes for `batch`: several files at a time, results in order, and a crash that costs one file."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import cast

from pqmim.batch import Convert, Outcome, run_job
from pqmim.jobs import Job
from pqmim.reporting import Failure

AHEAD = 4
"""Jobs for each worker that may be done before an earlier one is: their results are held until then."""


def run_in_workers(
    jobs: Sequence[Job], convert: Convert, check: Callable[[Job], Outcome | None], num_workers: int
) -> Iterator[tuple[Job, Outcome]]:
    """Do jobs in worker processes, which read inputs and make results but write nothing.

    Args:
        convert: is pickled; each worker gets a copy and keeps it, with the model that it loads.
        check: says, before a job is handed out, why it is not to be done.

    Yields:
        Every job and what came of it, in the order of the jobs.
    """
    outcomes: dict[int, Outcome] = {}
    idle = [_Worker(convert) for _ in range(num_workers)]
    busy: dict[Connection, tuple[_Worker, int]] = {}
    next_index = 0
    try:
        for index, job in enumerate(jobs):
            while index not in outcomes:
                while idle and next_index < min(len(jobs), index + AHEAD * num_workers):
                    refused = check(jobs[next_index])
                    if refused is not None:
                        outcomes[next_index] = refused
                    else:
                        worker = idle.pop()
                        worker.start(jobs[next_index])
                        busy[worker.connection] = worker, next_index
                    next_index += 1
                for connection in wait(list(busy)) if index not in outcomes else ():
                    worker, done = busy.pop(cast(Connection, connection))
                    outcome = worker.outcome()
                    idle.append(worker if outcome is not None else _Worker(convert))
                    outcomes[done] = outcome or worker.obituary()
            yield job, outcomes.pop(index)
    finally:
        for worker in (*idle, *(worker for worker, _ in busy.values())):
            worker.end()


class _Worker:
    """A process that does one job at a time, and this process's end of the line to it."""

    def __init__(self, convert: Convert) -> None:
        context = get_context("spawn")  # a fork would copy locks that threads of this process hold
        self.connection, its_end = context.Pipe()
        self._process = context.Process(target=_work, args=(its_end, convert), daemon=True)
        with _no_interrupts():
            self._process.start()
        its_end.close()  # so that the line breaks when the process ends

    def start(self, job: Job) -> None:
        """Hand a job over; a worker that is gone shows when its outcome is asked for."""
        with suppress(OSError):
            self.connection.send(job)

    def outcome(self) -> Outcome | None:
        """What came of the job, None if the process died of it."""
        try:
            return cast(Outcome, self.connection.recv())
        except (EOFError, OSError):
            return None

    def obituary(self) -> Outcome:
        """What to say of the job that the process died of."""
        self._process.join()
        code = self._process.exitcode or 0
        reason = f"exit code {code}"
        if code < 0:
            reason = f"{signal.Signals(-code).name}, for which too little memory is the usual reason"
        return Outcome(failure=Failure(f"its worker process died ({reason})"))

    def end(self) -> None:
        """End the process, whatever it does: it has nothing open for writing."""
        self.connection.close()
        self._process.kill()
        self._process.join()


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Have processes that start now never see Ctrl-C, which reaches them all: the first one ends the others."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(connection: Connection, convert: Convert) -> None:
    """Do jobs until the other end of the line is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        while True:
            job: Job = connection.recv()
            notes: list[str] = []
            outcome = run_job(job, convert, notes.append)
            connection.send(replace(outcome, notes=tuple(notes)))
    except (EOFError, OSError):
        return
