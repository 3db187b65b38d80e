"""Model files: what is written is read, and whatever is wrong with one is said in a line."""

import json
import struct
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_entropy_model, make_tiny_tokenizer

from pqmim.checkpoints import (
    MODEL_FILE,
    find_model,
    load_model,
    load_tokenizer,
    read_metadata,
    save_model,
    save_tokenizer,
    shipped_model_of,
    shipped_models,
)
from pqmim.config import QualityRange
from pqmim.errors import ModelError, ModelMismatchError, OutputError


@pytest.fixture
def model_file(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    path = tmp_path / MODEL_FILE
    path.write_bytes((tiny_model / MODEL_FILE).read_bytes())
    return path


def with_metadata(path: Path, **changes: object) -> None:
    """Change entries of the metadata and nothing else."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = json.loads(header["__metadata__"]["pqmim"]) | changes
    header["__metadata__"]["pqmim"] = json.dumps({k: v for k, v in metadata.items() if v is not None})
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])


def test_round_trip(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    entropy_model = make_tiny_entropy_model(tokenizer)
    path = tmp_path / "m.safetensors"
    quality = QualityRange(w_at_0=20, w_at_100=0.2)
    model_id = save_model(path, "mine", tokenizer, entropy_model, quality, {"description": "a test"})
    model = load_model(path)
    assert model.model_id == model_id
    assert len(model_id) == 4
    assert model.name == "mine"
    assert model.quality == quality
    assert model.facts == {"description": "a test"}
    assert model.entropy_config == entropy_model.config
    for name, tensor in tokenizer.state_dict().items():
        loaded = model.tokenizer.state_dict()[name]
        assert torch.equal(loaded, tensor.half().float() if tensor.is_floating_point() else tensor), name
    assert read_metadata(path)["model_id"] == model_id.hex()
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_id_tells_models_apart_and_is_not_the_name(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    entropy_model = make_tiny_entropy_model(tokenizer)
    quality = QualityRange()

    def model_id(name: str = "a", quality: QualityRange = quality) -> bytes:
        return save_model(tmp_path / "m.safetensors", name, tokenizer, entropy_model, quality, {})

    first = model_id()
    assert model_id(name="b") == first
    assert model_id(quality=QualityRange(w_at_0=31)) != first
    with torch.no_grad():
        tokenizer.quantizer.codebook[0, 0] += 1
    assert model_id() != first


def test_tokenizer_round_trip(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    path = tmp_path / "tokenizer.safetensors"
    save_tokenizer(path, tokenizer, {"photos": 6})
    loaded, facts = load_tokenizer(path)
    assert facts == {"photos": 6}
    assert loaded.config == tokenizer.config
    assert torch.equal(loaded.quantizer.order, tokenizer.quantizer.order)
    with pytest.raises(ModelError, match="without an entropy model"):
        load_model(path)


def test_folder_name_and_path(tiny_model: Path) -> None:
    assert find_model(tiny_model) == tiny_model / MODEL_FILE
    assert find_model(tiny_model / MODEL_FILE) == tiny_model / MODEL_FILE
    for missing in ("no-such-model", tiny_model / "none.safetensors", tiny_model.parent):
        with pytest.raises(ModelError, match="no such model"):
            find_model(missing)


def test_shipped_models_are_whole() -> None:
    largest = {"small": 12_000_000, "base": 26_000_000}
    assert {shipped.name for shipped in shipped_models()} == largest.keys()
    for shipped in shipped_models():
        assert load_model(shipped.path).model_id == shipped.model_id
        assert shipped_model_of(shipped.model_id) == shipped
        assert find_model(shipped.name) == shipped.path
        assert shipped.path.stat().st_size <= largest[shipped.name]
    with pytest.raises(ModelMismatchError, match="00000000"):
        shipped_model_of(bytes(4))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        load_model(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 7, b"\xff" * 64, struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 9) + b"not json.", b"\x89PNG" * 9],
)
def test_other_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="not a model file"):
        load_model(path)


def test_damage_anywhere_is_found(model_file: Path) -> None:
    whole = model_file.read_bytes()
    model_id = load_model(model_file).model_id
    for position in range(8, len(whole), max(1, len(whole) // 150)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        model_file.write_bytes(bytes(damaged))
        try:
            found = load_model(model_file).model_id
        except ModelError:
            continue
        assert found == model_id  # a letter of the name or the description, which decide nothing
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        model_file.write_bytes(whole[:length])
        with pytest.raises(ModelError):
            load_model(model_file)


def test_wrong_id(model_file: Path) -> None:
    with_metadata(model_file, model_id="00000000")
    with pytest.raises(ModelError, match="does not match its id"):
        load_model(model_file)


def test_other_version(model_file: Path) -> None:
    with_metadata(model_file, format="pqmim model 2")
    with pytest.raises(ModelError, match="version"):
        load_model(model_file)


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        save_tokenizer(tmp_path / "none" / "t.safetensors", make_tiny_tokenizer(), {})
