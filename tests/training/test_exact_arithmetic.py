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

from pqmim.entropy_weights import check_entropy_weights
from pqmim.exact_entropy import ExactEntropyModel
from pqmim.exact_numpy import NumpyParts
from pqmim.fixed_point import ACTIVATION_UNIT, EXPONENTIAL_ONE, INT8_MAX, RESIDUAL_UNIT
from pqmim.model_files import MODEL_FILE, load_model
from pqmim.range_coding import TokenWriter
from pqmim.runtime import Workers
from pqmim.token_coding import GivenTokens, code_tokens
from pqmim.training.entropy_model import EntropyModel
from pqmim.training.export import export_entropy, save_model
from pqmim.training.layers import TransformerLayer, WindowPartition, normalize

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trainable() -> EntropyModel:
    return make_tiny_entropy_model(make_tiny_tokenizer()).requires_grad_(False)


def parts_of(model: EntropyModel) -> NumpyParts:
    tensors = {f"entropy.{name}": tensor for name, tensor in export_entropy(model).items()}
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
    h, x = parts_of(trainable).embed(embedded.numpy())
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
    parts = parts_of(trainable)
    for shifted in (False, True):
        partition = WindowPartition(6, 7, TINY_ENTROPY.window, shifted, CPU)
        x = on_grid((1, 6, 7, 32))
        simulated = layer.attention(x, partition, True) / RESIDUAL_UNIT
        mask = np.where(partition.is_inside.numpy(), 0, -(1 << 20)).astype(np.float32)[:, None, None]
        mixed = parts.attend(0, activations(partition.split(x)), mask)
        rows = partition.join(torch.from_numpy(mixed).view(*partition.is_inside.shape, 32)).reshape(42, 32)
        h, _ = parts.project(0, np.zeros((42, 32), np.float32), rows.numpy())
        difference = np.abs(h - simulated.view(42, 32).numpy())
        # A tie in one weight moves a mean of values by at most a unit, and that the output by a little.
        assert difference.mean() < 1
        assert difference.max() < 30


def exact_model(folder: Path, model: EntropyModel) -> ExactEntropyModel:
    save_model(folder, "test", make_tiny_tokenizer(), model, TINY_QUALITY, {})
    return ExactEntropyModel(load_model(folder / MODEL_FILE), Workers(1))


@pytest.mark.parametrize("depth", range(1, TINY_ENTROPY.num_layers + 1))
def test_every_depth_as_simulated(depth: int, tmp_path: Path) -> None:
    config = replace(TINY_ENTROPY, num_layers=depth)
    torch.manual_seed(depth)
    model = EntropyModel.for_quantizer(config, make_tiny_tokenizer().quantizer).requires_grad_(False)
    model.embed.weight.mul_(4)  # in a larger residual stream a half that is rounded the other way weighs less
    exact = exact_model(tmp_path, model)
    tokens = torch.randint(16, (1, 3, 9, 7))
    known = torch.zeros_like(tokens, dtype=torch.bool)
    known[:, :1] = True
    level = depth % model.num_levels
    positions = np.arange(63)
    state = exact.start(9, 7, level)
    exact.reveal(state, positions, 0, 1, tokens[0, :1].flatten(1).numpy())
    hidden = exact.hidden(state, positions)
    simulated = model.hidden(model.features(tokens, known, torch.tensor([level])), simulate=True).view(63, -1)
    difference = np.abs(hidden.astype(float) - 128 - simulated.double().numpy() / ACTIVATION_UNIT)
    assert difference.max() <= 2
    assert difference.mean() < 0.15
    for group in range(exact.schedule.num_groups):
        first, last = exact.schedule.group_bounds(group)
        expected = model.logits(simulated, torch.full((63,), level), first, last, simulate=True).softmax(2)
        frequencies = exact.frequencies(exact.head(hidden, group), level, first)
        found = torch.from_numpy(frequencies).transpose(0, 1).double() / (1 << 16)
        extra_bits = (expected * (expected.log2() - found.log2())).sum(2).mean()
        assert abs(extra_bits) < 0.003


@pytest.mark.parametrize("level", [0, 4])
def test_payload_is_as_long_as_the_float_model_says(trainable: EntropyModel, level: int, tmp_path: Path) -> None:
    photo = torch.from_numpy(synthetic_photo(256, 320)).permute(2, 0, 1)[None].float() / 255
    tokens = make_tiny_tokenizer().requires_grad_(False).encode(photo, 0.5)
    writer = TokenWriter()
    code_tokens(exact_model(tmp_path, trainable), writer, 16, 20, level, GivenTokens(tokens[0].numpy()))
    coded = 8 * len(writer.finish())
    for simulate in (False, True):
        estimated = trainable.schedule_bits(tokens, torch.tensor([level]), simulate=simulate)
        assert abs(coded - estimated) < 0.01 * estimated + 64


def test_exported_integers_are_within_bounds() -> None:
    model = make_tiny_entropy_model(make_tiny_tokenizer()).requires_grad_(False)
    model.embed.bias[0] = 1e9  # a trained model may hold anything
    model.token_bias[0, 0, 0] = -1e9
    tensors = export_entropy(model)
    named = {f"entropy.{name}": tensor for name, tensor in tensors.items()}
    check_entropy_weights(named, model.config, model.num_subquantizers, model.num_codewords, model.runs[-1].stop)
    assert tensors["score_table"][-1] == 0
    assert tensors["logit_table"][-1] == 0
    assert (np.diff(tensors["logit_table"]) <= 0).all()
    assert np.isclose(tensors["logit_table"][64], EXPONENTIAL_ONE / math.e, atol=1)
