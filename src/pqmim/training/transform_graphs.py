"""The transforms as ONNX graphs, made from their PyTorch modules.

A transform is traced (`torch.fx`) down to the modules and functions that have a rule here, so another architecture of
the same parts needs no change; what has no rule is refused by name. The backward pass of the synthesis, which the
encoder looks through, is derived from its graph (`vjp`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

from pqmim.config import STRIDE, TransformConfig
from pqmim.decoder_files import SYNTHESIS_PREFIX
from pqmim.model_files import ANALYSIS_PREFIX, Graph
from pqmim.training.autoencoder import Analysis, Synthesis, full_precision_linear
from pqmim.training.graph_builder import GraphBuilder
from pqmim.training.integer_layers import (
    WEIGHT_MAX,
    ExactConv2d,
    ExactLinear,
    IntegerConv2d,
    RoundedRectifier,
    Rounding,
)
from pqmim.training.vjp import described_value, differentiate, pixel_unshuffle

LATENT = ("rows", "columns")
PICTURE = ("height", "width")
"""Names of the sizes that are not fixed."""


def analysis_graph(analysis: Analysis) -> Graph:
    """rgb (16 h, 16 w, 3) uint8 -> z (1, D, h, w) float32; weights "tokenizer.analysis.*"."""
    tracer = TransformTracer(ANALYSIS_PREFIX)
    planes = tracer.op("Unsqueeze", tracer.op("Transpose", "rgb", perm=[2, 0, 1]), tracer.ints(0))
    x = tracer.op("Div", tracer.cast(planes, np.float32), tracer.constant(255, np.float32))
    tracer.trace(analysis, x, (3, 2 * STRIDE, 3 * STRIDE), output="z")
    return tracer.build([("rgb", np.uint8, (*PICTURE, 3))], [_latent(analysis.config)])


def synthesis_graphs(synthesis: Synthesis) -> dict[str, Graph]:
    """Graphs of a synthesis and of its gradient, which share their weights, "synthesis.*".

    Returns:
        "synthesis": z -> rgb, rounded half to even.
        "synthesis_forward": z -> picture (1, 3, 16 h, 16 w) float32, nominally in [0, 1], not clamped; and saved.0 and
        so on, what the next one needs.
        "synthesis_vjp": gradient (1, 3, 16 h, 16 w) float32 of anything with respect to the picture, and the saved
        values -> z_gradient (1, D, h, w) float32, with respect to the latent.
    """
    latent = _latent(synthesis.config)
    rgb = ("rgb", np.uint8, (*PICTURE, 3))
    picture = ("picture", np.float32, (1, 3, *PICTURE))

    plain = TransformTracer(SYNTHESIS_PREFIX, is_rounded=True)
    y = plain.trace(synthesis, "z", (latent[2][1], 2, 3))
    y = plain.op("Clip", y, plain.constant(0, np.float32), plain.constant(1, np.float32))
    y = plain.op("Round", plain.op("Mul", y, plain.constant(255, np.float32)))
    y = plain.op("Squeeze", plain.cast(y, np.uint8), plain.ints(0))
    plain.op("Transpose", y, perm=[1, 2, 0], output="rgb")

    through = TransformTracer(SYNTHESIS_PREFIX)
    through.trace(synthesis, "z", (latent[2][1], 2, 3), output="picture")
    forward, vjp = differentiate(through.build([latent], [picture]))
    if synthesis.config.integer_blocks:
        forward = _rounded_forward(synthesis, forward)
    return {"synthesis": plain.build([latent], [rgb]), "synthesis_forward": forward, "synthesis_vjp": vjp}


def _rounded_forward(synthesis: Synthesis, forward: Graph) -> Graph:
    """The same outputs as those of a forward graph without rounding, with it: several times as fast.

    What is saved is where rectifiers let something through, from the last one to the first.
    """
    graph = onnx.load_from_string(forward.model).graph
    described = [described_value(value) for value in graph.output]
    tracer = TransformTracer(SYNTHESIS_PREFIX, is_rounded=True)
    tracer.trace(synthesis, "z", (synthesis.config.latent_channels, 2, 3), output=described[0][0])
    for (name, *_), passing in zip(described[1:], reversed(tracer.passing), strict=True):
        tracer.op("Identity", passing, output=name)
    return tracer.build([_latent(synthesis.config)], described)


def _latent(config: TransformConfig) -> tuple[str, type, tuple[int, int, str, str]]:
    return "z", np.float32, (1, config.latent_channels, *LATENT)


class _Tracer(fx.Tracer):
    """Goes into modules down to those that have a rule."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in RULES or super().is_leaf_module(m, module_qualified_name)


