"""Product quantizer: entropy-constrained choice, priors, levels, the same as in the codec."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from training.tiny_networks import make_tiny_tokenizer
from training.token_tools import RAGGED, draw_tokens, make_ragged_tokenizer

from pqmim.config import QuantizerConfig
from pqmim.quantizer import PREFIX, ProductQuantizer
from pqmim.runtime import Workers
from pqmim.training.trainable_quantizer import FactorizedDensity, TrainableQuantizer


@pytest.fixture(scope="module")
def quantizer() -> TrainableQuantizer:
    """Random quantizer with unequal runs and alphabets, and some channels dropped."""
    return make_ragged_tokenizer().requires_grad_(False).quantizer


def codewords_of(quantizer: TrainableQuantizer, level: int, m: int) -> tuple[Tensor, Tensor]:
    """Codewords (K, d) and bits (K,) of a sub-quantizer by their definition: all are listed in their order."""
    alphabets, start, value_start = quantizer.alphabets, 0, 0
    for index, row in enumerate(alphabets.sizes.tolist()):
        for number, size in enumerate(row):
            channels = int(alphabets.channels[number])
            if (index, number) == (level, m):
                codewords = quantizer.codebook[value_start : value_start + size * channels].view(size, channels)
                return codewords, -quantizer.prior_logits[start : start + size].log_softmax(0) / math.log(2)
            start, value_start = start + size, value_start + size * channels
    raise IndexError


def brute_force(quantizer: TrainableQuantizer, z: Tensor, w: float, level: int) -> Tensor:
    """Definition of the choice, one latent vector and codeword at a time, in float64."""
    tokens = torch.zeros(z.shape[0], quantizer.num_subquantizers, *z.shape[2:], dtype=torch.int64)
    for m, run in enumerate(quantizer.runs()):
        codewords, bits = (part.double() for part in codewords_of(quantizer, level, m))
        for b, y, x in np.ndindex(z.shape[0], *z.shape[2:]):
            values = z[b, quantizer.order[run], y, x].double()
            costs = [float((values - c).square().sum() + w * n) for c, n in zip(codewords, bits, strict=True)]
            tokens[b, m, y, x] = min(range(len(costs)), key=costs.__getitem__)
    return tokens


def test_runs_are_columns_of_the_order(quantizer: TrainableQuantizer) -> None:
    assert quantizer.boundaries == [0, 1, 2, 4, 8]
    assert quantizer.runs() == [slice(0, 1), slice(1, 2), slice(2, 4), slice(4, 8)]
    z = torch.randn(2, 12, 3, 5)
    columns = quantizer.columns(z)
    assert columns.shape == (2, 15, 8)
    assert torch.equal(columns[1, 7], z[1, quantizer.order, 1, 2])


def test_without_codebooks_nothing_is_said() -> None:
    quantizer = TrainableQuantizer(7, QuantizerConfig(3, 16, 2)).requires_grad_(False)
    assert quantizer.sizes.tolist() == [[1, 1, 1]] * 2
    z, level = torch.randn(2, 7, 2, 2), torch.tensor([0, 1])
    tokens = quantizer.assign(z, 1.0, level)
    assert tokens.shape == (2, 3, 2, 2)
    assert not tokens.any()
    assert quantizer.static_bits(tokens, level).tolist() == [0, 0]


@pytest.mark.parametrize("w", [1e-6, 0.3, 4.0])
def test_choice_against_brute_force(quantizer: TrainableQuantizer, w: float) -> None:
    z = torch.randn(2, 12, 3, 4, generator=torch.Generator().manual_seed(1))
    for level in range(6):
        assert torch.equal(quantizer.assign(z, w, torch.tensor([level, level])), brute_force(quantizer, z, w, level))
    mixed = quantizer.assign(z, w, torch.tensor([1, 4]))
    for b, level in enumerate((1, 4)):
        assert torch.equal(mixed[b : b + 1], brute_force(quantizer, z[b : b + 1], w, level))


def test_choice_is_as_exact_inside_autocast(quantizer: TrainableQuantizer) -> None:
    z = 20 * torch.randn(2, quantizer.num_channels, 9, 7, generator=torch.Generator().manual_seed(4))
    level = torch.zeros(2, dtype=torch.int64)
    expected = quantizer.assign(z, 0.5, level)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.assign(z, 0.5, level), expected)


def test_choice_with_a_trade_off_per_sample(quantizer: TrainableQuantizer) -> None:
    z = torch.randn(3, 12, 2, 5, generator=torch.Generator().manual_seed(2))
    ws, levels = [0.01, 0.5, 3.0], torch.tensor([0, 2, 5])
    together = quantizer.assign(z, torch.tensor(ws), levels)
    per_position = torch.tensor(ws)[:, None].repeat(1, 10)
    per_position[:, 5:] = 1.5  # the lower row
    split = quantizer.assign(z, per_position, levels)
    assert torch.equal(split[:, :, 0], together[:, :, 0])
    assert torch.equal(split[:, :, 1], quantizer.assign(z, 1.5, levels)[:, :, 1])
    for b, w in enumerate(ws):
        assert torch.equal(together[b : b + 1], quantizer.assign(z[b : b + 1], w, levels[b : b + 1]))


def test_codewords_quantize_to_themselves(quantizer: TrainableQuantizer) -> None:
    levels = torch.tensor([0, 4])
    tokens = draw_tokens(RAGGED, levels, 4, 4)
    z = quantizer.dequantize(tokens, levels)
    assert torch.equal(quantizer.assign(z, 1e-9, levels), tokens)
    for b, level in enumerate(levels.tolist()):
        for m, run in enumerate(quantizer.runs()):
            expected = codewords_of(quantizer, level, m)[0][tokens[b, m]]  # (h, w, d)
            assert torch.equal(z[b, quantizer.order[run]], expected.permute(2, 0, 1))
    dropped = [d for d in range(12) if d not in quantizer.order.tolist()]
    assert torch.equal(z[:, dropped], quantizer.default[dropped][None, :, None, None].expand(2, -1, 4, 4))


def test_dequantize_uses_the_mean_where_unknown(quantizer: TrainableQuantizer) -> None:
    levels = torch.tensor([2, 5])
    tokens = draw_tokens(RAGGED, levels, 2, 2)
    known = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(6)) < 0.5
    z, whole = quantizer.dequantize(tokens, levels, known), quantizer.dequantize(tokens, levels)
    for m, run in enumerate(quantizer.runs()):
        for channel in quantizer.order[run]:
            expected = torch.where(known[:, m], whole[:, channel], quantizer.default[channel])
            assert torch.equal(z[:, channel], expected)
    nothing = quantizer.dequantize(tokens, levels, torch.zeros(1, 1, 1, 1, dtype=torch.bool))
    assert torch.equal(nothing, quantizer.default[None, :, None, None].expand_as(nothing))


def test_static_bits_are_those_of_the_priors(quantizer: TrainableQuantizer) -> None:
    expected = [codewords_of(quantizer, level, m)[1] for level in range(6) for m in range(4)]
    assert torch.allclose(quantizer.prior_bits(), torch.cat(expected), atol=1e-5)
    levels = torch.tensor([5, 1])
    tokens = draw_tokens(RAGGED, levels, 3, 2)
    for b, level in enumerate(levels.tolist()):
        of_sample = [codewords_of(quantizer, level, m)[1][tokens[b, m]].sum() for m in range(4)]
        assert float(quantizer.static_bits(tokens, levels)[b]) == pytest.approx(float(sum(of_sample)), rel=1e-5)


def test_levels_are_those_of_the_codec(quantizer: TrainableQuantizer) -> None:
    levels = quantizer.levels
    ws = torch.logspace(-1, 3, 60)
    found = quantizer.level(ws)
    assert found.tolist() == [levels.level(w) for w in ws.tolist()]
    assert set(found.diff().tolist()) == {0, 1}
    assert found.unique().tolist() == list(range(6))
    for other in (found, torch.full_like(found, 3)):
        expected = [levels.applied_w(w, level) for w, level in zip(ws.tolist(), other.tolist(), strict=True)]
        assert quantizer.applied_w(ws, other).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("level", [0, 2, 5])
def test_more_weight_on_rate_costs_fewer_bits_and_more_distortion(level: int) -> None:
    quantizer = make_tiny_tokenizer().quantizer.requires_grad_(False)
    z = quantizer.default[None, :, None, None] + 4 * torch.randn(
        1, quantizer.num_channels, 16, 16, generator=torch.Generator().manual_seed(7)
    )
    levels = torch.tensor([level])
    rates, distortions = [], []
    for w in (0.01, 0.3, 3.0, 30.0):
        tokens = quantizer.assign(z, w, levels)
        rates.append(float(quantizer.static_bits(tokens, levels)))
        distortions.append(float((quantizer.dequantize(tokens, levels) - z).square().sum()))
    assert rates == sorted(rates, reverse=True)
    assert distortions == sorted(distortions)
    assert rates[0] > rates[-1]


def test_density_is_a_density() -> None:
    torch.manual_seed(0)
    density = FactorizedDensity(2)
    for parameter in density.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    z = torch.arange(-400, 401, dtype=torch.float32)[None, None, None].expand(1, 2, 1, -1)
    with torch.no_grad():
        mass = torch.exp2(-density.bits(z, torch.ones(1, 1, 1, 1)))
    assert torch.allclose(mass.sum(3), torch.ones(1, 2, 1), atol=1e-3)


def half(quantizer: TrainableQuantizer) -> dict[str, Tensor]:
    """What a file holds; the quantizer holds it too then."""
    stored = {n: t.half() if t.is_floating_point() else t for n, t in quantizer.state_dict().items()}
    quantizer.load_state_dict(stored)
    return stored


@pytest.mark.parametrize("is_ragged", [False, True])
def test_the_codec_chooses_and_decodes_as_training_does(is_ragged: bool) -> None:
    trained = (make_ragged_tokenizer() if is_ragged else make_tiny_tokenizer()).requires_grad_(False).quantizer
    stored = half(trained)
    quantizer = ProductQuantizer({PREFIX + name: tensor.numpy() for name, tensor in stored.items()}, Workers(1))
    noise = torch.randn(1, trained.num_channels, 9, 7, generator=torch.Generator().manual_seed(8))
    z = trained.default[None, :, None, None] + noise
    for level, w in ((0, 0.5), (2, 3.0), (5, 60.0)):
        index = torch.tensor([level])
        tokens = trained.assign(z, w, index)[0]
        channels = quantizer.channels(z.numpy())
        found = quantizer.assign(channels, np.full(channels.shape[1], w, np.float32), level).reshape(tokens.shape)
        assert (found != tokens.numpy()).mean() < 0.01  # where two costs differ by a rounding
        expected = trained.dequantize(tokens[None], index)
        assert np.array_equal(quantizer.dequantize(tokens.numpy(), level), expected)
        bits = float(trained.static_bits(tokens[None], index))
        assert quantizer.static_bits(tokens.flatten(1).numpy(), level) == pytest.approx(bits, rel=1e-4, abs=1e-3)
    assert np.allclose(quantizer.prior_bits, trained.prior_bits(), atol=1e-5)
