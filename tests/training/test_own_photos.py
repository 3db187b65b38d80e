"""From a folder of one's own photos to a working model in three commands, as docs/training.md says."""

from pathlib import Path

import numpy as np
import pytest
from pictures import synthetic_photo
from PIL import Image
from typer.testing import CliRunner

from pqmim.cli import app

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER_CHANGES = [
    "start_from=null",
    "model.autoencoder.latent_channels=48",
    "model.autoencoder.channels=[8,16,16]",
    "model.autoencoder.blocks=[1,1,1]",
    "model.quantizer.num_subquantizers=48",
    "model.quantizer.num_levels=6",
    "transform.steps=60",
    "codebooks.crops=48",
]
ENTROPY_CHANGES = [
    "start_from=null",
    "model.width=64",
    "model.num_layers=2",
    "model.group_sizes=[6,12,12]",
    "stage.steps=30",
    "name=mine",
]
DATA_CHANGES = ["data.crop=128", "data.validation_photos=4"]
"""The recipes of `photo`, small enough for a test."""


def settings(*changes: str) -> list[str]:
    return [argument for change in changes for argument in ("--set", change)]


def test_own_photos_to_a_working_model_in_three_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for index in range(50):
        Image.fromarray(synthetic_photo(144, 160 + index, index)).save(f"photos/{index:02}.jpg", quality=95)
    picture = synthetic_photo(150, 210, 99)
    Image.fromarray(picture).save("photo.png")

    def pqmim(*arguments: str) -> None:
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output

    recipes = ROOT / "recipes" / "photo"
    data = settings("data.path=photos", *DATA_CHANGES)
    output = settings("run.output=run/tokenizer", *TOKENIZER_CHANGES)
    pqmim("train", "tokenizer", "-c", str(recipes / "tokenizer.yaml"), *data, *output)
    output = settings("run.output=run", "tokenizer=run/tokenizer/tokenizer.safetensors", *ENTROPY_CHANGES)
    pqmim("train", "entropy", "-c", str(recipes / "entropy.yaml"), *data, *output)
    pqmim("encode", "photo.png", "-m", "run", "-q", "80")
    pqmim("decode", "photo.pqm", "-m", "run", "-o", "decoded.png")

    with Image.open("decoded.png") as decoded:
        error = np.square(np.asarray(decoded, dtype=float) - picture).mean()
    assert error < 0.2 * picture.astype(float).var()
    assert Path("photo.pqm").stat().st_size < picture.size / 24  # 1 bpp
