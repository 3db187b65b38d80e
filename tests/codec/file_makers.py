"""Picture files that Pillow does not write: PNG and TIFF of any kind of samples, boxes of AVIF."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
"""Color types of PNG."""
NONE, LZW, DEFLATE = 1, 5, 8
"""Compressions of TIFF."""


def gradient(height: int = 24, width: int = 37) -> NDArray[np.uint8]:
    """A (height, width, 3) picture without symmetry."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack((rows * 255 // height, columns * 255 // width, (rows * columns) % 256), axis=2).astype(np.uint8)


def wide_gradient(height: int = 24, width: int = 37, channels: int = 3) -> NDArray[np.uint16]:
    """A (height, width, channels) picture whose low bytes matter, without symmetry."""
    rows, columns = np.mgrid[:height, :width]
    planes = [(rows * (2531 + 97 * i) + columns * (1777 - 213 * i)) % 65536 for i in range(channels)]
    return np.stack(planes, axis=2).astype(np.uint16)


def to_8_bit(samples: NDArray[np.uint16]) -> NDArray[np.int64]:
    """Nearest of 256 levels."""
    return np.rint(samples / 257).astype(int)


def psnr(picture: NDArray[Any], right: NDArray[Any]) -> float:
    """Peak signal-to-noise ratio in dB."""
    assert picture.shape == right.shape
    error = np.square(picture.astype(float) - right.astype(float)).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def one_line(error: pytest.ExceptionInfo[Exception]) -> bool:
    return bool(str(error.value)) and "\n" not in str(error.value)


