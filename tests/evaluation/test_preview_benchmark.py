"""The benchmark of previews runs from end to end, on a tiny model."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from pictures import synthetic_photo
from PIL import Image

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are in the repository only", allow_module_level=True)

sys.path.insert(0, str(BENCHMARKS))  # the scripts import each other
script = importlib.import_module("preview")


def test_benchmark(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures").mkdir()
    Image.fromarray(synthetic_photo(96, 144)).save(tmp_path / "pictures" / "photo.png")
    monkeypatch.setattr(script, "BUDGETS", (60, 200))
    monkeypatch.setattr(script, "WEBP_SCALES", (16, 4))
    monkeypatch.setattr(script, "SPEED_REPEATS", 2)
    output, strip = tmp_path / "out", tmp_path / "strip.jpg"
    arguments = [str(tmp_path / "pictures"), "-m", str(tiny_model), "-o", str(output), "--metrics", "psnr-rgb"]
    script.main([*arguments, "--strip", str(strip), "--speed"])

    rows = json.loads((output / "preview.json").read_text())
    assert len(rows) == 4 * 2 + 2
    for row in rows:
        assert row["bytes"] is None or row["budget"] == 0 or row["bytes"] <= row["budget"]
        assert (row["bytes"] is None) == ("psnr-rgb" not in row)
    sizes = {(row["contender"], row["budget"]): row["bytes"] for row in rows}
    assert sizes["WebP, data URL", 60] is None
    assert 60 < sizes["WebP, data URL", 200] <= 200
    assert sizes["pqmim, base64", 60] % 4 == 0
    assert sizes["BlurHash 4 x 3", 0] == 28
    lines = (output / "preview.md").read_text().splitlines()
    assert lines[0] == "| at most |  | pictures | size (mean) | MS-SSIM | PSNR (dB) | SSIMULACRA2 |"
    assert len(lines) == 2 + 10
    assert [row["budget"] for row in json.loads((output / "speed.json").read_text())] == [60, 200]
    with Image.open(strip) as sheet:
        assert sheet.width == 6 * script.STRIP_WIDTH + 5 * 5

    def fail(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(script, "measured", fail)
    text = (output / "preview.md").read_text()
    script.main(arguments)
    assert (output / "preview.md").read_text() == text
