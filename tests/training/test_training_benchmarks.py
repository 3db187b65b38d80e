"""The benchmarks of training judge what they compare alike."""

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
