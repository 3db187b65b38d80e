"""What is said of each input: one line for people or one JSON object, and whether something failed."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import sys
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from pqmim.errors import ConfigError, ModelError, OutputError, PqmimError
from pqmim.files import write_stream

if TYPE_CHECKING:
    from rich.progress import TaskID

TRACEBACK_VERBOSITY = 2
LONG_SECONDS = 1.0
"""A file that takes longer has a bar of its own."""
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Failure:
    """An error in a form that one process can send to another.

    Attributes:
        cause: one line.
        path: of a file that could not be read or written, if the cause does not name it.
        trace: of the stack, for developers.
        is_fatal: the model or the device cannot be used, so no other file can be done either.
    """

    cause: str
    path: str | None = None
    trace: str = ""
    is_fatal: bool = False

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Describe an exception."""
        trace = "".join(traceback.format_exception(error))
        path = None
        if isinstance(error, OSError) and error.strerror and isinstance(error.filename, (str, bytes)):
            path = os.fsdecode(error.filename)
        return cls(_one_line(error), path, trace, isinstance(error, (ModelError, ConfigError)))

    def about(self, name: str | None) -> str:
        """What to say of an input, None = the whole call, so that the file that it is about is named, once."""
        names = [part for part in dict.fromkeys((name, self.path)) if part is not None]
        return ": ".join((*names, self.cause))


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
    _bar: _Bar | None = field(default=None, init=False, repr=False)

    def result(self, name: str, text: str, fields: dict[str, Any]) -> None:
        """Report a success: `name  text`, or the fields as JSON."""
        if self.as_json:
            self.text(json.dumps(fields))
        elif not self.quiet:
            self.text(f"{name}  {text}")

    def text(self, line: str) -> None:
        """Print a line where results go.

        Raises:
            OutputError: it cannot be written.
            BrokenPipeError: nobody reads it any more.
        """
        _print(line, *((sys.stderr, "stderr") if self.to_stderr else (sys.stdout, "stdout")))

    def lines(self, text: str) -> None:
        """Print a text of several lines where results go; errors as `text`."""
        for line in text.splitlines():
            self.text(line)

    def failure(self, name: str | None, error: BaseException | Failure) -> None:
        """Report an error in one line on stderr (and as JSON), and count it.

        Args:
            name: the input it concerns, None if it concerns the whole call.
            error: its cause.
        """
        self.num_failed += 1
        failure = error if isinstance(error, Failure) else Failure.of(error)
        self.message(failure.about(name))
        if self.verbosity >= TRACEBACK_VERBOSITY:
            with suppress(OSError, PqmimError):
                write_stream(sys.stderr, failure.trace.encode(errors="replace"), "stderr")
        if self.as_json:
            with suppress(OutputError):  # what can be said of that was said on stderr
                self.text(json.dumps({"input": name, "error": failure.cause}))

    def warning(self, name: str, text: str) -> None:
        """Say on stderr what may surprise."""
        if not self.quiet:
            self.message(f"{name}: warning: {' '.join(text.split())}")

    def detail(self, text: str) -> None:
        """Say on stderr what only -v wants to know."""
        if self.verbosity:
            self.message(text)

    @staticmethod
    def message(text: str) -> None:
        """Say something on stderr, if that can be written: there is no other place to complain."""
        with suppress(OSError, PqmimError):
            _print(f"pqmim: {text}", sys.stderr, "stderr")

    @contextmanager
    def progress(self, total: int) -> Iterator[Callable[[], None]]:
        """Show a bar on stderr if it is a terminal and there is more than one file; yields what moves it.

        With a file that takes long there is a second bar for its parts, see `part`.
        """
        if self.quiet or sys.stderr is None or not sys.stderr.isatty():
            yield lambda: None
            return
        self._bar = _Bar(total)
        try:
            yield self._bar.advance
        finally:
            self._bar.close()
            self._bar = None

    def part(self, what: str, done: int, total: int) -> None:
        """Show how far the file is that is being worked on, where a bar is shown; an `options.OnProgress`."""
        if self._bar is not None:
            self._bar.part(what, done, total)


class _Bar:
    """Bars on a terminal: one for files if there are several, one for the parts of a file that takes long."""

    def __init__(self, num_files: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        # Result lines go above the bar if they share its terminal; what goes to a file is left alone.
        is_shared = sys.stdout is not None and sys.stdout.isatty()
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=is_shared)
        self._files = self._progress.add_task("files", total=num_files, visible=num_files > 1)
        self._part: TaskID | None = None
        self._what = ""
        self._begin = time.monotonic()
        if num_files > 1:
            self._progress.start()

    def advance(self) -> None:
        """A file is done."""
        self._progress.advance(self._files)
        self._forget_part()
        self._begin = time.monotonic()

    def part(self, what: str, done: int, total: int) -> None:
        """Show `what` of a file is being done, and how far that is, if the file has taken long already."""
        if time.monotonic() - self._begin < LONG_SECONDS:
            return
        if self._part is None or what != self._what:
            self._forget_part()
            self._part, self._what = self._progress.add_task(what, total=total, completed=done), what
            self._progress.start()
        self._progress.update(self._part, completed=done, total=total)

    def close(self) -> None:
        self._progress.stop()

    def _forget_part(self) -> None:
        if self._part is not None:
            self._progress.remove_task(self._part)
            self._part = None


def _one_line(error: BaseException) -> str:
    """The cause of an error in one line; for an unexpected one, also its type."""
    if _is_out_of_memory(error):
        return OUT_OF_MEMORY
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    if isinstance(error, PqmimError):
        return text
    return f"internal error: {type(error).__name__}: {text} (-vv shows where)"


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether this is at the root of an error, whoever raised it and however it was passed on."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno == errno.ENOMEM):
            return True
        if isinstance(cause, RuntimeError) and re.search(r"bad[ _]alloc|(allocate|enough|out of) memory", str(cause)):
            return True  # how libraries in C++ say it
        cause = cause.__cause__ or cause.__context__
    return False


def _print(line: str, stream: TextIO | None, name: str) -> None:
    """Print one line; control characters and what the stream cannot encode (odd file names) become '?'."""
    if stream is None:  # closed by the caller, who does not want to see it
        return
    line = "".join("?" if unicodedata.category(character) == "Cc" else character for character in line)
    encoding = stream.encoding or "utf-8"
    data = line.encode(encoding, "replace")
    if isinstance(stream, io.TextIOWrapper):
        write_stream(stream, data + os.linesep.encode(), name)
    else:  # stands in for the stream, as while a progress bar is shown
        print(data.decode(encoding), file=stream, flush=True)
