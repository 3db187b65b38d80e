"""Writing model files, and reading tokenizers back for training.

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
import torch
from numpy.typing import NDArray

from pqmim.config import TokenizerConfig
from pqmim.errors import ModelError, OutputError
from pqmim.model_files import DTYPES, FORMAT, parse_metadata, parse_tensors
from pqmim.training.tokenizer import Tokenizer

ALIGNMENT = 64
PREFIX = "tokenizer."


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
            add(f"padding.{len(parts)}", "U8", (gap,), bytes(gap))
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


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Metadata and tensors of a tokenizer or model file, of this version or an earlier one; nothing else is checked.

    Raises:
        ModelError: missing, damaged, or not one of ours.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    return parse_metadata(data, str(path)), parse_tensors(data, str(path))


def tokenizer_tensors(tokenizer: Tokenizer) -> dict[str, NDArray[Any]]:
    """State of a tokenizer as stored: floats in half precision, index buffers as they are."""
    return {
        PREFIX + name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous().cpu().numpy()
        for name, tensor in sorted(tokenizer.state_dict().items())
    }


def tokenizer_of(settings: object, tensors: Mapping[str, NDArray[Any]], path: Path) -> Tokenizer:
    """Tokenizer in eval mode, float32, from what a file holds.

    Args:
        settings: of a `TokenizerConfig`, from JSON.

    Raises:
        ModelError: they do not fit together.
    """
    state = {n.removeprefix(PREFIX): torch.from_numpy(t.copy()) for n, t in tensors.items() if n.startswith(PREFIX)}
    try:
        tokenizer = Tokenizer(TokenizerConfig.from_dict(settings), num_kept=len(state["quantizer.order"]))
        tokenizer.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in state.items()})
    except ValueError as error:
        raise ModelError(f"{path}: configuration of another version of pqmim: {error}") from error
    except (KeyError, RuntimeError) as error:
        raise ModelError(f"{path}: tokenizer weights do not fit the configuration") from error
    return tokenizer.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def save_tokenizer(path: Path, tokenizer: Tokenizer, facts: dict[str, Any]) -> None:
    """Write a trained tokenizer, the input of `pqmim train entropy`."""
    metadata = {"format": FORMAT, "config": {"tokenizer": tokenizer.config.as_dict()}, "facts": facts}
    write_file(path, tokenizer_tensors(tokenizer), metadata)


def load_tokenizer(path: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """Read a tokenizer or model file: the tokenizer in eval mode, and its facts.

    Raises:
        ModelError: missing, damaged, or not a tokenizer.
    """
    metadata, tensors = read_file(path)
    return tokenizer_of(metadata["config"].get("tokenizer"), tensors, path), metadata["facts"]
