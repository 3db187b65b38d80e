"""The trainable entropy model, when it simulates, says what the exact one does."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pictures import synthetic_photo
from torch import Tensor
from training.tiny_networks import TINY_ENTROPY, TINY_QUALITY, make_tiny_entropy_model, make_tiny_tokenizer
from training.token_tools import RAGGED_ENTROPY, draw_tokens, make_ragged_tokenizer

from pqmim.entropy_weights import check_entropy_weights
from pqmim.exact_entropy import ExactEntropyModel
from pqmim.exact_numpy import NumpyParts, position_bias
from pqmim.fixed_point import ACTIVATION_UNIT, EXPONENTIAL_ONE, INT8_MAX, RESIDUAL_UNIT
from pqmim.model_files import MODEL_FILE, load_model
from pqmim.range_coding import TokenWriter
from pqmim.runtime import Workers
from pqmim.schedule import quincunx_steps
from pqmim.token_coding import GivenTokens, code_tokens
from pqmim.training.entropy_model import EntropyModel
from pqmim.training.export import export_entropy, save_model
from pqmim.training.layers import Sight, TransformerLayer, normalize, partitions_of
from pqmim.training.orders import Orders
from pqmim.training.tokenizer import Tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trainable() -> EntropyModel:
    return make_tiny_entropy_model(make_tiny_tokenizer()).requires_grad_(False)


def parts_of(model: EntropyModel) -> NumpyParts:
    tensors = {f"entropy.{name}": tensor for name, tensor in export_entropy(model).items()}
    tensors["tokenizer.quantizer.sizes"] = model.alphabets.sizes
    tensors["tokenizer.quantizer.boundaries_tensor"] = model.places.boundaries.numpy()
    return NumpyParts(model.config, model.num_subquantizers, tensors)


def on_grid(shape: tuple[int, ...], deviation: float = 16) -> Tensor:
    """Random int8 activations as the trainable model has them."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * deviation
    return x.round().clamp(-INT8_MAX, INT8_MAX) * ACTIVATION_UNIT


def activations(x: Tensor) -> NDArray[np.uint8]:
    """The same as the exact model has them."""
    return (x / ACTIVATION_UNIT + 128).flatten(0, -2).numpy().astype(np.uint8)


def assert_same_but_for_ties(exact: NDArray[np.generic], simulated: Tensor, unit: float) -> None:
    """Integers against multiples of `unit`: equal, but where a float sum falls to the other side of a half."""
    difference = np.abs(exact.astype(float) - simulated.double().numpy().reshape(exact.shape) / unit)
    assert difference.max() <= 1.01
    assert (difference > 0.01).mean() < 0.01


def test_normalization_as_simulated(trainable: EntropyModel) -> None:
    embedded = (torch.randn(200, 32, generator=torch.Generator().manual_seed(0)) * 3000).round()
    h, x = parts_of(trainable).embed(0, np.zeros((200, 32), np.float32), embedded.numpy())
    simulated = normalize(torch.from_numpy(h) * RESIDUAL_UNIT, simulate=True)
    assert_same_but_for_ties(x.astype(int) - 128, simulated, ACTIVATION_UNIT)


def test_feed_forward_as_simulated(trainable: EntropyModel) -> None:
    layer = trainable.layers[1]
    assert isinstance(layer, TransformerLayer)
    x = on_grid((300, 32))
    h, _ = parts_of(trainable).feed(1, np.zeros((300, 32), np.float32), activations(x))
    difference = np.abs(h - (layer.feed_forward(x, True) / RESIDUAL_UNIT).numpy())
    assert difference.mean() < 1  # a tie in one hidden unit moves an output by a little
    assert difference.max() < 30


