"""The Pillow plugin: what Pillow's users do with a format."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from pictures import synthetic_photo
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

import pqmim
from pqmim.bitstream import MAGIC, MINI_MAGIC, pack, parse

TABLES = ("OPEN", "SAVE", "EXTENSION", "MIME")


@pytest.fixture(scope="module")
def plugin(tiny_model: Path) -> Iterator[ModuleType]:
    """The plugin, which decodes with the tiny model; other tests see a Pillow without it."""
    Image.init()
    names, tables = list(Image.ID), {name: dict(getattr(Image, name)) for name in TABLES}
    module = importlib.import_module("pqmim.pillow")
    module.DECODE_MODEL = tiny_model
    yield module
    Image.ID[:] = names
    for name, table in tables.items():
        getattr(Image, name).clear()
        getattr(Image, name).update(table)
    del sys.modules["pqmim.pillow"]


@pytest.fixture
def data(tiny_model: Path) -> bytes:
    """A file in the full form."""
    coded = pqmim.encode(synthetic_photo(400, 560), quality=100, model=tiny_model)
    assert coded.startswith(MAGIC)
    return coded


def saved(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "PQM", **options)
    return file.getvalue()


def test_the_format_is_registered(plugin: ModuleType) -> None:
    Image.init()
    assert Image.registered_extensions()[".pqm"] == "PQM"
    assert Image.MIME["PQM"] == "image/x-pqm"
    assert Image.OPEN["PQM"][0] is plugin.PqmImageFile


def test_opening_reads_the_header_only(plugin: ModuleType, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "decoding_codec", None)  # cannot be called
    image = Image.open(io.BytesIO(data))
    assert (image.size, image.mode, image.format) == ((560, 400), "RGB", "PQM")
    assert image.get_format_mimetype() == "image/x-pqm"
    image.verify()


def test_pixels_are_those_of_decode(plugin: ModuleType, data: bytes, tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "photo.pqm"
    path.write_bytes(data)
    right = pqmim.decode(data, model=tiny_model)
    with Image.open(path) as image:
        assert image.tobytes() == right.tobytes()
        assert image.info == {"invented_share": 0.0}
        assert image.fp is None  # closed, as after loading any picture of one frame
    image = Image.open(io.BytesIO(data))
    image.putpixel((0, 0), (1, 2, 3))
    assert image.getpixel((0, 0)) == (1, 2, 3)
    assert image.getpixel((9, 9)) == right.getpixel((9, 9))


def test_saving(plugin: ModuleType, tiny_model: Path, tmp_path: Path) -> None:
    photo = Image.fromarray(synthetic_photo(45, 70))
    path = tmp_path / "photo.pqm"
    photo.save(path, quality=80, effort=1, model=tiny_model)
    options = pqmim.EncodeOptions(effort=1)
    assert path.read_bytes() == pqmim.encode(photo, quality=80, options=options, model=tiny_model)
    small = saved(photo, target_bytes=40, model=str(tiny_model))
    assert small == pqmim.encode(photo, target_bytes=40, model=tiny_model)
    assert len(small) <= 40
    assert len(saved(photo, target_bpp=0.1, model=tiny_model)) <= 0.1 * 45 * 70 / 8
    assert parse(saved(photo, scale=4, model=tiny_model)).scale == 4
    assert saved(photo, model=tiny_model, dpi=(72, 72)) == pqmim.encode(photo, model=tiny_model)


def test_errors_of_saving(plugin: ModuleType, tiny_model: Path, tmp_path: Path) -> None:
    photo = Image.fromarray(synthetic_photo(20, 20))
    path = tmp_path / "photo.pqm"
    with pytest.raises(OSError, match="no such model"):
        photo.save(path, model="no-such-model")
    with pytest.raises(OSError, match="no file of 3 bytes is possible"):
        photo.save(path, target_bytes=3, strict=True, model=tiny_model)
    with pytest.raises(ValueError, match="quality"):
        photo.save(path, quality=101, model=tiny_model)
    with pytest.raises(ValueError, match="effort"):
        photo.save(path, effort=9, model=tiny_model)
    with pytest.raises(TypeError, match="quality must be a number"):
        photo.save(path, quality="keep", model=tiny_model)
    assert not path.exists()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("1", "RGB"), ("L", "RGB"), ("LA", "RGBA"), ("P", "RGB"), ("RGBA", "RGBA"), ("CMYK", "RGB"), ("I;16", "RGB")],
)
def test_modes(plugin: ModuleType, tiny_model: Path, mode: str, expected: str) -> None:
    photo = Image.fromarray(synthetic_photo(20, 30))
    if mode == "I;16":
        photo = Image.fromarray((np.asarray(photo.convert("L")) * np.uint16(257)).astype(np.uint16))
    elif mode.endswith("A"):
        photo.putalpha(Image.linear_gradient("L").resize(photo.size))
    photo = photo.convert(mode)
    image = Image.open(io.BytesIO(saved(photo, model=tiny_model)))
    assert image.mode == expected
    image.load()
    assert (image.mode, image.size) == (expected, (30, 20))
    if expected == "RGBA":
        assert image.getchannel("A").tobytes() == photo.getchannel("A").tobytes()


def test_orientation_is_applied_when_saving(plugin: ModuleType, tiny_model: Path) -> None:
    photo = Image.fromarray(synthetic_photo(20, 30))
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(file, "JPEG", exif=exif)
    image = Image.open(io.BytesIO(saved(Image.open(file), model=tiny_model)))
    assert image.size == (20, 30)
    assert ImageOps.exif_transpose(image).size == (20, 30)


@pytest.mark.parametrize("length", [0, 1, 2, 4, 9, 12])
def test_what_ends_in_the_header_is_not_identified(plugin: ModuleType, data: bytes, length: int) -> None:
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(data[:length]))


def test_a_truncated_file(plugin: ModuleType, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = data[: len(data) // 2]
    image = Image.open(io.BytesIO(cut))
    assert image.size == (560, 400)
    with pytest.raises(OSError, match="truncated"):
        image.load()
    with pytest.raises(OSError, match="checksum mismatch"):
        Image.open(io.BytesIO(cut)).verify()
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    image.load()
    assert 0.1 < image.info["invented_share"] < 0.9


def test_the_short_magic_alone_is_not_enough(
    plugin: ModuleType, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mini = pqmim.encode(synthetic_photo(32, 48), model=tiny_model)
    assert mini.startswith(MINI_MAGIC)
    assert Image.open(io.BytesIO(mini)).size == (48, 32)
    for broken in (mini[:-1], mini[:2] + b"\xff" + mini[3:], MINI_MAGIC + bytes(100)):
        with pytest.raises(UnidentifiedImageError):
            Image.open(io.BytesIO(broken))
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    image = Image.open(io.BytesIO(mini[:-3]))
    image.load()
    assert image.size == (48, 32)


def test_foreign_files(plugin: ModuleType, data: bytes) -> None:
    for foreign in (b"", b"text", b"\x8dPNG\r\n\x1a\n", bytes(1000)):
        with pytest.raises(UnidentifiedImageError):
            Image.open(io.BytesIO(foreign))
    with pytest.raises(OSError, match="format version 9"):  # ours, and the message says what is wrong
        Image.open(io.BytesIO(data[:4] + b"\x90" + data[5:]))
    for suffix in ("PNG", "JPEG", "WEBP", "TIFF", "BMP"):
        file = io.BytesIO()
        Image.fromarray(synthetic_photo(8, 8)).save(file, suffix)
        assert Image.open(file).format == suffix


def test_without_the_model(plugin: ModuleType, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "DECODE_MODEL", None)
    image = Image.open(io.BytesIO(data))
    with pytest.raises(OSError, match="not a shipped one"):
        image.load()


def test_pillows_limit_on_pixels(plugin: ModuleType, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(data))


def test_drafts_are_the_coded_picture(plugin: ModuleType, tiny_model: Path) -> None:
    photo = Image.fromarray(synthetic_photo(90, 130))
    coded = saved(photo, scale=4, model=tiny_model)
    image = Image.open(io.BytesIO(coded))
    assert image.draft(None, (34, 10)) is None
    assert image.size == (130, 90)
    assert image.draft(None, (20, 10)) == ("RGB", (0, 0, 33, 23))
    assert image.size == (33, 23)
    image.load()
    assert image.size == image.im.size == (33, 23)
    whole = Image.open(io.BytesIO(coded))
    error = np.asarray(whole.resize((33, 23))).astype(int) - np.asarray(image)
    assert np.abs(error).mean() < 6
    thumbnail = Image.open(io.BytesIO(coded))
    thumbnail.thumbnail((16, 16))
    assert thumbnail.size == (16, 11)
    # Nothing is cheaper in a file of full size, or with alpha.
    assert Image.open(io.BytesIO(saved(photo, model=tiny_model))).draft(None, (4, 4)) is None
    photo.putalpha(7)
    assert Image.open(io.BytesIO(saved(photo, scale=4, model=tiny_model))).draft(None, (4, 4)) is None


def test_thumbnails_of_a_file_of_full_size(plugin: ModuleType, data: bytes) -> None:
    image = Image.open(io.BytesIO(data))
    image.thumbnail((50, 50))
    assert image.size == (50, 36)


def test_partial_files_say_what_was_invented(plugin: ModuleType, data: bytes) -> None:
    partial = pqmim.bitstream.truncate(data, 300)
    image = Image.open(io.BytesIO(partial))
    image.load()
    assert 0 < image.info["invented_share"] < 1


def test_copies_pickles_and_operations(plugin: ModuleType, data: bytes) -> None:
    image = Image.open(io.BytesIO(data))
    pickled = pickle.loads(pickle.dumps(image))  # noqa: S301 (our own)
    assert isinstance(pickled, plugin.PqmImageFile)
    assert copy.deepcopy(image).tobytes() == copy.copy(image).tobytes() == pickled.tobytes() == image.tobytes()
    pickled.load()
    assert pickled.resize((5, 5)).tobytes() == image.resize((5, 5)).tobytes()
    assert ImageOps.fit(Image.open(io.BytesIO(data)), (30, 30)).size == (30, 30)
    assert ImageOps.mirror(Image.open(io.BytesIO(data))).getpixel((0, 0)) == image.getpixel((559, 0))
    assert np.asarray(Image.open(io.BytesIO(data))).shape == (400, 560, 3)
    assert Image.open(io.BytesIO(data)).crop((1, 2, 4, 6)).size == (3, 4)


def test_many_threads(plugin: ModuleType, data: bytes) -> None:
    def pixels(_: int) -> bytes:
        with Image.open(io.BytesIO(data)) as image:
            return image.tobytes()

    with ThreadPoolExecutor(4) as executor:
        assert len(set(executor.map(pixels, range(8)))) == 1
    shared = Image.open(io.BytesIO(data))
    with ThreadPoolExecutor(4) as executor:
        assert len({part.tobytes() for part in executor.map(lambda _: shared.copy(), range(8))}) == 1


def test_files_that_come_in_pieces(plugin: ModuleType, data: bytes) -> None:
    parser = ImageFile.Parser()
    for start in range(0, len(data), 200):
        parser.feed(data[start : start + 200])
    assert parser.close().tobytes() == Image.open(io.BytesIO(data)).tobytes()


def test_saving_over_the_file_that_is_open(plugin: ModuleType, data: bytes, tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "photo.pqm"
    path.write_bytes(data)
    image = Image.open(path)
    image.save(path, quality=0, model=tiny_model)
    assert path.stat().st_size < len(data)
    assert Image.open(io.BytesIO(path.read_bytes())).size == (560, 400)


def test_a_file_without_alpha_section(plugin: ModuleType, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cut before its alpha has none: mode and pixels agree."""
    photo = Image.fromarray(synthetic_photo(20, 30))
    photo.putalpha(Image.linear_gradient("L").resize(photo.size))
    coded = saved(photo, model=tiny_model)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    image = Image.open(io.BytesIO(coded[:15]))
    assert image.mode == "RGB"
    image.load()
    assert image.im.mode == "RGB"


