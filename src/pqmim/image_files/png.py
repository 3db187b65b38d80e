"""PNG: what Pillow does not read of it.

The chunks are gone through here, and Pillow gets those only that hold pixels. So a broken or huge text does no harm,
colors and transparency mean what the PNG specification (third edition) says, and 16-bit samples keep all their bits.
"""

import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ImageFile

from pqmim.errors import ImageError
from pqmim.image_files.color import Chromaticities, ColorSpace, adobe_rgb, cicp_space, gamma_space
from pqmim.image_files.samples import Samples, alpha_of, alpha_of_key, colors_of, from_16_bit
from pqmim.image_files.tags import is_adobe_rgb, orientation_in_xmp, orientation_of

SIGNATURE = b"\x89PNG\r\n\x1a\n"

_GREY, _RGB, _PALETTE, _GREY_ALPHA, _RGB_ALPHA = 0, 2, 3, 4, 6
_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_FACTS = (b"tRNS", b"cICP", b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"eXIf", b"acTL")
_XMP, _EXIF = b"XML:com.adobe.xmp", b"Raw profile type exif"
_MAX_PROFILE_BYTES = 1 << 25
_MAX_TEXT_BYTES = 1 << 20
_UNSPECIFIED = 2


@dataclass
class _Header:
    width: int
    height: int
    depth: int
    kind: int


@dataclass
class _Chunks:
    pixels: list[tuple[bytes, memoryview]] = field(default_factory=list)
    """What Pillow gets."""
    facts: dict[bytes, bytes] = field(default_factory=dict)
    """The first of each kind."""
    texts: dict[bytes, bytes] = field(default_factory=dict)
    """By keyword, those only in which an orientation may be."""


def read_png(
    data: bytes, open_image: Callable[[bytes], ImageFile.ImageFile], check_size: Callable[[int, int], None]
) -> Samples:
    """Read a PNG file.

    Args:
        data: begins with SIGNATURE.
        open_image: opens the bytes of a PNG with Pillow.
        check_size: raises if an image of that width and height is too large.

    Raises:
        ImageError: damaged.
    """
    chunks = _split(data)
    header = _parse_header(chunks)
    check_size(header.width, header.height)
    if int.from_bytes(chunks.facts.get(b"acTL", b"")[:4], "big") > 1:
        warnings.warn("the image has several frames; only the first is coded", stacklevel=2)
    colors, alpha = _pixels(chunks, header, open_image)
    profile, space, is_full_range = _meaning(chunks.facts)
    if not is_full_range:
        colors = _full_range(colors)
    return Samples(colors, alpha, profile, space, _orientation(chunks))


def _split(data: bytes) -> _Chunks:
    """Sort the chunks of a PNG. Leaves ancillary chunks with a wrong check out, with a warning."""
    chunks = _Chunks()
    for kind, content, is_intact in _all_chunks(data):
        if kind in _PIXEL_CHUNKS:
            if not is_intact and kind != b"IDAT":  # zlib has a check of its own
                raise ImageError(f"damaged image: wrong checksum in the PNG chunk {_name(kind)}")
            chunks.pixels.append((kind, content))
        elif not kind[0] & 0x20:  # capitals are for chunks without which there is no picture
            raise ImageError(f"a PNG with the chunk {_name(kind)}, which is not known")
        elif not is_intact:
            warnings.warn(f"the PNG chunk {_name(kind)} is damaged and left out", stacklevel=3)
        elif kind in _FACTS:
            chunks.facts.setdefault(kind, bytes(content))
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            keyword = bytes(content[:80]).split(b"\0")[0]
            if keyword in (_XMP, _EXIF) and len(content) <= _MAX_TEXT_BYTES:
                chunks.texts.setdefault(keyword, _text(kind, bytes(content)))
    return chunks


def _all_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview, bool]]:
    """Yield kind, content and whether the check is right of each chunk; of one that is cut off, what there is."""
    view = memoryview(data)
    position = len(SIGNATURE)
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        content = view[position + 8 : position + 8 + length]
        end = position + 8 + length
        is_complete = end + 4 <= len(data)
        is_intact = is_complete and (
            kind == b"IDAT" or zlib.crc32(view[position + 4 : end]) == int.from_bytes(view[end : end + 4], "big")
        )
        yield kind, content, is_intact
        if kind == b"IEND":
            return
        position = end + 4


def _parse_header(chunks: _Chunks) -> _Header:
    if not chunks.pixels or chunks.pixels[0][0] != b"IHDR" or len(chunks.pixels[0][1]) != 13:
        raise ImageError("damaged image: a PNG without a header")
    return _Header(*struct.unpack_from(">IIBB", chunks.pixels[0][1]))


