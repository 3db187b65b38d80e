"""The benchmarks of tiny and partial files run from end to end, on a tiny model."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from pictures import synthetic_photo
from PIL import Image

pytest.importorskip("pytorch_msssim")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are in the repository only", allow_module_level=True)

sys.path.insert(0, str(BENCHMARKS))  # the scripts import each other
tiny, fill = importlib.import_module("tiny"), importlib.import_module("fill")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.fromarray(synthetic_photo(176, 192)).save(folder / "photo.png")
    return folder


@pytest.fixture
def few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pictures, few files."""
    monkeypatch.setattr(tiny, "CROP", 168)
    monkeypatch.setattr(tiny, "BUDGETS", (200, 500))
    monkeypatch.setattr(tiny, "SCALES", (24, 12))
    monkeypatch.setattr(tiny, "SPEED_REPEATS", 2)


@pytest.mark.usefixtures("few_files")
def test_tiny_files(
    dataset: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, picture = tmp_path / "out", tmp_path / "strip.jpg"
    arguments = [str(dataset), "-o", str(output), "--metrics", "psnr-rgb"]
    tiny.main(arguments)
    assert "pqmim" not in json.loads((output / "tiny.json").read_text())["codecs"]

    # The model is added, the rest is not measured again.
    measured: list[str] = []
    measure = tiny.Task._measure
    monkeypatch.setattr(tiny.Task, "_measure", lambda task: measured.append(task.contender.name) or measure(task))
    tiny.main([*arguments, "-m", str(tiny_model), "--strip", str(picture), "--speed", "--threads", "1"])
    assert measured == ["pqmim", "pqmim"]

    content = json.loads((output / "tiny.json").read_text())
    for row in content["pictures"]:
        if row["budget"] is not None and row["bytes"] is not None:
            assert row["bytes"] <= row["budget"]
            assert row["best-psnr-rgb"] >= row["psnr-rgb"]
    table = (output / "tiny.md").read_text()
    assert "| pqmim | 1 of 1 |" in table
    assert "| WebP | 1 of 1 |" in table
    assert "not computed" in table  # SSIMULACRA2, which was not wanted
    times = json.loads((output / "speed.json").read_text())["times"]
    assert [row["codec"] for row in times] == ["pqmim", "webp"]
    assert 0 < picture.stat().st_size < tiny.STRIP_MAX_BYTES
    assert "at most 200 bytes" in capsys.readouterr().out


def test_budget_without_a_file() -> None:
    row = {"view": "whole", "budget": 100, "codec": "avif", "image": "a", "bytes": None}
    summary = tiny.summarize([row, {**row, "image": "b"}])
    assert "| AVIF | 0 of 2 | no file fits |" in tiny.markdown(summary, {"avif": "AVIF"}, {})


def test_search_finds_the_largest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    class Steps:
        """Files as long as their quality."""

        name, qualities = "steps", tuple(float(number) for number in range(90, 600, 7))

        def encode(self, image: Image.Image, quality: float) -> bytes:
            return bytes(int(quality))

    image = Image.new("RGB", (8, 8))
    monkeypatch.setattr(tiny, "SCALES", (1,))
    sizes = [
        [len(file.data) for file in tiny.ScaledCodec("steps", "steps", (Steps(),), is_swept).files(image)]
        for is_swept in (True, False)
    ]
    assert sizes[0] == sizes[1] == [97, 146, 195, 300, 496]


def test_fill(dataset: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill, "KEPT", (0.4, 1.0))
    monkeypatch.setattr(fill, "QUALITIES", (60.0,))
    output = tmp_path / "out"
    arguments = [str(dataset), "-m", str(tiny_model), "-o", str(output)]
    fill.main(arguments)
    text = (output / "fill.md").read_text()
    rows = json.loads((output / "fill.json").read_text())["means"]
    assert len(rows) == 2 * len(fill.FILLS)
    assert len({row["psnr-rgb"] for row in rows if row["keep"] == 1}) == 1
    assert {row["pictures"] for row in rows} == {1}

    def fail(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(fill, "measure", fail)
    fill.main(arguments)
    assert (output / "fill.md").read_text() == text
