"""TIFF: which of its pictures is meant, and samples that Pillow does not read rightly.

Pillow reads samples of 8 bits, and libtiff in it undoes any compression. So samples of other widths are read as what
they are to a compressor, a picture of bytes, and put together here.
"""

import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ImageFile

from pqmim.errors import ImageError
from pqmim.image_files.samples import Samples, alpha_of, colors_of, from_16_bit, grey_of_floats
from pqmim.image_files.tags import ORIENTATION, Tag, TagReader, orientation_in, orientation_in_xmp

SIGNATURES = (b"II*\0", b"MM\0*", b"MM*\0", b"II\0*", b"II+\0", b"MM\0+")

PHOTOMETRIC = 262
_NEW_SUBFILE_TYPE, _SUBFILE_TYPE = 254, 255
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _FILL_ORDER = 256, 257, 258, 259, 266
_STRIP_OFFSETS, _SAMPLES, _ROWS_PER_STRIP, _STRIP_SIZES, _PLANES = 273, 277, 278, 279, 284
_PREDICTOR, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_SIZES = 317, 322, 323, 324, 325
_SUB_IFDS, _EXTRA_SAMPLES, _SAMPLE_FORMAT, _XMP, _ICC = 330, 338, 339, 700, 34675

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB = 0, 1, 2
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3
_REDUCED, _MASK = 1, 4
_PREMULTIPLIED, _ALPHA = 1, 2
_OF_BYTES = (1, 5, 8, 32773, 32946, 34925, 50000)
"""Compressions that know of bytes only: none, LZW, Deflate, PackBits, Deflate, LZMA, Zstandard."""
_MAX_IFDS = 64
_STRIP_SAMPLES = 1 << 22

Opener = Callable[[bytes], ImageFile.ImageFile]
Ifd = dict[int, Tag]


@dataclass(frozen=True)
class _Layout:
    """How the samples of a TIFF picture lie in its file."""

    width: int
    height: int
    bits: int
    sample_format: int
    photometric: int
    num_samples: int  # of a pixel
    extras: tuple[int, ...]
    compression: int
    predictor: int
    is_planar: bool

    @property
    def num_colors(self) -> int:
        return 3 if self.photometric == _RGB else 1

    def __str__(self) -> str:
        kind = {_UNSIGNED: "", _SIGNED: "signed ", _FLOAT: "floating-point "}.get(self.sample_format, "undefined ")
        return (
            f"a TIFF of {self.num_samples} x {self.bits} {kind}bits a pixel, photometric interpretation "
            f"{self.photometric}, compression {self.compression}, predictor {self.predictor}"
        )


def all_ifds(reader: TagReader) -> Iterator[tuple[int, Ifd, bool]]:
    """Yield offset and tags of each IFD of a file, and whether it is one of the pages (the others belong to a page)."""
    seen: set[int] = set()
    page = reader.first
    while page and page not in seen and len(seen) < _MAX_IFDS:
        seen.add(page)
        tags, following = reader.ifd(page)
        yield page, tags, True
        for offset in reader.integers(tags.get(_SUB_IFDS), _MAX_IFDS):
            if offset not in seen and len(seen) < _MAX_IFDS:
                seen.add(offset)
                yield offset, reader.ifd(offset)[0], False
        page = following


