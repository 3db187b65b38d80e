"""Training of the analysis under the bits of the masked model: what is differentiated, what stays, what it gains."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training.test_training import logged, until_done
from training.tiny_networks import make_tiny_entropy_model, make_tiny_tokenizer

from pqmim.decoder_files import load_decoder
from pqmim.errors import ConfigError
from pqmim.model_files import load_model
from pqmim.training import train_analysis
from pqmim.training.recipes import AnalysisTraining
from pqmim.training.soft_rate import soft_assignment, soft_rate

LOG2 = math.log(2)


@pytest.mark.parametrize("channels", [1, 2])
def test_the_gradients_are_those_of_the_expectations(channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 5, channels, generator=generator, requires_grad=True)
    codewords = torch.randn(3, 7, channels, generator=generator)
    chosen = codewords[:, torch.randint(7, (5,), generator=generator)]
    bits, w = 5 * torch.rand(3, 5, 7, generator=generator), 0.3
    distances = (values[:, :, None] - codewords[:, None]).square().sum(-1)
    shares = torch.softmax(-LOG2 * (distances / w + bits), 2)

    def gradient_of(function: Tensor) -> Tensor:
        """Of an expectation of a function of the codeword, (3, 1 or 5, 7)."""
        return torch.autograd.grad((shares * function).sum(), values, retain_graph=True)[0]

    found, gradients = soft_assignment(values.detach(), chosen, codewords, bits, w)
    torch.testing.assert_close(found, (shares * bits).sum(2).detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients.bits, gradient_of(bits), rtol=1e-4, atol=1e-4)
    for channel in range(channels):
        step = codewords[:, None, :, channel] - chosen[:, :, None, channel]
        torch.testing.assert_close(
            gradients.codeword[..., channel], gradient_of(step)[..., channel], rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(
            gradients.step[..., channel], gradient_of(step.square())[..., channel], rtol=1e-4, atol=1e-4
        )


def test_on_a_fine_lattice_values_pass_and_in_the_zone_around_zero_they_do_not() -> None:
    codewords = torch.arange(-20.0, 21.0)[None, :, None]
    w = LOG2 / 6  # what a step of one is for
    likely_zero = torch.where(codewords[..., 0] == 0, 0.1, 8.0)[:, None]
    values = torch.linspace(-3, 3, 61)[None, :, None]
    flat = soft_assignment(values, values.round(), codewords, torch.full_like(likely_zero, 5.3), w)[1].codeword
    assert float(flat.mean()) == pytest.approx(1.0, abs=0.02)
    few = torch.tensor([[[0.3], [0.5]]])
    rare = soft_assignment(few, torch.zeros_like(few), codewords, likely_zero, w)[1].codeword
    assert float(rare.max()) < 0.1


def test_between_two_codewords_the_error_of_either_says_nothing() -> None:
    """First and second order of a squared error, about the codeword that was chosen, cancel half-way to the next."""
    codewords, bits = torch.tensor([[[0.0], [1.0]]]), torch.zeros(1, 1, 2)
    values, target = torch.full((1, 1, 1), 0.5), 0.5
    for chosen in (0.0, 1.0):
        _, gradients = soft_assignment(values, torch.full((1, 1, 1), chosen), codewords, bits, 0.1)
        first = 2 * (chosen - target) * gradients.codeword
        assert abs(float(first)) > 1
        assert float(first + gradients.step) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("is_masked", [True, False])
def test_bits_of_latents_that_are_codewords_are_about_those_of_the_tokens(is_masked: bool) -> None:
    tokenizer = make_tiny_tokenizer()
    quantizer, model = tokenizer.quantizer, make_tiny_entropy_model(tokenizer)
    level = torch.tensor([0, 3])
    sizes = quantizer.sizes[level][..., None, None]
    tokens = (torch.rand(2, quantizer.num_subquantizers, 5, 6) * sizes).long()
    z = quantizer.dequantize(tokens, level).detach().requires_grad_(True)
    w = torch.full((2,), 1e-4)  # far finer than the lattices: the nearest codeword has all of the share
    with torch.no_grad():
        expected = quantizer.static_bits(tokens, level)
        if is_masked:
            each = [model.schedule_bits(tokens[i : i + 1], level[i : i + 1]).sum() for i in range(2)]
            expected = torch.stack(each).float()
    soft = soft_rate(quantizer, model if is_masked else None, z, tokens, w, level)
    torch.testing.assert_close(soft.bits, expected, rtol=1e-4, atol=1e-2)
    assert not bool(soft.passed.any())
    assert not bool(soft.curvature.any())
    dropped = torch.ones(z.shape[1], dtype=torch.bool)
    dropped[quantizer.order] = False
    coarse = soft_rate(quantizer, model if is_masked else None, z, tokens, torch.full((2,), 4.0), level)
    (gradient,) = torch.autograd.grad(coarse.passed.sum() + coarse.bits.sum() + coarse.curvature.sum(), z)
    assert torch.equal(gradient[:, dropped], torch.zeros_like(gradient[:, dropped]))
    assert bool(gradient[0, ~dropped].any())


def analysis_config(photos: Path, model: Path, output: Path, **changes: Any) -> AnalysisTraining:
    stage = {"steps": 4, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 1, "log_every": 1}
    settings: dict[str, Any] = {
        "token_model": model,
        "decoder": model / "fine.safetensors",
        "data": {"path": photos, "crop": 64, "validation_photos": 3},
        "run": {"output": output, "device": "cpu", "bf16": False, **changes.pop("run", {})},
        "stage": {**stage, "validate_every": 4, "ema_decay": 0.5, **changes.pop("stage", {})},
    }
    return AnalysisTraining.model_validate(settings | changes)


def analysis_of(path: Path) -> dict[str, np.ndarray]:
    return {n: t for n, t in load_model(path).tensors.items() if n.startswith("tokenizer.analysis.")}


def test_the_id_stays_and_files_are_decoded_by_the_new_decoder(photos: Path, tiny_model: Path, tmp_path: Path) -> None:
    path = train_analysis.train(analysis_config(photos, tiny_model, tmp_path, blocks=(1, 0, 2)))
    before, after = load_model(tiny_model / "model.safetensors"), load_model(path)
    assert after.model_id == before.model_id
    assert after.name == before.name
    assert after.config.tokenizer.analysis.blocks == (1, 0, 2)
    kept = [name for name in before.tensors if not name.startswith("tokenizer.analysis.")]
    assert kept
    assert all(np.array_equal(before.tensors[name], after.tensors[name]) for name in kept)
    old, new = (load_decoder(folder / "fine.safetensors") for folder in (tiny_model, tmp_path))
    assert new.token_model == before.model_id
    assert new.name == "fine"
    assert new.decoder_id != old.decoder_id
    names = {name for stage, _, name, _ in logged(tmp_path) if stage == "analysis"}
    assert {"loss", "mse", "bpp"} <= names
    assert sum(name.startswith("validation/psnr@") for name in names) == 5


def test_a_decoder_that_does_not_learn_stays(photos: Path, tiny_model: Path, tmp_path: Path) -> None:
    path = train_analysis.train(analysis_config(photos, tiny_model, tmp_path, decoder_learns=False, bits="static"))
    assert not (tmp_path / "fine.safetensors").exists()
    before, after = analysis_of(tiny_model / "model.safetensors"), analysis_of(path)
    assert any(not np.array_equal(before[name], after[name]) for name in before)


def test_cost_falls(photos: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Of photos that were not trained on, at a trade-off that is trained for: bits and squared error together."""
    changes = {"rate": {"lambda_min": 0.0004, "lambda_max": 0.02}, "nested_share": 0.0}
    stage = {"steps": 60, "learning_rate": 3e-3, "validate_every": 1, "ema_decay": 0.8}
    train_analysis.train(analysis_config(photos, tiny_model, tmp_path, stage=stage, **changes))
    rows: dict[int, dict[str, float]] = {}
    for _, step, name, value in logged(tmp_path):
        if name.startswith("validation/"):
            rows.setdefault(int(step), {})[name.removeprefix("validation/")] = float(value)
    w = [name.partition("@")[2] for name in rows[1] if name.startswith("bpp@")][2]
    lam = 3 / (20.0**2 * float(w))

    def cost(row: dict[str, float]) -> float:
        return lam * 255**2 * 10 ** (-row[f"psnr@{w}"] / 10) + row[f"bpp@{w}"]

    assert cost(rows[60]) < 0.99 * cost(rows[1])


def test_interrupted_training_leaves_no_trace(photos: Path, tiny_model: Path, tmp_path: Path) -> None:
    whole = train_analysis.train(analysis_config(photos, tiny_model, tmp_path / "a"))
    config = analysis_config(photos, tiny_model, tmp_path / "b", run={"max_minutes": 1e-6})
    assert until_done(train_analysis.train, config) > 1
    parts = tmp_path / "b" / whole.name
    states: list[dict[str, Tensor]] = [load_file(path) for path in (whole, parts)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0] if name.startswith("tokenizer."))


def test_a_smaller_analysis_is_refused(photos: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fewer blocks than its analysis"):
        train_analysis.train(analysis_config(photos, tiny_model, tmp_path, blocks=(0, 0, 1)))
