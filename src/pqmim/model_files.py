"""Model files: safetensors with weights, graphs and configuration inside; the table of shipped models.

A model file holds the tokenizer in half precision, the entropy model as the integers of its exact form, and the ONNX
graphs that compute with them, whose weights are the tensors of the same file (docs/architecture.md). Its *model id* is
a hash of all that decides how a file decodes, weights and configuration; a name is only a label. Graphs have a hash of
their own: the same weights may get better graphs.
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

FORMAT = "pqmim model 2"
EARLIER_FORMAT = "pqmim model 1"
"""Without graphs, before version 0.3: training starts from such files too, and `training.export` converts them."""
MODEL_FILE = "model.safetensors"
FLOAT_MODEL = "entropy_model_float.pt"
"""Where training leaves the entropy model in float32, beside the model file."""
MODEL_ID_BYTES = 4
GRAPH_PREFIX = "graph."
WEIGHT_PREFIXES = ("tokenizer.", "entropy.")
MAX_HEADER_BYTES = 1 << 24
DTYPES = {"F16": "<f2", "F32": "<f4", "I8": "<i1", "U8": "<u1", "I32": "<i4", "I64": "<i8"}
"""Types of tensors in a model file, in the words of safetensors and of NumPy."""


@dataclass(frozen=True)
class ShippedModel:
    """A model that comes with the package."""

    name: str
    model_id: bytes
    path: Path
    description: str


@dataclass(frozen=True)
class Graph:
    """A network, or a part of one that several layers share.

    Attributes:
        model: serialized ONNX. Its weights are declared as external data and handed over by name.
        weights: name in the graph -> name of the tensor in the model file; of a shared part with `{layer}` where the
            layer's number belongs.
    """

    model: bytes
    weights: dict[str, str]


@dataclass(frozen=True)
class ModelFile:
    """Content of a model file.

    Attributes:
        tensors: "tokenizer.*" (float16, index tensors int64) and "entropy.*" (int8, int32, float32); read-only.
        graphs: by name.
        facts: how it was made, for people.
    """

    name: str
    model_id: bytes
    config: ModelConfig
    tensors: dict[str, NDArray[Any]]
    graphs: dict[str, Graph]
    facts: dict[str, Any]


def read_metadata(path: Path) -> dict[str, Any]:
    """Metadata of a model or tokenizer file, without reading the weights.

    Raises:
        ModelError: no such file, or not one of ours.
    """
    try:
        with path.open("rb") as file:
            start = file.read(8)
            (length,) = struct.unpack("<Q", start)
            return parse_metadata(start + file.read(length if length <= MAX_HEADER_BYTES else 0), str(path))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    except struct.error as error:
        raise ModelError(f"{path}: not a model file") from error


def parse_metadata(data: bytes, label: str) -> dict[str, Any]:
    """Metadata in the first bytes of a file; `label` is how errors call it.

    Raises:
        ModelError: not a file of ours.
    """
    try:
        (length,) = struct.unpack_from("<Q", data)
        metadata = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["pqmim"])
        if not isinstance(metadata["config"], dict) or not isinstance(metadata["facts"], dict):
            raise TypeError
        known = metadata["format"] in (FORMAT, EARLIER_FORMAT)
    except (ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
        raise ModelError(f"{label}: not a model file") from error
    if not known:
        raise ModelError(f"{label}: not a model file of this version")
    return metadata  # type: ignore[no-any-return]


def parse_tensors(data: bytes, label: str) -> dict[str, NDArray[Any]]:
    """All tensors of a file, read-only.

    Raises:
        ModelError: damaged, or a type that no file of ours has.
    """
    try:
        tensors = {
            name: np.frombuffer(entry["data"], DTYPES[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in safetensors.deserialize(data)  # type: ignore[no-untyped-call]
        }
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ModelError(f"{label}: damaged model file") from error
    for tensor in tensors.values():
        tensor.flags.writeable = False
    return tensors


def shipped_models() -> list[ShippedModel]:
    """Models in the package, by name."""
    folder = Path(str(resources.files("pqmim") / "weights"))
    models = []
    for path in sorted(folder.glob("*.safetensors")):
        metadata = read_metadata(path)
        model_id, description = bytes.fromhex(metadata["model_id"]), metadata["facts"].get("description", "")
        models.append(ShippedModel(metadata["name"], model_id, path, description))
    return models


def shipped_model_of(model_id: bytes) -> ShippedModel:
    """Shipped model that decodes the files with this model id, or an id that begins so, as in the mini form.

    Raises:
        ModelMismatchError: there is none.
    """
    for model in shipped_models():
        if model.model_id.startswith(model_id):
            return model
    raise ModelMismatchError(f"made with model {model_id.hex()}, which is not a shipped one; name it with --model")


def find_model(name_or_path: str | os.PathLike[str]) -> Path:
    """Path of a model file from the name of a shipped model, a file, or a run folder that holds one.

    Raises:
        ModelError: there is none; the message lists the shipped names.
    """
    shipped = {model.name: model.path for model in shipped_models()}
    if str(name_or_path) in shipped:
        return shipped[str(name_or_path)]
    path = Path(name_or_path)
    if path.is_dir():
        path = path / MODEL_FILE
    if not path.is_file():
        names = ", ".join(shipped) or "none"
        raise ModelError(f"{name_or_path}: no such model (shipped: {names}; or a path to {MODEL_FILE})")
    return path


def compute_model_id(config: dict[str, Any], tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """First four bytes of SHA-256 over the configuration and all weights.

    Args:
        config: as JSON holds it.
        tensors: little-endian; graphs are left out.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(tensors):
        if name.startswith(WEIGHT_PREFIXES):
            tensor = np.ascontiguousarray(tensors[name])
            digest.update(f"\n{name} torch.{tensor.dtype} {tensor.shape}\n".encode())  # ids began with PyTorch's words
            digest.update(tensor.data)
    return digest.digest()[:MODEL_ID_BYTES]