def test_attention_as_simulated(trainable: EntropyModel) -> None:
    layer = trainable.layers[0]
    assert isinstance(layer, TransformerLayer)
    assert layer.attention is not None
    parts, partitions = parts_of(trainable), partitions_of(6, 7, TINY_ENTROPY.window, CPU)
    label = torch.from_numpy(quincunx_steps(6, 7))[None]
    sight = Sight.by_labels(label, label, partitions)
    table = export_entropy(trainable)["layers.0.attention.position_bias"]
    for shifted, partition in enumerate(partitions):
        x = on_grid((2, 1, 6, 7, 32))
        simulated = layer.attention(x, sight.windows[shifted], partition, 0, True) / RESIDUAL_UNIT
        content, query = (torch.from_numpy(activations(partition.split(stream))).view(-1, 16, 32) for stream in x)
        for stream, own in enumerate((content, query)):
            rows = np.empty((len(own), 16, 32), np.uint8)
            for window, inside in enumerate(partition.is_inside.numpy()):
                kv = parts.keys_values(0, content[window].numpy())
                for place in range(16):
                    seen = sight.windows[shifted][window, 0, 16 * stream + place].numpy() & inside
                    mask = np.where(seen, 0, -(1 << 20)).astype(np.float32)[None, None, None]
                    bias = position_bias(table, 4)[:, place : place + 1]
                    rows[window, place] = parts.attend(
                        0, own[window, None, place : place + 1].numpy(), kv[None], bias, mask
                    )
            joined = partition.join(torch.from_numpy(rows)).reshape(42, 32)
            h, _ = parts.project(0, np.zeros((42, 32), np.float32), joined.numpy())
            difference = np.abs(h - simulated[stream].reshape(42, 32).numpy())
            # A tie in one weight moves a mean of values by at most a unit, and that the output by a little.
            assert difference.mean() < 1
            assert difference.max() < 30


def exact_model(folder: Path, model: EntropyModel, tokenizer: Tokenizer) -> ExactEntropyModel:
    save_model(folder, "test", tokenizer, model, TINY_QUALITY, {})
    return ExactEntropyModel(load_model(folder / MODEL_FILE), Workers(1))


