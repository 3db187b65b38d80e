"""`recipes/one_gpu.sh` at toy size: all stages within their minutes, over as many calls as it takes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from pictures import synthetic_photo
from training.test_minutes_and_copies import Clock
from training.test_train_decoder import TinyFeatures
from training.tiny_networks import TINY_ENTROPY, TINY_TOKENIZER

from pqmim import load_codec
from pqmim.training import one_gpu, train_decoder, training_run

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "recipes" / "one_gpu.sh"


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """The shipped ones, made small."""
    stage = {"batch_size": 2, "warmup_steps": 1, "log_every": 1, "validate_every": 1000}
    run = {"device": "cpu", "bf16": False, "compile": False, "output": "replaced"}
    folder = tmp_path / "recipes"
    folder.mkdir()
    for path in (ROOT / "recipes" / "one_gpu").glob("*.yaml"):
        recipe = yaml.safe_load(path.read_text())
        for name in ("transform", "stage", "distortion", "perceptual", "adversarial"):
            if name in recipe:
                recipe[name] |= stage
        recipe["run"] = run
        recipe["data"] = {"path": "replaced", "crop": 64, "validation_photos": 2}
        if path.stem == "tokenizer":
            recipe |= {
                "model": TINY_TOKENIZER.as_dict(),
                "start_from": None,
                "codebooks": {"crops": 8},
            }
        elif path.stem == "entropy":
            recipe |= {"model": TINY_ENTROPY.as_dict(), "start_from": None}
        else:
            recipe |= {"channels": None, "blocks": None}
        if path.stem == "vivid":
            recipe["terms"] = {"labels": 4, "label_subquantizers": 2, "label_crops": 8}
        (folder / path.name).write_text(yaml.safe_dump(recipe))
    return folder


def test_all_stages_over_several_calls(
    photos: Path, recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_decoder, "load_efficientnet_lite0", TinyFeatures)
    monkeypatch.setattr(training_run, "time", Clock())
    output = tmp_path / "out"
    command = [str(photos), "0.5", str(output), "--recipes", str(recipes), "--max-file-mb", "0.02"]
    calls = 0
    while not (output / "model" / "vivid.safetensors").exists():
        assert one_gpu.main([*command, "--call-minutes", "0.09"]) == 0
        calls += 1
        assert calls < 100
    said = capsys.readouterr().out.splitlines()
    assert calls > 2
    assert said[0].endswith("the same command goes on")
    assert said[-1] == str(output / "model")

    copies = {path.name.split(".")[0] for path in (output / "checkpoints").iterdir()}
    assert copies == {part.name for part in one_gpu.PARTS}
    assert all(path.stat().st_size <= 20_000 for path in (output / "checkpoints").iterdir())

    photo = synthetic_photo(80, 100, 3)
    data = load_codec(output / "model").encode(photo, quality=100)
    for decoder in ("fine", "fast", "vivid"):
        decoded = np.asarray(load_codec(output / "model", decoder=decoder).decode(data), dtype=float)
        assert np.square(decoded - photo).mean() < 0.9 * photo.astype(float).var(), decoder


def test_the_minutes_are_shared_out() -> None:
    shares = [share for part in one_gpu.PARTS for share in part.shares.values()]
    assert 0.8 < sum(shares) < 1  # the rest is for photos, codebooks, validation, files


def test_bad_input_is_one_line(photos: Path, tmp_path: Path) -> None:
    def complaint(*arguments: str) -> tuple[int, str]:
        environment = os.environ | {"PYTHON": sys.executable}
        done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, check=False, env=environment)
        return done.returncode, done.stderr

    code, said = complaint(str(photos), "0", str(tmp_path / "out"))
    assert code == 2
    assert "minutes and --max-file-mb must be above 0" in said
    code, said = complaint(str(tmp_path / "nowhere"), "1", str(tmp_path / "out"))
    assert code == 1
    assert said.startswith("one_gpu.sh: ")
    assert said.count("\n") == 1
