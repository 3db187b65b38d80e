"""PNG: transparent colors, all bits, chunks that are broken or huge, and what the colors mean."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from file_makers import (
    GREY,
    GREY_ALPHA,
    PALETTE,
    RGB,
    RGB_ALPHA,
    exif_block,
    file_of,
    gradient,
    linear_profile,
    one_line,
    png_chunk,
    png_file,
    psnr,
    to_8_bit,
    wide_gradient,
    with_png_chunk,
)
from numpy.typing import NDArray
from PIL import Image

from pqmim.errors import ImageError, LimitError
from pqmim.image_io import load_picture


def srgb_to_linear(samples: NDArray[np.float64]) -> NDArray[np.float64]:
    """IEC 61966-2-1."""
    return np.where(samples <= 0.04045, samples / 12.92, ((samples + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_transparent_grey(depth: int) -> None:
    levels = wide_gradient(channels=1)[:, :, 0] >> (16 - depth)
    transparent = int(levels[3, 5])
    picture = load_picture(png_file(levels, GREY, depth, (b"tRNS", struct.pack(">H", transparent))))
    assert picture.alpha is not None
    assert ((picture.alpha == 0) == (levels == transparent)).all()
    assert set(np.unique(picture.alpha)) == {0, 255}
    expected = np.rint(levels * (255 / (2**depth - 1)))
    assert (picture.rgb == expected[:, :, np.newaxis]).all()


@pytest.mark.parametrize("depth", [8, 16])
def test_transparent_rgb_compares_all_bits(depth: int) -> None:
    samples = wide_gradient() >> (16 - depth)
    samples[5:9, 7:20] = samples[3, 4]
    near = samples[3, 4].copy()
    near[2] ^= 1
    samples[15:18, 2:9] = near
    hole = (samples == samples[3, 4]).all(axis=2)
    assert hole.sum() == 4 * 13 + 1
    key = struct.pack(">3H", *(int(level) for level in samples[3, 4]))
    picture = load_picture(png_file(samples, RGB, depth, (b"tRNS", key)))
    assert picture.alpha is not None
    assert ((picture.alpha == 0) == hole).all()
    assert (picture.rgb == (to_8_bit(samples) if depth == 16 else samples)).all()


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_transparent_palettes_without_a_word(depth: int) -> None:
    indices = (gradient()[:, :, 2] >> (8 - depth)).astype(np.uint8)
    palette = np.random.default_rng(0).integers(0, 256, (2**depth, 3)).astype(np.uint8)
    levels = np.arange(2**depth - 1).astype(np.uint8) * 4  # one entry short: opaque
    data = png_file(indices, PALETTE, depth, (b"PLTE", palette.tobytes()), (b"tRNS", levels.tobytes()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = load_picture(data)
    assert (picture.rgb == palette[indices]).all()
    assert picture.alpha is not None
    assert (picture.alpha == np.append(levels, 255)[indices]).all()


@pytest.mark.parametrize(("kind", "channels"), [(GREY, 1), (RGB, 3), (GREY_ALPHA, 2), (RGB_ALPHA, 4)])
def test_16_bits_are_rounded(kind: int, channels: int) -> None:
    samples = wide_gradient(channels=channels)
    picture = load_picture(png_file(samples, kind, 16))
    colors = channels - 1 + channels % 2
    assert (picture.rgb == to_8_bit(samples)[:, :, :colors]).all()
    if channels % 2:
        assert picture.alpha is None
    else:
        assert (picture.alpha == to_8_bit(samples)[:, :, -1]).all()


@pytest.mark.parametrize("is_interlaced", [False, True])
def test_an_image_that_pillow_has_opened_is_read_as_well_as_its_file(is_interlaced: bool) -> None:
    samples = wide_gradient()
    data = png_file(samples, RGB, 16, (b"tRNS", struct.pack(">3H", *(int(level) for level in samples[0, 0]))))
    with Image.open(io.BytesIO(data)) as image:
        picture = load_picture(image)
        assert (picture.rgb == to_8_bit(samples)).all()
        assert picture.alpha is not None
        assert (picture.alpha == 0).sum() == 1
        assert image.size == (37, 24)
        image.load()
        assert np.abs(load_picture(image).rgb - to_8_bit(samples)).max() <= 1


def test_broken_ancillary_chunks_are_left_out_with_a_warning() -> None:
    rgb = gradient()
    png = file_of(Image.fromarray(rgb), "PNG")
    for kind in (b"tEXt", b"gAMA", b"tRNS", b"abCd"):
        chunk = bytearray(png_chunk(kind, b"Comment\0hello"))
        chunk[-1] ^= 1
        with pytest.warns(UserWarning, match=f"{kind.decode()} is damaged") as caught:
            picture = load_picture(png[:33] + bytes(chunk) + png[33:])
        assert len(caught) == 1
        assert (picture.rgb == rgb).all()
        assert picture.alpha is None


def test_broken_critical_chunks_are_refused() -> None:
    png = bytearray(file_of(Image.fromarray(gradient()), "PNG"))
    unknown = with_png_chunk(bytes(png), b"ABCD", b"")
    png[20] ^= 1  # in the width
    for data, cause in ((bytes(png), "IHDR"), (unknown, "ABCD"), (bytes(png[:20]), "header|IHDR")):
        with pytest.raises(ImageError, match=cause) as error:
            load_picture(data)
        assert one_line(error)


def test_huge_texts_and_profiles_do_no_harm() -> None:
    rgb = gradient()
    png = file_of(Image.fromarray(rgb), "PNG")
    huge = zlib.compress(bytes(3_000_000))
    for kind, content in (
        (b"zTXt", b"Comment\0\0" + huge),
        (b"iTXt", b"workflow\0\1\0\0\0" + huge),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + huge),
        (b"tEXt", b"Comment\0" + bytes(1_500_000)),
    ):
        assert (load_picture(with_png_chunk(png, kind, content)).rgb == rgb).all()
    with pytest.warns(UserWarning, match="ICC profile"):
        picture = load_picture(with_png_chunk(png, b"iCCP", b"name\0\0" + huge))
    assert (picture.rgb == rgb).all()


def test_a_large_profile_counts() -> None:
    profile = linear_profile() + bytes(1_500_000)
    profile = len(profile).to_bytes(4, "big") + profile[4:]
    png = file_of(Image.fromarray(np.full((4, 4, 3), 55, np.uint8)), "PNG")
    picture = load_picture(with_png_chunk(png, b"iCCP", b"name\0\0" + zlib.compress(profile)))
    assert np.abs(picture.rgb.astype(int) - 128).max() <= 1


@pytest.mark.parametrize("gamma", [1.0, 1 / 1.8, 1 / 2.5, 0.8])
@pytest.mark.parametrize("depth", [8, 16])
def test_gamma(gamma: float, depth: int) -> None:
    right = gradient()
    light = srgb_to_linear(right / 255)
    samples = np.rint(light**gamma * (2**depth - 1)).astype(np.uint16)
    chunk = (b"gAMA", round(gamma * 100_000).to_bytes(4, "big"))
    picture = load_picture(png_file(samples, RGB, depth, chunk))
    assert psnr(picture.rgb, right) > (60 if depth == 16 else 35)
    grey = load_picture(png_file(samples[:, :, 1], GREY, depth, chunk))
    assert (grey.rgb == picture.rgb[:, :, 1:2]).all()
    unchanged = samples if depth == 8 else to_8_bit(samples)
    assert (load_picture(png_file(samples, RGB, depth, (b"sRGB", b"\0"), chunk)).rgb == unchanged).all()


@pytest.mark.parametrize("gamma", [0, 45455, 45000, 46000, 2**31 - 1])
def test_the_gamma_of_srgb_and_nonsense_leave_the_pixels_alone(gamma: int) -> None:
    rgb = gradient()
    srgb = struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
    for chunks in ([(b"gAMA", gamma.to_bytes(4, "big"))], [(b"gAMA", gamma.to_bytes(4, "big")), (b"cHRM", srgb)]):
        assert (load_picture(png_file(rgb, RGB, 8, *chunks)).rgb == rgb).all()


def test_chromaticities() -> None:
    # Adobe RGB (255, 0, 0) lies outside of sRGB; (127, 255, 127) is well known to be within: see the matrix of the
    # Adobe RGB (1998) specification.
    to_srgb = np.array([[1.39836, -0.39836, 0], [0, 1, 0], [0, -0.04293, 1.04293]])
    adobe = np.array([[[200, 150, 100], [90, 120, 140], [30, 60, 50], [255, 255, 255]]], np.uint8)
    light = (adobe / 255) ** (1 / 0.45455) @ to_srgb.T
    light = np.clip(light, 0, 1)
    right = np.rint(255 * np.where(light < 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055))
    chromaticities = struct.pack(">8I", 31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000)
    picture = load_picture(png_file(adobe, RGB, 8, (b"gAMA", (45455).to_bytes(4, "big")), (b"cHRM", chromaticities)))
    assert np.abs(picture.rgb - right).max() <= 1


@pytest.mark.parametrize(
    "numbers",
    [(0,) * 8, (31270, 32900, *(30000,) * 6), (31270, 0, 64000, 33000, 30000, 60000, 15000, 6000), (2**32 - 1,) * 8],
)
def test_nonsensical_chromaticities_are_ignored(numbers: tuple[int, ...]) -> None:
    rgb = gradient()
    chunks = ((b"gAMA", (45455).to_bytes(4, "big")), (b"cHRM", struct.pack(">8I", *numbers)))
    with pytest.warns(UserWarning, match="chromaticities"):
        picture = load_picture(png_file(rgb, RGB, 8, *chunks))
    assert (picture.rgb == rgb).all()


def test_code_points_go_before_everything_else() -> None:
    rgb = gradient()
    p3_white = np.array([[[255, 255, 255], [128, 128, 128], [0, 0, 0]]], np.uint8)
    linear = (b"gAMA", (100_000).to_bytes(4, "big"))
    assert (load_picture(png_file(rgb, RGB, 8, (b"cICP", b"\x01\x0d\0\1"), linear)).rgb == rgb).all()
    assert (load_picture(png_file(p3_white, RGB, 8, (b"cICP", b"\x0c\x0d\0\1"), linear)).rgb == p3_white).all()
    # P3 (200, 100, 50) is about (214, 95, 33) in sRGB.
    color = np.array([[[200, 100, 50]]], np.uint8)
    picture = load_picture(png_file(color, RGB, 8, (b"cICP", b"\x0c\x0d\0\1")))
    assert np.abs(picture.rgb - np.array([214, 95, 33])).max() <= 2


def test_code_points_of_video_range() -> None:
    samples = np.array([[[16, 126, 235], [0, 255, 16]]], np.uint8)
    picture = load_picture(png_file(samples, RGB, 8, (b"cICP", b"\1\x0d\0\0")))
    assert picture.rgb.tolist() == [[[0, 128, 255], [0, 255, 0]]]


def test_code_points_that_do_not_fit() -> None:
    rgb = gradient()
    for content in (b"\1\x0d\1\1", b"\x63\x0d\0\1", b"\1\x63\0\1"):
        with pytest.warns(UserWarning, match="cICP|CICP"):
            picture = load_picture(png_file(rgb, RGB, 8, (b"cICP", content)))
        assert (picture.rgb == rgb).all()
    assert (load_picture(png_file(rgb, RGB, 8, (b"cICP", b"\2\2\0\1"))).rgb == rgb).all()


def test_orientation_in_a_text() -> None:
    rgb = gradient()
    png = file_of(Image.fromarray(rgb), "PNG")
    block = exif_block(3, [6])
    raw_profile = b"\nexif\n%8d\n" % len(block) + block.hex().encode()
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    for kind, content in (
        (b"tEXt", b"Raw profile type exif\0" + raw_profile),
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw_profile)),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0en\0x\0" + zlib.compress(xmp)),
        (b"eXIf", block[6:]),
    ):
        assert (load_picture(with_png_chunk(png, kind, content)).rgb == np.rot90(rgb, -1)).all(), kind
    for content in (b"Raw profile type exif\0\nexif\n 4\nzz", b"Raw profile type exif\0"):
        assert (load_picture(with_png_chunk(png, b"tEXt", content)).rgb == rgb).all()


def test_claims_of_size_are_checked_first() -> None:
    header = struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")
    with pytest.raises(LimitError, match="a side is above the limit of 2,097,152 pixels") as error:
        load_picture(data)
    assert one_line(error)
