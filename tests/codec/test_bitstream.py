"""The container: what it writes in either form, that it refuses everything else, how it is cut and salvaged."""

import binascii
import re
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pqmim.bitstream import (
    MAGIC,
    MAX_DIMENSION,
    MAX_LEVEL,
    MAX_METADATA_BYTES,
    MINI_MAGIC,
    MINI_MAX_LEVEL,
    MINI_MAX_PAYLOAD,
    SCALES,
    VERSION,
    Container,
    at_coded_size,
    is_pqm,
    overhead,
    pack,
    parse,
    salvage,
    smallest_size,
    token_check,
    truncate,
)
from pqmim.errors import (
    BitstreamError,
    DamagedFileError,
    NotAPqmFileError,
    TruncatedFileError,
    UnsupportedFileError,
)

FORMAT_PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
FULL_EXAMPLE = Container(
    width=60,
    height=19,
    model_id=bytes.fromhex("C0FFEE01"),
    level=40,
    scale=2,
    payload=bytes.fromhex("EFFEDF"),
    token_check=token_check(bytes.fromhex("00 00 02 00 03 00 01 00")),
)
MINI_EXAMPLE = Container(
    width=30, height=10, model_id=bytes.fromhex("C0FF"), level=2, scale=1, payload=bytes.fromhex("EFFEDF")
)
METADATA_EXAMPLE = Container(
    width=30,
    height=10,
    model_id=FULL_EXAMPLE.model_id,
    level=2,
    scale=1,
    payload=FULL_EXAMPLE.payload,
    token_check=FULL_EXAMPLE.token_check,
    metadata=bytes.fromhex("78DA6366B5A9C82DB0030005AB01D8"),
)
PARTIAL_EXAMPLE = replace(MINI_EXAMPLE, payload=bytes.fromhex("EFFE"), is_partial=True)
LARGEST = Container(
    width=MAX_DIMENSION,
    height=MAX_DIMENSION,
    model_id=bytes(4),
    level=MAX_LEVEL,
    scale=8,
    payload=b"",
    is_partial=True,
    alpha=bytes(300),
)
LONG_MINI = replace(MINI_EXAMPLE, level=MINI_MAX_LEVEL, scale=8, payload=b"\xa5" * MINI_MAX_PAYLOAD)
SHORT_FULL = replace(FULL_EXAMPLE, level=0, payload=b"\xa5" * (MINI_MAX_PAYLOAD + 1))
OF_EACH_KIND = [
    FULL_EXAMPLE,
    MINI_EXAMPLE,
    PARTIAL_EXAMPLE,
    LARGEST,
    replace(FULL_EXAMPLE, alpha=b"\xff"),
    METADATA_EXAMPLE,
]

payloads = st.binary(max_size=100) | st.integers(MINI_MAX_PAYLOAD - 9, MINI_MAX_PAYLOAD + 40).map(
    lambda length: bytes(index * 37 % 256 for index in range(length))
)


@st.composite
def containers(draw: st.DrawFn) -> Container:
    """Containers as a file holds them: what the mini form does not carry is not there."""
    dimensions = st.integers(1, 300) | st.integers(1, MAX_DIMENSION)
    is_partial = draw(st.booleans())
    container = Container(
        width=draw(dimensions),
        height=draw(dimensions),
        model_id=draw(st.binary(min_size=4, max_size=4)),
        level=draw(st.integers(0, MAX_LEVEL)),
        scale=draw(st.sampled_from(SCALES)),
        payload=draw(payloads),
        is_partial=is_partial,
        token_check=None if is_partial else draw(st.integers(0, 0xFFFF)),
        alpha=draw(st.none() | st.binary(min_size=1, max_size=200)),
        metadata=draw(st.none() | st.binary(min_size=1, max_size=200)),
    )
    return replace(container, model_id=container.model_id[:2], token_check=None) if container.is_mini else container


def with_checksum(body: bytes) -> bytes:
    """A file whose checksum is right, whatever else is wrong."""
    if body.startswith(MINI_MAGIC):
        return body + (binascii.crc_hqx(body, 0xFFFF) ^ 0xFFFF).to_bytes(2, "big")
    return body + zlib.crc32(body).to_bytes(4, "big")


