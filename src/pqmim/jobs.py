"""Many files in, many files out: which inputs there are, and what their outputs are called."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pqmim.errors import OutputError, PqmimError
from pqmim.files import STANDARD_STREAM, Place, Stream, place_identity
from pqmim.reporting import Reporter


class UsageError(Exception):
    """The inputs and the output of a call do not go together."""


@dataclass(frozen=True)
class Job:
    """One input and its output.

    Attributes:
        source: what to read; None if something is made of nothing.
        target: where to write; None if nothing is written.
    """

    source: Place | None
    target: Place | None

    @property
    def name(self) -> str:
        """What reports call the input, or the output if there is no input."""
        if self.source is None:
            return self.target_name
        return "stdin" if isinstance(self.source, Stream) else str(self.source)

    @property
    def target_name(self) -> str:
        """What reports call the output."""
        return "stdout" if isinstance(self.target, Stream) else str(self.target)


@dataclass(frozen=True)
class Kinds:
    """Files that a command takes from folders.

    Attributes:
        suffixes: of the files, in lower case.
        left_out: lower-case suffix, "" for a name without one -> why files are left out that a user may expect to be
            taken; people are told of them without asking.
    """

    suffixes: frozenset[str]
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Naming:
    """What outputs are called.

    Attributes:
        suffix: of the outputs, with its dot.
        replaced: lower-case suffixes of inputs that `suffix` replaces; it is appended to others.
    """

    suffix: str
    replaced: frozenset[str]

    def name(self, source: Path, *, keep_suffix: bool) -> str:
        """Name of the output of an input."""
        is_replaced = source.suffix.lower() in self.replaced and not keep_suffix
        return (source.stem if is_replaced else source.name) + self.suffix


def plan_jobs(
    inputs: Sequence[Place],
    output: Place | None,
    *,
    into_folder: bool,
    naming: Naming,
    kinds: Kinds,
    reporter: Reporter,
) -> list[Job]:
    """Find the inputs and name the outputs.

    Folders stand for the files below them. Each output lies beside its input, or, if `output` is a folder, at
    the same place in it as the input has in its own. `photo.jpg` becomes `photo` + suffix; where two inputs
    would get one name, `photo.jpg` + suffix.

    Args:
        inputs: files, folders, or STANDARD_STREAM alone.
        output: a file if there is one input file, else a folder; STANDARD_STREAM for one input file;
            None for beside the inputs (stdout for stdin).
        into_folder: `output` is a folder even if it does not exist yet.
        naming: of the outputs.
        kinds: what is taken from folders.
        reporter: told of empty and unreadable folders, of what is left out, and of inputs whose outputs would still
            have one name.

    Raises:
        UsageError: inputs and output do not go together.
    """
    is_folder = into_folder or (isinstance(output, Path) and os.path.isdir(output))
    if any(isinstance(place, Stream) for place in inputs):
        if len(inputs) > 1:
            raise UsageError("'-' (stdin) cannot be one of several inputs")
        if is_folder:
            raise UsageError("with '-' (stdin) as input, the output must be a file or '-'")
        return [Job(STANDARD_STREAM, output or STANDARD_STREAM)]

    paths = [place for place in inputs if isinstance(place, Path)]
    is_one_file = len(paths) == 1 and not os.path.isdir(paths[0])
    if isinstance(output, Stream) and not is_one_file:
        raise UsageError("only one file can go to '-' (stdout)")
    if isinstance(output, Path) and not is_one_file and not is_folder and os.path.lexists(output):
        raise UsageError(f"{output} is a file; several outputs need a folder")
    found = find_files(paths, kinds, reporter)
    if output is not None and (isinstance(output, Stream) or (is_one_file and not is_folder)):
        return [Job(source, output) for source, _ in found]

    def target(source: Path, place: Path, *, keep_suffix: bool) -> Path:
        name = naming.name(source, keep_suffix=keep_suffix)
        return source.with_name(name) if output is None else output / place / name

    wanted = Counter(place_identity(target(source, place, keep_suffix=False)) for source, place in found)
    taken: dict[str, Path] = {}
    jobs = []
    for source, place in found:
        path = target(source, place, keep_suffix=False)
        if wanted[place_identity(path)] > 1:
            path = target(source, place, keep_suffix=True)
        other = taken.setdefault(place_identity(path), source)
        if other is source:
            jobs.append(Job(source, path))
        else:
            reporter.failure(str(source), OutputError(f"its output {path} is that of {other} too"))
    return jobs


def find_files(inputs: Sequence[Path], kinds: Kinds, reporter: Reporter) -> list[tuple[Path, Path]]:
    """Replace folders by the files below them that have one of the suffixes and do not begin with a dot.

    Returns:
        (file, its folder relative to the input folder), in the order of the inputs and then by name, each
        file once. The second part begins with the name of the input folder if there are several inputs.
    """
    found: dict[str, tuple[Path, Path]] = {}
    for path in inputs:
        if not os.path.isdir(path):
            found.setdefault(os.path.abspath(path), (path, Path()))
            continue
        prefix = Path(path.resolve().name) if len(inputs) > 1 else Path()
        is_empty = True
        others = _Others(kinds)
        for folder, names in _walk(path, others, reporter):
            for name in names:
                if Path(name).suffix.lower() not in kinds.suffixes:
                    others.add_file(name)
                elif not _may_be_file(folder / name):
                    others.add("pipe or device")
                else:
                    is_empty = False
                    place = prefix / folder.relative_to(path)
                    found.setdefault(os.path.abspath(folder / name), (folder / name, place))
        others.report(str(path), reporter)
        if is_empty:
            reporter.failure(str(path), PqmimError("no file of the wanted kind in this folder"))
    return list(found.values())


def _walk(top: Path, others: _Others, reporter: Reporter) -> Iterator[tuple[Path, list[str]]]:
    """Yield (folder, sorted names of its files) for `top` and all below it; hidden names are left out."""

    def unreadable(error: OSError) -> None:
        reporter.failure(str(error.filename), error)

    for folder, subfolders, names in os.walk(top, onerror=unreadable):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in subfolders:
            if os.path.islink(os.path.join(folder, name)):  # os.walk does not follow it: it may lead round in a circle
                others.add("link to a folder")
        yield Path(folder), sorted(name for name in names if not name.startswith("."))


def _may_be_file(path: Path) -> bool:
    """Whether reading can be tried: a pipe would block for good."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return True  # reading it says what is wrong


class _Others:
    """Counts what a folder holds and a command does not take."""

    def __init__(self, kinds: Kinds) -> None:
        self._kinds = kinds
        self._surprising = Counter[str]()
        self._expected = Counter[str]()

    def add(self, what: str) -> None:
        self._surprising[what] += 1

    def add_file(self, name: str) -> None:
        suffix = Path(name).suffix.lower()
        why = self._kinds.left_out.get(suffix)
        if why is None:
            self._expected[suffix or "file without an extension"] += 1
        else:
            self.add(f"{suffix} ({why})" if suffix else why)

    def report(self, name: str, reporter: Reporter) -> None:
        """Warn of what a user may expect to be taken; tell of all else if asked."""
        if self._surprising:
            reporter.warning(name, f"left out: {_counted(self._surprising)}")
        if self._expected:
            reporter.detail(f"{name}: files of other kinds: {_counted(self._expected)}")


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{number:,} x {what}" for what, number in sorted(counter.items()))
