"""Images in and out: any picture becomes 8-bit sRGB with an optional alpha channel.

A picture with `alpha` stays a picture with alpha, even if every pixel is opaque. Alpha is coded without loss
by one of Pillow's formats; the color is the business of the codec.
"""

import io
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo

from pqmim.bitstream import MAX_DIMENSION
from pqmim.errors import DamagedFileError, ImageError, LimitError, PqmimError
from pqmim.image_files.color import to_srgb
from pqmim.image_files.icc import convert_with_profile, ink_to_srgb
from pqmim.image_files.opening import one_line, one_line_errors, open_any, open_with_pillow, read_samples, samples_of
from pqmim.image_files.samples import Samples, as_rgb, from_16_bit, turned
from pqmim.image_files.sizes import webp_size
from pqmim.image_files.tags import ORIENTATION
from pqmim.metadata import EXIF_PREFIX, Metadata, of_pillow

DEFAULT_MAX_PIXELS = 100_000_000

ImageLike = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | NDArray[Any]
"""A path, the bytes of an image file, an open binary file, a Pillow image, or an array.

Arrays are bool, uint8 or uint16 over their full range: (H, W) or (H, W, 1) for grey, (H, W, 2) for grey and
alpha, (H, W, 3) for RGB, (H, W, 4) for RGB and alpha.
"""