def read_as_the_format_page_says(section: str) -> tuple[bytes, int]:
    """Return the bytes of an example and the number of bytes that the text tells."""
    text = FORMAT_PAGE.split(f"\n### {section}\n")[1].split("\n###")[0]
    table = text.split("\n\n")[1]
    told = re.search(r"(?:has|cut to) (\d+) bytes:", text)
    assert told is not None
    return b"".join(bytes.fromhex(cell) for cell in re.findall(r"^\| `([0-9A-F ]+)` \|", table, re.M)), int(told[1])


@pytest.mark.parametrize(
    ("section", "container"),
    [
        ("Full form", FULL_EXAMPLE),
        ("Mini form", MINI_EXAMPLE),
        ("With metadata", METADATA_EXAMPLE),
        ("Partial file", PARTIAL_EXAMPLE),
    ],
)
def test_examples_of_the_format_page(section: str, container: Container) -> None:
    documented, num_bytes = read_as_the_format_page_says(section)
    assert pack(container) == documented
    assert parse(documented) == container
    assert len(documented) == num_bytes


def test_constants_of_the_format_page() -> None:
    for magic in (MAGIC, MINI_MAGIC):
        assert f"| `{magic.hex(' ').upper()}`" in FORMAT_PAGE
    assert f"format, version {VERSION}." in FORMAT_PAGE
    assert (MAX_DIMENSION, MAX_LEVEL, MINI_MAX_LEVEL, MINI_MAX_PAYLOAD) == (2**21, 63, 31, 1024)
    assert f"1 to 2^{MAX_METADATA_BYTES.bit_length() - 1} |" in FORMAT_PAGE
    assert token_check(b"123456789") == 0x31C3  # the check value of CRC-16/XMODEM
    # The mini form's CRC-16 is the one whose check value is 0xD64E (CRC-16/GENIBUS).
    assert with_checksum(MINI_MAGIC)[2:] == (binascii.crc_hqx(MINI_MAGIC, 0xFFFF) ^ 0xFFFF).to_bytes(2, "big")
    assert binascii.crc_hqx(b"123456789", 0xFFFF) ^ 0xFFFF == 0xD64E


@pytest.mark.parametrize(
    ("container", "at_128", "at_768_x_512"),
    [
        (FULL_EXAMPLE, 18, 20),
        (replace(FULL_EXAMPLE, is_partial=True, token_check=None), 16, 18),
        (MINI_EXAMPLE, 9, 11),
        (PARTIAL_EXAMPLE, 9, 11),
    ],
)
def test_fixed_cost(container: Container, at_128: int, at_768_x_512: int) -> None:
    assert overhead(replace(container, width=128, height=128, payload=b"")) == at_128
    assert overhead(replace(container, width=768, height=512)) == at_768_x_512


@given(containers())
def test_round_trip(container: Container) -> None:
    data = pack(container)
    assert parse(data) == container
    assert pack(parse(data)) == data
    assert data.startswith(MINI_MAGIC if container.is_mini else MAGIC)
    assert overhead(container) == len(data) - len(container.payload)
    assert salvage(data) == (container, "")


def test_which_form_is_written() -> None:
    assert pack(LONG_MINI).startswith(MINI_MAGIC)
    whole = replace(LONG_MINI, model_id=b"abcd", token_check=0)
    assert pack(replace(whole, model_id=b"abxx", token_check=7)) == pack(whole)  # which it does not carry
    for change in (
        {"level": MINI_MAX_LEVEL + 1},
        {"payload": bytes(MINI_MAX_PAYLOAD + 1)},
        {"alpha": b"x"},
        {"metadata": b"x"},
    ):
        assert pack(replace(whole, **change)).startswith(MAGIC)


@pytest.mark.parametrize("container", OF_EACH_KIND)
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


@pytest.mark.parametrize("container", OF_EACH_KIND)
def test_added_zeros_are_refused(container: Container) -> None:
    for count in range(1, 20):
        with pytest.raises(BitstreamError):
            parse(pack(container) + bytes(count))


@given(containers().filter(lambda container: not container.is_mini), st.data())
def test_damage_is_refused(container: Container, data: st.DataObject) -> None:
    good = pack(container)
    start = data.draw(st.integers(0, len(good)))
    stop = data.draw(st.integers(start, len(good)))
    bad = good[:start] + data.draw(st.binary(max_size=8)) + good[stop:]
    if bad != good:
        with pytest.raises(BitstreamError):
            parse(bad)


