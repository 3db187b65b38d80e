"""Encode and Decode for batches: what Ray calls, without Ray."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pqmim.codec import Codec, load_codec
from pqmim.errors import ModelError
from pqmim.ray import Decode, Encode


@pytest.fixture(scope="module")
def codec(tiny_model: Path) -> Codec:
    return load_codec(tiny_model, device="cpu")


def batch_of(*files: bytes) -> dict[str, np.ndarray]:
    column = np.empty(len(files), object)
    column[:] = files
    return {"path": np.array([f"{index}" for index in range(len(files))], object), "bytes": column}


def test_files_are_those_of_encode_and_other_columns_stay(tiny_model: Path, photos: Path, codec: Codec) -> None:
    pictures = [(photos / name).read_bytes() for name in ("cat/a.png", "loose.png")]
    coded = Encode(tiny_model, quality=70)(batch_of(*pictures))
    assert list(coded["path"]) == ["0", "1"]
    assert list(coded["bytes"]) == [codec.encode(picture, quality=70) for picture in pictures]
    assert list(coded["width"]) == [40, 40]
    assert list(coded["height"]) == [24, 48]
    assert coded["bpp"][1] == 8 * len(coded["bytes"][1]) / (40 * 48)
    assert list(coded["error"]) == ["", ""]
    assert (coded["seconds"] > 0).all()


def test_bytes_that_end_in_zeros_keep_them(tiny_model: Path) -> None:
    result = Decode(tiny_model)(batch_of(b"\0\0"))
    assert result["bytes"].dtype == object


def test_pictures_are_those_of_decode(tiny_model: Path, photos: Path, codec: Codec, tmp_path: Path) -> None:
    data = codec.encode(photos / "cat/a.png")
    decoded = Decode(tiny_model)(batch_of(data))
    (tmp_path / "a.png").write_bytes(decoded["bytes"][0])
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.asarray(image), np.asarray(codec.decode(data)))
    assert decoded["bpp"][0] == 8 * len(data) / (40 * 24)


def test_what_cannot_be_coded_has_an_error_and_no_bytes(tiny_model: Path, photos: Path) -> None:
    good = (photos / "loose.png").read_bytes()
    coded = Encode(tiny_model)(batch_of(b"no picture", good))
    assert coded["error"][0] == "not an image that Pillow can read"
    assert coded["bytes"][0] == b""
    assert (coded["width"][0], coded["bpp"][0]) == (0, 0.0)
    assert coded["error"][1] == ""
    assert coded["bytes"][1]
    decoded = Decode(tiny_model)(batch_of(good))
    assert "not a .pqm file" in decoded["error"][0]


def test_a_model_that_is_not_there_is_told_at_once() -> None:
    with pytest.raises(ModelError):
        Encode("no such model")
    with pytest.raises(ModelError):
        Decode("no such model")


def test_decoders_are_named(tiny_model: Path, photos: Path) -> None:
    picture = (photos / "cat/a.png").read_bytes()
    (coded,) = Encode(tiny_model, decoder="fast", quality=90)(batch_of(picture))["bytes"]
    fast, vivid = load_codec(tiny_model, "fast", device="cpu"), load_codec(tiny_model, "vivid", realism=0.5)
    assert coded == fast.encode(picture, quality=90)
    (decoded,) = Decode(tiny_model, decoder="vivid", realism=0.5)(batch_of(coded))["bytes"]
    with Image.open(io.BytesIO(decoded)) as image:
        assert image.tobytes() == vivid.decode(coded).tobytes()
    with pytest.raises(ModelError, match="no such decoder"):
        Decode(tiny_model, decoder="slow")