def read_tiff(data: bytes, open_image: Opener, check_size: Callable[[int, int], None]) -> Samples:
    """Read a TIFF file.

    Of several pictures it is the first that is no thumbnail of another.

    Args:
        data: begins with one of SIGNATURES.
        open_image: opens the bytes of a TIFF with Pillow.
        check_size: raises if an image of that width and height is too large.

    Raises:
        ImageError: damaged, or samples that have no defined meaning.
    """
    reader = TagReader(data)
    offset, tags = _main_ifd(reader)
    layout = _layout(reader, tags)
    check_size(layout.width, layout.height)
    if layout.sample_format == _SIGNED:
        raise ImageError(f"{layout}: which numbers are black and white is not defined")
    icc = reader.raw(tags[_ICC]) if _ICC in tags else None
    orientation = orientation_in(reader, tags)
    if _is_read_here(layout):
        if layout.sample_format == _FLOAT and layout.num_colors == 3 and not icc:
            raise ImageError(f"{layout}: without a profile, what the numbers mean is not defined")
        if ORIENTATION not in tags and _XMP in tags:
            orientation = orientation_in_xmp(reader.raw(tags[_XMP]))
        colors, alpha = _meaning(_all_samples(reader, tags, layout, open_image), layout)
        return Samples(colors, alpha, icc, orientation=orientation)
    try:
        image = open_image(_for_pillow(reader, offset, tags))
    except ImageError as error:
        raise ImageError(f"{layout}: not supported") from error
    with image:
        if image.mode.startswith("I"):  # those widths are read here, and what is left of them Pillow reads wrongly
            raise ImageError(f"{layout}: not supported")
        image.load()
        return Samples(colors_of(image), alpha_of(image), icc, orientation=orientation)


def _main_ifd(reader: TagReader) -> tuple[int, Ifd]:
    """Return offset and tags of the picture that is meant; warns if there are more."""
    found = list(all_ifds(reader))
    if not found:
        raise ImageError("damaged image: a TIFF without tags")
    first = found[0]
    candidates = [first]
    if _role(reader, first[1]) & _REDUCED:
        largest = max(found, key=lambda ifd: _area(reader, ifd[1]))
        candidates = [ifd for ifd in found if not _role(reader, ifd[1]) & (_REDUCED | _MASK)] or [largest]
    chosen = candidates[0]
    if any(ifd is not chosen and ifd[2] and not _role(reader, ifd[1]) & (_REDUCED | _MASK) for ifd in found):
        warnings.warn("the image has several frames; only the first is coded", stacklevel=3)
    return chosen[0], chosen[1]


def _role(reader: TagReader, tags: Ifd) -> int:
    old = reader.integer(tags.get(_SUBFILE_TYPE), 0)
    return reader.integer(tags.get(_NEW_SUBFILE_TYPE), _REDUCED if old == 2 else 0)


def _area(reader: TagReader, tags: Ifd) -> int:
    return reader.integer(tags.get(_WIDTH), 0) * reader.integer(tags.get(_HEIGHT), 0)


def _layout(reader: TagReader, tags: Ifd) -> _Layout:
    def number(tag: int, default: int) -> int:
        return reader.integer(tags.get(tag), default)

    bits = set(reader.integers(tags.get(_BITS), 16)) or {1}
    formats = set(reader.integers(tags.get(_SAMPLE_FORMAT), 16)) or {_UNSIGNED}
    return _Layout(
        width=number(_WIDTH, 0),
        height=number(_HEIGHT, 0),
        bits=bits.pop() if len(bits) == 1 else 0,
        sample_format=formats.pop() if len(formats) == 1 else 0,
        photometric=number(PHOTOMETRIC, _WHITE_IS_ZERO),
        num_samples=number(_SAMPLES, 1),
        extras=reader.integers(tags.get(_EXTRA_SAMPLES), 16),
        compression=number(_COMPRESSION, 1),
        predictor=number(_PREDICTOR, 1),
        is_planar=number(_PLANES, 1) == 2,
    )


def _is_read_here(layout: _Layout) -> bool:
    """Whether the samples are put together here; all other pictures are Pillow's."""
    if layout.photometric not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB) or layout.compression not in _OF_BYTES:
        return False
    if not layout.num_colors <= layout.num_samples <= 16:
        return False
    if layout.sample_format == _FLOAT:
        return layout.bits in (16, 32, 64) and layout.predictor == 1
    if layout.sample_format != _UNSIGNED or not 1 <= layout.bits <= 32:
        return False
    if layout.bits == 8 or (layout.bits in (1, 2, 4) and layout.num_samples == 1):
        return False
    return layout.predictor == 1 or (layout.predictor == 2 and layout.bits in (16, 32))


