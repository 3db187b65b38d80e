"""Convolutions of 8-bit integers: what training sees is what the graphs compute, and nothing saturates."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training.graph_tools import DISABLED, run_graph

from pqmim import load_codec
from pqmim.config import SynthesisConfig
from pqmim.decoder_files import SYNTHESIS_PREFIX
from pqmim.model_files import Graph
from pqmim.training.autoencoder import ResidualBlock, Synthesis, grow
from pqmim.training.checkpoints import load_synthesis, load_tokenizer, stored
from pqmim.training.export import save_decoder
from pqmim.training.integer_layers import (
    WEIGHT_MAX,
    ExactConv2d,
    ExactSums,
    IntegerConv2d,
    RoundedRectifier,
    Rounding,
    calibrate,
    multiples,
    rounded_weight,
    weight_step,
)
from pqmim.training.transform_graphs import synthesis_graphs

CONFIG = SynthesisConfig(12, (8, 16, 16), (1, 1, 1), 20.0, integer_blocks=True)


def random_synthesis(config: SynthesisConfig = CONFIG) -> Synthesis:
    torch.manual_seed(0)
    synthesis = Synthesis(config).eval().requires_grad_(False)
    for parameter in synthesis.parameters():
        parameter.copy_((torch.randn_like(parameter) * 0.1).half())  # as a file holds them
    return synthesis


def without_rounding(synthesis: Synthesis) -> Synthesis:
    exact = copy.deepcopy(synthesis)
    for module in exact.modules():
        if isinstance(module, Rounding):
            module.seen = []
        elif isinstance(module, ExactSums):
            module.largest = 0.0, 0.0
    return exact


def test_values_are_rounded_and_gradients_pass_where_they_are_in_range() -> None:
    rounding = Rounding()
    rounding.step.fill_(0.5)
    x = torch.tensor([0.0, 0.7, -0.8, 63.4, 64.0, -64.0, -70.0], requires_grad=True)
    y = rounding(x)
    assert y.tolist() == [0.0, 0.5, -1.0, 63.5, 63.5, -64.0, -64.0]
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 1, 1, 0, 1, 0]


def test_a_rounded_rectifier_has_all_its_values_above_zero() -> None:
    rectifier = RoundedRectifier()
    rectifier.step.fill_(0.5)
    x = torch.tensor([-200.0, -0.3, 0.0, 0.3, 100.2, 127.5, 128.0], requires_grad=True)
    y = rectifier(x)
    assert y.tolist() == [0.0, 0.0, 0.0, 0.5, 100.0, 127.5, 127.5]
    y.sum().backward()
    assert x.grad is not None
    assert x.grad[[0, 3, 4, 6]].tolist() == [0, 1, 1, 0]


def test_sums_of_products_are_those_of_integers() -> None:
    torch.manual_seed(0)
    rounding, convolution = Rounding(), IntegerConv2d(16, 8, 3, padding=1)
    x = torch.randn(1, 16, 6, 5) * 3
    with torch.no_grad():
        found = convolution(rounding(x))
        step = weight_step(convolution.weight)
        weights = (rounded_weight(convolution.weight) / step[:, None, None, None]).round()
        values = (rounding(x) / rounding.step).round()
    assert float(weights.abs().max()) == WEIGHT_MAX
    assert convolution.bias is not None
    sums = F.conv2d(values.double(), weights.double(), padding=1)
    unit = (rounding.step * step)[None, :, None, None]
    assert torch.allclose(found.double(), sums * unit + convolution.bias[:, None, None], atol=1e-5)


def test_exact_sums_do_not_depend_on_their_order() -> None:
    torch.manual_seed(0)
    convolution, x = ExactConv2d(64, 8, 3, padding=1), torch.randn(4, 64, 9, 9)
    order = torch.randperm(64)

    def moved() -> Tensor:
        """How the sums change with the order of the channels."""
        other = copy.deepcopy(convolution)
        other.weight.copy_(convolution.weight[:, order])
        return other(x[:, order]) - convolution(x)

    with torch.no_grad():
        plain = F.conv2d(x, convolution.weight, convolution.bias, padding=1)
        assert not torch.equal(plain, F.conv2d(x[:, order], convolution.weight[:, order], convolution.bias, padding=1))
        calibrate(convolution, [x])
        assert float(moved().abs().max()) == 0
        assert float((convolution(x) - plain).std()) < 0.1 * float(plain.std())
        sums = convolution.sums
        assert all(math.log2(unit) % 1 == 0 for unit in (sums.input_unit, sums.weight_unit))
        exact = F.conv2d(
            multiples(x, sums.input_unit).double(), multiples(convolution.weight, sums.weight_unit).double(), padding=1
        )
        assert convolution.bias is not None
        bias = multiples(convolution.bias, sums.input_unit * sums.weight_unit).double()
        assert torch.equal(convolution(x).double(), exact + bias[:, None, None])
        sums.weight_unit.mul_(2.0**-6)
        assert float(moved().abs().max()) > 0


def test_steps_fit_what_is_rounded() -> None:
    synthesis = random_synthesis()
    exact = without_rounding(synthesis)
    latents = [torch.randn(2, 12, 4, 5) * scale for scale in (0.5, 2.0)]

    def error() -> float:
        with torch.no_grad():
            return float(torch.cat([(synthesis(z) - exact(z)).square() for z in latents]).mean())

    before = error()
    calibrate(synthesis, latents)
    roundings = [module for module in synthesis.modules() if isinstance(module, Rounding)]
    assert len(roundings) == 9
    assert all(torch.equal(r.step, r.step.half().float()) and r.seen is None for r in roundings)
    assert error() < before / 10
    grown = Synthesis(replace(CONFIG, channels=(12, 16, 16), blocks=(1, 2, 1))).eval()
    grow(grown, synthesis)
    with torch.no_grad():
        assert torch.allclose(grown(latents[0]), synthesis(latents[0]), atol=1e-5)


def optimized(graph: Graph, tensors: dict[str, np.ndarray], path: Path) -> list[str]:
    """Operators that ONNX Runtime makes of a graph."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path)
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(tensors[name]) for name in graph.weights.values()]
    options.add_external_initializers(list(graph.weights), values)
    onnxruntime.InferenceSession(graph.model, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


def test_the_graph_multiplies_integers(tmp_path: Path) -> None:
    synthesis = random_synthesis()
    latents = torch.randn(2, 12, 4, 5) * 2
    calibrate(synthesis, [latents])
    graphs, tensors = synthesis_graphs(synthesis), stored(synthesis, SYNTHESIS_PREFIX)
    operators = optimized(graphs["synthesis"], tensors, tmp_path / "optimized.onnx")
    assert operators.count("QLinearConv") == 6
    assert not {"LeakyRelu", "Relu"} & set(operators)  # rounding to what is not negative does that
    with torch.no_grad():
        expected = (synthesis(latents).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    for z, picture in zip(latents, expected, strict=True):
        (found,) = run_graph(graphs["synthesis"], tensors, z=z[None].numpy())
        assert np.abs(found - picture).max() <= 2
        assert (found != picture).mean() < 0.25  # biases are rounded to units of the sums there


class Passing(nn.Module):
    """Lets through what is marked."""

    def __init__(self, mask: np.ndarray) -> None:
        super().__init__()
        self.mask = torch.from_numpy(mask)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


def test_the_gradient_is_that_without_rounding_where_the_rounded_rectifiers_let_through(tmp_path: Path) -> None:
    synthesis = random_synthesis()
    latents = torch.randn(2, 12, 4, 5) * 2
    calibrate(synthesis, [latents])
    graphs, tensors = synthesis_graphs(synthesis), stored(synthesis, SYNTHESIS_PREFIX)
    assert optimized(graphs["synthesis_forward"], tensors, tmp_path / "optimized.onnx").count("QLinearConv") == 6
    inputs = latents[:1].numpy()
    picture, *saved = run_graph(graphs["synthesis_forward"], tensors, z=inputs)
    (rgb,) = run_graph(graphs["synthesis"], tensors, z=inputs)
    assert np.array_equal(np.rint(picture.clip(0, 1) * 255)[0].transpose(1, 2, 0), rgb)

    linear, exact = without_rounding(synthesis), without_rounding(synthesis)
    blocks = [module for module in linear.modules() if isinstance(module, ResidualBlock)]
    for block, mask in zip(reversed(blocks), saved, strict=True):
        assert mask.dtype == np.bool_
        block.between = Passing(mask)  # type: ignore[assignment]
    z = latents[:1].clone().requires_grad_(True)
    gradient = torch.randn(picture.shape)
    (slope,) = torch.autograd.grad(linear(z), z, gradient)
    values = {f"saved.{index}": value for index, value in enumerate(saved)}
    (found,) = run_graph(graphs["synthesis_vjp"], tensors, gradient=gradient.numpy(), **values)
    assert np.allclose(found, slope, atol=1e-5 * float(slope.abs().max()))
    (plain,) = torch.autograd.grad(exact(z), z, gradient)
    assert float((plain - slope).norm()) < 0.1 * float(plain.norm())  # nearly the same are let through


def test_nothing_saturates() -> None:
    """The largest values with the largest weights, which processors without VNNI add up in 16 bits."""
    synthesis = random_synthesis()
    for module in synthesis.modules():
        if isinstance(module, IntegerConv2d):
            module.weight.copy_(module.weight.sign() * 0.0625)
    calibrate(synthesis, [torch.randn(1, 12, 8, 8)])
    graphs, tensors = synthesis_graphs(synthesis), stored(synthesis, SYNTHESIS_PREFIX)
    z = (torch.randn(1, 12, 8, 8).sign() * 3).numpy()  # beyond the range of what is read, nearly everywhere
    expected = run_graph(graphs["synthesis"], tensors, DISABLED, z=z)[0].astype(int)
    assert expected.std() > 20
    difference = np.abs(run_graph(graphs["synthesis"], tensors, z=z)[0] - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.02


def test_the_file_of_a_decoder(tiny_model: Path, tmp_path: Path) -> None:
    earlier, file = load_synthesis(tiny_model / "fast.safetensors")
    synthesis = Synthesis(replace(earlier.config, integer_blocks=True)).eval()
    grow(synthesis, earlier)
    latents = torch.randn(1, earlier.config.latent_channels, 3, 4)
    calibrate(synthesis, [latents])
    path = tmp_path / "fast.safetensors"
    save_decoder(path, "fast", synthesis, file.token_model, {})
    again, decoder = load_synthesis(path)
    assert decoder.config == synthesis.config
    assert decoder.decoder_id != file.decoder_id
    with torch.no_grad():
        assert torch.allclose(again(latents), synthesis(latents), atol=1e-2)
    (tmp_path / "model.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes())
    tokenizer, _ = load_tokenizer(path)
    assert tokenizer.config.autoencoder.integer_blocks
    codec = load_codec(tmp_path, "fast", threads=1)
    picture = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    assert codec.decode(codec.encode(picture)).size == (64, 48)
