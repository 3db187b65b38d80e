"""Pictures that decoding writes: their formats, by suffix or by option, and what they say of themselves."""

from pathlib import Path

import numpy as np
import pytest
from cli_tools import Pqmim, files_below, opened, photo, pixels
from PIL import Image, features

from pqmim.cli import pictures
from pqmim.cli.pictures import PictureFormat, PictureWriter
from pqmim.errors import OutputError

pytest_plugins = ["cli_fixtures"]

FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "JPG": "JPEG", "webp": "WEBP", "avif": "AVIF"}
IMAGE_DESCRIPTION = 0x010E


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((first.astype(float) - second) ** 2)))


@pytest.fixture(autouse=True)
def _needs_avif() -> None:
    if not features.check("avif"):
        pytest.skip("this Pillow writes no AVIF")


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_suffix_of_an_output_says_what_is_in_it(pqmim: Pqmim, suffix: str) -> None:
    photo("a.png", (96, 64))
    assert pqmim("encode", "a.png", "-q", "90").exit_code == 0
    assert pqmim("decode", "a.pqm", "-o", "right.png").exit_code == 0
    result = pqmim("decode", "a.pqm", "-o", f"b.{suffix}")
    assert (result.exit_code, result.stderr) == (0, "")
    image = opened(f"b.{suffix}")
    assert (image.format, image.mode, image.size) == (FORMATS[suffix], "RGB", (96, 64))
    if image.format == "PNG":
        np.testing.assert_array_equal(pixels(f"b.{suffix}"), pixels("right.png"))
    else:
        first, second = (np.asarray(opened(name).convert("L")) for name in (f"b.{suffix}", "right.png"))
        assert psnr(first, second) > 35


@pytest.mark.parametrize("name", ["b.heic", "b.jxl", "b.tif", "b.gif", "b.pqm", "b.npy", "b.html", "b.xyz", "b.2024"])
def test_no_other_format_is_written_under_its_name(pqmim: Pqmim, name: str) -> None:
    photo("a.png")
    assert pqmim("encode", "a.png").exit_code == 0
    result = pqmim("decode", "a.pqm", "-o", name)
    assert (result.exit_code, files_below(".")) == (2, ["a.png", "a.pqm"])
    assert f"{name}: this command writes .png, .jpg, .webp, .avif, .jpeg files" in result.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("encode", "a.png", "-o", "b.heic"),
        ("encode", "a.png", "-o", "b.jxl"),
        ("encode", "a.png", "-o", "b.dng"),
        ("encode", "a.png", "-o", "b.npy"),
        ("tokens", "a.png", "-o", "b.png"),
        ("truncate", "a.pqm", "-o", "b.jpg", "--bytes", "20"),
        ("inpaint", "a.png", "--mask", "a.png", "-o", "b.jpg"),
        ("inpaint", "a.png", "--mask", "a.png", "-o", "b.heic"),
        ("gallery", "a.png", "-o", "b.png"),
    ],
)
def test_no_command_writes_under_the_name_of_another_kind(pqmim: Pqmim, command: tuple[str, ...]) -> None:
    photo("a.png")
    assert pqmim("encode", "a.png").exit_code == 0
    result = pqmim(*command)
    assert (result.exit_code, files_below(".")) == (2, ["a.png", "a.pqm"])
    assert f"{command[command.index('-o') + 1]}: this command writes " in result.stderr


def test_format_option(pqmim: Pqmim) -> None:
    for name in ("in/a.png", "in/b.png"):
        photo(name)
    assert pqmim("encode", "in", "-o", "coded").exit_code == 0
    assert pqmim("decode", "coded", "-o", "out", "--format", "webp").exit_code == 0
    assert files_below("out") == ["a.webp", "b.webp"]
    assert {opened(f"out/{name}.webp").format for name in "ab"} == {"WEBP"}
    piped = pqmim("decode", "coded/a.pqm", "-o", "-", "--format", "jpg")
    assert piped.stdout_bytes.startswith(b"\xff\xd8\xff")
    refused = pqmim("decode", "coded/a.pqm", "-o", "a.jpg", "--format", "png")
    assert refused.exit_code == 2
    assert "a.jpg is no name for png" in refused.stderr
    several = pqmim("decode", "coded", "-o", "all.jpg")
    assert several.exit_code == 2
    assert "all.jpg is the name of one file" in several.stderr


def test_quality_is_of_lossy_formats(pqmim: Pqmim) -> None:
    photo("a.png", (96, 96))
    assert pqmim("encode", "a.png").exit_code == 0
    for suffix in ("jpg", "webp", "avif"):
        sizes = []
        for quality in ("10", "50", "100"):
            assert pqmim("decode", "a.pqm", "-o", f"b.{suffix}", "-f", "--quality", quality).exit_code == 0
            sizes.append(Path(f"b.{suffix}").stat().st_size)
        assert sizes == sorted(set(sizes)), suffix
    for arguments in (["--quality", "50"], ["-o", "b.png", "--quality", "50"], ["-o", "b.jpg", "--quality", "101"]):
        assert pqmim("decode", "a.pqm", *arguments).exit_code == 2


def test_alpha_is_kept_or_laid_over_white(pqmim: Pqmim) -> None:
    image = Image.new("RGBA", (64, 64), (200, 30, 30, 255))
    image.paste((0, 0, 0, 0), (0, 0, 32, 64))
    image.save("a.png")
    assert pqmim("encode", "a.png", "-q", "90").exit_code == 0
    for suffix in ("webp", "avif"):
        result = pqmim("decode", "a.pqm", "-o", f"b.{suffix}")
        assert (result.stderr, opened(f"b.{suffix}").mode) == ("", "RGBA")
        assert pixels(f"b.{suffix}")[:, :24, 3].max() == 0
    result = pqmim("decode", "a.pqm", "-o", "b.jpg")
    assert result.exit_code == 0
    assert result.stderr == "pqmim: a.pqm: warning: JPEG has no alpha channel: the picture is laid over white\n"
    flat = pixels("b.jpg")
    assert flat.shape == (64, 64, 3)
    assert flat[:, :24].min() > 250
    assert flat[:, 40:, 1].max() < 150


@pytest.mark.parametrize("suffix", ["jpg", "webp", "avif"])
def test_what_was_invented_is_said_in_every_format(pqmim: Pqmim, suffix: str) -> None:
    photo("a.png", (96, 96))
    assert pqmim("encode", "a.png", "--keep", "0.4").exit_code == 0
    assert pqmim("decode", "a.pqm", "-o", f"b.{suffix}").exit_code == 0
    description = opened(f"b.{suffix}").getexif()[IMAGE_DESCRIPTION]
    assert description.startswith("pqmim: ")
    assert description.endswith(" of the tokens were not in the file and were filled (likely)")
    assert pqmim("encode", "a.png", "-o", "whole.pqm").exit_code == 0
    assert pqmim("decode", "whole.pqm", "-o", f"c.{suffix}").exit_code == 0
    assert IMAGE_DESCRIPTION not in opened(f"c.{suffix}").getexif()


def test_what_a_format_cannot_hold_is_one_line() -> None:
    with pytest.raises(OutputError, match="cannot be written as webp: "):
        PictureWriter(PictureFormat.WEBP).file(Image.new("RGB", (16_384, 1)))


def test_formats_that_pillow_was_built_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(Image.SAVE, "AVIF")
    with pytest.raises(OutputError, match="cannot be written as avif: this Pillow writes no avif"):
        pictures.PictureWriter(PictureFormat.AVIF).file(Image.new("RGB", (16, 16)))
