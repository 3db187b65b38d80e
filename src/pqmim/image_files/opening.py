"""The bytes of any picture file become samples of a known meaning."""

import importlib
import io
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin

from pqmim.errors import ImageError, LimitError, PqmimError
from pqmim.image_files.boxes import brands, item_facts, jpeg2000_profile, without_exif
from pqmim.image_files.color import adobe_rgb, cicp_space, gamma_space
from pqmim.image_files.png import SIGNATURE as PNG_SIGNATURE
from pqmim.image_files.png import read_png
from pqmim.image_files.raw import is_raw, read_raw
from pqmim.image_files.samples import Samples, alpha_of, colors_of
from pqmim.image_files.sizes import JXL_CODESTREAM, JXL_CONTAINER, jxl_size, webp_size
from pqmim.image_files.tags import is_adobe_rgb, orientation_in_xmp, orientation_of
from pqmim.image_files.tiff import SIGNATURES as TIFF_SIGNATURES
from pqmim.image_files.tiff import read_tiff

CheckSize = Callable[[int, int], None]

_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"heif", b"mif1", b"msf1"})
_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_JP2_SIGNATURE = b"\0\0\0\x0cjP  \r\n\x87\n"

_pillow_limit = threading.Lock()


def read_samples(data: bytes, suffix: str, check_size: CheckSize) -> Samples:
    """Read a picture file.

    Args:
        data: the file.
        suffix: of its name, in lower case, "" if it has none; it matters only where the content does not tell.
        check_size: raises if an image of that width and height is too large; called before pixels are decoded.

    Raises:
        PqmimError: out of memory.
        ImageError: not an image, damaged, or a picture whose meaning as sRGB is not defined.
        LimitError: too large.
    """
    with one_line_errors():
        if is_raw(data, suffix):
            return read_raw(data, check_size)
        if data.startswith(PNG_SIGNATURE):
            return read_png(data, lambda png: open_with_pillow(png, ("PNG",)), check_size)
        if data.startswith(TIFF_SIGNATURES):
            return read_tiff(data, lambda tiff: open_with_pillow(tiff, ("TIFF",)), check_size)
        if data.startswith((JXL_CODESTREAM, JXL_CONTAINER)):
            return _read_jxl(data, check_size)
        kinds = brands(data)
        if kinds & _AVIF_BRANDS:
            return _read_avif(data, check_size)
        if kinds & _HEIF_BRANDS:
            return _read_heif(data, check_size)
        return _read_other(data, check_size)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn whatever a decoder raises into an error of one line."""
    try:
        yield
    except PqmimError:
        raise
    except MemoryError as error:
        raise PqmimError("out of memory") from error
    except Image.DecompressionBombError as error:
        raise LimitError(one_line(error)) from error
    except Exception as error:  # Pillow's format plugins raise whatever broken data leads to
        raise ImageError(f"damaged image: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """Return the message of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def open_with_pillow(data: bytes, formats: tuple[str, ...] = ()) -> ImageFile.ImageFile:
    """Open an image as `Image.open` does, but for Pillow's limit on its size, which is global to the process.

    Args:
        formats: the only ones that are tried; all if empty.

    Raises:
        ImageError: none of the formats.
        Exception: whatever a plugin raises for a damaged file.
    """
    Image.preinit()  # the common formats first, as Pillow does
    Image.init()
    complaint = ""
    for name in formats or Image.ID:
        factory, accept = Image.OPEN[name]
        is_claimed = False
        try:
            if accept is not None and accept(data[:16]) is not True:
                continue
            is_claimed = accept is not None
            image = _opened(factory, data)
        except (SyntaxError, IndexError, TypeError, struct.error) as error:  # Pillow's ways to say: not this format
            if is_claimed:
                complaint = complaint or one_line(error)
            continue
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            # Pillow checks the number of pixels where it makes room for them: here the room is there already.
            image.im = Image.new(image.mode, image._tile_size).im
        return image
    raise ImageError(f"damaged image: {complaint}" if complaint else "not an image that Pillow can read")


def _opened(factory: Callable[[Any, str], ImageFile.ImageFile], data: bytes) -> ImageFile.ImageFile:
    """Open an image with a plugin of Pillow. The limit is lifted for a moment, if the plugin itself looks at it."""
    try:
        return factory(io.BytesIO(data), "")
    except Image.DecompressionBombError:
        with _pillow_limit:
            limit = Image.MAX_IMAGE_PIXELS
            Image.MAX_IMAGE_PIXELS = None
            try:
                return factory(io.BytesIO(data), "")
            finally:
                Image.MAX_IMAGE_PIXELS = limit


