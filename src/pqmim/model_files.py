"""Files of networks: safetensors with weights, graphs and configuration inside; the token models of the package.

A *token model* is all that decides the tokens of a picture: analysis and codebooks in half precision, the entropy model
as the integers of its exact form. Beside it lie its *decoders* (`decoder_files`). Each file has the ONNX graphs that
compute with its weights, which are tensors of the same file (docs/architecture.md).

The *model id* is a hash of what decoding tokens needs: codebooks, static priors, entropy model. A name is only a label.
A second hash covers all of the file, to tell a damaged one.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from pqmim.config import ModelConfig
from pqmim.errors import ModelError, ModelMismatchError

MODEL_FORMAT = "pqmim model 4"
DECODER_FORMAT = "pqmim decoder 1"
TOKENIZER_FORMAT = "pqmim tokenizer 2"
KINDS = {
    MODEL_FORMAT: "a token model",
    DECODER_FORMAT: "a decoder",
    TOKENIZER_FORMAT: "a tokenizer without an entropy model, which `pqmim train entropy` trains",
}
"""Formats of files and what they hold."""
EARLIER_FORMATS = ("pqmim model 1", "pqmim model 2", "pqmim model 3", "pqmim tokenizer 1")
EARLIER_NAMES = {"small": "fast", "base": "fine"}
"""Models of 0.2 and 0.3, and the decoders of today that they have become."""
SUFFIX = ".safetensors"
MODEL_FILE = f"model{SUFFIX}"
FLOAT_MODEL = "entropy_model_float.pt"
"""Where training leaves the entropy model in float32, beside the model file."""
ID_BYTES = 4
GRAPH_PREFIX = "graph."
PADDING_PREFIX = "padding."
ANALYSIS_PREFIX, QUANTIZER_PREFIX, ENTROPY_PREFIX = "tokenizer.analysis.", "tokenizer.quantizer.", "entropy."
MAX_HEADER_BYTES = 1 << 24
DTYPES = {"F16": "<f2", "F32": "<f4", "I8": "<i1", "U8": "<u1", "I32": "<i4", "I64": "<i8"}
"""Types of tensors in a file, in the words of safetensors and of NumPy."""


@dataclass(frozen=True)
class ShippedModel:
    """A token model that comes with the package."""

    name: str
    model_id: bytes
    path: Path
    description: str


@dataclass(frozen=True)
class Graph:
    """A network, or a part of one that several layers share.

    Attributes:
        model: serialized ONNX. Its weights are declared as external data and handed over by name.
        weights: name in the graph -> name of the tensor in the file; of a shared part with `{layer}` where the layer's
            number belongs.
    """

    model: bytes
    weights: dict[str, str]


@dataclass(frozen=True)
class NetworkFile:
    """What the files of networks have in common.

    Attributes:
        tensors: weights, read-only.
        graphs: by name.
        facts: how it was made, for people.
    """

    name: str
    tensors: dict[str, NDArray[Any]]
    graphs: dict[str, Graph]
    facts: dict[str, Any]


@dataclass(frozen=True)
class ModelFile(NetworkFile):
    """Content of a token model's file.

    Its tensors are "tokenizer.analysis.*" and "tokenizer.quantizer.*" (float16, index tensors int64), and "entropy.*"
    (int8, int32, float32), its graphs "analysis" and those of the entropy model.
    """

    model_id: bytes
    config: ModelConfig


def read_metadata(path: Path, *kinds: str) -> dict[str, Any]:
    """Metadata of a file, without reading the weights.

    Args:
        kinds: formats that are accepted.

    Raises:
        ModelError: no such file, or none of these formats.
    """
    try:
        with path.open("rb") as file:
            start = file.read(8)
            (length,) = struct.unpack("<Q", start)
            return parse_metadata(start + file.read(length if length <= MAX_HEADER_BYTES else 0), str(path), *kinds)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    except struct.error as error:
        raise ModelError(f"{path}: not a model file") from error


def parse_metadata(data: bytes, label: str, *kinds: str) -> dict[str, Any]:
    """Metadata in the first bytes of a file; `label` is how errors call it.

    Raises:
        ModelError: not a file of ours, or none of the formats in `kinds`.
    """
    try:
        (length,) = struct.unpack_from("<Q", data)
        metadata: dict[str, Any] = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["pqmim"])
        if not isinstance(metadata["config"], dict) or not isinstance(metadata["facts"], dict):
            raise TypeError
        found = str(metadata["format"])
    except (ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
        raise ModelError(f"{label}: not a model file") from error
    if found in EARLIER_FORMATS:
        raise ModelError(f"{label}: a model of pqmim 0.4 or before, which this version does not read")
    if found not in KINDS:
        raise ModelError(f"{label}: not a model file of this version")
    if found not in kinds:
        raise ModelError(f"{label}: this is {KINDS[found]}, not {KINDS[kinds[0]].partition(',')[0]}")
    return metadata


def parse_tensors(data: bytes, label: str) -> dict[str, NDArray[Any]]:
    """All tensors of a file but its padding, read-only.

    Raises:
        ModelError: damaged, or a type that no file of ours has.
    """
    try:
        tensors = {
            name: np.frombuffer(entry["data"], DTYPES[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in safetensors.deserialize(data)  # type: ignore[no-untyped-call]
            if not name.startswith(PADDING_PREFIX)
        }
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ModelError(f"{label}: damaged model file") from error
    for tensor in tensors.values():
        tensor.flags.writeable = False
    return tensors


def digest(settings: object, tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """SHA-256 over settings, as JSON holds them, and little-endian tensors."""
    found = hashlib.sha256(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        found.update(f"\n{name} {tensor.dtype} {tensor.shape}\n".encode())
        found.update(tensor.data)
    return found.digest()


def content_hash(metadata: dict[str, Any], tensors: Mapping[str, NDArray[Any]]) -> str:
    """Hash (hex) of all that a file says, but for the entry "content_hash" that holds it."""
    return digest({key: value for key, value in metadata.items() if key != "content_hash"}, tensors).hex()


def compute_model_id(config: dict[str, Any], tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """The id of a token model: a hash of what decoding tokens needs.

    Args:
        config: of the token model, as JSON holds it.
        tensors: of its file; the analysis and the graphs do not count.
    """
    settings = {"quantizer": config["tokenizer"]["quantizer"], "entropy": config["entropy"]}
    prefixes = (QUANTIZER_PREFIX, ENTROPY_PREFIX)
    return digest(settings, {name: tensors[name] for name in tensors if name.startswith(prefixes)})[:ID_BYTES]


def load_file(source: Path | bytes, kind: str) -> tuple[dict[str, Any], dict[str, NDArray[Any]], dict[str, Graph], str]:
    """Metadata, weights and graphs of a file, checked, and how errors call it.

    Raises:
        ModelError: missing, damaged, or of another kind.
    """
    label = KINDS[kind].partition(" ")[2] if isinstance(source, bytes) else str(source)
    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise ModelError(f"{label}: {error.strerror}") from error
    metadata = parse_metadata(data, label, kind)
    tensors = parse_tensors(data, label)
    if metadata.get("content_hash") != content_hash(metadata, tensors):
        raise ModelError(f"{label}: damaged model file (its content does not match its hash)")
    try:
        graphs = {
            name: Graph(tensors[GRAPH_PREFIX + name].tobytes(), dict(weights))
            for name, weights in metadata["graphs"].items()
        }
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{label}: damaged model file") from error
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith(GRAPH_PREFIX)}
    return metadata, weights, graphs, label


def load_model(source: Path | bytes) -> ModelFile:
    """Read the file of a token model, from the disk or from its bytes, and check it.

    Raises:
        ModelError: missing, damaged, of another version, or no token model.
    """
    metadata, weights, graphs, label = load_file(source, MODEL_FORMAT)
    try:
        config = ModelConfig.from_dict(metadata["config"])
    except ValueError as error:
        raise ModelError(f"{label}: configuration of another version of pqmim: {error}") from error
    model_id = compute_model_id(metadata["config"], weights)
    if model_id.hex() != metadata.get("model_id"):
        raise ModelError(f"{label}: damaged model file (its content does not match its id)")
    return ModelFile(str(metadata.get("name")), weights, graphs, metadata["facts"], model_id, config)


def shipped_models() -> list[ShippedModel]:
    """Token models in the package, by name."""
    folder = Path(str(resources.files("pqmim") / "weights"))
    models = []
    for path in sorted(folder.glob(f"*/{MODEL_FILE}")):
        metadata = read_metadata(path, MODEL_FORMAT)
        description = metadata["facts"].get("description", "")
        models.append(ShippedModel(metadata["name"], bytes.fromhex(metadata["model_id"]), path, description))
    return models


def shipped_model_of(model_id: bytes) -> ShippedModel:
    """Shipped token model that decodes the files with this model id, or an id that begins so, as in the mini form.

    Raises:
        ModelMismatchError: there is none.
    """
    for model in shipped_models():
        if model.model_id.startswith(model_id):
            return model
    raise ModelMismatchError(f"made with model {model_id.hex()}, which is not a shipped one; name it with --model")


def name_of_id(model_id: bytes) -> str:
    """A model id as errors show it: in hex, with the name of the shipped token model that has it."""
    names = [model.name for model in shipped_models() if model.model_id.startswith(model_id)]
    return model_id.hex() + "".join(f" ({name})" for name in names)


def find_model(name_or_path: str | os.PathLike[str]) -> Path:
    """Path of a token model's file from the name of a shipped one, a file, or a folder that holds one.

    Raises:
        ModelError: there is none; the message lists the shipped names.
    """
    shipped = {model.name: model.path for model in shipped_models()}
    if str(name_or_path) in shipped:
        return shipped[str(name_or_path)]
    path = Path(name_or_path)
    if path.is_dir():
        path = path / MODEL_FILE
    if path.is_file():
        return path
    if str(name_or_path) in EARLIER_NAMES:
        small, base = EARLIER_NAMES.values()
        raise ModelError(
            f"{name_or_path}: no model any more, but a decoder: small is the decoder {small} of the model photo, "
            f"base the decoder {base}; name it as decoder (--decoder)"
        )
    names = ", ".join(shipped) or "none"
    raise ModelError(f"{name_or_path}: no such model (shipped: {names}; or a path to {MODEL_FILE} or its folder)")
