"""Whole processes of the command line, measured from outside: seconds and peak memory. Linux and macOS only."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from example import ROOT

MIB = 1 << 20
BUSY_LOOP = "while True: pass"


@dataclass(frozen=True)
class Version:
    """A version of the package.

    Attributes:
        python: that runs it.
        path: folder that holds the package, or None if it is installed.
    """

    python: str
    path: Path | None = None

    @classmethod
    def at(cls, place: str) -> Version:
        """From a Python executable that has the package, or a folder that holds it, for the Python that runs this."""
        path = Path(place)
        return cls(sys.executable, path.resolve()) if path.is_dir() else cls(place)

    def environment(self) -> dict[str, str]:
        """Environment of its processes."""
        return dict(os.environ) if self.path is None else {**os.environ, "PYTHONPATH": str(self.path)}

    def start(self, *arguments: str | Path) -> subprocess.Popen[bytes]:
        """Start `pqmim ARGUMENTS`."""
        command = [self.python, "-m", "pqmim", *map(str, arguments)]
        return subprocess.Popen(command, env=self.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def run(self, *arguments: str | Path) -> Usage:
        """Run `pqmim ARGUMENTS` and measure it.

        Raises:
            SystemExit: it failed.
        """
        start = time.perf_counter()
        process = self.start(*arguments)
        assert process.stderr is not None
        errors = process.stderr.read()
        _, status, resources = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        process.stderr.close()
        if process.returncode:
            sys.exit(f"pqmim {' '.join(map(str, arguments))}: {errors.decode(errors='replace').strip()}")
        return Usage(seconds, resources.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


@dataclass(frozen=True)
class Usage:
    """What a process took: seconds from start to end, bytes at the peak."""

    seconds: float
    peak_bytes: int


PRESENT = Version(sys.executable, ROOT / "src")
"""The version of this checkout."""


@contextmanager
def cores(count: int) -> Iterator[None]:
    """Keep processes that are started meanwhile to so many cores, where the system has that, and their libraries to so
    many threads."""
    variable, affinity = "OMP_NUM_THREADS", getattr(os, "sched_getaffinity", None)
    threads_before, cores_before = os.environ.get(variable), None if affinity is None else affinity(0)
    os.environ[variable] = str(count)
    if cores_before is not None:
        os.sched_setaffinity(0, sorted(cores_before)[:count])
    try:
        yield
    finally:
        if cores_before is not None:
            os.sched_setaffinity(0, cores_before)
        if threads_before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = threads_before


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Keep other processes busy meanwhile."""
    loops = [subprocess.Popen([sys.executable, "-c", BUSY_LOOP]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def alternate(versions: Sequence[Version], commands: Sequence[Sequence[str | Path]], repeats: int) -> list[list[Usage]]:
    """Run a command of each version in turn; the first round, which fills caches of files, does not count.

    Args:
        commands: one for each version.

    Returns:
        For each version what each of the `repeats` runs took.
    """
    usages: list[list[Usage]] = [[] for _ in versions]
    for number in range(repeats + 1):
        for version, command, of_version in zip(versions, commands, usages, strict=True):
            usage = version.run(*command)
            if number:
                of_version.append(usage)
    return usages