def _for_pillow(reader: TagReader, offset: int, tags: Ifd) -> bytes:
    """Return the file such that Pillow takes the picture at an offset for the first and does not turn it."""
    if offset == reader.first and ORIENTATION not in tags:
        return reader.data
    data = bytearray(reader.data)
    struct.pack_into(reader.order + ("Q" if reader.is_big else "I"), data, 8 if reader.is_big else 4, offset)
    tag = tags.get(ORIENTATION)
    if tag is not None and reader.numbers(tag, 1):
        number_format = {1: "B", 6: "B", 7: "B", 3: "H", 8: "H", 4: "I", 9: "I"}.get(tag.kind)
        if number_format is not None:
            struct.pack_into(reader.order + number_format, data, tag.position, 1)
    return bytes(data)


def _all_samples(reader: TagReader, tags: Ifd, layout: _Layout, open_image: Opener) -> NDArray[Any]:
    """Return the samples (H, W, num_samples) as they are in the file, of the narrowest type that holds them."""
    if not layout.is_planar:
        return _plane(reader, tags, layout, open_image, layout.num_samples, 0, 1)
    planes = [_plane(reader, tags, layout, open_image, 1, i, layout.num_samples) for i in range(layout.num_samples)]
    return np.concatenate(planes, axis=2)


