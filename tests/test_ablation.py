"""Ablation table."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from stand_in_codec import write_photos

from pqmim.ablation import AblationOptions, ModelVariant, ablation_table, run_ablation
from pqmim.evaluate import PqmimCodec


class Variant:
    """Bits in round numbers per pixel."""

    name = "toy, nearest"

    def price(self, image: Image.Image, quality: float) -> dict[str, float]:
        pixels = image.width * image.height
        ways = {"uniform": 8.0, "static": 4.0, "masked-float": 3.0, "masked-exact": 3.03, "ten steps": 2.5}
        return {"psnr-rgb": 20 + quality / 10, "file": 3.1 * pixels} | {
            way: bits * pixels for way, bits in ways.items()
        }


def test_table(tmp_path: Path):
    write_photos(tmp_path / "photos", number=2, size=(30, 20))
    write_photos(tmp_path / "photos" / "more", number=1, size=(50, 60))
    rows = run_ablation(AblationOptions(tmp_path / "photos", tmp_path / "out", (Variant(),), (50.0,), is_quiet=True))
    (row,) = rows
    assert (row.psnr_rgb, row.bpp) == (pytest.approx(25), pytest.approx(3.1))
    assert row.change("static", "uniform") == pytest.approx(-50)
    assert row.change("masked-exact", "masked-float") == pytest.approx(1)
    assert row.change("payload", "masked-exact") is None
    header, _, line = ablation_table(rows).splitlines()
    assert "payload" not in header
    assert "masked-exact vs static" in header
    assert line.startswith("| toy, nearest | 50 | 25.00 | 3.1000 | 8.0000 | 4.0000 |")
    assert "-24.25 %" in line
    assert (tmp_path / "out" / "ablation.md").read_text().splitlines()[2] == line
    assert json.loads((tmp_path / "out" / "ablation.json").read_text())[0]["bpp ten steps"] == 2.5
    assert (tmp_path / "out" / "ablation.csv").read_text().startswith("variant,quality,psnr-rgb,bpp,")


def test_model_variant(monkeypatch: pytest.MonkeyPatch):
    """What the codec says of its bits arrives under the table's names."""
    bits = SimpleNamespace(uniform=80.0, static=40.0, exact=30.0, payload=32.0, file=192.0)
    image = Image.fromarray(np.full((4, 4, 3), 7, np.uint8))
    codec = SimpleNamespace(
        rate_breakdown=lambda image, quality: bits,
        encode=lambda image, quality: b"data",
        decode=lambda data: image,
    )
    monkeypatch.setattr(PqmimCodec, "loaded", lambda self: codec)
    variant = ModelVariant(PqmimCodec("small"))
    assert variant.name == "pqmim-small"
    assert variant.price(image, 50.0) == {
        "psnr-rgb": 100.0,
        "file": 192.0,
        "uniform": 80.0,
        "static": 40.0,
        "masked-exact": 30.0,
        "payload": 32.0,
    }
