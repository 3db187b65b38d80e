"""Training goes on from the integers of a token model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from training.tiny_networks import make_tiny_entropy_model, make_tiny_tokenizer

from pqmim.errors import ConfigError, ModelError
from pqmim.model_files import ENTROPY_PREFIX, load_model
from pqmim.training.entropy_model import EntropyModel
from pqmim.training.export import export_entropy
from pqmim.training.import_entropy import import_entropy
from pqmim.training.train_entropy_model import take_over_weights

TINY = Path(__file__).parents[1] / "data" / "tiny"


def untrained() -> EntropyModel:
    tokenizer = make_tiny_tokenizer()
    torch.manual_seed(5)
    return EntropyModel.for_quantizer(make_tiny_entropy_model(tokenizer).config, tokenizer.quantizer)


@pytest.mark.parametrize("path", [TINY, TINY / "model.safetensors"])
def test_integers_survive_the_way_there_and_back(path: Path) -> None:
    model, file = untrained(), load_model(TINY / "model.safetensors")
    take_over_weights(model, path)
    wanted = {
        name.removeprefix(ENTROPY_PREFIX): tensor
        for name, tensor in file.tensors.items()
        if name.startswith(ENTROPY_PREFIX)
    }
    found = export_entropy(model)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if tensor.dtype == np.float32:
            assert np.allclose(found[name], tensor, rtol=1e-6), name
        else:
            assert np.array_equal(found[name], tensor), name


def test_every_weight_is_found() -> None:
    state, parameters = import_entropy(load_model(TINY / "model.safetensors")), dict(untrained().named_parameters())
    assert state.keys() - parameters.keys() == {"token_values"}
    assert {name: tensor.shape for name, tensor in state.items() if name in parameters} == {
        name: parameter.shape for name, parameter in parameters.items()
    }


def test_what_is_no_earlier_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"no weights")
    (tmp_path / "model.safetensors").write_bytes(b"no model")
    with pytest.raises(ConfigError, match=r"weights\.pt"):
        take_over_weights(untrained(), tmp_path / "weights.pt")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        take_over_weights(untrained(), tmp_path)
