"""Make the graphs that tests of the exact arithmetic run: python tests/make_formula_graphs.py (needs the package onnx).

They are those of the formula model (tests/codec/exact_model.py) and some that hold one operation of it in another size.
To be made anew when the graphs of entropy models change; a test compares.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from codec.exact_model import CONFIG, GRAPHS, INNER_SIZES, NUM_PRODUCTS, RUNS
from safetensors.numpy import save_file

from pqmim.model_files import Graph
from pqmim.training.entropy_graphs import GRAPH_KERNELS, _PartBuilder, entropy_graphs
from pqmim.training.graph_builder import GraphBuilder


def product_graph(kernel: str, num_inputs: int, *, is_hidden: bool) -> Graph:
    """A linear layer alone, on activations or on hidden units."""
    builder = _PartBuilder(CONFIG, kernel)
    y = builder.linear("x", "product", num_inputs, NUM_PRODUCTS, is_hidden=is_hidden)
    builder.op("Identity", y, output="y")
    return builder.build([("x", np.uint8, ("n", num_inputs))], [("y", np.float32, ("n", NUM_PRODUCTS))])


def operator_graph(kind: str, dtype: type, *inputs: str) -> Graph:
    """One operator on vectors."""
    builder = GraphBuilder()
    builder.op(kind, *inputs, output="y")
    return builder.build([(name, dtype, ("n",)) for name in inputs], [("y", dtype, ("n",))])


def formula_graphs() -> dict[str, Graph]:
    """All of them by name."""
    graphs = entropy_graphs(CONFIG, len(RUNS))
    for kernel in GRAPH_KERNELS:
        for size in INNER_SIZES:
            graphs[f"{kernel}/product.{size}"] = product_graph(kernel, size, is_hidden=False)
            graphs[f"{kernel}/hidden.{size}"] = product_graph(kernel, size, is_hidden=True)
    graphs["square_root"] = operator_graph("Sqrt", np.float64, "a")
    graphs["quotient.float64"] = operator_graph("Div", np.float64, "a", "b")
    graphs["quotient.float32"] = operator_graph("Div", np.float32, "a", "b")
    return graphs


def make_formula_graphs(target: Path) -> None:
    """Write the graphs, and as metadata what their weights are called."""
    graphs = formula_graphs()
    models = {name: np.frombuffer(graph.model, np.uint8) for name, graph in graphs.items()}
    weights = {name: graph.weights for name, graph in sorted(graphs.items())}
    save_file(models, target, {"weights": json.dumps(weights)})


if __name__ == "__main__":
    make_formula_graphs(GRAPHS)
    print(f"{GRAPHS} {GRAPHS.stat().st_size:,} B", file=sys.stderr)
