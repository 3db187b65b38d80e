"""The step loop: what the writer sends the reader reads, and a frequency that is off by one is found out."""

from pathlib import Path

import pytest
import torch
from conftest import synthetic_photo
from exact_model import NUM_CODEWORDS, NUM_LEVELS, RUNS, exact_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pqmim.codec import Codec, load_codec
from pqmim.errors import DamagedFileError, TokenCheckError
from pqmim.exact_inference import ExactEntropyModel, exact_kernels
from pqmim.range_coding import TokenReader, TokenWriter
from pqmim.schedule import Step, positions_of
from pqmim.token_coding import CHUNK_POSITIONS, GivenTokens, bits_table, code_tokens

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> ExactEntropyModel:
    return exact_model()


def written(model: ExactEntropyModel, tokens: Tensor, level: int = 1) -> bytes:
    writer = TokenWriter()
    coded = code_tokens(model, writer, tokens.shape[1], tokens.shape[2], level, GivenTokens(tokens))
    assert torch.equal(coded, tokens)
    return writer.finish()


def read(model: ExactEntropyModel, payload: bytes, height: int, width: int, level: int = 1) -> Tensor:
    reader = TokenReader(payload)
    tokens = code_tokens(model, reader, height, width, level)
    reader.finish()
    return tokens


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 999), st.sampled_from(["any", "zero", "last"]))
def test_round_trip(model: ExactEntropyModel, height: int, width: int, seed: int, kind: str) -> None:
    shape = (len(RUNS), height, width)
    tokens = torch.randint(NUM_CODEWORDS, shape, generator=torch.Generator().manual_seed(seed))
    if kind == "zero":
        tokens.zero_()
    elif kind == "last":
        tokens.fill_(NUM_CODEWORDS - 1)
    level = seed % NUM_LEVELS
    payload = written(model, tokens, level)
    assert torch.equal(read(model, payload, height, width, level), tokens)


def test_every_kernel_writes_and_reads_the_same() -> None:
    tokens = torch.randint(NUM_CODEWORDS, (len(RUNS), 7, 6), generator=torch.Generator().manual_seed(0))
    models = [exact_model(kernel) for kernel in exact_kernels(CPU)]
    payloads = {written(model, tokens) for model in models}
    assert len(payloads) == 1
    for model in models:
        assert torch.equal(read(model, *payloads, 7, 6), tokens)


def test_another_level_does_not_read_the_tokens(model: ExactEntropyModel) -> None:
    tokens = torch.randint(NUM_CODEWORDS, (len(RUNS), 7, 6), generator=torch.Generator().manual_seed(3))
    payload = written(model, tokens, 0)
    try:
        misread = read(model, payload, 7, 6, 2)
    except DamagedFileError:
        return
    assert not torch.equal(misread, tokens)


def test_more_positions_than_a_chunk(model: ExactEntropyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randint(NUM_CODEWORDS, (len(RUNS), 8, 9), generator=torch.Generator().manual_seed(1))
    payload = written(model, tokens)
    assert CHUNK_POSITIONS > 7
    monkeypatch.setattr("pqmim.token_coding.CHUNK_POSITIONS", 7)
    assert written(model, tokens) == payload  # chunks bound memory, nothing else
    assert torch.equal(read(model, payload, 8, 9), tokens)


def test_payload_is_as_long_as_the_frequencies_say(model: ExactEntropyModel) -> None:
    tokens = torch.randint(NUM_CODEWORDS, (len(RUNS), 12, 12), generator=torch.Generator().manual_seed(2))
    table = bits_table(CPU).double()
    bits = 0.0

    class Counting(GivenTokens):
        def __call__(self, step: Step, positions: Tensor, frequencies: Tensor) -> Tensor:
            nonlocal bits
            chosen = super().__call__(step, positions, frequencies)
            bits += float(table[frequencies.gather(2, chosen[:, :, None])].sum())
            return chosen

    code_tokens(model, TokenWriter(), 12, 12, 1, Counting(tokens))
    length = 8 * len(written(model, tokens))
    assert bits * 0.999 - 8 <= length <= bits * 1.01 + 64


def test_bits_of_frequencies() -> None:
    table = bits_table(CPU)
    assert table[1] == 16
    assert table[1 << 15] == 1
    assert table[1 << 16] == 0
    assert torch.isinf(table[0])


@pytest.fixture
def codec(tiny_model: Path) -> Codec:
    return load_codec(tiny_model, device="cpu")


@pytest.mark.parametrize("step_to_spoil", range(7))
def test_a_frequency_that_is_off_by_one_is_refused(
    codec: Codec, monkeypatch: pytest.MonkeyPatch, step_to_spoil: int
) -> None:
    """As on a machine whose network gives another last bit: one count moves from or to the token that is coded."""
    data = codec.encode(synthetic_photo(160, 160), quality=100)
    tokens = codec.decode_tokens(data)
    original = ExactEntropyModel.frequencies
    calls = 0

    def spoilt(self: ExactEntropyModel, hidden: Tensor, level: int, group: int) -> Tensor:
        nonlocal calls
        frequencies = original(self, hidden, level, group).clone()
        if calls == step_to_spoil:  # one call a step: the grid is small
            step = self.schedule.steps[calls]
            token = int(tokens[step.first].flat[positions_of(step, *tokens.shape[1:])[0]])
            row = frequencies[0, 0]
            count = 1 if row[token] == 1 else -1
            row[token] += count
            row[token - 1 if token else 1] -= count
        calls += 1
        return frequencies

    monkeypatch.setattr(ExactEntropyModel, "frequencies", spoilt)
    with pytest.raises((TokenCheckError, DamagedFileError)) as caught:
        codec.decode_tokens(data)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert (codec.decode_tokens(data) == tokens).all()
