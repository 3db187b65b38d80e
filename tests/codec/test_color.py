"""Colors that are not sRGB: ICC profiles, code points, HDR."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from file_makers import GREY, RGB, file_of, gradient, ifd, linear_profile, png_file, psnr, wide_gradient
from numpy.typing import NDArray
from PIL import Image, ImageCms

from pqmim.image_io import load_picture

D65_TO_D50 = np.array(  # Bradford, as ICC.1:2022 annex E gives it
    [[1.047882, 0.022919, -0.050217], [0.029587, 0.990479, -0.017059], [-0.009247, 0.015075, 0.751678]]
)
SRGB_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
P3_XYZ = np.array([[0.486571, 0.265668, 0.198217], [0.228975, 0.691739, 0.079287], [0.0, 0.045113, 1.043944]])
ADOBE_XYZ = np.array([[0.57667, 0.18556, 0.18823], [0.29734, 0.62736, 0.07529], [0.02703, 0.07069, 0.99134]])
BT2020_XYZ = np.array([[0.636958, 0.144617, 0.168881], [0.262700, 0.677998, 0.059302], [0.0, 0.028073, 1.060985]])


def srgb_to_linear(samples: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(samples <= 0.04045, samples / 12.92, ((samples + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(light: NDArray[np.float64]) -> NDArray[np.float64]:
    light = np.clip(light, 0, 1)
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def as_srgb(light: NDArray[np.float64], to_xyz: NDArray[np.float64]) -> NDArray[np.float64]:
    """8-bit sRGB of linear light in some primaries with white D65."""
    return np.rint(255 * linear_to_srgb(light @ (np.linalg.inv(SRGB_XYZ) @ to_xyz).T))


def profile(
    to_xyz: NDArray[np.float64] | None,
    curve: bytes,
    *,
    description: str = "sRGB, or so it says",
    space: bytes = b"RGB ",
) -> bytes:
    """A profile of one curve for all channels and a matrix, or of a grey curve."""

    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(description) + 1) + description.encode() + bytes(90),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1.0, 0.8249),
    }
    if to_xyz is None:
        tags[b"kTRC"] = curve
    else:
        colorants = D65_TO_D50 @ to_xyz
        for i, name in enumerate((b"r", b"g", b"b")):
            tags[name + b"XYZ"] = b"XYZ \0\0\0\0" + fixed(*colorants[:, i])
            tags[name + b"TRC"] = curve
    directory, body = b"", b""
    start = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        directory += name + struct.pack(">II", start + len(body), len(content))
        body += content + b"\0" * (-len(content) % 4)
    size = start + len(body)
    header = struct.pack(">I4sI4s4s4s", size, b"lcms", 0x02400000, b"mntr", space, b"XYZ ") + bytes(12) + b"acsp"
    header = header.ljust(68, b"\0") + fixed(0.9642, 1.0, 0.8249)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + directory + body


def gamma_tag(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def table_tag(curve: Callable[[NDArray[np.float64]], NDArray[np.float64]], count: int) -> bytes:
    points = np.rint(curve(np.linspace(0, 1, count)) * 65535).astype(">u2")
    return b"curv\0\0\0\0" + struct.pack(">I", count) + points.tobytes()


def parametric_tag(kind: int, *parameters: float) -> bytes:
    values = struct.pack(f">{len(parameters)}i", *(round(value * 65536) for value in parameters))
    return b"para\0\0\0\0" + struct.pack(">HH", kind, 0) + values


SRGB_PARAMETERS = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
SRGB_CURVES = {
    "1024 points": table_tag(srgb_to_linear, 1024),
    "4096 points": table_tag(srgb_to_linear, 4096),
    "parametric": parametric_tag(3, *SRGB_PARAMETERS),
    "parametric with offsets": parametric_tag(4, *SRGB_PARAMETERS, 0, 0),
}


@pytest.mark.parametrize("curve", SRGB_CURVES)
def test_srgb_by_any_name_leaves_the_pixels_alone(curve: str) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    icc = profile(SRGB_XYZ, SRGB_CURVES[curve], description="Camera of a vendor")
    assert (load_picture(file_of(Image.fromarray(rgb), "PNG", icc_profile=icc)).rgb == rgb).all()
    grey = Image.fromarray(rgb[:, :, 0])
    for icc_of_grey in (icc, profile(None, SRGB_CURVES[curve], space=b"GRAY")):
        picture = load_picture(file_of(grey, "PNG", icc_profile=icc_of_grey))
        assert (picture.rgb == rgb[:, :, :1]).all()
    wide = wide_gradient()
    assert (load_picture(png_file(wide, RGB, 16, icc_chunk(icc))).rgb == np.rint(wide / 257)).all()


def icc_chunk(icc: bytes) -> tuple[bytes, bytes]:
    return b"iCCP", b"name\0\0" + zlib.compress(icc)


CURVES = {
    "linear": (b"curv" + bytes(8), lambda v: v),
    "gamma 1.8": (gamma_tag(1.8), lambda v: v**1.80078125),
    "gamma 2.2": (gamma_tag(563 / 256), lambda v: v ** (563 / 256)),
    "table": (table_tag(lambda v: v**2, 300), lambda v: v**2),
    "parametric 0": (parametric_tag(0, 1.5), lambda v: v**1.5),
    "parametric 1": (
        parametric_tag(1, 2.0, 1.25, -0.25),
        lambda v: np.where(v >= 0.2, np.maximum(1.25 * v - 0.25, 0) ** 2, 0),
    ),
    "parametric 2": (
        parametric_tag(2, 2.0, 1.0, -0.1, 0.0),
        lambda v: np.where(v >= 0.1, np.maximum(v - 0.1, 0) ** 2, 0),
    ),
    "parametric 3": (parametric_tag(3, *SRGB_PARAMETERS), srgb_to_linear),
}


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("depth", [8, 16])
def test_a_profile_that_is_called_srgb_and_is_not(name: str, depth: int) -> None:
    tag, curve = CURVES[name]
    samples = wide_gradient() >> (16 - depth)
    light = curve(samples / (2**depth - 1))
    for to_xyz in (SRGB_XYZ, P3_XYZ, ADOBE_XYZ):
        picture = load_picture(png_file(samples, RGB, depth, icc_chunk(profile(to_xyz, tag))))
        assert psnr(picture.rgb, as_srgb(light, to_xyz)) > 45
    picture = load_picture(png_file(samples[:, :, 0], GREY, depth, icc_chunk(profile(None, tag, space=b"GRAY"))))
    right = np.rint(255 * linear_to_srgb(light[:, :, :1]))
    assert psnr(picture.rgb, np.repeat(right, 3, axis=2)) > 40


def test_profiles_of_16_bits_lose_no_shadows() -> None:
    shadows = np.arange(65536, dtype=np.uint16).reshape(256, 256) // 16  # to a sixteenth of white, linear
    icc = profile(SRGB_XYZ, CURVES["linear"][0])
    picture = load_picture(png_file(np.dstack([shadows] * 3), RGB, 16, icc_chunk(icc)))
    assert np.abs(picture.rgb[:, :, 0] - np.rint(255 * linear_to_srgb(shadows / 65535))).max() <= 1
    assert len(np.unique(picture.rgb)) == picture.rgb.max() + 1


def test_profiles_are_converted_in_every_format() -> None:
    rgb = np.full((16, 16, 3), 55, np.uint8)  # linear light 55 / 255 is sRGB 128
    for image_format, options in (
        ("JPEG", {"quality": 100}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("AVIF", {"quality": 100}),
    ):
        picture = load_picture(file_of(Image.fromarray(rgb), image_format, icc_profile=linear_profile(), **options))
        assert np.abs(picture.rgb.astype(int) - 128).max() <= 2, image_format


def test_the_profile_of_a_jpeg_2000() -> None:
    data = file_of(Image.fromarray(np.full((16, 16, 3), 55, np.uint8)), "JPEG2000")
    at = data.index(b"colr") - 4
    size = int.from_bytes(data[at : at + 4], "big")
    content = b"colr\2\0\0" + linear_profile()
    header_at = data.index(b"jp2h") - 4
    header_size = int.from_bytes(data[header_at : header_at + 4], "big") + 4 + len(content) - size
    changed = data[:at] + struct.pack(">I", 4 + len(content)) + content + data[at + size :]
    changed = changed[:header_at] + struct.pack(">I", header_size) + changed[header_at + 4 :]
    assert np.abs(load_picture(changed).rgb.astype(int) - 128).max() <= 1


def test_cameras_that_say_adobe_rgb_in_exif_only() -> None:
    rgb = np.array([[[90, 120, 140]]], np.uint8).repeat(8, 0).repeat(8, 1)
    right = as_srgb((rgb / 255) ** (563 / 256), ADOBE_XYZ)
    for color_space, index, is_adobe in (
        (2, b"", True),
        (65535, b"R03\0", True),
        (65535, b"R98\0", False),
        (1, b"", False),
    ):
        details_at = 8 + 2 + 12 + 4
        interoperability_at = details_at + 2 + 24 + 4
        block = b"MM\0*\0\0\0\x08" + ifd({0x8769: (4, [details_at])}, 8, ">")
        block += ifd({0xA001: (3, [color_space]), 0xA005: (4, [interoperability_at])}, details_at, ">")
        block += ifd({1: (2, index)}, interoperability_at, ">")
        for data in (
            file_of(Image.fromarray(rgb), "PNG", exif=block),
            file_of(Image.fromarray(rgb), "WEBP", lossless=True, exif=b"Exif\0\0" + block),
        ):
            picture = load_picture(data)
            assert np.abs(picture.rgb - (right if is_adobe else rgb)).max() <= 1


def nclx(image: Image.Image, primaries: int, transfer: int, **options: int) -> bytes:
    data = file_of(image, "AVIF", quality=100, subsampling="4:4:4", **options)
    at = data.index(b"nclx") + 4
    return data[:at] + struct.pack(">HH", primaries, transfer) + data[at + 4 :]


@pytest.mark.parametrize(
    ("transfer", "curve"),
    [
        (1, srgb_to_linear),  # as browsers show it
        (4, lambda v: v**2.2),
        (5, lambda v: v**2.8),
        (7, lambda v: np.where(v < 4 * 0.0228, v / 4, ((v + 0.1115) / 1.1115) ** (1 / 0.45))),
        (8, lambda v: v),
        (13, srgb_to_linear),
        (14, srgb_to_linear),
        (17, lambda v: 52.37 / 48 * v**2.6),
    ],
)
@pytest.mark.parametrize(("primaries", "to_xyz"), [(1, SRGB_XYZ), (9, BT2020_XYZ), (12, P3_XYZ)])
def test_code_points(
    primaries: int,
    to_xyz: NDArray[np.float64],
    transfer: int,
    curve: Callable[[NDArray[np.float64]], NDArray[np.float64]],
) -> None:
    rgb = gradient(32, 32)
    right = as_srgb(curve(rgb / 255), to_xyz)
    chunk = (b"cICP", bytes([primaries, transfer, 0, 1]))
    assert psnr(load_picture(png_file(rgb, RGB, 8, chunk)).rgb, right) > 45
    decoded = load_picture(nclx(Image.fromarray(rgb), 2, 2)).rgb  # with the losses of AVIF
    picture = load_picture(nclx(Image.fromarray(rgb), primaries, transfer))
    assert psnr(picture.rgb, as_srgb(curve(decoded / 255), to_xyz)) > 45


def test_code_points_of_heic() -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    rgb = np.full((64, 64, 3), (200, 100, 50), np.uint8)
    data = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(rgb)).save(data, quality=95)
    at = data.getvalue().index(b"nclx") + 4
    changed = data.getvalue()[:at] + struct.pack(">HH", 12, 13) + data.getvalue()[at + 4 :]
    right = as_srgb(srgb_to_linear(rgb / 255), P3_XYZ)
    assert np.abs(load_picture(changed).rgb - right).max() <= 4


def test_a_profile_goes_before_code_points_in_avif() -> None:
    image = Image.fromarray(np.full((16, 16, 3), 55, np.uint8))
    data = file_of(image, "AVIF", quality=100, icc_profile=linear_profile())
    assert b"nclx" in data
    at = data.index(b"nclx") + 4
    data = data[:at] + struct.pack(">HH", 12, 13) + data[at + 4 :]
    assert np.abs(load_picture(data).rgb.astype(int) - 128).max() <= 2


def pq(light: NDArray[np.float64]) -> NDArray[np.float64]:
    """SMPTE ST 2084 of luminance in cd/m2."""
    powered = (light / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * powered) / (1 + 18.6875 * powered)) ** 78.84375


def hlg(light: NDArray[np.float64]) -> NDArray[np.float64]:
    """BT.2100 HLG of grey on a display of 1,000 cd/m2."""
    scene = (light / 1000) ** (1 / 1.2)
    logarithmic = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), logarithmic)


@pytest.mark.parametrize(("transfer", "curve"), [(16, pq), (18, hlg)])
def test_hdr_keeps_what_is_no_brighter_than_white(
    transfer: int, curve: Callable[[NDArray[np.float64]], NDArray[np.float64]]
) -> None:
    right = np.arange(0, 256).astype(np.uint8).reshape(16, 16)
    samples = np.rint(curve(203 * srgb_to_linear(right / 255)) * 65535).astype(np.uint16)
    with pytest.warns(UserWarning, match="HDR") as caught:
        picture = load_picture(png_file(np.dstack([samples] * 3), RGB, 16, (b"cICP", bytes([9, transfer, 0, 1]))))
    assert len(caught) == 1
    assert np.abs(picture.rgb.astype(int) - right[:, :, np.newaxis]).max() <= 1


def test_hdr_compresses_what_is_brighter_than_white() -> None:
    luminance = np.geomspace(0.1, 4000, 1024)
    samples = np.rint(pq(luminance) * 65535).astype(np.uint16)[np.newaxis]
    with pytest.warns(UserWarning, match="HDR"):
        grey = (
            load_picture(png_file(np.dstack([samples] * 3), RGB, 16, (b"cICP", b"\1\x10\0\1"))).rgb[0, :, 1].astype(int)
        )
    assert (np.diff(grey) >= 0).all()
    assert grey[-1] == 255
    dark = luminance < 0.5 * 203
    assert np.abs(grey[dark] - 255 * linear_to_srgb(luminance[dark] / 203)).max() <= 1
    assert grey[luminance > 203][0] < 250  # room is left above white


def test_hdr_of_8_bits_in_avif() -> None:
    right = np.full((32, 32, 3), 120, np.uint8)
    level = round(255 * float(pq(203 * srgb_to_linear(np.array(120 / 255)))))
    with pytest.warns(UserWarning, match="HDR"):
        picture = load_picture(nclx(Image.fromarray(np.full_like(right, level)), 9, 16))
    assert np.abs(picture.rgb.astype(int) - 120).max() <= 3


def test_a_grey_photo_with_the_profile_of_a_camera() -> None:
    levels = gradient()[:, :, 1]
    icc = profile(ADOBE_XYZ, gamma_tag(563 / 256))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = load_picture(file_of(Image.fromarray(levels), "TIFF", icc_profile=icc))
    right = np.rint(255 * linear_to_srgb((levels / 255) ** (563 / 256)))
    assert np.abs(picture.rgb - right[:, :, np.newaxis]).max() <= 1


def test_profiles_made_of_tables_are_left_to_little_cms() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    wide = wide_gradient()
    with pytest.warns(UserWarning, match="ICC profile"):
        picture = load_picture(png_file(wide, RGB, 16, icc_chunk(lab)))
    assert (picture.rgb == np.rint(wide / 257)).all()
