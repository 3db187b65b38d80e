"""The scripts that measure whole processes: what they run, and what they make of it."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from pictures import synthetic_photo
from PIL import Image

from pqmim.entropy_kernels import KERNELS

SCRIPTS = Path(__file__).parents[2] / "benchmarks"

pytestmark = [
    pytest.mark.skipif(not SCRIPTS.is_dir(), reason="not part of the source distribution"),
    pytest.mark.skipif(sys.platform == "win32", reason="os.wait4 is not there"),
]


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module(name)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(2):
        Image.fromarray(synthetic_photo(48, 64, seed)).save(folder / f"{seed}.png")
    return folder


@dataclass
class RecordedVersion:
    """A version whose every process takes the next of these seconds."""

    usage: type
    seconds: list[float]
    commands: list[list[str]] = field(default_factory=list)

    def run(self, *arguments: str | Path) -> Any:
        self.commands.append([str(argument) for argument in arguments])
        return self.usage(self.seconds[len(self.commands) % len(self.seconds)], 100 << 20)


def test_a_process_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = load("commands", monkeypatch)
    usage = commands.PRESENT.run("--version")
    assert usage.seconds > 0
    assert usage.peak_bytes > 10 << 20
    with pytest.raises(SystemExit, match=r"pqmim info nothing.pqm: .*nothing.pqm"):
        commands.PRESENT.run("info", "nothing.pqm")


def test_places_of_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = load("commands", monkeypatch)
    assert commands.Version.at(str(tmp_path)) == commands.Version(sys.executable, tmp_path)
    assert commands.Version.at("python3") == commands.Version("python3")
    assert commands.Version.at(str(tmp_path)).environment()["PYTHONPATH"] == str(tmp_path)


def test_limits_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cores and busy loops change is as before afterwards."""
    commands = load("commands", monkeypatch)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    started: list[Any] = []
    popen = commands.subprocess.Popen
    monkeypatch.setattr(commands.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    before = commands.os.environ.copy()
    with commands.cores(1), commands.busy_loops(2):
        assert commands.os.environ["OMP_NUM_THREADS"] == "1"
        assert [loop.poll() for loop in started] == [None, None]
    assert commands.os.environ == before
    assert all(loop.returncode is not None for loop in started)


def test_before_and_after(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both versions run the same commands in turn, the first round does not count, and the fastest run does."""
    script = load("before_after", monkeypatch)
    before, after = (RecordedVersion(script.Usage, seconds) for seconds in ([6.0, 9.0, 4.0], [2.0, 9.0, 3.0]))
    monkeypatch.setattr(script, "PRESENT", after)
    monkeypatch.setattr(script.Version, "at", lambda place: before)
    arguments = ["--before", "elsewhere", "--sizes", "40x24", "--threads", "1", "--repeats", "2", "--efforts", "1", "3"]
    arguments += ["--before-model", "old", "--decoder", "fast"]
    script.main([*arguments, "-o", str(tmp_path)])
    lines = (tmp_path / "times.md").read_text().splitlines()
    assert [line.split(" | ")[0][2:] for line in lines[2:]] == [
        "--version",
        *("encode 40 x 24, effort 1", "encode 40 x 24, effort 3"),
        "decode 40 x 24",
        "info",
    ]
    assert lines[2] == "| --version | 1 | 4.000 / 5.000 | 2.000 / 2.500 | 2.00 | 100 | 100 | 1.00 |"
    assert [command[0] for command in before.commands] == [command[0] for command in after.commands]
    assert len(before.commands) == 3 * 5
    decoded = before.commands[-4], after.commands[-4]
    assert [str(command[1])[-5:] for command in decoded] == ["0.pqm", "1.pqm"]  # each its own file
    assert "-m old -f" in " ".join(map(str, decoded[0]))
    assert "-m photo --decoder fast -f" in " ".join(map(str, decoded[1]))
    assert "-m photo --for fast" in " ".join(map(str, after.commands[-7]))
    assert "4.000 / 5.000" in capsys.readouterr().out


def test_same_bytes(photos: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version beside itself writes the same bytes; a file that differs is told, and nothing is made twice."""
    script = load("before_after", monkeypatch)
    arguments = ["--before", str(SCRIPTS.parent / "src"), "--same-bytes", str(photos), "-m", str(tiny_model)]
    arguments += ["-o", str(tmp_path / "out"), "--qualities", "80", "--efforts", "1", "2"]
    script.main(arguments)
    assert (tmp_path / "out" / "bytes.md").read_text() == "4 of 4 files have the same bytes.\n"

    other, same = (tmp_path / "out" / "before" / f"0-q80-e{effort}.pqm" for effort in (1, 2))
    stamp = same.stat().st_mtime_ns
    other.write_bytes(script.load_codec(tiny_model, device="cpu").encode(photos / "0.png", quality=60))
    script.main(arguments)
    text = (tmp_path / "out" / "bytes.md").read_text()
    assert text.startswith("3 of 4 files have the same bytes.\nOf the others the size differs by +")
    assert "| 0.png | 80 | 1 |" in text
    assert same.stat().st_mtime_ns == stamp


def test_busy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Ratios are against the same command alone."""
    script = load("busy", monkeypatch)
    commands: list[Any] = []

    def seconds_alone(version: Any, command: Any, repeats: int) -> float:
        commands.append(command)
        return 2.0 if len(commands) % 2 else 5.0  # alone, then beside the loops

    monkeypatch.setattr(script, "seconds_alone", seconds_alone)
    monkeypatch.setattr(script, "seconds_of_two", lambda version, both, repeats: 3.0)
    script.main(["--sizes", "32x16", "--loops", "1"])
    assert capsys.readouterr().out.split("\n\n")[1].splitlines() == [
        "| version | command | alone | beside 1 busy loops (ratio) | two at once (ratio) |",
        "| --- | --- | --- | --- | --- |",
        "| this | encode 32 x 16 | 2.00 s | 5.00 s (2.50) | 3.00 s (1.50) |",
        "| this | decode 32 x 16 | 2.00 s | 5.00 s (2.50) | 3.00 s (1.50) |",
    ]
    assert [command[0] for command in commands] == ["encode", "encode", "decode", "decode"]


def test_two_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    script = load("busy", monkeypatch)
    assert script.seconds_of_two(script.PRESENT, [["--version"]] * 2, 1) > 0
    with pytest.raises(SystemExit, match=r"nothing\.pqm"):
        script.seconds_of_two(script.PRESENT, [["--version"], ["info", "nothing.pqm"]], 1)


def test_same_everywhere(
    photos: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows for the settings; another token is a fault, other bytes are none."""
    script = load("same_everywhere", monkeypatch)
    arguments = [str(photos / "0.png"), "-m", str(tiny_model), "--threads", "1", "2"]
    assert script.main([*arguments, "--kernels", "float32", "numpy", "--levels", "all"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    kernel, kernel_of_two = (row.split(" | ")[1] for row in rows[:2])  # the fastest of a trial each
    assert {kernel, kernel_of_two} <= set(KERNELS)
    assert rows == [
        f"| reference: 1 thread | {kernel} |  |  | 1 of 1 | 1 of 1 |",
        f"| 2 threads | {kernel_of_two} |  |  | 1 of 1 | 1 of 1 |",
        "| optimization all | float32 |  |  | 1 of 1 | 1 of 1 |",
        "| NumPy alone | numpy |  |  | 1 of 1 | 1 of 1 |",
    ]

    right = {"000-0": "abc"}
    for outcome, code, cells in (
        (script.Outcome("numpy", {}, {}, right, {"000-0": "other"}), 0, "numpy |  |  | 0 of 1 | 1 of 1 |"),
        (script.Outcome("numpy", {}, {}, {"000-0": "other"}, right), 1, "numpy |  |  | 1 of 1 | 0 of 1 |"),
        (script.Outcome(refusal="not exact"), 0, "numpy | refused: not exact | | | |"),
        (script.Outcome(refusal="gone", has_failed=True), 1, "numpy | failed: gone | | | |"),
    ):
        outcomes = iter([script.Outcome("numpy", {}, {}, right, right), outcome])
        monkeypatch.setattr(script, "run", lambda setting, task, outcomes=outcomes: next(outcomes))
        assert script.main([*arguments[:-1], "--kernels", "numpy"]) == code
        assert capsys.readouterr().out.splitlines()[-1] == f"| NumPy alone | {cells}"


def test_photo_of_a_size(monkeypatch: pytest.MonkeyPatch, photos: Path) -> None:
    """The left upper corner, continued by its mirror image."""
    example = load("example", monkeypatch)
    original = np.asarray(Image.open(photos / "0.png"))
    small = np.asarray(example.photo_of_size(10, 7, photos / "0.png"))
    np.testing.assert_array_equal(small, original[:7, :10])
    wide = np.asarray(example.photo_of_size(100, 48, photos / "0.png"))
    np.testing.assert_array_equal(wide[:, :64], original)
    np.testing.assert_array_equal(wide[:, 64:], original[:, :27:-1])
    assert example.size_of("40x24") == (40, 24)
