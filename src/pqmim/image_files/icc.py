"""ICC profiles: which of them are sRGB, and conversion of the others."""

import io
import struct
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from pqmim.image_files.color import ColorSpace, Curve, to_srgb, xyz_d50_to_srgb
from pqmim.image_files.samples import as_rgb, from_16_bit

_MISFIT = "the ICC profile does not fit the image and is ignored"


def convert_with_profile(samples: NDArray[Any], icc: bytes) -> NDArray[np.uint8]:
    """Convert grey or RGB samples to sRGB.

    A profile that is sRGB, whoever made it and whatever it is called, leaves 8-bit samples exactly as they are.
    One that does not fit the picture is ignored with a warning.

    Args:
        samples: (H, W, 1) or (H, W, 3) uint8 or uint16, full range.
        icc: the profile.

    Returns:
        (H, W, 3) uint8.
    """
    channels = samples.shape[2]
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        if channels == 1 and profile.profile.xcolor_space.strip() == "RGB":
            samples = np.repeat(samples, 3, axis=2)  # grey photos often carry the profile of the camera's colors
        mode = "L" if samples.shape[2] == 1 else "RGB"
        if _is_srgb(profile, mode):
            return as_rgb(samples)
        if samples.dtype == np.uint16:
            space = matrix_space(icc)
            if space is not None:
                return to_srgb(samples, space)
            samples = from_16_bit(samples)
        return np.array(_converted(Image.fromarray(samples[:, :, 0] if mode == "L" else samples), profile))
    except (ImageCms.PyCMSError, OSError):
        warnings.warn(_MISFIT, stacklevel=2)
        return as_rgb(samples)


def ink_to_srgb(image: Image.Image, icc: bytes | None) -> NDArray[np.uint8]:
    """Convert an image of mode CMYK or LAB to sRGB, (H, W, 3) uint8; a profile that does not fit is ignored."""
    if image.mode == "LAB":  # a color space of its own, with no need of a profile
        return np.array(_converted(image, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))))
    if icc:
        try:
            return np.array(_converted(image, ImageCms.ImageCmsProfile(io.BytesIO(icc))))
        except (ImageCms.PyCMSError, OSError):
            warnings.warn(_MISFIT, stacklevel=2)
    return np.array(image.convert("RGB"))


def matrix_space(icc: bytes) -> ColorSpace | None:
    """Return the color space of a profile that is made of curves and a matrix, None for other profiles.

    Little CMS does this as well, but Pillow hands it 8-bit samples only.
    """
    try:
        tags = _profile_tags(icc)
        if icc[16:20] == b"GRAY" and b"kTRC" in tags and icc[20:24] == b"XYZ ":
            curve = _curve(tags[b"kTRC"])
            return ColorSpace((curve, curve, curve), np.eye(3))
        if icc[16:20] != b"RGB " or b"A2B0" in tags or icc[20:24] != b"XYZ ":
            return None
        colorants = np.stack([_xyz(tags[name]) for name in (b"rXYZ", b"gXYZ", b"bXYZ")], axis=1)
        red, green, blue = (_curve(tags[name]) for name in (b"rTRC", b"gTRC", b"bTRC"))
    except (KeyError, ValueError, struct.error):
        return None
    return ColorSpace((red, green, blue), xyz_d50_to_srgb() @ colorants)


def _converted(
    image: Image.Image, profile: ImageCms.ImageCmsProfile, intent: ImageCms.Intent = ImageCms.Intent.PERCEPTUAL
) -> Image.Image:
    """Return an image of mode L, RGB, CMYK or LAB as RGB. Raises PyCMSError: the profile does not fit."""
    srgb = ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, profile, srgb, renderingIntent=intent, outputMode="RGB")
    assert converted is not None  # None is for inPlace=True only
    return converted


def _is_srgb(profile: ImageCms.ImageCmsProfile, mode: str) -> bool:
    """Whether a profile takes every color to the same color of sRGB, within one level."""
    if mode == "L":
        colors = np.arange(256, dtype=np.uint8)[np.newaxis]
    else:
        ramp = np.arange(256)[:, np.newaxis] * np.array([[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]])[:, np.newaxis]
        cube = np.stack(np.meshgrid(*[np.arange(0, 256, 51)] * 3, indexing="ij"), axis=-1)
        colors = np.concatenate((ramp.reshape(1, -1, 3), cube.reshape(1, -1, 3)), axis=1).astype(np.uint8)
    converted = np.asarray(_converted(Image.fromarray(colors), profile, ImageCms.Intent.RELATIVE_COLORIMETRIC))
    expected = colors[:, :, np.newaxis] if mode == "L" else colors
    return bool(np.abs(converted.astype(int) - expected).max() <= 1)


def _profile_tags(icc: bytes) -> dict[bytes, bytes]:
    (count,) = struct.unpack_from(">I", icc, 128)
    tags = {}
    for i in range(min(count, 1000)):
        name, offset, size = struct.unpack_from(">4sII", icc, 132 + 12 * i)
        tags[name] = icc[offset : offset + size]
    return tags


def _xyz(tag: bytes) -> NDArray[np.float64]:
    return np.array(struct.unpack_from(">3i", tag, 8)) / 65536


def _curve(tag: bytes) -> Curve:
    """Return the curve of a tag of type "curv" or "para". Raises ValueError: another type."""
    if tag[:4] == b"curv":
        (count,) = struct.unpack_from(">I", tag, 8)
        if count == 0:
            return lambda samples: samples
        points = np.array(struct.unpack_from(f">{count}H", tag, 12))
        if count == 1:
            exponent = float(points[0]) / 256
            return lambda samples: samples**exponent
        table = points / 65535
        return lambda samples: np.interp(samples, np.linspace(0, 1, count), table)
    if tag[:4] != b"para":
        raise ValueError("unknown type of curve")
    (kind,) = struct.unpack_from(">H", tag, 8)
    num_parameters = (1, 3, 4, 5, 7)[kind] if kind < 5 else 0
    if not num_parameters:
        raise ValueError("unknown kind of parametric curve")
    return _parametric_curve(kind, [value / 65536 for value in struct.unpack_from(f">{num_parameters}i", tag, 12)])


def _parametric_curve(kind: int, parameters: list[float]) -> Curve:
    """Return a parametric curve as ICC.1:2022, table 68, numbers them: a power law above a break, a line below."""
    g, a, b, c, d, e, f = (parameters + [0.0] * 7)[:7]
    if kind == 0:
        a = 1.0
    elif kind == 1:  # zero below the break
        d = -b / a if a else 0.0
    elif kind == 2:  # constant c below the break
        d, e, f, c = (-b / a if a else 0.0), c, c, 0.0
    # Kinds 3 and 4 are the general form; kind 3 has no offsets.

    def curve(samples: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(samples >= d, np.maximum(a * samples + b, 0) ** g + e, c * samples + f)

    return curve
