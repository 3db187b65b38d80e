"""From trained networks to the files of a token model and its decoders, and a command that renews their graphs.

    python -m pqmim.training.export IN OUT
    python -m pqmim.training.export TOKENIZER OUT --for MODEL --name NAME

The first gives the file of a token model or a decoder the graphs of today; its weights and its id stay. The second
makes a decoder for a token model of a synthesis that was trained before its entropy model was there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pqmim.config import ModelConfig, QualityRange, SynthesisConfig, TokensConfig
from pqmim.decoder_files import SYNTHESIS_PREFIX, DecoderFile, compute_decoder_id, difference
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
    ANALYSIS_PREFIX,
    DECODER_FORMAT,
    ENTROPY_PREFIX,
    MODEL_FILE,
    MODEL_FORMAT,
    QUANTIZER_PREFIX,
    SUFFIX,
    ModelFile,
    compute_model_id,
    find_model,
    load_file,
    load_model,
    read_metadata,
)
from pqmim.training.autoencoder import Analysis, Synthesis
from pqmim.training.checkpoints import load_tokenizer, stored, write_networks
from pqmim.training.entropy_graphs import entropy_graphs
from pqmim.training.entropy_model import EntropyModel
from pqmim.training.layers import QuantizableLinear, TransformerLayer, quantize_weight
from pqmim.training.tokenizer import Tokenizer
from pqmim.training.transform_graphs import analysis_graph, synthesis_graphs

OWN_DECODER = "fast"
"""Name of the decoder that is trained together with the tokens."""


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
        weights, scales = [], []
        for level in range(model.num_levels):
            for block in model.alphabets.blocks(level, 0, model.num_subquantizers):
                factors = model.token_factors[block.codewords].float().view(block.last - block.first, -1)
                integers, factor_unit = quantize_weight(factors)
                weights.append(integers.view(-1, model.config.token_rank).to(torch.int8))
                scales.append(factor_unit[:, 0] * unit / LOGIT_UNIT)
        tensors["token_factors.weight"] = torch.cat(weights)
        tensors["token_factors.scale"] = torch.cat(scales).view(model.num_levels, -1)
        bias = (model.token_bias / LOGIT_UNIT).round().clamp(-TOKEN_BIAS_MAX, TOKEN_BIAS_MAX)
        tensors["token_bias"] = bias.to(torch.int32)
        tensors["score_table"] = _exponential_table(ATTENTION_ONE, SCORE_UNIT)
        table = tensors["logit_table"] = _exponential_table(EXPONENTIAL_ONE, LOGIT_UNIT)
        tensors["static_frequencies"] = torch.from_numpy(_static_frequencies(model, table.float().numpy()))
    return {name: tensor.contiguous().cpu().numpy() for name, tensor in tensors.items()}


def _static_frequencies(model: EntropyModel, table: NDArray[np.float32]) -> NDArray[np.int32]:
    """Frequencies of the static priors, (N,)."""
    prior = (model.prior.float() / LOGIT_UNIT).round().cpu().numpy()
    parts = [
        frequencies_of_logits(prior[block.codewords].reshape(-1, block.size), table).ravel()
        for level in range(model.num_levels)
        for block in model.alphabets.blocks(level, 0, model.num_subquantizers)
    ]
    return np.concatenate(parts)


def _exponential_table(one: int, unit: float) -> Tensor:
    """round(one * exp(-i * unit)) for i = 0, 1, ... down to the first zero, int32."""
    indices = torch.arange(exponential_table_length(one, unit), dtype=torch.float64)
    return (one * torch.exp(-indices * unit)).round().to(torch.int32)


def save_model(
    folder: Path,
    name: str,
    tokenizer: Tokenizer,
    entropy_model: EntropyModel,
    quality: QualityRange,
    facts: dict[str, Any],
) -> bytes:
    """Export what training made into the folder of a token model: its file, and the tokenizer's synthesis as a decoder.

    Args:
        facts: how it was made, for people.

    Returns:
        The model id.

    Raises:
        OutputError: it cannot be written.
    """
    parts = TokensConfig(tokenizer.config.autoencoder.analysis, tokenizer.config.quantizer)
    config = ModelConfig(parts, entropy_model.config, quality).as_dict()
    weights = {**stored(tokenizer.analysis, ANALYSIS_PREFIX), **stored(tokenizer.quantizer, QUANTIZER_PREFIX)}
    weights |= {ENTROPY_PREFIX + key: tensor for key, tensor in export_entropy(entropy_model).items()}
    model_id = _write_model(folder / MODEL_FILE, name, config, weights, tokenizer.analysis, facts)
    save_decoder(folder / f"{OWN_DECODER}{SUFFIX}", OWN_DECODER, tokenizer.synthesis, model_id, {})
    return model_id


def save_decoder(
    path: Path,
    name: str,
    synthesis: Synthesis,
    token_model: bytes,
    facts: dict[str, Any],
    *,
    faithful: DecoderFile | None = None,
) -> bytes:
    """Write the file of a decoder, a trained synthesis for the tokens of one token model; returns the decoder's id.

    This is the one way to such a file; it belongs beside the token model, as NAME.safetensors.

    Args:
        name: that it is called by.
        synthesis: in any precision; it is stored in half precision.
        token_model: id of the token model (`model_files.ModelFile.model_id`).
        facts: how it was made, for people; "description" is what `pqmim models` shows.
        faithful: the decoder of the same shape that it was fine-tuned from for realism, if it was; the file holds the
            difference, and must lie beside it.

    Raises:
        OutputError: it cannot be written.
    """
    config, weights = synthesis.config.as_dict(), stored(synthesis, SYNTHESIS_PREFIX)
    if faithful is not None:
        weights = difference(weights, faithful.tensors)
    decoder_id = compute_decoder_id(config, weights)
    metadata = {
        "format": DECODER_FORMAT,
        "name": name,
        "token_model": token_model.hex(),
        "decoder_id": decoder_id.hex(),
        "config": config,
        "facts": facts,
    }
    if faithful is not None:
        metadata["faithful"] = faithful.decoder_id.hex()
    write_networks(path, metadata, weights, synthesis_graphs(synthesis))
    return decoder_id


def renew_graphs(source: Path, target: Path) -> bytes:
    """Write the file of a token model or a decoder anew with the graphs of today, its weights and its id as they are.

    Returns:
        The id.

    Raises:
        ModelError: missing, damaged, or neither of these.
        OutputError: it cannot be written.
    """
    if read_metadata(source, MODEL_FORMAT, DECODER_FORMAT)["format"] == DECODER_FORMAT:
        metadata, weights, _, _ = load_file(source, DECODER_FORMAT)
        shape = Synthesis(SynthesisConfig.from_dict(metadata["config"]))
        write_networks(target, metadata, weights, synthesis_graphs(shape))
        return bytes.fromhex(metadata["decoder_id"])
    model = load_model(source)
    analysis = Analysis(model.config.tokenizer.analysis)
    return _write_model(target, model.name, model.config.as_dict(), model.tensors, analysis, model.facts)


def save_analysis(model: ModelFile, analysis: Analysis, path: Path, facts: dict[str, Any]) -> None:
    """Write the file of a token model with another analysis, which its id does not cover.

    Args:
        facts: how the analysis was made, for people; the others stay.

    Raises:
        OutputError: it cannot be written.
    """
    config = replace(model.config, tokenizer=replace(model.config.tokenizer, analysis=analysis.config))
    weights = {name: tensor for name, tensor in model.tensors.items() if not name.startswith(ANALYSIS_PREFIX)}
    weights |= stored(analysis, ANALYSIS_PREFIX)
    _write_model(path, model.name, config.as_dict(), weights, analysis, model.facts | {"analysis": facts})


def export_decoder(source: Path, target: Path, model: Path, name: str) -> bytes:
    """Write the synthesis of a tokenizer's file as a decoder for a token model; returns the decoder's id.

    Raises:
        ModelError: a file is missing or damaged, or the tokenizer has other codebooks than the token model.
        OutputError: it cannot be written.
    """
    tokenizer, facts = load_tokenizer(source)
    loaded = load_model(find_model(model))
    codebook = loaded.tensors[f"{QUANTIZER_PREFIX}codebook"]
    if not np.array_equal(tokenizer.quantizer.codebook.detach().half().numpy(), codebook):
        raise ModelError(f"{source}: other codebooks than those of the token model {loaded.name}")
    return save_decoder(target, name, tokenizer.synthesis, loaded.model_id, facts)


def _write_model(
    path: Path,
    name: str,
    config: dict[str, Any],
    weights: Mapping[str, NDArray[Any]],
    analysis: Analysis,
    facts: dict[str, Any],
) -> bytes:
    """Add the graphs and write the file of a token model; of the analysis, the shape counts."""
    shape = ModelConfig.from_dict(config)
    sizes = shape.tokenizer.quantizer
    graphs = entropy_graphs(shape.entropy, sizes.num_subquantizers)
    graphs["analysis"] = analysis_graph(analysis)
    model_id = compute_model_id(config, weights)
    metadata = {"format": MODEL_FORMAT, "name": name, "model_id": model_id.hex(), "config": config, "facts": facts}
    write_networks(path, metadata, weights, graphs)
    return model_id


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m pqmim.training.export", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", metavar="IN", type=Path, help="file of a token model, a decoder or a tokenizer")
    parser.add_argument("target", metavar="OUT", type=Path, help="file to write")
    parser.add_argument("--for", dest="model", metavar="MODEL", type=Path, help="token model of a new decoder")
    parser.add_argument("--name", help="of a new decoder")
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.name is None):
        parser.error("--for and --name go together")
    try:
        if arguments.model is None:
            found = renew_graphs(arguments.source, arguments.target)
        else:
            found = export_decoder(arguments.source, arguments.target, arguments.model, arguments.name)
    except PqmimError as error:
        sys.exit(f"pqmim: {error}")
    print(f"{arguments.target}  {found.hex()}  {arguments.target.stat().st_size:,} B")


if __name__ == "__main__":
    main()
