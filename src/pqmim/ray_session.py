"""A Ray to work on."""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TextIO

from pqmim.errors import MissingExtraError, PqmimError

OBJECT_STORE_BYTES = 200_000_000
"""Shared memory of a Ray of our own: only names and rows pass through it."""


@contextmanager
def ray_session(concurrency: int) -> Iterator[None]:
    """A Ray to work on: the one that is connected to, the cluster that RAY_ADDRESS names, or one of our own.

    Meanwhile only the thread that asked for it can print to stdout.

    Args:
        concurrency: workers that one of our own has cores for.

    Raises:
        MissingExtraError: Ray is not installed.
        PqmimError: there is no such cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # else Ray keeps messages back until after the end
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtraError("ray", "ray") from error
    is_ours = not ray.is_initialized()
    with warnings.catch_warnings(), redirect_stdout(_OneThread(sys.stdout)):
        warnings.simplefilter("ignore")
        if is_ours and os.environ.get("RAY_ADDRESS"):
            try:
                ray.init(log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise PqmimError(f"no Ray cluster at {os.environ['RAY_ADDRESS']}: {error}") from error
        elif is_ours:
            ray.init(
                "local",
                num_cpus=concurrency,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            if is_ours:
                ray.shutdown()


class _OneThread(io.TextIOBase):
    """Stdout for the thread that makes this alone: Ray prints what it thinks of dead workers among the results."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream, self._owner = stream, threading.get_ident()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        if self._stream is not None and threading.get_ident() == self._owner:
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            self._stream.flush()
