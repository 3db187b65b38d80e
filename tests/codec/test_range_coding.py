"""The range coder: its rate, one payload for one sequence of tokens, the arithmetic of the format page."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pqmim import plain_range_coder, range_coding
from pqmim.errors import DamagedFileError
from pqmim.range_coding import PRECISION, PrefixReader, TokenReader, TokenWriter

FORMAT_PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
TOTAL = 1 << PRECISION
EXAMPLE_FREQUENCIES = np.array([[61440, 4094, 1, 1]] * 2 + [[16384] * 4] * 2, np.int32)
EXAMPLE_TOKENS = np.array([0, 2, 3, 1])
EXAMPLE_PAYLOAD = bytes.fromhex("EFFEDF")


@pytest.fixture(params=["constriction", "plain"], autouse=True, scope="module")
def range_coder(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both range coders, which do the same."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            patch.setattr(range_coding, "_queue", plain_range_coder)
        else:
            assert range_coding.__dict__["_queue"] is not plain_range_coder
        yield


def decode_as_the_format_page_says(
    payload: bytes, frequencies: NDArray[np.int32], continuation: int = 0
) -> list[tuple[int, int, int, int]]:
    """A second decoder, written from docs/format.md and sharing nothing with the first.

    Returns offset, range, offset // scale and token, for each token before the payload is invalid.
    """
    digits = iter(payload)

    def next_bytes(count: int) -> int:
        return int.from_bytes(bytes(next(digits, continuation) for _ in range(count)), "big")

    trace = []
    offset = next_bytes(8)
    width = 2**64 - 1
    for row in frequencies.tolist():
        left = left_of(row)
        scale = width >> 24
        token = next((k for k in range(len(row)) if left[k] <= offset // scale < left[k + 1]), None)
        if token is None:
            break
        trace.append((offset, width, offset // scale, token))
        offset -= scale * left[token]
        width = scale * (left[token + 1] - left[token])
        if width < 2**32:
            width <<= 32
            offset = (offset << 32) + next_bytes(4)
    return trace


def read_prefix_as_the_format_page_says(payload: bytes, frequencies: NDArray[np.int32]) -> list[int]:
    """The tokens that the first digits of a payload determine."""
    ends = [decode_as_the_format_page_says(payload, frequencies, continuation) for continuation in (0x00, 0xFF)]
    determined = []
    for (*_, low), (*_, high) in zip(*ends, strict=False):
        if low != high:
            break
        determined.append(low)
    return determined


def left_of(row: Sequence[int]) -> list[int]:
    size = len(row)
    return [int(np.float32(sum(row[:k]) * (2**24 - size) / 2**16)) + k for k in range(size)] + [2**24]


def random_frequencies(rng: np.random.Generator, num_tokens: int, size: int) -> NDArray[np.int32]:
    """Rows from nearly certain to nearly uniform."""
    concentration = 10.0 ** rng.uniform(-2, 1, (num_tokens, 1))
    weights = rng.gamma(concentration, size=(num_tokens, size)) + 1e-12
    weights /= weights.sum(axis=1, keepdims=True)
    frequencies = np.floor(weights * (TOTAL - size)).astype(np.int32) + 1
    frequencies[np.arange(num_tokens), frequencies.argmax(axis=1)] += TOTAL - frequencies.sum(axis=1)
    return frequencies


def random_tokens(rng: np.random.Generator, frequencies: NDArray[np.int32]) -> NDArray[np.int64]:
    """Tokens that follow the frequencies."""
    quantile = rng.integers(0, TOTAL, (len(frequencies), 1))
    return np.asarray((np.cumsum(frequencies, axis=1) <= quantile).sum(axis=1))


def write(frequencies: NDArray[np.int32], tokens: NDArray[np.int64]) -> bytes:
    writer = TokenWriter()
    assert (writer.code(frequencies, tokens) == tokens).all()
    return writer.finish()


def information_content(frequencies: NDArray[np.int32], tokens: NDArray[np.int64]) -> float:
    """In bits."""
    return float(-np.log2(frequencies[np.arange(len(tokens)), tokens] / TOTAL).sum())


def test_example_of_the_format_page() -> None:
    assert write(EXAMPLE_FREQUENCIES, EXAMPLE_TOKENS) == EXAMPLE_PAYLOAD
    trace = decode_as_the_format_page_says(EXAMPLE_PAYLOAD, EXAMPLE_FREQUENCIES)
    assert [token for *_, token in trace] == EXAMPLE_TOKENS.tolist()
    for offset, width, quotient, token in trace:
        assert f"| `{offset:X}` | `{width:X}` | {quotient} | {token} |" in FORMAT_PAGE
    for row in EXAMPLE_FREQUENCIES.tolist():
        assert ", ".join(map(str, left_of(row))) in " ".join(FORMAT_PAGE.split())


@pytest.mark.parametrize("size", [2, 5, 300])
def test_both_range_coders_write_the_same(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(size)
    frequencies = random_frequencies(rng, 3000, size)
    tokens = random_tokens(rng, frequencies)
    payload = write(frequencies, tokens)
    monkeypatch.setattr(range_coding, "_queue", plain_range_coder)
    assert write(frequencies, tokens) == payload


def test_a_carry_through_many_words() -> None:
    # The intervals of these tokens have one half in them: they begin at 0.01111... in binary.
    frequencies = random_frequencies(np.random.default_rng(0), 300, 8)
    around_half = PrefixReader(b"\x80" + bytes(200)).code(frequencies)
    assert len(around_half) == len(frequencies)
    count = 0
    for place in np.flatnonzero(around_half < 7):
        tokens = around_half[: place + 1].copy()
        tokens[-1] += 1  # beyond one half
        payload = write(frequencies[: place + 1], tokens)
        assert payload[0] >= 0x80
        assert (TokenReader(payload).code(frequencies[: place + 1]) == tokens).all()
        count += len(payload) > 16
    assert count > 100


def test_partial_example_of_the_format_page() -> None:
    prefix = EXAMPLE_PAYLOAD[:2]
    assert PrefixReader(prefix).code(EXAMPLE_FREQUENCIES).tolist() == [0]
    for continuation in (0x00, 0xFF):
        for offset, width, quotient, token in decode_as_the_format_page_says(
            prefix, EXAMPLE_FREQUENCIES[:2], continuation
        ):
            assert f"| `{continuation:02X}` | `{offset:X}` | `{width:X}` | {quotient} | {token} |" in FORMAT_PAGE


@pytest.mark.parametrize(("size", "num_tokens"), [(2, 2000), (3, 500), (64, 300), (256, 100), (1024, 50)])
def test_the_second_decoder_reads_the_same_tokens(size: int, num_tokens: int) -> None:
    rng = np.random.default_rng(size)
    frequencies = random_frequencies(rng, num_tokens, size)
    tokens = random_tokens(rng, frequencies)
    trace = decode_as_the_format_page_says(write(frequencies, tokens), frequencies)
    assert [token for *_, token in trace] == tokens.tolist()


@given(st.integers(0, 2**32 - 1), st.binary(max_size=20) | st.binary(max_size=6).map(lambda start: start + b"\xff" * 9))
def test_the_second_decoder_reads_the_same_of_any_prefix(seed: int, prefix: bytes) -> None:
    rng = np.random.default_rng(seed)
    frequencies = random_frequencies(rng, int(rng.integers(0, 60)), int(rng.integers(2, 20)))
    assert PrefixReader(prefix).code(frequencies).tolist() == read_prefix_as_the_format_page_says(prefix, frequencies)


@given(st.integers(0, 2**32 - 1), st.integers(2, 300), st.lists(st.integers(0, 40), max_size=6))
def test_round_trip_in_several_steps(seed: int, size: int, step_lengths: list[int]) -> None:
    rng = np.random.default_rng(seed)
    steps = [random_frequencies(rng, length, size) for length in step_lengths]
    sent = [random_tokens(rng, frequencies) for frequencies in steps]
    writer = TokenWriter()
    for frequencies, tokens in zip(steps, sent, strict=True):
        writer.code(frequencies, tokens)
    reader = TokenReader(writer.finish())
    for frequencies, tokens in zip(steps, sent, strict=True):
        read = reader.code(frequencies)
        assert read.dtype == np.int64
        assert (read == tokens).all()
    reader.finish()


@pytest.mark.parametrize("size", [2, 3, 16, 256, 1024])
def test_code_length_is_the_information_content(size: int) -> None:
    rng = np.random.default_rng(size)
    for num_tokens in (1, 2, 10, 3000):
        frequencies = random_frequencies(rng, num_tokens, size)
        tokens = random_tokens(rng, frequencies)
        bits = information_content(frequencies, tokens)
        assert bits - 8 < 8 * len(write(frequencies, tokens)) < bits * 1.001 + 16


@pytest.mark.parametrize("size", [2, 256, 1024])
def test_nearly_certain_tokens_cost_nearly_nothing(size: int) -> None:
    frequencies = np.ones((10_000, size), np.int32)
    frequencies[:, 0] = TOTAL - (size - 1)
    certain = np.zeros(10_000, np.int64)
    rare = np.ones(10_000, np.int64)
    for tokens in (certain, rare):
        bits = information_content(frequencies, tokens)
        assert 8 * len(write(frequencies, tokens)) <= bits * 1.001 + 32


def test_nothing_costs_nothing() -> None:
    nothing = np.empty((0, 256), np.int32)
    assert write(nothing, np.empty(0, np.int64)) == b""
    reader = TokenReader(b"")
    assert reader.code(nothing).shape == (0,)
    reader.finish()


@settings(max_examples=300)
@given(st.integers(0, 2**32 - 1), st.binary(max_size=40))
def test_every_other_payload_is_refused_or_has_other_tokens(seed: int, payload: bytes) -> None:
    rng = np.random.default_rng(seed)
    frequencies = random_frequencies(rng, int(rng.integers(0, 30)), int(rng.integers(2, 20)))
    reader = TokenReader(payload)
    try:
        tokens = reader.code(frequencies)
        reader.finish()
    except DamagedFileError:
        return
    assert write(frequencies, tokens) == payload


def read_prefix(prefix: bytes, steps: Sequence[NDArray[np.int32]]) -> list[int]:
    """Read step by step; once a step is short, nothing may follow."""
    reader = PrefixReader(prefix)
    tokens: list[int] = []
    ended = False
    for frequencies in steps:
        read = reader.code(frequencies)
        assert read.dtype == np.int64
        assert not (ended and len(read))
        ended = ended or len(read) < len(frequencies)
        tokens.extend(read.tolist())
    return tokens


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 300), st.lists(st.integers(0, 20), max_size=5))
def test_a_prefix_gives_leading_tokens(seed: int, size: int, step_lengths: list[int]) -> None:
    rng = np.random.default_rng(seed)
    steps = [random_frequencies(rng, length, size) for length in step_lengths]
    sent = [random_tokens(rng, frequencies) for frequencies in steps]
    writer = TokenWriter()
    for frequencies, tokens in zip(steps, sent, strict=True):
        writer.code(frequencies, tokens)
    flat = [token for tokens in sent for token in tokens.tolist()]

    payload = writer.finish()
    counts = []
    for length in range(len(payload) + 1):
        read = read_prefix(payload[:length], steps)
        assert read == flat[: len(read)]
        counts.append(len(read))
    assert counts == sorted(counts)

    prefix = writer.prefix_of(payload)
    assert read_prefix(prefix, steps) == flat
    assert read_prefix(prefix + rng.bytes(5), steps) == flat  # whatever follows
    if prefix:
        assert len(read_prefix(prefix[:-1], steps)) < len(flat)  # it is the shortest


@given(st.integers(0, 2**32 - 1), st.integers(2, 300), st.integers(0, 80), st.integers(0, 80))
def test_the_prefix_of_a_longer_message_gives_its_first_tokens(
    seed: int, size: int, num_tokens: int, num_first: int
) -> None:
    rng = np.random.default_rng(seed)
    frequencies = random_frequencies(rng, num_tokens, size)
    tokens = random_tokens(rng, frequencies)
    payload = write(frequencies, tokens)
    first = TokenWriter()
    first.code(frequencies[:num_first], tokens[:num_first])
    prefix = first.prefix_of(payload)
    assert payload.ljust(len(prefix), b"\0").startswith(prefix)
    read = PrefixReader(prefix).code(frequencies)
    assert len(read) >= min(num_first, num_tokens)
    assert (read == tokens[: len(read)]).all()
    if prefix:
        assert len(PrefixReader(prefix[:-1]).code(frequencies)) < num_first  # it is the shortest


@given(st.integers(0, 2**32 - 1), st.binary(max_size=30))
def test_of_a_prefix_any_end_gives_the_same_tokens(seed: int, end: bytes) -> None:
    rng = np.random.default_rng(seed)
    frequencies = random_frequencies(rng, 40, int(rng.integers(2, 100)))
    prefix = write(frequencies, random_tokens(rng, frequencies))[: int(rng.integers(0, 20))]
    determined = PrefixReader(prefix).code(frequencies)
    further = PrefixReader(prefix + end).code(frequencies)
    assert (further[: len(determined)] == determined).all()
    try:
        assert (TokenReader(prefix + end).code(frequencies)[: len(determined)] == determined).all()
    except DamagedFileError:  # the end belongs to no tokens
        assert len(determined) < len(frequencies)


@pytest.mark.parametrize("size", [2, 16, 256, 1024])
def test_a_prefix_of_n_bytes_gives_nearly_8_n_bits_of_tokens(size: int) -> None:
    rng = np.random.default_rng(size)
    frequencies = random_frequencies(rng, 600, size)
    tokens = random_tokens(rng, frequencies)
    payload = write(frequencies, tokens)
    unused = []
    for length in range(len(payload)):
        count = len(PrefixReader(payload[:length]).code(frequencies))
        bits = information_content(frequencies[:count], tokens[:count])
        next_bits = information_content(frequencies[count : count + 1], tokens[count : count + 1])
        assert bits <= 8 * length * 1.001 + 1
        unused.append(8 * length - bits - next_bits)
    # Beyond the token that does not fit, digits are lost only where they straddle two tokens' numbers.
    assert np.mean(unused) < 2
    assert np.quantile(unused, 0.98) < 16


def test_zero_bytes_of_a_prefix_are_digits() -> None:
    # A complete payload does without them.
    frequencies = np.tile(np.array([[TOTAL // 2, TOTAL // 2]], np.int32), (100, 1))
    writer = TokenWriter()
    writer.code(frequencies, np.zeros(100, np.int64))
    assert writer.finish() == b""
    assert set(writer.prefix_of(b"")) == {0}
    assert len(writer.prefix_of(b"")) == 13  # 100 bits
    counts = [len(PrefixReader(bytes(length)).code(frequencies)) for length in range(15)]
    assert counts[0] == 0
    assert counts[-1] == 100
    assert all(7 <= later - earlier <= 9 for earlier, later in pairwise(counts[:12]))


def test_prefixes_at_the_top_of_the_range() -> None:
    # The continuation with 0xFF belongs to no tokens there, and ends in the middle of a batch.
    frequencies = np.tile(np.array([[1, TOTAL - 1]], np.int32), (500, 1))
    tokens = np.ones(500, np.int64)
    writer = TokenWriter()
    writer.code(frequencies, tokens)
    payload = writer.finish()
    prefix = writer.prefix_of(payload)
    for start in (b"", payload, prefix, b"\xff" * 30):
        for length in range(len(start) + 1):
            read = PrefixReader(start[:length]).code(frequencies).tolist()
            assert read == read_prefix_as_the_format_page_says(start[:length], frequencies)
    assert (PrefixReader(prefix).code(frequencies) == tokens).all()


def test_no_tokens_need_no_prefix() -> None:
    for payload in (b"", EXAMPLE_PAYLOAD):
        assert TokenWriter().prefix_of(payload) == b""
    reader = PrefixReader(b"")
    assert reader.code(np.empty((0, 256), np.int32)).shape == (0,)
    assert reader.code(EXAMPLE_FREQUENCIES).shape == (0,)


def test_bytes_left_over_are_refused() -> None:
    for payload in (
        EXAMPLE_PAYLOAD + b"\0",
        EXAMPLE_PAYLOAD + b"x",
        EXAMPLE_PAYLOAD * 5,
    ):
        reader = TokenReader(payload)
        reader.code(EXAMPLE_FREQUENCIES)
        with pytest.raises(DamagedFileError, match="end"):
            reader.finish()


def test_a_payload_that_nothing_encodes_to() -> None:
    # At the top of the range lie a few numbers that belong to no token.
    with pytest.raises(DamagedFileError, match="cannot be decoded"):
        TokenReader(b"\xff" * 20).code(EXAMPLE_FREQUENCIES)


@pytest.mark.parametrize(
    "frequencies",
    [
        np.array([[TOTAL // 2, TOTAL // 2 - 1]]),
        np.array([[TOTAL, 0]]),
        np.array([[TOTAL + 1, -1]]),
        np.array([[TOTAL]]),
        np.array([TOTAL // 2, TOTAL // 2]),
        np.array([[0.5, 0.5]]),
    ],
)
def test_frequencies_that_are_none(frequencies: NDArray[np.int64]) -> None:
    with pytest.raises(ValueError, match="frequencies must"):
        TokenWriter().code(frequencies, np.array([0]))
    with pytest.raises(ValueError, match="frequencies must"):
        TokenReader(b"").code(frequencies)
    with pytest.raises(ValueError, match="frequencies must"):
        PrefixReader(b"").code(frequencies)


@pytest.mark.parametrize("tokens", [None, np.array([0]), np.array([0, 1, 2, 4]), np.array([0, -1, 2, 3])])
def test_tokens_that_do_not_fit(tokens: NDArray[np.int64] | None) -> None:
    with pytest.raises(ValueError, match="token"):
        TokenWriter().code(EXAMPLE_FREQUENCIES, tokens)
