"""Files made of boxes (ISO base media files): what AVIF, HEIF and JPEG 2000 say of their pictures.

Pillow leaves the code points of the colors and the clean aperture of AVIF aside, and the profile of JPEG 2000.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_MAX_BOXES = 10_000


@dataclass(frozen=True)
class Box:
    """One box: its kind, and where its content begins and ends in the file, in bytes."""

    kind: bytes
    start: int
    end: int


@dataclass(frozen=True)
class ItemFacts:
    """What an AVIF or HEIF file says of its primary picture.

    Attributes:
        code_points: primaries and transfer after ITU-T H.273, None if it names none.
        clean_aperture: left, top, right, bottom in pixels, before any turn: what is to be seen; None if all is.
    """

    code_points: tuple[int, int] | None = None
    clean_aperture: tuple[int, int, int, int] | None = None


def boxes(data: bytes, start: int, end: int) -> Iterator[Box]:
    """Yield the boxes between two positions, as far as they make sense."""
    for _ in range(_MAX_BOXES):
        if start + 8 > end:
            return
        size, kind = struct.unpack_from(">I4s", data, start)
        head = 8
        if size == 1 and start + 16 <= end:
            (size,) = struct.unpack_from(">Q", data, start + 8)
            head = 16
        elif size == 0:
            size = end - start
        if not head <= size <= end - start:
            return
        yield Box(kind, start + head, start + size)
        start += size


def brands(data: bytes) -> frozenset[bytes]:
    """Return the brands that a file names in its ftyp box, none if it has no such box."""
    first = next(boxes(data, 0, len(data)), None)
    if first is None or first.kind != b"ftyp":
        return frozenset()
    content = data[first.start : min(first.end, first.start + 400)]
    return frozenset(content[i : i + 4] for i in (0, *range(8, len(content), 4)))


def item_facts(data: bytes) -> ItemFacts:
    """Return what an AVIF or HEIF file says of its primary picture; broken boxes say nothing."""
    try:
        return _item_facts(data)
    except (struct.error, IndexError, ZeroDivisionError):
        return ItemFacts()


def without_exif(data: bytes) -> bytes:
    """Return an AVIF file in which the EXIF block goes by another name.

    The picture is turned by boxes of its own, and Pillow fails on some EXIF blocks that are odd elsewhere.
    """
    for info in _inside(data, b"meta", b"iinf"):
        large = data[info.start : info.start + 1] != b"\0"
        for entry in boxes(data, info.start + (8 if large else 6), info.end):
            kind_at = entry.start + 8 + (2 if data[entry.start : entry.start + 1] == b"\3" else 0)
            if entry.kind == b"infe" and data[kind_at : kind_at + 4] == b"Exif":
                data = data[:kind_at] + b"skip" + data[kind_at + 4 :]
    return data


def jpeg2000_profile(data: bytes) -> bytes | None:
    """Return the ICC profile of a JP2 file, None if it has none."""
    for box in _inside(data, b"jp2h", b"colr"):
        if data[box.start : box.start + 1] in (b"\2", b"\3"):
            return data[box.start + 3 : box.end]
    return None


def _inside(data: bytes, *path: bytes) -> list[Box]:
    """Return the boxes at the end of a path of kinds."""
    found = [Box(b"", 0, len(data))]
    for kind in path:
        found = [
            box
            for outer in found
            for box in boxes(data, outer.start + (4 if outer.kind == b"meta" else 0), outer.end)
            if box.kind == kind
        ]
    return found


def _item_facts(data: bytes) -> ItemFacts:
    primary_box = next(iter(_inside(data, b"meta", b"pitm")), None)
    container = next(iter(_inside(data, b"meta", b"iprp", b"ipco")), None)
    if primary_box is None or container is None:
        return ItemFacts()
    is_long = data[primary_box.start] > 0
    (primary,) = struct.unpack_from(">I" if is_long else ">H", data, primary_box.start + 4)
    properties = list(boxes(data, container.start, container.end))
    code_points = clean_aperture = None
    width = height = 0
    for index in _property_indices(data, primary):
        if not 1 <= index <= len(properties):
            continue
        box = properties[index - 1]
        if box.kind == b"ispe":
            width, height = struct.unpack_from(">II", data, box.start + 4)
        elif box.kind == b"colr" and data[box.start : box.start + 4] == b"nclx":
            code_points = struct.unpack_from(">HH", data, box.start + 4)
        elif box.kind == b"clap":
            clean_aperture = struct.unpack_from(">IIIIiIiI", data, box.start)
    return ItemFacts(code_points, _rectangle(clean_aperture, width, height) if clean_aperture else None)


def _property_indices(data: bytes, item: int) -> list[int]:
    """Return the numbers, from 1, of the properties that belong to an item."""
    indices: list[int] = []
    for box in _inside(data, b"meta", b"iprp", b"ipma"):
        version, is_wide = data[box.start], data[box.start + 3] & 1
        (count,) = struct.unpack_from(">I", data, box.start + 4)
        position = box.start + 8
        for _ in range(min(count, _MAX_BOXES)):
            (owner,) = struct.unpack_from(">I" if version else ">H", data, position)
            position += 4 if version else 2
            num_properties = data[position]
            step = 2 if is_wide else 1
            if owner == item:
                for i in range(num_properties):
                    at = position + 1 + i * step
                    indices.append(int.from_bytes(data[at : at + step], "big") & (0x7FFF if is_wide else 0x7F))
            position += 1 + num_properties * step
    return indices


def _rectangle(aperture: tuple[int, ...], width: int, height: int) -> tuple[int, int, int, int] | None:
    """Return left, top, right, bottom of a clean aperture; None if it does not lie in the picture."""
    clean_width, clean_height = aperture[0] // aperture[1], aperture[2] // aperture[3]
    left = round(aperture[4] / aperture[5] + (width - clean_width) / 2)
    top = round(aperture[6] / aperture[7] + (height - clean_height) / 2)
    if clean_width < 1 or clean_height < 1 or left < 0 or top < 0:
        return None
    if left + clean_width > width or top + clean_height > height:
        return None
    return left, top, left + clean_width, top + clean_height
