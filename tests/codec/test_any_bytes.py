"""Any bytes at all are a picture or an error of ours: nothing else, and no more memory than the limit allows."""

from __future__ import annotations

import warnings

import numpy as np
from file_makers import (
    DEFLATE,
    GREY_ALPHA,
    PALETTE,
    RGB,
    exif_block,
    file_of,
    gradient,
    png_file,
    tiff_file,
    wide_gradient,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from pqmim.errors import PqmimError
from pqmim.image_io import Picture, load_picture

LIMIT = 200_000


def seeds() -> list[bytes]:
    image = Image.fromarray(gradient())
    formats = [
        "PNG",
        "JPEG",
        "WEBP",
        "TIFF",
        "JPEG2000",
        "AVIF",
        "GIF",
        "BMP",
        "PPM",
        "ICO",
        "TGA",
        "PCX",
        "SGI",
        "DDS",
    ]
    files = [file_of(image, name) for name in formats]
    files.append(file_of(image, "JPEG", exif=exif_block(3, [6])))
    files.append(file_of(image.convert("CMYK"), "TIFF", compression="jpeg"))
    files.append(file_of(image, "TIFF", compression="tiff_lzw"))
    files.append(png_file(wide_gradient(channels=2), GREY_ALPHA, 16))
    chunks = (
        (b"cICP", b"\x09\x10\0\1"),
        (b"gAMA", b"\0\1\x86\xa0"),
        (b"tRNS", bytes(6)),
        (b"eXIf", exif_block(3, [6])[6:]),
    )
    files.append(png_file(wide_gradient(), RGB, 16, *chunks))
    files.append(png_file(gradient()[:, :, 0] >> 6, PALETTE, 2, (b"PLTE", bytes(range(12))), (b"tRNS", b"\1\2")))
    files.append(tiff_file(wide_gradient(), 12, photometric=2, tile=(16, 16), compression=DEFLATE))
    files.append(tiff_file(wide_gradient(channels=1), 16, order=">", photometric=0, predictor=2))
    files.append(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(60))
    files.append(b"\xff\x0a" + bytes(60))
    return files


SEEDS = seeds()


def read(data: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picture, message = None, ""
        try:
            picture = load_picture(data, max_pixels=LIMIT)
        except PqmimError as error:
            message = str(error)
    assert "\n" not in message
    if picture is None:
        assert message
        return
    assert isinstance(picture, Picture)
    height, width, channels = picture.rgb.shape
    assert channels == 3
    assert 1 <= height * width <= LIMIT
    assert picture.rgb.dtype == np.uint8
    assert picture.rgb.flags.c_contiguous
    if picture.alpha is not None:
        assert picture.alpha.shape == (height, width)
        assert picture.alpha.dtype == np.uint8


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
@example(b"")
@example(b"\x89PNG\r\n\x1a\n")
@example(b"II*\0\x08\0\0\0\0\0")
@example(b"MM\0+\0\x08\0\0" + b"\xff" * 8)
@example(b"II+\0\x08\0\0\0" + b"\xff" * 8)
@example(b"\0\0\0\x08ftyp")
def test_bytes_out_of_nowhere(data: bytes) -> None:
    read(data)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_bytes_that_nearly_are_a_picture(data: st.DataObject) -> None:
    changed = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 4))):
        if not changed:
            break
        at = data.draw(st.integers(0, len(changed) - 1))
        end = min(len(changed), at + data.draw(st.integers(0, 8)))
        changed[at:end] = data.draw(
            st.binary(max_size=8) | st.sampled_from([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"])
        )
    if data.draw(st.booleans()):
        del changed[data.draw(st.integers(0, len(changed))) :]
    read(bytes(changed))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(range(len(SEEDS))), st.integers(0, 400), st.binary(min_size=1, max_size=4))
def test_bytes_of_a_header_overwritten(seed: int, at: int, content: bytes) -> None:
    data = SEEDS[seed]
    read(data[:at] + content + data[at + len(content) :])
