"""Files of pictures: orientation however it is written, crops, raw photos, further packages, limits, memory."""

from __future__ import annotations

import importlib.util
import io
import struct
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from file_makers import box, exif_block, file_of, gradient, ifd, one_line, psnr, tiff_file, wide_gradient, with_property
from PIL import Image, ImageFile

from pqmim.errors import ImageError, LimitError, PqmimError
from pqmim.image_files import opening
from pqmim.image_files.raw import is_raw
from pqmim.image_files.sizes import jxl_size, webp_size
from pqmim.image_io import load_mask, load_picture

HAS_HEIF = importlib.util.find_spec("pillow_heif") is not None
HAS_JXL = importlib.util.find_spec("pillow_jxl") is not None
HAS_RAW = importlib.util.find_spec("rawpy") is not None


def upright(picture: np.ndarray[Any, Any], orientation: int) -> np.ndarray[Any, Any]:
    """The picture turned as the EXIF specification says."""
    return {
        1: picture,
        2: picture[:, ::-1],
        3: np.rot90(picture, 2),
        4: picture[::-1],
        5: picture.swapaxes(0, 1),
        6: np.rot90(picture, -1),
        7: np.rot90(picture, 2).swapaxes(0, 1),
        8: np.rot90(picture),
    }[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", [1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_orientation_of_any_type(kind: int, orientation: int) -> None:
    rgb = gradient()
    for order in "<>":
        value = struct.pack(f"{order}{ {3: 'H', 4: 'I', 8: 'h', 9: 'i'}.get(kind, 'B') }", orientation)
        if kind == 2:
            block = exif_block(2, str(orientation).encode() + b"\0", order)
        elif kind == 5:
            block = exif_block(5, [orientation, 1], order)
        else:
            count = struct.pack(order + "HHI", 0x0112, kind, 1)
            block = b"Exif\0\0" + (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, 1)
            block += count + value.ljust(4, b"\0") + bytes(4)
        data = file_of(Image.fromarray(rgb), "WEBP", lossless=True, exif=block)
        assert (load_picture(data).rgb == upright(rgb, orientation)).all()


def test_orientation_of_two_bytes_and_of_no_use() -> None:
    rgb = gradient()
    for block, orientation in (
        (exif_block(7, b"\6\0"), 6),
        (exif_block(7, b"\0\6", ">"), 6),
        (exif_block(3, [9]), 1),
        (exif_block(3, [0]), 1),
        (exif_block(2, b"six\0"), 1),
        (b"Exif\0\0II*\0\xff\xff\xff\xff", 1),
        (b"Exif\0\0", 1),
        (b"nothing", 1),
        (exif_block(3, [6])[:20], 1),
    ):
        data = file_of(Image.fromarray(rgb), "WEBP", lossless=True, exif=block)
        assert (load_picture(data).rgb == upright(rgb, orientation)).all()


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
def test_mistyped_tags_beside_an_orientation(image_format: str) -> None:
    rgb = np.kron(gradient(4, 6), np.ones((8, 8, 1), np.uint8))
    mistyped = {0x0100: (2, b"240\0"), 0x011A: (3, [72]), 0x0131: (4, [1, 2, 3]), 0x8769: (2, b"here\0")}
    options: dict[str, Any] = {"lossless": True} if image_format == "WEBP" else {"quality": 100}
    if image_format == "TIFF":
        tags = {274: (3, [6]), 0x011A: (3, [72]), 0x0131: (4, [1, 2, 3]), 0x8769: (2, b"here\0")}
        data = tiff_file(rgb, 8, photometric=2, tags=tags)
    else:
        block = exif_block(3, [6], tags=mistyped)
        image = Image.fromarray(rgb)
        if image_format == "AVIF":  # Pillow itself writes no EXIF that it cannot read
            plain, odd = exif_block(3, [6], tags={0x0100: (4, [240])}), exif_block(3, [6], tags={0x0100: (2, b"240\0")})
            data = file_of(image, "AVIF", exif=plain, **options)
            assert plain[6:] in data or b"Exif" in data
            data = data.replace(plain[6:], odd[6:])
        else:
            data = file_of(image, image_format, exif=block, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = load_picture(data)
    assert psnr(picture.rgb, upright(rgb, 6)) > 30


def test_the_clean_aperture_of_avif() -> None:
    rgb = np.kron(gradient(6, 8), np.ones((8, 8, 1), np.uint8))
    data = file_of(Image.fromarray(rgb), "AVIF", quality=100, subsampling="4:4:4")
    whole = load_picture(data).rgb
    # 40 x 30, its center 4 pixels right of the picture's and 3 above
    clap = box(b"clap", struct.pack(">8i", 40, 1, 30, 1, 4, 1, -3, 1))
    picture = load_picture(with_property(data, clap))
    left, top = 4 + (64 - 40) // 2, -3 + (48 - 30) // 2
    assert (picture.rgb == whole[top : top + 30, left : left + 40]).all()
    outside = box(b"clap", struct.pack(">8i", 40, 1, 30, 1, 40, 1, 0, 1))
    assert (load_picture(with_property(data, outside)).rgb == whole).all()
    turned = file_of(Image.fromarray(rgb), "AVIF", quality=100, subsampling="4:4:4", exif=exif_block(3, [6]))
    assert (load_picture(turned).rgb == upright(whole, 6)).all()


def test_x_bitmaps_are_black_on_white() -> None:
    rows = b"#define x_width 8\n#define x_height 2\nstatic char x_bits[] = {\n0x01, 0xf0 };\n"
    assert load_picture(rows).rgb[:, :, 0].tolist() == [[0] + [255] * 7, [255] * 4 + [0] * 4]


def test_fits_is_refused() -> None:
    cards = ["SIMPLE  =                    T", "BITPIX  =                   16", "NAXIS   =                    2"]
    cards += ["NAXIS1  =                    4", "NAXIS2  =                    4", "END"]
    header = "".join(card.ljust(80) for card in cards).ljust(2880).encode()
    with pytest.raises(ImageError, match="FITS"):
        load_picture(header + bytes(2880))


# -- raw photos --------------------------------------------------------------------------------------------------------


def raw_photo(photometric: int = 34892, *, dng: bool = True, order: str = "<") -> bytes:
    """A TIFF like that of a camera: a thumbnail first, the photo, 240 x 160, in a directory below."""
    thumbnail, photo = gradient(40, 60), (wide_gradient(160, 240, 3 if photometric == 34892 else 1) >> 4)
    thumbnail_at, photo_at = 8, 8 + thumbnail.size
    first_at = photo_at + photo.nbytes
    channels = photo.shape[2]
    entries: dict[int, Any] = {
        254: (4, [1]),
        256: (4, [60]),
        257: (4, [40]),
        258: (3, [8, 8, 8]),
        259: (3, [1]),
        262: (3, [2]),
        271: (2, b"Maker\0"),
        272: (2, b"Camera\0"),
        273: (4, [thumbnail_at]),
        274: (3, [1]),
        277: (3, [3]),
        278: (4, [40]),
        279: (4, [thumbnail.size]),
        330: (4, [0]),
    }
    if dng:
        entries |= {50706: (1, [1, 4, 0, 0]), 50708: (2, b"Camera\0")}
    second_at = first_at + len(ifd(entries, first_at, order))
    entries[330] = (4, [second_at])
    below: dict[int, Any] = {
        254: (4, [0]),
        256: (4, [240]),
        257: (4, [160]),
        258: (3, [16] * channels),
        259: (3, [1]),
        262: (3, [photometric]),
        273: (4, [photo_at]),
        277: (3, [channels]),
        278: (4, [160]),
        279: (4, [photo.nbytes]),
        33421: (3, [2, 2]),
        33422: (1, [0, 1, 1, 2]),
        50717: (4, [4095]),
    }
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", first_at)
    pixels = thumbnail.tobytes() + photo.astype(f"{order}u2").tobytes()
    return header + pixels + ifd(entries, first_at, order) + ifd(below, second_at, order)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("photometric", "dng"), [(34892, True), (32803, True), (32803, False)])
def test_raw_photos_are_no_thumbnails(photometric: int, dng: bool, order: str) -> None:
    data = raw_photo(photometric, dng=dng, order=order)
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (60, 40)
    assert is_raw(data, "")
    if HAS_RAW:
        assert load_picture(data).rgb.shape == (160, 240, 3)
        with pytest.raises(LimitError, match="240 x 160"):
            load_picture(data, max_pixels=1000)
    else:
        with pytest.raises(ImageError, match="raw photo") as error:
            load_picture(data)
        assert one_line(error)


@pytest.mark.parametrize(
    "start",
    [
        b"II*\0\x10\0\0\0CR\2\0",
        b"\0\0\0\x18ftypcrx \0\0\0\1crx isom",
        b"IIU\0\x18\0\0\0",
        b"IIRO\x08\0\0\0",
        b"MMOR\0\0\0\x08",
        b"FUJIFILMCCD-RAW 0201",
        b"FOVb\0\0\2\0",
        b"\0MRM\0\0\0\0",
        b"II\x1a\0\0\0HEAPCCDR",
    ],
)
def test_raw_photos_are_told_by_their_first_bytes(start: bytes) -> None:
    data = start + bytes(400)
    assert is_raw(data, "")
    with pytest.raises(ImageError, match="raw photo") as error:
        load_picture(data)
    assert one_line(error)


def test_raw_photos_are_told_by_their_names_where_they_look_like_tiff(tmp_path: Path) -> None:
    path = tmp_path / "photo.NEF"
    path.write_bytes(tiff_file(gradient(), 8, photometric=2))
    with pytest.raises(ImageError, match="raw photo"):
        load_picture(path)
    path = tmp_path / "photo.dng"
    path.write_bytes(file_of(Image.fromarray(gradient()), "PNG"))
    assert (load_picture(path).rgb == gradient()).all()


# -- further packages --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not HAS_HEIF, reason="needs pillow-heif")
def test_heic() -> None:
    import pillow_heif

    rgb = np.kron(gradient(8, 12), np.ones((8, 8, 1), np.uint8))
    for mode in ("RGB", "RGBA"):
        data = io.BytesIO()
        pillow_heif.from_pillow(Image.fromarray(rgb).convert(mode)).save(data, quality=95, chroma=444)
        picture = load_picture(data.getvalue())
        assert psnr(picture.rgb, rgb) > 30
        assert (picture.alpha is None) == (mode == "RGB")
        with pytest.raises(LimitError, match="96 x 64"):
            load_picture(data.getvalue(), max_pixels=96 * 64 - 1)
        with pytest.raises(ImageError) as error:
            load_picture(data.getvalue()[:-200])
        assert one_line(error)


@pytest.mark.skipif(not HAS_JXL, reason="needs pillow-jxl-plugin")
def test_jpeg_xl() -> None:
    import pillow_jxl  # noqa: F401

    rgb = gradient()
    for options in ({"lossless": True}, {"lossless": True, "use_container": True}):
        data = file_of(Image.fromarray(rgb), "JXL", **options)
        assert (load_picture(data).rgb == rgb).all()
        with pytest.raises(LimitError, match="37 x 24"):
            load_picture(data, max_pixels=37 * 24 - 1)
        with pytest.raises(ImageError) as error:
            load_picture(data[: len(data) // 2])
        assert one_line(error)
    for width, height in ((1, 1), (8, 8), (256, 256), (160, 90), (1000, 3), (511, 9000)):
        assert jxl_size(file_of(Image.new("L", (width, height)), "JXL", lossless=True)) == (width, height)


@pytest.mark.parametrize(
    ("data", "package", "advice"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100), "pillow_heif", r"pip install 'pqmim\[heif\]'"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heix" + bytes(100), "pillow_heif", r"pip install 'pqmim\[heif\]'"),
        (b"\xff\x0a" + bytes(100), "pillow_jxl", r"pip install 'pqmim\[jxl\]'"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(100), "pillow_jxl", r"pip install 'pqmim\[jxl\]'"),
        (b"II*\0\x10\0\0\0CR\2\0" + bytes(100), "rawpy", r"pip install 'pqmim\[raw\]'"),
    ],
)
def test_what_to_install_is_said(data: bytes, package: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImageError, match=advice) as error:
        load_picture(data)
    assert one_line(error)


def test_webp_sizes() -> None:
    for width, height in ((1, 1), (300, 200), (16383, 2)):
        image = Image.new("RGB", (width, height))
        alpha = Image.new("RGBA", (width, height), (1, 2, 3, 4))
        assert webp_size(file_of(image, "WEBP")) == (width, height)
        assert webp_size(file_of(image, "WEBP", lossless=True)) == (width, height)
        assert webp_size(file_of(alpha, "WEBP")) == (width, height)
    assert webp_size(b"RIFF" + bytes(100)) is None


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "WEBP", "JPEG", "GIF", "BMP"])
@pytest.mark.parametrize("limit", [100, 700])  # Pillow raises above twice the limit and warns below
def test_pillows_limit_does_not_count(image_format: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("RGB", (50, 20), (10, 200, 30))
    data = file_of(image, image_format)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_picture(data, max_pixels=1000).rgb.shape == (20, 50, 3)
        with pytest.raises(LimitError, match="50 x 20"):
            load_picture(data, max_pixels=999)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_pillows_limit_comes_back_after_errors_and_among_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    data = file_of(Image.new("RGB", (50, 20)), "WEBP")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    errors: list[BaseException] = []

    def read_many() -> None:
        try:
            for i in range(50):
                load_picture(data if i % 2 else data[:-10] + bytes(10))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read_many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(isinstance(error, ImageError) for error in errors)
    assert Image.MAX_IMAGE_PIXELS == 10


@pytest.mark.parametrize("width", [2**21, 2**21 + 1])
def test_sides_that_no_file_can_hold(width: int) -> None:
    image = Image.new("L", (width, 1))
    sources = [image, np.zeros((1, width), np.uint8), file_of(image, "PNG")]
    for source in sources:
        if width == 2**21:
            assert load_picture(source).rgb.shape == (1, width, 3)
        else:
            with pytest.raises(LimitError, match="a side is above the limit of 2,097,152 pixels") as error:
                load_picture(source)
            assert one_line(error)


CLAIMS = """
import resource, struct, sys, zlib
sys.path.insert(0, {folder!r})
from file_makers import png_chunk, tiff_file
import numpy as np
from pqmim.errors import PqmimError
from pqmim.image_io import load_picture
side = 60000
png = b"\\x89PNG\\r\\n\\x1a\\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
sized = {{256: (4, [side]), 257: (4, [side])}}
grey = np.zeros((2, 2), np.uint8)
claims = [
    png + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b""),
    tiff_file(grey, 8, tags=sized),
    tiff_file(grey, 12, tags=sized),
    b"RIFF\\x1a\\0\\0\\0WEBPVP8L\\x0d\\0\\0\\0\\x2f" + (16382 | 16382 << 14).to_bytes(4, "little") + bytes(16),
    b"RIFF\\x1a\\0\\0\\0WEBPVP8X\\x0a\\0\\0\\0" + bytes(4) + b"\\xff\\xff\\x1f\\xff\\xff\\x1f" + bytes(16),
    b"GIF89a"
    + struct.pack("<HHBBB", side, side, 0, 0, 0) + b",\\0\\0\\0\\0" + struct.pack("<HH", side, side) + bytes(9),
    b"BM" + struct.pack("<IIIIiiHHIIIIII", 0, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(10),
    b"P6 60000 60000 255\\n" + bytes(10),
    b"\\xff\\xd8\\xff\\xc0"
    + struct.pack(">HBHHB", 17, 8, side, side, 3) + b"\\1\\x11\\0\\2\\x11\\0\\3\\x11\\0" + bytes(10),
    b"\\xff\\x0a" + (0 | 3 << 1 | (side - 1) << 3 | 1 << 33).to_bytes(16, "little"),
    png + png_chunk(b"iTXt", b"a\\0\\1\\0\\0\\0" + zlib.compress(bytes(2 * 10**8))) + png_chunk(b"IDAT", b""),
]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for i, claim in enumerate(claims):
    try:
        load_picture(claim)
    except PqmimError as error:
        assert "limit" in str(error) or "install" in str(error), (i, error)
    else:
        raise AssertionError(i)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
assert grown < 60, f"{{grown:.0f}} MiB"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux does")
def test_headers_that_claim_much_cost_little() -> None:
    code = CLAIMS.format(folder=str(Path(__file__).parent))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_out_of_memory_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    data = file_of(Image.fromarray(gradient()), "PNG")
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    for source in (data, Image.open(io.BytesIO(data))):
        with pytest.raises(PqmimError, match=r"^out of memory$") as error:
            load_picture(source)
        assert not isinstance(error.value, ImageError)


def test_whatever_a_decoder_raises_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(opening, "_read_other", fail)
    with pytest.raises(ImageError, match=r"^damaged image: two lines$"):
        load_picture(b"anything")
    monkeypatch.undo()
    closed = io.BytesIO()
    closed.close()
    with pytest.raises(ImageError, match="closed"):
        load_picture(closed)
    with pytest.raises(ImageError, match="null"):
        load_picture("a\0b")


# -- masks -------------------------------------------------------------------------------------------------------------


def test_masks() -> None:
    shape = np.zeros((20, 30), bool)
    shape[3:9, 4:20] = True
    level = shape.astype(np.uint8) * 255
    flat = np.zeros((20, 30, 4), np.uint8)
    flat[:, :, 3] = level
    painted = np.full((20, 30, 4), 255, np.uint8)  # black where painted, white below the transparent rest
    painted[shape] = (0, 0, 0, 255)
    painted[~shape, 3] = 0
    red = flat.copy()
    red[shape, 0] = 200
    white = flat.copy()
    white[shape, :3] = 255
    opaque = np.dstack([level] * 3 + [np.full_like(level, 255)])
    half = opaque.copy()
    half[5:, :, 3] = 0
    for name, mask in {
        "bool": shape,
        "grey": level,
        "color": np.dstack((level, level * 0, level * 0)),
        "black on transparent": flat,
        "black on transparent white": painted,
        "red on transparent": red,
        "white on transparent": white,
        "opaque": opaque,
        "16-bit": level.astype(np.uint16) * 257,
    }.items():
        assert (load_mask(mask) == shape).all(), name
        assert load_mask(mask).dtype == np.bool_
    two_colors = opaque.copy()
    two_colors[5:, :, 3] = 0
    assert (load_mask(two_colors) == (shape & (np.arange(20) < 5)[:, np.newaxis])).all()
    assert not load_mask(np.zeros((4, 5, 4), np.uint8)).any()
    assert not load_mask(np.dstack((np.zeros((4, 5, 3), np.uint8), np.full((4, 5), 255, np.uint8)))).any()
    assert load_mask(np.full((4, 5, 4), 255, np.uint8)).all()
    with pytest.raises(LimitError):
        load_mask(shape, max_pixels=100)


def test_exif_that_claims_many_large_tags_does_no_harm() -> None:
    block = b"II*\0\x08\0\0\0\xff\xff" + struct.pack("<HHII", 0x0112, 7, 60_000, 8) * 5400
    data = file_of(Image.fromarray(gradient()), "WEBP", lossless=True, exif=b"Exif\0\0" + block[:65_000])
    assert load_picture(data).rgb.shape in ((24, 37, 3), (37, 24, 3))
