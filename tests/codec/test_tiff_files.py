"""TIFF: samples of any width, both byte orders, strips and tiles, thumbnails, orientation; the rest is refused."""

from __future__ import annotations

import io
import struct
import warnings

import numpy as np
import pytest
from file_makers import (
    DEFLATE,
    NONE,
    exif_block,
    file_of,
    gradient,
    ifd,
    linear_profile,
    one_line,
    tiff_file,
    to_8_bit,
    wide_gradient,
)
from PIL import Image

from pqmim.errors import ImageError
from pqmim.image_io import load_picture


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 24, 32])
def test_grey_of_any_width(bits: int, photometric: int, order: str) -> None:
    right = wide_gradient(channels=1)[:, :, 0]
    levels = np.rint(right.astype(float) * ((2**bits - 1) / 65535)).astype(np.uint64)
    samples = levels if photometric == 1 else 2**bits - 1 - levels
    picture = load_picture(tiff_file(samples, bits, order=order, photometric=photometric))
    expected = np.rint(levels.astype(float) * (255 / (2**bits - 1)))
    assert picture.alpha is None
    assert np.abs(picture.rgb - expected[:, :, np.newaxis]).max() == 0


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [4, 8, 10, 12, 16])
@pytest.mark.parametrize("tile", [None, (16, 16)])
@pytest.mark.parametrize("is_planar", [False, True])
@pytest.mark.parametrize("compression", [NONE, DEFLATE])
def test_rgb_of_any_width(
    order: str, bits: int, tile: tuple[int, int] | None, is_planar: bool, compression: int
) -> None:
    samples = wide_gradient() >> (16 - bits)
    options = {"tile": tile, "is_planar": is_planar, "compression": compression, "order": order}
    picture = load_picture(tiff_file(samples, bits, photometric=2, **options))
    assert (picture.rgb == np.rint(samples * (255 / (2**bits - 1)))).all()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("tile", [None, (16, 32)])
def test_differences_of_16_bits(order: str, tile: tuple[int, int] | None) -> None:
    samples = wide_gradient(40, 50)
    data = tiff_file(samples, 16, photometric=2, predictor=2, compression=DEFLATE, order=order, tile=tile)
    assert (load_picture(data).rgb == to_8_bit(samples)).all()


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd", None])
def test_16_bits_as_other_programs_write_them(compression: str | None) -> None:
    samples = wide_gradient(channels=1)[:, :, 0]
    picture = load_picture(file_of(Image.fromarray(samples), "TIFF", compression=compression))
    assert (picture.rgb == to_8_bit(samples)[:, :, np.newaxis]).all()


@pytest.mark.parametrize("extra", [0, 1, 2])
@pytest.mark.parametrize("channels", [2, 4])
def test_alpha_of_16_bits(channels: int, extra: int) -> None:
    samples = wide_gradient(channels=channels)
    samples[:, :, -1] |= 0x4000
    stored = samples.copy()
    if extra == 1:
        stored[:, :, :-1] = np.rint(samples[:, :, :-1] * (samples[:, :, -1:] / 65535))
    picture = load_picture(tiff_file(stored, 16, photometric=1 if channels == 2 else 2, extras=(extra,)))
    assert np.abs(picture.rgb - to_8_bit(samples)[:, :, :-1]).max() <= (extra == 1)
    if extra == 0:
        assert picture.alpha is None
    else:
        assert (picture.alpha == to_8_bit(samples)[:, :, -1]).all()


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("photometric", [0, 1])
def test_floating_point_grey(bits: int, photometric: int) -> None:
    levels = gradient()[:, :, 1].astype(f"f{bits // 8}") / 255
    samples = 1 - levels if photometric == 0 else levels
    for order in "<>":
        picture = load_picture(tiff_file(samples, bits, photometric=photometric, sample_format=3, order=order))
        assert (picture.rgb[:, :, 0] == gradient()[:, :, 1]).all()
    with pytest.raises(ImageError, match="outside 0 to 1"):
        load_picture(tiff_file(samples * 2, bits, sample_format=3))


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"bits": 8, "sample_format": 2}, "signed 8 bits|8 signed bits"),
        ({"bits": 16, "sample_format": 2}, "16 signed bits"),
        ({"bits": 32, "sample_format": 2}, "32 signed bits"),
        ({"bits": 16, "sample_format": 4}, "16 undefined bits"),
        ({"bits": 16, "photometric": 3}, "photometric interpretation 3"),
        ({"bits": 16, "photometric": 32844}, "photometric interpretation 32844"),
        ({"bits": 12, "predictor": 2}, "predictor 2"),
        ({"bits": 12, "compression": 7}, "compression 7|damaged"),
    ],
)
def test_samples_without_a_defined_meaning_are_refused(options: dict[str, int], cause: str) -> None:
    samples = wide_gradient(channels=1)[:, :, 0] >> 9
    with pytest.raises(ImageError, match=cause) as error:
        load_picture(tiff_file(samples, **options))
    assert one_line(error)


