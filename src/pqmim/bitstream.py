"""The .pqm container: fields in, bytes out, and back.

Bytes only: this module knows neither images nor models nor the range coder. The format is described, with an
example, in docs/format.md, which is the authority.
"""

import binascii
import zlib
from dataclasses import dataclass

from pqmim.errors import DamagedFileError, NotAPqmFileError, TruncatedFileError, UnsupportedFileError

MAGIC = b"\x8dPQ\n"
VERSION = 1
MAX_DIMENSION = 1 << 21
"""Largest width and height in pixels: what a varint of three bytes holds."""
MAX_STEPS_SENT = (1 << 14) - 1
MAX_ALPHA_BYTES = (1 << 28) - 1
MODEL_ID_BYTES = 4

_FLAG_PARTIAL = 0b0001
_FLAG_ALPHA = 0b0010
_KNOWN_FLAGS = _FLAG_PARTIAL | _FLAG_ALPHA
_FIXED_START = len(MAGIC) + 1 + MODEL_ID_BYTES + 1
_FIXED_END = 2 + 4  # token check, CRC-32
_MIN_BYTES = _FIXED_START + 1 + 1 + _FIXED_END  # the shortest varints for width and height


@dataclass(frozen=True)
class Container:
    """What a .pqm file holds.

    Attributes:
        width: of the original image, in pixels, 1 to MAX_DIMENSION.
        height: as width.
        model_id: MODEL_ID_BYTES bytes that name the model which decodes the file.
        level: 0 to 255, which of the model's static priors its probabilities start from.
        payload: output of the range coder.
        token_check: 16 bits, see `token_check`.
        steps_sent: number of leading steps in the payload if the file is partial, else None.
        alpha: the coded alpha channel if the image has one, at least one byte.
    """

    width: int
    height: int
    model_id: bytes
    level: int
    payload: bytes
    token_check: int
    steps_sent: int | None = None
    alpha: bytes | None = None

    def __post_init__(self) -> None:
        if not (1 <= self.width <= MAX_DIMENSION and 1 <= self.height <= MAX_DIMENSION):
            raise ValueError(f"sides must be 1 to {MAX_DIMENSION} pixels, not {self.width} x {self.height}")
        if len(self.model_id) != MODEL_ID_BYTES:
            raise ValueError(f"a model id has {MODEL_ID_BYTES} bytes, not {len(self.model_id)}")
        if not 0 <= self.level <= 0xFF:
            raise ValueError(f"a level is 0 to 255, not {self.level}")
        if not 0 <= self.token_check < 1 << 16:
            raise ValueError(f"a token check has 16 bits, not {self.token_check:#x}")
        if self.steps_sent is not None and not 0 <= self.steps_sent <= MAX_STEPS_SENT:
            raise ValueError(f"steps_sent must be 0 to {MAX_STEPS_SENT}, not {self.steps_sent}")
        if self.alpha is not None and not 1 <= len(self.alpha) <= MAX_ALPHA_BYTES:
            raise ValueError(f"alpha must have 1 to {MAX_ALPHA_BYTES} bytes, not {len(self.alpha)}")


def token_check(tokens: bytes) -> int:
    """Return the CRC-16 (`binascii.crc_hqx`, start value 0) of a token grid.

    Args:
        tokens: the (M, h, w) token grid in C order, each token as a little-endian 16-bit integer.
    """
    return binascii.crc_hqx(tokens, 0)


def pack(container: Container) -> bytes:
    """Write a container as the bytes of a .pqm file."""
    flags = 0
    variable = _varint(container.width - 1) + _varint(container.height - 1)
    if container.steps_sent is not None:
        flags |= _FLAG_PARTIAL
        variable += _varint(container.steps_sent)
    if container.alpha is not None:
        flags |= _FLAG_ALPHA
        variable += _varint(len(container.alpha)) + container.alpha
    body = b"".join(
        (
            MAGIC,
            bytes([VERSION << 4 | flags]),
            container.model_id,
            bytes([container.level]),
            variable,
            container.payload,
            container.token_check.to_bytes(2, "big"),
        )
    )
    return body + zlib.crc32(body).to_bytes(4, "big")


def parse(data: bytes) -> Container:
    """Read the bytes of a .pqm file.

    Each file has one reading and each container one file: `pack(parse(data)) == data`.

    Raises:
        NotAPqmFileError: the data is empty or begins otherwise.
        TruncatedFileError: too short to hold the fixed fields.
        UnsupportedFileError: unknown version or flag.
        DamagedFileError: wrong checksum (which is also how most truncated files show), or fields that
            do not fit.
    """
    if not data:
        raise NotAPqmFileError("the file is empty")
    if data[: len(MAGIC)] != MAGIC[: len(data)]:
        raise NotAPqmFileError("not a .pqm file")
    if len(data) <= len(MAGIC):
        raise TruncatedFileError(f"the file ends after {len(data)} bytes")
    version, flags = data[len(MAGIC)] >> 4, data[len(MAGIC)] & 0b1111
    if version != VERSION:
        raise UnsupportedFileError(f"format version {version}; this release reads version {VERSION}")
    if flags & ~_KNOWN_FLAGS:
        raise UnsupportedFileError(f"unknown flags {flags:#06b}; a newer release may read this file")
    if len(data) < _MIN_BYTES:
        raise TruncatedFileError(f"the file ends after {len(data)} bytes; the shortest has {_MIN_BYTES}")
    if zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "big"):
        raise DamagedFileError("checksum mismatch: the file is damaged or cut short")

    # From here on the bytes are as they were written; what still does not fit was written wrongly.
    model_id = data[len(MAGIC) + 1 : _FIXED_START - 1]
    fields = _FieldReader(data, start=_FIXED_START, end=len(data) - _FIXED_END)
    width = fields.varint(max_value=MAX_DIMENSION - 1) + 1
    height = fields.varint(max_value=MAX_DIMENSION - 1) + 1
    steps_sent = fields.varint(max_value=MAX_STEPS_SENT) if flags & _FLAG_PARTIAL else None
    alpha = None
    if flags & _FLAG_ALPHA:
        alpha = fields.take(fields.varint(max_value=MAX_ALPHA_BYTES))
        if not alpha:
            raise DamagedFileError("the alpha section is empty")
    return Container(
        width=width,
        height=height,
        model_id=model_id,
        level=data[_FIXED_START - 1],
        payload=fields.rest(),
        token_check=int.from_bytes(data[-_FIXED_END:-4], "big"),
        steps_sent=steps_sent,
        alpha=alpha,
    )


def _varint(value: int) -> bytes:
    """Write an unsigned integer in groups of 7 bits, low group first, high bit set on all but the last."""
    groups = bytearray()
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


class _FieldReader:
    """Reads fields of data[start:end] in turn and never past the end."""

    def __init__(self, data: bytes, *, start: int, end: int) -> None:
        self._data = data
        self._position = start
        self._end = end

    def take(self, count: int) -> bytes:
        if count > self._end - self._position:
            raise DamagedFileError("a field runs past the end of the file")
        self._position += count
        return self._data[self._position - count : self._position]

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

    def rest(self) -> bytes:
        return self.take(self._end - self._position)
