"""Backward passes of graphs, against those of PyTorch."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from training.graph_tools import run_graph

from pqmim.training.graph_builder import GraphBuilder
from pqmim.training.vjp import RULES, differentiate, pixel_unshuffle

CHANNELS = 8
Case = tuple[Callable[[GraphBuilder, str, dict[str, Tensor]], str], Callable[[Tensor, dict[str, Tensor]], Tensor]]


def weight(builder: GraphBuilder, name: str, weights: dict[str, Tensor]) -> str:
    """A weight stored in half precision, as in a model file."""
    return builder.cast(builder.weight(name, name, tuple(weights[name].shape), np.float16), np.float32)


def convolution(builder: GraphBuilder, x: str, weights: dict[str, Tensor], name: str, groups: int = 1) -> str:
    kernel = list(weights[name].shape[2:])
    pads = [side // 2 for side in kernel] * 2
    return builder.op("Conv", x, weight(builder, name, weights), kernel_shape=kernel, pads=pads, group=groups)


def number(builder: GraphBuilder, value: float) -> str:
    return builder.constant(value, np.float32)


CASES: dict[str, Case] = {
    "Add": (lambda b, x, w: b.op("Add", b.op("Add", x, number(b, 2)), x), lambda x, w: x + 2 + x),
    "Sub": (
        lambda b, x, w: b.op("Sub", b.op("Sub", number(b, 2), x), b.op("Sub", b.op("Mul", x, x), number(b, 1))),
        lambda x, w: (2 - x) - (x * x - 1),
    ),
    "Mul": (
        lambda b, x, w: b.op("Mul", b.op("Mul", weight(b, "gain", w), x), b.op("Sigmoid", x)),
        lambda x, w: w["gain"] * x * torch.sigmoid(x),
    ),
    "Div": (
        lambda b, x, w: b.op("Div", b.op("Div", x, number(b, 3)), b.op("Softplus", x)),
        lambda x, w: x / 3 / F.softplus(x),
    ),
    "Neg": (lambda b, x, w: b.op("Neg", b.op("Neg", b.op("Neg", x))), lambda x, w: -x),
    "Identity": (lambda b, x, w: b.op("Identity", x), lambda x, w: x + 0),
    "LeakyRelu": (lambda b, x, w: b.op("LeakyRelu", x, alpha=0.1), lambda x, w: F.leaky_relu(x, 0.1)),
    "Relu": (lambda b, x, w: b.op("Relu", x), lambda x, w: F.relu(x)),
    "Sigmoid": (lambda b, x, w: b.op("Sigmoid", x), lambda x, w: torch.sigmoid(x)),
    "Tanh": (lambda b, x, w: b.op("Tanh", x), lambda x, w: torch.tanh(x)),
    "Softplus": (lambda b, x, w: b.op("Softplus", x), lambda x, w: F.softplus(x)),
    "Conv": (
        lambda b, x, w: convolution(b, convolution(b, convolution(b, x, w, "dense"), w, "grouped", 4), w, "points"),
        lambda x, w: F.conv2d(
            F.conv2d(F.conv2d(x, w["dense"], padding=(1, 2)), w["grouped"], padding=1, groups=4), w["points"]
        ),
    ),
    "DepthToSpace": (
        lambda b, x, w: b.op(
            "DepthToSpace", b.op("DepthToSpace", convolution(b, x, w, "wide"), blocksize=2, mode="CRD"), blocksize=2
        ),
        lambda x, w: rows_first(F.pixel_shuffle(F.conv2d(x, w["wide"]), 2)),
    ),
    "SpaceToDepth": (lambda b, x, w: pixel_unshuffle(b, x, CHANNELS, 2), lambda x, w: F.pixel_unshuffle(x, 2)),
    "Gather": (
        lambda b, x, w: b.op("Gather", x, b.ints(3, 1, 0, 2, 7, 6, 5, 4), axis=1),
        lambda x, w: x[:, [3, 1, 0, 2, 7, 6, 5, 4]],
    ),
    "Concat": (
        lambda b, x, w: b.op("Concat", x, convolution(b, x, w, "points"), x, axis=1),
        lambda x, w: torch.cat([x, F.conv2d(x, w["points"]), x], 1),
    ),
    "Slice": (
        lambda b, x, w: b.op(
            "Mul",
            b.op("Slice", x, b.ints(0), b.ints(3), b.ints(1)),
            b.op("Slice", x, b.ints(4), b.ints(7), b.ints(1)),
        ),
        lambda x, w: x[:, :3] * x[:, 4:7],
    ),
}


def rows_first(x: Tensor) -> Tensor:
    """Pixel shuffle by 2 of channels in the order row, column, channel, which ONNX calls DCR."""
    batch, channels, height, width = x.shape
    parts = x.view(batch, 2, 2, channels // 4, height, width)
    return parts.permute(0, 3, 4, 1, 5, 2).reshape(batch, channels // 4, 2 * height, 2 * width)


def test_every_rule_has_a_case() -> None:
    assert CASES.keys() == RULES.keys()


@pytest.mark.parametrize("kind", CASES)
def test_rule(kind: str) -> None:
    torch.manual_seed(0)
    in_graph, in_torch = CASES[kind]
    shapes = {
        "gain": (CHANNELS, 1, 1),
        "dense": (12, CHANNELS, 3, 5),
        "grouped": (8, 3, 3, 3),
        "points": (CHANNELS, CHANNELS, 1, 1),
        "wide": (32, CHANNELS, 1, 1),
    }
    weights = {name: torch.randn(shape).half().float() for name, shape in shapes.items()}
    builder = GraphBuilder()
    y = in_graph(builder, "x", weights)
    builder.op("Identity", y, output="y")
    forward, vjp = differentiate(
        builder.build([("x", np.float32, (1, CHANNELS, "h", "w"))], [("y", np.float32, (1, "c", "H", "W"))])
    )
    tensors = {name: tensor.half().numpy() for name, tensor in weights.items()}
    x = torch.randn(1, CHANNELS, 4, 6, requires_grad=True)
    expected = in_torch(x, weights)
    found, *saved = run_graph(forward, tensors, x=x.detach().numpy())
    assert np.allclose(found, expected.detach(), atol=1e-4)
    gradient = torch.randn_like(expected)
    values = {f"saved.{index}": value for index, value in enumerate(saved)}
    (found,) = run_graph(vjp, tensors, gradient=gradient.numpy(), **values)
    (wanted,) = torch.autograd.grad(expected, x, gradient)
    assert np.allclose(found, wanted, atol=1e-5 * float(wanted.abs().max()))


def test_what_has_no_rule_is_refused_by_name() -> None:
    sizes = [("x", np.float32, (1, 4))], [("y", np.float32, (1, "n"))]
    builder = GraphBuilder()
    builder.op("Erf", "x", output="y")
    with pytest.raises(NotImplementedError, match="no rule for the gradient of Erf"):
        differentiate(builder.build(*sizes))
    builder = GraphBuilder()
    builder.op("Gather", "x", builder.ints(1, 1), axis=1, output="y")
    with pytest.raises(NotImplementedError, match="permutations"):
        differentiate(builder.build(*sizes))