@given(containers().filter(lambda container: container.is_mini), st.data())
def test_16_damaged_bits_are_refused_in_mini_form(container: Container, data: st.DataObject) -> None:
    good = bytearray(pack(container))
    start = data.draw(st.integers(2, len(good) - 2))
    bad = good[:start] + data.draw(st.binary(min_size=2, max_size=2)) + good[start + 2 :]
    if bad != good:
        with pytest.raises(BitstreamError):
            parse(bytes(bad))


@given(st.binary(max_size=60))
def test_garbage_is_refused(garbage: bytes) -> None:
    for data in (garbage, MAGIC + garbage, with_checksum(MAGIC + garbage)[:-1]):
        with pytest.raises(BitstreamError):
            parse(data)


full_starts = st.builds(
    lambda flags, settings: MAGIC + bytes([VERSION << 4 | flags]) + bytes(4) + bytes([settings]),
    st.integers(0, 7),
    st.integers(0, 255),
)
mini_starts = st.integers(0, 255).map(lambda settings: MINI_MAGIC + bytes([settings]))


@given(full_starts | mini_starts, st.binary(max_size=40))
def test_a_right_checksum_over_anything_reads_one_way_or_not_at_all(start: bytes, rest: bytes) -> None:
    data = with_checksum(start + rest)
    try:
        container = parse(data)
    except BitstreamError:
        return
    assert pack(container) == data


def test_each_cause_has_its_error() -> None:
    good = pack(FULL_EXAMPLE)
    mini = pack(MINI_EXAMPLE)
    with pytest.raises(NotAPqmFileError, match="empty"):
        parse(b"")
    for other in (b"\x89PNG\r\n\x1a\n", b"\x8dx", b"\x8dPx"):
        with pytest.raises(NotAPqmFileError, match="not a"):
            parse(other + bytes(40))
    for length in (1, 2, 3, 4, 5, 15):
        with pytest.raises(TruncatedFileError, match=f"after {length} bytes"):
            parse(good[:length])
    for length in (1, 2, 3, 8):
        with pytest.raises(TruncatedFileError, match=f"after {length} bytes"):
            parse(mini[:length])
    with pytest.raises(UnsupportedFileError, match="format version 1; this release reads version 3"):
        parse(good[:4] + b"\x10" + good[5:])
    with pytest.raises(UnsupportedFileError, match="flags 0b1000"):
        parse(good[:4] + b"\x38" + good[5:])
    for earlier in (good[:4] + b"\x20" + good[5:], b"\x8d\x70" + mini[2:], b"\x8d\x70\x10"):
        for read in (parse, lambda data: salvage(data)):
            with pytest.raises(UnsupportedFileError, match=r"^made by pqmim 0\.2 or 0\.3, whose files"):
                read(earlier)
        assert is_pqm(earlier)
    for bad in (good[:-1], good + b"\0", good + good, mini[:-1], mini + mini):
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
        (0, "00 00 55", "past the end"),
        (2, "00 00 00", "empty"),
        (2, "00 00 02 FF", "past the end"),
        (2, "00 00 01 FF 55", "past the end"),
        (2, "00 00 FF FF FF FF 7F", "above its limit"),
        (4, "00 00 00", "metadata section is empty"),
        (4, "00 00 02 FF", "past the end"),
        (4, "00 00 81 80 80 02", "above its limit"),
        (6, "00 00 01 FF", "past the end"),
        (6, "00 00 01 FF 00", "metadata section is empty"),
    ],
)
def test_fields_that_do_not_fit(flags: int, fields: str, cause: str) -> None:
    start = MAGIC + bytes([VERSION << 4 | flags]) + bytes(4) + b"\x3f"
    data = with_checksum(start + bytes.fromhex(fields))
    with pytest.raises(TruncatedFileError if len(data) < 16 else DamagedFileError, match=cause):
        parse(data)


@pytest.mark.parametrize("flags", [0, 1])
def test_the_other_form_is_refused(flags: int) -> None:
    full = MAGIC + bytes([VERSION << 4 | flags]) + bytes(5) + bytes(2)
    check = bytes(0 if flags else 2)
    for payload in (b"", bytes(MINI_MAX_PAYLOAD)):
        with pytest.raises(DamagedFileError, match="not in its shortest form"):
            parse(with_checksum(full + payload + check))
    assert len(parse(with_checksum(full + bytes(MINI_MAX_PAYLOAD + 1) + check)).payload) == MINI_MAX_PAYLOAD + 1
    mini = MINI_MAGIC + bytes([flags]) + bytes(4)
    assert len(parse(with_checksum(mini + bytes(MINI_MAX_PAYLOAD))).payload) == MINI_MAX_PAYLOAD
    with pytest.raises(DamagedFileError, match="not in its shortest form"):
        parse(with_checksum(mini + bytes(MINI_MAX_PAYLOAD + 1)))


