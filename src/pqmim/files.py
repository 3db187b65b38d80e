"""Outputs: files that appear whole or not at all, standard streams that get all bytes or an error."""

from __future__ import annotations

import errno
import os
import secrets
import select
import stat
import sys
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import IO, TextIO

from pqmim.errors import OutputError


class Stream(Enum):
    """What is no path; a file may be named `-` as well."""

    STANDARD = "-"
    """Stdin among the inputs, stdout as output."""


STANDARD_STREAM = Stream.STANDARD
Place = Path | Stream
"""Where something is read from or written to."""


def place_of(text: str) -> Place:
    """Read what a user calls an input or an output: `-` is the standard stream, `./-` a file."""
    return STANDARD_STREAM if text == "-" else Path(text)


def output_of(text: str) -> Place:
    """As `place_of`; paths such as /dev/stdout, under which stdout is open already, are the standard stream too."""
    place = place_of(text)
    if place is STANDARD_STREAM or sys.stdout is None:
        return place
    with suppress(OSError):
        if os.path.samestat(os.stat(place), os.fstat(1)):
            return STANDARD_STREAM
    return place


def identities(path: Path) -> set[tuple[int, int] | str]:
    """Ways to tell that another path is the same file: by its place, and by what is there if something is."""
    found: set[tuple[int, int] | str] = {place_identity(path)}
    with suppress(OSError):
        status = os.stat(path)
        found.add((status.st_dev, status.st_ino))
    return found


def place_identity(path: Path) -> str:
    """A string that all paths of one place share, whether something is there or not."""
    return os.path.normcase(os.path.realpath(path))


def check_target(target: Place, *, force: bool) -> None:
    """Find out early what would keep an output from being written.

    Raises:
        OutputError: it is a folder, lies where nothing can be written, or must not be overwritten.
    """
    if isinstance(target, Stream):
        if sys.stdout is not None and sys.stdout.isatty() and not force:
            raise OutputError("stdout is a terminal; -o FILE writes a file, -f writes to the terminal")
        return
    try:
        is_link = stat.S_ISLNK(os.lstat(target).st_mode)
        status = os.stat(target)
    except FileNotFoundError:
        if os.path.islink(target) and not force:
            raise OutputError(f"{target} is a link to a file that is not there; -f writes that file") from None
        return
    except OSError as error:
        raise OutputError(f"{target}: {error.strerror}") from error
    if stat.S_ISDIR(status.st_mode):
        raise OutputError(f"{target} is a folder")
    if stat.S_ISREG(status.st_mode) and not force:
        what = f" as a link to {os.path.realpath(target)}" if is_link else ""
        raise OutputError(f"{target} exists already{what}; -f overwrites it")


def write(target: Place, data: bytes) -> None:
    """Write a file as `write_file` does, or all bytes to stdout.

    Raises:
        OutputError: it cannot be written.
        BrokenPipeError: nobody reads stdout any more.
    """
    if isinstance(target, Path):
        write_file(target, data)
    else:
        write_stream(sys.stdout, data, "stdout")


def write_file(path: Path, data: bytes) -> None:
    """Write a file, all or nothing; its folder is made if it is not there.

    A link is followed. A file that is replaced keeps its mode and, where that is allowed, its owner. What is no file,
    such as a device or a pipe, is written to and not replaced.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        old = _status(path)
        place = Path(os.path.realpath(path)) if os.path.islink(path) else path
        if old is not None and not _is_file_at(place, old):
            path.write_bytes(data)
        else:
            _replace(place, data, old)
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or error}") from error


def _status(path: Path) -> os.stat_result | None:
    """Follow a path; None if nothing is there."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _is_file_at(place: Path, status: os.stat_result) -> bool:
    """Whether a file can be found under its real path, which is not so for what only a descriptor leads to."""
    found = _status(place)
    return stat.S_ISREG(status.st_mode) and found is not None and os.path.samestat(found, status)


def _replace(place: Path, data: bytes, old: os.stat_result | None) -> None:
    """Write a file under another name first. No two processes, on whatever machine, get the same one."""
    temporary = place.with_name(f".pqmim-{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:  # an interrupt may come before this returns, so it is in here, too
            if old is not None:
                _take_over(temporary, old)
            file.write(data)
        os.replace(temporary, place)
    except FileExistsError:  # somebody else's
        raise
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _take_over(path: Path, old: os.stat_result) -> None:
    """Give a file the owner and the mode of the one that it will replace."""
    new = os.stat(path)
    if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        with suppress(OSError):  # only root may
            os.chown(path, old.st_uid, old.st_gid)
    os.chmod(path, stat.S_IMODE(old.st_mode))


def write_stream(stream: TextIO | None, data: bytes, name: str) -> None:
    """Write all bytes to a standard stream, whatever it is connected to and however it is buffered.

    Raises:
        OutputError: it is closed or full; the message calls it `name`.
        BrokenPipeError: nobody reads it any more.
    """
    if stream is None:
        raise OutputError(f"{name} is closed")
    try:
        stream.flush()
        raw: IO[bytes] = getattr(stream.buffer, "raw", stream.buffer)
        rest = memoryview(data)
        while rest:
            count: int | None = raw.write(rest)
            if count is None:  # set to be non-blocking by a process that shares it, and full
                select.select([], [raw], [])
            elif count == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            else:
                rest = rest[count:]
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"{name}: {error.strerror or error}") from error
