"""What the codec in PyTorch still loads; goes with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pqmim.config import EntropyModelConfig, ModelConfig, QualityRange
from pqmim.errors import ModelError
from pqmim.model_files import (
    MODEL_FILE,
    compute_model_id,
    find_model,
    read_metadata,
    shipped_model_of,
    shipped_models,
)

if TYPE_CHECKING:  # the table of models is read without torch
    from torch import Tensor

    from pqmim.training.tokenizer import Tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """Content of a model file, for the codec in PyTorch."""

    name: str
    model_id: bytes
    tokenizer: Tokenizer
    entropy_config: EntropyModelConfig
    entropy_tensors: dict[str, Tensor]
    quality: QualityRange
    facts: dict[str, Any]


def load_model(path: Path) -> LoadedModel:
    """Read a model file of either format and check its id."""
    import torch

    from pqmim.training.checkpoints import read_file, tokenizer_of

    metadata, tensors = read_file(path)
    if "model_id" not in metadata:
        raise ModelError(f"{path}: a tokenizer without an entropy model; train one with `pqmim train entropy`")
    model_id = compute_model_id(metadata["config"], tensors)
    if model_id.hex() != metadata["model_id"]:
        raise ModelError(f"{path}: damaged model file (its content does not match its id)")
    config = ModelConfig.from_dict(metadata["config"])
    prefix = "entropy."
    entropy = {n.removeprefix(prefix): torch.from_numpy(t.copy()) for n, t in tensors.items() if n.startswith(prefix)}
    tokenizer = tokenizer_of(metadata["config"]["tokenizer"], tensors, path)
    return LoadedModel(
        metadata["name"], model_id, tokenizer, config.entropy, entropy, config.quality, metadata["facts"]
    )
