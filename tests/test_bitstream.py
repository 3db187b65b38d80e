"""The container: what it writes, and that it refuses everything else."""

import re
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pqmim.bitstream import MAGIC, MAX_DIMENSION, MAX_STEPS_SENT, VERSION, Container, pack, parse, token_check
from pqmim.errors import (
    BitstreamError,
    DamagedFileError,
    NotAPqmFileError,
    TruncatedFileError,
    UnsupportedFileError,
)

FORMAT_PAGE = (Path(__file__).parent.parent / "docs" / "format.md").read_text(encoding="utf-8")
EXAMPLE = Container(
    width=30,
    height=20,
    model_id=bytes.fromhex("C0FFEE01"),
    level=2,
    payload=bytes.fromhex("FFFEC2"),
    token_check=token_check(bytes.fromhex("02 00 00 00 03 00 01 00")),
)
LARGEST = Container(
    width=MAX_DIMENSION,
    height=MAX_DIMENSION,
    model_id=bytes(4),
    level=255,
    payload=b"",
    token_check=0xFFFF,
    steps_sent=MAX_STEPS_SENT,
    alpha=bytes(300),
)

dimensions = st.integers(1, MAX_DIMENSION)
containers = st.builds(
    Container,
    width=dimensions,
    height=dimensions,
    model_id=st.binary(min_size=4, max_size=4),
    level=st.integers(0, 255),
    payload=st.binary(max_size=100),
    token_check=st.integers(0, 0xFFFF),
    steps_sent=st.none() | st.integers(0, MAX_STEPS_SENT),
    alpha=st.none() | st.binary(min_size=1, max_size=200),
)


def with_checksum(body: bytes) -> bytes:
    """A file whose checksum is right, whatever else is wrong."""
    return body + zlib.crc32(body).to_bytes(4, "big")


def test_example_of_the_format_page() -> None:
    table = FORMAT_PAGE.split("## Example")[1].split("\n\n")[2]
    documented = b"".join(bytes.fromhex(cell) for cell in re.findall(r"^\| `([0-9A-F ]+)` \|", table, re.M))
    assert pack(EXAMPLE) == documented
    assert parse(documented) == EXAMPLE
    assert f"The file has {len(documented)} bytes" in FORMAT_PAGE


def test_constants_of_the_format_page() -> None:
    assert MAGIC.hex(" ").upper() in FORMAT_PAGE
    assert f"format, version {VERSION}." in FORMAT_PAGE
    assert (MAX_DIMENSION, MAX_STEPS_SENT) == (2**21, 2**14 - 1)
    assert len(pack(replace(EXAMPLE, payload=b""))) == 18
    assert len(pack(replace(EXAMPLE, width=768, height=512, payload=b""))) == 20
    assert token_check(b"123456789") == 0x31C3  # the check value of CRC-16/XMODEM


@given(containers)
def test_round_trip(container: Container) -> None:
    data = pack(container)
    assert parse(data) == container
    assert pack(parse(data)) == data


@pytest.mark.parametrize("container", [EXAMPLE, LARGEST, replace(EXAMPLE, steps_sent=0, alpha=b"\xff")])
def test_every_flipped_bit_and_every_truncation_is_refused(container: Container) -> None:
    data = pack(container)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError):
            parse(bytes(flipped))
    for length in range(len(data)):
        with pytest.raises(BitstreamError):
            parse(data[:length])


@given(containers, st.data())
def test_damage_is_refused(container: Container, data: st.DataObject) -> None:
    good = pack(container)
    start = data.draw(st.integers(0, len(good)))
    stop = data.draw(st.integers(start, len(good)))
    bad = good[:start] + data.draw(st.binary(max_size=8)) + good[stop:]
    if bad != good:
        with pytest.raises(BitstreamError):
            parse(bad)


@given(st.binary(max_size=60))
def test_garbage_is_refused(garbage: bytes) -> None:
    for data in (garbage, MAGIC + garbage, with_checksum(garbage)):
        with pytest.raises(BitstreamError):
            parse(data)


@given(st.integers(0, 3), st.binary(max_size=40))
def test_a_right_checksum_over_anything_reads_one_way_or_not_at_all(flags: int, rest: bytes) -> None:
    data = with_checksum(MAGIC + bytes([VERSION << 4 | flags]) + bytes(5) + rest)
    try:
        container = parse(data)
    except BitstreamError:
        return
    assert pack(container) == data


def test_each_cause_has_its_error() -> None:
    good = pack(EXAMPLE)
    with pytest.raises(NotAPqmFileError, match="empty"):
        parse(b"")
    with pytest.raises(NotAPqmFileError, match="not a"):
        parse(b"\x89PNG\r\n\x1a\n" + bytes(40))
    for length in (1, 3, 4, 5, 17):
        with pytest.raises(TruncatedFileError, match=f"after {length} bytes"):
            parse(good[:length])
    with pytest.raises(UnsupportedFileError, match="version 2"):
        parse(good[:4] + b"\x20" + good[5:])
    with pytest.raises(UnsupportedFileError, match="flags 0b0100"):
        parse(good[:4] + b"\x14" + good[5:])
    for bad in (good[:-1], good + b"\0", good + good):
        with pytest.raises(DamagedFileError, match="checksum"):
            parse(bad)


@pytest.mark.parametrize(
    ("flags", "fields", "cause"),
    [
        (0, "80 00 00", "shortest form"),
        (0, "80 80 80 00 00", "shortest form"),
        (0, "80 80 80 80 80 80 80 80", "too long"),
        (0, "80 80 80 01 00", "above its limit"),
        (0, "00 FF FF FF FF FF", "above its limit"),
        (0, "00 80", "past the end"),
        (1, "00 00", "past the end"),
        (1, "00 00 80 80 01", "above its limit"),
        (2, "00 00 00", "empty"),
        (2, "00 00 02 FF", "past the end"),
        (2, "00 00 FF FF FF FF 7F", "above its limit"),
    ],
)
def test_fields_that_do_not_fit(flags: int, fields: str, cause: str) -> None:
    start = MAGIC + bytes([VERSION << 4 | flags]) + bytes(5)
    with pytest.raises(DamagedFileError, match=cause):
        parse(with_checksum(start + bytes.fromhex(fields) + bytes(2)))


@pytest.mark.parametrize(
    ("change"),
    [
        {"width": 0},
        {"height": MAX_DIMENSION + 1},
        {"model_id": b"abc"},
        {"level": -1},
        {"level": 256},
        {"token_check": 1 << 16},
        {"steps_sent": MAX_STEPS_SENT + 1},
        {"alpha": b""},
    ],
)
def test_a_container_that_no_file_can_hold(change: dict[str, int | bytes]) -> None:
    with pytest.raises(ValueError, match=r"must|has|is 0 to"):
        replace(EXAMPLE, **change)  # type: ignore[arg-type]
