"""The step loop: what the writer sends the reader reads, and a frequency that is off by one is found out."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from exact_model import ALPHABETS, CONFIG, NUM_LEVELS, RUNS, SIZES, exact_model, model_file
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pictures import synthetic_photo
from PIL import Image

from pqmim.alphabets import Alphabets
from pqmim.bitstream import parse
from pqmim.codec import Codec, load_codec
from pqmim.entropy_kernels import exact_kernels
from pqmim.errors import DamagedFileError, TokenCheckError
from pqmim.exact_entropy import EntropyState, ExactEntropyModel
from pqmim.exact_numpy import Activations
from pqmim.model_files import MODEL_FILE, load_model
from pqmim.quantizer import ProductQuantizer, Tokens
from pqmim.range_coding import PRECISION, PrefixReader, TokenReader, TokenWriter
from pqmim.runtime import Workers
from pqmim.schedule import Step, positions_of
from pqmim.token_coding import (
    BUDGET_REACH,
    CHUNK_FREQUENCIES,
    FREE_SHARE,
    Budget,
    Frequencies,
    GivenTokens,
    PrefixWriter,
    RateDistortionChoice,
    TokenGrid,
    _blocks,
    bits_table,
    code_tokens,
)


@pytest.fixture(scope="module")
def model() -> ExactEntropyModel:
    return exact_model()


def written(model: ExactEntropyModel, tokens: Tokens, level: int = 1) -> bytes:
    writer = TokenWriter()
    grid = code_tokens(model, writer, tokens.shape[1], tokens.shape[2], level, GivenTokens(tokens))
    assert grid.is_complete
    assert np.array_equal(grid.tokens, tokens)
    return writer.finish()


def read(model: ExactEntropyModel, payload: bytes, height: int, width: int, level: int = 1) -> Tokens:
    reader = TokenReader(payload)
    grid = code_tokens(model, reader, height, width, level)
    assert grid.is_complete
    reader.finish()
    return grid.tokens


def random_tokens(height: int, width: int, seed: int, level: int = 1) -> Tokens:
    shape = (len(RUNS), height, width)
    return np.random.default_rng(seed).integers(ALPHABETS.sizes[level, :, None, None], size=shape)


def coding_order(height: int, width: int, level: int = 1) -> Iterator[tuple[int, int]]:
    """(sub-quantizer, position) of every token as a file holds them, spelled out."""
    for step in CONFIG.schedule(len(RUNS)).steps:
        for m in range(step.first, step.last):
            if SIZES[level][m] > 1:
                for position in positions_of(step, height, width):
                    yield m, int(position)


def coded(level: int = 1) -> list[int]:
    """Sub-quantizers that are not silent."""
    return [m for m, size in enumerate(SIZES[level]) if size > 1]


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 999), st.sampled_from(["any", "zero", "last"]))
def test_round_trip(model: ExactEntropyModel, height: int, width: int, seed: int, kind: str) -> None:
    level = seed % NUM_LEVELS
    tokens = random_tokens(height, width, seed, level)
    if kind == "zero":
        tokens[:] = 0
    elif kind == "last":
        tokens[:] = ALPHABETS.sizes[level, :, None, None] - 1
    payload = written(model, tokens, level)
    assert np.array_equal(read(model, payload, height, width, level), tokens)


def test_every_kernel_writes_and_reads_the_same() -> None:
    tokens = random_tokens(7, 6, 0)
    models = [exact_model(kernel) for kernel in exact_kernels(model_file())]
    payloads = {written(model, tokens) for model in models}
    assert len(payloads) == 1
    for model in models:
        assert np.array_equal(read(model, *payloads, 7, 6), tokens)


@pytest.mark.parametrize("threads", [2, 4])
def test_threads_write_and_read_the_same(
    model: ExactEntropyModel, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where coding ends in the middle."""
    tokens = random_tokens(9, 8, 5)
    payload = written(model, tokens)
    part = code_tokens(model, PrefixReader(payload[:50]), 9, 8, 1)
    monkeypatch.setattr("pqmim.token_coding.CHUNK_FREQUENCIES", 10)
    monkeypatch.setattr("pqmim.exact_layers.CHUNK_ROWS", 8)
    monkeypatch.setattr("pqmim.runtime.FEW_CHUNKS", 1)
    several = exact_model(threads=threads)
    assert written(several, tokens) == payload
    assert np.array_equal(read(several, payload, 9, 8), tokens)
    for _ in range(5):
        found = code_tokens(several, PrefixReader(payload[:50]), 9, 8, 1)
        assert np.array_equal(found.known, part.known)
        assert np.array_equal(found.tokens, part.tokens)


