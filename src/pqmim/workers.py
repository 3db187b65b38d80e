"""Worker processes: several pieces of work at a time, results in order, and a crash that costs one of them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Generic, TypeVar, cast

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")

AHEAD = 4
"""Items for each worker that may be done before an earlier one is: their results are held until then."""


def run_in_workers(
    items: Sequence[Item],
    work: Callable[[Item], Outcome],
    num_workers: int,
    *,
    refused: Callable[[Item], Outcome | None],
    crashed: Callable[[str], Outcome],
) -> Iterator[tuple[Item, Outcome]]:
    """Have processes work on items.

    Args:
        work: what they do; it is pickled, and each process keeps its copy. It must not leave anything half done when
            its process is killed.
        refused: what comes of an item that is not to be worked on; asked before it is handed out.
        crashed: what comes of an item whose process died, for a reason in words.

    Yields:
        Every item and what came of it, in the order of the items.
    """
    outcomes: dict[int, Outcome] = {}
    idle = [_Worker(work) for _ in range(num_workers)]
    busy: dict[Connection, tuple[_Worker[Item, Outcome], int]] = {}
    next_index = 0
    try:
        for index, item in enumerate(items):
            while index not in outcomes:
                while idle and next_index < min(len(items), index + AHEAD * num_workers):
                    outcome = refused(items[next_index])
                    if outcome is not None:
                        outcomes[next_index] = outcome
                    else:
                        worker = idle.pop()
                        worker.start(items[next_index])
                        busy[worker.connection] = worker, next_index
                    next_index += 1
                for connection in wait(list(busy)) if index not in outcomes else ():
                    worker, done = busy.pop(cast(Connection, connection))
                    outcome = worker.outcome()
                    idle.append(worker if outcome is not None else _Worker(work))
                    outcomes[done] = crashed(worker.obituary()) if outcome is None else outcome
            yield item, outcomes.pop(index)
    finally:
        for worker in (*idle, *(worker for worker, _ in busy.values())):
            worker.end()


class _Worker(Generic[Item, Outcome]):
    """A process that works on one item at a time, and this process's end of the line to it."""

    def __init__(self, work: Callable[[Item], Outcome]) -> None:
        context = get_context("spawn")  # a fork would copy locks that threads of this process hold
        self.connection, its_end = context.Pipe()
        self._process = context.Process(target=_work, args=(its_end, work), daemon=True)
        with _no_interrupts():
            self._process.start()
        its_end.close()  # so that the line breaks when the process ends

    def start(self, item: Item) -> None:
        """Hand an item over; a worker that is gone shows when its outcome is asked for."""
        with suppress(OSError):
            self.connection.send(item)

    def outcome(self) -> Outcome | None:
        """What came of the item, None if the process died of it."""
        try:
            return cast(Outcome, self.connection.recv())
        except (EOFError, OSError):
            return None

    def obituary(self) -> str:
        """What the process died of."""
        self._process.join()
        code = self._process.exitcode or 0
        if code < 0:
            return f"{signal.Signals(-code).name}, for which too little memory is the usual reason"
        return f"exit code {code}"

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


def _work(connection: Connection, work: Callable[[Item], Outcome]) -> None:
    """Work until the other end of the line is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        while True:
            connection.send(work(connection.recv()))
    except (EOFError, OSError):
        return
