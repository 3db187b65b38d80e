"""The trainable entropy model: any pattern of known tokens, and nothing leaks from the unknown."""

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
from pqmim.training.tokenizer import Tokenizer
from pqmim.training.train_entropy_model import draw_masks


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tiny_tokenizer().requires_grad_(False)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> EntropyModel:
    return make_tiny_entropy_model(tokenizer).requires_grad_(False)


def all_logits(
    model: EntropyModel, tokens: Tensor, known: Tensor, *, simulate: bool, level: Tensor | None = None
) -> Tensor:
    """Logits (B * h * w, M, K) everywhere; the level is 0 unless given for each sample."""
    if level is None:
        level = torch.zeros(len(tokens), dtype=torch.int64)
    hidden = model.hidden(model.features(tokens, known, level), simulate=simulate)
    levels = level[:, None, None].expand(hidden.shape[:3]).flatten()
    return model.logits(hidden.flatten(0, 2), levels, 0, model.num_subquantizers, simulate=simulate).contiguous()


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
    generator = torch.Generator().manual_seed(seed)
    shape = (2, model.num_subquantizers, height, width)
    tokens = torch.randint(model.num_codewords, shape, generator=generator)
    others = torch.randint(model.num_codewords, shape, generator=generator)
    known = torch.rand(shape, generator=generator) < share
    logits = all_logits(model, tokens, known, simulate=simulate)
    assert logits.isfinite().all()
    others = torch.where(known, tokens, others)
    assert torch.equal(all_logits(model, others, known, simulate=simulate), logits)


def test_known_tokens_have_influence_on_every_neighbor(model: EntropyModel) -> None:
    tokens = torch.zeros(1, model.num_subquantizers, 5, 5, dtype=torch.int64)
    known = torch.ones_like(tokens, dtype=torch.bool)
    changed = tokens.clone()
    changed[0, 0, 2, 2] = 5
    before, after = (all_logits(model, t, known, simulate=False).view(5, 5, -1) for t in (tokens, changed))
    assert ((before - after).abs().amax(2)[1:4, 1:4] > 1e-6).all()
    hidden = known.clone()
    hidden[0, 0, 2, 2] = False
    masked = all_logits(model, tokens, hidden, simulate=False).view(5, 5, -1)
    assert ((before - masked).abs().amax(2)[1:4, 1:4] > 1e-6).all()  # unknown is not token 0


def test_the_level_has_influence_on_the_network_and_on_the_start(model: EntropyModel) -> None:
    tokens = torch.zeros(2, model.num_subquantizers, 3, 3, dtype=torch.int64)
    known = torch.zeros_like(tokens, dtype=torch.bool)
    for simulate in (False, True):
        hidden = model.hidden(model.features(tokens, known, torch.tensor([0, 3])), simulate=simulate)
        assert not torch.equal(hidden[0], hidden[1])
        same = hidden[0, 0, :1].expand(2, -1)
        logits = model.logits(same, torch.tensor([0, 3]), 0, model.num_subquantizers, simulate=simulate)
        if not simulate:
            head = (same[0] @ model.head.weight.t() + model.head.bias).view(model.num_subquantizers, -1)
            for row, level in zip(logits, (0, 3), strict=True):
                products = torch.einsum("mr,mkr->mk", head, model.token_factors[level])
                assert torch.allclose(row, products + model.token_bias[level], atol=1e-4)
        with pytest.MonkeyPatch.context() as patch:  # without factors the prior of the level is all there is
            patch.setattr(model.token_factors, "data", torch.zeros_like(model.token_factors))
            start = model.logits(same, torch.tensor([0, 3]), 0, model.num_subquantizers, simulate=simulate)
        difference = model.token_bias[3] - model.token_bias[0]
        assert torch.allclose(start[1] - start[0], difference, atol=1.01 * LOGIT_UNIT if simulate else 1e-4)


def test_samples_of_a_batch_do_not_mix(model: EntropyModel) -> None:
    tokens = torch.randint(model.num_codewords, (3, model.num_subquantizers, 6, 5))
    known = torch.rand(tokens.shape) < 0.5
    level = torch.tensor([0, 5, 2])
    together = all_logits(model, tokens, known, simulate=False, level=level).view(3, -1)
    for i in range(3):
        one = slice(i, i + 1)
        alone = all_logits(model, tokens[one], known[one], simulate=False, level=level[one])
        assert torch.allclose(together[i], alone.flatten(), atol=1e-4)


def test_logits_of_some_rows(model: EntropyModel) -> None:
    hidden = torch.randn(7, model.config.width)
    level = torch.arange(7) % model.num_levels
    for simulate in (False, True):
        whole = model.logits(hidden, level, 0, 3, simulate=simulate)
        assert whole.shape == (7, 3, model.num_codewords)
        assert torch.allclose(model.logits(hidden, level, 1, 3, simulate=simulate), whole[:, 1:], atol=1e-5)


@pytest.mark.parametrize("level", range(TINY_TOKENIZER.quantizer.num_levels))
def test_untrained_model_starts_near_the_static_prior_of_the_level(tokenizer: Tokenizer, level: int) -> None:
    torch.manual_seed(0)
    model = EntropyModel.for_quantizer(make_tiny_entropy_model(tokenizer).config, tokenizer.quantizer)
    usage = tokenizer.quantizer.prior_logits[level].softmax(1)
    with torch.no_grad():
        tokens = torch.zeros(1, 3, 2, 2, dtype=torch.int64)
        known = torch.zeros_like(tokens, dtype=torch.bool)
        logits = all_logits(model, tokens, known, simulate=False, level=torch.tensor([level]))
    divergence = (usage * (usage.log() - logits.log_softmax(2))).sum(2) / math.log(2)
    assert divergence.max() < 0.5  # bits


def test_code_length_is_cross_entropy_at_the_predicted_positions(model: EntropyModel) -> None:
    torch.manual_seed(1)
    tokens = torch.randint(model.num_codewords, (2, 3, 4, 4))
    known = torch.zeros_like(tokens, dtype=torch.bool)
    predicted = torch.zeros(2, 4, 4, dtype=torch.bool)
    predicted[0, 1, 2] = predicted[1, 3, 0] = True
    first, last = model.schedule.group_bounds(1)
    level = torch.tensor([1, 4])
    bits = model.code_length(tokens, known, predicted, level, 1)
    probabilities = all_logits(model, tokens, known, simulate=False, level=level).softmax(2).view(2, 4, 4, 3, -1)
    expected = [
        -math.log2(float(probabilities[b, y, x, m, tokens[b, m, y, x]]))
        for b, y, x in ((0, 1, 2), (1, 3, 0))
        for m in range(first, last)
    ]
    assert torch.allclose(bits, torch.tensor(expected), atol=1e-3)


def test_drawn_masks_never_show_what_is_predicted(model: EntropyModel) -> None:
    quincunx = torch.from_numpy(quincunx_steps(8, 8))
    groups = set()
    for seed in range(60):
        known, predicted, later, group = draw_masks(model, 3, quincunx, torch.Generator().manual_seed(seed))
        first, last = model.schedule.group_bounds(group)
        assert known.shape == (3, 3, 8, 8)
        assert predicted.shape == (3, 8, 8)
        assert not (known[:, first:last] & predicted[:, None]).any()
        assert later.shape == predicted.shape
        assert not (known[:, first:last] & later[:, None]).any()
        assert not (predicted & later).any()
        groups.add(group)
    assert groups == set(range(model.schedule.num_groups))
