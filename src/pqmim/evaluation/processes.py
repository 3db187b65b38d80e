"""Work in processes of its own: with a number of threads, a time limit, and a meter of its peak memory."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

from pqmim.errors import PqmimError

MEBI = 2**20

Outcome = TypeVar("Outcome")


@contextlib.contextmanager
def thread_limits(threads: int) -> Iterator[None]:
    """Have libraries in processes that are started meanwhile take so many threads.

    They look into the environment when they are loaded, which in a spawned process is before any line of ours. NumPy's
    OpenBLAS gets one: the codec shares its work among threads of its own.
    """
    limits = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1"}
    before = {name: os.environ.get(name) for name in limits}
    os.environ.update(limits)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def limit_cores(count: int) -> None:
    """Keep this process to `count` of its cores, where the system has that."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def in_process(work: Callable[..., Outcome], threads: int, time_limit: float, *arguments: object) -> Outcome | str:
    """Do work in a fresh process.

    Args:
        work: a function of a module; its result can be pickled.
        threads: of libraries, and cores that it may use.
        time_limit: seconds.

    Returns:
        What `work` returned, or what went wrong as text.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, threads, work, *arguments), daemon=True)
    with thread_limits(threads):
        process.start()
    sender.close()
    try:
        if not receiver.poll(time_limit):
            return f"took longer than {time_limit:g} s"
        outcome: Outcome | str = receiver.recv()
        return outcome
    except EOFError:
        process.join()
        return f"the process ended with code {process.exitcode} (out of memory?)"
    finally:
        process.terminate()
        process.join()


def _send(sender: Connection, threads: int, work: Callable[..., object], *arguments: object) -> None:
    """Body of the process."""
    limit_cores(threads)
    try:
        sender.send(work(*arguments))
    except (PqmimError, MemoryError, OSError) as error:
        sender.send(f"{type(error).__name__}: {error}")


class MemoryMeter:
    """Peak memory since its making, of this process or of a program that it ran."""

    def __init__(self) -> None:
        # Resets the peak that Linux keeps; elsewhere it stays, and what is added is told too low.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._before = _status("VmRSS") or _peak_memory()
        self._programs_before = _programs_memory()

    def read(self) -> tuple[int, int]:
        """Bytes at the peak: above what was in use when the meter was made, and of the whole process."""
        programs = _programs_memory()
        # The maximum over all programs only ever rises: if it did, it is a peak of those just run.
        added = max(0, _peak_memory() - self._before, programs if programs > self._programs_before else 0)
        return added, max(_peak_memory(), self._before + added)


def _peak_memory() -> int:
    """Peak resident memory of this process, bytes."""
    return _status("VmHWM") or _counted_peak("RUSAGE_SELF")


def _programs_memory() -> int:
    """Peak resident memory of the largest program that ended so far, bytes."""
    return _counted_peak("RUSAGE_CHILDREN")


def _counted_peak(who: str) -> int:
    """What the system counts, bytes; Windows does not, which gives 0."""
    try:
        import resource
    except ImportError:
        return 0
    return int(resource.getrusage(getattr(resource, who)).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def _status(name: str) -> int | None:
    """A size that Linux keeps of this process, bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), None)
