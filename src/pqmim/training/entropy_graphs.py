"""The exact entropy model as ONNX graphs: one small graph for each part of a layer, in each kernel.

The codec runs them on chunks of rows and windows (`pqmim.exact_entropy`), so that memory is bounded; layers share their
graphs, weights are handed over by name. Interchange between parts: the residual stream as float32 that carries
integers, activations as uint8 in which 128 stands for 0.

docs/exactness.md says of each operator why its result is the same everywhere. Two patterns must not occur, since ONNX
Runtime rewrites them to something that rounds differently: a product followed by a multiplication with a scalar
constant, and `1 / x` followed by a multiplication. Here scales are vectors, and a `Cast` or a `Round` stands behind
every division.
"""

from __future__ import annotations

import math

import numpy as np
from onnx import TensorProto

from pqmim.config import EntropyModelConfig
from pqmim.fixed_point import (
    ACTIVATION_UNIT,
    ATTENTION_ONE,
    EXPONENTIAL_ONE,
    INT8_MAX,
    LOGIT_UNIT,
    NORM_EPSILON,
    RESIDUAL_MAX,
    SCORE_UNIT,
    exponential_table_length,
    score_scale,
)
from pqmim.model_files import Graph
from pqmim.range_coding import PRECISION
from pqmim.training.graph_builder import CONTRIB, GraphBuilder

GRAPH_KERNELS = ("float32", "matmulinteger", "qgemm", "qgemm-s8")
"""How integer products are computed: see `exact_entropy.KERNELS`."""
ZERO = 128
"""The uint8 that stands for 0."""


def entropy_graphs(config: EntropyModelConfig, num_subquantizers: int) -> dict[str, Graph]:
    """All graphs of an entropy model.

    Args:
        config: sizes.
        num_subquantizers: M of the tokenizer.

    Returns:
        "embed" and "frequencies"; for each kernel "KERNEL/keys_values", "KERNEL/attend", "KERNEL/project",
        "KERNEL/feed" and "KERNEL/head.G" for group G. In the names of their weights "{layer}" is the number of a
        layer, or of a group in those of "embed".
    """
    graphs = {"embed": _embed(config), "frequencies": _frequencies(config)}
    schedule = config.schedule(num_subquantizers)
    for kernel in GRAPH_KERNELS:
        graphs[f"{kernel}/keys_values"] = _keys_values(config, kernel)
        graphs[f"{kernel}/attend"] = _attend(config, kernel)
        graphs[f"{kernel}/project"] = _project(config, kernel)
        graphs[f"{kernel}/feed"] = _feed(config, kernel)
        for group in range(schedule.num_groups):
            first, last = schedule.group_bounds(group)
            graphs[f"{kernel}/head.{group}"] = _head(config, kernel, num_subquantizers, first, last)
    return graphs