@pytest.mark.parametrize(
    ("container", "change"),
    [
        (FULL_EXAMPLE, {"width": 0}),
        (FULL_EXAMPLE, {"height": MAX_DIMENSION + 1}),
        (FULL_EXAMPLE, {"model_id": b"abc"}),
        (FULL_EXAMPLE, {"model_id": b"ab"}),
        (FULL_EXAMPLE, {"level": -1}),
        (FULL_EXAMPLE, {"level": 64}),
        (FULL_EXAMPLE, {"scale": 3}),
        (FULL_EXAMPLE, {"scale": 16}),
        (FULL_EXAMPLE, {"token_check": 1 << 16}),
        (FULL_EXAMPLE, {"token_check": None}),
        (FULL_EXAMPLE, {"is_partial": True}),
        (FULL_EXAMPLE, {"alpha": b""}),
        (FULL_EXAMPLE, {"metadata": b""}),
        (FULL_EXAMPLE, {"metadata": bytes(MAX_METADATA_BYTES + 1)}),
        (MINI_EXAMPLE, {"model_id": b"abc"}),
        (MINI_EXAMPLE, {"payload": bytes(MINI_MAX_PAYLOAD + 1)}),
        (PARTIAL_EXAMPLE, {"token_check": 0}),
    ],
)
def test_a_container_that_no_file_can_hold(container: Container, change: dict[str, int | bytes]) -> None:
    with pytest.raises(ValueError, match=r"must|has|is 0 to"):
        replace(container, **change)  # type: ignore[arg-type]


def check_truncated(data: bytes, num_bytes: int) -> None:
    """Check that the result is valid and that no longer payload would have fitted."""
    cut = truncate(data, num_bytes)
    assert len(cut) <= num_bytes
    before, after = parse(data), parse(cut)
    assert pack(after) == cut
    if len(data) <= num_bytes:
        assert cut == data
        return
    if before.metadata is not None:
        check_truncated(pack(replace(before, metadata=None)), num_bytes)
        assert cut == truncate(pack(replace(before, metadata=None)), num_bytes)
        return
    assert after.is_partial
    same = {"payload": b"", "is_partial": True, "token_check": None, "model_id": before.model_id[:2] + b"--"}
    assert replace(before, **same) == replace(after, **same)  # type: ignore[arg-type]
    assert after.model_id == before.model_id[: len(after.model_id)]
    kept = len(after.payload)
    assert after.payload == before.payload[:kept]
    if kept < len(before.payload):
        longer = replace(before, payload=before.payload[: kept + 1], is_partial=True, token_check=None)
        assert len(pack(longer)) > num_bytes


@given(containers(), st.data())
def test_truncate_keeps_as_much_as_fits(container: Container, data: st.DataObject) -> None:
    whole = pack(container)
    smallest = overhead(replace(container, payload=b"", is_partial=True, token_check=None, metadata=None))
    assert smallest_size(whole) == smallest
    num_bytes = data.draw(st.integers(smallest, len(whole) + 1))
    check_truncated(whole, num_bytes)
    fewer = data.draw(st.integers(smallest, num_bytes))
    assert truncate(truncate(whole, num_bytes), fewer) == truncate(whole, fewer)
    with pytest.raises(ValueError, match=f"fewer than {smallest} bytes, not {smallest - 1}"):
        truncate(whole, smallest - 1)


@pytest.mark.parametrize(
    "container", [LONG_MINI, SHORT_FULL, replace(SHORT_FULL, level=8), replace(SHORT_FULL, payload=bytes(1100))]
)
def test_truncate_at_the_border_between_the_forms(container: Container) -> None:
    data = pack(container)
    for num_bytes in range(MINI_MAX_PAYLOAD - 10, len(data) + 2):
        check_truncated(data, num_bytes)


@given(containers().filter(lambda container: container.metadata is not None), st.data())
def test_truncate_may_keep_metadata(container: Container, data: st.DataObject) -> None:
    whole = pack(container)
    smallest = smallest_size(whole, keep_metadata=True)
    assert smallest == overhead(replace(container, payload=b"", is_partial=True, token_check=None))
    num_bytes = data.draw(st.integers(smallest, len(whole)))
    cut = truncate(whole, num_bytes, keep_metadata=True)
    assert len(cut) <= num_bytes
    assert (parse(cut).metadata, parse(cut).alpha) == (container.metadata, container.alpha)
    assert len(parse(cut).payload) == min(len(container.payload), num_bytes - smallest)
    with pytest.raises(ValueError, match=f"fewer than {smallest} bytes"):
        truncate(whole, smallest - 1, keep_metadata=True)


