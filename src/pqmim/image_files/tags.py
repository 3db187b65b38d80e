"""TIFF tags, as TIFF files and EXIF blocks have them: read one by one, so that a broken one spoils no other.

Pillow reads all tags at once, warns of each that is odd and fails on some.
"""

import re
import struct
from contextlib import suppress
from dataclasses import dataclass

ORIENTATION = 0x0112

_EXIF_IFD = 0x8769
_COLOR_SPACE = 0xA001
_INTEROPERABILITY_IFD = 0xA005
_INTEROPERABILITY_INDEX = 0x0001
_ADOBE_RGB = 2
_SRGB = 1
_UNCALIBRATED = 0xFFFF

_ASCII, _RATIONAL, _SIGNED_RATIONAL = 2, 5, 10
_FORMATS = {1: "B", 2: "s", 3: "H", 4: "I", 5: "I", 6: "b", 7: "B", 8: "h", 9: "i", 10: "i", 11: "f", 12: "d"}
_FORMATS |= {13: "I", 16: "Q", 17: "q", 18: "Q"}
_MAX_TAGS = 4096
_XMP_ORIENTATION = re.compile(rb"(tiff:Orientation(?:=[\"']|>)\s*)([1-8])\b")


@dataclass(frozen=True)
class Tag:
    """One entry of an image file directory (IFD).

    Attributes:
        kind: type of the values, as the TIFF specification numbers them.
        count: number of values.
        position: of the first value, in bytes from the start of the file.
    """

    kind: int
    count: int
    position: int


class TagReader:
    """The tags of a TIFF file (classic or BigTIFF) or of an EXIF block.

    Attributes:
        order: "<" or ">", the byte order as `struct` writes it.
        is_big: BigTIFF.
        first: where the first IFD lies, in bytes.
    """

    def __init__(self, data: bytes) -> None:
        """Raises ValueError: no TIFF header."""
        self.data = data
        self.order = {b"II": "<", b"MM": ">"}.get(data[:2], "")
        if not self.order or len(data) < 8:
            raise ValueError("no TIFF header")
        self.is_big = struct.unpack_from(self.order + "H", data, 2)[0] == 43
        if self.is_big and len(data) < 16:
            raise ValueError("no TIFF header")
        self.first: int = struct.unpack_from(self.order + ("Q" if self.is_big else "I"), data, 8 if self.is_big else 4)[
            0
        ]

    def ifd(self, offset: int) -> tuple[dict[int, Tag], int]:
        """Return the tags of one IFD by their numbers, and the offset of the next IFD (0: there is none)."""
        count_format, entry_format, inline = ("Q", "HHQ", 8) if self.is_big else ("H", "HHI", 4)
        pointer_format = "Q" if self.is_big else "I"
        tags: dict[int, Tag] = {}
        try:
            (num_tags,) = struct.unpack_from(self.order + count_format, self.data, offset)
            position = offset + struct.calcsize("=" + count_format)
            entry_size = struct.calcsize("=" + entry_format) + inline
            for _ in range(min(num_tags, _MAX_TAGS)):
                number, kind, count = struct.unpack_from(self.order + entry_format, self.data, position)
                value = position + entry_size - inline
                size = count * struct.calcsize("=" + _FORMATS.get(kind, "B"))
                if kind in (_RATIONAL, _SIGNED_RATIONAL):
                    size *= 2
                if size > inline:
                    (value,) = struct.unpack_from(self.order + pointer_format, self.data, value)
                tags.setdefault(number, Tag(kind, count, value))
                position += entry_size
            (following,) = struct.unpack_from(self.order + pointer_format, self.data, position)
        except struct.error:  # the directory ends before it should
            return tags, 0
        return tags, following

    def numbers(self, tag: Tag | None, limit: int | None = None) -> tuple[float, ...]:
        """Return up to `limit` values of a tag as numbers; none if it is missing, broken or no number."""
        if tag is None or tag.kind not in _FORMATS:
            return ()
        count = tag.count if limit is None else min(tag.count, limit)
        if tag.kind == _ASCII:
            text = self.raw(tag).split(b"\0")[0].strip()
            return (int(text),) if text.isdigit() and len(text) < 10 else ()
        is_ratio = tag.kind in (_RATIONAL, _SIGNED_RATIONAL)
        if count * (1 + is_ratio) > len(self.data):
            return ()
        try:
            values = struct.unpack_from(
                f"{self.order}{count * (1 + is_ratio)}{_FORMATS[tag.kind]}", self.data, tag.position
            )
        except struct.error:
            return ()
        if is_ratio:
            return tuple(a / b if b else 0.0 for a, b in zip(values[::2], values[1::2], strict=True))
        return values

    def integers(self, tag: Tag | None, limit: int | None = None) -> tuple[int, ...]:
        """Return up to `limit` values of a tag as integers; none if it is missing, broken or no finite number."""
        try:
            return tuple(int(number) for number in self.numbers(tag, limit))
        except (OverflowError, ValueError):
            return ()

    def integer(self, tag: Tag | None, default: int) -> int:
        """Return the first value of a tag."""
        return next(iter(self.integers(tag, 1)), default)

    def raw(self, tag: Tag) -> bytes:
        """Return the value of a tag of bytes or text."""
        return self.data[tag.position : tag.position + tag.count]