class TransformTracer(GraphBuilder):
    """Appends the operations of a module to a graph.

    Args:
        prefix: of the names of the module's weights in the model file.
        is_rounded: whether what multiplies integers (`integer_layers`) does so, or in float32, what has a gradient.
    """

    def __init__(self, prefix: str, *, is_rounded: bool = False) -> None:
        super().__init__()
        self._prefix = prefix
        self.is_rounded = is_rounded
        self.passing: list[str] = []
        """What rounded rectifiers let through, bool."""

    @torch.no_grad()
    def trace(self, module: nn.Module, x: str, shape: tuple[int, ...], *, output: str | None = None) -> str:
        """Apply a module with one input and one output.

        Args:
            x: name of its input.
            shape: of an input that it accepts, without the batch axis.
            output: name of its output; None = any.

        Returns:
            The name of its output.

        Raises:
            NotImplementedError: it does something that no rule is for.
        """
        tracer = _Tracer(autowrap_functions=(full_precision_linear,))
        traced = fx.GraphModule(module, tracer.trace(module))
        ShapeProp(traced).propagate(torch.zeros(1, *shape))
        modules = dict(traced.named_modules())
        values: dict[fx.Node, Any] = {}
        result = x
        for node in traced.graph.nodes:
            arguments = fx.node.map_arg(node.args, values.__getitem__)
            settings = fx.node.map_arg(node.kwargs, values.__getitem__)
            if node.op == "placeholder":
                values[node] = x
            elif node.op == "get_attr":
                values[node] = self.parameter(node.target, traced.get_parameter(node.target))
            elif node.op == "call_module":
                values[node] = _rule_of(type(modules[node.target]))(self, node, *arguments, modules[node.target])
            elif node.op != "output":
                values[node] = _rule_of(node.target)(self, node, *arguments, **settings)
            else:
                result = arguments[0]
        if output is not None:
            result = self.op("Identity", result, output=output)
        return result

    def parameter(self, name: str, parameter: Tensor) -> str:
        """A weight of the module, stored in half precision, as float32."""
        tensor = self._prefix + name
        return self.cast(self.weight(tensor, tensor, tuple(parameter.shape), np.float16), np.float32)

    def rounded(self, x: str, step: str, zero: str, axis: int = 0, *, is_rectified: bool = False) -> str:
        """Float32 values rounded to multiples of a step, by the operators that ONNX Runtime makes integers of.

        Args:
            step: float32, () or, along `axis`, (n,).
            zero: what stands for zero, of the type of the integers; of the shape of the step.
            is_rectified: nothing is negative.
        """
        integers = self.op("QuantizeLinear", x, step, zero, axis=axis)
        if is_rectified:
            self.passing.append(self.cast(integers, np.bool_))
        return self.op("DequantizeLinear", integers, step, zero, axis=axis)

    def multiples(self, x: str, unit: str) -> str:
        """The nearest multiples of a unit, a power of two: float32, (); of values below 2^22 units."""
        # Beside so large a number float32 has no smaller digits; half the time of Div, Round and Mul.
        large = self.op("Mul", unit, self.constant(1.5 * 2**23, np.float32))
        return self.op("Sub", self.op("Add", x, large), large)

    def convolution(self, x: str, weight: str, *bias: str, kernel: Sequence[int], groups: int = 1) -> str:
        """Convolution of stride 1 that keeps the size; sides of the kernel are odd."""
        pads = [side // 2 for side in kernel]
        return self.op("Conv", x, weight, *bias, kernel_shape=list(kernel), pads=pads * 2, group=groups)


def _rule_of(target: Any) -> Callable[..., Any]:
    """How a module or function is written: called with tracer, traced node, then what it is called with itself."""
    if target not in RULES:
        raise NotImplementedError(f"no rule to write {getattr(target, '__name__', target)} as a graph")
    return RULES[target]


def _channels(node: fx.Node) -> int:
    """Channels of the first argument."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return int(source.meta["tensor_meta"].shape[1])


def _elementwise(kind: str) -> Callable[..., str]:
    """Rule of an operator with one or two operands, tensors of one shape, parameters or numbers."""

    def rule(tracer: TransformTracer, node: fx.Node, *operands: str | float) -> str:
        shape = node.meta["tensor_meta"].shape
        tensors = [argument for argument in node.args if isinstance(argument, fx.Node)]
        if any(tensor.op != "get_attr" and tensor.meta["tensor_meta"].shape != shape for tensor in tensors):
            raise NotImplementedError(f"no rule to write {node.name} as a graph: its operands differ in shape")
        names = [o if isinstance(o, str) else tracer.constant(o, np.float32) for o in operands]
        return tracer.op(kind, *names)

    return rule


def _conv2d(tracer: TransformTracer, node: fx.Node, x: str, module: nn.Conv2d) -> str:
    kernel = tuple(module.kernel_size)
    same = tuple(side // 2 for side in kernel)
    is_plain = set(module.stride) == set(module.dilation) == {1} and module.padding_mode == "zeros"
    if not is_plain or module.padding not in ("same", same) or not all(side % 2 for side in kernel):
        raise NotImplementedError(f"no rule to write {module} as a graph")
    weights = [tracer.parameter(f"{node.target}.{name}", weight) for name, weight in module.named_parameters()]
    return tracer.convolution(x, *weights, kernel=kernel, groups=module.groups)


def _integer_conv2d(tracer: TransformTracer, node: fx.Node, x: str, module: IntegerConv2d) -> str:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    weight, bias = (tracer.parameter(f"{node.target}.{name}", tensor) for name, tensor in module.named_parameters())
    largest = tracer.op("ReduceMax", tracer.op("Abs", weight), axes=[1, 2, 3], keepdims=0)
    least = tracer.constant(torch.finfo(torch.float16).tiny, np.float32)
    step = tracer.op("Div", tracer.op("Max", largest, least), tracer.constant(WEIGHT_MAX, np.float32))
    if tracer.is_rounded:
        weight = tracer.rounded(weight, step, tracer.constant(np.zeros(module.out_channels), np.int8))
        # A sum of products has the product of both steps; the bias is added to it.
        unit = tracer.op("Mul", step, _step(tracer, source))
        sums = tracer.cast(tracer.op("Round", tracer.op("Div", bias, unit)), np.int32)
        bias = tracer.op("DequantizeLinear", sums, unit, axis=0)
    else:
        steps = tracer.op("Unsqueeze", step, tracer.ints(1, 2, 3))
        weight = tracer.op("Mul", tracer.op("Round", tracer.op("Div", weight, steps)), steps)
    return tracer.convolution(x, weight, bias, kernel=module.kernel_size)


def _exact(tracer: TransformTracer, sums: str, x: str, weight: str, *bias: str, side: int) -> str:
    """A convolution of multiples of units.

    Args:
        sums: name of the module that has the units.
        side: of the kernel.
    """
    units = [tracer.parameter(f"{sums}.{name}_unit", torch.zeros(())) for name in ("input", "weight")]
    operands = [tracer.multiples(value, unit) for value, unit in zip((x, weight), units, strict=True)]
    operands += [tracer.multiples(value, tracer.op("Mul", *units)) for value in bias]
    return tracer.convolution(*operands, kernel=(side, side))


def _exact_conv2d(tracer: TransformTracer, node: fx.Node, x: str, module: ExactConv2d) -> str:
    if not tracer.is_rounded:
        return _conv2d(tracer, node, x, module)
    weights = [tracer.parameter(f"{node.target}.{name}", weight) for name, weight in module.named_parameters()]
    return _exact(tracer, f"{node.target}.sums", x, *weights, side=module.kernel_size[0])


def _exact_linear(tracer: TransformTracer, node: fx.Node, x: str, weight: str, module: ExactLinear) -> str:
    if not tracer.is_rounded:
        return _linear(tracer, node, x, weight)
    return _exact(tracer, str(node.target), x, tracer.op("Unsqueeze", weight, tracer.ints(2, 3)), side=1)


def _step(tracer: TransformTracer, node: fx.Node) -> str:
    """Step of a rounding, as a parameter."""
    return tracer.parameter(f"{node.target}.step", torch.zeros(()))


def _rounding(tracer: TransformTracer, node: fx.Node, x: str, module: Rounding) -> str:
    if tracer.is_rounded:
        is_rectified = isinstance(module, RoundedRectifier)
        zero = tracer.constant(-module.lowest, np.uint8)
        return tracer.rounded(x, _step(tracer, node), zero, is_rectified=is_rectified)
    return tracer.op("Relu", x) if isinstance(module, RoundedRectifier) else x


def _linear(tracer: TransformTracer, node: fx.Node, x: str, weight: str) -> str:
    return tracer.convolution(x, tracer.op("Unsqueeze", weight, tracer.ints(2, 3)), kernel=(1, 1))


def _activation(kind: str) -> Callable[..., str]:
    """Rule of an operator of one tensor; whether PyTorch works in place does not matter."""
    return lambda tracer, node, x, *module, inplace=False: tracer.op(kind, x)


def _softplus(tracer: TransformTracer, node: fx.Node, x: str, beta: float = 1.0, threshold: float = 20.0) -> str:
    if beta != 1:
        raise NotImplementedError(f"no rule to write softplus with beta {beta:g} as a graph")
    return tracer.op("Softplus", x)


def _leaky_relu(
    tracer: TransformTracer, node: fx.Node, x: str, negative_slope: float = 0.01, inplace: bool = False
) -> str:
    return tracer.op("LeakyRelu", x, alpha=negative_slope)


def _silu(tracer: TransformTracer, node: fx.Node, x: str, inplace: bool = False) -> str:
    return tracer.op("Mul", x, tracer.op("Sigmoid", x))


def _pixel_shuffle(tracer: TransformTracer, node: fx.Node, x: str, upscale_factor: int) -> str:
    return tracer.op("DepthToSpace", x, blocksize=upscale_factor, mode="CRD")


def _pixel_unshuffle(tracer: TransformTracer, node: fx.Node, x: str, downscale_factor: int) -> str:
    return pixel_unshuffle(tracer, x, _channels(node), downscale_factor)


def _cat(tracer: TransformTracer, node: fx.Node, tensors: Sequence[str], dim: int = 0) -> str:
    return tracer.op("Concat", *tensors, axis=dim)


def _chunk(tracer: TransformTracer, node: fx.Node, x: str, chunks: int, dim: int = 0) -> list[str]:
    ends = np.cumsum([0, *(part.shape[dim] for part in node.meta["tensor_meta"])]).tolist()
    axis = tracer.ints(dim)
    return [tracer.op("Slice", x, tracer.ints(a), tracer.ints(b), axis) for a, b in pairwise(ends)]


def _getitem(tracer: TransformTracer, node: fx.Node, values: list[str] | str, index: int) -> str:
    if isinstance(values, str):
        raise NotImplementedError(f"no rule to write {node.name}, a part of a tensor, as a graph")
    return values[index]


RULES: dict[Any, Callable[..., Any]] = {
    nn.Conv2d: _conv2d,
    IntegerConv2d: _integer_conv2d,
    ExactConv2d: _exact_conv2d,
    ExactLinear: _exact_linear,
    Rounding: _rounding,
    RoundedRectifier: _rounding,
    full_precision_linear: _linear,
    nn.PixelShuffle: lambda tracer, node, x, module: _pixel_shuffle(tracer, node, x, module.upscale_factor),
    F.pixel_shuffle: _pixel_shuffle,
    nn.PixelUnshuffle: lambda tracer, node, x, module: _pixel_unshuffle(tracer, node, x, module.downscale_factor),
    F.pixel_unshuffle: _pixel_unshuffle,
    nn.LeakyReLU: lambda tracer, node, x, module: _leaky_relu(tracer, node, x, module.negative_slope),
    F.leaky_relu: _leaky_relu,
    nn.SiLU: lambda tracer, node, x, module: _silu(tracer, node, x),
    F.silu: _silu,
    nn.Identity: lambda tracer, node, x, module: x,
    nn.ReLU: _activation("Relu"),
    F.relu: _activation("Relu"),
    nn.Sigmoid: _activation("Sigmoid"),
    F.sigmoid: _activation("Sigmoid"),
    torch.sigmoid: _activation("Sigmoid"),
    nn.Tanh: _activation("Tanh"),
    F.tanh: _activation("Tanh"),
    torch.tanh: _activation("Tanh"),
    nn.Softplus: lambda tracer, node, x, module: _softplus(tracer, node, x, module.beta),
    F.softplus: _softplus,
    "float": lambda tracer, node, x: x,  # all is float32
    torch.cat: _cat,
    torch.chunk: _chunk,
    operator.getitem: _getitem,
    operator.add: _elementwise("Add"),
    operator.sub: _elementwise("Sub"),
    operator.mul: _elementwise("Mul"),
    operator.truediv: _elementwise("Div"),
    operator.neg: _elementwise("Neg"),
}
