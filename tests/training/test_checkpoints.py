"""Tokenizer files: what is written is read, also by the library whose format it is."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training.tiny_networks import make_tiny_tokenizer

from pqmim.errors import ModelError, OutputError
from pqmim.model_files import TOKENIZER_FORMAT, load_model
from pqmim.training.checkpoints import load_tokenizer, save_tokenizer, stored, write_file


def test_tokenizer_round_trip(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    path = tmp_path / "tokenizer.safetensors"
    save_tokenizer(path, tokenizer, {"photos": 6})
    loaded, facts = load_tokenizer(path)
    assert facts == {"photos": 6}
    assert loaded.config == tokenizer.config
    for name, tensor in tokenizer.state_dict().items():
        expected = tensor.half().float() if tensor.is_floating_point() else tensor
        assert torch.equal(loaded.state_dict()[name], expected), name
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(ModelError, match="without an entropy model"):
        load_model(path)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_files_of_earlier_versions_are_refused_by_name(tmp_path: Path, version: int) -> None:
    path = tmp_path / "tokenizer.safetensors"
    write_file(path, {}, {"format": f"pqmim model {version}", "config": {}, "facts": {}})
    with pytest.raises(ModelError, match=r"tokenizer\.safetensors: a model of pqmim 0\.4 or before"):
        load_tokenizer(path)


def test_the_layout_is_that_of_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    tensors = {
        "b": np.arange(7, dtype=np.int8),
        "a": np.linspace(0, 1, 6, dtype=np.float16).reshape(2, 3),
        "empty": np.empty((0, 4), np.int32),
        "number": np.array(5, np.int64),
        "c": np.arange(64, dtype=np.uint8),
        "d": np.arange(3, dtype=np.float32),
    }
    write_file(path, tensors, {"name": "ä"})
    loaded = load_file(path)
    assert {name for name in loaded if not name.startswith("padding.")} == tensors.keys()
    for name, tensor in tensors.items():
        assert np.array_equal(loaded[name].numpy(), tensor), name
        assert loaded[name].numpy().dtype == tensor.dtype
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert all((8 + length + header[name]["data_offsets"][0]) % 64 == 0 for name in tensors)
    assert json.loads(header["__metadata__"]["pqmim"]) == {"name": "ä"}


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("quantizer.order", r"weights lack tokenizer\.quantizer\.order"),
        ("quantizer.sizes", r"weights lack tokenizer\.quantizer\.sizes"),
        ("analysis.linear", "weights do not fit"),
        ("synthesis.head.weight", "weights do not fit"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, name: str, problem: str) -> None:
    path = tmp_path / "t.safetensors"
    tokenizer = make_tiny_tokenizer()
    tensors = stored(tokenizer, "")
    metadata = {"format": TOKENIZER_FORMAT, "config": tokenizer.config.as_dict(), "facts": {}}
    write_file(path, {key: tensor for key, tensor in tensors.items() if not key.endswith(name)}, metadata)
    with pytest.raises(ModelError, match=r"t\.safetensors: " + problem):
        load_tokenizer(path)


def test_settings_of_another_version(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_file(path, {}, {"format": TOKENIZER_FORMAT, "config": {"color": 1}, "facts": {}})
    with pytest.raises(ModelError, match="color is not a known setting"):
        load_tokenizer(path)


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file"):
        save_tokenizer(tmp_path / "none" / "t.safetensors", make_tiny_tokenizer(), {})
