"""Commands and decoders: which one makes the picture, whose picture is corrected, and what the picture says of it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_tools import ONE_LINE_ERROR, Pqmim, photo
from pictures import synthetic_photo
from PIL import Image

from pqmim.decoder_files import load_decoder

pytest_plugins = ["cli_fixtures"]


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def comment(path: str) -> str | None:
    with Image.open(path) as image:
        return image.info.get("Comment")  # type: ignore[no-any-return]


@pytest.fixture
def coded(pqmim: Pqmim) -> str:
    Image.fromarray(synthetic_photo(64, 96)).save("a.png")
    assert pqmim("encode", "a.png", "-q", "90").exit_code == 0
    return "a.pqm"


def test_decode_with_each_decoder(pqmim: Pqmim, coded: str, tiny_model: Path) -> None:
    for name in ("fast", "fine"):
        assert pqmim("decode", coded, "-o", f"{name}.png", "--decoder", name).exit_code == 0
        assert comment(f"{name}.png") is None
    by_path = pqmim("decode", coded, "-o", "path.png", "--decoder", str(tiny_model / "fast.safetensors"), "--json")
    assert json.loads(by_path.stdout)["decoder"] == "fast"
    assert json.loads(by_path.stdout)["realism"] is None
    assert pqmim("decode", coded, "-o", "default.png").exit_code == 0
    assert np.array_equal(pixels("default.png"), pixels("fine.png"))
    assert np.array_equal(pixels("path.png"), pixels("fast.png"))
    assert not np.array_equal(pixels("fine.png"), pixels("fast.png"))


def test_encode_for_a_decoder(pqmim: Pqmim, coded: str) -> None:
    for name in ("fast", "fine"):
        assert pqmim("encode", "a.png", "-o", f"{name}.pqm", "-q", "90", "--for", name).exit_code == 0
        assert pqmim("encode", "a.png", "-o", f"{name}1.pqm", "--effort", "1", "--for", name).exit_code == 0
        assert pqmim("tokens", "a.png", "-o", f"{name}.npy", "-q", "90", "--for", name).exit_code == 0
        assert pqmim("tokens", f"{name}.pqm", "-o", f"{name}-sent.npy").exit_code == 0
        assert np.array_equal(np.load(f"{name}.npy"), np.load(f"{name}-sent.npy"))
        assert pqmim("decode", f"{name}.pqm", "-o", f"{name}.png", "--decoder", "fast").exit_code == 0
    assert Path("fine.pqm").read_bytes() == Path(coded).read_bytes() != Path("fast.pqm").read_bytes()
    assert Path("fine1.pqm").read_bytes() == Path("fast1.pqm").read_bytes()


def test_pictures_with_synthesised_detail_say_so(pqmim: Pqmim, coded: str, tiny_model: Path) -> None:
    decoder = f"vivid ({load_decoder(tiny_model / 'vivid.safetensors').decoder_id.hex()})"
    result = pqmim("decode", coded, "-o", "b.png", "--decoder", "vivid", "--json")
    assert (json.loads(result.stdout)["decoder"], json.loads(result.stdout)["realism"]) == ("vivid", 1)
    assert comment("b.png") == f"pqmim: detail was synthesised by the decoder {decoder}, realism 1"
    assert pqmim("decode", coded, "-o", "half.png", "--decoder", "vivid", "--realism", "0.5").exit_code == 0
    assert comment("half.png") == f"pqmim: detail was synthesised by the decoder {decoder}, realism 0.5"
    assert pqmim("decode", coded, "-o", "none.png", "--decoder", "vivid", "--realism", "0").exit_code == 0
    assert comment("none.png") is None
    assert pqmim("decode", coded, "-o", "fine.png").exit_code == 0
    assert np.array_equal(pixels("none.png"), pixels("fine.png"))

    assert pqmim("truncate", coded, "-o", "cut.pqm", "--bytes", "30").exit_code == 0
    assert pqmim("decode", "cut.pqm", "--decoder", "vivid").exit_code == 0
    said = comment("cut.png")
    assert said is not None
    assert said.startswith("pqmim: ")
    assert f"were filled (likely); detail was synthesised by the decoder {decoder}, realism 1" in said
    with Image.open("b.png") as image:
        image.save("b.jpg")
    assert pqmim("decode", coded, "-o", "b.jpg", "-f", "--decoder", "vivid").exit_code == 0
    with Image.open("b.jpg") as image:
        assert "synthesised" in image.getexif()[0x010E]


def test_drawn_pictures_say_so_too(pqmim: Pqmim, coded: str) -> None:
    assert pqmim("generate", "-o", "out", "--size", "32x32", "--decoder", "vivid").exit_code == 0
    assert pqmim("inpaint", "a.png", "--mask", "a.png", "-o", "b.png", "--decoder", "vivid").exit_code == 0
    assert pqmim("decode", coded, "-o", "c.png", "--progress-dir", "steps", "--decoder", "vivid").exit_code == 0
    for path in ("out/00.png", "b.png", "steps/c.step01.png"):
        assert "; detail was synthesised by the decoder vivid (" in (comment(path) or ""), path
    assert pqmim("generate", "-o", "fine", "--size", "32x32").exit_code == 0
    assert "synthesised" not in (comment("fine/00.png") or "")
    page = pqmim("gallery", "a.png", "-o", "a.html", "--keeps", "1", "--decoder", "fast")
    assert page.exit_code == 0, page.stderr


def test_preview_with_a_decoder(pqmim: Pqmim, coded: str, tiny_model: Path) -> None:
    urls = []
    for decoder in ("fast", "vivid"):
        result = pqmim("preview", "a.png", "--data-url", "--json", "-f", "--decoder", decoder, "-m", str(tiny_model))
        urls.append(json.loads(result.stdout)["data_url"])
    assert urls[0] != urls[1]


def test_info_names_the_decoders_that_are_there(pqmim: Pqmim) -> None:
    photo("a.png", (16, 16))
    assert pqmim("encode", "a.png", has_model=False).exit_code == 0
    assert "decoders fast, fine, vivid" in pqmim("info", "a.pqm", has_model=False).stdout
    assert json.loads(pqmim("info", "a.pqm", "--json", has_model=False).stdout)["decoders"] == ["fast", "fine", "vivid"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--decoder", "slow"), "slow: no such decoder (tiny has fast, fine, vivid; or a path to a decoder's file)"),
        (("--realism", "0.5"), "the decoder fine has no realism to choose"),
        (("--decoder", "model"), "this is a token model, not a decoder"),
        (("--decoder", "shipped"), "the decoder fine is for the token model"),
        (("-m", "small"), "small: no model any more, but a decoder"),
        (("-m", "base"), "base the decoder fine; name it as decoder (--decoder)"),
    ],
)
def test_what_cannot_be_decoded_with(
    pqmim: Pqmim, coded: str, tiny_model: Path, arguments: tuple[str, ...], message: str
) -> None:
    from pqmim.model_files import find_model

    shutil.copy(tiny_model / "model.safetensors", "model")
    shutil.copy(find_model("photo").parent / "fine.safetensors", "shipped")
    result = pqmim("decode", coded, "-o", "b.png", *arguments)
    assert result.exit_code == 1
    assert ONE_LINE_ERROR.fullmatch(result.stderr), result.stderr
    assert message in result.stderr
    assert not Path("b.png").exists()


@pytest.mark.parametrize("realism", ["-0.1", "1.5", "much"])
def test_realism_out_of_range_is_wrong_usage(pqmim: Pqmim, coded: str, realism: str) -> None:
    assert pqmim("decode", coded, "-o", "b.png", "--decoder", "vivid", "--realism", realism).exit_code == 2


def test_a_decoder_is_an_input_that_is_never_overwritten(pqmim: Pqmim, coded: str, tiny_model: Path) -> None:
    shutil.copy(tiny_model / "fine.safetensors", "mine.png")
    result = pqmim("decode", coded, "-o", "mine.png", "-f", "--decoder", "mine.png")
    assert result.exit_code == 1
    assert load_decoder(Path("mine.png")).name == "fine"


def test_encode_refuses_a_decoder_that_is_not_there(pqmim: Pqmim) -> None:
    photo("a.png", (16, 16))
    result = pqmim("encode", "a.png", "--for", "slow")
    assert result.exit_code == 1
    assert "slow: no such decoder" in result.stderr
