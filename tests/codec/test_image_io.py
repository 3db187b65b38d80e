"""Images in and out: every mode, orientation, profiles, alpha, and refusals in one line."""

import io
import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from file_makers import GREY, file_of, gradient, linear_profile, one_line, png_file
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms

from pqmim.errors import DamagedFileError, ImageError, LimitError
from pqmim.image_io import (
    DEFAULT_MAX_PIXELS,
    Picture,
    decode_alpha,
    encode_alpha,
    load_picture,
    save_png,
    to_pillow,
)


def test_a_picture_from_every_kind_of_argument(tmp_path: Path) -> None:
    rgb = gradient()
    image = Image.fromarray(rgb)
    path = tmp_path / "picture.png"
    save_png(image, path)
    with path.open("rb") as file:
        for argument in (rgb, image, path, str(path), path.read_bytes(), file):
            picture = load_picture(argument)
            assert picture.alpha is None
            assert (picture.rgb == rgb).all()


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "TIFF", "BMP", "PPM", "JPEG", "JPEG2000", "AVIF", "GIF"])
def test_formats(image_format: str) -> None:
    rgb = gradient()
    picture = load_picture(file_of(Image.fromarray(rgb), image_format))
    assert picture.rgb.shape == rgb.shape
    assert picture.rgb.dtype == np.uint8
    assert picture.alpha is None


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"]
)
def test_modes_of_pillow(mode: str) -> None:
    rgb = np.full((5, 7, 3), 153, np.uint8)  # in Pillow's default palette
    if mode == "1":
        rgb[:] = 255
    image = Image.fromarray(rgb)
    if mode == "LAB":
        image = ImageCms.profileToProfile(
            image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    elif mode in ("La", "PA"):
        image = image.convert("LA" if mode == "La" else "P").convert(mode)
    elif mode == "RGBa":
        image = image.convert("RGBA").convert("RGBa")
    else:
        image = image.convert(mode)
    picture = load_picture(image)
    assert picture.rgb.shape == (5, 7, 3)
    assert np.abs(picture.rgb.astype(int) - rgb).max() <= 3
    if mode.lower() in ("la", "pa", "rgba"):
        assert (picture.alpha == 255).all()
    else:
        assert picture.alpha is None


def test_16_bit_samples_are_scaled_not_clipped() -> None:
    samples = np.linspace(0, 65535, 12 * 20).astype(np.uint16).reshape(12, 20)
    expected = np.rint(samples / 257).astype(np.uint8)
    assert expected.min() == 0
    assert expected.max() == 255
    sources = {
        "PNG": png_file(samples, GREY, 16),
        "TIFF": file_of(Image.fromarray(samples), "TIFF"),
        "I;16": Image.fromarray(samples),
        "I": Image.fromarray(samples.astype(np.int32)),
        "PGM": b"P5 20 12 65535\n" + samples.astype(">u2").tobytes(),
        "array": samples,
    }
    for name, source in sources.items():
        picture = load_picture(source)
        assert (picture.rgb == expected[:, :, np.newaxis]).all(), name
        assert picture.alpha is None


def test_floating_point_samples() -> None:
    samples = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    assert (load_picture(Image.fromarray(samples)).rgb[:, :, 1] == np.arange(256).reshape(16, 16)).all()
    for bad in (samples * 2, samples - 1, np.full((3, 3), np.nan, np.float32)):
        with pytest.raises(ImageError, match="outside 0 to 1"):
            load_picture(Image.fromarray(bad))
    with pytest.raises(ImageError, match="outside 0 to 65535"):
        load_picture(Image.fromarray(np.full((3, 3), 70000, np.int32)))


def test_transparent_color_becomes_alpha() -> None:
    rgb = gradient()
    rgb[3:6, 4:9] = (1, 2, 3)
    hole = np.zeros(rgb.shape[:2], bool)
    hole[3:6, 4:9] = True

    image = Image.fromarray(rgb)
    picture = load_picture(file_of(image, "PNG", transparency=(1, 2, 3)))
    assert picture.alpha is not None
    assert ((picture.alpha == 0) == hole).all()
    assert (picture.rgb == rgb).all()

    palette = Image.fromarray(np.where(hole, 7, 200).astype(np.uint8)).convert("P")
    for image_format in ("PNG", "GIF"):
        alpha = load_picture(file_of(palette, image_format, transparency=7)).alpha
        assert alpha is not None
        assert (alpha[hole] == 0).all()
        assert (alpha[~hole] == 255).all()

    samples = np.where(hole, 1000, 40000).astype(np.uint16)
    picture = load_picture(png_file(samples, GREY, 16, (b"tRNS", (1000).to_bytes(2, "big"))))
    assert picture.alpha is not None
    assert ((picture.alpha == 0) == hole).all()
    assert (picture.rgb[~hole] == 156).all()


@pytest.mark.parametrize("opaque", [True, False])
def test_alpha_comes_back_even_if_opaque(opaque: bool) -> None:
    rgba = np.dstack((gradient(), np.full((24, 37), 255, np.uint8)))
    if not opaque:
        rgba[:, :10, 3] = 77
    for image_format in ("PNG", "WEBP", "TIFF"):
        options = {"lossless": True, "exact": True} if image_format == "WEBP" else {}
        data = file_of(Image.fromarray(rgba), image_format, **options)
        result = to_pillow(load_picture(data))
        if image_format == "WEBP" and opaque:  # WebP itself drops it
            assert result.mode == "RGB"
        else:
            assert result.mode == "RGBA"
            assert (np.array(result) == rgba).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    rgb = gradient()
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = {
        1: rgb,
        2: rgb[:, ::-1],
        3: rgb[::-1, ::-1],
        4: rgb[::-1],
        5: rgb.transpose(1, 0, 2),
        6: np.rot90(rgb, -1),
        7: np.rot90(rgb, 2).transpose(1, 0, 2),
        8: np.rot90(rgb),
    }[orientation]
    picture = load_picture(file_of(Image.fromarray(rgb), "PNG", exif=exif))
    assert (picture.rgb == upright).all()


def test_broken_exif_does_not_matter() -> None:
    rgb = gradient()
    picture = load_picture(file_of(Image.fromarray(rgb), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken"))
    assert (picture.rgb == rgb).all()


def test_profiles_are_converted_to_srgb() -> None:
    grey = np.full((4, 4, 3), 55, np.uint8)  # linear light 55 / 255 is sRGB 128
    for image in (Image.fromarray(grey), Image.fromarray(np.dstack((grey, grey[:, :, :1])))):
        picture = load_picture(file_of(image, "PNG", icc_profile=linear_profile()))
        assert np.abs(picture.rgb.astype(int) - 128).max() <= 1
        assert (picture.alpha is None) == (image.mode == "RGB")
        if picture.alpha is not None:
            assert (picture.alpha == 55).all()


def test_an_srgb_profile_leaves_the_pixels_alone() -> None:
    rgb = gradient()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert (load_picture(file_of(Image.fromarray(rgb), "PNG", icc_profile=srgb)).rgb == rgb).all()


def test_a_profile_that_does_not_fit_is_ignored_with_a_warning() -> None:
    rgb = gradient()
    for image, profile in (
        (Image.fromarray(rgb), b"no profile at all"),
        (Image.fromarray(rgb).convert("CMYK"), linear_profile()),
    ):
        with pytest.warns(UserWarning, match="ICC profile"):
            picture = load_picture(file_of(image, "TIFF", icc_profile=profile))
        assert (picture.rgb == np.array(image.convert("RGB"))).all()


def test_first_frame_with_a_warning() -> None:
    frames = [Image.fromarray(gradient()), Image.fromarray(255 - gradient())]
    for image_format in ("PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if image_format == "WEBP" else {}
        data = file_of(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
        with pytest.warns(UserWarning, match="first"):
            picture = load_picture(data)
        assert (picture.rgb == gradient()).all(), image_format
    data = file_of(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert load_picture(data).rgb.shape == gradient().shape  # a still photo: no warning


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.uint16])
def test_arrays(channels: int, dtype: type[np.generic]) -> None:
    levels = np.random.default_rng(0).integers(0, 2, (4, 6, channels))
    largest = {np.bool_: 1, np.uint8: 255, np.uint16: 65535}[dtype]
    picture = load_picture((levels * largest).astype(dtype)[::-1])
    expected = levels[::-1] * 255
    colors = expected[:, :, : channels if channels >= 3 else 1][:, :, :3]
    assert (picture.rgb == colors).all()
    assert picture.rgb.flags.c_contiguous
    if channels in (2, 4):
        assert picture.alpha is not None
        assert (picture.alpha == expected[:, :, -1]).all()
    else:
        assert picture.alpha is None


@pytest.mark.parametrize(
    ("array", "cause"),
    [
        (np.zeros((4, 4, 5), np.uint8), "must be"),
        (np.zeros(4, np.uint8), "must be"),
        (np.zeros((4, 4)), "float64"),
        (np.zeros((0, 4), np.uint8), "no pixels"),
    ],
)
def test_arrays_that_are_no_images(array: NDArray[Any], cause: str) -> None:
    with pytest.raises(ImageError, match=cause) as error:
        load_picture(array)
    assert one_line(error)


def test_files_are_read_from_their_beginning_and_pipes_as_they_are() -> None:
    rgb = gradient()
    file = io.BytesIO()
    save_png(Image.fromarray(rgb), file)
    assert (load_picture(file).rgb == rgb).all()
    read_end, write_end = os.pipe()
    with os.fdopen(write_end, "wb") as pipe:
        pipe.write(file.getvalue())
    with os.fdopen(read_end, "rb") as pipe:
        assert (load_picture(pipe).rgb == rgb).all()
    assert (load_picture(bytearray(file.getvalue())).rgb == rgb).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("nothing", [None, 5, [[1, 2]], io.StringIO("text")])
def test_what_is_no_image_at_all(nothing: Any) -> None:
    with pytest.raises(TypeError, match=r"needed, not|binary mode"):
        load_picture(nothing)


def test_the_limit_is_checked_before_decoding() -> None:
    image = Image.new("L", (101, 10))
    for source in (image, np.array(image), file_of(image, "PNG")):
        assert load_picture(source, max_pixels=1010).rgb.shape == (10, 101, 3)
        with pytest.raises(LimitError, match="101 x 10"):
            load_picture(source, max_pixels=1009)


def test_large_images_below_the_limit_do_not_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    data = file_of(Image.new("L", (150, 10)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert load_picture(data, max_pixels=1500).rgb.shape == (10, 150, 3)
    assert DEFAULT_MAX_PIXELS == 100_000_000


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    empty = tmp_path / "empty.png"
    empty.touch()
    text = tmp_path / "text.jpg"
    text.write_text("not an image")
    for path, cause in (
        (tmp_path / "missing.png", "No such file"),
        (tmp_path, "directory|Permission"),
        (empty, "not an image"),
        (text, "not an image"),
    ):
        with pytest.raises(ImageError, match=cause) as error:
            load_picture(path)
        assert one_line(error)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "TIFF", "JPEG2000", "AVIF", "BMP"])
def test_damaged_images_are_refused_or_read_but_nothing_else(image_format: str) -> None:
    good = file_of(Image.fromarray(gradient(64, 64)), image_format)
    with pytest.raises(ImageError) as error:
        load_picture(good[: len(good) // 2])
    assert one_line(error)
    rng = np.random.default_rng(0)
    for _ in range(40):
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of some damage and goes on
            with suppress(ImageError, LimitError):
                load_picture(bytes(bad), max_pixels=10_000_000)


def test_the_callers_image_is_left_as_it_was() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(file_of(Image.fromarray(gradient()), "PNG", exif=exif)))
    load_picture(image)
    assert image.size == (37, 24)
    assert image.getexif()[0x0112] == 6


def test_to_pillow() -> None:
    rgb = gradient()
    alpha = rgb[:, :, 0]
    assert (np.array(to_pillow(Picture(rgb))) == rgb).all()
    image = to_pillow(Picture(rgb, alpha))
    assert image.mode == "RGBA"
    assert (np.array(image.getchannel("A")) == alpha).all()


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 256), st.integers(0, 2**32 - 1))
def test_alpha_round_trip(height: int, width: int, num_levels: int, seed: int) -> None:
    alpha = np.random.default_rng(seed).integers(256 - num_levels, 256, (height, width), dtype=np.uint8)
    decoded = decode_alpha(encode_alpha(alpha), width, height)
    assert decoded.dtype == np.uint8
    assert (decoded == alpha).all()


def test_what_alpha_costs() -> None:
    assert encode_alpha(np.full((500, 700), 255, np.uint8)) == b"\xff"
    disk = np.hypot(*np.mgrid[-100:100, -150:150]) < 90
    assert len(encode_alpha((disk * 255).astype(np.uint8))) < 700


def test_alpha_of_a_side_that_webp_cannot_hold() -> None:
    alpha = np.zeros((2, 16384), np.uint8)
    alpha[1, 5000:] = 9
    data = encode_alpha(alpha)
    assert data.startswith(b"\x89PNG")
    assert (decode_alpha(data, 16384, 2) == alpha).all()


def test_alpha_sections_that_are_refused() -> None:
    grey = Image.fromarray(gradient()[:, :, 1])
    frames = [grey.convert("RGB"), Image.new("RGB", grey.size)]
    refused = {
        "empty": b"",
        "garbage": b"garbage",
        "cut short": file_of(grey, "PNG")[:-40],
        "another format": file_of(grey, "JPEG"),
        "another size": file_of(grey.resize((36, 24)), "PNG"),
        "another mode": file_of(grey.convert("RGB"), "PNG"),
        "with alpha": file_of(grey.convert("RGB").convert("RGBA"), "PNG"),
        "animated": file_of(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
    }
    for name, data in refused.items():
        with pytest.raises(DamagedFileError, match="alpha section") as error:
            decode_alpha(data, grey.width, grey.height)
        assert one_line(error), name
