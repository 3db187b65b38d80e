"""Fill: what is known stays, what is not is the expectation or drawn, the same on every machine."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exact_model import (
    ALPHABETS,
    CONFIG,
    NUM_CODEWORDS,
    NUM_LEVELS,
    RUNS,
    SIZES,
    block_frequencies,
    exact_model,
    model_file,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import pqmim.fill
from pqmim.entropy_kernels import exact_kernels
from pqmim.exact_entropy import ExactEntropyModel
from pqmim.exact_numpy import Activations
from pqmim.fill import CONFIDENCE_UNIT, NOISE_BITS, _draw, _gumbel_table, _log_table, expected_latent, sample
from pqmim.model_files import MODEL_FILE, load_model
from pqmim.quantizer import ProductQuantizer, Tokens
from pqmim.range_coding import PRECISION
from pqmim.runtime import Workers
from pqmim.token_coding import TokenGrid

M = len(RUNS)
SAMPLE_HASH = "ff4d301fea02a293e2dbb3e0223dbe8b84bfcb726a1921cffeaf672fd96344c2"
"""SHA-256 of `drawn_hash`. If it changes, a seed gives other pictures than before."""


@pytest.fixture(scope="module")
def models() -> dict[str, ExactEntropyModel]:
    return {name: exact_model(name) for name in exact_kernels(model_file())}


@pytest.fixture(scope="module")
def model(models: dict[str, ExactEntropyModel]) -> ExactEntropyModel:
    return models["float32"]


def random_grid(height: int, width: int, share: float, seed: int, level: int = 1) -> TokenGrid:
    """A grid of which a share is known, anywhere; 0 where unknown."""
    rng = np.random.default_rng(seed)
    shape = (M, height, width)
    known = rng.random(shape) < share
    return TokenGrid(rng.integers(ALPHABETS.sizes[level, :, None, None], size=shape) * known, known)


# -- likely --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> tuple[ExactEntropyModel, ProductQuantizer]:
    model = load_model(tiny_model / MODEL_FILE)
    return ExactEntropyModel(model, Workers(1)), ProductQuantizer(model.tensors, Workers(1))


@settings(deadline=None, max_examples=10)
@given(
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.4, 0.9]),
    st.integers(0, 99),
    st.sampled_from([1 << 15, 3]),
)
def test_likely_is_the_expectation_where_unknown(
    tiny: tuple[ExactEntropyModel, ProductQuantizer], height: int, width: int, share: float, seed: int, chunk: int
) -> None:
    model, quantizer = tiny
    rng = np.random.default_rng(seed)
    level = seed % 6
    sizes = quantizer.alphabets.sizes[level]
    known = rng.random((len(sizes), height, width)) < share
    tokens = rng.integers(sizes[:, None, None], size=known.shape) * known
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pqmim.fill, "CHUNK_FREQUENCIES", chunk)
        z = expected_latent(model, quantizer, TokenGrid(tokens, known), level)
    assert z.shape == (1, 12, height, width)
    assert z.dtype == np.float32

    flat_tokens, flat_known = tokens.reshape(len(sizes), -1), known.reshape(len(sizes), -1)
    heads = list(model.heads_of_known(height, width, level, flat_tokens, flat_known))
    expected = np.tile(quantizer.default[:, None].astype(np.float64), (1, height * width))  # dropped channels
    for m, run in enumerate(quantizer.runs):
        group = next(g for g in range(model.schedule.num_groups) if m < model.schedule.group_bounds(g)[1])
        first = model.schedule.group_bounds(group)[0]
        unknown = np.flatnonzero((~flat_known[first : model.schedule.group_bounds(group)[1]]).any(0))
        probabilities = np.full((height * width, sizes[m]), np.nan)
        if len(unknown):
            head = heads[group][m - first : m - first + 1]
            probabilities[unknown] = model.frequencies(head, level, m)[0] / 65536
        codewords = quantizer.codewords(m, level).astype(np.float64)
        for position in range(height * width):
            if flat_known[m, position]:
                value = codewords[flat_tokens[m, position]]
            else:
                value = probabilities[position] @ codewords
            expected[quantizer.order[run], position] = value
    assert np.allclose(z.reshape(12, -1), expected, atol=1e-4)


def test_likely_of_a_whole_grid_is_its_latent(tiny: tuple[ExactEntropyModel, ProductQuantizer]) -> None:
    model, quantizer = tiny
    for level in (0, 5):
        sizes = quantizer.alphabets.sizes[level, :, None, None]
        tokens = np.random.default_rng(0).integers(sizes, size=(len(sizes), 4, 5))
        grid = TokenGrid(tokens, np.ones_like(tokens, np.bool_))
        assert np.array_equal(expected_latent(model, quantizer, grid, level), quantizer.dequantize(tokens, level))


@pytest.mark.parametrize("threads", [2, 4])
def test_likely_with_more_threads(tiny_model: Path, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may round a sum of floating-point numbers otherwise, but no more than that."""
    file = load_model(tiny_model / MODEL_FILE)
    grid = TokenGrid.unknown(8, 7, 6)
    monkeypatch.setattr(pqmim.fill, "CHUNK_FREQUENCIES", 5)
    latents = [
        expected_latent(ExactEntropyModel(file, Workers(n)), ProductQuantizer(file.tensors, Workers(n)), grid, 2)
        for n in (1, threads)
    ]
    assert np.allclose(*latents, atol=1e-5)


