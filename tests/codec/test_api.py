"""The public names of the package, and the two functions that most people need."""

import inspect
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import synthetic_photo
from PIL import Image

import pqmim
import pqmim.errors


@pytest.fixture
def photo() -> Image.Image:
    y, x = np.mgrid[0:20, 0:37]
    return Image.fromarray(np.stack([6 * x, 9 * y, 3 * x + 4 * y], axis=-1).astype(np.uint8))


def test_all_is_sorted_and_complete() -> None:
    assert pqmim.__all__ == sorted(pqmim.__all__)
    errors = {name for name, value in vars(pqmim.errors).items() if inspect.isclass(value)}
    options = {"EncodeOptions", "Fill", "FillOptions", "Region", "Tune"}
    others = options | {"Codec", "__version__", "decode", "encode", "load_codec"}
    assert set(pqmim.__all__) == errors | others
    for name in pqmim.__all__:
        assert getattr(pqmim, name) is not None


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = pqmim.no_such_name


def test_importing_pqmim_imports_nothing_heavy() -> None:
    code = "import sys, pqmim; pqmim.encode; assert not {'torch', 'numpy', 'PIL', 'onnxruntime'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_package_is_typed() -> None:
    assert (Path(pqmim.__file__).parent / "py.typed").exists()


def test_encode_takes_images_of_all_kinds(photo: Image.Image, tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    photo.save(path)
    data = pqmim.encode(photo, model=tiny_model, device="cpu")
    for same in (path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), np.array(photo)):
        assert pqmim.encode(same, model=tiny_model, device="cpu") == data


def test_decode_returns_a_pillow_image(photo: Image.Image, tiny_model: Path) -> None:
    data = pqmim.encode(photo, quality=80, model=tiny_model)
    image = pqmim.decode(data, model=tiny_model)
    assert isinstance(image, Image.Image)
    assert (image.mode, image.size) == ("RGB", photo.size)
    photo.putalpha(128)
    with_alpha = pqmim.decode(pqmim.encode(photo, model=tiny_model), model=tiny_model)
    assert with_alpha.mode == "RGBA"
    assert set(with_alpha.getchannel("A").tobytes()) == {128}


def test_codec(photo: Image.Image, tiny_model: Path) -> None:
    codec = pqmim.load_codec(tiny_model, device="cpu")
    assert isinstance(codec, pqmim.Codec)
    data = codec.encode(photo, quality=33.3)
    assert data == pqmim.encode(photo, quality=33.3, model=tiny_model, device="cpu")
    tokens = codec.decode_tokens(data)
    assert tokens.shape == (8, 2, 3)
    np.testing.assert_array_equal(tokens, codec.encode_tokens(photo, quality=33.3))


def test_targets_and_options(photo: Image.Image, tiny_model: Path) -> None:
    assert len(pqmim.encode(photo, target_bytes=18, model=tiny_model)) <= 18
    assert len(pqmim.encode(photo, target_bpp=0.2, model=tiny_model)) <= 0.2 * 20 * 37 / 8
    strict = pqmim.EncodeOptions(strict=True)
    with pytest.raises(pqmim.TargetError, match="no file of 3 bytes is possible"):
        pqmim.encode(photo, target_bytes=3, options=strict, model=tiny_model)
    for arguments in ({"target_bytes": 0}, {"target_bpp": 0.0}, {"target_bpp": float("inf")}):
        with pytest.raises(ValueError, match="target_b"):
            pqmim.encode(photo, model=tiny_model, **arguments)
    with pytest.raises(ValueError, match="not both"):
        pqmim.encode(photo, target_bytes=100, target_bpp=0.1, model=tiny_model)

    regions = (pqmim.Region(0, 0, 16, 16, weight=4.0),)
    options = pqmim.EncodeOptions(effort=1, tune=pqmim.Tune.MS_SSIM, regions=regions, keep=0.5)
    partial = pqmim.encode(photo, options=options, model=tiny_model)
    fills = [pqmim.FillOptions(fill) for fill in pqmim.Fill]
    pictures = [pqmim.decode(partial, options=fill, model=tiny_model) for fill in fills]
    assert len({picture.tobytes() for picture in pictures}) == 3
    assert pqmim.decode(partial, model=tiny_model).tobytes() == pictures[0].tobytes()


def test_decode_wants_a_shipped_model_or_a_named_one(photo: Image.Image, tiny_model: Path) -> None:
    data = pqmim.encode(photo, model=tiny_model)
    with pytest.raises(pqmim.ModelMismatchError):
        pqmim.decode(data)
    with pytest.raises(pqmim.ModelError):
        pqmim.decode(data, model="no-such-model")


def test_decode_takes_files_of_all_kinds(photo: Image.Image, tiny_model: Path, tmp_path: Path) -> None:
    data = pqmim.encode(photo, model=tiny_model)
    path = tmp_path / "photo.pqm"
    path.write_bytes(data)
    right = pqmim.decode(data, model=tiny_model).tobytes()
    for same in (path, str(path), io.BytesIO(data), bytearray(data), memoryview(data)):
        assert pqmim.decode(same, model=tiny_model).tobytes() == right
    with path.open("rb") as file:
        assert pqmim.decode(file, model=tiny_model).tobytes() == right
    for missing in (tmp_path / "missing.pqm", tmp_path):
        with pytest.raises(pqmim.BitstreamError, match=r"No such file|Is a directory|Permission denied"):
            pqmim.decode(missing, model=tiny_model)


