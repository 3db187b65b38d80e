"""Graphs of entropy models: what the tests of the codec hold is what is written today, and its operators are known."""

import re
from collections.abc import Mapping
from pathlib import Path

import onnx
import pytest
from codec.exact_model import model_file
from make_formula_graphs import formula_graphs

from pqmim.entropy_kernels import GRAPH_KERNELS
from pqmim.model_files import Graph, load_model, shipped_models

EXACTNESS_PAGE = (Path(__file__).parents[2] / "docs" / "exactness.md").read_text(encoding="utf-8")


def test_graphs_of_the_formula_model_are_those_of_today() -> None:
    """Run tests/make_formula_graphs.py when this fails on purpose."""
    made, kept = formula_graphs(), model_file().graphs
    assert made.keys() == kept.keys()
    for name, graph in made.items():
        assert kept[name].weights == graph.weights, name
        assert onnx.load_from_string(kept[name].model) == onnx.load_from_string(graph.model), name


def entropy_graphs_of(graphs: Mapping[str, Graph]) -> dict[str, onnx.GraphProto]:
    names = ("embed", "frequencies", *(f"{kernel}/" for kernel in GRAPH_KERNELS))
    return {name: onnx.load_from_string(graph.model).graph for name, graph in graphs.items() if name.startswith(names)}


@pytest.fixture(scope="module")
def shipped() -> dict[str, onnx.GraphProto]:
    """Graphs of the entropy models that come with the package."""
    models = {model.name: load_model(model.path).graphs for model in shipped_models()}
    return {f"{model}: {name}": g for model, gs in models.items() for name, g in entropy_graphs_of(gs).items()}


def test_operators_are_those_that_the_page_argues_for(shipped: dict[str, onnx.GraphProto]) -> None:
    table = EXACTNESS_PAGE.split("### The operators of ONNX")[1].split("\n\n")[2]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    argued = set(re.findall(r"`(\w+)`", " ".join(cells)))
    used = {node.op_type for graph in shipped.values() for node in graph.node}
    assert len(argued) > 20
    assert used == argued


def test_what_is_rewritten_with_another_rounding_does_not_occur(shipped: dict[str, onnx.GraphProto]) -> None:
    """A product times a scalar constant, and one over something times something else."""
    for name, graph in shipped.items():
        shapes = {initializer.name: list(initializer.dims) for initializer in graph.initializer}
        makers = {output: node for node in graph.node for output in node.output}
        users: dict[str, list[str]] = {}
        for node in graph.node:
            for value in node.input:
                users.setdefault(value, []).append(node.op_type)
        for node in graph.node:
            if node.op_type in ("Mul", "Div") and any(
                value in makers and makers[value].op_type == "MatMul" for value in node.input
            ):
                assert all(shapes.get(value) != [] for value in node.input), name
            if node.op_type == "Div":
                assert set(users[node.output[0]]) <= {"Cast", "Round"}, name
            assert node.op_type != "Reciprocal", name