def test_another_level_does_not_read_the_tokens(model: ExactEntropyModel) -> None:
    tokens = random_tokens(7, 6, 3, 0)
    payload = written(model, tokens, 0)
    try:
        misread = read(model, payload, 7, 6, 2)
    except DamagedFileError:
        return
    assert not np.array_equal(misread, tokens)


@pytest.mark.parametrize("chunk", [1, 7, 40, 100])
def test_chunks_bound_memory_and_nothing_else(
    model: ExactEntropyModel, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    tokens = random_tokens(8, 9, 1)
    payload = written(model, tokens)
    assert CHUNK_FREQUENCIES > 144 * 7  # the largest step
    monkeypatch.setattr("pqmim.token_coding.CHUNK_FREQUENCIES", chunk)
    sizes = []
    original = ExactEntropyModel.frequencies

    def watched(self: ExactEntropyModel, head: Activations, *args: int, **kwargs: float) -> Frequencies:
        frequencies = original(self, head, *args, **kwargs)
        sizes.append((frequencies.size, frequencies.shape[2]))
        return frequencies

    monkeypatch.setattr(ExactEntropyModel, "frequencies", watched)
    assert written(model, tokens) == payload
    assert all(count <= max(chunk, alphabet) for count, alphabet in sizes)
    assert np.array_equal(read(model, payload, 8, 9), tokens)
    part = code_tokens(model, PrefixReader(payload[: len(payload) // 2]), 8, 9, 1)
    monkeypatch.undo()
    assert np.array_equal(code_tokens(model, PrefixReader(payload[: len(payload) // 2]), 8, 9, 1).known, part.known)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from([1, 2, 2, 7]), min_size=1, max_size=20),
    st.integers(0, 3),
    st.integers(1, 3000),
    st.integers(1, 3000),
)
def test_blocks_cut_a_step_in_coding_order(sizes: list[int], before: int, num_positions: int, chunk: int) -> None:
    alphabets = Alphabets(np.array([[3] * before + sizes]), np.ones(before + len(sizes), int))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pqmim.token_coding.CHUNK_FREQUENCIES", chunk)
        blocks = list(_blocks(alphabets.blocks(0, before, before + len(sizes)), num_positions))
    order = np.arange(len(sizes) * num_positions).reshape(len(sizes), -1)
    parts = [order[rows, columns].ravel() for rows, columns in blocks]
    assert all(len(set(sizes[rows])) == 1 for rows, _ in blocks)
    alphabet = [sizes[rows.start] for rows, _ in blocks]
    assert all(0 < len(part) * size <= max(chunk, size) for part, size in zip(parts, alphabet, strict=True))
    expected = order[np.array(sizes) > 1].ravel()
    assert np.array_equal(np.concatenate([np.empty(0, int), *parts]), expected)


@pytest.mark.parametrize("level", range(NUM_LEVELS))
def test_tokens_are_coded_in_the_documented_order(model: ExactEntropyModel, level: int) -> None:
    tokens = random_tokens(5, 6, 4, level)
    sent: list[int] = []

    class Recorder(TokenWriter):
        def code(self, frequencies: np.ndarray, tokens: np.ndarray | None = None) -> np.ndarray:
            found = super().code(frequencies, tokens)
            sent.extend(found.tolist())
            return found

    code_tokens(model, Recorder(), 5, 6, level, GivenTokens(tokens))
    assert sent == [int(tokens[m].flat[position]) for m, position in coding_order(5, 6, level)]


def test_silent_sub_quantizers_are_known_without_a_word(
    model: ExactEntropyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their tokens are 0, and where none of the later ones speaks the network rests."""
    heads: list[Step] = []
    original = ExactEntropyModel.head

    def watched(self: ExactEntropyModel, state: EntropyState, step: Step) -> Activations | None:
        heads.append(step)
        return original(self, state, step)

    monkeypatch.setattr(ExactEntropyModel, "head", watched)
    payload = written(model, random_tokens(8, 8, 3, 2), 2)
    assert heads == list(model.schedule.steps[:7])
    grid = code_tokens(model, TokenReader(payload), 8, 8, 2)
    assert grid.is_complete
    silent = sorted(set(range(len(RUNS))) - set(coded(2)))
    assert silent == [1, 3, 4]
    assert (grid.tokens[silent] == 0).all()


def test_a_level_at_which_all_are_silent_needs_no_bytes() -> None:
    file = model_file()
    sizes, keep = np.array(SIZES), ALPHABETS.starts[2]
    sizes[2] = 1
    whole = [np.arange(ALPHABETS.starts[2, 0]), keep]
    tensors = dict(file.tensors) | {"tokenizer.quantizer.sizes": sizes}
    for name in ("token_factors.weight", "token_bias", "static_frequencies"):
        tensors[f"entropy.{name}"] = file.tensors[f"entropy.{name}"][np.concatenate(whole)]
    tensors["entropy.static_frequencies"][-len(RUNS) :] = 1 << PRECISION
    values = file.tensors["entropy.token_values"]
    tensors["entropy.token_values"] = values[: ALPHABETS.value_starts[2, 0] + ALPHABETS.channels.sum()]
    model = ExactEntropyModel(replace(file, tensors=tensors), Workers(1), kernel="numpy")
    for shape in ((1, 1), (5, 7)):
        tokens = np.zeros((len(RUNS), *shape), np.int64)
        assert written(model, tokens, 2) == b""
        assert np.array_equal(read(model, b"", *shape, 2), tokens)
        nothing = code_tokens(model, PrefixReader(b""), *shape, 2)
        assert (nothing.is_complete, nothing.known_share) == (True, 1.0)


def test_payload_is_as_long_as_the_frequencies_say(model: ExactEntropyModel) -> None:
    tokens = random_tokens(12, 12, 2)
    table = bits_table().astype(np.float64)
    bits = 0.0

    class Counting(GivenTokens):
        def __call__(self, first: int, positions: NDArray[np.int64], frequencies: Frequencies) -> Tokens:
            nonlocal bits
            chosen = super().__call__(first, positions, frequencies)
            bits += float(table[np.take_along_axis(frequencies, chosen[:, :, None], 2)].sum())
            return chosen

    code_tokens(model, TokenWriter(), 12, 12, 1, Counting(tokens))
    length = 8 * len(written(model, tokens))
    assert bits * 0.999 - 8 <= length <= bits * 1.01 + 64


def test_bits_of_frequencies() -> None:
    table = bits_table()
    assert table[1] == 16
    assert table[1 << 15] == 1
    assert table[1 << 16] == 0
    assert np.isinf(table[0])


# -- parts of a grid ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 999), st.floats(0, 1))
def test_a_prefix_of_the_payload_gives_the_leading_tokens(
    model: ExactEntropyModel, height: int, width: int, seed: int, share: float
) -> None:
    level = seed % NUM_LEVELS
    tokens = random_tokens(height, width, seed, level)
    payload = written(model, tokens, level)
    prefix = payload[: round(share * len(payload))]
    grid = code_tokens(model, PrefixReader(prefix), height, width, level)
    number = int(grid.known[coded(level)].sum())
    for index, (m, position) in enumerate(coding_order(height, width, level)):
        assert bool(grid.known[m].flat[position]) == (index < number)
        assert int(grid.tokens[m].flat[position]) == (tokens[m].flat[position] if index < number else 0)
    assert grid.known_share == pytest.approx(number / (len(coded(level)) * height * width))
    assert grid.is_complete == (number == len(coded(level)) * height * width)
    if prefix:
        shorter = code_tokens(model, PrefixReader(prefix[:-1]), height, width, level)
        assert int(shorter.known[coded(level)].sum()) <= number
    else:
        assert number == 0


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 999), st.data())
def test_a_prefix_writer_sends_that_many_tokens(
    model: ExactEntropyModel, height: int, width: int, seed: int, data: st.DataObject
) -> None:
    """Also where a step or a block of it ends exactly at the limit."""
    level = seed % NUM_LEVELS
    tokens, own = random_tokens(height, width, seed, level), coded(level)
    steps = [(step, len(positions_of(step, height, width))) for step in model.schedule.steps]
    sizes = [sum(step.first <= m < step.last for m in own) * count for step, count in steps]
    ends = np.cumsum(sizes).tolist()
    limit = data.draw(st.sampled_from(ends) | st.integers(0, ends[-1] + 3))
    writer = PrefixWriter(limit)
    grid = code_tokens(model, writer, height, width, level, GivenTokens(tokens))
    assert grid.is_complete  # the encoder goes on: its choices need all tokens
    payload = writer.finish()
    assert written(model, tokens, level).ljust(len(payload), b"\0").startswith(payload)
    found = code_tokens(model, PrefixReader(payload), height, width, level)
    assert int(found.known[own].sum()) >= min(limit, ends[-1])  # the last byte may tell some more
    assert np.array_equal(found.tokens[found.known], tokens[found.known])
    if payload:
        shorter = code_tokens(model, PrefixReader(payload[:-1]), height, width, level)
        assert int(shorter.known[own].sum()) < limit


def test_after_every_step_the_grid_is_shown(model: ExactEntropyModel) -> None:
    tokens = random_tokens(6, 7, 5)
    payload = written(model, tokens)
    for reader, is_whole in ((TokenReader(payload), True), (PrefixReader(payload[:40]), False)):
        counts: list[int] = []

        def count(grid: TokenGrid, counts: list[int] = counts) -> None:
            counts.append(int(grid.known.sum()))

        grid = code_tokens(model, reader, 6, 7, 1, after_step=count)
        expected = np.cumsum(
            [(step.last - step.first) * len(positions_of(step, 6, 7)) for step in model.schedule.steps]
        ).tolist()
        assert counts[-1] == int(grid.known.sum())
        assert counts == (expected if is_whole else [*[e for e in expected if e < counts[-1]], counts[-1]])


def test_the_last_step_shows_all_that_is_silent(model: ExactEntropyModel) -> None:
    tokens, counts = random_tokens(6, 7, 5, 2), []
    reader = TokenReader(written(model, tokens, 2))
    code_tokens(model, reader, 6, 7, 2, after_step=lambda grid: counts.append(int(grid.known.sum())))
    assert len(counts) == len(model.steps(2))
    assert counts[-2] < 4 * 42  # of two groups
    assert counts[-1] == tokens.size


def test_steps_without_positions_are_not_shown(model: ExactEntropyModel) -> None:
    tokens = random_tokens(1, 1, 6)
    shown = []
    code_tokens(model, TokenReader(written(model, tokens)), 1, 1, 1, after_step=shown.append)
    assert len(shown) == 3  # one of each group


# -- budgets --------------------------------------------------------------------------------------------------------


def test_a_budget_is_looked_at_after_the_free_share() -> None:
    budget = Budget(1000.0, [100.0 * FREE_SHARE - 1, 1.0, 100.0 * (1 - FREE_SHARE)])
    assert budget.share([]) is None
    assert budget.share([900.0]) is None  # what counts is what was planned
    assert budget.share([900.0, 10.0]) == pytest.approx(90)


@given(st.lists(st.floats(0.01, 1e5), min_size=2, max_size=9), st.floats(0.1, 10), st.floats(0.1, 3))
def test_shares_are_in_proportion_to_the_plan(plan: list[float], total: float, early: float) -> None:
    """What the first blocks leave is dealt to the others."""
    budget = Budget(total * sum(plan), plan)
    spent: list[float] = []
    while len(spent) < len(plan) and budget.share(spent) is None:
        spent.append(early * plan[len(spent)])
    left, planned = max(0.0, budget.bits - sum(spent)), sum(plan[len(spent) :])
    for block in plan[len(spent) :]:
        share = budget.share(spent)
        assert share == pytest.approx(left * block / planned, rel=1e-6, abs=1e-6)
        spent.append(share)


def test_a_budget_that_is_exhausted() -> None:
    for bits in (50.0, 10.0, 0.0, -20.0):
        assert Budget(bits, [30.0, 20.0, 20.0]).share([40.0, 10.0]) == 0
    assert Budget(50.0, [0.0, 0.0]).share([0.0]) == 0  # a plan that costs nothing


@pytest.fixture(scope="module")
def quantizer(tiny_model: Path) -> ProductQuantizer:
    return ProductQuantizer(load_model(tiny_model / MODEL_FILE).tensors, Workers(1))


def choice_after_a_block(
    quantizer: ProductQuantizer, budget: Budget | None, w: NDArray[np.float32]
) -> tuple[RateDistortionChoice, Tokens]:
    """A choice with a first block behind it, and the tokens of a second one, at frequencies drawn at random."""
    rng = np.random.default_rng(0)
    z = (rng.normal(size=(1, len(quantizer.default), 50, 40)) * 8).astype(np.float32)
    choice = RateDistortionChoice(quantizer, z, w, 2, budget, static_share=0.0)
    assert quantizer.alphabets.sizes[2, 1:3].tolist() == [32, 32]
    masses = np.exp(rng.normal(size=(2, 2000, 32)))
    frequencies = (masses / masses.sum(2, keepdims=True) * 60_000).astype(np.int32) + 1
    frequencies[:, :, 0] += (1 << PRECISION) - frequencies.sum(2)
    positions = rng.permutation(2000)
    choice(1, positions, frequencies[:1])
    return choice, choice(1, positions, frequencies)


TRADE_OFFS = np.linspace(3, 30, 2000, dtype=np.float32)


@pytest.mark.parametrize("share", [0.93, 0.97, 1.0, 1.03, 1.06])
def test_a_choice_hits_its_share_of_a_budget(quantizer: ProductQuantizer, share: float) -> None:
    spent = choice_after_a_block(quantizer, None, TRADE_OFFS)[0].spent
    bound, _ = choice_after_a_block(quantizer, Budget(spent[0] + share * spent[1], [1.0, 1.0]), TRADE_OFFS)
    assert bound.spent[0] == spent[0]  # too early to be changed
    assert bound.spent[1] == pytest.approx(share * spent[1], rel=0.01)


@pytest.mark.parametrize(("share", "factor"), [(0.5, BUDGET_REACH), (2.0, 1 / BUDGET_REACH)])
def test_a_choice_changes_the_trade_off_no_further_than_it_may(
    quantizer: ProductQuantizer, share: float, factor: float
) -> None:
    spent = choice_after_a_block(quantizer, None, TRADE_OFFS)[0].spent
    bound, tokens = choice_after_a_block(quantizer, Budget(spent[0] + share * spent[1], [1.0, 1.0]), TRADE_OFFS)
    limit, tokens_at_the_limit = choice_after_a_block(quantizer, None, TRADE_OFFS * np.float32(factor))
    assert np.array_equal(tokens, tokens_at_the_limit)
    assert bound.spent[1] == limit.spent[1]


# -- frequencies that are not those of the encoder ------------------------------------------------------------------


@pytest.fixture
def codec(tiny_model: Path) -> Codec:
    return load_codec(tiny_model, device="cpu")


@pytest.mark.parametrize("step_to_spoil", range(1, 7))
def test_a_frequency_that_is_off_by_one_is_refused(
    codec: Codec, monkeypatch: pytest.MonkeyPatch, step_to_spoil: int
) -> None:
    """As on a machine whose network gives another last bit: one count moves from or to the token that is coded."""
    picture = Image.fromarray(synthetic_photo(160, 160))
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))  # small files have no token check otherwise
    data = codec.encode(picture, quality=100)
    assert parse(data).token_check is not None
    tokens = codec.decode_tokens(data)
    originals = ExactEntropyModel.head, ExactEntropyModel.frequencies
    spoilt_step: Step | None = None

    def head_of(self: ExactEntropyModel, state: EntropyState, step: Step) -> Activations | None:
        nonlocal spoilt_step
        spoilt_step = step if step == self.schedule.steps[step_to_spoil] else None
        return originals[0](self, state, step)

    def spoilt(self: ExactEntropyModel, head: Activations, level: int, first: int) -> Frequencies:
        frequencies = originals[1](self, head, level, first).copy()
        if spoilt_step is not None and first == spoilt_step.first:
            token = int(tokens[first].flat[positions_of(spoilt_step, *tokens.shape[1:])[0]])
            row = frequencies[0, 0]
            count = 1 if row[token] == 1 else -1
            row[token] += count
            row[token - 1 if token else 1] -= count
        return frequencies

    monkeypatch.setattr(ExactEntropyModel, "head", head_of)
    monkeypatch.setattr(ExactEntropyModel, "frequencies", spoilt)
    with pytest.raises((TokenCheckError, DamagedFileError)) as caught:
        codec.decode_tokens(data)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert (codec.decode_tokens(data) == tokens).all()