def file_of(image: Image.Image, image_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format=image_format, **options)
    return file.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_file(samples: NDArray[Any], kind: int, depth: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of samples (H, W) or (H, W, C), with chunks between header and pixels."""
    if samples.ndim == 2:
        samples = samples[:, :, np.newaxis]
    height, width = samples.shape[:2]
    rows = [b"\0" + packed_bits(row.reshape(-1), depth, ">") for row in samples]
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)), *chunks]
    parts += [(b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in parts)


def with_png_chunk(png: bytes, kind: bytes, content: bytes) -> bytes:
    """The PNG with one more chunk after its header."""
    return png[:33] + png_chunk(kind, content) + png[33:]


def packed_bits(values: NDArray[Any], bits: int, order: str) -> bytes:
    """A run of samples as TIFF and PNG pack it, with the byte order of multiples of eight bits."""
    if values.dtype.kind in "fi":
        return values.astype(values.dtype.newbyteorder(order)).tobytes()
    if bits in (8, 16, 32):
        return values.astype(f"{order}u{bits // 8}").tobytes()
    if bits == 24:
        return b"".join(int(v).to_bytes(3, "little" if order == "<" else "big") for v in values)
    digits = np.array([[int(v) >> (bits - 1 - i) & 1 for i in range(bits)] for v in values], np.uint8)
    return np.packbits(digits.reshape(-1)).tobytes()


def ifd(entries: dict[int, tuple[int, Sequence[int] | bytes]], start: int, order: str, *, following: int = 0) -> bytes:
    """A directory of tags that will lie at `start`: number -> type and values (bytes: as they are)."""
    formats = {1: "B", 3: "H", 4: "I", 5: "I", 16: "Q"}
    arrays_at = start + 2 + 12 * len(entries) + 4
    directory, arrays = struct.pack(order + "H", len(entries)), b""
    for number, (kind, values) in sorted(entries.items()):
        packed = values if isinstance(values, bytes) else struct.pack(f"{order}{len(values)}{formats[kind]}", *values)
        count = len(packed) if isinstance(values, bytes) else len(values) // (2 if kind == 5 else 1)
        directory += struct.pack(order + "HHI", number, kind, count)
        if len(packed) > 4:
            directory += struct.pack(order + "I", arrays_at + len(arrays))
            arrays += packed + b"\0" * (len(packed) % 2)
        else:
            directory += packed.ljust(4, b"\0")
    return directory + struct.pack(order + "I", following) + arrays


def exif_block(kind: int, values: Sequence[int] | bytes, order: str = "<", **more: Any) -> bytes:
    """An EXIF block with an orientation of some type."""
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    return b"Exif\0\0" + header + ifd({0x0112: (kind, values)} | more.get("tags", {}), 8, order)


def tiff_file(
    samples: NDArray[Any],
    bits: int,
    *,
    order: str = "<",
    photometric: int = 1,
    sample_format: int | None = None,
    compression: int = NONE,
    predictor: int = 1,
    is_planar: bool = False,
    rows_per_strip: int = 5,
    tile: tuple[int, int] | None = None,
    extras: tuple[int, ...] = (),
    tags: dict[int, tuple[int, Sequence[int] | bytes]] | None = None,
) -> bytes:
    """A TIFF of samples (H, W) or (H, W, C), as they are: unsigned, signed or floating-point numbers of `bits` bits.

    Args:
        tile: height and width of tiles; strips if None.
        tags: further tags, or others than these would be.
    """
    if samples.ndim == 2:
        samples = samples[:, :, np.newaxis]
    height, width, channels = samples.shape
    part_height, part_width = tile or (rows_per_strip, width)
    padded = np.pad(samples, ((0, -height % part_height if tile else 0), (0, -width % part_width), (0, 0)))
    parts = []
    for plane in np.split(padded, channels, axis=2) if is_planar else [padded]:
        for top in range(0, plane.shape[0], part_height):
            for left in range(0, plane.shape[1], part_width):
                part = plane[top : top + part_height, left : left + part_width]
                if predictor == 2:
                    part = np.concatenate((part[:, :1], np.diff(part, axis=1)), axis=1)
                data = b"".join(packed_bits(row.reshape(-1), bits, order) for row in part)
                parts.append(zlib.compress(data) if compression == DEFLATE else data)
    offsets, body = [], b""
    for data in parts:
        offsets.append(8 + len(body))
        body += data + b"\0" * (len(data) % 2)
    sizes = [len(data) for data in parts]
    entries: dict[int, tuple[int, Sequence[int] | bytes]] = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [bits] * channels),
        259: (3, [compression]),
        262: (3, [photometric]),
        277: (3, [channels]),
        284: (3, [2 if is_planar else 1]),
        317: (3, [predictor]),
    }
    if tile:
        entries |= {322: (4, [part_width]), 323: (4, [part_height]), 324: (4, offsets), 325: (4, sizes)}
    else:
        entries |= {273: (4, offsets), 278: (4, [rows_per_strip]), 279: (4, sizes)}
    if extras:
        entries[338] = (3, extras)
    if sample_format is not None:
        entries[339] = (3, [sample_format] * channels)
    entries |= tags or {}
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(body))
    return header + body + ifd(entries, 8 + len(body), order)


def linear_profile() -> bytes:
    """The sRGB profile with its tone curves replaced by straight lines."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    num_tags = int.from_bytes(profile[128:132], "big")
    for tag in range(num_tags):
        name, offset, size = struct.unpack(">4sII", profile[132 + 12 * tag : 144 + 12 * tag])
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            profile[offset : offset + size] = (b"curv" + bytes(8)).ljust(size, b"\0")
        elif name == b"desc":
            profile[offset : offset + size] = profile[offset : offset + size].replace(b"\0s\0R\0G\0B", b"\0l\0i\0n\0 ")
    return bytes(profile)


def box(kind: bytes, *contents: bytes) -> bytes:
    """A box of an ISO base media file."""
    content = b"".join(contents)
    return struct.pack(">I4s", 8 + len(content), kind) + content


def with_property(avif: bytes, content: bytes) -> bytes:
    """An AVIF or HEIF file of one item with one more property, a whole box, that is essential to the item."""
    at = avif.index(b"ipco") - 4
    old_size = int.from_bytes(avif[at : at + 4], "big")
    number = 1
    position = at + 8
    while position < at + old_size:
        position += int.from_bytes(avif[position : position + 4], "big")
        number += 1
    data = avif[: at + old_size] + content + avif[at + old_size :]
    association = data.index(b"ipma") - 4
    count_at = association + 8 + 4 + 4 + 2
    assert data[association + 12 : association + 16] == b"\0\0\0\1"
    end = count_at + 1 + data[count_at]
    numbers = data[count_at + 1 : end] + bytes([0x80 | number])
    data = data[:count_at] + bytes([data[count_at] + 1]) + numbers + data[end:]
    growth = len(content) + 1
    for kind, grown in ((b"ipma", 1), (b"ipco", len(content)), (b"iprp", growth), (b"meta", growth)):
        start = data.index(kind) - 4
        size = int.from_bytes(data[start : start + 4], "big") + grown
        data = data[:start] + size.to_bytes(4, "big") + data[start + 4 :]
    return _moved_items(data, growth)


def _moved_items(data: bytes, distance: int) -> bytes:
    """Correct the offset of the only item."""
    at = data.index(b"iloc") + 4
    assert data[at] == 0
    assert data[at + 4] >> 4 == 4
    base_bytes = data[at + 5] >> 4
    count = int.from_bytes(data[at + 6 : at + 8], "big")
    assert count == 1
    offset_at = at + 8 + 2 + 2 + base_bytes + 2
    offset = int.from_bytes(data[offset_at : offset_at + 4], "big") + distance
    return data[:offset_at] + offset.to_bytes(4, "big") + data[offset_at + 4 :]
