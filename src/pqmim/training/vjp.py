"""Vector-Jacobian products: from the graph of a network to the graph of its backward pass.

The pass goes backwards over the operators of the forward graph; each has a rule that says how a gradient of its output
becomes one of its input. Forward values that a rule needs become outputs of the forward graph and inputs of the
backward one. Weights stay what they are: what is done to them, such as the flip of a kernel, is done when a session is
made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper, shape_inference

from pqmim.model_files import Graph
from pqmim.training.graph_builder import GraphBuilder

CHANNEL_AXIS = 1


def differentiate(forward: Graph) -> tuple[Graph, Graph]:
    """Derive the backward pass of a graph with one input and one output, both float32.

    Returns:
        The forward graph with further outputs saved.0, saved.1, ...
        The backward graph: "gradient", of anything with respect to the output, and the saved values -> that with
        respect to the input, named as the input with "_gradient" behind.

    Raises:
        NotImplementedError: an operator has no rule.
    """
    return _Reverse(forward).graphs()


def pixel_unshuffle(builder: GraphBuilder, x: str, channels: int, side: int) -> str:
    """(1, C, H, W) -> (1, C * side^2, H / side, W / side), in the order channel, row, column.

    `SpaceToDepth` orders by row, column, channel; a permutation of whole channels is cheap.
    """
    order = np.arange(side**2 * channels).reshape(side**2, channels).T.ravel()
    return builder.op("Gather", builder.op("SpaceToDepth", x, blocksize=side), builder.ints(*order), axis=CHANNEL_AXIS)


class _Reverse:
    """One derivation."""

    def __init__(self, forward: Graph) -> None:
        self._weights = forward.weights
        self._model = onnx.load_from_string(forward.model)
        graph = self._model.graph
        (self._source,), (self._target,) = graph.input, graph.output
        self._makers = {node.output[0]: node for node in graph.node}
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._active = {self._source.name}
        for node in graph.node:
            if self._active & set(node.input):
                self._active |= set(node.output)
        self._shapes = _value_shapes(self._model)
        self._saved: dict[str, str] = {}
        self._copies: dict[str, str] = {}
        self._constants: dict[str, str] = {}
        self.builder = GraphBuilder()

    def graphs(self) -> tuple[Graph, Graph]:
        """Go backwards over all operators."""
        gradients: dict[str, list[str]] = {self._target.name: ["gradient"]}
        for node in reversed(list(self._model.graph.node)):
            if node.output[0] not in self._active or node.output[0] not in gradients:
                continue
            gradient = self._sum(gradients.pop(node.output[0]))
            for index, name in enumerate(node.input):
                if name in self._active:
                    if node.op_type not in RULES:
                        raise NotImplementedError(f"no rule for the gradient of {node.op_type}")
                    gradients.setdefault(name, []).append(RULES[node.op_type](self, node, gradient, index))
        result = f"{self._source.name}_gradient"
        self.builder.op("Identity", self._sum(gradients[self._source.name]), output=result)
        model = self._forward_with_outputs()
        shapes = {value.name: value for value in [*model.graph.input, *model.graph.output]}
        inputs = [described_value(shapes[self._target.name], "gradient")]
        inputs += [described_value(shapes[name]) for name in self._saved.values()]
        vjp = self.builder.build(inputs, [described_value(shapes[self._source.name], result)])
        return Graph(model.SerializeToString(), self._weights), vjp

    def _sum(self, terms: list[str]) -> str:
        total = terms[0]
        for term in terms[1:]:
            total = self.builder.op("Add", total, term)
        return total

    def _forward_with_outputs(self) -> onnx.ModelProto:
        """The forward graph, in which saved values are outputs."""
        model = self._model
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = [self._saved.get(name, name) for name in names]
        inferred = {value.name: value for value in shape_inference.infer_shapes(model).graph.value_info}
        for name in self._saved.values():
            output = model.graph.output.add()
            output.CopyFrom(inferred[name])
            for axis, side in enumerate(output.type.tensor_type.shape.dim):
                if not side.dim_value:
                    side.dim_param = f"{name}.{axis}"  # what inference calls it differs between versions of onnx
        return model

    # -- what rules use ---------------------------------------------------------------------------------------------

    def shape(self, value: str) -> list[int]:
        """Shape of a forward value, 0 where it is not fixed."""
        return self._shapes[value]

    def initializer(self, value: str) -> NDArray[Any]:
        """Content of a constant of the forward graph that is no weight."""
        return numpy_helper.to_array(self._initializers[value])

    def forward_op(self, kind: str, *inputs: str) -> str:
        """Compute something more in the forward graph."""
        name = f"extra.{len(self._model.graph.node)}"
        self._model.graph.node.append(helper.make_node(kind, list(inputs), [name]))
        self._active.add(name)
        return name

    def forward_constant(self, value: float) -> str:
        """A float32 number in the forward graph."""
        name = f"number.{value}"
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(np.asarray(value, np.float32), name)
            self._model.graph.initializer.append(self._initializers[name])
        return name

    def forward(self, value: str) -> str:
        """A forward value in the backward graph: saved if it depends on the input, else computed again."""
        if value in (self._source.name, self._target.name):  # these two keep their names
            if value not in self._copies:
                self._copies[value] = self.forward_op("Identity", value)
            value = self._copies[value]
        if value in self._active:
            return self._saved.setdefault(value, f"saved.{len(self._saved)}")
        if value not in self._constants:
            self._constants[value] = self._repeat(value)
        return self._constants[value]

    def _repeat(self, value: str) -> str:
        """What does not depend on the input, once more."""
        if value in self._weights:
            tensor = self._initializers[value]
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            return self.builder.weight(value, self._weights[value], tuple(tensor.dims), dtype)
        if value in self._initializers:
            return self.builder.constant(numpy_helper.to_array(self._initializers[value]))
        node = self._makers[value]
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        return self.builder.op(node.op_type, *map(self.forward, node.input), domain=node.domain, **attributes)


def _value_shapes(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Shapes of all values, 0 where a side is not fixed."""
    graph = shape_inference.infer_shapes(model).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        shapes[value.name] = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
    return shapes