def test_floating_point_colors_need_a_profile() -> None:
    light = np.full((4, 4, 3), 0.2158605, np.float32)  # sRGB 128
    with pytest.raises(ImageError, match="without a profile"):
        load_picture(tiff_file(light, 32, photometric=2, sample_format=3))
    picture = load_picture(tiff_file(light, 32, photometric=2, sample_format=3, tags={34675: (7, linear_profile())}))
    assert (picture.rgb == 128).all()


@pytest.mark.parametrize("kind", [1, 3, 4, 2])
@pytest.mark.parametrize("orientation", [3, 5, 6, 8])
@pytest.mark.parametrize("bits", [8, 16])
def test_orientation_of_any_type(orientation: int, kind: int, bits: int) -> None:
    samples = wide_gradient() >> (16 - bits)
    value = str(orientation).encode() + b"\0" if kind == 2 else [orientation]
    expected = to_8_bit(samples) if bits == 16 else samples
    upright = {
        3: np.rot90(expected, 2),
        5: expected.transpose(1, 0, 2),
        6: np.rot90(expected, -1),
        8: np.rot90(expected),
    }[orientation]
    for order in "<>":
        data = tiff_file(samples, bits, photometric=2, order=order, tags={274: (kind, value)})
        assert (load_picture(data).rgb == upright).all()
        with Image.open(io.BytesIO(data)) as image:
            assert (load_picture(image).rgb == upright).all()


def test_a_thumbnail_in_front_is_passed_over() -> None:
    samples = wide_gradient() >> 8
    main = tiff_file(samples, 8, photometric=2)
    thumbnail = samples[::4, ::4].astype(np.uint8)
    first_at = struct.unpack_from("<I", main, 4)[0]
    pixels_at = len(main)
    directory_at = pixels_at + thumbnail.size + thumbnail.size % 2
    entries = {
        254: (4, [1]),
        256: (3, [thumbnail.shape[1]]),
        257: (3, [thumbnail.shape[0]]),
        258: (3, [8, 8, 8]),
        259: (3, [1]),
        262: (3, [2]),
        273: (4, [pixels_at]),
        277: (3, [3]),
        278: (3, [thumbnail.shape[0]]),
        279: (4, [thumbnail.size]),
    }
    for in_chain in (True, False):
        if not in_chain:
            entries[330] = (4, [first_at])
        directory = ifd(entries, directory_at, "<", following=first_at if in_chain else 0)
        data = main[:4] + struct.pack("<I", directory_at) + main[8:]
        data += thumbnail.tobytes() + b"\0" * (thumbnail.size % 2) + directory
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            picture = load_picture(data)
        assert (picture.rgb == samples).all()


def test_pages_are_warned_of_thumbnails_are_not() -> None:
    frames = [Image.fromarray(gradient()), Image.fromarray(255 - gradient())]
    with pytest.warns(UserWarning, match="several frames"):
        picture = load_picture(file_of(frames[0], "TIFF", save_all=True, append_images=frames[1:]))
    assert (picture.rgb == gradient()).all()


def test_big_tiff() -> None:
    samples = wide_gradient(channels=1)[:, :, 0]
    data = file_of(Image.fromarray(samples), "TIFF", big_tiff=True)
    assert data[2] == 43
    assert (load_picture(data).rgb == to_8_bit(samples)[:, :, np.newaxis]).all()


def test_tiffs_that_are_broken() -> None:
    good = tiff_file(wide_gradient(), 16, photometric=2)
    for data, cause in (
        (good[:200], "damaged|not supported|no pixels"),
        (good[:8], "no pixels|damaged|tags"),
        (good[:5], "damaged|not an image"),
        (tiff_file(wide_gradient(), 16, photometric=2, tags={322: (4, [2**31 - 1]), 324: (4, [8])}), "tiles"),
        (tiff_file(wide_gradient(), 16, photometric=2, tags={273: (4, [2**32 - 1] * 5)}), "damaged|not supported"),
    ):
        with pytest.raises(ImageError, match=cause) as error:
            load_picture(data)
        assert one_line(error)


def test_exif_of_other_formats_reads_the_same_tags() -> None:
    rgb = gradient()
    data = file_of(Image.fromarray(rgb), "WEBP", lossless=True, exif=exif_block(1, [6], ">"))
    assert (load_picture(data).rgb == np.rot90(rgb, -1)).all()
