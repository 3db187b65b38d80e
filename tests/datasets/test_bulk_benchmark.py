"""The script that measures throughput: the ways it compares, and what it refuses to compare."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks"

pytest.importorskip("matplotlib")  # of the scripts beside it
pytestmark = [
    pytest.mark.skipif(not SCRIPTS.is_dir(), reason="not part of the source distribution"),
    pytest.mark.skipif(sys.platform == "win32", reason="os.wait4 is not there"),
]


class Writer:
    """A version whose commands write a file, as given for each."""

    def __init__(self, contents: list[bytes]) -> None:
        self.contents = contents
        self.commands: list[list[str]] = []

    def run(self, *arguments: str | Path) -> None:
        words = [str(argument) for argument in arguments]
        output = Path(words[2] if words[0] == "bulk" else words[words.index("-o") + 1])
        output.mkdir()
        (output / "a.pqm").write_bytes(self.contents[len(self.commands) % len(self.contents)])
        self.commands.append([words[0], *words[-4:]])


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("bulk")


def test_the_ways_are_measured_in_turn(script: ModuleType, tmp_path: Path) -> None:
    writer = Writer([b"same"])
    seconds, num_photos = script.measure(writer, tmp_path, 2, 2, ["-q", "30"])
    assert list(seconds) == ["encode -j 1", "encode -j 2", "bulk --concurrency 2"]
    assert num_photos == 1
    assert writer.commands == 2 * [
        ["encode", "-j", "1", "-q", "30"],
        ["encode", "-j", "2", "-q", "30"],
        ["bulk", "--concurrency", "2", "-q", "30"],
    ]


def test_ways_that_write_different_files_are_not_compared(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="the ways wrote different files"):
        script.measure(Writer([b"one", b"other"]), tmp_path, 2, 1, [])