@pytest.mark.parametrize(("depth", "later"), [(1, 1), (1, 2), (2, 1), (2, 2), (3, 3)])
@pytest.mark.parametrize("share", [None, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("is_ragged", [False, True])
def test_every_depth_as_simulated(depth: int, later: int, share: float | None, is_ragged: bool, tmp_path: Path) -> None:
    """Step by step, and with a share of tokens that are known anywhere."""
    tokenizer = make_ragged_tokenizer() if is_ragged else make_tiny_tokenizer()
    config = replace(RAGGED_ENTROPY if is_ragged else TINY_ENTROPY, num_layers=depth, later_layers=later)
    torch.manual_seed(depth)
    model = EntropyModel.for_quantizer(config, tokenizer.quantizer).requires_grad_(False)
    for embed in model.embed:
        embed.weight.mul_(4)  # in a larger residual stream a half that is rounded the other way weighs less
    exact, level = exact_model(tmp_path, model, tokenizer), depth % model.num_levels
    tokens = draw_tokens(model.alphabets, torch.tensor([level]), 9, 7, seed=depth)
    rows = tokens[0].flatten(1).numpy()
    if share is None:
        orders = Orders.of_schedule(model.schedule, torch.from_numpy(quincunx_steps(9, 7)))
        state, heads = exact.start(9, 7, level), []
        for step in exact.schedule.steps:
            positions = exact.positions(state, step)
            heads.append((step.group, positions, exact.head(state, step)))
            exact.reveal(state, step, rows[step.first : step.last, positions])
        heads = heads[1:]
    else:
        known = torch.rand(tokens.shape) < share
        orders = Orders.of_known(model.schedule, known)
        heads = []
        for group, head in enumerate(exact.heads_of_known(9, 7, level, rows, known[0].flatten(1).numpy())):
            own = known[0, slice(*exact.schedule.group_bounds(group))].flatten(1)
            heads.append((group, np.flatnonzero(~own.all(0).numpy()), head))
    hidden = model.hidden(tokens, torch.tensor([level]), orders, simulate=True)
    for group, positions, head in heads:
        assert head is not None
        if len(positions) == 0:
            continue
        (first, last), rank = exact.schedule.group_bounds(group), config.token_rank
        wanted = hidden[group].view(63, -1)[positions]
        outputs = model.head(wanted, True, slice(rank * first, rank * last)) / ACTIVATION_UNIT
        difference = np.abs(head.transpose(1, 0, 2).reshape(len(positions), -1).astype(float) - 128 - outputs.numpy())
        assert difference.mean() < 0.6  # half a unit is lost in rounding
        extra_bits = []
        for block in model.group_blocks(group, level):
            if block.size == 1:
                continue
            # Every token of the block's alphabets, in turn.
            asked = torch.zeros(block.size, last - first, dtype=torch.int64)
            asked[:, block.first - first : block.last - first] = torch.arange(block.size)[:, None]
            lengths = [
                model.token_bits(
                    group, row.expand(block.size, -1), asked, torch.full((block.size,), level), simulate=True
                )
                for row in wanted
            ]
            expected = torch.stack(lengths)[:, :, block.first - first : block.last - first].permute(2, 0, 1).double()
            own = np.ascontiguousarray(head[block.first - first : block.last - first])
            found = torch.from_numpy(exact.frequencies(own, level, block.first)).double() / (1 << 16)
            assert found.shape == expected.shape
            extra_bits.append((torch.exp2(-expected) * (-expected - found.log2())).sum(2).mean())
        assert all(abs(extra) < 0.003 for extra in extra_bits)


@pytest.mark.parametrize("is_ragged", [False, True])
def test_static_frequencies_are_those_of_the_priors(is_ragged: bool, tmp_path: Path) -> None:
    tokenizer = make_ragged_tokenizer() if is_ragged else make_tiny_tokenizer()
    config = RAGGED_ENTROPY if is_ragged else TINY_ENTROPY
    model = EntropyModel.for_quantizer(config, tokenizer.quantizer).requires_grad_(False)
    exact, bits = exact_model(tmp_path, model, tokenizer), tokenizer.quantizer.prior_bits().detach()
    for level in range(model.num_levels):
        for block in tokenizer.quantizer.blocks(level):
            found = exact.static_frequencies(level, block.first, block.last - block.first) / (1 << 16)
            expected = torch.exp2(-bits[block.codewords]).view(found.shape).numpy()
            assert np.allclose(found, expected, rtol=0.02, atol=2e-5 * block.size)  # none is below 1


@pytest.mark.parametrize("level", [0, 4, 5])
def test_payload_is_as_long_as_the_float_model_says(trainable: EntropyModel, level: int, tmp_path: Path) -> None:
    """Whole groups say nothing at the coarsest level."""
    tokenizer = make_tiny_tokenizer().requires_grad_(False)
    w, index = math.exp(tokenizer.quantizer.level_range[level].mean()), torch.tensor([level])
    photo = torch.from_numpy(synthetic_photo(512, 640)).permute(2, 0, 1)[None].float() / 255
    tokens = tokenizer.quantizer.assign(tokenizer.analysis(photo), w, index)
    exact, writer = exact_model(tmp_path, trainable, tokenizer), TokenWriter()
    is_silent = (exact.alphabets.sizes[level, exact.schedule.group_bounds(1)[0] :] == 1).all()
    assert len(exact.steps(level)) == (5 if is_silent else 7)
    assert is_silent or level < 5
    code_tokens(exact, writer, 32, 40, level, GivenTokens(tokens[0].numpy()))
    coded = 8 * len(writer.finish())
    for simulate in (False, True):
        estimated = float(trainable.schedule_bits(tokens, index, simulate=simulate).sum())
        assert abs(coded - estimated) < 0.01 * estimated + 64


def test_exported_integers_are_within_bounds() -> None:
    model = make_tiny_entropy_model(make_tiny_tokenizer()).requires_grad_(False)
    model.get_parameter("embed.0.bias")[0] = 1e9  # a trained model may hold anything
    model.token_bias[0] = -1e9
    tensors = export_entropy(model)
    named = {f"entropy.{name}": tensor for name, tensor in tensors.items()}
    check_entropy_weights(named, model.config, model.alphabets)
    assert tensors["score_table"][-1] == 0
    assert tensors["logit_table"][-1] == 0
    assert (np.diff(tensors["logit_table"]) <= 0).all()
    assert np.isclose(tensors["logit_table"][64], EXPONENTIAL_ONE / math.e, atol=1)
