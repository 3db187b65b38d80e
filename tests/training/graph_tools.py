"""Running a graph of a model file, as simply as can be."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from torch import nn

from pqmim.model_files import Graph

DISABLED, ALL = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL


def run_graph(
    graph: Graph, tensors: dict[str, NDArray[Any]], level: Any = ALL, **inputs: NDArray[Any]
) -> list[NDArray[Any]]:
    """Outputs of a graph whose weights are among `tensors`."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = 1
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(tensors[name]) for name in graph.weights.values()]
    options.add_external_initializers(list(graph.weights), values)
    session = onnxruntime.InferenceSession(graph.model, options, providers=["CPUExecutionProvider"])
    outputs: list[NDArray[Any]] = session.run(None, inputs)
    return outputs


def tensors_of(module: nn.Module, prefix: str) -> dict[str, NDArray[Any]]:
    """Parameters of a module as a model file holds them."""
    return {prefix + name: p.detach().numpy().astype(np.float16) for name, p in module.named_parameters()}
