"""The benchmarks of training judge what they compare alike."""

import copy
import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from pictures import synthetic_photo
from training.tiny_networks import make_tiny_tokenizer

SCRIPTS = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.skipif(not SCRIPTS.is_dir(), reason="not part of the source distribution")


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module(name)


@pytest.mark.parametrize("w", [0.3, 3.0])
def test_product_codebooks_of_one_channel_are_about_lattices(w: float, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load("scalar_codebooks", monkeypatch)
    latent = torch.randn(6000, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([8.0, 4.0, 2.0, 0.1])
    training, held_out = latent[:5000], latent[5000:]
    runs = script.equal_runs(script.entropies(training, script.spacing(w)), 4, 0.0)
    assert runs[0].tolist() == [0, 1, 2, 3]
    assert runs[1] == [0, 1, 2, 3, 4]
    costs = [
        error + w * bits
        for bits, error in (script.lattices(training, held_out, w), script.product(training, held_out, w, runs, 64))
    ]
    assert 0.99 * costs[0] < costs[1] < 1.1 * costs[0]
    few = script.product(training, held_out, w, script.equal_runs(torch.tensor([3.0, 2.0, 1.0, 0.0]), 1, 0.0), 8)
    assert few[1] + w * few[0] > 1.15 * costs[0]  # all channels by one small codebook


def test_a_row_of_a_tokenizer_has_a_point_for_each_level(monkeypatch: pytest.MonkeyPatch) -> None:
    script = load("design_rows", monkeypatch)
    photos = torch.stack([torch.from_numpy(synthetic_photo(64, 64, seed)) for seed in range(3)])
    row = script.tokenizer_row(make_tiny_tokenizer(), photos.permute(0, 3, 1, 2).float() / 255)
    assert len(row["bpp"]) == len(row["psnr"]) == 6
    assert row["bpp"] == sorted(row["bpp"], reverse=True)
    assert row["psnr"][0] > row["psnr"][-1] + 1
    lines = script.table({"one": row, "other": {**row, "bpp": [1.1 * bpp for bpp in row["bpp"]]}})
    assert lines[2].endswith("|  |")
    assert lines[3].endswith("| +10.0 % |")


def test_haar_unfolding_keeps_what_it_unfolds(monkeypatch: pytest.MonkeyPatch) -> None:
    script = load("training_rows", monkeypatch)
    x = torch.randn(2, 12, 3, 5, generator=torch.Generator().manual_seed(0))
    y = script.HaarUnfolding()(x)
    assert y.shape == (2, 3, 6, 10)
    assert torch.allclose(y.square().sum(), x.square().sum(), rtol=1e-5)
    mean = torch.nn.functional.avg_pool2d(y, 2)
    assert torch.allclose(2 * mean, x[:, ::4], atol=1e-5)  # the first of each four is that of their mean


@pytest.mark.parametrize("edges", [False, True])
def test_a_renderer_sees_its_own_position_and_begins_as_the_linear_path(
    edges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load("training_rows", monkeypatch)
    tokenizer = make_tiny_tokenizer()
    synthesis = copy.deepcopy(tokenizer.synthesis)
    script.rendered(synthesis, 16, 0, 8, 2, edges=edges)
    z = torch.randn(1, synthesis.config.latent_channels, 4, 5)
    linear = torch.einsum("dc,bchw->bdhw", synthesis.linear_gain * synthesis.linear, z)
    assert torch.allclose(synthesis(z), torch.nn.functional.pixel_shuffle(linear, 16) + 0.5, atol=1e-5)
    torch.nn.init.normal_(synthesis.head.weight)
    moved = z.clone()
    moved[..., 1, 2] += 1
    changed = (synthesis(moved) != synthesis(z)).any(1)[0]
    margin = 4 if edges else 0  # pixels of the neighbors that a 3 x 3 layer at stride 4 reaches
    assert changed[16 - margin : 32 + margin, 32 - margin : 48 + margin].any()
    changed[16 - margin : 32 + margin, 32 - margin : 48 + margin] = False
    assert not changed.any()


def test_probes_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    script = load("decoder_probes", monkeypatch)
    synthesis = make_tiny_tokenizer().synthesis
    z = torch.randn(2, synthesis.config.latent_channels, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = synthesis(z)
        assert torch.allclose(script.finish(synthesis, z, 0.1 * z, 0), x, atol=1e-5)
        flat = torch.zeros_like(z)
        flat[:, 0] = z[:, 0]
        assert script.components_kept(synthesis, flat, 0.1 * flat, 0, synthesis(flat) + 0.01) == 1
        assert script.gain_of_optimizing(synthesis, z, 0.1 * z, 0, x + 0.02, 30) > 0