def test_encode_takes_what_behaves_like_bytes(photo: Image.Image, tiny_model: Path) -> None:
    file = io.BytesIO()
    photo.save(file, "PNG")
    right = pqmim.encode(photo, model=tiny_model)
    for same in (bytearray(file.getvalue()), memoryview(file.getvalue())):
        assert pqmim.encode(same, model=tiny_model) == right  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": None}, "image must be a path, bytes, a binary file, a Pillow image or an array, not NoneType"),
        ({"image": 5}, "image must be .*, not int"),
        ({"image": [[1, 2], [3, 4]]}, "image must be .*, not list"),
        ({"image": io.StringIO("x")}, "image must be .*, not a text file"),
        ({"quality": "high"}, "quality must be a number, not str"),
        ({"quality": None}, "quality must be a number, not NoneType"),
        ({"target_bytes": 100.5}, "target_bytes must be a whole number or None, not float"),
        ({"target_bpp": "0.1"}, "target_bpp must be a number or None, not str"),
        ({"options": {"effort": 1}}, "options must be EncodeOptions or None, not dict"),
        ({"options": pqmim.FillOptions()}, "options must be EncodeOptions or None, not FillOptions"),
        ({"model": None}, "model must be a name or a path, not NoneType"),
        ({"device": 0}, "device must be a string, not int"),
    ],
)
def test_wrong_types_are_named_by_encode(photo: Image.Image, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        pqmim.encode(**{"image": photo, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": None}, "data must be bytes, a path or a binary file, not NoneType"),
        ({"data": 5}, "data must be .*, not int"),
        ({"data": np.zeros(4)}, "data must be .*, not ndarray"),
        ({"data": io.StringIO("x")}, "data must be .*, not a text file"),
        ({"options": pqmim.EncodeOptions()}, "options must be FillOptions or None, not EncodeOptions"),
        ({"model": 5}, "model must be a name, a path or None, not int"),
        ({"device": None}, "device must be a string, not NoneType"),
    ],
)
def test_wrong_types_are_named_by_decode(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        pqmim.decode(**{"data": b"", **arguments})


def test_numbers_of_numpy_are_numbers(photo: Image.Image, tiny_model: Path) -> None:
    right = pqmim.encode(photo, quality=30, model=tiny_model)
    assert pqmim.encode(photo, quality=np.float32(30), model=tiny_model) == right  # type: ignore[arg-type]
    limited = pqmim.encode(photo, target_bytes=np.int64(20), model=tiny_model)  # type: ignore[arg-type]
    assert len(limited) <= 20


FORKS = """
import multiprocessing, sys, pqmim

def work(seed):
    data = pqmim.encode(bytes_of_a_picture, model=model)
    return pqmim.decode(data, model=model).size

model = sys.argv[1]
with open(sys.argv[2], "rb") as file:
    bytes_of_a_picture = file.read()
print(work(0))
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(*pool.map_async(work, range(4)).get(60))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_forks_of_a_process_that_has_coded_can_code(photo: Image.Image, tiny_model: Path, tmp_path: Path) -> None:
    photo.resize((200, 100)).save(tmp_path / "a.png")
    command = [sys.executable, "-c", FORKS, str(tiny_model), str(tmp_path / "a.png")]
    done = subprocess.run(command, check=True, timeout=120, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["(200, 100)", " ".join(4 * ["(200, 100)"])]


@pytest.mark.parametrize("quality", [-1, 100.5, float("nan")])
def test_quality_has_a_range(photo: Image.Image, tiny_model: Path, quality: float) -> None:
    with pytest.raises(ValueError, match="quality"):
        pqmim.encode(photo, quality=quality, model=tiny_model)


def test_decoders_by_name(tiny_model: Path) -> None:
    photo = synthetic_photo(64, 96)
    for_fast, for_fine = (pqmim.encode(photo, quality=80, model=tiny_model, decoder=name) for name in ("fast", "fine"))
    assert for_fine == pqmim.encode(photo, quality=80, model=tiny_model) != for_fast
    fine, fast, vivid = (pqmim.decode(for_fast, model=tiny_model, decoder=name) for name in ("fine", "fast", "vivid"))
    assert fine.tobytes() == pqmim.decode(for_fast, model=tiny_model).tobytes()
    assert len({image.tobytes() for image in (fine, fast, vivid)}) == 3
    for effort in (2, 3):
        options = pqmim.EncodeOptions(effort=effort)
        data = [pqmim.encode(photo, model=tiny_model, decoder=name, options=options) for name in ("fine", "vivid")]
        assert data[0] == data[1]  # what the decoder makes up is no error to correct
    faithful = pqmim.decode(for_fast, model=tiny_model, decoder=tiny_model / "vivid.safetensors", realism=0)
    assert faithful.tobytes() == fine.tobytes()
    with pytest.raises(TypeError, match="decoder must be a name, a path or None, not int"):
        pqmim.decode(for_fast, model=tiny_model, decoder=5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="realism must be a number or None, not str"):
        pqmim.decode(for_fast, model=tiny_model, realism="1")  # type: ignore[arg-type]
    with pytest.raises(pqmim.ModelError, match="the decoder fine has no realism to choose"):
        pqmim.decode(for_fast, model=tiny_model, realism=0.5)
