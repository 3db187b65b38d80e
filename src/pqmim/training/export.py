"""From trained networks to a model file: integers of the entropy model, graphs, and a command that renews the graphs.

    python -m pqmim.training.export IN OUT

gives a model file of this or an earlier version the graphs of today; its weights and its id stay.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from pqmim.config import NUM_LEVELS, ModelConfig, QualityRange
from pqmim.errors import ModelError, PqmimError
from pqmim.exact_numpy import frequencies_of_logits
from pqmim.fixed_point import (
    ACTIVATION_UNIT,
    ATTENTION_ONE,
    EXPONENTIAL_ONE,
    LOGIT_UNIT,
    POSITION_BIAS_MAX,
    RESIDUAL_UNIT,
    SCORE_UNIT,
    TOKEN_BIAS_MAX,
    bias_room,
    exponential_table_length,
)
from pqmim.model_files import (
    FORMAT,
    GRAPH_PREFIX,
    WEIGHT_PREFIXES,
    Graph,
    compute_graphs_hash,
    compute_model_id,
)
from pqmim.training.checkpoints import offsets, read_file, tokenizer_of, tokenizer_tensors, write_file
from pqmim.training.entropy_graphs import entropy_graphs
from pqmim.training.entropy_model import EntropyModel
from pqmim.training.layers import QuantizableLinear, TransformerLayer, quantize_weight
from pqmim.training.tokenizer import Tokenizer
from pqmim.training.transform_graphs import transform_graphs


def export_entropy(model: EntropyModel) -> dict[str, NDArray[Any]]:
    """Trainable model -> the integers of its exact form.

    Returns:
        Tensors by name for `exact_entropy`: int8 weights, int32 biases and tables, float32 scales.
    """
    tensors: dict[str, Tensor] = {}
    unit = ACTIVATION_UNIT

    def add_linear(name: str, layer: QuantizableLinear, output_unit: float) -> None:
        integers, row_unit = quantize_weight(layer.weight.detach().float())
        product_unit = row_unit[:, 0] * unit
        tensors[name + ".weight"] = integers.to(torch.int8)
        if layer.bias is not None:
            room = bias_room(layer.in_features)
            bias = (layer.bias.detach().float() / product_unit).round().clamp(-room, room)
            tensors[name + ".bias"] = bias.to(torch.int32)
        tensors[name + ".scale"] = product_unit / output_unit

    with torch.no_grad():
        tensors["token_values"] = (model.token_values / unit).round().to(torch.int8)
        for group, embed in enumerate(model.embed):
            assert isinstance(embed, QuantizableLinear)
            add_linear(f"embed.{group}", embed, RESIDUAL_UNIT)
        for index, layer in enumerate(model.layers):
            assert isinstance(layer, TransformerLayer)
            prefix = f"layers.{index}."
            if layer.attention is not None:
                add_linear(prefix + "attention.query_key_value", layer.attention.query_key_value, unit)
                add_linear(prefix + "attention.project", layer.attention.project, RESIDUAL_UNIT)
                for score in ("position_bias", "sink"):
                    bias = (layer.attention.get_parameter(score) / SCORE_UNIT).round()
                    bias = bias.clamp(-POSITION_BIAS_MAX, POSITION_BIAS_MAX)
                    tensors[prefix + f"attention.{score}"] = bias.to(torch.int32)
            add_linear(prefix + "feed_forward.expand", layer.feed_forward.expand, unit)
            add_linear(prefix + "feed_forward.project", layer.feed_forward.project, RESIDUAL_UNIT)
        add_linear("head", model.head, unit)
        factors, factor_unit = quantize_weight(model.token_factors.float().flatten(2).flatten(0, 1))
        tensors["token_factors.weight"] = factors.view_as(model.token_factors).to(torch.int8)
        tensors["token_factors.scale"] = (factor_unit[:, 0] * unit / LOGIT_UNIT).view(NUM_LEVELS, -1)
        bias = (model.token_bias / LOGIT_UNIT).round().clamp(-TOKEN_BIAS_MAX, TOKEN_BIAS_MAX)
        tensors["token_bias"] = bias.to(torch.int32)
        tensors["score_table"] = _exponential_table(ATTENTION_ONE, SCORE_UNIT)
        table = tensors["logit_table"] = _exponential_table(EXPONENTIAL_ONE, LOGIT_UNIT)
        prior = (model.first_prior.float() / LOGIT_UNIT).round().cpu().numpy()
        tensors["first_frequencies"] = torch.from_numpy(frequencies_of_logits(prior, table.float().numpy()))
    return {name: tensor.contiguous().cpu().numpy() for name, tensor in tensors.items()}


def _exponential_table(one: int, unit: float) -> Tensor:
    """round(one * exp(-i * unit)) for i = 0, 1, ... down to the first zero, int32."""
    indices = torch.arange(exponential_table_length(one, unit), dtype=torch.float64)
    return (one * torch.exp(-indices * unit)).round().to(torch.int32)


def save_model(
    path: Path,
    name: str,
    tokenizer: Tokenizer,
    entropy_model: EntropyModel,
    quality: QualityRange,
    facts: dict[str, Any],
) -> bytes:
    """Export a trained pair to a model file; returns its model id.

    Args:
        facts: how it was made, for people.

    Raises:
        OutputError: it cannot be written.
    """
    tensors = tokenizer_tensors(tokenizer)
    tensors.update({f"entropy.{key}": tensor for key, tensor in export_entropy(entropy_model).items()})
    config = ModelConfig(tokenizer.config, entropy_model.config, quality).as_dict()
    return _write(path, name, config, tensors, tokenizer, facts)


def renew_graphs(source: Path, target: Path) -> bytes:
    """Write a model file anew with the graphs of today, its weights and its id as they are; returns the id.

    Raises:
        ModelError: missing, damaged, or no complete model.
        OutputError: it cannot be written.
    """
    metadata, tensors = read_file(source)
    try:
        expected, name, config = metadata["model_id"], metadata["name"], metadata["config"]
    except KeyError as error:
        raise ModelError(f"{source}: no complete model") from error
    if compute_model_id(config, tensors).hex() != expected:
        raise ModelError(f"{source}: damaged model file (its content does not match its id)")
    tokenizer = tokenizer_of(config["tokenizer"], tensors, source)
    return _write(target, name, config, tensors, tokenizer, metadata["facts"])


def _write(
    path: Path,
    name: str,
    config: dict[str, Any],
    tensors: Mapping[str, NDArray[Any]],
    tokenizer: Tokenizer,
    facts: dict[str, Any],
) -> bytes:
    """Add the graphs and write a file; `config` is kept to the letter, since the id depends on it."""
    weights = {key: tensors[key] for key in sorted(tensors) if key.startswith(WEIGHT_PREFIXES)}
    entropy = ModelConfig.from_dict(config).entropy
    sizes = tokenizer.config.quantizer
    graphs = transform_graphs(tokenizer)
    graphs.update(entropy_graphs(entropy, sizes.num_subquantizers, sizes.num_codewords))
    places = offsets(weights)
    graphs = {key: _placed(graph, places) for key, graph in sorted(graphs.items())}
    model_id = compute_model_id(config, weights)
    metadata = {
        "format": FORMAT,
        "name": name,
        "model_id": model_id.hex(),
        "config": config,
        "graphs": {key: graph.weights for key, graph in graphs.items()},
        "graphs_hash": compute_graphs_hash(graphs),
        "facts": facts,
    }
    arrays = {GRAPH_PREFIX + key: np.frombuffer(graph.model, np.uint8) for key, graph in graphs.items()}
    write_file(path, {**weights, **arrays}, metadata)
    return model_id


def _placed(graph: Graph, places: Mapping[str, int]) -> Graph:
    """A graph whose weights say where in the data section of the file they are, unless layers share the graph."""
    model = onnx.load_from_string(graph.model)
    for tensor in model.graph.initializer:
        place = places.get(graph.weights.get(tensor.name, ""))
        if place is not None:
            for entry in tensor.external_data:
                if entry.key == "offset":
                    entry.value = str(place)
    return Graph(model.SerializeToString(), graph.weights)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m pqmim.training.export", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", metavar="IN", type=Path, help="model file")
    parser.add_argument("target", metavar="OUT", type=Path, help="file to write")
    arguments = parser.parse_args()
    try:
        model_id = renew_graphs(arguments.source, arguments.target)
    except PqmimError as error:
        sys.exit(f"pqmim: {error}")
    print(f"{arguments.target}  model {model_id.hex()}  {arguments.target.stat().st_size:,} B")


if __name__ == "__main__":
    main()
