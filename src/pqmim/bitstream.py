"""The .pqm container: fields in, bytes out, and back.

Bytes only: this module knows neither images nor models nor the range coder. The format is described, with
examples, in docs/format.md, which is the authority. It has two forms, *full* and, for small files, *mini*.
"""

import binascii
import zlib
from dataclasses import dataclass, replace
from typing import NamedTuple

from pqmim.errors import DamagedFileError, NotAPqmFileError, TruncatedFileError, UnsupportedFileError

MAGIC = b"\x8dPQ\n"
MINI_MAGIC = b"\x8dm"
VERSION = 3
EARLIER_MINI_MAGIC, EARLIER_VERSION = b"\x8dp", 2
MAX_DIMENSION = 1 << 21
"""Largest width and height in pixels: what a varint of three bytes holds."""
MAX_LEVEL = 63
SCALES = (1, 2, 4, 8)
MAX_ALPHA_BYTES = (1 << 28) - 1
MAX_METADATA_BYTES = 1 << 22
MODEL_ID_BYTES = 4
MINI_MODEL_ID_BYTES = 2
MINI_MAX_LEVEL = 31
MINI_MAX_PAYLOAD = 1024
"""Longest payload of the mini form, in bytes."""

_MADE_EARLIER = "made by pqmim 0.2 or 0.3, whose files only these releases read"
_FLAG_PARTIAL = 0b0001
_FLAG_ALPHA = 0b0010
_FLAG_METADATA = 0b0100
_KNOWN_FLAGS = _FLAG_PARTIAL | _FLAG_ALPHA | _FLAG_METADATA
_TOKEN_CHECK_BYTES = 2
_FILE_CHECK_BYTES = 4
_MINI_FILE_CHECK_BYTES = 2
# With the shortest varints for width and height, and no payload:
_MIN_BYTES = len(MAGIC) + 1 + MODEL_ID_BYTES + 1 + 1 + 1 + _FILE_CHECK_BYTES
_MINI_MIN_BYTES = len(MINI_MAGIC) + 1 + MINI_MODEL_ID_BYTES + 1 + 1 + _MINI_FILE_CHECK_BYTES


@dataclass(frozen=True)
class Container:
    """What a .pqm file holds.

    The mini form, see `is_mini`, carries less: of the model id the first MINI_MODEL_ID_BYTES, and no token check.
    `pack` drops the rest if it is there; `parse` returns what was in the file.

    Attributes:
        width: of the original image, in pixels, 1 to MAX_DIMENSION.
        height: as width.
        model_id: MODEL_ID_BYTES bytes that name the model which decodes the file; in the mini form only
            MINI_MODEL_ID_BYTES of them are needed.
        level: 0 to MAX_LEVEL, which of the model's static priors its probabilities start from.
        scale: one of SCALES; the coded picture has ceil(width / scale) x ceil(height / scale) pixels.
        payload: output of the range coder, or its first bytes if the file is partial.
        is_partial: whether further digits of the payload are missing.
        token_check: 16 bits, see `token_check`; None in partial files, may be None in the mini form.
        alpha: the coded alpha channel if the image has one, at least one byte.
        metadata: packed by `metadata.pack`, at least one byte; None if the file keeps none.
    """

    width: int
    height: int
    model_id: bytes
    level: int
    scale: int
    payload: bytes
    is_partial: bool = False
    token_check: int | None = None
    alpha: bytes | None = None
    metadata: bytes | None = None

    def __post_init__(self) -> None:
        if not (1 <= self.width <= MAX_DIMENSION and 1 <= self.height <= MAX_DIMENSION):
            raise ValueError(f"sides must be 1 to {MAX_DIMENSION} pixels, not {self.width} x {self.height}")
        if not 0 <= self.level <= MAX_LEVEL:
            raise ValueError(f"a level is 0 to {MAX_LEVEL}, not {self.level}")
        if self.scale not in SCALES:
            raise ValueError(f"a scale must be one of {SCALES}, not {self.scale}")
        if self.alpha is not None and not 1 <= len(self.alpha) <= MAX_ALPHA_BYTES:
            raise ValueError(f"alpha must have 1 to {MAX_ALPHA_BYTES} bytes, not {len(self.alpha)}")
        if self.metadata is not None and not 1 <= len(self.metadata) <= MAX_METADATA_BYTES:
            raise ValueError(f"metadata must have 1 to {MAX_METADATA_BYTES} bytes, not {len(self.metadata)}")
        if len(self.model_id) != MODEL_ID_BYTES and not (self.is_mini and len(self.model_id) == MINI_MODEL_ID_BYTES):
            raise ValueError(f"a model id has {MODEL_ID_BYTES} bytes here, not {len(self.model_id)}")
        if self.token_check is not None and not 0 <= self.token_check < 1 << 16:
            raise ValueError(f"a token check has 16 bits, not {self.token_check:#x}")
        if self.is_partial and self.token_check is not None:
            raise ValueError("a partial file has no token check")
        if not (self.is_partial or self.is_mini) and self.token_check is None:
            raise ValueError("a complete file in full form must have a token check")

    @property
    def is_mini(self) -> bool:
        """Whether the file has the mini form, which it has wherever it can."""
        return _is_mini(self.level, self.alpha is not None or self.metadata is not None, len(self.payload))