# -- sampling ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=15)
@given(
    st.integers(1, 7),
    st.integers(1, 7),
    st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    st.integers(0, 999),
    st.sampled_from([None, 1, 3, 20]),
    st.sampled_from([0.01, 0.7, 1.0, 100.0]),
)
def test_sampling_fills_what_is_unknown_and_nothing_else(
    model: ExactEntropyModel,
    height: int,
    width: int,
    share: float,
    seed: int,
    num_steps: int | None,
    temperature: float,
) -> None:
    level = seed % NUM_LEVELS
    grid = random_grid(height, width, share, seed, level)
    before = grid.tokens.copy(), grid.known.copy()
    drawn = sample(model, grid, level, seed=seed, temperature=temperature, num_steps=num_steps)
    assert drawn.shape == grid.tokens.shape
    assert np.array_equal(drawn[grid.known], grid.tokens[grid.known])
    assert int(drawn.min()) >= 0
    assert (drawn < ALPHABETS.sizes[level, :, None, None]).all()
    assert np.array_equal(grid.tokens, before[0])  # the grid of the file is left alone
    assert np.array_equal(grid.known, before[1])


@pytest.mark.parametrize(("share", "temperature", "num_steps"), [(0.0, 1.0, None), (0.3, 0.8, 12), (0.6, 1.3, 3)])
def test_a_seed_gives_the_same_tokens_with_every_kernel(
    models: dict[str, ExactEntropyModel], share: float, temperature: float, num_steps: int | None
) -> None:
    grid = random_grid(6, 5, share, 1)

    def draw(model: ExactEntropyModel, seed: int = 7) -> Tokens:
        return sample(model, grid, 1, seed=seed, temperature=temperature, num_steps=num_steps)

    drawn = [draw(model) for model in models.values()]
    assert all(np.array_equal(tokens, drawn[0]) for tokens in drawn)
    assert not np.array_equal(draw(models["float32"], seed=8), drawn[0])


@pytest.mark.parametrize("threads", [2, 4])
def test_a_seed_gives_the_same_tokens_with_more_threads(model: ExactEntropyModel, threads: int) -> None:
    grid = random_grid(6, 5, 0.3, 1)
    alone = sample(model, grid, 1, seed=7, num_steps=3)
    assert np.array_equal(sample(exact_model(threads=threads), grid, 1, seed=7, num_steps=3), alone)


