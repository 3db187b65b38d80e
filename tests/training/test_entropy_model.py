"""The trainable entropy model: any order of the tokens, and nothing leaks from those that come later."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from training.tiny_networks import TINY_TOKENIZER, make_tiny_entropy_model, make_tiny_tokenizer

from pqmim.fixed_point import LOGIT_UNIT
from pqmim.schedule import quincunx_steps
from pqmim.training.entropy_model import EntropyModel
from pqmim.training.layers import UNSEEN
from pqmim.training.orders import Orders
from pqmim.training.tokenizer import Tokenizer
from pqmim.training.train_entropy_model import draw_orders

QUINCUNX = torch.from_numpy(quincunx_steps(8, 8))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tiny_tokenizer().requires_grad_(False)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> EntropyModel:
    return make_tiny_entropy_model(tokenizer).requires_grad_(False)


def draw_tokens(model: EntropyModel, batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.num_codewords, (batch, model.num_subquantizers, height, width), generator=generator)


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
    tokens, others = (draw_tokens(model, 2, height, width, seed + i) for i in range(2))
    known = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed)) < share
    level, orders = torch.tensor([0, 3]), Orders.of_known(model.schedule, known)
    hidden = model.hidden(tokens, level, orders, simulate=simulate)
    others = torch.where(known, tokens, others)
    for before, after in zip(hidden, model.hidden(others, level, orders, simulate=simulate), strict=True):
        assert before.isfinite().all()
        assert torch.equal(before, after)


@pytest.mark.parametrize("changed", range(7))
def test_no_step_of_the_schedule_sees_its_own_or_later_tokens(model: EntropyModel, changed: int) -> None:
    tokens, level = draw_tokens(model, 1, 8, 8), torch.tensor([1])
    orders = Orders.of_schedule(model.schedule, QUINCUNX)
    others, step = tokens.clone(), model.schedule.steps[changed]
    here = (step.begin <= QUINCUNX) & (step.end > QUINCUNX)
    others[:, step.first : step.last, here] = (others[:, step.first : step.last, here] + 7) % model.num_codewords
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
    changed[0, 0, 2, 2] = 5
    level = torch.tensor([0])
    none = Orders.of_known(model.schedule, torch.zeros_like(known))
    orders = Orders.of_known(model.schedule, known)
    before, after = (model.hidden(t, level, orders)[0][0] for t in (tokens, changed))
    masked = model.hidden(tokens, level, none)[0][0]
    around = torch.ones(5, 5, dtype=torch.bool)
    around[2, 2] = False
    for other in (after, masked):  # unknown is not token 0
        assert ((before - other).abs().amax(2)[1:4, 1:4][around[1:4, 1:4]] > 1e-6).all()


def test_the_level_has_influence_on_the_network_and_on_the_start(model: EntropyModel) -> None:
    tokens, level = draw_tokens(model, 2, 3, 3), torch.tensor([0, 3])
    orders = Orders.of_known(model.schedule, torch.zeros_like(tokens, dtype=torch.bool))
    for simulate in (False, True):
        hidden = model.hidden(tokens, level, orders, simulate=simulate)[0]
        assert not torch.equal(hidden[0], hidden[1])
        row = hidden[0, 0, :1]
        rank, (_, last) = model.config.token_rank, model.schedule.group_bounds(0)
        logits = [model.logits(0, row, index, simulate=simulate) for index in (0, 3)]
        if not simulate:
            head = (row[0] @ model.head.weight.t() + model.head.bias)[: last * rank].view(last, rank)
            for found, index in zip(logits, (0, 3), strict=True):
                products = torch.einsum("mr,mkr->mk", head, model.token_factors[index, :last])
                assert torch.allclose(found[:, 0], products + model.token_bias[index, :last], atol=1e-4)
        with pytest.MonkeyPatch.context() as patch:  # without factors the prior of the level is all there is
            patch.setattr(model.token_factors, "data", torch.zeros_like(model.token_factors))
            start = [model.logits(0, row, index, simulate=simulate) for index in (0, 3)]
        difference = model.token_bias[3, :last] - model.token_bias[0, :last]
        assert torch.allclose((start[1] - start[0])[:, 0], difference, atol=1.01 * LOGIT_UNIT if simulate else 1e-4)


def test_samples_of_a_batch_do_not_mix(model: EntropyModel) -> None:
    tokens, level = draw_tokens(model, 3, 8, 8), torch.tensor([0, 5, 2])
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
    model = EntropyModel.for_quantizer(make_tiny_entropy_model(tokenizer).config, tokenizer.quantizer)
    usage = tokenizer.quantizer.prior_logits[level].softmax(1)
    assert torch.allclose(model.first_prior[level].exp(), usage[: len(model.first_prior[0])], atol=1e-6)
    with torch.no_grad():
        tokens = torch.zeros(1, 3, 2, 2, dtype=torch.int64)
        orders = Orders.of_known(model.schedule, torch.zeros_like(tokens, dtype=torch.bool))
        for group, hidden in enumerate(model.hidden(tokens, torch.tensor([level]), orders)):
            logits = model.logits(group, hidden.flatten(0, 2), level)
            own = usage[slice(*model.schedule.group_bounds(group)), None]
            divergence = (own * (own.log() - logits.log_softmax(2))).sum(2) / math.log(2)
            assert divergence.max() < 0.5  # bits


def test_code_length_is_cross_entropy_of_what_is_predicted(model: EntropyModel) -> None:
    torch.manual_seed(1)
    tokens, level = draw_tokens(model, 2, 4, 4), torch.tensor([1, 4])
    known = torch.rand(tokens.shape) < 0.6
    orders = Orders.of_known(model.schedule, known)
    bits, expected = model.code_length(tokens, level, orders), 0.0
    for group, hidden in enumerate(model.hidden(tokens, level, orders)):
        first, last = model.schedule.group_bounds(group)
        for sample in range(2):
            logits = model.logits(group, hidden[sample].flatten(0, 1), int(level[sample]))
            chosen = logits.log_softmax(2).gather(2, tokens[sample, first:last].flatten(1)[..., None])[..., 0]
            expected -= float((chosen * ~known[sample, first:last].flatten(1)).sum()) / math.log(2)
    assert float(bits) == pytest.approx(expected, rel=1e-4)
    assert orders.num_predicted(model.schedule, 2) == int((~known).sum())


def test_bits_of_the_schedule_add_up(model: EntropyModel) -> None:
    tokens, level = draw_tokens(model, 2, 8, 8), torch.tensor([1, 4])
    orders = Orders.of_schedule(model.schedule, QUINCUNX)
    assert orders.num_predicted(model.schedule, 2) == 2 * (3 * 64 - 4)  # the first step has four positions
    bits = model.schedule_bits(tokens, level)
    assert bits.shape == (2, 5)
    static = 0.0
    for sample, index in enumerate(level.tolist()):
        first = tokens[sample, 0, QUINCUNX == 0]
        static -= float(model.first_prior[index, 0, first].sum()) / math.log(2)
    assert float(bits[0, 0]) == pytest.approx(static, rel=1e-5)
    assert float(bits.sum()) - static == pytest.approx(float(model.code_length(tokens, level, orders)), rel=1e-4)


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
        unknown = sum(int((~each.known).sum()) for (each,) in orders.passes)
        first = orders.predicted if orders.known.all() else ~orders.known
        assert orders.num_predicted(model.schedule, 3) == unknown + int(first.sum())
    assert 150 < kinds["schedule"] < 190
    assert min(kinds["known"], kinds["random"]) > 5
