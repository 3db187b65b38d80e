"""Model files: what is read, and whatever is wrong with one is said in a line."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pqmim.config import ModelConfig, QualityRange
from pqmim.errors import ModelError, ModelMismatchError
from pqmim.model_files import (
    MODEL_FILE,
    MODEL_FORMAT,
    content_hash,
    find_model,
    load_model,
    name_of_id,
    parse_tensors,
    read_metadata,
    shipped_model_of,
    shipped_models,
)


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


def test_content(tiny_model: Path) -> None:
    model = load_model(tiny_model / MODEL_FILE)
    assert model.name == "tiny"
    assert len(model.model_id) == 4
    assert model.config.quality == QualityRange(w_at_0=60, w_at_100=0.25)
    config, sizes = model.config.tokenizer.quantizer, model.tensors["tokenizer.quantizer.sizes"]
    assert sizes.shape == (config.num_levels, config.num_subquantizers)
    codebook = model.tensors["tokenizer.quantizer.codebook"]
    assert codebook.dtype == np.float16
    assert codebook.shape == (sizes.sum(),)  # of one channel each
    assert model.tensors["entropy.embed.0.weight"].dtype == np.int8
    assert "analysis" in model.graphs
    assert not any("synthesis" in name for name in (*model.graphs, *model.tensors))
    for graph in model.graphs.values():
        assert graph.model
        for tensor in graph.weights.values():
            assert tensor.format(layer=0) in model.tensors
    with pytest.raises(ValueError, match="read-only"):
        codebook[0] = 0


def test_from_bytes(tiny_model: Path) -> None:
    path = tiny_model / MODEL_FILE
    from_disk, from_bytes = load_model(path), load_model(path.read_bytes())
    assert from_bytes.model_id == from_disk.model_id
    assert from_bytes.graphs == from_disk.graphs
    with pytest.raises(ModelError, match="token model: not a model file"):
        load_model(b"something else")


def test_every_tensor_begins_at_a_multiple_of_64_bytes(tiny_model: Path) -> None:
    data = (tiny_model / MODEL_FILE).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    starts = [entry["data_offsets"][0] for name, entry in header.items() if not name.startswith(("__", "padding."))]
    assert starts
    assert all((8 + length + start) % 64 == 0 for start in starts)


def test_folder_name_and_path(tiny_model: Path) -> None:
    assert find_model(tiny_model) == tiny_model / MODEL_FILE
    assert find_model(tiny_model / MODEL_FILE) == tiny_model / MODEL_FILE
    for missing in ("no-such-model", tiny_model / "none.safetensors", tiny_model.parent):
        with pytest.raises(ModelError, match="no such model"):
            find_model(missing)


def test_shipped_models_are_whole() -> None:
    (shipped,) = shipped_models()
    assert shipped.name == "photo"
    assert name_of_id(shipped.model_id[:2]) == f"{shipped.model_id[:2].hex()} (photo)"
    assert load_model(shipped.path).model_id == shipped.model_id
    assert shipped_model_of(shipped.model_id) == shipped
    assert find_model(shipped.name) == shipped.path
    assert shipped.path.stat().st_size <= 11_100_000
    with pytest.raises(ModelMismatchError, match="00000000"):
        shipped_model_of(bytes(4))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        load_model(tmp_path / "none.safetensors")
    with pytest.raises(ModelError, match="No such file"):
        read_metadata(tmp_path / "none.safetensors", MODEL_FORMAT)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        b"\xff" * 64,
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 9) + b"not json.",
        b"\x89PNG" * 9,
        struct.pack("<Q", 40_000) + b"[" * 40_000,
    ],
)
def test_other_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    for read in (load_model, lambda path: read_metadata(path, MODEL_FORMAT)):
        with pytest.raises(ModelError, match="not a model file"):
            read(path)


def test_damage_anywhere_is_found(model_file: Path) -> None:
    whole = model_file.read_bytes()
    model = load_model(model_file)
    for position in range(8, len(whole), max(1, len(whole) // 150)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        try:
            found = load_model(bytes(damaged))
        except ModelError:
            continue
        # Between the tensors, where nothing is.
        assert (found.model_id, found.graphs, found.facts) == (model.model_id, model.graphs, model.facts)
        assert all(np.array_equal(tensor, model.tensors[name]) for name, tensor in found.tensors.items())
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        with pytest.raises(ModelError):
            load_model(whole[:length])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_id": "00000000"}, "does not match its hash"),
        ({"content_hash": "0" * 64}, "does not match its hash"),
        ({"content_hash": None}, "does not match its hash"),
        ({"graphs": {}}, "does not match its hash"),
        ({"name": "another"}, "does not match its hash"),
        ({"format": "pqmim model 2"}, "a model of pqmim 0.4 or before, which this version does not read"),
        ({"format": "pqmim model 3"}, "a model of pqmim 0.4 or before, which this version does not read"),
        ({"format": "pqmim model 5"}, "not a model file of this version"),
        ({"format": "pqmim decoder 1"}, "this is a decoder, not a token model"),
        ({"format": "pqmim tokenizer 2"}, "this is a tokenizer without an entropy model"),
        ({"facts": None}, "not a model file"),
    ],
)
def test_wrong_metadata(model_file: Path, changes: dict[str, Any], message: str) -> None:
    with_metadata(model_file, **changes)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(model_file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_id": "00000000"}, "does not match its id"),
        ({"graphs": {"none": {}}}, "damaged"),
        ({"graphs": None}, "damaged"),
        ({"config": {}}, "configuration of another version of pqmim: tokenizer is missing"),
    ],
)
def test_files_that_were_written_wrongly(model_file: Path, changes: dict[str, Any], message: str) -> None:
    """Their hash fits."""
    with_metadata(model_file, **changes)
    metadata = read_metadata(model_file, MODEL_FORMAT)
    with_metadata(model_file, content_hash=content_hash(metadata, parse_tensors(model_file.read_bytes(), "")))
    with pytest.raises(ModelError, match=message):
        load_model(model_file)


@pytest.mark.parametrize("name", ["small", "base"])
def test_names_of_earlier_models_say_what_they_have_become(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=f"^{name}: .*small is the decoder fast of the model photo, base .* fine"):
        find_model(name)


def without(settings: dict[str, Any], part: str, name: str) -> dict[str, Any]:
    return {**settings, part: {key: value for key, value in settings[part].items() if key != name}}


def test_settings_are_read_strictly(tiny_model: Path) -> None:
    settings = json.loads(json.dumps(load_model(tiny_model / MODEL_FILE).config.as_dict()))
    assert ModelConfig.from_dict(settings).as_dict() == load_model(tiny_model / MODEL_FILE).config.as_dict()
    for wrong, message in (
        ({**settings, "color": 1}, "color is not a known setting"),
        ({key: value for key, value in settings.items() if key != "entropy"}, "entropy is missing"),
        (without(settings, "entropy", "width"), "entropy.width is missing"),
        ({**settings, "quality": {"w_at_0": "60", "w_at_100": 1.0}}, "quality.w_at_0 is of the wrong type"),
        ({**settings, "quality": {"w_at_0": True, "w_at_100": 1.0}}, "quality.w_at_0 is of the wrong type"),
        ({**settings, "quality": {"w_at_0": 0, "w_at_100": 1.0}}, "w_at_0 must be above 0"),
        ({**settings, "quality": {"w_at_0": 1e999, "w_at_100": 1.0}}, "w_at_0 must be above 0"),
        (
            {**settings, "entropy": {**settings["entropy"], "group_steps": 5}},
            "entropy.group_steps is of the wrong type",
        ),
        ({**settings, "entropy": {**settings["entropy"], "width": 32.0}}, "entropy.width is of the wrong type"),
        (
            {**settings, "entropy": {**settings["entropy"], "group_sizes": [5.0]}},
            "entropy.group_sizes is of the wrong type",
        ),
        (
            {**settings, "entropy": {**settings["entropy"], "group_sizes": [5, 1]}},
            "group_sizes must name all groups of group_steps but the last",
        ),
        ({**settings, "entropy": {**settings["entropy"], "group_sizes": [8]}}, "a group has at least 1 of 8"),
        ({**settings, "quality": {**settings["quality"], "w_at_0": True}}, "quality.w_at_0 is of the wrong type"),
        ({**settings, "tokenizer": 5}, "tokenizer must be settings by name"),
        ([settings], "ModelConfig must be settings by name"),
    ):
        with pytest.raises(ValueError, match=message):
            ModelConfig.from_dict(wrong)
