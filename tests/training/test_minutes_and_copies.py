"""Stages that end by the clock, and half-precision copies of checkpoints that training goes on from."""

from pathlib import Path

import pytest
import torch
from training.test_training import logged, tokenizer_config

from pqmim.errors import ConfigError
from pqmim.training import train_tokenizer, training_run
from pqmim.training.checkpoint_copies import read_copy, write_copy
from pqmim.training.checkpoints import load_tokenizer
from pqmim.training.recipes import StageConfig
from pqmim.training.training_run import TimeIsUp, learning_rate_factor, stage_progress


class Clock:
    """Stands in for the module `time`: every look at it takes a quarter of a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 0.25
        return self.now


def test_progress_follows_the_clock_or_the_steps() -> None:
    by_steps, by_clock = StageConfig(steps=10), StageConfig(steps=1000, minutes=0.5)
    assert [stage_progress(by_steps, step, 99.0) for step in (0, 5, 10)] == [0, 0.5, 1]
    assert [stage_progress(by_clock, 3, seconds) for seconds in (0.0, 15.0, 30.0, 40.0)] == [0, 0.5, 1, 1]
    assert stage_progress(by_clock, 1000, 1.0) == 1  # the bound
    assert stage_progress(StageConfig(steps=0), 0, 0.0) == 1
    by_clock = by_clock.model_copy(update={"warmup_steps": 2, "final_learning_rate": 0.0})
    assert learning_rate_factor(by_clock, 0, 0.9) == 0.5
    assert learning_rate_factor(by_clock, 100, 0.5) == pytest.approx(0.5)
    assert learning_rate_factor(by_clock, 100, 1.0) == pytest.approx(0.0)


def test_a_stage_ends_by_the_clock_whatever_the_number_of_sittings(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_run, "time", Clock())
    config = tokenizer_config(photos, tmp_path / "run")
    stage = config.transform.model_copy(update={"steps": 10_000, "minutes": 0.1})
    config = config.model_copy(update={"transform": stage})
    sittings = 0
    while not (tmp_path / "run" / "tokenizer.safetensors").exists():
        limit = config.run.model_copy(update={"max_minutes": 0.03})
        try:
            train_tokenizer.train(config.model_copy(update={"run": limit}), resume="auto")
        except TimeIsUp:
            sittings += 1
    steps = {int(step) for stage, step, _, _ in logged(tmp_path / "run") if stage == "transform"}
    assert sittings > 1
    assert steps == set(range(1, max(steps) + 1))
    assert 4 <= max(steps) <= 24  # six seconds, at least one look a step


def test_training_goes_on_from_a_copy_where_the_checkpoint_is_gone(photos: Path, tmp_path: Path) -> None:
    config = tokenizer_config(photos, tmp_path / "run", copies=tmp_path / "copies", copies_mb=0.01, max_minutes=0)
    with pytest.raises(TimeIsUp):
        train_tokenizer.train(config, resume="auto")
    parts = list((tmp_path / "copies").iterdir())
    assert len(parts) > 1
    assert all(part.stat().st_size <= 10_000 for part in parts)
    elsewhere = config.run.model_copy(update={"output": tmp_path / "elsewhere" / "run", "max_minutes": None})
    path = train_tokenizer.train(config.model_copy(update={"run": elsewhere}), resume="auto")
    first = min(int(step) for stage, step, _, _ in logged(path.parent) if stage == "transform")
    assert first == 2  # the first step was made before
    load_tokenizer(path)


def test_a_copy_holds_the_averaged_weights_in_half_precision(tmp_path: Path) -> None:
    weight = torch.arange(3000) / 7
    state = {
        "stage": "transform",
        "step": 5,
        "module": {"weight": weight, "order": torch.arange(4)},
        "ema": {"n_averaged": torch.tensor(3), "module.weight": weight + 1, "module.order": torch.arange(4)},
        "optimizer": {"state": {}},
    }
    assert read_copy(tmp_path, "run") is None
    parts = write_copy(tmp_path, "run", state, 2000)
    assert len(parts) > 3
    copy = read_copy(tmp_path, "run")
    assert copy is not None
    assert set(copy) == {"stage", "step", "module"}
    torch.testing.assert_close(copy["module"]["weight"], (weight + 1).half().float(), rtol=0, atol=0)
    assert copy["module"]["order"].dtype == torch.int64
    assert write_copy(tmp_path, "run", state, 10**6) == [tmp_path / "run.0"]  # parts of the larger copy are gone
    assert list(tmp_path.iterdir()) == [tmp_path / "run.0"]
    parts = write_copy(tmp_path, "run", state, 2000)
    parts[-1].unlink()
    with pytest.raises(ConfigError, match="a part is missing or damaged"):
        read_copy(tmp_path, "run")
