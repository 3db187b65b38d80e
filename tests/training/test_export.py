"""Export: what training made is in the files, ids depend on what they name, graphs can be renewed."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from make_tiny_model import make_tiny_model
from training.tiny_networks import TINY_QUALITY, make_tiny_entropy_model, make_tiny_synthesis, make_tiny_tokenizer

from pqmim.config import ModelConfig, QualityRange, TokensConfig
from pqmim.decoder_files import DecoderFile, decoders_beside, load_decoder
from pqmim.errors import ModelError
from pqmim.model_files import (
    DECODER_FORMAT,
    MODEL_FILE,
    MODEL_FORMAT,
    ModelFile,
    load_file,
    load_model,
    read_metadata,
    shipped_models,
)
from pqmim.training.checkpoints import load_synthesis, load_tokenizer
from pqmim.training.export import export_entropy, main, renew_graphs, save_decoder, save_model


def test_round_trip(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    entropy_model = make_tiny_entropy_model(tokenizer)
    quality = QualityRange(w_at_0=20, w_at_100=0.2)
    model_id = save_model(tmp_path, "mine", tokenizer, entropy_model, quality, {"description": "a test"})
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "fast.safetensors"}
    model, decoder = load_model(tmp_path / MODEL_FILE), load_decoder(tmp_path / "fast.safetensors")
    assert (model.model_id, decoder.token_model) == (model_id, model_id)
    assert (model.name, decoder.name) == ("mine", "fast")
    assert model.facts == {"description": "a test"}
    parts = TokensConfig(tokenizer.config.autoencoder.analysis, tokenizer.config.quantizer)
    assert model.config == ModelConfig(parts, entropy_model.config, quality)
    assert decoder.config == tokenizer.config.autoencoder.synthesis
    for name, tensor in export_entropy(entropy_model).items():
        assert np.array_equal(model.tensors[f"entropy.{name}"], tensor), name
    loaded, facts = load_tokenizer(tmp_path)
    assert loaded.config == tokenizer.config
    assert facts == model.facts
    for name, tensor in tokenizer.state_dict().items():
        expected = tensor.half().float() if tensor.is_floating_point() else tensor
        assert torch.equal(loaded.state_dict()[name], expected), name
    assert read_metadata(tmp_path / MODEL_FILE, MODEL_FORMAT)["model_id"] == model_id.hex()


def test_the_id_covers_what_decides_tokens_and_nothing_else(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    entropy_model = make_tiny_entropy_model(tokenizer)

    def model_id(name: str = "a", quality: QualityRange = TINY_QUALITY) -> bytes:
        return save_model(tmp_path, name, tokenizer, entropy_model, quality, {})

    first = model_id()
    assert model_id(name="b") == first
    assert model_id(quality=QualityRange(w_at_0=31)) == first
    with torch.no_grad():
        tokenizer.synthesis.head.bias += 1
        tokenizer.analysis.head.bias += 1
        assert model_id() == first
        for parameter in (tokenizer.quantizer.codebook, tokenizer.quantizer.prior_logits, entropy_model.head.bias):
            parameter += 1
            changed = model_id()
            assert changed != first
            first = changed


def test_decoders_are_told_apart_by_what_makes_pictures(tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "mine.safetensors", make_tiny_tokenizer()

    def decoder_id(name: str = "a", token_model: bytes = b"abcd") -> bytes:
        found = save_decoder(path, name, tokenizer.synthesis, token_model, {"photos": 6})
        decoder = load_decoder(path)
        assert (decoder.decoder_id, decoder.name, decoder.facts) == (found, name, {"photos": 6})
        assert (decoder.token_model, decoder.faithful) == (token_model, None)
        return found

    first = decoder_id()
    assert decoder_id("b") == decoder_id(token_model=b"efgh") == first
    with torch.no_grad():
        tokenizer.synthesis.head.bias += 1
    assert decoder_id() != first


def test_a_fine_tuned_decoder_holds_the_difference(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    start, own = (make_tiny_synthesis(tokenizer, noise=noise) for noise in (0.0, 0.02))
    path = tmp_path / "vivid.safetensors"
    save_decoder(tmp_path / "fine.safetensors", "fine", start, bytes(4), {})
    faithful = load_decoder(tmp_path / "fine.safetensors")
    save_decoder(path, "vivid", own, bytes(4), {}, faithful=faithful)
    assert path.stat().st_size < 0.9 * (tmp_path / "fine.safetensors").stat().st_size
    read, decoder = load_synthesis(path)
    assert decoder.faithful == faithful.decoder_id != decoder.decoder_id
    for name, tensor in own.state_dict().items():
        moved = (tensor - start.state_dict()[name]).abs().amax()
        error = (read.state_dict()[name] - tensor).abs().amax()
        assert error <= moved / 200 + 1e-3 * tensor.abs().amax(), name  # half a unit of int8, and half precision
    stored_before = path.read_bytes()
    renew_graphs(path, tmp_path / "renewed.safetensors")
    assert (tmp_path / "renewed.safetensors").read_bytes() == stored_before


def test_what_stayed_is_not_in_the_file_of_a_fine_tuned_decoder(tmp_path: Path) -> None:
    start = make_tiny_tokenizer().synthesis
    save_decoder(tmp_path / "fine.safetensors", "fine", start, bytes(4), {})
    own = copy.deepcopy(start)
    with torch.no_grad():
        own.head.weight += 0.1
    path, faithful = tmp_path / "vivid.safetensors", load_decoder(tmp_path / "fine.safetensors")
    save_decoder(path, "vivid", own, bytes(4), {}, faithful=faithful)
    names = [name for name in load_file(path, DECODER_FORMAT)[1] if not name.startswith(("graph.", "padding"))]
    assert sorted(names) == ["difference.head.weight", "unit.head.weight"]
    for realism in (0.0, 0.3, 1.0):
        read = load_decoder(path, realism=realism).tensors
        moved = {name for name, tensor in faithful.tensors.items() if not np.array_equal(tensor, read[name])}
        assert moved == ({"synthesis.head.weight"} if realism else set())


def test_a_synthesis_is_read_back(tmp_path: Path) -> None:
    synthesis = make_tiny_tokenizer().synthesis
    save_decoder(tmp_path / "a.safetensors", "a", synthesis, bytes(4), {})
    loaded, decoder = load_synthesis(tmp_path / "a.safetensors")
    assert decoder.name == "a"
    assert not loaded.training
    for name, tensor in synthesis.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float()), name


def test_a_tokenizer_of_a_token_model_and_another_decoder(tiny_model: Path) -> None:
    """What decoders are trained on, and what a larger tokenizer starts from."""
    fine, fast = load_tokenizer(tiny_model)[0], load_tokenizer(tiny_model / MODEL_FILE, "fast")[0]
    assert fine.config.autoencoder.synthesis_blocks == (2, 0, 1)
    assert fast.config.autoencoder.synthesis_blocks is None
    assert torch.equal(fine.quantizer.codebook, fast.quantizer.codebook)
    with pytest.raises(ModelError, match="no such decoder"):
        load_tokenizer(tiny_model, "slow")


def test_weights_in_a_graph_are_where_they_are_in_the_file(tmp_path: Path) -> None:
    make_tiny_model(tmp_path)
    found = 0
    for path in tmp_path.iterdir():
        if path.name == "vivid.safetensors":  # it holds differences
            continue
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        file = load_model(path) if path.name == MODEL_FILE else load_decoder(path)
        for graph in file.graphs.values():
            for weight in onnx.load_from_string(graph.model).graph.initializer:
                tensor = graph.weights.get(weight.name, "{")
                if "{" not in tensor:
                    where = {entry.key: entry.value for entry in weight.external_data}
                    begin = start + int(where["offset"])
                    assert data[begin : begin + int(where["length"])] == file.tensors[tensor].tobytes(), tensor
                    found += 1
    assert found > 20


def test_graphs_are_renewed_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_id = make_tiny_model(tmp_path)
    renewed = tmp_path / "renewed"
    for path in list(tmp_path.glob("*.safetensors")):
        found = renew_graphs(path, renewed)
        assert (found == model_id) == (path.name == MODEL_FILE)
        assert renewed.read_bytes() == path.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["export", str(tmp_path / MODEL_FILE), str(renewed)])
        main()
        assert model_id.hex() in capsys.readouterr().out
        patch.setattr("sys.argv", ["export", str(tmp_path / "none.safetensors"), str(renewed)])
        with pytest.raises(SystemExit, match=r"^pqmim: .*none\.safetensors: No such file"):
            main()


def test_graphs_of_the_shipped_files_are_those_of_today(tmp_path: Path) -> None:
    for shipped in shipped_models():
        for path in (shipped.path, *(decoder.path for decoder in decoders_beside(shipped.path))):
            renew_graphs(path, tmp_path / "m.safetensors")
            assert (tmp_path / "m.safetensors").read_bytes() == path.read_bytes(), path


def test_tiny_model_of_the_tests_is_what_its_script_makes(tiny_model: Path, tmp_path: Path) -> None:
    """But for what differs between processors: clustering in floating point."""
    make_tiny_model(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in tiny_model.iterdir()}
    for path in tmp_path.iterdir():
        load: Callable[[Path], ModelFile | DecoderFile] = load_model if path.name == MODEL_FILE else load_decoder
        made, kept = load(path), load(tiny_model / path.name)
        assert made.config == kept.config
        assert made.graphs == kept.graphs
        assert made.tensors.keys() == kept.tensors.keys()
        for name, tensor in made.tensors.items():
            assert tensor.dtype == kept.tensors[name].dtype, name
            difference = np.abs(tensor.astype(float) - kept.tensors[name].astype(float))
            assert np.quantile(difference, 0.9) <= 1e-2 * max(1.0, np.abs(tensor.astype(float)).max()), name