def described_value(value: onnx.ValueInfoProto, name: str = "") -> tuple[str, np.dtype, list[int | str]]:
    """Name, type and shape of a value."""
    tensor = value.type.tensor_type
    shape = [side.dim_value or side.dim_param for side in tensor.shape.dim]
    return name or value.name, helper.tensor_dtype_to_np_dtype(tensor.elem_type), shape


def _attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


# -- rules: gradient of the output -> gradient of the input with an index ---


def _conv(reverse: _Reverse, node: NodeProto, gradient: str, index: int) -> str:
    """Convolution with the flipped kernel whose inputs and outputs are swapped."""
    if index != 0:
        raise NotImplementedError("no rule for the gradient of Conv with respect to its weights")
    builder, (outputs, inputs, *kernel) = reverse.builder, reverse.shape(node.input[1])
    groups, weight = _attribute(node, "group", 1), reverse.forward(node.input[1])
    if groups > 1:
        weight = builder.op("Reshape", weight, builder.ints(groups, outputs // groups, inputs, *kernel))
        weight = builder.op("Transpose", weight, perm=[0, 2, 1, 3, 4])
        weight = builder.op("Reshape", weight, builder.ints(groups * inputs, outputs // groups, *kernel))
    else:
        weight = builder.op("Transpose", weight, perm=[1, 0, 2, 3])
    if kernel != [1, 1]:
        begin, end = builder.ints(-1, -1), builder.ints(-(1 << 31), -(1 << 31))
        weight = builder.op("Slice", weight, begin, end, builder.ints(2, 3), builder.ints(-1, -1))
    pads = [side - 1 - pad for side, pad in zip(kernel * 2, _attribute(node, "pads", [0] * 4), strict=True)]
    return builder.op("Conv", gradient, weight, kernel_shape=kernel, pads=pads, group=groups)


def _add(reverse: _Reverse, node: NodeProto, gradient: str, index: int) -> str:
    return gradient


def _sub(reverse: _Reverse, node: NodeProto, gradient: str, index: int) -> str:
    return gradient if index == 0 else reverse.builder.op("Neg", gradient)


def _mul(reverse: _Reverse, node: NodeProto, gradient: str, index: int) -> str:
    return reverse.builder.op("Mul", gradient, reverse.forward(node.input[1 - index]))


def _div(reverse: _Reverse, node: NodeProto, gradient: str, index: int) -> str:
    quotient = reverse.builder.op("Div", gradient, reverse.forward(node.input[1]))
    if index == 0:
        return quotient
    return reverse.builder.op("Neg", reverse.builder.op("Mul", quotient, reverse.forward(node.output[0])))


def _leaky_relu(reverse: _Reverse, node: NodeProto, gradient: str, index: int) -> str:
    """The sign is saved, a byte for each value."""
    builder = reverse.builder
    is_positive = reverse.forward(reverse.forward_op("Greater", node.output[0], reverse.forward_constant(0)))
    slope = _attribute(node, "alpha", 0.01) if node.op_type == "LeakyRelu" else 0.0
    return builder.op("Where", is_positive, gradient, builder.op("Mul", gradient, builder.constant(slope, np.float32)))


def _sigmoid(reverse: _Reverse, node: NodeProto, gradient: str, index: int) -> str:
    builder, y = reverse.builder, reverse.forward(node.output[0])
    slope = builder.op("Mul", y, builder.op("Sub", builder.constant(1, np.float32), y))
    return builder.op("Mul", gradient, slope)


def _tanh(reverse: _Reverse, node: NodeProto, gradient: str, index: int) -> str:
    builder, y = reverse.builder, reverse.forward(node.output[0])
    slope = builder.op("Sub", builder.constant(1, np.float32), builder.op("Mul", y, y))
    return builder.op("Mul", gradient, slope)


def _softplus(reverse: _Reverse, node: NodeProto, gradient: str, index: int) -> str:
    slope = reverse.builder.op("Sigmoid", reverse.forward(node.input[0]))
    return reverse.builder.op("Mul", gradient, slope)


def _depth_to_space(reverse: _Reverse, node: NodeProto, gradient: str, index: int) -> str:
    side = _attribute(node, "blocksize")
    if _attribute(node, "mode", b"DCR") == b"DCR":
        return reverse.builder.op("SpaceToDepth", gradient, blocksize=side)
    return pixel_unshuffle(reverse.builder, gradient, reverse.shape(node.input[0])[CHANNEL_AXIS] // side**2, side)


def _space_to_depth(reverse: _Reverse, node: NodeProto, gradient: str, index: int) -> str:
    return reverse.builder.op("DepthToSpace", gradient, blocksize=_attribute(node, "blocksize"), mode="DCR")


def _gather(reverse: _Reverse, node: NodeProto, gradient: str, index: int) -> str:
    """Of a permutation alone."""
    order = reverse.initializer(node.input[1])
    axis = _attribute(node, "axis", 0)
    if sorted(order.tolist()) != list(range(reverse.shape(node.input[0])[axis])):
        raise NotImplementedError("no rule for the gradient of Gather but for permutations")
    return reverse.builder.op("Gather", gradient, reverse.builder.ints(*np.argsort(order)), axis=axis)


def _concat(reverse: _Reverse, node: NodeProto, gradient: str, index: int) -> str:
    builder, axis = reverse.builder, _attribute(node, "axis", 0)
    sizes = [reverse.shape(name)[axis] for name in node.input]
    begin = sum(sizes[:index])
    return builder.op("Slice", gradient, builder.ints(begin), builder.ints(begin + sizes[index]), builder.ints(axis))


def _slice(reverse: _Reverse, node: NodeProto, gradient: str, index: int) -> str:
    begin, end, axis = (int(reverse.initializer(name)[0]) for name in node.input[1:])
    shape = reverse.shape(node.input[0])
    pads = np.zeros((2, len(shape)), np.int64)
    pads[:, axis] = begin, shape[axis] - end
    return reverse.builder.op("Pad", gradient, reverse.builder.ints(*pads.ravel()))


def _identity(reverse: _Reverse, node: NodeProto, gradient: str, index: int) -> str:
    return gradient


def _neg(reverse: _Reverse, node: NodeProto, gradient: str, index: int) -> str:
    return reverse.builder.op("Neg", gradient)


RULES: dict[str, Callable[[_Reverse, NodeProto, str, int], str]] = {
    "Add": _add,
    "Concat": _concat,
    "Conv": _conv,
    "DepthToSpace": _depth_to_space,
    "Div": _div,
    "Gather": _gather,
    "Identity": _identity,
    "LeakyRelu": _leaky_relu,
    "Mul": _mul,
    "Neg": _neg,
    "Relu": _leaky_relu,
    "Sigmoid": _sigmoid,
    "Slice": _slice,
    "Softplus": _softplus,
    "SpaceToDepth": _space_to_depth,
    "Sub": _sub,
    "Tanh": _tanh,
}
