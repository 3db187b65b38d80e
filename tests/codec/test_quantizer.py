"""Product quantizer: runs of channels, entropy-constrained choice, priors."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pqmim.config import QuantizerConfig, TokensConfig, TransformConfig
from pqmim.errors import ModelError
from pqmim.model_files import MODEL_FILE, load_model
from pqmim.quantizer import PREFIX, Latent, ProductQuantizer, check_quantizer_weights
from pqmim.runtime import Workers
from pqmim.token_coding import RateDistortionChoice

M, K, D = 3, 16, 10
BOUNDARIES = [0, 1, 3, 8]
NUM_LEVELS = 6
CONFIG = TokensConfig(TransformConfig(latent_channels=D), QuantizerConfig(M, K, NUM_LEVELS))


def random_tensors() -> dict[str, NDArray[Any]]:
    """Weights with unequal runs, and two of ten channels dropped."""
    rng = np.random.default_rng(0)
    tensors = {
        "order": rng.permutation(D)[:8],
        "boundaries_tensor": np.array(BOUNDARIES),
        "codebook": rng.normal(size=(NUM_LEVELS, K, 8)).astype(np.float16),
        "default": rng.normal(size=D).astype(np.float16),
        "prior_logits": rng.normal(size=(NUM_LEVELS, M, K)).astype(np.float16),
        "level_log_w": np.linspace(math.log(0.5), math.log(60), NUM_LEVELS).astype(np.float16),
    }
    return {PREFIX + name: tensor for name, tensor in tensors.items()}


def random_quantizer(threads: int = 1) -> ProductQuantizer:
    return ProductQuantizer(random_tensors(), Workers(threads))


@pytest.fixture(scope="module")
def quantizer() -> ProductQuantizer:
    return random_quantizer()


def latent(seed: int, height: int = 3, width: int = 4) -> Latent:
    return np.random.default_rng(seed).normal(size=(1, D, height, width)).astype(np.float32)


def brute_force(quantizer: ProductQuantizer, z: Latent, w: float, level: int) -> NDArray[np.int64]:
    """Definition of the choice, one latent vector and codeword at a time, in float64."""
    bits = quantizer.prior_bits[level].astype(np.float64)
    tokens = np.zeros((M, *z.shape[2:]), np.int64)
    for m, y, x in np.ndindex(*tokens.shape):
        run = quantizer.runs[m]
        values = z[0, quantizer.order[run], y, x].astype(np.float64)
        costs = [
            float(np.square(values - quantizer.codebook[level, k, run].astype(np.float64)).sum() + w * bits[m, k])
            for k in range(K)
        ]
        tokens[m, y, x] = min(range(K), key=costs.__getitem__)
    return tokens


def assigned(quantizer: ProductQuantizer, z: Latent, w: float, level: int) -> NDArray[np.int64]:
    columns = quantizer.columns(z)
    weights = np.full(len(columns), w, np.float32)
    return quantizer.assign(columns, weights, level).reshape(M, *z.shape[2:])


def test_sizes(quantizer: ProductQuantizer) -> None:
    assert quantizer.num_subquantizers == M
    assert quantizer.num_codewords == K
    assert quantizer.runs == [slice(begin, end) for begin, end in pairwise(BOUNDARIES)]
    assert len(quantizer.levels) == NUM_LEVELS
    assert {array.dtype for array in (quantizer.codebook, quantizer.default, quantizer.prior_bits)} == {
        np.dtype(np.float32)
    }


def test_columns_are_the_kept_channels_in_order(quantizer: ProductQuantizer) -> None:
    z = latent(0)
    columns = quantizer.columns(z)
    assert columns.shape == (12, 8)
    for position, (y, x) in enumerate(np.ndindex(3, 4)):
        assert np.array_equal(columns[position], z[0, quantizer.order, y, x])


@pytest.mark.parametrize("w", [1e-6, 0.3, 4.0])
def test_choice_against_brute_force(quantizer: ProductQuantizer, w: float) -> None:
    for level in (0, 3, 5):
        z = latent(level)
        assert np.array_equal(assigned(quantizer, z, w, level), brute_force(quantizer, z, w, level))


def test_choice_with_a_trade_off_per_position(quantizer: ProductQuantizer) -> None:
    z = latent(2, 2, 5)
    columns = quantizer.columns(z)
    ws = np.repeat(np.array([0.5, 1.5], np.float32), 5)  # another one in the lower row
    split = quantizer.assign(columns, ws, 2).reshape(M, 2, 5)
    assert np.array_equal(split[:, 0], assigned(quantizer, z, 0.5, 2)[:, 0])
    assert np.array_equal(split[:, 1], assigned(quantizer, z, 1.5, 2)[:, 1])


def test_threads_choose_the_same() -> None:
    z = latent(3, 20, 20)
    tokens = [assigned(random_quantizer(threads), z, 0.7, 1) for threads in (1, 2, 4)]
    assert all(np.array_equal(found, tokens[0]) for found in tokens)


def test_nothing_to_choose(quantizer: ProductQuantizer) -> None:
    assert quantizer.assign(np.empty((0, 8), np.float32), np.empty(0, np.float32), 0).shape == (M, 0)


def test_distances_lack_the_length_of_the_values_only(quantizer: ProductQuantizer) -> None:
    columns = quantizer.columns(latent(4))
    for m, run in enumerate(quantizer.runs):
        exact = np.square(columns[:, None, run] - quantizer.codebook[4][None, :, run]).sum(2)
        lengths = np.square(columns[:, run]).sum(1, keepdims=True)
        assert np.allclose(quantizer.distances(columns, m, 4) + lengths, exact, atol=1e-4)


@pytest.mark.parametrize("level", [0, 3])
def test_coding_loop_without_rate_takes_the_nearest_codeword(quantizer: ProductQuantizer, level: int) -> None:
    z = latent(3, 2, 3)
    choice = RateDistortionChoice(quantizer, z, np.zeros(6, np.float32), level)
    frequencies = np.full((2, 6, K), 1 << 12, np.int32)
    nearest = brute_force(quantizer, z, 0.0, level).reshape(M, -1)
    assert np.array_equal(choice(1, np.arange(6), frequencies), nearest[1:])
    some = np.array([1, 4])
    assert np.array_equal(choice(0, some, frequencies[:1, :2]), nearest[:1, some])


def test_coding_loop_weighs_bits_by_the_trade_off_of_the_position(quantizer: ProductQuantizer) -> None:
    z = latent(3, 2, 3)
    w = np.array([0.0, 0.5, 1.0, 2.0, 4.0, 1e6], np.float32)
    share = 0.25
    choice = RateDistortionChoice(quantizer, z, w, 2, static_share=share)
    frequencies = np.random.default_rng(4).integers(1, 4000, (M, 6, K), np.int32)
    static = quantizer.prior_bits[2, :, None].astype(np.float64)
    bits = (1 - share) * (16 - np.log2(frequencies)) + share * static
    tokens = choice(0, np.arange(6), frequencies)
    for m, run in enumerate(quantizer.runs):
        values = z[0, quantizer.order[run]].reshape(-1, 6).T.astype(np.float64)
        distances = np.square(values[:, None] - quantizer.codebook[2][None, :, run].astype(np.float64)).sum(2)
        assert np.array_equal(tokens[m], (distances + w[:, None].astype(np.float64) * bits[m]).argmin(1))
    assert np.array_equal(tokens[:, 5], bits[:, 5].argmin(1))


def test_codewords_quantize_to_themselves(quantizer: ProductQuantizer) -> None:
    tokens = np.random.default_rng(4).integers(0, K, (M, 4, 4))
    for level in (0, 4):
        z = quantizer.dequantize(tokens, level)
        assert z.shape == (1, D, 4, 4)
        assert z.dtype == np.float32
        assert np.array_equal(assigned(quantizer, z, 1e-9, level), tokens)
        dropped = sorted(set(range(D)) - set(quantizer.order.tolist()))
        assert len(dropped) == 2
        assert (z[0, dropped] == quantizer.default[dropped, None, None]).all()


def test_dequantize_uses_the_mean_where_unknown(quantizer: ProductQuantizer) -> None:
    rng = np.random.default_rng(5)
    tokens, known = rng.integers(0, K, (M, 2, 2)), rng.random((M, 2, 2)) < 0.5
    for level in (2, 5):
        z, whole = quantizer.dequantize(tokens, level, known), quantizer.dequantize(tokens, level)
        for m, run in enumerate(quantizer.runs):
            for channel in quantizer.order[run]:
                assert np.array_equal(z[0, channel], np.where(known[m], whole[0, channel], quantizer.default[channel]))
        nothing = quantizer.dequantize(tokens, level, np.zeros_like(known))
        assert np.array_equal(nothing, np.broadcast_to(quantizer.default[None, :, None, None], nothing.shape))


def test_static_bits_are_those_of_the_priors(quantizer: ProductQuantizer) -> None:
    bits = quantizer.prior_bits
    assert bits.shape == (NUM_LEVELS, M, K)
    assert np.allclose(np.exp2(-bits.astype(np.float64)).sum(2), 1, atol=1e-6)


def test_static_bits_of_extreme_priors() -> None:
    """Logits that would overflow an exponential."""
    logits = np.resize(np.float16([1000, -1000, 0]), (NUM_LEVELS, M, K))
    made = ProductQuantizer(random_tensors() | {PREFIX + "prior_logits": logits}, Workers(1))
    expected = (1000 - logits.astype(np.float64)) / math.log(2) + np.log2((logits == 1000).sum(2, keepdims=True))
    assert np.allclose(made.prior_bits, expected, rtol=1e-6)


@pytest.mark.parametrize("level", [0, 2, 5])
def test_more_weight_on_rate_costs_fewer_bits_and_more_distortion(tiny_model: Path, level: int) -> None:
    quantizer = ProductQuantizer(load_model(tiny_model / MODEL_FILE).tensors, Workers(1))
    noise = np.random.default_rng(7).normal(size=(1, len(quantizer.default), 16, 16)).astype(np.float32)
    z = quantizer.default[None, :, None, None] + noise
    rates, distortions = [], []
    for w in (0.01, 0.3, 3.0, 30.0):
        tokens = assigned(quantizer, z, w, level)
        rates.append(float(np.take_along_axis(quantizer.prior_bits[level], tokens.reshape(len(tokens), -1), 1).sum()))
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
        # Of another number of kept channels it is the codebook that does not fit.
        lacking = name if name != "order" or wrong is None or wrong.shape[0] == 8 else "order|codebook"
        with pytest.raises(ModelError, match=rf"weights lack tokenizer\.quantizer\.({lacking}) as"):
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
    ],
)
def test_indices_out_of_bounds_are_refused(name: str, values: list[int]) -> None:
    with pytest.raises(ModelError, match=f"weights of tokenizer.quantizer.{name} are out of bounds"):
        check_quantizer_weights(random_tensors() | {PREFIX + name: np.array(values)}, CONFIG)