class _PartBuilder(GraphBuilder):
    """Operations that the parts share."""

    def __init__(self, config: EntropyModelConfig, kernel: str = "float32") -> None:
        super().__init__()
        self.config = config
        self.kernel = kernel

    def clip(self, x: str, low: float, high: float) -> str:
        return self.op("Clip", x, self.constant(low, np.float32), self.constant(high, np.float32))

    def to_activations(self, x: str, output: str | None = None) -> str:
        """Float32 integers in [-127, 127] -> uint8."""
        biased = self.op("Add", x, self.constant(ZERO, np.float32))
        return self.op("Cast", biased, output=output, to=TensorProto.UINT8)

    def from_activations(self, x: str) -> str:
        """Inverse of `to_activations`."""
        return self.op("Sub", self.cast(x, np.float32), self.constant(ZERO, np.float32))

    def normalize(self, h: str, output: str) -> str:
        """Root-mean-square normalization of the residual stream (n, C) to activations."""
        squares = self.op("ReduceSumSquare", self.cast(h, np.float64), axes=[-1], keepdims=1)
        squares = self.op("Add", squares, self.constant(NORM_EPSILON, np.float64))
        numerator = self.constant(math.sqrt(self.config.width) / ACTIVATION_UNIT, np.float64)
        gain = self.cast(self.op("Div", numerator, self.op("Sqrt", squares)), np.float32)
        return self.to_activations(self.clip(self.op("Round", self.op("Mul", h, gain)), -INT8_MAX, INT8_MAX), output)

    def add_to(self, h: str, update: str, output: str) -> str:
        """Round an update and add it to the residual stream."""
        return self.op(
            "Clip",
            self.op("Add", h, self.op("Round", update)),
            self.constant(-RESIDUAL_MAX, np.float32),
            self.constant(RESIDUAL_MAX, np.float32),
            output=output,
        )

    def lookup(self, table: str, index: str) -> str:
        """Entries of a table (n,) at float32 indices; flat `GatherElements` is several times as fast as `Gather`."""
        flat = self.op("Reshape", self.cast(index, np.int32), self.ints(-1))
        return self.op("Reshape", self.op("GatherElements", table, flat, axis=0), self.op("Shape", index))

    def linear(
        self,
        x: str,
        name: str,
        num_inputs: int,
        num_outputs: int,
        *,
        rows: slice | None = None,
        is_hidden: bool = False,
    ) -> str:
        """(product + bias) * scale of activations (n, k): float32, not rounded.

        Args:
            name: of the layer's weights in the file.
            rows: outputs that are wanted; None = all.
            is_hidden: the activations are hidden units, 0 to 127 with 0 for 0.
        """
        weight, bias, scale = self._layer_weights(name, num_inputs, num_outputs, rows)
        if self.kernel == "float32":
            values = self.cast(x, np.float32) if is_hidden else self.from_activations(x)
            matrix = self.op("Transpose", self.cast(weight, np.float32), perm=[1, 0])
            total = self.op("Add", self.op("MatMul", values, matrix), self.cast(bias, np.float32))
            return self.op("Mul", total, scale)
        zero = self.constant(0 if is_hidden else ZERO, np.uint8)
        # Two products of hidden units (0 to 127) with signed weights fit 16 bits; of other activations they do not,
        # and processors without VNNI saturate there.
        is_signed = is_hidden or self.kernel == "qgemm-s8"
        matrix, matrix_zero = (weight, 0) if is_signed else (self._unsigned(weight), ZERO)
        zero_type = np.int8 if is_signed else np.uint8
        if self.kernel == "matmulinteger":
            matrix = self.op("Transpose", matrix, perm=[1, 0])
            total = self.op("MatMulInteger", x, matrix, zero, self.constant(matrix_zero, zero_type))
            return self.op("Mul", self.cast(self.op("Add", total, bias), np.float32), scale)
        zeros = self.constant(np.full(self._num_rows(num_outputs, rows), matrix_zero), zero_type)
        one = self.constant(1, np.float32)
        return self.op("QGemm", x, one, zero, matrix, scale, zeros, bias, domain=CONTRIB, transB=1)

    def requantized(
        self,
        x: str,
        name: str,
        num_inputs: int,
        num_outputs: int,
        *,
        rows: slice | None = None,
        rectify: bool = False,
        output: str | None = None,
    ) -> str:
        """`linear`, rounded to activations; if rectified, to hidden units (0 stands for 0)."""
        if self.kernel.startswith("qgemm"):  # product, bias, scale, rounding and saturation in one operator
            weight, bias, scale = self._layer_weights(name, num_inputs, num_outputs, rows)
            is_signed = self.kernel == "qgemm-s8"
            matrix, matrix_zero = (weight, 0) if is_signed else (self._unsigned(weight), ZERO)
            one = self.constant(1, np.float32)
            count = self._num_rows(num_outputs, rows)
            zeros = self.constant(np.full(count, matrix_zero), np.int8 if is_signed else np.uint8)
            output_zero = self.constant(0 if rectify else ZERO, np.uint8)
            inputs = (x, one, self.constant(ZERO, np.uint8), matrix, scale, zeros, bias, one, output_zero)
            y = self.op("QGemm", *inputs, domain=CONTRIB, transB=1)
            low, high = (0, INT8_MAX) if rectify else (ZERO - INT8_MAX, ZERO + INT8_MAX)
            return self.op("Clip", y, self.constant(low, np.uint8), self.constant(high, np.uint8), output=output)
        y = self.op("Round", self.linear(x, name, num_inputs, num_outputs, rows=rows))
        y = self.clip(y, 0 if rectify else -INT8_MAX, INT8_MAX)
        return self.cast(y, np.uint8) if rectify else self.to_activations(y, output)

    def _layer_weights(self, name: str, num_inputs: int, num_outputs: int, rows: slice | None) -> tuple[str, str, str]:
        tensors = (
            self.weight(f"{name}.weight", f"entropy.{name}.weight", (num_outputs, num_inputs), np.int8),
            self.weight(f"{name}.bias", f"entropy.{name}.bias", (num_outputs,), np.int32),
            self.weight(f"{name}.scale", f"entropy.{name}.scale", (num_outputs,), np.float32),
        )
        if rows is None:
            return tensors
        first, last = self.ints(rows.start), self.ints(rows.stop)
        weight, bias, scale = (self.op("Slice", tensor, first, last, self.ints(0)) for tensor in tensors)
        return weight, bias, scale

    def _unsigned(self, weight: str) -> str:
        """Int8 weights -> uint8 in which 128 stands for 0; folded when a session is made."""
        return self.cast(self.op("Add", self.cast(weight, np.int32), self.constant(ZERO, np.int32)), np.uint8)

    @staticmethod
    def _num_rows(num_outputs: int, rows: slice | None) -> int:
        return num_outputs if rows is None else int(rows.stop - rows.start)