def test_metadata_go_before_the_payload() -> None:
    data = pack(METADATA_EXAMPLE)
    assert truncate(data, len(data)) == data
    assert truncate(data, len(data) - 1) == pack(MINI_EXAMPLE)
    assert truncate(data, 11) == pack(PARTIAL_EXAMPLE)
    assert at_coded_size(METADATA_EXAMPLE).metadata is None


def test_truncate_refuses_what_parse_refuses() -> None:
    with pytest.raises(DamagedFileError, match="checksum"):
        truncate(pack(FULL_EXAMPLE)[:-1], 1000)


@given(containers(), st.data())
def test_salvage_of_a_cut_file_is_a_prefix(container: Container, data: st.DataObject) -> None:
    whole = pack(container)
    start = overhead(container) - (2 if container.is_mini else 4 if container.is_partial else 6)
    length = data.draw(st.integers(start, len(whole) - 1))
    left, reason = salvage(whole[:length])
    if reason:  # in mini form, one cut file of 2**16 has a fitting checksum
        assert reason == "checksum mismatch: cut or damaged"
        assert left.is_partial
        assert left.payload == whole[start:length][: MINI_MAX_PAYLOAD if container.is_mini else None]
        same = {"payload": b"", "is_partial": True, "token_check": None, "model_id": b"----"}
        assert replace(left, **same) == replace(container, **same)  # type: ignore[arg-type]
        assert left.model_id == container.model_id


@pytest.mark.parametrize("container", [*OF_EACH_KIND, LONG_MINI, SHORT_FULL])
def test_salvage_reads_anything_behind_a_whole_header(container: Container) -> None:
    data = pack(container)
    for length in range(len(data)):
        try:
            left, reason = salvage(data[:length])
        except BitstreamError:
            assert length < len(data) - len(container.payload)
        else:
            assert reason.startswith("checksum mismatch")
            assert parse(pack(left)).payload == left.payload
    for index in range(13, len(data)):
        left, reason = salvage(data[:index] + bytes([data[index] ^ 0x55]) + data[index + 1 :])
        assert reason.startswith("checksum mismatch")
        assert pack(left)
    assert len(salvage(data + bytes(2000))[0].payload) >= MINI_MAX_PAYLOAD


def test_salvage_without_the_whole_alpha() -> None:
    container = replace(FULL_EXAMPLE, alpha=b"opaque")
    data = pack(container)
    lost = "checksum mismatch: cut or damaged; the alpha channel and all behind it are lost"
    for cut in (data[:12], data[:15], data[:18], data[:12] + b"\0" + data[13:]):
        left, reason = salvage(cut)
        assert reason == lost
        assert left == replace(container, alpha=None, payload=b"", is_partial=True, token_check=None)
    assert salvage(data[:19])[0].alpha == b"opaque"


def test_salvage_without_all_of_the_metadata() -> None:
    container = replace(METADATA_EXAMPLE, alpha=b"opaque")
    data = pack(container)
    start = data.index(container.metadata or b"")
    for cut in (data[: start - 1], data[:start], data[: start + 14]):
        left, reason = salvage(cut)
        assert reason == "checksum mismatch: cut or damaged; the metadata section and all behind it are lost"
        assert left == replace(container, metadata=None, payload=b"", is_partial=True, token_check=None)
    assert salvage(data[: start + 15])[0].metadata == container.metadata


def test_salvage_needs_a_header() -> None:
    good = pack(FULL_EXAMPLE)
    with pytest.raises(NotAPqmFileError):
        salvage(b"")
    with pytest.raises(NotAPqmFileError):
        salvage(b"GIF89a" + bytes(40))
    with pytest.raises(TruncatedFileError):
        salvage(good[:4])
    with pytest.raises(UnsupportedFileError, match="version 1"):
        salvage(good[:4] + b"\x10" + good[5:])
    with pytest.raises(DamagedFileError, match="past the end"):
        salvage(good[:11])
    with pytest.raises(DamagedFileError, match="not in its shortest form"):  # written so; nothing was cut
        salvage(with_checksum(MAGIC + b"\x31" + bytes(7)))