def orientation_of(exif: bytes) -> int:
    """Return the orientation, 1 to 8, that an EXIF block names; 1 if it names none or is broken."""
    try:
        reader = TagReader(exif.removeprefix(b"Exif\0\0"))
    except ValueError:
        return 1
    return orientation_in(reader, reader.ifd(reader.first)[0])


def orientation_in(reader: TagReader, tags: dict[int, Tag]) -> int:
    """Return the orientation among the tags of an IFD, of whatever type it is: two bytes count as much as a short."""
    values = reader.integers(tags.get(ORIENTATION), 2)
    return next((value for value in values if 1 <= value <= 8), 1)


def orientation_in_xmp(xmp: bytes) -> int:
    """Return the orientation that an XMP packet names, or 1."""
    found = _XMP_ORIENTATION.search(xmp)
    return int(found[2]) if found else 1


def is_adobe_rgb(exif: bytes) -> bool:
    """Whether an EXIF block says that the colors are Adobe RGB, as cameras do that embed no profile."""
    try:
        reader = TagReader(exif.removeprefix(b"Exif\0\0"))
    except ValueError:
        return False
    tags, _ = reader.ifd(reader.first)
    details, _ = reader.ifd(reader.integer(tags.get(_EXIF_IFD), len(exif)))
    color_space = reader.integer(details.get(_COLOR_SPACE), 0)
    if color_space == _ADOBE_RGB:
        return True
    if color_space != _UNCALIBRATED:
        return False
    interoperability, _ = reader.ifd(reader.integer(details.get(_INTEROPERABILITY_IFD), len(exif)))
    index = interoperability.get(_INTEROPERABILITY_INDEX)
    return index is not None and reader.raw(index).startswith(b"R03")


def exif_of_upright(exif: bytes, *, is_srgb: bool) -> bytes:
    """Correct the EXIF block of a picture that has been turned upright; all other bytes stay.

    The orientation becomes 1. A thumbnail that was to be turned with the picture is taken out of the directory.

    Args:
        exif: without the "Exif" before the TIFF header; broken blocks are corrected as far as they can be read.
        is_srgb: whether the picture has become sRGB without a profile that says so; then the EXIF says so.
    """
    try:
        reader = TagReader(exif)
    except ValueError:
        return exif
    data = bytearray(exif)
    tags, thumbnail = reader.ifd(reader.first)
    if orientation_in(reader, tags) != 1 and thumbnail and not reader.is_big:
        (num_tags,) = struct.unpack_from(reader.order + "H", data, reader.first)
        struct.pack_into("4x", data, reader.first + 2 + 12 * num_tags)
    _set_integer(data, reader, tags.get(ORIENTATION), 1)
    if is_srgb:
        details, _ = reader.ifd(reader.integer(tags.get(_EXIF_IFD), len(exif)))
        _set_integer(data, reader, details.get(_COLOR_SPACE), _SRGB)
        interoperability, _ = reader.ifd(reader.integer(details.get(_INTEROPERABILITY_IFD), len(exif)))
        index = interoperability.get(_INTEROPERABILITY_INDEX)
        if index is not None and reader.raw(index).startswith(b"R03"):
            data[index.position : index.position + 3] = b"R98"
    return bytes(data)


def xmp_of_upright(xmp: bytes) -> bytes:
    """Correct the orientation in the XMP packet of a picture that has been turned upright."""
    return _XMP_ORIENTATION.sub(rb"\g<1>1", xmp)


def _set_integer(data: bytearray, reader: TagReader, tag: Tag | None, value: int) -> None:
    """Overwrite the first value of a tag, if that is in its place; value is 0 to 9."""
    if tag is not None and tag.kind in _FORMATS:
        with suppress(struct.error):
            new = str(value).encode() if tag.kind == _ASCII else value
            struct.pack_into(reader.order + _FORMATS[tag.kind], data, tag.position, new)