def compute_graphs_hash(graphs: Mapping[str, Graph]) -> str:
    """SHA-256 (hex) over names, graphs, and what their weights are called."""
    digest = hashlib.sha256()
    for name in sorted(graphs):
        weights = json.dumps(graphs[name].weights, sort_keys=True, separators=(",", ":"))
        digest.update(f"\n{name} {weights} {len(graphs[name].model)}\n".encode())
        digest.update(graphs[name].model)
    return digest.hexdigest()


def load_model(source: Path | bytes) -> ModelFile:
    """Read a model file, from the disk or from its bytes, and check its id and its graphs.

    Raises:
        ModelError: missing, damaged, of another version, or not a complete model.
    """
    label = "model" if isinstance(source, bytes) else str(source)
    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise ModelError(f"{label}: {error.strerror}") from error
    metadata = parse_metadata(data, label)
    if "model_id" not in metadata:
        raise ModelError(f"{label}: a tokenizer without an entropy model; train one with `pqmim train entropy`")
    if metadata["format"] != FORMAT:
        raise ModelError(f"{label}: a model of an earlier version; convert it with `python -m pqmim.training.export`")
    tensors = parse_tensors(data, label)
    model_id = compute_model_id(metadata["config"], tensors)
    try:
        graphs = {
            name: Graph(tensors[GRAPH_PREFIX + name].tobytes(), dict(weights))
            for name, weights in metadata["graphs"].items()
        }
        is_whole = compute_graphs_hash(graphs) == metadata["graphs_hash"] and model_id.hex() == metadata["model_id"]
        name = str(metadata["name"])
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{label}: damaged model file") from error
    if not is_whole:
        raise ModelError(f"{label}: damaged model file (its content does not match its id)")
    try:
        config = ModelConfig.from_dict(metadata["config"])
    except ValueError as error:
        raise ModelError(f"{label}: configuration of another version of pqmim: {error}") from error
    weights = {key: tensor for key, tensor in tensors.items() if key.startswith(WEIGHT_PREFIXES)}
    return ModelFile(name, model_id, config, weights, graphs, metadata["facts"])