def _embed(config: EntropyModelConfig) -> Graph:
    """Embedding sums, added to the residual stream."""
    builder = _PartBuilder(config)
    width = config.width
    scale = builder.weight("embed.scale", "entropy.embed.{layer}.scale", (width,), np.float32)
    builder.normalize(builder.add_to("h", builder.op("Mul", "embedded", scale), "h_out"), "x_out")
    return builder.build(
        [("h", np.float32, ("n", width)), ("embedded", np.float32, ("n", width))],
        [("h_out", np.float32, ("n", width)), ("x_out", np.uint8, ("n", width))],
    )


QUERY_KEY_VALUE = "layers.{layer}.attention.query_key_value"


def _keys_values(config: EntropyModelConfig, kernel: str) -> Graph:
    """Keys and values of content."""
    builder = _PartBuilder(config, kernel)
    width = config.width
    builder.requantized("x", QUERY_KEY_VALUE, width, 3 * width, rows=slice(width, 3 * width), output="kv")
    return builder.build([("x", np.uint8, ("n", width))], [("kv", np.uint8, ("n", 2 * width))])


def _attend(config: EntropyModelConfig, kernel: str) -> Graph:
    """Attention of queries to keys, each in windows."""
    builder = _PartBuilder(config, kernel)
    width, head_width = config.width, config.head_width
    heads = width // head_width
    rows = builder.op("Reshape", "x", builder.ints(-1, width))
    q = builder.from_activations(builder.requantized(rows, QUERY_KEY_VALUE, width, 3 * width, rows=slice(0, width)))
    q = builder.op("Reshape", q, builder.op("Shape", "x"))  # (windows, Q, C)
    q = builder.op("Transpose", builder.op("Reshape", q, builder.ints(0, 0, heads, head_width)), perm=[0, 2, 1, 3])
    parts = builder.op("Reshape", builder.from_activations("kv"), builder.ints(0, 0, 2, heads, head_width))
    k = builder.op("Gather", parts, builder.constant(0, np.int64), axis=2)  # (windows, T, heads, head_width)
    v = builder.op("Gather", parts, builder.constant(1, np.int64), axis=2)
    scores = builder.op("MatMul", q, builder.op("Transpose", k, perm=[0, 2, 3, 1]))
    # A vector, since a scalar would be fused into the product.
    scale = builder.constant(np.full((heads, 1, 1), score_scale(head_width)), np.float32)
    scores = builder.op("Round", builder.op("Mul", scores, scale))
    scores = builder.op("Add", scores, builder.op("Add", "bias", "mask"))
    sink = builder.weight("sink", "entropy.layers.{layer}.attention.sink", (heads,), np.int32)
    sink = builder.op("Reshape", builder.cast(sink, np.float32), builder.ints(heads, 1, 1))
    best = builder.op("Max", builder.op("ReduceMax", scores, axes=[-1], keepdims=1), sink)
    length = exponential_table_length(ATTENTION_ONE, SCORE_UNIT)
    table = builder.weight("score_table", "entropy.score_table", (length,), np.int32)
    table = builder.cast(table, np.float32)

    def looked_up(score: str) -> str:
        return builder.lookup(table, builder.clip(builder.op("Sub", best, score), 0, length - 1))

    weights = looked_up(scores)
    total = builder.op("Add", builder.op("ReduceSum", weights, builder.ints(-1), keepdims=1), looked_up(sink))
    values = builder.op("Transpose", v, perm=[0, 2, 1, 3])
    mixed = builder.op("Round", builder.op("Div", builder.op("MatMul", weights, values), total))
    mixed = builder.op("Reshape", builder.op("Transpose", mixed, perm=[0, 2, 1, 3]), builder.ints(-1, width))
    builder.to_activations(mixed, "mixed")
    return builder.build(
        [
            ("x", np.uint8, ("windows", "queries", width)),
            ("kv", np.uint8, ("windows", "keys", 2 * width)),
            ("bias", np.float32, (heads, "queries", "keys")),
            ("mask", np.float32, ("windows or one", 1, 1, "keys")),
        ],
        [("mixed", np.uint8, ("n", width))],
    )


def _project(config: EntropyModelConfig, kernel: str) -> Graph:
    """Projection of the attention's output, added to the residual stream."""
    builder = _PartBuilder(config, kernel)
    width = config.width
    update = builder.linear("mixed", "layers.{layer}.attention.project", width, width)
    builder.normalize(builder.add_to("h", update, "h_out"), "x_out")
    return _updating(builder, "mixed")


