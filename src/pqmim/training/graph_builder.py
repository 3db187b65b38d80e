"""Writes ONNX graphs whose weights stay where they are, in the model file.

A weight is declared as external data and handed over by name when a session is made, so it is stored once, in the type
that it has in the file; the `Cast` behind it is folded then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike
from onnx import TensorProto, helper, numpy_helper

from pqmim.model_files import Graph

OPSET = 17
IR_VERSION = 9
"""The oldest that has all operators: graphs run in every release of ONNX Runtime that the package allows."""
CONTRIB = "com.microsoft"


class GraphBuilder:
    """A graph under construction; values are named by strings, as in ONNX."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._weights: dict[str, str] = {}
        self._offset = 0
        self._uses_contrib = False

    @property
    def nodes(self) -> list[onnx.NodeProto]:
        """Nodes so far, in topological order."""
        return self._nodes

    def op(self, kind: str, *inputs: str, output: str | None = None, domain: str = "", **attributes: Any) -> str:
        """Append an operator with one output; returns the name of the output."""
        output = output or f"v{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, list(inputs), [output], domain=domain, **attributes))
        self._uses_contrib |= domain == CONTRIB
        return output

    def constant(self, value: ArrayLike, dtype: Any = None) -> str:
        """A small array inside the graph; equal ones share a name."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self._constants[key] = f"c{len(self._constants)}"
            self._initializers.append(numpy_helper.from_array(array, name))
        return self._constants[key]

    def ints(self, *values: int) -> str:
        """A constant (n,) int64, as shapes and axes are."""
        return self.constant(values, np.int64)

    def weight(self, name: str, tensor: str, shape: Sequence[int], dtype: Any) -> str:
        """Declare a tensor of the model file, in the type that it has there.

        Args:
            name: of the initializer.
            tensor: its name in the file, see `model_files.Graph`.
        """
        if name not in self._weights:
            dtype = np.dtype(dtype)
            proto = TensorProto(
                name=name,
                data_type=helper.np_dtype_to_tensor_dtype(dtype),
                dims=shape,
                data_location=TensorProto.EXTERNAL,
            )
            length = int(np.prod(shape)) * dtype.itemsize
            for key, value in (("location", "weights"), ("offset", self._offset), ("length", length)):
                entry = proto.external_data.add()
                entry.key, entry.value = key, str(value)
            self._offset += -(-length // 64) * 64
            self._initializers.append(proto)
            self._weights[name] = tensor
        return name

    def cast(self, value: str, dtype: Any) -> str:
        """Convert a value to another type."""
        return self.op("Cast", value, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def build(
        self,
        inputs: Sequence[tuple[str, Any, Sequence[int | str]]],
        outputs: Sequence[tuple[str, Any, Sequence[int | str]]],
    ) -> Graph:
        """Finish the graph.

        Args:
            inputs, outputs: name, type, and shape with names for what is not fixed.
        """

        def infos(values: Sequence[tuple[str, Any, Sequence[int | str]]]) -> list[onnx.ValueInfoProto]:
            return [
                helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
                for name, dtype, shape in values
            ]

        imports = [helper.make_opsetid("", OPSET)]
        if self._uses_contrib:
            imports.append(helper.make_opsetid(CONTRIB, 1))
        graph = helper.make_graph(self._nodes, "pqmim", infos(inputs), infos(outputs), self._initializers)
        model = helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION)
        return Graph(model.SerializeToString(), dict(self._weights))
