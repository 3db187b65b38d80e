"""Product quantizer: runs of channels, entropy-constrained choice, priors."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pqmim.config import QuantizerConfig, TokensConfig, TransformConfig
from pqmim.errors import ModelError
from pqmim.model_files import MODEL_FILE, load_model
from pqmim.quantizer import PREFIX, PRIOR_POSITIONS, Latent, ProductQuantizer, check_quantizer_weights, index_of_least
from pqmim.runtime import Workers
from pqmim.token_coding import RateDistortionChoice

M, K, D = 3, 16, 10
BOUNDARIES = [0, 1, 3, 8]
SIZES = ((16, 16, 16), (16, 12, 5), (16, 8, 1), (8, 1, 5), (5, 3, 1), (3, 1, 1))
"""Codewords by level and sub-quantizer; those with one are silent."""
NUM_LEVELS = 6
CONFIG = TokensConfig(TransformConfig(latent_channels=D), QuantizerConfig(M, K, NUM_LEVELS))


def random_tensors() -> dict[str, NDArray[Any]]:
    """Weights with unequal runs and alphabets, and two of ten channels dropped."""
    rng = np.random.default_rng(0)
    log_w = np.linspace(math.log(0.5), math.log(60), NUM_LEVELS)
    tensors = {
        "order": rng.permutation(D)[:8],
        "boundaries_tensor": np.array(BOUNDARIES),
        "sizes": np.array(SIZES),
        "codebook": rng.normal(size=int((np.array(SIZES) * np.diff(BOUNDARIES)).sum())).astype(np.float16),
        "default": rng.normal(size=D).astype(np.float16),
        "prior_logits": rng.normal(size=sum(map(sum, SIZES))).astype(np.float16),
        "level_range": np.stack([log_w - 2, log_w + 1], 1).astype(np.float16),
    }
    return {PREFIX + name: tensor for name, tensor in tensors.items()}


def random_quantizer(threads: int = 1) -> ProductQuantizer:
    return ProductQuantizer(random_tensors(), Workers(threads))


@pytest.fixture(scope="module")
def quantizer() -> ProductQuantizer:
    return random_quantizer()


def latent(seed: int, height: int = 3, width: int = 4) -> Latent:
    return np.random.default_rng(seed).normal(size=(1, D, height, width)).astype(np.float32)


def codewords_of(level: int, m: int) -> NDArray[np.float64]:
    """(K, d): those of finer levels and of earlier sub-quantizers come before."""
    start = 0
    for each in np.ndindex(level + 1, M):
        shape = SIZES[each[0]][each[1]], BOUNDARIES[each[1] + 1] - BOUNDARIES[each[1]]
        if each == (level, m):
            break
        start += math.prod(shape)
    codebook = random_tensors()[PREFIX + "codebook"]
    return codebook[start : start + math.prod(shape)].reshape(shape).astype(np.float64)


def bits_of(level: int, m: int) -> NDArray[np.float64]:
    """(K,) under the static prior."""
    start = sum(map(sum, SIZES[:level])) + sum(SIZES[level][:m])
    logits = random_tensors()[PREFIX + "prior_logits"][start : start + SIZES[level][m]].astype(np.float64)
    bits: NDArray[np.float64] = (np.log(np.exp(logits).sum()) - logits) / math.log(2)
    return bits


def random_tokens(rng: np.random.Generator, level: int, height: int, width: int) -> NDArray[np.int64]:
    return rng.integers(0, np.array(SIZES[level])[:, None, None], (M, height, width))


def brute_force(quantizer: ProductQuantizer, z: Latent, w: float, level: int) -> NDArray[np.int64]:
    """Definition of the choice, one latent vector and codeword at a time, in float64."""
    tokens = np.zeros((M, *z.shape[2:]), np.int64)
    for m, y, x in np.ndindex(*tokens.shape):
        values = z[0, quantizer.order[quantizer.runs[m]], y, x].astype(np.float64)
        pairs = zip(codewords_of(level, m), bits_of(level, m), strict=True)
        costs = [float(np.square(values - codeword).sum() + w * bits) for codeword, bits in pairs]
        tokens[m, y, x] = min(range(len(costs)), key=costs.__getitem__)
    return tokens


def assigned(quantizer: ProductQuantizer, z: Latent, w: float, level: int) -> NDArray[np.int64]:
    channels = quantizer.channels(z)
    weights = np.full(channels.shape[1], w, np.float32)
    return quantizer.assign(channels, weights, level).reshape(-1, *z.shape[2:])


def test_sizes(quantizer: ProductQuantizer) -> None:
    assert quantizer.num_subquantizers == M
    assert quantizer.alphabets.sizes.tolist() == [list(sizes) for sizes in SIZES]
    assert quantizer.runs == [slice(begin, end) for begin, end in pairwise(BOUNDARIES)]
    assert len(quantizer.levels) == NUM_LEVELS
    for level, m in np.ndindex(NUM_LEVELS, M):
        assert np.array_equal(quantizer.codewords(m, level), codewords_of(level, m))
    for array in (quantizer.codewords(2, 1), quantizer.default, quantizer.prior_bits):
        assert array.dtype == np.float32


def test_channels_are_the_kept_channels_in_order(quantizer: ProductQuantizer) -> None:
    z = latent(0)
    channels = quantizer.channels(z)
    assert channels.shape == (8, 12)
    for position, (y, x) in enumerate(np.ndindex(3, 4)):
        assert np.array_equal(channels[:, position], z[0, quantizer.order, y, x])


@pytest.mark.parametrize("w", [1e-6, 0.3, 4.0])
def test_choice_against_brute_force(quantizer: ProductQuantizer, w: float) -> None:
    for level in range(NUM_LEVELS):
        z = latent(level)
        assert np.array_equal(assigned(quantizer, z, w, level), brute_force(quantizer, z, w, level))


def test_choice_with_a_trade_off_per_position(quantizer: ProductQuantizer) -> None:
    z = latent(2, 2, 5)
    channels = quantizer.channels(z)
    ws = np.repeat(np.array([0.5, 1.5], np.float32), 5)  # another one in the lower row
    split = quantizer.assign(channels, ws, 2).reshape(M, 2, 5)
    assert np.array_equal(split[:, 0], assigned(quantizer, z, 0.5, 2)[:, 0])
    assert np.array_equal(split[:, 1], assigned(quantizer, z, 1.5, 2)[:, 1])


def test_threads_choose_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pqmim.quantizer.FEW_POSITIONS", 1)
    z = latent(3, 20, 20)
    tokens = [assigned(random_quantizer(threads), z, 0.7, 1) for threads in (1, 2, 4)]
    assert all(np.array_equal(found, tokens[0]) for found in tokens)


def test_nothing_to_choose(quantizer: ProductQuantizer) -> None:
    assert quantizer.assign(np.empty((8, 0), np.float32), np.empty(0, np.float32), 0).shape == (M, 0)


def test_distances_lack_the_length_of_the_values_only(quantizer: ProductQuantizer) -> None:
    channels = quantizer.channels(latent(4))
    for m, run in enumerate(quantizer.runs):
        values = channels[run]
        exact = np.square(values - codewords_of(1, m)[:, :, None]).sum(1)
        lengths = np.square(values).sum(0)
        assert np.allclose(quantizer.distances(values, m, 1) + lengths, exact, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 12, 13, 60])
def test_the_first_of_equal_costs_is_least(count: int) -> None:
    costs = np.random.default_rng(count).integers(count, size=(count, 200)).astype(np.float32)
    assert np.array_equal(index_of_least(costs), costs.argmin(0))


@pytest.mark.parametrize("level", [0, 3])
def test_coding_loop_without_rate_takes_the_nearest_codeword(quantizer: ProductQuantizer, level: int) -> None:
    z = latent(3, 2, 3)
    choice = RateDistortionChoice(quantizer, z, np.zeros(6, np.float32), level)
    nearest = brute_force(quantizer, z, 0.0, level).reshape(M, -1)
    for m, size in enumerate(SIZES[level]):
        frequencies = np.full((1, 6, size), (1 << 16) // size, np.int32)
        assert np.array_equal(choice(m, np.arange(6), frequencies)[0], nearest[m])
        some = np.array([1, 4])
        assert np.array_equal(choice(m, some, frequencies[:, :2])[0], nearest[m, some])


def test_coding_loop_weighs_bits_by_the_trade_off_of_the_position(quantizer: ProductQuantizer) -> None:
    z = latent(3, 2, 3)
    w = np.array([0.0, 0.5, 1.0, 2.0, 4.0, 1e6], np.float32)
    share = 0.25
    choice = RateDistortionChoice(quantizer, z, w, 1, static_share=share)
    for m, run in enumerate(quantizer.runs):
        frequencies = np.random.default_rng(m).integers(1, 4000, (1, 6, SIZES[1][m]), np.int32)
        bits = (1 - share) * (16 - np.log2(frequencies[0])) + share * bits_of(1, m)
        values = z[0, quantizer.order[run]].reshape(-1, 6).T.astype(np.float64)
        distances = np.square(values[:, None] - codewords_of(1, m)).sum(2)
        (tokens,) = choice(m, np.arange(6), frequencies)
        assert np.array_equal(tokens, (distances + w[:, None].astype(np.float64) * bits).argmin(1))
        assert tokens[5] == bits[5].argmin()


def test_coding_loop_over_neighbors_with_equally_many_codewords(quantizer: ProductQuantizer) -> None:
    """Where they have equally many channels, too, they come together."""
    tensors = random_tensors() | {PREFIX + "boundaries_tensor": np.array([0, 2, 4, 8])}
    tensors[PREFIX + "codebook"] = np.resize(tensors[PREFIX + "codebook"], 8 * sum(map(sum, SIZES)))
    made = ProductQuantizer(tensors, Workers(1))
    z, w = latent(3, 2, 3), np.full(6, 0.8, np.float32)
    frequencies = np.random.default_rng(4).integers(1, 4000, (2, 6, 16), np.int32)
    together = RateDistortionChoice(made, z, w, 0)(0, np.arange(6), frequencies)
    alone = RateDistortionChoice(made, z, w, 0)
    assert np.array_equal(together, [alone(m, np.arange(6), frequencies[m : m + 1])[0] for m in range(2)])


def test_codewords_quantize_to_themselves(quantizer: ProductQuantizer) -> None:
    for level in range(NUM_LEVELS):
        tokens = random_tokens(np.random.default_rng(4), level, 4, 4)
        z = quantizer.dequantize(tokens, level)
        assert z.shape == (1, D, 4, 4)
        assert z.dtype == np.float32
        assert np.array_equal(assigned(quantizer, z, 1e-9, level), tokens)
        dropped = sorted(set(range(D)) - set(quantizer.order.tolist()))
        assert len(dropped) == 2
        assert (z[0, dropped] == quantizer.default[dropped, None, None]).all()


def test_dequantize_uses_the_mean_where_unknown(quantizer: ProductQuantizer) -> None:
    rng = np.random.default_rng(5)
    for level in (1, 2, 5):
        tokens, known = random_tokens(rng, level, 2, 2), rng.random((M, 2, 2)) < 0.5
        z, whole = quantizer.dequantize(tokens, level, known), quantizer.dequantize(tokens, level)
        for m, run in enumerate(quantizer.runs):
            for channel in quantizer.order[run]:
                assert np.array_equal(z[0, channel], np.where(known[m], whole[0, channel], quantizer.default[channel]))
        nothing = quantizer.dequantize(tokens, level, np.zeros_like(known))
        assert np.array_equal(nothing, np.broadcast_to(quantizer.default[None, :, None, None], nothing.shape))


def test_static_bits_are_those_of_the_priors(quantizer: ProductQuantizer) -> None:
    expected = [bits_of(level, m) for level, m in np.ndindex(NUM_LEVELS, M)]
    assert np.allclose(quantizer.prior_bits, np.concatenate(expected), atol=1e-5)
    for level in range(NUM_LEVELS):
        tokens = random_tokens(np.random.default_rng(level), level, 3, 5).reshape(M, -1)
        by_definition = sum(float(bits_of(level, m)[tokens[m]].sum()) for m in range(M))
        assert quantizer.static_bits(tokens, level) == pytest.approx(by_definition, rel=1e-5)


def test_own_bits_are_those_of_a_pictures_frequencies_and_the_priors(quantizer: ProductQuantizer) -> None:
    level = 0
    few = random_tokens(np.random.default_rng(3), level, 3, 2).reshape(M, -1)
    for tokens in (few, np.tile(few, 3000)):
        by_definition = 0.0
        for m, row in enumerate(tokens):
            priors = np.exp2(-bits_of(level, m))
            counts = np.array([(row == k).sum() for k in range(len(priors))])
            share = (counts + PRIOR_POSITIONS * priors) / (len(row) + PRIOR_POSITIONS)
            by_definition -= float(np.log2(share[row]).sum())
        assert quantizer.own_bits(tokens, level) == pytest.approx(by_definition, rel=1e-5)
    many, entropy = np.tile(few, 3000), 0.0
    for row in many:
        _, counts = np.unique(row, return_counts=True)
        entropy -= float(counts @ np.log2(counts / len(row)))
    assert quantizer.own_bits(many, level) == pytest.approx(entropy, rel=0.01)


def test_leading_sub_quantizers_alone(quantizer: ProductQuantizer) -> None:
    level, z = 0, latent(8)
    channels = quantizer.channels(z)
    w = np.full(channels.shape[1], 0.2, np.float32)
    tokens = quantizer.assign(channels, w, level)
    for count in range(1, M + 1):
        leading = quantizer.assign(channels, w, level, count)
        assert np.array_equal(leading, tokens[:count])
        by_definition = sum(float(bits_of(level, m)[tokens[m]].sum()) for m in range(count))
        assert quantizer.static_bits(leading, level) == pytest.approx(by_definition, rel=1e-5)
        assert 0 < quantizer.own_bits(leading, level) <= quantizer.own_bits(tokens, level)
    entropies = np.array([float((b * np.exp2(-b)).sum()) for b in (bits_of(level, m) for m in range(M))])
    for share in (0.01, 0.5, 0.9, 1.0):
        count = quantizer.num_leading(level, share)
        assert entropies[:count].sum() >= share * entropies.sum() * (1 - 1e-6)
        assert count == 1 or entropies[: count - 1].sum() < share * entropies.sum()


def test_silent_sub_quantizers_cost_nothing_and_decode_to_their_only_codeword(quantizer: ProductQuantizer) -> None:
    level, silent = 3, 1
    tokens = assigned(quantizer, latent(8), 0.2, level)
    assert (tokens[silent] == 0).all()
    assert tokens[[0, 2]].any((1, 2)).all()
    z = quantizer.dequantize(tokens, level)
    (codeword,) = codewords_of(level, silent)
    assert (z[0, quantizer.order[quantizer.runs[silent]]] == codeword[:, None, None]).all()
    place = quantizer.alphabets.starts[level, silent]
    assert quantizer.prior_bits[place] == 0


def test_static_bits_of_extreme_priors() -> None:
    """Logits that would overflow an exponential."""
    parts = [np.resize([1000.0, -1000.0, 0.0], size) for sizes in SIZES for size in sizes]
    logits = np.concatenate(parts).astype(np.float16)
    made = ProductQuantizer(random_tensors() | {PREFIX + "prior_logits": logits}, Workers(1))
    expected = [(1000 - part) / math.log(2) + np.log2((part == 1000).sum()) for part in parts]
    assert np.allclose(made.prior_bits, np.concatenate(expected), rtol=1e-6)
    certain = np.zeros((M, 40), np.int64)  # the codewords that all others are nothing beside
    assert 0 <= made.own_bits(certain, 0) < 40 * M * math.log2(max(SIZES[0]))
    assert np.isfinite(made.own_bits(certain + (np.array(SIZES[0]) > 1)[:, None], 0))


@pytest.mark.parametrize("level", [0, 2, 5])
def test_more_weight_on_rate_costs_fewer_bits_and_more_distortion(tiny_model: Path, level: int) -> None:
    quantizer = ProductQuantizer(load_model(tiny_model / MODEL_FILE).tensors, Workers(1))
    noise = np.random.default_rng(7).normal(size=(1, len(quantizer.default), 16, 16)).astype(np.float32)
    z = quantizer.default[None, :, None, None] + 10 * noise
    rates, distortions = [], []
    for w in (0.01, 0.3, 3.0, 30.0):
        tokens = assigned(quantizer, z, w, level)
        rates.append(quantizer.static_bits(tokens.reshape(len(tokens), -1), level))
        distortions.append(float(np.square(quantizer.dequantize(tokens, level) - z).sum()))
    assert rates == sorted(rates, reverse=True)
    assert distortions == sorted(distortions)


# -- weights that do not fit together --------------------------------------------------------------------------------


def test_good_weights_are_accepted() -> None:
    check_quantizer_weights(random_tensors(), CONFIG)


@pytest.mark.parametrize("name", [name.removeprefix(PREFIX) for name in random_tensors()])
def test_missing_weights_are_named(name: str) -> None:
    tensor = random_tensors()[PREFIX + name]
    for wrong in (None, tensor[:-1], tensor[None], tensor.astype(np.float64)):
        tensors = random_tensors() | {PREFIX + name: wrong}
        if wrong is None:
            del tensors[PREFIX + name]
        message = rf"weights lack tokenizer\.quantizer\.{name} as"
        if name == "order" and wrong is not None and wrong.shape == (7,):  # another number of kept channels
            message = r"weights of tokenizer\.quantizer\.boundaries_tensor are out of bounds"
        with pytest.raises(ModelError, match=message):
            check_quantizer_weights(tensors, CONFIG)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("order", [0, 1, 2, 3, 4, 5, 6, 10]),
        ("order", [0, 1, 2, 3, 4, 5, 6, -1]),
        ("order", [0, 1, 2, 3, 4, 5, 6, 6]),
        ("boundaries_tensor", [1, 2, 3, 8]),
        ("boundaries_tensor", [0, 1, 3, 7]),
        ("boundaries_tensor", [0, 3, 3, 8]),
        ("boundaries_tensor", [0, 3, 1, 8]),
        ("sizes", np.array(SIZES) * 0),
        ("sizes", np.array(SIZES) - (np.arange(18).reshape(6, 3) == 17)),
        ("sizes", np.array(SIZES) + (np.arange(18).reshape(6, 3) == 0)),
        ("sizes", np.array(SIZES) * -1),
    ],
)
def test_indices_out_of_bounds_are_refused(name: str, values: list[int]) -> None:
    with pytest.raises(ModelError, match=f"weights of tokenizer.quantizer.{name} are out of bounds"):
        check_quantizer_weights(random_tensors() | {PREFIX + name: np.array(values)}, CONFIG)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("level_range", lambda t: t[::-1]),
        ("level_range", lambda t: t[:, ::-1]),
        ("level_range", lambda t: t * np.float16(np.inf)),
        ("level_range", lambda t: t * np.float16(np.nan)),
        ("level_range", lambda t: t * 0 + np.float16([0, 1])),  # all levels the same
        ("level_range", lambda t: t - np.float16([0, 2.5])),  # what is between two levels is applied by none
    ],
)
def test_trade_offs_of_levels_rise_without_gaps(name: str, change: Callable[[Any], NDArray[Any]]) -> None:
    tensors = random_tensors()
    with pytest.raises(ModelError, match=f"weights of tokenizer.quantizer.{name} are out of bounds"):
        check_quantizer_weights(tensors | {PREFIX + name: change(tensors[PREFIX + name])}, CONFIG)


def test_one_level_needs_no_other() -> None:
    tensors = random_tensors()
    for name in ("sizes", "level_range"):
        tensors[PREFIX + name] = tensors[PREFIX + name][:1]
    tensors[PREFIX + "codebook"] = tensors[PREFIX + "codebook"][: 16 * 8]
    tensors[PREFIX + "prior_logits"] = tensors[PREFIX + "prior_logits"][: 16 * M]
    check_quantizer_weights(tensors, TokensConfig(CONFIG.analysis, QuantizerConfig(M, K, 1)))


def test_alphabets_that_the_codewords_do_not_fit_are_refused() -> None:
    sizes = np.array(SIZES)
    sizes[1, 2] -= 1
    with pytest.raises(ModelError, match=r"weights lack tokenizer\.quantizer\.codebook as"):
        check_quantizer_weights(random_tensors() | {PREFIX + "sizes": sizes}, CONFIG)