def drawn_hash(kernel: str | None = None, threads: int = 1) -> str:
    """Hash of tokens drawn from the formula model."""
    model = exact_model(kernel, threads)
    digest = hashlib.sha256()
    for share, temperature, num_steps in ((0.0, 1.0, None), (0.4, 0.7, 15)):
        known = np.zeros((M, 7 * 6), np.bool_)
        known[:, : round(share * 42)] = True
        tokens = (np.arange(M * 42).reshape(M, 42) * 7 % ALPHABETS.sizes[1, :, None]) * known
        grid = TokenGrid(tokens.reshape(M, 7, 6), known.reshape(M, 7, 6))
        drawn = sample(model, grid, 1, seed=2**70 + 5, temperature=temperature, num_steps=num_steps)
        digest.update(drawn.astype("<u2").tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("kernel", exact_kernels(model_file()))
def test_golden_sample(kernel: str) -> None:
    assert drawn_hash(kernel) == SAMPLE_HASH


def test_golden_sample_in_another_process() -> None:
    """As on a processor without AVX-512, with two threads."""
    tests = Path(__file__).parent
    paths = [str(tests.parents[1] / "src"), str(tests.parent), str(tests)]
    result = subprocess.run(
        [sys.executable, "-c", "import test_fill; print(test_fill.drawn_hash('numpy', 2))"],
        env={**os.environ, "OPENBLAS_CORETYPE": "Haswell", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == SAMPLE_HASH


def test_seeds_differ(model: ExactEntropyModel) -> None:
    grid = random_grid(4, 4, 0.0, 0)
    drawn = {sample(model, grid, 0, seed=seed).tobytes() for seed in (0, 1, 2, 2**32, 2**64, 2**200)}
    assert len(drawn) == 6


def test_low_temperature_gives_the_most_probable_tokens(model: ExactEntropyModel) -> None:
    """At the lowest temperature one pass draws the codeword of the largest frequency, save for ties."""
    grid = random_grid(6, 5, 0.0, 0)
    drawn = sample(model, grid, 1, seed=3, temperature=0.01, num_steps=1)
    head = next(model.heads_of_known(6, 5, 1, grid.tokens.reshape(M, -1), grid.known.reshape(M, -1)))
    frequencies = model.frequencies(head[:1], 1, 0, sharpness=100.0)
    is_clear = frequencies.max(-1) > 65536 - 2 * NUM_CODEWORDS  # no second one within a logit unit or so
    assert is_clear.mean() > 0.7
    best = frequencies.argmax(-1)
    assert np.array_equal(drawn[: len(best)].reshape(len(best), -1)[is_clear], best[is_clear])


def test_draws_follow_the_frequencies(model: ExactEntropyModel) -> None:
    head = next(model.heads_of_known(1, 1, 1, np.zeros((M, 1), np.int64), np.zeros((M, 1), np.bool_)))
    count = 40_000
    random = np.random.PCG64(0)
    is_new = np.ones((len(head), count), np.bool_)
    drawn, confidence = _draw(model, np.repeat(head, count, axis=1), 1, 0, is_new, 1.0, random)
    bits = np.zeros(count)
    frequencies = [block[0, 0] for block in block_frequencies(model, head, 1, 0, 2, 1)]
    assert [len(f) for f in frequencies] == list(SIZES[1][:2])
    for tokens, expected in zip(drawn, (f / 65536 for f in frequencies), strict=True):
        found = np.bincount(tokens, minlength=len(expected)) / count
        assert np.abs(found - expected).max() < 4 * (0.25 / count) ** 0.5
        bits += np.log2(expected[tokens])
    assert np.allclose(confidence * CONFIDENCE_UNIT, bits, atol=2 * CONFIDENCE_UNIT)


@pytest.mark.parametrize("num_steps", [1, 3, 8, 16, 40])
def test_number_of_passes(model: ExactEntropyModel, monkeypatch: pytest.MonkeyPatch, num_steps: int) -> None:
    counts: list[int] = []
    original = ExactEntropyModel.heads_of_known

    def counted(self: ExactEntropyModel, *arguments: Any) -> Iterator[Activations]:
        known = arguments[-1]
        group = next(g for g in range(3) if not known[slice(*self.schedule.group_bounds(g))].all())
        counts.append(int((~known[self.schedule.group_bounds(group)[0]]).sum()))
        return original(self, *arguments)

    monkeypatch.setattr(ExactEntropyModel, "heads_of_known", counted)
    sample(model, random_grid(12, 12, 0.0, 0), 1, seed=0, num_steps=num_steps)
    shares = [max(1, round(num_steps * steps / 8)) for steps in CONFIG.group_steps]
    assert len(counts) == sum(shares)
    start = 0
    for share in shares:  # every pass draws more than the one before, and the last one what is left
        passes = [*counts[start : start + share], 0]
        assert passes[0] == 144
        drawn = -np.diff(passes)
        assert (drawn >= 1).all()
        start += share
    assert sample(model, random_grid(12, 12, 0.0, 0), 1, seed=0).shape == (M, 12, 12)


def test_default_number_of_passes_is_that_of_the_schedule(
    model: ExactEntropyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = random_grid(12, 12, 0.0, 0)
    by_default = sample(model, grid, 1, seed=0)
    assert np.array_equal(sample(model, grid, 1, seed=0, num_steps=sum(CONFIG.group_steps)), by_default)


# -- integer tables ------------------------------------------------------------------------------------------------


def distance_to_half(values: np.ndarray) -> float:
    """How near a value comes to where rounding changes its mind."""
    return float(np.abs(values - np.floor(values) - 0.5).min())


def test_tables_do_not_hang_on_the_last_bit_of_a_logarithm() -> None:
    """Libraries differ in the last bits of a logarithm, about 1e-12 here; the rounded tables do not."""
    frequency = np.arange(1, (1 << PRECISION) + 1, dtype=np.float64)
    logs = (np.log2(frequency) - PRECISION) / CONFIDENCE_UNIT
    assert distance_to_half(logs) > 1e-6
    u = (np.arange(1 << NOISE_BITS) + 0.5) / (1 << NOISE_BITS)
    assert distance_to_half(-np.log2(-np.log2(u)) / CONFIDENCE_UNIT) > 1e-6


def test_logarithms() -> None:
    table = _log_table()
    assert table.shape == ((1 << PRECISION) + 1,)
    assert table[1 << PRECISION] == 0
    assert table[1 << 15] == -256
    assert table[1] == table[0] == -16 * 256
    for frequency in (3, 1000, 40_000, 65_535):  # 2^(n - 1/2) <= frequency^256 / 2^(16 * 256) < 2^(n + 1/2)
        ratio = Fraction(frequency**512, 2 ** (16 * 512))
        n = int(table[frequency])
        assert Fraction(2) ** (2 * n - 1) < ratio < Fraction(2) ** (2 * n + 1)


def test_gumbel_quantiles() -> None:
    table = _gumbel_table() * CONFIDENCE_UNIT * np.log(2)
    # log2(-log2 u) = (ln(-ln u) - ln ln 2) / ln 2: the standard distribution, shifted, which changes no order.
    shift = np.log(np.log(2))
    assert (np.diff(table) >= 0).all()
    assert float(table.mean() - shift) == pytest.approx(0.5772, abs=0.01)
    assert float(table.var()) == pytest.approx(np.pi**2 / 6, rel=0.02)
