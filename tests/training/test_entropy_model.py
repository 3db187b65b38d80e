"""The trainable entropy model: any order of the tokens, and nothing leaks from those that come later."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from training.tiny_networks import TINY_ENTROPY, TINY_TOKENIZER, make_tiny_entropy_model, make_tiny_tokenizer
from training.token_tools import RAGGED, RAGGED_ENTROPY, draw_tokens, make_ragged_tokenizer

from pqmim.fixed_point import ACTIVATION_UNIT, INT8_MAX, LOGIT_UNIT
from pqmim.schedule import quincunx_steps
from pqmim.training.entropy_model import VALUE_DEVIATIONS, EntropyModel
from pqmim.training.layers import UNSEEN, quantize_weight
from pqmim.training.orders import Orders
from pqmim.training.tokenizer import Tokenizer
from pqmim.training.train_entropy_model import draw_orders
from pqmim.training.trainable_quantizer import TrainableQuantizer

QUINCUNX = torch.from_numpy(quincunx_steps(8, 8))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tiny_tokenizer().requires_grad_(False)


@pytest.fixture(scope="module")
def ragged() -> TrainableQuantizer:
    """Of sub-quantizers with several channels, and of alphabets that do not fall along them."""
    return make_ragged_tokenizer().requires_grad_(False).quantizer


@pytest.fixture(scope="module", params=["lattices", "ragged"])
def model(request: pytest.FixtureRequest, tokenizer: Tokenizer, ragged: TrainableQuantizer) -> EntropyModel:
    if request.param == "lattices":
        return make_tiny_entropy_model(tokenizer).requires_grad_(False)
    torch.manual_seed(1)
    made = EntropyModel.for_quantizer(RAGGED_ENTROPY, ragged).eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        if name.endswith(("sink", "_bias", ".bias")) and name != "token_bias":
            parameter.normal_(std=0.3)
    return made


def logits_by_definition(model: EntropyModel, hidden: Tensor, level: int, m: int, *, simulate: bool = False) -> Tensor:
    """Logits (n, K) of a sub-quantizer at a level from rows of `EntropyModel.hidden`."""
    rank = model.config.token_rank
    own, size = slice(m * rank, (m + 1) * rank), int(model.alphabets.sizes[level, m])
    start = sum(int(k) for k in model.alphabets.sizes.ravel()[: level * model.num_subquantizers + m])
    factors, bias = model.token_factors[start : start + size], model.token_bias[start : start + size]
    if not simulate:
        return (hidden @ model.head.weight[own].t() + model.head.bias[own]) @ factors.t() + bias
    weights, unit = quantize_weight(model.head.weight[own])
    head = (hidden @ (weights * unit).t() + model.head.bias[own]) / ACTIVATION_UNIT
    head = head.round().clamp(-INT8_MAX, INT8_MAX) * ACTIVATION_UNIT
    weights, unit = quantize_weight(factors.reshape(1, -1))
    return ((head @ (weights * unit).view(size, rank).t() + bias) / LOGIT_UNIT).round() * LOGIT_UNIT


def bits_by_definition(model: EntropyModel, group: int, hidden: Tensor, tokens: Tensor, level: Tensor) -> Tensor:
    """`EntropyModel.token_bits`, one sub-quantizer of one row at a time."""
    first, _ = model.schedule.group_bounds(group)
    bits = torch.zeros(tokens.shape)
    for row, index in enumerate(level.tolist()):
        for place, token in enumerate(tokens[row].tolist()):
            logits = logits_by_definition(model, hidden[row], index, first + place)
            bits[row, place] = -logits.log_softmax(0)[token] / math.log(2)
    return bits


@settings(deadline=None, max_examples=25)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    share=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    simulate=st.booleans(),
    seed=st.integers(0, 99),
)
def test_unknown_tokens_have_no_influence(
    model: EntropyModel, height: int, width: int, share: float, simulate: bool, seed: int
) -> None:
    level = torch.tensor([0, 3])
    tokens, others = (draw_tokens(model.alphabets, level, height, width, seed + i) for i in range(2))
    known = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed)) < share
    orders = Orders.of_known(model.schedule, known)
    hidden = model.hidden(tokens, level, orders, simulate=simulate)
    others = torch.where(known, tokens, others)
    for before, after in zip(hidden, model.hidden(others, level, orders, simulate=simulate), strict=True):
        assert before.isfinite().all()
        assert torch.equal(before, after)


@pytest.mark.parametrize("changed", range(7))
def test_no_step_of_the_schedule_sees_its_own_or_later_tokens(model: EntropyModel, changed: int) -> None:
    level = torch.tensor([1])
    tokens, sizes = draw_tokens(model.alphabets, level, 8, 8), torch.from_numpy(model.alphabets.sizes)[1, None, :, None]
    orders = Orders.of_schedule(model.schedule, QUINCUNX)
    others, step = tokens.clone(), model.schedule.steps[changed]
    here = (step.begin <= QUINCUNX) & (step.end > QUINCUNX)
    own = slice(step.first, step.last)
    others[:, own, here] = (others[:, own, here] + 1) % sizes[:, own]
    before, after = (model.hidden(t, level, orders) for t in (tokens, others))
    for index, each in enumerate(model.schedule.steps):
        where = (each.begin <= QUINCUNX) & (each.end > QUINCUNX)
        is_same = torch.equal(before[each.group][0, where], after[each.group][0, where])
        assert is_same == (index <= changed or index == 0)


def test_known_tokens_have_influence_on_every_neighbor(model: EntropyModel) -> None:
    tokens = torch.zeros(1, model.num_subquantizers, 5, 5, dtype=torch.int64)
    known = torch.zeros_like(tokens, dtype=torch.bool)
    known[:, :, 2, 2] = True
    changed = tokens.clone()
    changed[0, 0, 2, 2] = 2
    level = torch.tensor([0])
    none = Orders.of_known(model.schedule, torch.zeros_like(known))
    orders = Orders.of_known(model.schedule, known)
    before, after = (model.hidden(t, level, orders)[0][0] for t in (tokens, changed))
    masked = model.hidden(tokens, level, none)[0][0]
    around = torch.ones(5, 5, dtype=torch.bool)
    around[2, 2] = False
    for other in (after, masked):  # unknown is not token 0
        assert ((before - other).abs().amax(2)[1:4, 1:4][around[1:4, 1:4]] > 1e-6).all()


def test_the_level_has_influence_on_the_network(model: EntropyModel) -> None:
    level = torch.tensor([0, 3])
    tokens = torch.zeros(2, model.num_subquantizers, 3, 3, dtype=torch.int64)
    orders = Orders.of_known(model.schedule, torch.zeros_like(tokens, dtype=torch.bool))
    for simulate in (False, True):
        hidden = model.hidden(tokens, level, orders, simulate=simulate)[0]
        assert not torch.equal(hidden[0], hidden[1])


@pytest.mark.parametrize("simulate", [False, True])
def test_bits_of_tokens_by_their_definition(model: EntropyModel, simulate: bool) -> None:
    level = torch.tensor([3, 0, 5, 3, 1, 4, 2])
    hidden = torch.randn(len(level), model.config.width, generator=torch.Generator().manual_seed(2))
    hidden = (hidden / ACTIVATION_UNIT).round() * ACTIVATION_UNIT
    for group in range(model.schedule.num_groups):
        first, last = model.schedule.group_bounds(group)
        tokens = draw_tokens(model.alphabets, level, 1, 1, seed=group)[:, first:last, 0, 0]
        found = model.token_bits(group, hidden, tokens, level, simulate=simulate)
        if not simulate:
            assert torch.allclose(found, bits_by_definition(model, group, hidden, tokens, level), atol=1e-4)
            continue
        is_silent = torch.from_numpy(model.alphabets.sizes)[level, first:last] == 1
        assert not found[is_silent].any()
        differences = []
        for row, index in enumerate(level.tolist()):
            for place in (~is_silent[row]).nonzero()[:, 0].tolist():
                logits = logits_by_definition(model, hidden[row : row + 1], index, first + place, simulate=True)[0]
                expected = -logits.log_softmax(0)[tokens[row, place]] / math.log(2)
                differences.append(abs(float(found[row, place] - expected)))
        # A half that falls to the other side moves an activation of the head by a unit.
        assert sorted(differences)[len(differences) // 2] < 1e-3
        assert max(differences) < 0.1


def test_nothing_costs_nothing(model: EntropyModel) -> None:
    """A part of a batch may know a whole group, or everything."""
    level = torch.tensor([2])
    tokens = draw_tokens(model.alphabets, level, 3, 3)
    known = torch.zeros_like(tokens, dtype=torch.bool)
    known[:, slice(*model.schedule.group_bounds(1))] = True
    bits = [model.code_length(tokens, level, Orders.of_known(model.schedule, each)) for each in (known, ~known)]
    alone = model.code_length(tokens, level, Orders.of_known(model.schedule, torch.ones_like(known)))
    assert min(bits) > alone == 0


def test_gradients_reach_every_codeword(model: EntropyModel) -> None:
    """Each as if its own logits were all there is; those of silent sub-quantizers none."""
    level = torch.arange(model.num_levels).repeat(8)
    hidden = torch.randn(len(level), model.config.width, generator=torch.Generator().manual_seed(3))
    is_silent = torch.from_numpy((model.alphabets.sizes == 1).repeat(model.alphabets.sizes.ravel().tolist()))
    parameters = [model.token_factors, model.token_bias]
    gradients = []
    for bits_of in (model.token_bits, partial(bits_by_definition, model)):
        with torch.enable_grad():
            for parameter in parameters:
                parameter.requires_grad_(True)
            total = torch.zeros(())
            for group in range(model.schedule.num_groups):
                tokens = draw_tokens(model.alphabets, level, 1, 1)[:, slice(*model.schedule.group_bounds(group)), 0, 0]
                total = total + bits_of(group, hidden, tokens, level).sum()
            gradients.append(torch.autograd.grad(total, parameters))
        for parameter in parameters:
            parameter.requires_grad_(False)
    for found, expected in zip(*gradients, strict=True):
        assert torch.allclose(found, expected, atol=1e-4)
        assert ((found == 0).view(len(found), -1).all(1) == is_silent).all()


def test_known_tokens_enter_as_values_of_their_codewords(model: EntropyModel) -> None:
    level = torch.tensor([0, 4])
    tokens = draw_tokens(model.alphabets, level, 2, 3)
    known = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    channels = model.alphabets.channels.tolist()
    for group in range(model.schedule.num_groups):
        first, last = model.schedule.group_bounds(group)
        found = model.embedded(group, tokens[:, first:last], known[:, first:last], level)
        for b, index in enumerate(level.tolist()):
            for y, x in ((0, 0), (1, 2)):
                values: list[float] = []
                for m in range(first, last):
                    start = int(model.alphabets.value_starts[index, m] + tokens[b, m, y, x] * channels[m])
                    codeword = model.token_values[start : start + channels[m]]
                    values += (codeword * known[b, m, y, x]).tolist()
                flags = known[b, first:last, y, x].float().tolist()
                inputs = values + flags
                if group == 0:
                    inputs += F.one_hot(level[b], model.num_levels).float().tolist()
                expected = model.embed[group](torch.tensor(inputs)[None], False)[0]
                assert torch.allclose(found[b, y, x], expected, atol=1e-4)


def test_values_of_codewords_are_in_deviations_of_their_channel(ragged: TrainableQuantizer) -> None:
    """The finest level says how far a channel spreads, for all levels."""
    model = EntropyModel.for_quantizer(RAGGED_ENTROPY, ragged)
    for m, run in enumerate(ragged.runs()):
        start, size = int(RAGGED.starts[0, m]), int(RAGGED.sizes[0, m])
        shares = ragged.prior_logits[start : start + size].softmax(0)[:, None]
        means = ragged.default[ragged.order[run]]

        def of_level(flat: Tensor, level: int, m: int = m) -> Tensor:
            size, channels, start = RAGGED.sizes[level, m], RAGGED.channels[m], RAGGED.value_starts[level, m]
            return flat[start : start + size * channels].view(size, channels)

        deviation = (shares * (of_level(ragged.codebook, 0) - means).square()).sum(0).sqrt()
        for level in range(RAGGED.num_levels):
            value = (of_level(ragged.codebook, level) - means) / deviation * (INT8_MAX / VALUE_DEVIATIONS)
            found = of_level(model.token_values, level) / ACTIVATION_UNIT
            assert (found - value.clamp(-INT8_MAX, INT8_MAX)).abs().max() < 0.51


def test_samples_of_a_batch_do_not_mix(model: EntropyModel) -> None:
    level = torch.tensor([0, 5, 2])
    tokens = draw_tokens(model.alphabets, level, 8, 8)
    known = torch.rand(tokens.shape) < 0.5
    for orders in (Orders.of_known(model.schedule, known), Orders.of_schedule(model.schedule, QUINCUNX)):
        together = model.hidden(tokens, level, orders)
        for i in range(3):
            one = slice(i, i + 1)
            alone = model.hidden(tokens[one], level[one], orders.of_samples(lambda mask, one=one: mask[one]))
            for all_of_them, this in zip(together, alone, strict=True):
                assert torch.allclose(all_of_them[one], this, atol=1e-4)


@pytest.mark.parametrize("level", range(TINY_TOKENIZER.quantizer.num_levels))
def test_untrained_model_starts_near_the_static_prior_of_the_level(tokenizer: Tokenizer, level: int) -> None:
    torch.manual_seed(0)
    quantizer = tokenizer.quantizer
    model = EntropyModel.for_quantizer(TINY_ENTROPY, quantizer).requires_grad_(False)
    assert torch.allclose(model.prior, -math.log(2) * quantizer.prior_bits(), atol=1e-5)
    tokens = torch.zeros(1, quantizer.num_subquantizers, 2, 2, dtype=torch.int64)
    orders = Orders.of_known(model.schedule, torch.zeros_like(tokens, dtype=torch.bool))
    entropy = 0.0
    for group, hidden in enumerate(model.hidden(tokens, torch.tensor([level]), orders)):
        for m in range(*model.schedule.group_bounds(group)):
            start, size = quantizer.alphabets.starts[level, m], quantizer.alphabets.sizes[level, m]
            prior = model.prior[start : start + size]
            entropy -= float((prior.exp() * prior).sum()) / math.log(2)
            logits = logits_by_definition(model, hidden[0, 0], level, m)
            divergence = (prior.exp() * (prior - logits.log_softmax(1))).sum(1) / math.log(2)
            assert divergence.max() < 0.5  # bits
    assert float(model.level_bits[level]) == pytest.approx(entropy, rel=1e-4)


def test_code_length_is_cross_entropy_of_what_is_predicted(model: EntropyModel) -> None:
    level = torch.tensor([1, 4])
    tokens = draw_tokens(model.alphabets, level, 4, 4)
    known = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    orders = Orders.of_known(model.schedule, known)
    bits, expected = model.code_length(tokens, level, orders), torch.zeros(2)
    for group, hidden in enumerate(model.hidden(tokens, level, orders)):
        own = slice(*model.schedule.group_bounds(group))
        for sample in range(2):
            rows, sent = hidden[sample].flatten(0, 1), tokens[sample, own].flatten(1).t()
            lengths = bits_by_definition(model, group, rows, sent, level[sample].expand(16))
            expected[sample] += (lengths * ~known[sample, own].flatten(1).t()).sum()
    assert bits.tolist() == pytest.approx(expected.tolist(), rel=1e-4)


def test_bits_of_the_schedule_add_up(model: EntropyModel) -> None:
    level = torch.tensor([1, 4])
    tokens = draw_tokens(model.alphabets, level, 8, 8)
    orders = Orders.of_schedule(model.schedule, QUINCUNX)
    bits = model.schedule_bits(tokens, level)
    assert bits.shape == (2, 5)
    static = 0.0
    for sample, index in enumerate(level.tolist()):
        for m in range(model.schedule.steps[0].last):
            places = int(model.alphabets.starts[index, m]) + tokens[sample, m, QUINCUNX == 0]
            static -= float(model.prior[places].sum()) / math.log(2)
    assert float(bits[0, 0]) == pytest.approx(static, rel=1e-5)
    later = float(model.code_length(tokens, level, orders).sum())
    assert float(bits.sum()) - static == pytest.approx(later, rel=1e-4)


def test_orders_of_the_schedule_are_its_steps(model: EntropyModel) -> None:
    orders = Orders.of_schedule(model.schedule, QUINCUNX)
    assert torch.equal(orders.content[0], QUINCUNX)  # five steps of the first group
    assert torch.equal(orders.query, orders.content)
    first, second = orders.passes[0]
    assert not first.known.any()
    assert torch.equal(second.known[0, 0], QUINCUNX < 4)
    assert torch.equal(second.predicted[0], QUINCUNX == 4)
    assert torch.equal(first.predicted[0], QUINCUNX < 4)


def test_drawn_orders_are_of_the_schedule_or_take_anything(model: EntropyModel) -> None:
    kinds = {"schedule": 0, "known": 0, "random": 0}
    for seed in range(200):
        orders = draw_orders(model, 3, QUINCUNX, torch.Generator().manual_seed(seed))
        if orders.is_whole:
            kinds["schedule"] += 1
            continue
        assert orders.content.shape == (3, 8, 8)
        assert orders.known.shape[0] == 3
        if torch.equal(orders.content, orders.query):
            kinds["random"] += 1
            assert orders.known.all()
            assert orders.predicted.all()
            assert 1 < int(orders.content.max()) + 1 <= 9
        else:
            kinds["known"] += 1
            assert torch.equal(orders.content < UNSEEN, orders.known.any(1))
            assert torch.equal(orders.predicted, ~orders.known.all(1))
        for (each,) in orders.passes:
            assert torch.equal(each.predicted, ~each.known.all(1))
            _, unknown = orders.wanted(1)
            assert unknown is not None
            assert torch.equal(unknown, ~each.known)
    assert 150 < kinds["schedule"] < 190
    assert min(kinds["known"], kinds["random"]) > 5