def _plane(
    reader: TagReader, tags: Ifd, layout: _Layout, open_image: Opener, num_samples: int, index: int, num_planes: int
) -> NDArray[Any]:
    """Return the samples (H, W, num_samples) of one plane."""
    is_tiled = _TILE_OFFSETS in tags
    tile_width = reader.integer(tags.get(_TILE_WIDTH), 0) if is_tiled else layout.width
    if not 0 < tile_width <= max(2 * layout.width, 4096):
        raise ImageError("damaged image: tiles of an impossible size")
    num_across = -(-layout.width // tile_width)
    row_bytes = -(-tile_width * num_samples * layout.bits // 8)
    as_bytes = {
        _WIDTH: [num_across * row_bytes],
        _HEIGHT: [layout.height],
        _BITS: [8],
        _COMPRESSION: [layout.compression],
        PHOTOMETRIC: [_BLACK_IS_ZERO],
        _FILL_ORDER: [reader.integer(tags.get(_FILL_ORDER), 1)],
        _SAMPLES: [1],
    }
    if is_tiled:
        as_bytes |= {_TILE_WIDTH: [row_bytes], _TILE_HEIGHT: [reader.integer(tags.get(_TILE_HEIGHT), 0)]}
    else:
        as_bytes[_ROWS_PER_STRIP] = [reader.integer(tags.get(_ROWS_PER_STRIP), layout.height)]
    for tag in (_TILE_OFFSETS, _TILE_SIZES) if is_tiled else (_STRIP_OFFSETS, _STRIP_SIZES):
        values = reader.integers(tags.get(tag))
        count = len(values) // num_planes
        if values:
            as_bytes[tag] = list(values[index * count : (index + 1) * count])
    with open_image(_with_ifd(reader, as_bytes)) as image:
        image.load()
        rows = np.array(image)
    if rows.shape != (layout.height, num_across * row_bytes):
        raise ImageError("damaged image: its parts do not fit together")
    parts = rows.reshape(layout.height, num_across, row_bytes)
    num_rows = max(1, _STRIP_SAMPLES // (num_across * tile_width * num_samples))
    strips = []
    for top in range(0, layout.height, num_rows):
        values_of_strip = _unpacked(parts[top : top + num_rows], tile_width * num_samples, layout, reader.order)
        if layout.predictor == 2:
            differences = values_of_strip.reshape(-1, num_across, tile_width, num_samples)
            values_of_strip = np.cumsum(differences, axis=2, dtype=values_of_strip.dtype)
        strips.append(values_of_strip.reshape(-1, num_across * tile_width, num_samples)[:, : layout.width])
    return np.concatenate(strips)


def _with_ifd(reader: TagReader, tags: dict[int, list[int]]) -> bytes:
    """Return the file with another IFD at its end, which is its only one."""
    count_format, entry_format, word = ("Q", "HHQ", "Q") if reader.is_big else ("H", "HHI", "I")
    start = len(reader.data) + len(reader.data) % 2
    word_bytes = struct.calcsize("=" + word)
    arrays_at = (
        start + struct.calcsize("=" + count_format) + len(tags) * (struct.calcsize("=" + entry_format) + word_bytes)
    )
    arrays_at += word_bytes
    directory, arrays = struct.pack(reader.order + count_format, len(tags)), b""
    for number, values in sorted(tags.items()):
        packed = struct.pack(f"{reader.order}{len(values)}{word}", *values)
        directory += struct.pack(reader.order + entry_format, number, 16 if reader.is_big else 4, len(values))
        if len(values) == 1:
            directory += packed
        else:
            directory += struct.pack(reader.order + word, arrays_at + len(arrays))
            arrays += packed
    directory += bytes(word_bytes)
    header = 8 if reader.is_big else 4
    pointer = struct.pack(reader.order + word, start)
    body = reader.data[header + word_bytes :].ljust(start - header - word_bytes, b"\0")
    return reader.data[:header] + pointer + body + directory + arrays


def _unpacked(parts: NDArray[np.uint8], count: int, layout: _Layout, order: str) -> NDArray[Any]:
    """Return the first `count` samples of each run of bytes: (rows, runs, bytes) becomes (rows, runs, count)."""
    bits = layout.bits
    if layout.sample_format == _FLOAT:
        return parts.view(f"{order}f{bits // 8}")[:, :, :count]
    if bits in (16, 32):
        return parts.view(f"{order}u{bits // 8}")[:, :, :count].astype(f"u{bits // 8}")
    values = np.zeros((*parts.shape[:2], count), np.uint32)
    if bits == 24:
        for i in range(3):
            shift = np.uint32(8 * (i if order == "<" else 2 - i))
            values |= parts[:, :, i : 3 * count : 3].astype(np.uint32) << shift
        return values
    digits = np.unpackbits(parts, axis=2)[:, :, : count * bits].reshape(*parts.shape[:2], count, bits)
    for i in range(bits):
        values |= digits[:, :, :, i].astype(np.uint32) << np.uint32(bits - 1 - i)
    return values.astype(np.uint16) if bits <= 16 else values


def _meaning(samples: NDArray[Any], layout: _Layout) -> tuple[NDArray[np.uint16], NDArray[np.uint8] | None]:
    """Return colors (H, W, 1 or 3) over the full range, and alpha."""
    num_colors = layout.num_colors
    extra = layout.extras[0] if layout.extras else _ALPHA if num_colors == 3 else 0
    has_alpha = layout.num_samples > num_colors and extra in (_PREMULTIPLIED, _ALPHA)
    samples = samples[:, :, : num_colors + has_alpha]
    if layout.sample_format == _FLOAT:
        levels = grey_of_floats(samples)
    elif layout.bits > 16:
        levels = (samples >> np.uint32(layout.bits - 16)).astype(np.uint16)
    else:
        largest = (1 << layout.bits) - 1
        levels = ((samples.astype(np.uint32) * np.uint32(65535) + np.uint32(largest // 2)) // largest).astype(np.uint16)
    colors = levels[:, :, :num_colors]
    if layout.photometric == _WHITE_IS_ZERO:
        colors = np.uint16(65535) - colors
    if not has_alpha:
        return colors, None
    alpha = levels[:, :, num_colors]
    if extra == _PREMULTIPLIED:
        opacity = np.maximum(alpha, 1)[:, :, np.newaxis].astype(np.float32) / 65535
        colors = np.rint(np.minimum(colors / opacity, 65535)).astype(np.uint16)
    return colors, from_16_bit(alpha)
