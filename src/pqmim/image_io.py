"""Images in and out: whatever Pillow opens becomes 8-bit sRGB with an optional alpha channel.

A picture with `alpha` stays a picture with alpha, even if every pixel is opaque. Alpha is coded without loss
by one of Pillow's formats; the color is the business of the codec.
"""

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from pqmim.errors import DamagedFileError, ImageError, LimitError

DEFAULT_MAX_PIXELS = 100_000_000

ImageLike = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | NDArray[Any]
"""A path, the bytes of an image file, an open binary file, a Pillow image, or an array.

Arrays are bool, uint8 or uint16 over their full range: (H, W) or (H, W, 1) for grey, (H, W, 2) for grey and
alpha, (H, W, 3) for RGB, (H, W, 4) for RGB and alpha.
"""

_MAX_WEBP_SIDE = 16383


@dataclass(frozen=True, eq=False)
class Picture:
    """An image as the codec wants it.

    Attributes:
        rgb: (H, W, 3) uint8, sRGB.
        alpha: (H, W) uint8, 255 is opaque; not multiplied into `rgb`. None if the image has no alpha channel.
    """

    rgb: NDArray[np.uint8]
    alpha: NDArray[np.uint8] | None = None


def load_picture(image: ImageLike, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Picture:
    """Read an image: upright, 8-bit, sRGB.

    EXIF orientation is applied, other ICC profiles are converted, 16-bit samples scaled. Of several frames
    the first is taken, with a warning.

    Raises:
        ImageError: not an image, damaged, or of a kind that has no defined meaning as sRGB.
        LimitError: more than `max_pixels` pixels; found before they are decoded.
    """
    if isinstance(image, np.ndarray):
        return _picture_from_array(image, max_pixels=max_pixels)
    if isinstance(image, Image.Image):
        return _picture_from_pillow(image, max_pixels=max_pixels)
    try:
        if isinstance(image, bytes):
            file: BinaryIO = io.BytesIO(image)
        elif isinstance(image, (str, os.PathLike)):
            # Read at once, so that no file stays open in Pillow's lazy loader.
            file = io.BytesIO(Path(image).read_bytes())
        else:
            file = image
        with _without_bomb_warning():
            opened = Image.open(file)
    except UnidentifiedImageError:
        raise ImageError("not an image that Pillow can read") from None
    except Image.DecompressionBombError:
        # Pillow's own limit is global to the process; we leave it where the user has it.
        raise LimitError("more pixels than PIL.Image.MAX_IMAGE_PIXELS allows") from None
    except OSError as error:
        raise ImageError(error.strerror or _one_line(error)) from error
    except Exception as error:  # Pillow's format plugins raise whatever a broken header leads to
        raise ImageError(f"damaged image: {_one_line(error)}") from error
    with opened:
        return _picture_from_pillow(opened, max_pixels=max_pixels)


def to_pillow(picture: Picture) -> Image.Image:
    """Return an RGB image, or an RGBA image if the picture has alpha."""
    if picture.alpha is None:
        return Image.fromarray(picture.rgb)
    return Image.fromarray(np.dstack((picture.rgb, picture.alpha)))


def resize_picture(rgb: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """Scale (H, W, 3) uint8 to (height, width, 3), smoothly in both directions."""
    return np.array(Image.fromarray(rgb).resize((width, height), Image.Resampling.LANCZOS))


def save_png(image: Image.Image, file: str | os.PathLike[str] | BinaryIO, *, comment: str = "") -> None:
    """Write an image as PNG.

    Args:
        comment: kept in a text chunk, keyword "Comment", if not empty.

    Raises:
        OSError: the file cannot be written.
    """
    text = PngInfo()
    if comment:
        text.add_text("Comment", comment)
    image.save(file, format="PNG", pnginfo=text)


def encode_alpha(alpha: NDArray[np.uint8]) -> bytes:
    """Code an alpha channel without loss.

    One byte if all pixels have one value; otherwise lossless WebP or 8-bit grey PNG, whichever is smaller.

    Args:
        alpha: (H, W) uint8.
    """
    if (alpha == alpha[0, 0]).all():
        return bytes([alpha[0, 0]])
    grey = Image.fromarray(alpha)
    coded = [_file_bytes(grey, "PNG", optimize=True)]
    if max(grey.size) <= _MAX_WEBP_SIDE:
        coded.append(_file_bytes(grey.convert("RGB"), "WEBP", lossless=True))
    return min(coded, key=len)


def decode_alpha(data: bytes, width: int, height: int) -> NDArray[np.uint8]:
    """Decode an alpha channel.

    Returns:
        (height, width) uint8.

    Raises:
        DamagedFileError: anything but the output of `encode_alpha` for this size.
    """
    if len(data) == 1:
        return np.full((height, width), data[0], np.uint8)
    try:
        with _without_bomb_warning(), Image.open(io.BytesIO(data), formats=("PNG", "WEBP")) as image:
            expected_mode = "L" if image.format == "PNG" else "RGB"
            # Checked before any pixel is decoded, so that a small section cannot ask for much memory.
            if image.size == (width, height) and image.mode == expected_mode and not _is_animated(image):
                return np.array(image.getchannel(0))
    except Exception as error:  # Pillow's format plugins raise whatever broken data leads to
        raise DamagedFileError(f"the alpha section cannot be decoded: {_one_line(error)}") from error
    raise DamagedFileError("the alpha section does not fit the image")


def _picture_from_array(array: NDArray[Any], *, max_pixels: int) -> Picture:
    if array.ndim == 2:
        array = array[:, :, np.newaxis]
    if array.ndim != 3 or not 1 <= array.shape[2] <= 4:
        raise ImageError(f"an array must be (H, W) or (H, W, 1 to 4), not {array.shape}")
    _check_size(array.shape[1], array.shape[0], max_pixels=max_pixels)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype == np.uint16:
        array = _from_16_bit(array)
    elif array.dtype != np.uint8:
        raise ImageError(f"an array must be bool, uint8 or uint16, not {array.dtype}")
    channels = array.shape[2]
    num_colors = 1 if channels <= 2 else 3
    rgb = np.repeat(array[:, :, :1], 3, axis=2) if num_colors == 1 else array[:, :, :3]
    alpha = array[:, :, -1] if channels > num_colors else None
    return Picture(np.ascontiguousarray(rgb), None if alpha is None else np.ascontiguousarray(alpha))


def _picture_from_pillow(image: Image.Image, *, max_pixels: int) -> Picture:
    _check_size(image.width, image.height, max_pixels=max_pixels)
    try:
        # An MPO is a still photo with a preview or depth map behind it, not a sequence.
        if _is_animated(image) and image.format != "MPO":
            warnings.warn("the image has several frames; only the first is coded", stacklevel=3)
        image.load()
        image = _upright(image)
        alpha = _alpha_of(image)
        rgb = np.array(_to_srgb(image))
    except ImageError:
        raise
    except Exception as error:  # Pillow's format plugins raise whatever broken data leads to
        raise ImageError(f"damaged image: {_one_line(error)}") from error
    return Picture(rgb, alpha)


def _check_size(width: int, height: int, *, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"an image of {width} x {height} has no pixels")
    if width * height > max_pixels:
        raise LimitError(f"{width} x {height} is above the limit of {max_pixels:,} pixels")


def _upright(image: Image.Image) -> Image.Image:
    """Apply EXIF orientation."""
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # broken metadata does not make a broken picture
        return image
    return image if orientation == 1 else ImageOps.exif_transpose(image)


def _alpha_of(image: Image.Image) -> NDArray[np.uint8] | None:
    """Return alpha (H, W) uint8, or None if the image has no alpha channel and no transparent color."""
    if not image.has_transparency_data:
        return None
    if image.mode.startswith("I"):
        # A 16-bit grey PNG may name one transparent level, which Pillow does not convert.
        samples = np.array(image)
        return np.where(samples == image.info["transparency"], 0, 255).astype(np.uint8)
    if image.mode == "La":
        image = image.convert("LA")
    return np.array(image.convert("RGBA").getchannel("A"))


def _to_srgb(image: Image.Image) -> Image.Image:
    """Return the colors as an 8-bit RGB image in sRGB."""
    icc = image.info.get("icc_profile")
    image = _to_8_bit_colors(image)
    if image.mode == "LAB":  # a color space of its own, with no need of a profile
        return _convert_profile(image, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")))
    if icc:
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
            # sRGB under any of its names: leave the pixels exactly as they are.
            if image.mode == "RGB" and "srgb" in ImageCms.getProfileDescription(profile).lower():
                return image
            return _convert_profile(image, profile)
        except (ImageCms.PyCMSError, OSError):
            warnings.warn("the ICC profile does not fit the image and is ignored", stacklevel=4)
    return image if image.mode == "RGB" else image.convert("RGB")


def _convert_profile(image: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    srgb = ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB")
    assert converted is not None  # None is for inPlace=True only
    return converted


def _to_8_bit_colors(image: Image.Image) -> Image.Image:
    """Return an image of mode L, RGB, CMYK or LAB, the modes that ICC profiles are about, without alpha."""
    if image.mode in ("L", "RGB", "CMYK", "LAB"):
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray(_from_16_bit(np.array(image)))
    if image.mode == "I":  # 32 bits wide, but its usual content is 16-bit grey
        samples = np.array(image)
        if samples.min() < 0 or samples.max() > 65535:
            raise ImageError("32-bit integer samples outside 0 to 65535")
        return Image.fromarray(_from_16_bit(samples.astype(np.uint16)))
    if image.mode == "F":
        samples = np.array(image)
        if not (samples.min() >= 0 and samples.max() <= 1):  # also refuses NaN
            raise ImageError("floating-point samples outside 0 to 1")
        return Image.fromarray(np.rint(samples * 255).astype(np.uint8))
    if image.mode == "La":  # Pillow undoes the multiplication by alpha only on the way to LA and RGBA
        image = image.convert("LA")
    elif image.mode == "RGBa":
        image = image.convert("RGBA")
    return image.convert("L" if image.mode in ("1", "LA") else "RGB")


def _from_16_bit(samples: NDArray[Any]) -> NDArray[np.uint8]:
    """Scale uint16 samples to the nearest of 256 levels: 65535 becomes 255."""
    return ((samples.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _file_bytes(image: Image.Image, image_format: Literal["PNG", "WEBP"], **options: bool) -> bytes:
    file = io.BytesIO()
    image.save(file, format=image_format, **options)
    return file.getvalue()


def _is_animated(image: Image.Image) -> bool:
    return bool(getattr(image, "is_animated", False))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _without_bomb_warning() -> Iterator[None]:
    """Silence Pillow's warning about large images: `max_pixels` is our limit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield
