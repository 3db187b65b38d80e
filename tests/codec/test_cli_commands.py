"""`info`, `models`, `selftest`, `generate`, `inpaint` and `gallery`."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cli_tools import ONE_LINE_ERROR, Pqmim, files_below, opened, photo, pixels
from PIL import Image

from pqmim import model_files
from pqmim.bitstream import parse
from pqmim.decoder_files import decoders_beside

pytest_plugins = ["cli_fixtures"]


def test_info_of_partial_files(pqmim: Pqmim, partial_files: Path, tiny_model: Path) -> None:
    source = str(partial_files / "a.pqm")
    unknown = pqmim("info", source, "-v")
    assert unknown.exit_code == 0
    assert "  partial  mini form  " in unknown.stdout
    assert "  holds an unknown share of the tokens" in unknown.stdout
    assert "which is not a shipped one" in unknown.stderr
    assert json.loads(pqmim("info", source, "--json").stdout)["known_share"] is None

    known = pqmim("info", source, "-m", str(tiny_model))
    assert (known.exit_code, known.stderr) == (0, "")
    assert re.search(r"  holds (39|40|41)\.\d % of the tokens", known.stdout)
    record = json.loads(pqmim("info", source, "-m", str(tiny_model), "--json").stdout)
    assert (record["known_share"], record["is_mini"]) == (pytest.approx(0.4, abs=0.01), True)
    missing = pqmim("info", source, "-m", "no-such-model")
    assert missing.exit_code == 1
    assert ONE_LINE_ERROR.fullmatch(missing.stderr)


def test_info_of_another_models_file(pqmim: Pqmim, tiny_model: Path) -> None:
    photo("a.png", mode="RGBA")
    assert pqmim("encode", "a.png").exit_code == 0
    result = pqmim("info", "a.pqm")
    assert result.exit_code == 0
    model_id = parse(Path("a.pqm").read_bytes()).model_id.hex()
    assert f"model unknown ({model_id})" in result.stdout
    assert "  full form  " in result.stdout
    assert "  level " in result.stdout
    assert "alpha 1 B" in result.stdout

    # Without --model the file has to name a shipped model.
    result = pqmim("decode", "a.pqm", "-o", "b.png", has_model=False)
    assert result.exit_code == 1
    assert ONE_LINE_ERROR.fullmatch(result.stderr)
    assert model_id in result.stderr


def test_mini_files_find_their_shipped_model(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = model_files.ShippedModel("tiny", bytes.fromhex("12345678"), Path("tiny"), "")
    monkeypatch.setattr(model_files, "shipped_models", lambda: [shipped])
    assert model_files.shipped_model_of(bytes.fromhex("1234")) == shipped


def test_models_lists_what_is_shipped(pqmim: Pqmim) -> None:
    shipped = model_files.shipped_models()
    result = pqmim("models")
    assert result.exit_code == 0
    (photo,) = shipped
    decoders = decoders_beside(photo.path)
    assert [line.split("  ")[:-2] for line in result.stdout.splitlines()] == [
        ["photo", photo.model_id.hex()],
        *(["", f"decoder {decoder.name}", decoder.decoder_id.hex()] for decoder in decoders),
    ]
    records = [json.loads(line) for line in pqmim("models", "--json").stdout.splitlines()]
    assert [record["bytes"] for record in records] == [entry.path.stat().st_size for entry in (photo, *decoders)]
    assert [record.get("has_realism") for record in records] == [None, False, False, True]
    assert all(record["description"] for record in records)


def test_selftest_prints_a_line_for_each_check(pqmim: Pqmim, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [SimpleNamespace(name="golden.pqm, kernel float32", error=None)]
    module = SimpleNamespace(run=lambda *, device: iter(checks))
    monkeypatch.setitem(sys.modules, "pqmim.selftest", module)
    result = pqmim("selftest")
    assert (result.exit_code, result.stdout) == (0, "ok  golden.pqm, kernel float32\n")
    checks.append(SimpleNamespace(name="golden.pqm, kernel int8", error="other tokens"))
    result = pqmim("selftest")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[1] == "FAILED  golden.pqm, kernel int8: other tokens"


def test_generate(pqmim: Pqmim) -> None:
    command = ("generate", "-o", "out", "--size", "40x24")
    result = pqmim(*command, "-n", "3", "--seed", "5", "--temperature", "0.8", "--steps", "3")
    assert (result.exit_code, result.stderr) == (0, "")
    assert files_below("out") == ["00.png", "01.png", "02.png"]
    assert re.fullmatch(r"out.00\.png  40 x 24  seed 5  \d+\.\d\d s", result.stdout.splitlines()[0])
    image = opened("out/01.png")
    assert image.size == (40, 24)
    assert image.info["Comment"] == (
        "pqmim: nothing was sent, all tokens were drawn (sample, seed 6, temperature 0.8, 3 steps)"
    )
    refused = pqmim(*command)
    assert refused.exit_code == 1
    assert "00.png exists already" in refused.stderr
    same = pqmim(*command, "-f", "--seed", "6", "--temperature", "0.8", "--steps", "3", "--json")
    assert json.loads(same.stdout)["seed"] == 6
    np.testing.assert_array_equal(pixels("out/00.png"), pixels("out/01.png"))


def test_inpaint_changes_what_is_masked_only(pqmim: Pqmim) -> None:
    photo("a.png", (96, 64))
    mask = np.zeros((64, 96), np.uint8)
    mask[20:40, 30:60] = 255
    Image.fromarray(mask).save("mask.png")
    result = pqmim("inpaint", "a.png", "--mask", "mask.png", "-o", "b.png")
    assert (result.exit_code, result.stderr) == (0, "")
    before, after = pixels("a.png"), pixels("b.png")
    np.testing.assert_array_equal(after[mask == 0], before[mask == 0])
    assert (after[mask == 255] != before[mask == 255]).any()
    assert opened("b.png").info["Comment"].endswith("(sample, seed 0, temperature 1)")
    assert pqmim("inpaint", "a.png", "--mask", "mask.png", "-o", "c.png", "--fill", "likely").exit_code == 0

    photo("small.png", (10, 10))
    wrong = pqmim("inpaint", "a.png", "--mask", "small.png", "-o", "d.png")
    assert (wrong.exit_code, wrong.stderr.count("\n")) == (1, 1)
    missing = pqmim("inpaint", "a.png", "--mask", "missing.png", "-o", "d.png")
    assert (missing.exit_code, missing.stderr) == (1, "pqmim: missing.png: No such file or directory\n")


def test_gallery(pqmim: Pqmim) -> None:
    photo("in/a.png", (64, 48))
    Path("in/broken.png").write_bytes(b"")
    result = pqmim("gallery", "in", "-o", "out/page.html", "--keeps", "1,0.5,0", "--seed", "2")
    assert result.exit_code == 1  # of the broken one
    assert re.fullmatch(r"in.a\.png  \d+ \d+ \d+ B", result.stdout.splitlines()[0])
    page = Path("out/page.html").read_text("utf-8")
    assert result.stdout.splitlines()[1].endswith(f"page.html  1 images  {len(page.encode()):,} B")
    assert "sampled with seed 2" in page
    assert pqmim("gallery", "in/a.png", "-o", "out/page.html").exit_code == 1
    assert pqmim("gallery", "in/a.png", "-o", "out/page.html", "-f", "--keeps", "1").exit_code == 0