def is_pqm(data: bytes) -> bool:
    """Whether data begins as a .pqm file does, of this or the earlier version."""
    return data.startswith((MAGIC, MINI_MAGIC, EARLIER_MINI_MAGIC))


def token_check(tokens: bytes) -> int:
    """Return the CRC-16 (`binascii.crc_hqx`, start value 0) of a token grid.

    Args:
        tokens: the (M, h, w) token grid in C order, each token as a little-endian 16-bit integer.
    """
    return binascii.crc_hqx(tokens, 0)


def pack(container: Container) -> bytes:
    """Write a container as the bytes of a .pqm file, in the mini form if that can hold it."""
    log2_scale = container.scale.bit_length() - 1
    sides = _varint(container.width - 1) + _varint(container.height - 1)
    if container.is_mini:
        settings = container.level << 3 | log2_scale << 1 | container.is_partial
        model_id = container.model_id[:MINI_MODEL_ID_BYTES]
        body = MINI_MAGIC + bytes([settings]) + model_id + sides + container.payload
    else:
        flags = 0
        sections = tokens = b""
        if container.is_partial:
            flags |= _FLAG_PARTIAL
        if container.alpha is not None:
            flags |= _FLAG_ALPHA
            sections += _varint(len(container.alpha)) + container.alpha
        if container.metadata is not None:
            flags |= _FLAG_METADATA
            sections += _varint(len(container.metadata)) + container.metadata
        if container.token_check is not None:
            tokens = container.token_check.to_bytes(_TOKEN_CHECK_BYTES, "big")
        settings = log2_scale << 6 | container.level
        start = MAGIC + bytes([VERSION << 4 | flags]) + container.model_id + bytes([settings])
        body = start + sides + sections + container.payload + tokens
    return body + _file_check(body, is_mini=container.is_mini)


def overhead(container: Container) -> int:
    """Return how many bytes of the packed container are not payload.

    It depends on the length of the payload, because the form does.
    """
    return len(pack(container)) - len(container.payload)


def parse(data: bytes) -> Container:
    """Read the bytes of a .pqm file.

    Each file has one reading and each reading one file: `pack(parse(data)) == data`.

    Raises:
        NotAPqmFileError: the data is empty or begins otherwise.
        TruncatedFileError: too short to hold the fixed fields.
        UnsupportedFileError: unknown version, flag or bit.
        DamagedFileError: wrong checksum (which is also how most truncated files show), or fields that
            do not fit.
    """
    form = _read_form(data)
    min_bytes = _MINI_MIN_BYTES if form.is_mini else _MIN_BYTES
    if len(data) < min_bytes:
        raise TruncatedFileError(f"the file ends after {len(data)} bytes; the shortest has {min_bytes}")
    if not _checksum_fits(data, form):
        raise DamagedFileError("checksum mismatch: the file is damaged or cut short")

    # From here on the bytes are as they were written; what still does not fit was written wrongly.
    fields = _FieldReader(data, end=len(data) - (_MINI_FILE_CHECK_BYTES if form.is_mini else _FILE_CHECK_BYTES))
    container = _read_header(fields, form)
    alpha = _read_section(fields, "alpha", MAX_ALPHA_BYTES) if form.has_alpha else None
    metadata = _read_section(fields, "metadata", MAX_METADATA_BYTES) if form.has_metadata else None
    has_token_check = not (form.is_mini or form.is_partial)
    payload = fields.take_but(_TOKEN_CHECK_BYTES if has_token_check else 0)
    if form.is_mini != _is_mini(container.level, form.has_alpha or form.has_metadata, len(payload)):
        raise DamagedFileError("the file is not in its shortest form")
    return replace(
        container,
        payload=payload,
        is_partial=form.is_partial,
        token_check=int.from_bytes(fields.take(_TOKEN_CHECK_BYTES), "big") if has_token_check else None,
        alpha=alpha,
        metadata=metadata,
    )


