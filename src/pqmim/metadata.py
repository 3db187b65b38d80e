"""What a .pqm file keeps of a picture besides its pixels, if it is asked to: EXIF, XMP and the ICC profile.

The codec's pixels are upright sRGB whatever is kept. The profile is for the way back: a decoded picture may be
converted to it, see `in_profile`. The packed form is described in docs/format.md.
"""

import io
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageCms

from pqmim.errors import DamagedFileError, ImageError, UnsupportedFileError

MAX_BYTES = 1 << 22
"""Most bytes of all metadata of a file, packed or not."""
MAX_RATIO = 64
"""Most bytes of metadata for each byte of the section, so that a small file cannot ask for much memory."""
EXIF_PREFIX = b"Exif\0\0"
"""What stands before the EXIF block in JPEG, and now and then elsewhere."""

_KINDS = {1: "exif", 2: "icc", 3: "xmp"}
_VARINT_BITS = 7 * 4
_MAX_MEAN_LOSS = 1.0
"""Levels that colors may change by, on average, on the way to a profile and back."""
_TIFF_TEXTS = (0x010E, 0x010F, 0x0110, 0x0112, 0x011A, 0x011B, 0x0128, 0x0131, 0x0132, 0x013B, 0x8298)
"""Tags of a TIFF that describe the picture: what it shows, camera, orientation, resolution, software, date, artist,
copyright. The others describe the file."""


@dataclass(frozen=True)
class Metadata:
    """Metadata of a picture, each as its own standard has it; None where there is none.

    Attributes:
        exif: from the TIFF header on. The orientation in it is that of the original file, and pixels are upright.
        icc: profile of the original's colors.
        xmp: packet, as a rule UTF-8.
    """

    exif: bytes | None = None
    icc: bytes | None = None
    xmp: bytes | None = None

    def __bool__(self) -> bool:
        return any((self.exif, self.icc, self.xmp))


def of_pillow(image: Image.Image) -> Metadata:
    """Return the metadata that Pillow knows of an image, which must be loaded: they may stand behind the pixels."""
    found = {name: image.info.get(name) for name in ("exif", "icc_profile", "xmp")}
    if image.format == "TIFF":
        found["exif"] = _tiff_exif(image)
    exif, icc, xmp = (value if isinstance(value, bytes) and value else None for value in found.values())
    return Metadata(exif.removeprefix(EXIF_PREFIX) or None if exif else None, icc, xmp)


def pack(metadata: Metadata) -> bytes:
    """Return the bytes of a metadata section, none if there are no metadata.

    Raises:
        ImageError: more than MAX_BYTES.
    """
    items = b""
    for kind, name in _KINDS.items():
        content = getattr(metadata, name)
        if content:
            items += bytes([kind]) + _varint(len(content)) + content
    if not items:
        return b""
    section = zlib.compress(items, 9)
    if len(items) > MAX_RATIO * len(section):
        # Without references to earlier bytes a bit stands for a byte at most.
        coder = zlib.compressobj(9, zlib.DEFLATED, strategy=zlib.Z_HUFFMAN_ONLY)
        section = coder.compress(items) + coder.flush()
    if max(len(items), len(section)) > MAX_BYTES:
        raise ImageError(f"{len(items):,} bytes of metadata cannot be kept; the limit is {MAX_BYTES:,}")
    return section


def unpack(section: bytes) -> Metadata:
    """Read a metadata section.

    Raises:
        DamagedFileError: it is no such section, or inflates to more than MAX_BYTES or MAX_RATIO times its size.
        UnsupportedFileError: it has items of another kind.
    """
    limit = min(MAX_BYTES, MAX_RATIO * len(section))
    coder = zlib.decompressobj()
    try:
        items = coder.decompress(section, limit + 1)
    except zlib.error as error:
        raise DamagedFileError(f"the metadata section cannot be inflated: {error}") from error
    if len(items) > limit:
        raise DamagedFileError(f"the metadata section inflates to more than {limit:,} bytes")
    if not coder.eof or coder.unused_data:
        raise DamagedFileError("the metadata section does not end where its data do")
    return _read_items(items)


def in_profile(image: Image.Image, icc: bytes, *, is_grey_allowed: bool = True) -> Image.Image | None:
    """Convert an sRGB picture to the colors of a profile.

    Args:
        image: RGB or RGBA.
        is_grey_allowed: whether the result may be grey.

    Returns:
        RGB or, of a grey profile, L; with alpha as the image. Where no color changes by more than a level, the image
        as it is. None if the profile is broken, is neither RGB nor grey, leads in one direction only, or has no room
        for the colors of the picture: they must come back with a mean error of at most one level.
    """
    rgb = image.convert("RGB")
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        mode = {"RGB": "RGB", "GRAY": "L"}.get(profile.profile.xcolor_space.strip())
        if mode is None or (mode == "L" and not is_grey_allowed):
            return None
        srgb = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(rgb, srgb, profile, outputMode=mode)
        assert converted is not None  # None is for inPlace=True only
        back = ImageCms.profileToProfile(converted, profile, srgb, outputMode="RGB")
        assert back is not None
    except (ImageCms.PyCMSError, OSError):
        return None
    if float(np.abs(_signed(back) - _signed(rgb)).mean()) > _MAX_MEAN_LOSS:
        return None
    if mode == "RGB" and np.abs(_signed(converted) - _signed(rgb)).max() <= 1:
        return image
    if image.mode == "RGBA":
        converted.putalpha(image.getchannel("A"))
    return converted


def _signed(image: Image.Image) -> "np.ndarray[tuple[int, ...], np.dtype[np.int16]]":
    return np.asarray(image).astype(np.int16)


def _tiff_exif(image: Image.Image) -> bytes:
    """Return as EXIF what describes the picture among the tags of a TIFF."""
    tags, exif = image.getexif(), Image.Exif()
    for number in _TIFF_TEXTS:
        if number in tags:
            exif[number] = tags[number]
    for ifd in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
        if ifd in tags:
            exif[ifd] = tags.get_ifd(ifd)
    return exif.tobytes() if len(exif) else b""


def _read_items(items: bytes) -> Metadata:
    found: dict[str, bytes] = {}
    position = last_kind = 0
    while position < len(items):
        kind = items[position]
        length, start = _read_varint(items, position + 1)
        position = start + length
        if kind not in _KINDS:
            raise UnsupportedFileError(f"unknown kind of metadata {kind}; a newer release may read this file")
        if kind <= last_kind:
            raise DamagedFileError("the items of the metadata section are not in order")
        if not length or position > len(items):
            raise DamagedFileError("an item of the metadata section is empty or cut")
        found[_KINDS[kind]] = items[start:position]
        last_kind = kind
    if not found:
        raise DamagedFileError("the metadata section has no items")
    return Metadata(**found)


def _varint(value: int) -> bytes:
    groups = bytearray()
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def _read_varint(items: bytes, position: int) -> tuple[int, int]:
    """Return an integer and where it ends."""
    value = 0
    for shift in range(0, _VARINT_BITS, 7):
        if position >= len(items):
            break
        byte = items[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise DamagedFileError("a length in the metadata section is cut or too long")
