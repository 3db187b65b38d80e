"""Export: what training made is in the file, its id depends on what decides the tokens, graphs can be renewed."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from make_tiny_model import make_tiny_model
from safetensors.torch import load_file, save_file
from training.tiny_networks import TINY_QUALITY, make_tiny_entropy_model, make_tiny_tokenizer

from pqmim.config import ModelConfig, QualityRange
from pqmim.errors import ModelError
from pqmim.model_files import MODEL_FILE, load_model, read_metadata, shipped_models
from pqmim.training.checkpoints import load_tokenizer
from pqmim.training.export import export_entropy, main, renew_graphs, save_model


def test_round_trip(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    entropy_model = make_tiny_entropy_model(tokenizer)
    path = tmp_path / "m.safetensors"
    quality = QualityRange(w_at_0=20, w_at_100=0.2)
    model_id = save_model(path, "mine", tokenizer, entropy_model, quality, {"description": "a test"})
    model = load_model(path)
    assert model.model_id == model_id
    assert model.name == "mine"
    assert model.facts == {"description": "a test"}
    assert model.config == ModelConfig(tokenizer.config, entropy_model.config, quality)
    for name, tensor in export_entropy(entropy_model).items():
        assert np.array_equal(model.tensors[f"entropy.{name}"], tensor), name
    loaded, _ = load_tokenizer(path)
    assert torch.equal(loaded.quantizer.codebook, tokenizer.quantizer.codebook.half().float())
    assert read_metadata(path)["model_id"] == model_id.hex()
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_id_tells_models_apart_and_is_not_the_name(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    entropy_model = make_tiny_entropy_model(tokenizer)

    def model_id(name: str = "a", quality: QualityRange = TINY_QUALITY) -> bytes:
        return save_model(tmp_path / "m.safetensors", name, tokenizer, entropy_model, quality, {})

    first = model_id()
    assert model_id(name="b") == first
    assert model_id(quality=QualityRange(w_at_0=31)) != first
    with torch.no_grad():
        tokenizer.quantizer.codebook[0, 0] += 1
    assert model_id() != first


def test_weights_in_a_graph_are_where_they_are_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    make_tiny_model(path)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    model = load_model(path)
    found = 0
    for graph in model.graphs.values():
        for weight in onnx.load_from_string(graph.model).graph.initializer:
            tensor = graph.weights.get(weight.name, "{")
            if "{" not in tensor:
                where = {entry.key: entry.value for entry in weight.external_data}
                begin = start + int(where["offset"])
                assert data[begin : begin + int(where["length"])] == model.tensors[tensor].tobytes(), tensor
                found += 1
    assert found > 20


def test_graphs_are_renewed_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also those of a file of before there were graphs: the id, which every coded file holds, must stay."""
    model_id = make_tiny_model(tmp_path / "new.safetensors")
    renewed = tmp_path / "renewed.safetensors"
    assert renew_graphs(tmp_path / "new.safetensors", renewed) == model_id
    assert renewed.read_bytes() == (tmp_path / "new.safetensors").read_bytes()

    metadata = read_metadata(renewed) | {"format": "pqmim model 1"}
    for name in ("graphs", "graphs_hash"):
        del metadata[name]
    weights = {n: t for n, t in load_file(renewed).items() if n.startswith(("tokenizer.", "entropy."))}
    old = tmp_path / "old.safetensors"
    save_file(weights, old, metadata={"pqmim": json.dumps(metadata)})
    with pytest.raises(ModelError, match=r"earlier version; convert it with `python -m pqmim\.training\.export`"):
        load_model(old)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["export", str(old), str(renewed)])
        main()
    assert model_id.hex() in capsys.readouterr().out
    assert renewed.read_bytes() == (tmp_path / "new.safetensors").read_bytes()

    save_file(
        {**weights, "entropy.embed.0.bias": weights["entropy.embed.0.bias"] + 1}, old, {"pqmim": json.dumps(metadata)}
    )
    with pytest.raises(ModelError, match="does not match its id"):
        renew_graphs(old, renewed)


def test_graphs_of_the_shipped_models_are_those_of_today(tmp_path: Path) -> None:
    for shipped in shipped_models():
        renew_graphs(shipped.path, tmp_path / "m.safetensors")
        assert load_model(tmp_path / "m.safetensors").graphs == load_model(shipped.path).graphs, shipped.name


def test_tiny_model_of_the_tests_is_what_its_script_makes(tiny_model: Path, tmp_path: Path) -> None:
    """But for what differs between processors: clustering in floating point."""
    make_tiny_model(tmp_path / MODEL_FILE)
    made, kept = load_model(tmp_path / MODEL_FILE), load_model(tiny_model / MODEL_FILE)
    assert made.config == kept.config
    assert made.graphs == kept.graphs
    assert made.tensors.keys() == kept.tensors.keys()
    for name, tensor in made.tensors.items():
        assert tensor.dtype == kept.tensors[name].dtype, name
        difference = np.abs(tensor.astype(float) - kept.tensors[name].astype(float))
        assert np.quantile(difference, 0.9) <= 1e-2 * max(1.0, np.abs(tensor.astype(float)).max()), name