def salvage(data: bytes) -> tuple[Container, str]:
    """Read what is left of a .pqm file that was cut or damaged by accident.

    Without a fitting checksum nobody knows what is wrong, so everything behind the header is taken for the first bytes
    of the payload. If the file was only cut, that is true up to the last few bytes, which may be the checks. If it was
    damaged, what follows the damage decodes to garbage.

    Returns:
        The container and "" if the checksum fits; else a partial container and one line that says what is wrong.

    Raises:
        NotAPqmFileError, TruncatedFileError, UnsupportedFileError, DamagedFileError: as `parse`, but only if
            the header cannot be read, or if the checksum fits and something else does not.
    """
    form = _read_form(data)
    if _checksum_fits(data, form):
        return parse(data), ""
    reason = "checksum mismatch: cut or damaged"
    fields = _FieldReader(data, end=len(data))
    container = _read_header(fields, form)
    lost = "alpha channel"
    try:
        if form.has_alpha:
            container = replace(container, alpha=_read_section(fields, "alpha", MAX_ALPHA_BYTES))
        lost = "metadata section"
        if form.has_metadata:
            container = replace(container, metadata=_read_section(fields, "metadata", MAX_METADATA_BYTES))
    except DamagedFileError:
        return container, f"{reason}; the {lost} and all behind it are lost"
    payload = fields.take_but(0)
    if form.is_mini:
        payload = payload[:MINI_MAX_PAYLOAD]
    return replace(container, payload=payload), reason


def truncate(data: bytes, num_bytes: int, *, keep_metadata: bool = False) -> bytes:
    """Cut a .pqm file to a smaller one, which keeps as much of the payload as fits, and all of alpha.

    Metadata go first: if the file fits without them, all of the payload is kept.

    Args:
        data: a complete or partial file.
        num_bytes: upper bound for the result.
        keep_metadata: cut the payload only.

    Returns:
        The data itself if it is small enough already.

    Raises:
        ValueError: even without payload the file is larger; the message says how large.
        BitstreamError: see `parse`.
    """
    container = parse(data)
    if len(data) <= num_bytes:
        return data
    if container.metadata is not None and not keep_metadata:
        container = replace(container, metadata=None)
        if len(without_metadata := pack(container)) <= num_bytes:
            return without_metadata
    partial = replace(container, is_partial=True, token_check=None)
    room = num_bytes - overhead(partial)
    without_payload = replace(partial, payload=b"")
    if without_payload.is_mini and room <= MINI_MAX_PAYLOAD:
        room = min(num_bytes - overhead(without_payload), MINI_MAX_PAYLOAD)
    if room < 0:
        raise ValueError(f"the file cannot have fewer than {overhead(without_payload)} bytes, not {num_bytes}")
    return pack(replace(partial, payload=container.payload[:room]))


def smallest_size(data: bytes, *, keep_metadata: bool = False) -> int:
    """Size of the smallest file, bytes, that `truncate` can make."""
    smallest = replace(parse(data), is_partial=True, token_check=None, payload=b"")
    return overhead(smallest if keep_metadata else replace(smallest, metadata=None))