def _pixels(
    chunks: _Chunks, header: _Header, open_image: Callable[[bytes], ImageFile.ImageFile]
) -> tuple[NDArray[Any], NDArray[np.uint8] | None]:
    """Return colors (H, W, 1 or 3) and alpha."""
    transparency = chunks.facts.get(b"tRNS", b"")
    if header.depth == 16 and header.kind == _GREY_ALPHA:
        # Four bytes a pixel, which is all that the filters of PNG know of: for Pillow they are RGBA.
        content = bytearray(chunks.pixels[0][1])
        content[8:10] = (8, _RGB_ALPHA)
        with open_image(_joined([(b"IHDR", memoryview(content)), *chunks.pixels[1:]])) as image:
            pairs = np.array(image).view(">u2").astype(np.uint16)
        return pairs[:, :, :1], from_16_bit(pairs[:, :, 1])
    png = _joined(chunks.pixels)
    with open_image(png) as image:
        if header.depth == 16 and header.kind in (_RGB, _RGB_ALPHA):
            with open_image(png) as twin:
                channels = _wide_channels(image, twin)
            colors, alpha = channels[:, :, :3], None
            if header.kind == _RGB_ALPHA:
                alpha = from_16_bit(channels[:, :, 3])
        else:
            image.load()
            if header.kind == _PALETTE and transparency:
                levels = np.frombuffer(transparency[:256].ljust(256, b"\xff"), np.uint8)
                return np.array(image.convert("RGB")), levels[np.array(image)]
            alpha, decoded = alpha_of(image), colors_of(image)
            assert isinstance(decoded, np.ndarray)  # PNG has no CMYK
            colors = decoded
    if header.kind in (_GREY, _RGB) and len(transparency) >= 2 * colors.shape[2]:
        key = np.frombuffer(transparency, ">u2", colors.shape[2]) & ((1 << header.depth) - 1)
        if header.depth < 8:  # Pillow has stretched them to 8 bits
            key = key * (255 // ((1 << header.depth) - 1))
        alpha = alpha_of_key(colors, tuple(key.tolist()))
    return colors, alpha


def _wide_channels(image: ImageFile.ImageFile, twin: ImageFile.ImageFile) -> NDArray[np.uint16]:
    """Return all 16 bits of (H, W, 3 or 4) samples, of which Pillow keeps eight.

    Pillow takes one byte of each sample, and which one depends on the byte order that it is told: so both are had.
    """
    image.load()
    twin.tile = [tile._replace(args=str(tile.args).replace(";16B", ";16L")) for tile in twin.tile]
    twin.load()
    return np.asarray(np.array(image).astype(np.uint16) << 8 | np.array(twin))


def _meaning(chunks: dict[bytes, bytes]) -> tuple[bytes | None, ColorSpace | None, bool]:
    """Return ICC profile or color space, and whether the range is full: cICP goes before iCCP, sRGB, gAMA and eXIf."""
    cicp = chunks.get(b"cICP", b"")
    if len(cicp) == 4 and tuple(cicp[:2]) != (_UNSPECIFIED, _UNSPECIFIED):
        if cicp[2] == 0:  # RGB, the only thing that a PNG may hold
            return None, cicp_space(cicp[0], cicp[1]), cicp[3] != 0
        warnings.warn("the PNG chunk cICP does not fit the image and is ignored", stacklevel=4)
    if b"iCCP" in chunks:
        profile = _inflated(chunks[b"iCCP"].partition(b"\0")[2][1:], _MAX_PROFILE_BYTES)
        if profile:
            return profile, None, True
        warnings.warn("the ICC profile does not fit the image and is ignored", stacklevel=4)
    if b"sRGB" in chunks:
        return None, None, True
    if len(chunks.get(b"gAMA", b"")) == 4:
        gamma = int.from_bytes(chunks[b"gAMA"], "big") / 100_000
        chromaticities: Chromaticities | None = None
        if len(chunks.get(b"cHRM", b"")) == 32:
            chromaticities = tuple(value / 100_000 for value in struct.unpack(">8I", chunks[b"cHRM"]))
        return None, gamma_space(gamma, chromaticities), True
    return None, adobe_rgb() if is_adobe_rgb(chunks.get(b"eXIf", b"")) else None, True


def _full_range(samples: NDArray[Any]) -> NDArray[Any]:
    """Stretch samples of video range: 16 to 235 of 8 bits, or as many times that as the depth has more levels."""
    largest = int(np.iinfo(samples.dtype).max)
    unit = (largest + 1) // 256
    table = np.rint(np.clip((np.arange(largest + 1) - 16 * unit) / (219 * unit), 0, 1) * largest)
    return np.asarray(table.astype(samples.dtype)[samples])


def _orientation(chunks: _Chunks) -> int:
    if b"eXIf" in chunks.facts:
        return orientation_of(chunks.facts[b"eXIf"])
    if _EXIF in chunks.texts:  # three lines of heading, then the block as hexadecimal digits
        digits = b"".join(chunks.texts[_EXIF].split(b"\n")[3:]).decode("latin-1")
        try:
            return orientation_of(bytes.fromhex(digits))
        except ValueError:
            return 1
    return orientation_in_xmp(chunks.texts.get(_XMP, b""))


def _text(kind: bytes, content: bytes) -> bytes:
    """Return the text of a tEXt, zTXt or iTXt chunk; nothing if it is broken or too long."""
    rest = content.partition(b"\0")[2]
    if kind == b"tEXt":
        return rest
    if kind == b"zTXt":
        return _inflated(rest[1:], _MAX_TEXT_BYTES)
    text = rest[2:].split(b"\0", 2)[-1]
    return _inflated(text, _MAX_TEXT_BYTES) if rest[:1] == b"\1" else text


def _inflated(data: bytes, limit: int) -> bytes:
    """Decompress at most `limit` bytes; nothing if the data is broken or too long."""
    decompressor = zlib.decompressobj()
    try:
        result = decompressor.decompress(data, limit)
    except zlib.error:
        return b""
    return result if decompressor.eof else b""


def _joined(chunks: list[tuple[bytes, memoryview]]) -> bytes:
    parts: list[bytes | memoryview] = [SIGNATURE]
    for kind, content in chunks:
        check = zlib.crc32(content, zlib.crc32(kind))
        parts += [struct.pack(">I4s", len(content), kind), content, struct.pack(">I", check)]
    return b"".join(parts)


def _name(kind: bytes) -> str:
    return kind.decode("ascii") if kind.isalpha() else kind.hex()
