"""Previews: within their bytes, of the right shape and color, with alpha where there is room."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pictures import synthetic_photo
from PIL import Image

import pqmim
from pqmim import preview
from pqmim.bitstream import MINI_MAGIC, at_coded_size, pack, parse
from pqmim.image_io import decode_alpha


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(synthetic_photo(200, 300))


@pytest.fixture
def cutout(picture: Image.Image) -> Image.Image:
    """A disk with a soft edge."""
    y, x = np.mgrid[-1:1:200j, -1:1:300j]
    picture.putalpha(Image.fromarray(np.clip(900 - 1000 * np.hypot(x, y), 0, 255).astype(np.uint8)))
    return picture


@pytest.mark.parametrize("max_bytes", [12, 30, 60, 200, 2000])
def test_previews_are_small_files(picture: Image.Image, tiny_model: Path, max_bytes: int) -> None:
    data = preview.encode(picture, max_bytes, model=tiny_model)
    assert len(data) <= max_bytes
    container = parse(data)
    assert container.scale == 1
    assert max(container.width, container.height) <= 300
    decoded = preview.decode(data, model=tiny_model)
    assert (decoded.mode, decoded.width) == ("RGB", 96)
    assert decoded.height == pytest.approx(64, abs=1)
    assert data == preview.encode(np.asarray(picture), max_bytes, model=tiny_model)


def test_more_bytes_show_more(picture: Image.Image, tiny_model: Path) -> None:
    wanted = np.asarray(picture.resize((96, 64), Image.Resampling.LANCZOS), float)
    errors = []
    for max_bytes in (14, 40, 200):
        data = preview.encode(picture, max_bytes, model=tiny_model)
        shown = preview.decode(data, model=tiny_model).resize((96, 64))
        errors.append(np.square(wanted - shown).mean())
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.7 * errors[0]


def test_what_a_preview_is_made_of(picture: Image.Image, tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    picture.save(path)
    codec = pqmim.load_codec(tiny_model, threads=1)
    data = preview.encode(path, 60, model=codec)
    assert data.startswith(MINI_MAGIC)
    assert data == preview.encode(path.read_bytes(), 60, model=str(tiny_model))
    assert preview.decode(data, model=codec).tobytes() == preview.decode(data, model=tiny_model).tobytes()


@pytest.mark.parametrize(
    ("size", "expected"), [((300, 200), (96, 64)), ((90, 180), (48, 96)), ((1, 1), (96, 96)), ((960, 80), (96, 8))]
)
def test_shapes(tiny_model: Path, size: tuple[int, int], expected: tuple[int, int]) -> None:
    data = preview.encode(Image.new("RGB", size, (30, 60, 90)), 100, model=tiny_model)
    assert preview.decode(data, model=tiny_model).size == expected
    assert preview.aspect_ratio(data) == pytest.approx(expected[0] / expected[1], rel=0.03)
    assert max(parse(data).width, parse(data).height) <= max(size)


def test_average_color(tiny_model: Path, picture: Image.Image) -> None:
    data = preview.encode(picture, 200, model=tiny_model)
    decoded = np.asarray(preview.decode(data, 300, model=tiny_model), float).mean((0, 1))
    color = preview.average_color(data, model=tiny_model)
    assert color == pytest.approx(tuple(decoded), abs=2)
    assert color == pytest.approx(tuple(np.asarray(picture, float).mean((0, 1))), abs=25)


def test_aspect_ratio_needs_no_model(picture: Image.Image, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = preview.encode(picture, 60, model=tiny_model)
    monkeypatch.setattr(preview, "decoding_codec", None)  # cannot be called
    assert preview.aspect_ratio(data) == pytest.approx(1.5, rel=0.02)


@pytest.mark.parametrize("kind", ["webp", "png"])
def test_data_urls(picture: Image.Image, tiny_model: Path, kind: str) -> None:
    data = preview.encode(picture, 60, model=tiny_model)
    url = preview.to_data_url(data, 48, kind, model=tiny_model)  # type: ignore[arg-type]
    start, _, content = url.partition(",")
    assert start == f"data:image/{kind};base64"
    with Image.open(io.BytesIO(base64.b64decode(content, validate=True))) as image:
        assert (image.format, image.size) == (kind.upper(), (48, 32))
        error = np.asarray(image.convert("RGB"), int) - np.asarray(preview.decode(data, 48, model=tiny_model))
    assert np.abs(error).mean() < (8 if kind == "webp" else 1e-9)
    assert max(Image.open(io.BytesIO(base64.b64decode(content))).size) == 48


@pytest.mark.parametrize("max_bytes", [150, 300, 1000])
def test_alpha(cutout: Image.Image, tiny_model: Path, max_bytes: int) -> None:
    data = preview.encode(cutout, max_bytes, model=tiny_model)
    assert len(data) <= max_bytes
    container = parse(data)
    assert container.alpha is not None
    alpha = decode_alpha(container.alpha, container.width, container.height)
    wanted = np.asarray(cutout.getchannel("A").resize((container.width, container.height)), float)
    assert np.abs(alpha - wanted).mean() < 30
    decoded = preview.decode(data, 300, model=tiny_model)
    assert (decoded.mode, decoded.size[0]) == ("RGBA", 300)
    shown = np.asarray(decoded.getchannel("A"))
    assert shown[len(shown) // 2, 150] > 200
    assert shown[2, 2] < 60


def test_alpha_that_says_nothing_takes_no_bytes(picture: Image.Image, tiny_model: Path) -> None:
    right = preview.encode(picture, 60, model=tiny_model)
    picture.putalpha(255)
    data = preview.encode(picture, 60, model=tiny_model)
    assert data == right
    picture.putalpha(128)
    decoded = preview.decode(preview.encode(picture, 60, model=tiny_model), model=tiny_model)
    assert set(decoded.getchannel("A").tobytes()) == {128}


def test_no_room_for_alpha(cutout: Image.Image, tiny_model: Path) -> None:
    with pytest.warns(UserWarning, match="40 bytes have no room for alpha"):
        white = preview.encode(cutout, 40, model=tiny_model)
    assert parse(white).alpha is None
    with pytest.warns(UserWarning, match="background"):
        black = preview.encode(cutout, 40, model=tiny_model, background=(0, 0, 0))
    colors = [preview.average_color(data, model=tiny_model) for data in (white, black)]
    assert min(np.subtract(*colors)) > 40


def test_the_average_color_is_that_of_what_is_visible(tiny_model: Path) -> None:
    pixels = np.zeros((64, 96, 4), np.uint8)
    pixels[:, :48] = (200, 40, 40, 255)
    pixels[:, 48:] = (0, 255, 0, 0)
    data = preview.encode(Image.fromarray(pixels), 300, model=tiny_model)
    assert preview.average_color(data, model=tiny_model) == pytest.approx((200, 40, 40), abs=30)


def test_any_file_can_be_shown_small(tiny_model: Path) -> None:
    photo = Image.fromarray(synthetic_photo(90, 130))
    photo.putalpha(Image.linear_gradient("L").resize(photo.size))
    codec = pqmim.load_codec(tiny_model)
    for options in (pqmim.EncodeOptions(), pqmim.EncodeOptions(scale=4), pqmim.EncodeOptions(keep=0.5)):
        data = codec.encode(photo, options=options)
        small = preview.decode(data, 30, model=codec)
        assert (small.mode, small.size) == ("RGBA", (30, 21))
        right = np.asarray(codec.decode(data).resize((30, 21), Image.Resampling.LANCZOS), int)
        assert np.abs(right - np.asarray(small, int)).mean() < 8


def test_the_coded_picture_has_the_same_tokens(tiny_model: Path) -> None:
    codec = pqmim.load_codec(tiny_model)
    photo = Image.fromarray(synthetic_photo(90, 130))
    photo.putalpha(9)
    data = codec.encode(photo, options=pqmim.EncodeOptions(scale=2))
    small = at_coded_size(parse(data))
    assert (small.width, small.height, small.scale, small.alpha) == (65, 45, 1, None)
    np.testing.assert_array_equal(codec.decode_tokens(pack(small)), codec.decode_tokens(data))


def test_errors(picture: Image.Image, tiny_model: Path) -> None:
    data = preview.encode(picture, 60, model=tiny_model)
    with pytest.raises(pqmim.TargetError, match="no file of 8 bytes is possible; the smallest has 9"):
        preview.encode(picture, 8, model=tiny_model)
    with pytest.raises(ValueError, match="max_bytes must be at least 1, not 0"):
        preview.encode(picture, 0, model=tiny_model)
    with pytest.raises(ValueError, match="max_side must be at least 1, not 0"):
        preview.decode(data, 0, model=tiny_model)
    with pytest.raises(ValueError, match="format must be webp or png, not 'gif'"):
        preview.to_data_url(data, format="gif", model=tiny_model)  # type: ignore[arg-type]
    with pytest.raises(pqmim.ImageError):
        preview.encode(b"no image", model=tiny_model)
    with pytest.raises(pqmim.ModelError):
        preview.encode(picture, model="no-such-model")
    with pytest.raises(pqmim.ModelMismatchError):
        preview.decode(data)
    with pytest.raises(pqmim.DamagedFileError):
        preview.aspect_ratio(data[:-1])
    huge = pack(replace(parse(data), width=1 << 20, height=1 << 20))
    with pytest.raises(pqmim.LimitError):
        preview.decode(huge, model=tiny_model)


def test_previews_with_a_decoder(picture: Image.Image, tiny_model: Path) -> None:
    data = preview.encode(picture, 120, model=tiny_model, decoder="fast")
    assert data == preview.encode(picture, 120, model=pqmim.load_codec(tiny_model, "fast", device="cpu", threads=1))
    fast, fine = (preview.decode(data, model=tiny_model, decoder=name) for name in ("fast", "fine"))
    assert fast.tobytes() != fine.tobytes() == preview.decode(data, model=tiny_model).tobytes()
    urls = {preview.to_data_url(data, model=tiny_model, decoder=name) for name in ("fast", "vivid")}
    assert len(urls) == 2
    assert preview.average_color(data, model=tiny_model, decoder="fast") != preview.average_color(
        data, model=tiny_model, decoder="vivid"
    )