def at_coded_size(container: Container) -> Container:
    """The coded picture alone, with the same tokens: not scaled back to the original's size, no alpha, no metadata."""
    width, height = (-(-side // container.scale) for side in (container.width, container.height))
    return replace(container, width=width, height=height, scale=1, alpha=None, metadata=None)


class _Form(NamedTuple):
    """What the first bytes of a file say about the others."""

    is_mini: bool
    is_partial: bool
    has_alpha: bool
    has_metadata: bool


def _is_mini(level: int, has_sections: bool, num_payload_bytes: int) -> bool:
    """Whether a file is written in the mini form."""
    return level <= MINI_MAX_LEVEL and not has_sections and num_payload_bytes <= MINI_MAX_PAYLOAD


def _read_form(data: bytes) -> _Form:
    """Read magic, version and flags.

    Raises:
        NotAPqmFileError, TruncatedFileError, UnsupportedFileError: see `parse`.
    """
    if not data:
        raise NotAPqmFileError("the file is empty")
    magic = next((m for m in (MINI_MAGIC, EARLIER_MINI_MAGIC, MAGIC) if data[: len(m)] == m[: len(data)]), None)
    if magic is None:
        raise NotAPqmFileError("not a .pqm file")
    if len(data) <= len(magic):
        raise TruncatedFileError(f"the file ends after {len(data)} bytes")
    byte = data[len(magic)]
    version, flags = byte >> 4, byte & 0b1111
    if magic == EARLIER_MINI_MAGIC or (magic == MAGIC and version == EARLIER_VERSION):
        raise UnsupportedFileError(_MADE_EARLIER)
    if magic == MINI_MAGIC:
        return _Form(is_mini=True, is_partial=bool(byte & 1), has_alpha=False, has_metadata=False)
    if version != VERSION:
        raise UnsupportedFileError(f"format version {version}; this release reads version {VERSION}")
    if flags & ~_KNOWN_FLAGS:
        raise UnsupportedFileError(f"unknown flags {flags:#06b}; a newer release may read this file")
    return _Form(False, *(bool(flags & flag) for flag in (_FLAG_PARTIAL, _FLAG_ALPHA, _FLAG_METADATA)))


def _read_header(fields: "_FieldReader", form: _Form) -> Container:
    """Read the fields from the start to the height, as a partial container without sections and payload.

    Raises:
        UnsupportedFileError, DamagedFileError: see `parse`.
    """
    if form.is_mini:
        fields.take(len(MINI_MAGIC))
        settings = fields.take(1)[0]
        log2_scale, level = settings >> 1 & 0b11, settings >> 3
        model_id = fields.take(MINI_MODEL_ID_BYTES)
    else:
        fields.take(len(MAGIC) + 1)
        model_id = fields.take(MODEL_ID_BYTES)
        settings = fields.take(1)[0]
        log2_scale, level = settings >> 6, settings & 0b111111
    return Container(
        width=fields.varint(max_value=MAX_DIMENSION - 1) + 1,
        height=fields.varint(max_value=MAX_DIMENSION - 1) + 1,
        model_id=model_id,
        level=level,
        scale=1 << log2_scale,
        payload=b"",
        is_partial=True,
    )


def _read_section(fields: "_FieldReader", name: str, max_bytes: int) -> bytes:
    """Read length and bytes of a section. Raises DamagedFileError: it is cut, too long or empty."""
    section = fields.take(fields.varint(max_value=max_bytes))
    if not section:
        raise DamagedFileError(f"the {name} section is empty")
    return section


def _file_check(body: bytes, *, is_mini: bool) -> bytes:
    """Return the checksum that follows the body of a file."""
    if is_mini:
        # Started and ended as CRC-32 is; otherwise zero bytes added to a file would go unnoticed.
        return (binascii.crc_hqx(body, 0xFFFF) ^ 0xFFFF).to_bytes(_MINI_FILE_CHECK_BYTES, "big")
    return zlib.crc32(body).to_bytes(_FILE_CHECK_BYTES, "big")


def _checksum_fits(data: bytes, form: _Form) -> bool:
    """Whether a file ends with the checksum of what comes before."""
    check_bytes = _MINI_FILE_CHECK_BYTES if form.is_mini else _FILE_CHECK_BYTES
    return _file_check(data[:-check_bytes], is_mini=form.is_mini) == data[-check_bytes:]


def _varint(value: int) -> bytes:
    """Write an unsigned integer in groups of 7 bits, low group first, high bit set on all but the last."""
    groups = bytearray()
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


class _FieldReader:
    """Reads fields of data[:end] in turn and never past the end."""

    def __init__(self, data: bytes, *, end: int) -> None:
        self._data = data
        self._position = 0
        self._end = end

    def take(self, count: int) -> bytes:
        if not 0 <= count <= self._end - self._position:
            raise DamagedFileError("a field runs past the end of the file")
        self._position += count
        return self._data[self._position - count : self._position]

    def take_but(self, count: int) -> bytes:
        """Take all that is left but the last `count` bytes."""
        return self.take(self._end - self._position - count)

    def varint(self, *, max_value: int) -> int:
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if value > max_value:
                raise DamagedFileError(f"a field is above its limit of {max_value}")
            if byte < 0x80:
                break
            shift += 7
            if shift > max_value.bit_length():  # an endless run of 0x80
                raise DamagedFileError("an integer field is too long")
        if byte == 0 and shift:
            raise DamagedFileError("an integer field is not in its shortest form")
        return value