def _feed(config: EntropyModelConfig, kernel: str) -> Graph:
    """Feed-forward part, added to the residual stream."""
    builder = _PartBuilder(config, kernel)
    width, hidden_width = config.width, config.width * config.mlp_ratio
    hidden = builder.requantized("x", "layers.{layer}.feed_forward.expand", width, hidden_width, rectify=True)
    update = builder.linear(hidden, "layers.{layer}.feed_forward.project", hidden_width, width, is_hidden=True)
    builder.normalize(builder.add_to("h", update, "h_out"), "x_out")
    return _updating(builder, "x")


def _updating(builder: _PartBuilder, activations: str) -> Graph:
    width = builder.config.width
    return builder.build(
        [("h", np.float32, ("n", width)), (activations, np.uint8, ("n", width))],
        [("h_out", np.float32, ("n", width)), ("x_out", np.uint8, ("n", width))],
    )


def _head(config: EntropyModelConfig, kernel: str, num_subquantizers: int, first: int, last: int) -> Graph:
    """Output of the network -> what the frequencies of sub-quantizers `first` to `last` are made of."""
    builder = _PartBuilder(config, kernel)
    width, rank = config.width, config.token_rank
    rows = slice(first * rank, last * rank)
    head = builder.requantized("x", "head", width, num_subquantizers * rank, rows=rows)
    head = builder.op("Reshape", head, builder.ints(-1, last - first, rank))
    builder.op("Transpose", head, output="head", perm=[1, 0, 2])
    return builder.build([("x", np.uint8, ("n", width))], [("head", np.uint8, (last - first, "n", rank))])


def _frequencies(config: EntropyModelConfig) -> Graph:
    """Head outputs -> range-coder frequencies of any K codewords, see `exact_numpy.frequencies_of_logits`.

    Positions lie along the last axis until the end: most alphabets are so short that nothing runs well along them.
    """
    builder = _PartBuilder(config)
    rank = config.token_rank
    head = builder.op("Transpose", builder.from_activations("head"), perm=[0, 2, 1])
    products = builder.op("MatMul", builder.cast("factors", np.float32), head)  # (m, k, n)
    logits = builder.op("Round", builder.op("Mul", products, "scale"))
    logits = builder.op("Add", logits, builder.op("Transpose", builder.cast("bias", np.float32), perm=[0, 2, 1]))
    best = builder.op("ReduceMax", logits, axes=[1], keepdims=1)
    size = builder.op("Gather", builder.op("Shape", "bias"), builder.constant(2, np.int64), axis=0)
    # The first codeword of the best: which it is, or K of all others; `ArgMax` and `ScatterElements` are far slower.
    one = builder.constant(1, np.int64)
    numbers = builder.op("Range", builder.constant(0, np.int64), size, one)
    numbers = builder.op("Reshape", builder.cast(numbers, np.float32), builder.ints(1, -1, 1))
    number = builder.op("Where", builder.op("Equal", logits, best), numbers, builder.cast(size, np.float32))
    is_first = builder.op("Equal", number, builder.op("ReduceMin", number, axes=[1], keepdims=1))
    length = exponential_table_length(EXPONENTIAL_ONE, LOGIT_UNIT)
    below = builder.clip(builder.op("Sub", best, logits), 0, length - 1)
    table = builder.weight("logit_table", "entropy.logit_table", (length,), np.int32)
    mass = builder.lookup(builder.cast(table, np.float32), below)
    # At most MAX_CODEWORDS masses of at most 2^15: the sum is exact in float32.
    total = builder.cast(builder.op("ReduceSum", mass, builder.ints(1), keepdims=1), np.float64)
    beside = builder.op("Sub", builder.constant(1 << PRECISION, np.int64), size)  # of the one that each codeword has
    share = builder.cast(builder.op("Div", builder.cast(beside, np.float64), total), np.float32)
    whole = builder.cast(builder.op("Mul", mass, share), np.int32)  # of a positive number the integer part
    used = builder.op("ReduceSum", builder.cast(whole, np.float32), builder.ints(1), keepdims=1)
    rest = builder.cast(builder.op("Sub", builder.cast(beside, np.float32), used), np.int32)
    rest = builder.op("Mul", builder.cast(is_first, np.int32), rest)
    frequencies = builder.op("Add", builder.op("Add", whole, builder.constant(1, np.int32)), rest)
    builder.op("Transpose", frequencies, perm=[0, 2, 1], output="frequencies")
    return builder.build(
        [
            ("head", np.uint8, ("m", "n", rank)),
            ("factors", np.int8, ("m", "k", rank)),
            ("scale", np.float32, ("m", 1, 1)),
            ("bias", np.int32, ("m", 1, "k")),
        ],
        [("frequencies", np.int32, ("m", "n", "k"))],
    )
