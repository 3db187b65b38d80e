"""Lattices that are fitted to a latent: codewords, frequencies, how many, and for which channels."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pqmim.config import QuantizerConfig
from pqmim.training.codebook_fitting import (
    END,
    NUM_POINTS,
    OUTSIDE,
    SIZES,
    START,
    Histogram,
    fit_quantizer,
    order_channels,
    spacing,
)
from pqmim.training.trainable_quantizer import TrainableQuantizer

SPREADS = (0.05, 20.0, 6.0, 2.0, 0.5, 9.0)
LOG_W = torch.linspace(math.log(0.1), math.log(30), 4)
CONFIG = QuantizerConfig(num_subquantizers=5, num_codewords=100, num_levels=4)


def draw_values(*spreads: float, count: int = 20_000, seed: int = 0) -> Tensor:
    """Laplacian, as a latent about is, of standard deviations `spreads` and means 1, 2, ...: (count, D) float32."""
    uniform = torch.rand(count, len(spreads), generator=torch.Generator().manual_seed(seed)) - 0.5
    laplacian = -uniform.sign() * torch.log1p(-2 * uniform.abs()) / math.sqrt(2)
    return laplacian * torch.tensor(spreads) + torch.arange(1, len(spreads) + 1)


@pytest.fixture(scope="module")
def values() -> Tensor:
    return draw_values(*SPREADS)


@pytest.fixture(scope="module")
def fitted(values: Tensor) -> TrainableQuantizer:
    return fit_quantizer(values, LOG_W, CONFIG).requires_grad_(False)


def choose(values: Tensor, codewords: Tensor, probabilities: Tensor, w: float) -> Tensor:
    return ((values[:, None] - codewords).square() - w * probabilities.log2()).argmin(1)


def test_channels_are_ordered_by_rate(values: Tensor) -> None:
    assert order_channels(values, 1.0, 6).tolist() == [1, 5, 2, 3, 4, 0]
    assert order_channels(values, 1.0, 2).tolist() == [1, 5]
    constant = torch.full((len(values), 1), 7.0)
    assert order_channels(torch.cat([constant, values], dim=1), 1.0, 7).tolist()[-2:] == [0, 1]  # neither costs a bit


@settings(deadline=None)
@given(st.integers(0, 99), st.sampled_from([0.0, 1e-3, 1.0, 1e4]), st.sampled_from([1, 2, 5000]))
def test_a_histogram_says_what_the_values_do(seed: int, spread: float, count: int) -> None:
    values = draw_values(spread, count=count, seed=seed)[:, 0]
    histogram = Histogram(values)
    width = float(values.max() - values.min()) / NUM_POINTS
    assert (histogram.points.diff() > 0).all()
    assert histogram.counts.sum() == count
    assert histogram.mean(histogram.points) == pytest.approx(float(values.double().mean()), rel=1e-5, abs=1e-5)
    for share in (0.1, 0.5, 0.9):
        # Values that are put together are as one.
        low, high = (values.quantile(share + side * 1.01 / count if count > 2 else max(side, 0)) for side in (-1, 1))
        assert float(low) - 2 * width - 1e-5 <= histogram.quantile(share) <= float(high) + 2 * width + 1e-5


@pytest.mark.parametrize("w", [0.02, 0.5, 8.0])
def test_a_lattice_is_at_rest(w: float, values: Tensor) -> None:
    """The frequencies are those with which the codewords are chosen; the codewords are the means of what is put there;
    the cost is no more than that of plain rounding."""
    channel = values[:, 5]
    first = round(float(channel.min()) / spacing(w))
    size = round(float(channel.max()) / spacing(w)) - first + 1
    codewords, probabilities, cost = Histogram(channel).lattice(w, first, size)
    assert (codewords.diff() > 0).all()
    assert (probabilities > 0).all()
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-5)
    tokens = choose(channel, codewords, probabilities, w)
    shares = torch.bincount(tokens, minlength=size) / len(channel)
    assert (shares - probabilities).abs().max() < 0.01
    often = shares > 0.01
    assert often.sum() > 2
    for k in often.nonzero()[:, 0].tolist():
        assert float(channel[tokens == k].mean()) == pytest.approx(float(codewords[k]), abs=0.1 * spacing(w))
    error = float((channel - codewords[tokens]).square().mean())
    assert error - w * float(probabilities.log2()[tokens].mean()) == pytest.approx(cost, rel=0.02)

    plain = (channel / spacing(w)).round()
    share = plain.unique(return_counts=True)[1] / len(channel)
    plain_cost = float((channel - plain * spacing(w)).square().mean() - w * (share * share.log2()).sum())
    assert cost < plain_cost


def test_a_fine_lattice_is_as_good_as_theory_says(values: Tensor) -> None:
    """At high resolution a scalar quantizer is a quarter of a bit above the bound of rate and distortion, at any step;
    at the step that belongs to w, where a bit less would cost as much error as it saves."""
    channel, w = values[:, 1], 0.05
    bounds = Histogram(channel).lattice_bounds(w, QuantizerConfig(1, 511, 1))
    codewords, probabilities, _ = Histogram(channel).lattice(w, *bounds)
    tokens = choose(channel, codewords, probabilities, w)
    inside = (channel - codewords[tokens]).square() < spacing(w) ** 2
    assert inside.float().mean() > 0.99
    assert float((channel - codewords[tokens])[inside].square().mean()) == pytest.approx(spacing(w) ** 2 / 12, rel=0.05)
    differential_entropy = math.log2(math.e * math.sqrt(2) * SPREADS[1])
    rate = -float(probabilities.log2()[tokens].mean())
    assert rate == pytest.approx(differential_entropy - math.log2(spacing(w)), abs=0.05)


def test_a_lattice_covers_all_but_a_few_values(values: Tensor) -> None:
    w, channel = 0.5, values[:, 2]
    low, count = Histogram(channel).lattice_bounds(w, CONFIG)
    covered = (channel > (low - 0.5) * spacing(w)) & (channel < (low + count - 0.5) * spacing(w))
    assert 1 - 3 * OUTSIDE < covered.float().mean() < 1
    few = QuantizerConfig(1, 8, 1)
    low, count = Histogram(channel).lattice_bounds(w, few)
    assert (low, count) == (-3, 7)  # at most as many as there may be, around zero


def test_a_channel_is_silent_where_telling_it_does_not_pay(values: Tensor) -> None:
    channel = Histogram(values[:, 4])  # of a variance of 0.25
    assert channel.lattice_bounds(0.02, CONFIG)[1] > 2
    assert channel.lattice_bounds(5.0, CONFIG) == (0, 1)
    assert Histogram(torch.full((100,), 30.0)).lattice_bounds(0.02, CONFIG) == (0, 1)
    # Nor where it saves little for each bit that a channel must cost at least.
    w = 0.02
    cost = channel.lattice(w, *channel.lattice_bounds(w, CONFIG))[2]
    saved = (float(values[:, 4].var()) - cost) / w
    for share, is_silent in ((0.98, False), (1.02, True)):
        config = QuantizerConfig(1, 100, 1, min_channel_rate=share * saved)
        assert (channel.lattice_bounds(w, config) == (0, 1)) == is_silent


def test_alphabets_are_of_few_sizes_and_fall_along_the_channels(fitted: TrainableQuantizer) -> None:
    sizes = fitted.alphabets.sizes
    assert sizes.shape == (4, 5)
    assert set(sizes.ravel().tolist()) <= {*SIZES, 100}
    assert sizes.max() == 100  # cut short
    assert (np.diff(sizes, axis=1) <= 0).all()
    assert (np.diff(sizes, axis=0) <= 0).all()  # coarser levels need less
    assert (sizes[:, 4] > 1).tolist() == [True, False, False, False]  # the quiet channel is told where bits are cheap
    assert fitted.sizes.tolist() == sizes.tolist()
    assert fitted.alphabets.channels.tolist() == [1] * 5


def test_a_channel_before_one_that_needs_more_has_as_much() -> None:
    """One that is seldom far from its mean costs little and needs many codewords."""
    values = draw_values(2.0, 0.01)
    values[::200, 1] = torch.linspace(-60, 60, len(values[::200]))
    quantizer = fit_quantizer(values, torch.tensor([0.0]), QuantizerConfig(2, 511, 1))
    assert quantizer.order.tolist() == [0, 1]
    needed = [Histogram(values[:, channel]).lattice_bounds(1.0, QuantizerConfig(2, 511, 1))[1] for channel in (0, 1)]
    assert needed[0] < needed[1] <= quantizer.sizes[0, 0] == quantizer.sizes[0, 1]


def test_codebooks_are_the_lattices_of_their_levels(fitted: TrainableQuantizer, values: Tensor) -> None:
    assert fitted.order.tolist() == [1, 5, 2, 3, 4]
    assert torch.allclose(fitted.default, values.mean(0), atol=1e-4)
    for level, log_w in enumerate(LOG_W.tolist()):
        for block in fitted.blocks(level):
            for row, m in enumerate(range(block.first, block.last)):
                codewords = fitted.codebook[block.values].view(-1, block.size)[row]
                probabilities = torch.exp2(-fitted.block_bits(block)[row])
                channel = values[:, fitted.order[m]]
                if block.size == 1:
                    assert float(codewords) == pytest.approx(float(channel.mean()), abs=1e-4)
                    continue
                assert (codewords.diff() > 0).all()
                tokens = choose(channel, codewords, probabilities, math.exp(log_w))
                shares = torch.bincount(tokens, minlength=block.size) / len(channel)
                assert (shares - probabilities).abs().max() < 0.03
                wasted = (shares * (shares / probabilities).log2()).nansum()
                assert wasted < 0.005  # bits
                # The lattice lies where the values are: not all of its unused codewords on one side.
                unused = (shares == 0).nonzero()[:, 0].tolist()
                sides = sum(k < int(tokens.min()) for k in unused), sum(k > int(tokens.max()) for k in unused)
                assert max(sides) <= 1 + min(sides) + block.size // 4


def test_each_level_is_the_best_one_at_what_it_is_made_for(values: Tensor) -> None:
    fitted = fit_quantizer(values, LOG_W, replace(CONFIG, num_codewords=511)).requires_grad_(False)
    z = values[:4096].t().reshape(1, len(SPREADS), 64, 64)
    for made_for, log_w in enumerate(LOG_W.tolist()):
        costs = []
        for level in range(4):
            index = torch.tensor([level])
            tokens = fitted.assign(z, math.exp(log_w), index)
            error = (fitted.dequantize(tokens, index) - z).square().sum()
            costs.append(float(error + math.exp(log_w) * fitted.static_bits(tokens, index)))
        assert min(range(4), key=costs.__getitem__) == made_for


def test_levels_apply_more_than_they_are_made_for(fitted: TrainableQuantizer) -> None:
    gap = float(LOG_W[1] - LOG_W[0])
    assert torch.allclose(fitted.level_range[:, 0], LOG_W - START * gap)
    assert torch.allclose(fitted.level_range[:, 1], LOG_W + END * gap)
    low, high = fitted.levels.w_range()
    assert low < 0.1 < 30 < high
    alone = fit_quantizer(draw_values(3.0), torch.tensor([0.5]), QuantizerConfig(1, 20, 1))
    assert alone.level_range.tolist() == [pytest.approx([0.5 - START, 0.5 + END])]
