"""`encode`, `decode` and `tokens` with their options, and `truncate`."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import RESULT_LINE, Pqmim, files_below, opened, photo, pixels
from PIL import Image

from pqmim.bitstream import smallest_size

pytest_plugins = ["cli_fixtures"]


def test_encode_and_decode_a_file(pqmim: Pqmim) -> None:
    photo("kodim01.jpg")
    result = pqmim("encode", "kodim01.jpg", "-q", "62.5")
    assert (result.exit_code, result.stderr) == (0, "")
    assert RESULT_LINE.fullmatch(result.stdout.strip())
    size = Path("kodim01.pqm").stat().st_size
    assert result.stdout.startswith(f"kodim01.pqm  {size:,} B  {8 * size / (40 * 24):.3f} bpp  ")

    result = pqmim("decode", "kodim01.pqm")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(f"kodim01.png  40 x 24  {size:,} B  ")
    with Image.open("kodim01.png") as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (40, 24))


def test_alpha_comes_back(pqmim: Pqmim) -> None:
    photo("a.png", mode="RGBA")
    assert pqmim("encode", "a.png", "-o", "b.pqm").exit_code == 0
    assert pqmim("decode", "b.pqm").exit_code == 0
    with Image.open("b.png") as image:
        assert image.mode == "RGBA"


def test_quality_changes_the_file(pqmim: Pqmim) -> None:
    photo("a.png", (96, 96))
    for quality in ("0", "100"):
        assert pqmim("encode", "a.png", "-q", quality, "-o", f"{quality}.pqm").exit_code == 0
    assert Path("0.pqm").read_bytes() != Path("100.pqm").read_bytes()


def test_tokens_of_an_image_are_those_of_its_file(pqmim: Pqmim) -> None:
    photo("a.png")
    assert pqmim("encode", "a.png", "-q", "30").exit_code == 0
    result = pqmim("tokens", "a.png", "a.pqm", "-q", "30")
    assert (result.exit_code, result.stderr) == (0, "")
    of_image, of_file = np.load("a.png.npy"), np.load("a.pqm.npy")
    assert (of_image.dtype, of_image.shape) == (np.uint16, (8, 2, 3))
    np.testing.assert_array_equal(of_image, of_file)
    assert result.stdout.startswith("a.png.npy  8 x 2 x 3 tokens  ")


def test_targets_are_met(pqmim: Pqmim) -> None:
    photo("a.png", (96, 96))
    for option, value, limit in (("--target-bytes", "30", 30), ("--target-bpp", "0.03", 34)):
        result = pqmim("encode", "a.png", option, value, "-f")
        assert (result.exit_code, result.stderr) == (0, "")
        assert 20 <= Path("a.pqm").stat().st_size <= limit


def test_target_that_cannot_be_met(pqmim: Pqmim) -> None:
    photo("a.png")
    result = pqmim("encode", "a.png", "--target-bytes", "3")
    assert result.exit_code == 0
    size = Path("a.pqm").stat().st_size
    assert size == smallest_size(Path("a.pqm").read_bytes()) > 3
    assert result.stderr == "pqmim: a.png: warning: no file of 3 bytes is possible, this is the smallest\n"
    assert "  partial  " in result.stdout
    result = pqmim("encode", "a.png", "--target-bytes", "3", "--strict", "-f")
    assert result.exit_code == 1
    assert result.stderr == f"pqmim: a.png: no file of 3 bytes is possible; the smallest has {size}\n"


def test_scale_and_keep_are_told(pqmim: Pqmim) -> None:
    photo("a.png", (96, 96))
    result = pqmim("encode", "a.png", "--scale", "2", "--keep", "0.5")
    assert "  scale 2  partial  " in result.stdout
    record = json.loads(pqmim("encode", "a.png", "-f", "--scale", "2", "--keep", "0.5", "--json").stdout)
    assert (record["scale"], record["is_partial"]) == (2, True)


def test_options_that_choose_tokens(pqmim: Pqmim) -> None:
    photo("a.png", (96, 96))
    made = set()
    variants = ([], ["--effort", "1"], ["--tune", "ms-ssim"], ["--roi", "0,0,50,50", "--roi", "64,64,32,32,0.1"])
    for options in variants:
        result = pqmim("encode", "a.png", "-f", "-q", "80", *options)
        assert (result.exit_code, result.stderr) == (0, ""), options
        made.add(Path("a.pqm").read_bytes())
    assert len(made) > 1
    outside = pqmim("encode", "a.png", "-f", "--roi", "96,0,10,10")
    assert (outside.exit_code, outside.stderr) == (0, "pqmim: a.png: warning: region 96,0 lies outside the image\n")


def test_pixel_limit(pqmim: Pqmim) -> None:
    photo("a.png")
    assert pqmim("encode", "a.png", "--max-pixels", "959").exit_code == 1
    assert pqmim("encode", "a.png", "--max-pixels", "960").exit_code == 0
    assert pqmim("decode", "a.pqm", "-o", "b.png", "--max-pixels", "959").exit_code == 1
    assert pqmim("decode", "a.pqm", "-o", "b.png", "--max-pixels", "960").exit_code == 0


def test_provenance_of_filled_pictures(pqmim: Pqmim, partial_files: Path) -> None:
    source = str(partial_files / "a.pqm")
    result = pqmim("decode", source, "-o", "likely.png")
    share = re.findall(r"  (\d+\.\d %) invented  ", result.stdout)[0]
    record = json.loads(pqmim("decode", source, "-o", "none.png", "--fill", "none", "--json").stdout)
    assert record["invented_share"] == pytest.approx(float(share.rstrip(" %")) / 100, abs=0.001)
    assert 0.5 < record["invented_share"] < 0.7
    options = ("--fill", "sample", "--seed", "3", "--temperature", "0.5", "--steps", "4")
    for name in ("sample.png", "again.png"):
        assert pqmim("decode", source, "-o", name, *options).exit_code == 0
    assert pqmim("decode", source, "-o", "other.png", *options, "--seed", "4").exit_code == 0

    def comment(name: str) -> Any:
        return opened(name).info.get("Comment")

    begin = f"pqmim: {share} of the tokens were not in the file and were filled"
    assert comment("likely.png") == f"{begin} (likely)"
    assert comment("none.png") == f"{begin} (none)"
    assert comment("sample.png") == f"{begin} (sample, seed 3, temperature 0.5, 4 steps)"
    assert Path("sample.png").read_bytes() == Path("again.png").read_bytes()
    assert len({pixels(f"{name}.png").tobytes() for name in ("likely", "none", "sample", "other")}) == 4

    assert pqmim("encode", "in/a.png", "-o", "whole.pqm").exit_code == 0
    whole = pqmim("decode", "whole.pqm", "--json")
    assert json.loads(whole.stdout)["invented_share"] == 0
    assert comment("whole.png") is None
    assert "invented" not in pqmim("decode", "whole.pqm", "-f").stdout


def test_progress_pictures(pqmim: Pqmim, partial_files: Path) -> None:
    decode = ("decode", str(partial_files), "-o", "out", "--progress-dir", "steps/new")
    assert pqmim(*decode).exit_code == 0
    made = files_below("steps/new")
    assert {"a.step01.png", "a.step02.png", "a-2.step01.png"} <= set(made)
    sizes = {name: opened(Path("steps/new", name)).size for name in made}
    assert {sizes["a.step01.png"], sizes["a-2.step01.png"]} == {(96, 96), (64, 96)}
    last = max(name for name in made if name.startswith("a.step"))
    np.testing.assert_array_equal(pixels(Path("steps/new", last)), pixels("out/a.png"))

    decode = ("decode", str(partial_files / "a.pqm"), "-o", "b.png", "--progress-dir", "steps")
    assert pqmim(*decode).exit_code == 0
    assert "b.step01.png" in files_below("steps")
    Path("b.png").unlink()
    refused = pqmim(*decode)
    assert (refused.exit_code, Path("b.png").exists()) == (1, False)
    assert "b.step01.png exists already" in refused.stderr
    assert pqmim(*decode, "-f").exit_code == 0


def test_salvage(pqmim: Pqmim) -> None:
    photo("a.png", (96, 96))
    assert pqmim("encode", "a.png", "-q", "100").exit_code == 0
    Path("b.pqm").write_bytes(Path("a.pqm").read_bytes()[:-10])
    refused = pqmim("decode", "b.pqm")
    assert (refused.exit_code, files_below(".")) == (1, ["a.png", "a.pqm", "b.pqm"])
    result = pqmim("decode", "b.pqm", "--salvage")
    assert result.exit_code == 0
    assert result.stderr == "pqmim: b.pqm: warning: checksum mismatch: cut or damaged\n"
    assert " % invented  " in result.stdout
    image = opened("b.png")
    assert image.size == (96, 96)
    assert image.info["Comment"].endswith("; salvaged: checksum mismatch: cut or damaged")
    record = json.loads(pqmim("decode", "b.pqm", "--salvage", "-f", "--json").stdout)
    assert record["problem"] == "checksum mismatch: cut or damaged"
    assert 0 < record["invented_share"] < 1

    whole = pqmim("decode", "a.pqm", "--salvage", "-o", "whole.png", "--json")
    assert (whole.stderr, json.loads(whole.stdout)["problem"]) == ("", None)
    Path("c.pqm").write_bytes(b"something else")
    assert pqmim("decode", "c.pqm", "--salvage").exit_code == 1


def test_truncate(pqmim: Pqmim) -> None:
    photo("in/a.png", (96, 96))
    photo("in/deep/b.png", (96, 64))
    assert pqmim("encode", "in", "-o", "full", "-q", "100").exit_code == 0
    result = pqmim("truncate", "full", "-o", "cut", "--bytes", "25")
    assert (result.exit_code, result.stderr) == (0, "")
    assert files_below("cut") == ["a.pqm", "deep/b.pqm"]
    assert [Path("cut", name).stat().st_size for name in files_below("cut")] == [25, 25]
    assert "  partial  " in result.stdout.splitlines()[0]
    assert pqmim("decode", "cut", "-o", "out").exit_code == 0

    assert pqmim("truncate", "full/a.pqm", "-o", "a.pqm", "--bpp", "0.02").exit_code == 0
    assert Path("a.pqm").stat().st_size == int(0.02 * 96 * 96 / 8)
    piped = pqmim("truncate", "-", "--bytes", "25", stdin=Path("full/a.pqm").read_bytes())
    assert piped.stdout_bytes == Path("cut/a.pqm").read_bytes()
    unchanged = pqmim("truncate", "full/a.pqm", "-o", "same.pqm", "--bytes", "100000")
    assert "partial" not in unchanged.stdout
    assert Path("same.pqm").read_bytes() == Path("full/a.pqm").read_bytes()

    too_small = pqmim("truncate", "full/a.pqm", "-o", "b.pqm", "--bytes", "5")
    smallest = smallest_size(Path("full/a.pqm").read_bytes())
    assert too_small.exit_code == 1
    assert too_small.stderr.endswith(f"no file of 5 bytes is possible; the smallest has {smallest}\n")
    itself = pqmim("truncate", "a.pqm", "-o", "a.pqm", "--bytes", "20", "-f")
    assert (itself.exit_code, itself.stderr) == (1, "pqmim: a.pqm: a.pqm is an input and is not overwritten\n")
