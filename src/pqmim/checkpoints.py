"""Model files: safetensors with the configuration inside; the table of shipped models.

A model file holds the tokenizer in half precision and the entropy model as the integers of its exact form. Its *model
id* is a hash of all that decides how a file decodes, weights and configuration; a name is only a label.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from pqmim.config import ConfigType, EntropyModelConfig, QualityRange, TokenizerConfig
from pqmim.errors import ModelError, ModelMismatchError, OutputError

if TYPE_CHECKING:  # the table of models is read without torch
    from torch import Tensor

    from pqmim.training.entropy_model import EntropyModel
    from pqmim.training.tokenizer import Tokenizer

FORMAT = "pqmim model 1"
MODEL_FILE = "model.safetensors"
MODEL_ID_BYTES = 4


@dataclass(frozen=True)
class ShippedModel:
    """A model that comes with the package."""

    name: str
    model_id: bytes
    path: Path
    description: str


@dataclass(frozen=True)
class LoadedModel:
    """Content of a model file.

    Attributes:
        tokenizer: in eval mode, float32.
        entropy_tensors: for `ExactEntropyModel`.
        facts: how it was made, for people.
    """

    name: str
    model_id: bytes
    tokenizer: Tokenizer
    entropy_config: EntropyModelConfig
    entropy_tensors: dict[str, Tensor]
    quality: QualityRange
    facts: dict[str, Any]


def read_metadata(path: Path) -> dict[str, Any]:
    """Metadata of a model or tokenizer file, without torch and without reading the weights.

    Raises:
        ModelError: no such file, or not one of ours.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > 1 << 24:
                raise ModelError(f"{path}: not a model file")
            header = json.loads(file.read(length))
        metadata = json.loads(header["__metadata__"]["pqmim"])
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise ModelError(f"{path}: not a model file") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ModelError(f"{path}: not a model file of this version")
    return metadata


def shipped_models() -> list[ShippedModel]:
    """Models in the package, by name."""
    folder = Path(str(resources.files("pqmim") / "weights"))
    models = []
    for path in sorted(folder.glob("*.safetensors")):
        metadata = read_metadata(path)
        models.append(
            ShippedModel(
                metadata["name"], bytes.fromhex(metadata["model_id"]), path, metadata["facts"].get("description", "")
            )
        )
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


def compute_model_id(config: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    """First four bytes of SHA-256 over the configuration and all tensors."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.digest()[:MODEL_ID_BYTES]


def _validate(kind: type[ConfigType], settings: object, path: Path) -> ConfigType:
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        raise ModelError(f"{path}: configuration of another version of pqmim") from error


def _tokenizer_tensors(tokenizer: Tokenizer) -> dict[str, Tensor]:
    """State of a tokenizer as stored: floats in half precision, index buffers as they are."""
    return {
        f"tokenizer.{name}": (tensor.half() if tensor.is_floating_point() else tensor).contiguous().cpu()
        for name, tensor in tokenizer.state_dict().items()
    }


def _build_tokenizer(config: TokenizerConfig, tensors: dict[str, Tensor], path: Path) -> Tokenizer:
    import torch

    from pqmim.training.tokenizer import Tokenizer

    prefix = "tokenizer."
    state = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    try:
        tokenizer = Tokenizer(config, num_kept=len(state["quantizer.order"]))
        tokenizer.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in state.items()})
    except (KeyError, RuntimeError) as error:
        raise ModelError(f"{path}: tokenizer weights do not fit the configuration") from error
    return tokenizer.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, temporary, metadata={"pqmim": json.dumps(metadata, sort_keys=True)})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path}: {str(error).splitlines()[0]}") from error


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    metadata = read_metadata(path)
    try:
        return metadata, load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: damaged model file") from error


def save_tokenizer(path: Path, tokenizer: Tokenizer, facts: dict[str, Any]) -> None:
    """Write a trained tokenizer, the input of `pqmim train entropy`."""
    metadata = {"format": FORMAT, "config": {"tokenizer": tokenizer.config.model_dump()}, "facts": facts}
    _write(path, _tokenizer_tensors(tokenizer), metadata)


def load_tokenizer(path: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """Read a tokenizer or model file: the tokenizer in eval mode, and its facts.

    Raises:
        ModelError: missing, damaged, or not a tokenizer.
    """
    metadata, tensors = _read(path)
    config = _validate(TokenizerConfig, metadata["config"]["tokenizer"], path)
    return _build_tokenizer(config, tensors, path), metadata["facts"]


def save_model(
    path: Path,
    name: str,
    tokenizer: Tokenizer,
    entropy_model: EntropyModel,
    quality: QualityRange,
    facts: dict[str, Any],
) -> bytes:
    """Export a trained pair to a model file; returns its model id."""
    from pqmim.exact_inference import export

    tensors = _tokenizer_tensors(tokenizer)
    tensors.update({f"entropy.{key}": tensor for key, tensor in export(entropy_model).items()})
    config = {
        "tokenizer": tokenizer.config.model_dump(),
        "entropy": entropy_model.config.model_dump(),
        "quality": quality.model_dump(),
    }
    model_id = compute_model_id(config, tensors)
    metadata = {"format": FORMAT, "name": name, "model_id": model_id.hex(), "config": config, "facts": facts}
    _write(path, tensors, metadata)
    return model_id


def load_model(path: Path) -> LoadedModel:
    """Read a model file and check its id.

    Raises:
        ModelError: missing, damaged, or not a complete model.
    """
    metadata, tensors = _read(path)
    if "model_id" not in metadata:
        raise ModelError(f"{path}: a tokenizer without an entropy model; train one with `pqmim train entropy`")
    config = metadata["config"]
    model_id = compute_model_id(config, tensors)
    if model_id.hex() != metadata["model_id"]:
        raise ModelError(f"{path}: damaged model file (its content does not match its id)")
    prefix = "entropy."
    return LoadedModel(
        name=metadata["name"],
        model_id=model_id,
        tokenizer=_build_tokenizer(_validate(TokenizerConfig, config["tokenizer"], path), tensors, path),
        entropy_config=_validate(EntropyModelConfig, config["entropy"], path),
        entropy_tensors={n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)},
        quality=_validate(QualityRange, config["quality"], path),
        facts=metadata["facts"],
    )
