"""Writing files of networks, and reading their transforms and quantizers back for training.

Every tensor of a file begins at a multiple of 64 bytes, so that whoever has the file in memory can use it in place;
tensors named "padding.*" fill the gaps, since safetensors allows none.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from pqmim.alphabets import Alphabets
from pqmim.config import AutoencoderConfig, TokenizerConfig, TokensConfig
from pqmim.decoder_files import (
    SYNTHESIS_PREFIX,
    DecoderFile,
    check_fits,
    faithful_file,
    find_decoder,
    load_decoder,
)
from pqmim.errors import ModelError, OutputError
from pqmim.model_files import (
    DECODER_FORMAT,
    DTYPES,
    GRAPH_PREFIX,
    MODEL_FILE,
    MODEL_FORMAT,
    PADDING_PREFIX,
    TOKENIZER_FORMAT,
    Graph,
    content_hash,
    find_model,
    load_model,
    parse_tensors,
    read_metadata,
)
from pqmim.quantizer import check_quantizer_weights
from pqmim.training.autoencoder import Synthesis
from pqmim.training.tokenizer import Tokenizer

ALIGNMENT = 64


def offsets(tensors: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """Where each tensor begins in the data section of a file that holds them in this order, bytes."""
    position, found = 0, {}
    for name, tensor in tensors.items():
        found[name] = position
        position += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return found


def write_file(path: Path, tensors: Mapping[str, NDArray[Any]], metadata: dict[str, Any]) -> None:
    """Write a safetensors file, all or nothing.

    Args:
        tensors: of the types in `model_files.DTYPES`, in the order in which they shall lie in the file.
        metadata: for JSON.

    Raises:
        OutputError: it cannot be written.
    """
    words = {np.dtype(dtype): word for word, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"pqmim": json.dumps(metadata, sort_keys=True)}}
    parts: list[bytes] = []
    position = 0

    def add(name: str, word: str, shape: tuple[int, ...], content: bytes) -> None:
        nonlocal position
        header[name] = {"dtype": word, "shape": shape, "data_offsets": [position, position + len(content)]}
        parts.append(content)
        position += len(content)

    for name, tensor in tensors.items():
        if gap := -position % ALIGNMENT:
            add(f"{PADDING_PREFIX}{len(parts)}", "U8", (gap,), bytes(gap))
        add(name, words[tensor.dtype], tensor.shape, tensor.tobytes())
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % ALIGNMENT)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines([struct.pack("<Q", len(encoded)), encoded, *parts])
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}") from error


def place_weights(graph: Graph, places: Mapping[str, int]) -> Graph:
    """A graph whose weights say where in the data section of the file they are, unless layers share the graph."""
    model = onnx.load_from_string(graph.model)
    for tensor in model.graph.initializer:
        place = places.get(graph.weights.get(tensor.name, ""))
        if place is not None:
            for entry in tensor.external_data:
                if entry.key == "offset":
                    entry.value = str(place)
    return Graph(model.SerializeToString(), graph.weights)


def write_networks(
    path: Path, metadata: dict[str, Any], weights: Mapping[str, NDArray[Any]], graphs: Mapping[str, Graph]
) -> None:
    """Write a file of weights and graphs, each weight once, with the hash of its content.

    Args:
        metadata: without the graphs and the hash.

    Raises:
        OutputError: it cannot be written.
    """
    ordered = {name: weights[name] for name in sorted(weights)}
    places = offsets(ordered)
    placed = {name: place_weights(graphs[name], places) for name in sorted(graphs)}
    tensors = {
        **ordered,
        **{GRAPH_PREFIX + name: np.frombuffer(graph.model, np.uint8) for name, graph in placed.items()},
    }
    whole = metadata | {"graphs": {name: graph.weights for name, graph in placed.items()}}
    write_file(path, tensors, whole | {"content_hash": content_hash(whole, tensors)})


def stored(module: nn.Module, prefix: str) -> dict[str, NDArray[Any]]:
    """State of a module as files have it: floats in half precision, index buffers as they are."""
    return {
        prefix + name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous().cpu().numpy()
        for name, tensor in sorted(module.state_dict().items())
    }


def save_tokenizer(path: Path, tokenizer: Tokenizer, facts: dict[str, Any]) -> None:
    """Write a trained tokenizer, the input of `pqmim train entropy`."""
    metadata = {"format": TOKENIZER_FORMAT, "config": tokenizer.config.as_dict(), "facts": facts}
    write_file(path, stored(tokenizer, ""), metadata)


def load_tokenizer(path: Path, decoder: str | None = None) -> tuple[Tokenizer, dict[str, Any]]:
    """A tokenizer for training: that of a run, or a token model with one of its decoders.

    Args:
        path: file of a tokenizer, of a token model, or of a decoder beside its token model; folder of a token model.
        decoder: of a token model, by name; None = the default one.

    Returns:
        The tokenizer in eval mode, float32, and the facts of the file.

    Raises:
        ModelError: missing, damaged, or neither of these.
    """
    if path.is_dir():
        path = path / MODEL_FILE
    metadata = read_metadata(path, TOKENIZER_FORMAT, MODEL_FORMAT, DECODER_FORMAT)
    if metadata["format"] == DECODER_FORMAT:
        return load_tokenizer(path.parent, str(path))
    if metadata["format"] == TOKENIZER_FORMAT:
        return _tokenizer_of(metadata["config"], parse_tensors(path.read_bytes(), str(path)), path), metadata["facts"]
    model = load_model(path)
    synthesis = load_decoder(find_decoder(decoder, path))
    check_fits(synthesis, model)
    parts = model.config.tokenizer
    config = TokenizerConfig(AutoencoderConfig.of(parts.analysis, synthesis.config), parts.quantizer)
    tensors = {name.removeprefix("tokenizer."): tensor for name, tensor in model.tensors.items()}
    return _tokenizer_of(config.as_dict(), tensors | synthesis.tensors, path), model.facts


def load_synthesis(path: Path) -> tuple[Synthesis, DecoderFile]:
    """The synthesis of a decoder's file, in eval mode, float32, and what else the file says.

    Raises:
        ModelError: missing, damaged, or no decoder.
    """
    decoder = load_decoder(path)
    synthesis = Synthesis(decoder.config)
    _fill(synthesis, {name.removeprefix(SYNTHESIS_PREFIX): t for name, t in decoder.tensors.items()}, path)
    return synthesis.eval().to(memory_format=torch.channels_last), decoder  # type: ignore[call-overload]


def load_any_synthesis(path: Path) -> tuple[Synthesis, Path | None]:
    """The synthesis of a decoder's file, of a token model's default decoder, or of a tokenizer, and the file of
    the faithful decoder: its own, or that of the one it was fine-tuned from for realism; None of a tokenizer.

    Raises:
        ModelError: missing, damaged, or none of these.
    """
    if path.is_dir() or path.name == MODEL_FILE:
        path = find_decoder(None, find_model(path))
    if read_metadata(path, TOKENIZER_FORMAT, DECODER_FORMAT)["format"] == TOKENIZER_FORMAT:
        return load_tokenizer(path)[0].synthesis, None
    synthesis, decoder = load_synthesis(path)
    return synthesis, path if decoder.faithful is None else faithful_file(path, decoder)


def token_model_id(path: Path) -> bytes | None:
    """Id of a token model, by its file or folder; None of a tokenizer, which has no entropy model.

    Raises:
        ModelError: missing, or neither of these.
    """
    metadata = read_metadata(path / MODEL_FILE if path.is_dir() else path, MODEL_FORMAT, TOKENIZER_FORMAT)
    return bytes.fromhex(metadata["model_id"]) if metadata["format"] == MODEL_FORMAT else None


def _tokenizer_of(settings: object, tensors: Mapping[str, NDArray[Any]], path: Path) -> Tokenizer:
    """Tokenizer in eval mode, float32, from what a file holds; what else it holds does not matter."""
    try:
        config = TokenizerConfig.from_dict(settings)
    except ValueError as error:
        raise ModelError(f"{path}: configuration of another version of pqmim: {error}") from error
    named = {f"tokenizer.{name}": tensor for name, tensor in tensors.items()}
    try:
        check_quantizer_weights(named, TokensConfig(config.autoencoder.analysis, config.quantizer))
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    tokenizer = Tokenizer(config, Alphabets.of(named))
    _fill(tokenizer, {name: tensors[name] for name in tokenizer.state_dict() if name in tensors}, path)
    return tokenizer.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _fill(module: nn.Module, tensors: Mapping[str, NDArray[Any]], path: Path) -> None:
    """Set all weights of a module."""
    state = {name: torch.from_numpy(tensor.copy()) for name, tensor in tensors.items()}
    try:
        module.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in state.items()})
    except RuntimeError as error:
        raise ModelError(f"{path}: weights do not fit the configuration") from error
