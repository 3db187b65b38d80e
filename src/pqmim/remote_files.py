"""Folders of files here and elsewhere, as URLs name them, with fsspec."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from pqmim.errors import MissingExtraError, PqmimError
from pqmim.files import write_file


class Place:
    """A folder, here or wherever fsspec reaches.

    Args:
        url: path or URL.

    Raises:
        MissingExtraError: fsspec, or what it needs for such a URL, is not installed.
    """

    def __init__(self, url: str) -> None:
        try:
            from fsspec.core import url_to_fs
        except ImportError as error:
            raise MissingExtraError("fsspec", "ray") from error
        try:
            self._files, self._root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise PqmimError(f"{url}: {error}") from error
        self.url = url
        self._is_local = "file" in _protocols(self._files)

    def names(self, below: str = "") -> list[str]:
        """Sorted paths of all files below the folder, or below one in it; hidden ones are left out."""
        top = self._path(below)
        if not self._files.exists(top):
            return []
        start = PurePosixPath(self._root)
        found = [PurePosixPath(path).relative_to(start) for path in self._files.find(top)]
        return sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))

    def is_folder(self) -> bool:
        """Whether it is there."""
        return bool(self._files.isdir(self._root))

    def read(self, name: str) -> bytes:
        """Content of a file; raises OSError."""
        return bytes(self._files.cat_file(self._path(name)))

    def write(self, name: str, data: bytes) -> None:
        """Write a file, all or nothing; raises OSError or OutputError."""
        path = self._path(name)
        if self._is_local:
            write_file(Path(path), data)
        else:
            self._files.makedirs(str(PurePosixPath(path).parent), exist_ok=True)
            self._files.pipe_file(path, data)

    def remove(self, name: str) -> None:
        """Remove a file; raises OSError."""
        self._files.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if name else self._root


def _protocols(files: Any) -> tuple[str, ...]:
    return (files.protocol,) if isinstance(files.protocol, str) else tuple(files.protocol)