def _read_other(data: bytes, check_size: CheckSize) -> Samples:
    """Read an image of which Pillow understands all that matters, or nearly so."""
    size = webp_size(data)
    if size is not None:
        check_size(*size)
    with open_with_pillow(data) as image:
        _prepare(image, check_size)
        samples = samples_of(image)
        if image.format == "XBM" and isinstance(samples.colors, np.ndarray):  # a 1 is ink
            samples.colors = 255 - samples.colors
        if image.format == "FITS" and image.mode != "L":
            raise ImageError("a FITS file: which numbers are black and white is not defined")
    if data.startswith(_JP2_SIGNATURE):
        samples.profile = jpeg2000_profile(data)
    return samples


def _read_avif(data: bytes, check_size: CheckSize) -> Samples:
    facts = item_facts(data)
    with open_with_pillow(without_exif(data), ("AVIF",)) as image:
        _prepare(image, check_size)
        samples = samples_of(image)
    if facts.clean_aperture is not None:
        left, top, right, bottom = facts.clean_aperture
        assert isinstance(samples.colors, np.ndarray)
        samples.colors = samples.colors[top:bottom, left:right]
        samples.alpha = None if samples.alpha is None else samples.alpha[top:bottom, left:right]
    if samples.profile is None and facts.code_points is not None:
        samples.space = cicp_space(*facts.code_points)
    return samples


def open_any(data: bytes) -> ImageFile.ImageFile:
    """Open a picture file with whatever plugin reads it, for what the plugin says of it besides the pixels.

    Raises:
        ImageError: none of the formats, or the package for it is not installed.
        Exception: whatever a plugin raises for a damaged file.
    """
    if data.startswith((JXL_CODESTREAM, JXL_CONTAINER)):
        return _opened(_jxl_factory(), data)
    kinds = brands(data)
    return _open_heif(data) if kinds & _HEIF_BRANDS and not kinds & _AVIF_BRANDS else open_with_pillow(data)


def _open_heif(data: bytes) -> ImageFile.ImageFile:
    try:
        plugin = importlib.import_module("pillow_heif.as_plugin")
    except ImportError:
        raise ImageError("a HEIC picture; to read those, run: pip install 'pqmim[heif]'") from None
    try:
        return _opened(plugin.HeifImageFile, data)
    except SyntaxError as error:
        raise ImageError(f"damaged image: {one_line(error)}") from error


def _read_heif(data: bytes, check_size: CheckSize) -> Samples:
    with _open_heif(data) as image:
        check_size(*image.size)
        image.load()
        samples = samples_of(image)
    samples.orientation = 1  # libheif turns pictures itself, by boxes of the file; EXIF does not count
    return samples


def _jxl_factory() -> Callable[[Any, str], ImageFile.ImageFile]:
    try:
        factory: Callable[[Any, str], ImageFile.ImageFile] = importlib.import_module(
            "pillow_jxl.JpegXLImagePlugin"
        ).JXLImageFile
    except ImportError:
        raise ImageError("a JPEG XL picture; to read those, run: pip install 'pqmim[jxl]'") from None
    return factory


def _read_jxl(data: bytes, check_size: CheckSize) -> Samples:
    factory = _jxl_factory()
    size = jxl_size(data)
    if size is None:
        raise ImageError("damaged image: JPEG XL without a header")
    check_size(*size)
    with _opened(factory, data) as image:
        _prepare(image, check_size)
        samples = samples_of(image)
    samples.orientation = 1  # libjxl turns pictures itself
    return samples


def _prepare(image: ImageFile.ImageFile, check_size: CheckSize) -> None:
    """Check the size, warn of further frames, decode the pixels."""
    check_size(*image.size)
    # An MPO is a still photo with a preview or depth map behind it, not a sequence.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        warnings.warn("the image has several frames; only the first is coded", stacklevel=2)
    image.load()
    check_size(*image.size)  # an icon is as large as what it holds


def samples_of(image: Image.Image) -> Samples:
    """Return the samples of a loaded image, and what Pillow knows of them."""
    samples = Samples(colors_of(image), alpha_of(image), image.info.get("icc_profile"))
    exif = image.info.get("exif", b"")
    xmp = image.info.get("xmp", b"")
    if isinstance(exif, bytes):
        samples.orientation = orientation_of(exif)
        if samples.profile is None and is_adobe_rgb(exif):
            samples.space = adobe_rgb()
    code_points = image.info.get("nclx_profile")  # as pillow-heif calls them
    if samples.profile is None and isinstance(code_points, dict):
        samples.space = cicp_space(code_points["color_primaries"], code_points["transfer_characteristics"])
    if samples.profile is None and "gamma" in image.info and "srgb" not in image.info:
        samples.space = gamma_space(image.info["gamma"], image.info.get("chromaticity"))
    if samples.orientation == 1 and not exif and isinstance(xmp, bytes):
        samples.orientation = orientation_in_xmp(xmp)
    return samples
