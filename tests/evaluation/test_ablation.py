"""Ablation table."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from pictures import synthetic_photo
from PIL import Image
from stand_in_codec import write_photos

from pqmim.codec import load_codec
from pqmim.errors import MissingExtraError
from pqmim.evaluation.ablation import (
    FLOAT_MODEL,
    AblationOptions,
    FloatNetwork,
    ModelVariant,
    ablation_table,
    run_ablation,
    variants_of,
)
from pqmim.evaluation.pixel_metrics import psnr_rgb


class Variant:
    """Bits in round numbers per pixel."""

    name = "toy, nearest"
    qualities = None

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


def test_model_variant(tiny_model: Path):
    """What codec and float network say of the bits arrives under the table's names, and they agree with each other."""
    pytest.importorskip("torch")
    from training.tiny_networks import make_tiny_entropy_model, make_tiny_tokenizer

    photo = Image.fromarray(synthetic_photo(96, 128))
    codec = load_codec(tiny_model, device="cpu")
    network = make_tiny_entropy_model(make_tiny_tokenizer())
    prices = ModelVariant("tiny", codec, FloatNetwork(network)).price(photo, 50.0)
    data, bits = codec.encode_with_rates(photo, quality=50.0)
    assert prices["file"] == 8 * len(data)
    assert prices["psnr-rgb"] == psnr_rgb(np.asarray(photo), np.asarray(codec.decode(data)))
    assert {key: prices[key] for key in ("uniform", "static", "masked-exact", "payload")} == {
        "uniform": bits.uniform,
        "static": bits.static,
        "masked-exact": bits.exact,
        "payload": bits.payload,
    }
    assert prices["masked-float"] == pytest.approx(prices["masked-exact"], rel=0.05)


def test_float_network_of_a_run_folder(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What training leaves beside the model is compared; a plain model needs no PyTorch."""
    torch = pytest.importorskip("torch")
    from training.tiny_networks import make_tiny_entropy_model, make_tiny_tokenizer

    run = shutil.copytree(tiny_model, tmp_path / "run")
    network = make_tiny_entropy_model(make_tiny_tokenizer())
    torch.save(network.state_dict(), run / FLOAT_MODEL)
    plain, *others = variants_of(str(run), "cpu")
    assert plain.float_network is not None
    assert all(variant.float_network is None for variant in others)
    tokens = plain.codec.encode_tokens(synthetic_photo(48, 64))
    assert plain.float_network.bits(tokens, 2) == FloatNetwork(network).bits(tokens, 2) > 0

    monkeypatch.setitem(sys.modules, "torch", None)
    assert variants_of(str(tiny_model), "cpu")[0].float_network is None
    with pytest.raises(MissingExtraError, match=r"torch .*pqmim\[train\]"):
        variants_of(str(run), "cpu")