_MAX_WEBP_SIDE = 16383
_ONE_COLOR = 8
"""Levels by which the colors of one brush may differ after lossy compression."""


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

    The orientation is applied; colors that the file says are others than sRGB, by an ICC profile, by code points
    (CICP: PNG, AVIF, HEIF) or by numbers (PNG), are converted; samples of other widths are scaled. HDR pictures are
    compressed to the range of sRGB, with a warning. Of several frames the first is taken, with a warning.

    HEIC, JPEG XL and raw photos are read if the packages for them are installed.

    A Pillow image that has not been loaded yet is read from its file if that is a PNG, TIFF or AVIF, of which Pillow
    does not keep all that matters.

    Args:
        max_pixels: the limit on width x height; Pillow's own limit does not count.

    Raises:
        PqmimError: out of memory.
        ImageError: not an image, damaged, or of a kind that has no defined meaning as sRGB.
        LimitError: more than `max_pixels` pixels, or a side above `bitstream.MAX_DIMENSION`; found before they are
            decoded.
        TypeError: no image at all.
    """

    def check_size(width: int, height: int) -> None:
        _check_size(width, height, max_pixels=max_pixels)

    if isinstance(image, np.ndarray):
        return _picture_from_array(image, check_size)
    data, suffix = (b"", "") if isinstance(image, Image.Image) else _content(image)
    with one_line_errors():
        if isinstance(image, Image.Image):
            check_size(image.width, image.height)
            file = _file_of(image)
            samples = _samples_of_pillow(image) if file is None else read_samples(file, "", check_size)
        else:
            samples = read_samples(data, suffix, check_size)
        rgb = _to_srgb(samples)
        alpha = samples.alpha
        if samples.orientation != 1:
            rgb = turned(rgb, samples.orientation)
            alpha = None if alpha is None else turned(alpha, samples.orientation)
        return Picture(np.ascontiguousarray(rgb), None if alpha is None else np.ascontiguousarray(alpha))


def load_metadata(image: ImageLike) -> Metadata:
    """Read EXIF, ICC profile and XMP of an image that `load_picture` has read, as they are.

    An array has none. If they are broken beyond reading there are none, with a warning.

    Args:
        image: a binary file is read from its start.
    """
    if isinstance(image, np.ndarray):
        return Metadata()
    try:
        file = _file_of(image) if isinstance(image, Image.Image) else _content(image)[0]
        if file is None:
            assert isinstance(image, Image.Image)
            image.load()
            return of_pillow(image)
        with open_any(file) as opened:
            opened.load()
            return of_pillow(opened)
    except MemoryError as error:
        raise PqmimError("out of memory") from error
    except Exception as error:  # whatever a plugin of Pillow raises
        warnings.warn(f"the metadata cannot be read and are not kept: {one_line(error)}", stacklevel=2)
        return Metadata()


def in_memory(image: ImageLike) -> ImageLike:
    """Return the bytes of an open binary file, which may be a pipe and give them only once; else the image itself."""
    if isinstance(image, (str, os.PathLike, bytes, Image.Image, np.ndarray)):
        return image
    return _content(image)[0]


def load_mask(image: ImageLike, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> NDArray[np.bool_]:
    """Read a mask: bright is True.

    Where a picture is transparent it is not masked. If the alpha channel alone has a shape (all that is visible has
    one color), what is visible is masked, whatever its color.

    Returns:
        (H, W) bool.

    Raises:
        PqmimError: as in `load_picture`.
    """
    picture = load_picture(image, max_pixels=max_pixels)
    brightness = picture.rgb.max(axis=2)
    if picture.alpha is None:
        return np.asarray(brightness > 127)
    visible = picture.rgb[picture.alpha > 127]
    if visible.size and (picture.alpha < 128).any() and np.ptp(visible.astype(int), axis=0).max() <= _ONE_COLOR:
        return np.asarray(picture.alpha > 127)
    return np.asarray(brightness.astype(np.uint16) * picture.alpha > 127 * 255)  # over black


def to_pillow(picture: Picture) -> Image.Image:
    """Return an RGB image, or an RGBA image if the picture has alpha."""
    if picture.alpha is None:
        return Image.fromarray(picture.rgb)
    return Image.fromarray(np.dstack((picture.rgb, picture.alpha)))


def resize_picture(rgb: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """Scale (H, W, 3) uint8 to (height, width, 3), smoothly in both directions."""
    return np.array(Image.fromarray(rgb).resize((width, height), Image.Resampling.LANCZOS))


def save_png(
    image: Image.Image,
    file: str | os.PathLike[str] | BinaryIO,
    *,
    comment: str = "",
    metadata: Metadata = Metadata(),  # noqa: B008 (it is frozen)
) -> None:
    """Write an image as PNG.

    Args:
        comment: kept in a text chunk, keyword "Comment", if not empty.
        metadata: written as they are; XMP that is not UTF-8 is left out with a warning.

    Raises:
        OSError: the file cannot be written.
    """
    text = PngInfo()
    if comment:
        text.add_text("Comment", comment)
    if metadata.xmp:
        try:
            text.add_itxt("XML:com.adobe.xmp", metadata.xmp.decode())
        except UnicodeDecodeError:
            warnings.warn("the XMP is not UTF-8 and cannot be written to a PNG", stacklevel=2)
    exif = EXIF_PREFIX + metadata.exif if metadata.exif else None
    image.save(file, format="PNG", pnginfo=text, exif=exif, icc_profile=metadata.icc)


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
        coded.append(_file_bytes(grey.convert("RGB"), "WEBP", lossless=True, quality=100))
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
        # Checked before any pixel is decoded, so that a small section cannot ask for much memory.
        if webp_size(data) in (None, (width, height)):
            with open_with_pillow(data, ("PNG", "WEBP")) as image:
                expected_mode = "L" if image.format == "PNG" else "RGB"
                is_animated = getattr(image, "is_animated", False)
                if image.size == (width, height) and image.mode == expected_mode and not is_animated:
                    return np.array(image.getchannel(0))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's format plugins raise whatever broken data leads to
        raise DamagedFileError(f"the alpha section cannot be decoded: {one_line(error)}") from error
    raise DamagedFileError("the alpha section does not fit the image")


def _content(image: str | os.PathLike[str] | bytes | BinaryIO) -> tuple[bytes, str]:
    """Return the bytes of a file and the suffix of its name."""
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image), ""
    if not isinstance(image, (str, os.PathLike)) and not hasattr(image, "read"):
        raise TypeError(
            f"a path, bytes, a binary file, a Pillow image or an array is needed, not {type(image).__name__}"
        )
    try:
        if isinstance(image, (str, os.PathLike)):
            path = Path(image)
            return path.read_bytes(), path.suffix.lower()
        with suppress(OSError):  # a pipe has one direction
            image.seek(0)
        data = image.read()
    except MemoryError as error:
        raise PqmimError("out of memory") from error
    except OSError as error:
        raise ImageError(error.strerror or one_line(error)) from error
    except ValueError as error:  # a name with a null byte, a closed file
        raise ImageError(one_line(error)) from error
    if not isinstance(data, bytes):
        raise TypeError("the file must be open in binary mode")
    return data, ""


def _file_of(image: Image.Image) -> bytes | None:
    """Return the file of an image that Pillow has opened and not loaded, None if it is of no further use."""
    if not isinstance(image, ImageFile.ImageFile) or image.format not in ("PNG", "TIFF", "AVIF"):
        return None
    if not image.tile or image.fp is None or image.fp.closed or image.tell() != 0:
        return None
    position = image.fp.tell()
    image.fp.seek(0)
    data = image.fp.read()
    image.fp.seek(position)
    return data


def _samples_of_pillow(image: Image.Image) -> Samples:
    """Return what Pillow knows of an image."""
    image.load()
    samples = samples_of(image)
    try:
        orientation = image.getexif().get(ORIENTATION, samples.orientation)
    except Exception:  # broken metadata does not make a broken picture
        return samples
    if orientation in range(1, 9):
        samples.orientation = int(orientation)
    return samples


def _picture_from_array(array: NDArray[Any], check_size: Callable[[int, int], None]) -> Picture:
    if array.ndim == 2:
        array = array[:, :, np.newaxis]
    if array.ndim != 3 or not 1 <= array.shape[2] <= 4:
        raise ImageError(f"an array must be (H, W) or (H, W, 1 to 4), not {array.shape}")
    check_size(array.shape[1], array.shape[0])
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype == np.uint16:
        array = from_16_bit(array)
    elif array.dtype != np.uint8:
        raise ImageError(f"an array must be bool, uint8 or uint16, not {array.dtype}")
    channels = array.shape[2]
    num_colors = 1 if channels <= 2 else 3
    rgb = np.repeat(array[:, :, :1], 3, axis=2) if num_colors == 1 else array[:, :, :3]
    alpha = array[:, :, -1] if channels > num_colors else None
    return Picture(np.ascontiguousarray(rgb), None if alpha is None else np.ascontiguousarray(alpha))


def _check_size(width: int, height: int, *, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"an image of {width} x {height} has no pixels")
    if max(width, height) > MAX_DIMENSION:
        raise LimitError(f"{width} x {height}: a side is above the limit of {MAX_DIMENSION:,} pixels")
    if width * height > max_pixels:
        raise LimitError(f"{width} x {height} is above the limit of {max_pixels:,} pixels")


def _to_srgb(samples: Samples) -> NDArray[np.uint8]:
    """Return the colors (H, W, 3) in sRGB."""
    if isinstance(samples.colors, Image.Image):
        return ink_to_srgb(samples.colors, samples.profile)
    if samples.profile:
        return convert_with_profile(samples.colors, samples.profile)
    if samples.space is not None:
        return to_srgb(samples.colors, samples.space)
    return as_rgb(samples.colors)


def _file_bytes(image: Image.Image, image_format: Literal["PNG", "WEBP"], **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, format=image_format, **options)
    return file.getvalue()
