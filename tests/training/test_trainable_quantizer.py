"""Product quantizer: runs of equal rate, entropy-constrained choice, priors."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training.tiny_networks import make_tiny_tokenizer

from pqmim.config import QuantizerConfig
from pqmim.levels import Levels, level_ends, level_starts
from pqmim.quantizer import PREFIX, ProductQuantizer
from pqmim.runtime import Workers
from pqmim.training.trainable_quantizer import (
    FactorizedDensity,
    TrainableQuantizer,
    fit_codebook,
    order_channels,
)


@pytest.fixture(scope="module")
def quantizer() -> TrainableQuantizer:
    """Random quantizer with unequal runs and two of ten channels dropped."""
    torch.manual_seed(0)
    made = TrainableQuantizer(10, 8, QuantizerConfig(3, 16))
    made.order.copy_(torch.randperm(10)[:8])
    made.boundaries_tensor.copy_(torch.tensor([0, 1, 3, 8]))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made.requires_grad_(False)


def brute_force(quantizer: TrainableQuantizer, z: torch.Tensor, w: float, level: int) -> torch.Tensor:
    """Definition of the choice, one latent vector and codeword at a time, in float64."""
    bits = quantizer.prior_bits()[level].double()
    tokens = torch.zeros(z.shape[0], quantizer.num_subquantizers, *z.shape[2:], dtype=torch.int64)
    for b in range(z.shape[0]):
        for y in range(z.shape[2]):
            for x in range(z.shape[3]):
                for m, run in enumerate(quantizer.runs()):
                    values = z[b, quantizer.order[run], y, x].double()
                    costs = [
                        float((values - quantizer.codebook[level, k, run].double()).square().sum() + w * bits[m, k])
                        for k in range(quantizer.num_codewords)
                    ]
                    tokens[b, m, y, x] = min(range(len(costs)), key=costs.__getitem__)
    return tokens


@given(
    st.lists(st.floats(0, 8, width=32), min_size=1, max_size=60),
    st.integers(1, 12),
    st.sampled_from([0.0, 0.01, 0.5]),
)
def test_runs_partition_the_ordered_channels(rates: list[float], num_runs: int, min_rate: float) -> None:
    rates += [0.0] * max(0, num_runs - len(rates))
    bits = torch.tensor(rates)
    order, boundaries = order_channels(bits, num_runs, min_rate)
    assert len(boundaries) == num_runs + 1
    assert boundaries[0] == 0
    assert boundaries[-1] == len(order)
    assert all(end > begin for begin, end in pairwise(boundaries))
    assert len(set(order.tolist())) == len(order)
    assert (bits[order].diff() <= 0).all()
    kept = set(order.tolist())
    assert all(i in kept for i, rate in enumerate(rates) if rate > min_rate)
    assert len(order) == max(num_runs, sum(rate > min_rate for rate in rates))


def test_runs_have_about_equal_rate() -> None:
    bits = torch.tensor([4.0 * 0.97**i for i in range(256)])
    order, boundaries = order_channels(bits, 24, 0.0)
    rates = [float(bits[order[a:b]].sum()) for a, b in pairwise(boundaries)]
    share = float(bits.sum()) / 24
    assert max(rates) <= share + 2.1  # half a channel, as near as one comes
    assert min(rates) >= share - 2.1
    assert boundaries[1] < boundaries[-1] - boundaries[-2]  # few loud channels lead, many quiet ones follow


@pytest.mark.parametrize("w", [1e-6, 0.3, 4.0])
def test_choice_against_brute_force(quantizer: TrainableQuantizer, w: float) -> None:
    z = torch.randn(2, 10, 3, 4, generator=torch.Generator().manual_seed(1))
    for level in (0, 3, 5):
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
    z = torch.randn(3, 10, 2, 5, generator=torch.Generator().manual_seed(2))
    ws, levels = [0.01, 0.5, 3.0], torch.tensor([0, 2, 5])
    together = quantizer.assign(z, torch.tensor(ws), levels)
    per_position = torch.tensor(ws)[:, None].repeat(1, 10)
    per_position[:, 5:] = 1.5  # the lower row
    split = quantizer.assign(z, per_position, levels)
    assert torch.equal(split[:, :, 0], together[:, :, 0])
    assert torch.equal(split[:, :, 1], quantizer.assign(z, 1.5, levels)[:, :, 1])
    for b, w in enumerate(ws):
        assert torch.equal(together[b : b + 1], quantizer.assign(z[b : b + 1], w, levels[b : b + 1]))


def test_smoothed_bits_are_the_envelope_of_the_rate(quantizer: TrainableQuantizer) -> None:
    z = torch.randn(2, 10, 2, 3, requires_grad=True)
    w, levels = torch.tensor([0.3, 2.0]), torch.tensor([1, 4])
    tokens = quantizer.assign(z.detach(), w, levels)
    smoothed = quantizer.smoothed_bits(z, tokens, w, levels)
    assert smoothed.shape == tokens.shape
    others = torch.randint(0, 16, tokens.shape)
    assert (smoothed <= quantizer.smoothed_bits(z, others, w, levels) + 1e-4).all()  # a minimum over codewords
    smoothed.sum().backward()
    assert z.grad is not None
    # Danskin: its gradient is that of the term chosen.
    expected = 2 * (z.detach() - quantizer.dequantize(tokens, levels)) / w[:, None, None, None]
    coded = quantizer.order
    assert torch.allclose(z.grad[:, coded], expected[:, coded], atol=1e-4)
    dropped = [channel for channel in range(10) if channel not in coded.tolist()]
    assert (z.grad[:, dropped] == 0).all()


def test_codewords_quantize_to_themselves(quantizer: TrainableQuantizer) -> None:
    tokens = torch.randint(0, 16, (2, 3, 4, 4), generator=torch.Generator().manual_seed(4))
    levels = torch.tensor([0, 4])
    z = quantizer.dequantize(tokens, levels)
    assert torch.equal(quantizer.assign(z, 1e-9, levels), tokens)
    dropped = [d for d in range(10) if d not in quantizer.order.tolist()]
    assert torch.equal(z[:, dropped], quantizer.default[dropped][None, :, None, None].expand(2, -1, 4, 4))


def test_dequantize_uses_the_mean_where_unknown(quantizer: TrainableQuantizer) -> None:
    tokens = torch.randint(0, 16, (2, 3, 2, 2), generator=torch.Generator().manual_seed(5))
    known = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(6)) < 0.5
    levels = torch.tensor([2, 5])
    z, whole = quantizer.dequantize(tokens, levels, known), quantizer.dequantize(tokens, levels)
    for m, run in enumerate(quantizer.runs()):
        for channel in quantizer.order[run]:
            expected = torch.where(known[:, m], whole[:, channel], quantizer.default[channel])
            assert torch.equal(z[:, channel], expected)
    nothing = quantizer.dequantize(tokens, levels, torch.zeros(1, 3, 1, 1, dtype=torch.bool))
    assert torch.equal(nothing, quantizer.default[None, :, None, None].expand_as(nothing))


def test_static_bits_are_those_of_the_priors(quantizer: TrainableQuantizer) -> None:
    bits = quantizer.prior_bits()
    assert bits.shape == (6, 3, 16)
    assert torch.allclose(torch.exp2(-bits), quantizer.prior_logits.softmax(2), atol=1e-6)


def test_levels_take_turns_over_the_range_of_trade_offs(quantizer: TrainableQuantizer) -> None:
    ws = torch.logspace(-1, 3, 400)
    levels = quantizer.level(ws)
    assert levels[0] == 0
    assert levels[-1] == len(quantizer.level_log_w) - 1
    assert set(levels.diff().tolist()) == {0, 1}
    assert torch.equal(quantizer.level(quantizer.level_log_w.exp())[1:], torch.arange(1, 6))
    assert quantizer.level(1.0).shape == ()


def test_levels_hand_over_where_the_constants_say(quantizer: TrainableQuantizer) -> None:
    """Within a level the applied trade-off rises with the one asked for; at a handover it steps back."""
    ws = torch.logspace(-1, 3, 4000)
    levels = quantizer.level(ws)
    applied = quantizer.applied_w(ws, levels)
    made_for = quantizer.level_log_w.exp()
    for level in range(5):
        of_level, of_next = applied[levels == level], applied[levels == level + 1]
        assert (of_level.diff() > 0).all()
        assert float(of_level[-1]) == pytest.approx(level_ends(6)[level] * float(made_for[level]), rel=0.02)
        assert float(of_next[0]) == pytest.approx(level_starts(6)[level] * float(made_for[level + 1]), rel=0.02)
    for w in (0.01, 3.0, 5000.0):  # a level that does not serve w goes on as it would
        assert (quantizer.applied_w(torch.tensor([w, 1.1 * w]), torch.tensor([3, 3])).diff() > 0).all()


@pytest.mark.parametrize("level", [0, 2, 5])
def test_more_weight_on_rate_costs_fewer_bits_and_more_distortion(level: int) -> None:
    quantizer = make_tiny_tokenizer().quantizer.requires_grad_(False)
    z = quantizer.default[None, :, None, None] + torch.randn(
        1, quantizer.num_channels, 16, 16, generator=torch.Generator().manual_seed(7)
    )
    levels = torch.tensor([level])
    prior = quantizer.prior_bits()[level]
    rates, distortions = [], []
    for w in (0.01, 0.3, 3.0, 30.0):
        tokens = quantizer.assign(z, w, levels)
        rates.append(float(prior.gather(1, tokens[0].flatten(1)).sum()))
        distortions.append(float((quantizer.dequantize(tokens, levels) - z).square().sum()))
    assert rates == sorted(rates, reverse=True)
    assert distortions == sorted(distortions)


def test_fitted_codebook_is_entropy_constrained() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4000, 2, generator=generator) * torch.tensor([3.0, 1.0])

    def fit(w: float) -> tuple[float, float]:
        codewords, probabilities = fit_codebook(values, 32, w, 12, torch.Generator().manual_seed(0))
        assert torch.isclose(probabilities.sum(), torch.tensor(1.0))
        assert (probabilities > 0).all()
        assert (probabilities.diff() <= 0).all()
        distances = torch.cdist(values, codewords).square()
        tokens = (distances - w * probabilities.log2()).argmin(1)
        return float(-probabilities.log2()[tokens].mean()), float(distances.gather(1, tokens[:, None]).mean())

    fine, coarse = fit(0.01), fit(2.0)
    assert fine[0] > coarse[0] + 1
    assert fine[1] < coarse[1]
    assert fine[1] < 0.5  # of a variance of 10


def test_density_is_a_density() -> None:
    torch.manual_seed(0)
    density = FactorizedDensity(2)
    for parameter in density.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    z = torch.arange(-400, 401, dtype=torch.float32)[None, None, None].expand(1, 2, 1, -1)
    with torch.no_grad():
        mass = torch.exp2(-density.bits(z, torch.ones(1, 1, 1, 1)))
    assert torch.allclose(mass.sum(3), torch.ones(1, 2, 1), atol=1e-3)


def test_asking_for_a_trade_off_applies_it(quantizer: TrainableQuantizer) -> None:
    """By the level made for the nearest one; the finest level, which ends early, leaves the others more."""
    made_for = quantizer.level_log_w.exp()
    before = 0.0
    for w in torch.logspace(-1, 3, 200).tolist():
        asked = quantizer.asking_for(w)
        level = quantizer.level(asked)
        assert float(quantizer.applied_w(asked, level)) == pytest.approx(w, rel=1e-4)
        assert asked > before
        before = asked
        nearest = int((made_for.log() - math.log(w)).abs().argmin())
        assert int(level) == nearest or (nearest == 0 and int(level) == 1 and w > float(made_for[0]))


@pytest.mark.parametrize("number", [1, 2, 3, 6, 20])
def test_levels_of_training_are_those_of_the_codec(number: int) -> None:
    quantizer = TrainableQuantizer(4, 4, QuantizerConfig(2, 4, number))
    quantizer.level_log_w.copy_(torch.linspace(math.log(0.5), math.log(60), number))
    levels = Levels(quantizer.level_log_w.tolist())
    assert quantizer.w_range() == pytest.approx(levels.w_range(), rel=1e-5)
    for w in torch.logspace(-1, 3, 50).tolist():
        level = levels.level(w)
        assert int(quantizer.level(w)) == level
        assert float(quantizer.applied_w(w, torch.tensor(level))) == pytest.approx(levels.applied_w(w, level), rel=1e-4)
        assert quantizer.asking_for(w) == pytest.approx(levels.asking_for(w), rel=1e-4)


def test_the_codec_chooses_and_decodes_as_training_does() -> None:
    trained = make_tiny_tokenizer().quantizer.requires_grad_(False)
    stored = {n: t.half() if t.is_floating_point() else t for n, t in trained.state_dict().items()}
    trained.load_state_dict(stored)  # what a file holds
    quantizer = ProductQuantizer({PREFIX + name: tensor.numpy() for name, tensor in stored.items()}, Workers(1))
    noise = torch.randn(1, trained.num_channels, 9, 7, generator=torch.Generator().manual_seed(8))
    z = trained.default[None, :, None, None] + noise
    for level, w in ((0, 0.5), (2, 3.0), (5, 60.0)):
        tokens = trained.assign(z, w, torch.tensor([level]))[0]
        columns = quantizer.columns(z.numpy())
        found = quantizer.assign(columns, np.full(len(columns), w, np.float32), level).reshape(tokens.shape)
        assert (found != tokens.numpy()).mean() < 0.01  # where two costs differ by a rounding
        expected = trained.dequantize(tokens[None], torch.tensor([level]))
        assert np.array_equal(quantizer.dequantize(tokens.numpy(), level), expected)
        assert np.allclose(quantizer.prior_bits[level], trained.prior_bits()[level], atol=1e-5)