def test_only_the_first_picture_imports_what_is_heavy(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "photo.pqm").write_bytes(pack(parse(data)))
    program = """
        import sys
        import pqmim.pillow
        from PIL import Image
        Image.init()
        assert Image.registered_extensions()[".pqm"] == "PQM"
        assert Image.open("photo.pqm").size == (560, 400)
        assert not {"torch", "numpy", "onnxruntime", "safetensors", "typer"} & sys.modules.keys()
    """
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert child.returncode == 0, child.stderr


def test_pictures_of_another_decoder(
    plugin: ModuleType, data: bytes, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def picture(decoder: str | None, realism: float | None = None) -> Image.Image:
        monkeypatch.setattr(plugin, "DECODER", decoder)
        monkeypatch.setattr(plugin, "REALISM", realism)
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return image

    assert picture(None).tobytes() == pqmim.decode(data, model=tiny_model).tobytes()
    assert picture("fast").tobytes() == pqmim.decode(data, model=tiny_model, decoder="fast").tobytes()
    expected = pqmim.decode(data, model=tiny_model, decoder="vivid", realism=0.5)
    assert picture("vivid", 0.5).tobytes() == expected.tobytes()
    with pytest.raises(OSError, match="slow: no such decoder"):
        picture("slow")
    photo = Image.fromarray(synthetic_photo(64, 96))
    assert saved(photo, model=tiny_model, decoder="fast") == pqmim.encode(photo, model=tiny_model, decoder="fast")
