"""Training of the entropy model: when it simulates exact arithmetic, and what its loss counts."""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from training.test_minutes_and_copies import Clock
from training.test_training import entropy_config, logged, until_done, with_stages

from pqmim.training import train_entropy_model, training_run
from pqmim.training.entropy_model import EntropyModel


def listen_to_code_lengths(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each loss of an entropy model whether it simulated."""
    heard: list[bool] = []
    code_length = EntropyModel.code_length

    def listen(model: EntropyModel, *arguments: Any, simulate: bool) -> Tensor:
        heard.append(simulate)
        return code_length(model, *arguments, simulate=simulate)

    monkeypatch.setattr(EntropyModel, "code_length", listen)
    return heard


def test_exact_arithmetic_is_simulated_after_a_share_of_the_steps(
    photos: Path, tokens_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = listen_to_code_lengths(monkeypatch)
    train_entropy_model.train(entropy_config(photos, tokens_file, tmp_path / "run"))
    assert heard == [False] * 4 + [True] * 4


def test_exact_arithmetic_is_simulated_after_a_share_of_the_minutes(
    photos: Path, tokens_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of sittings; validation does as training does."""
    heard, validated = listen_to_code_lengths(monkeypatch), list[tuple[bool, bool]]()
    validate = train_entropy_model.validate_entropy_model

    def listen(*arguments: Any, simulate: bool) -> dict[str, float]:
        validated.append((heard[-1], simulate))
        return validate(*arguments, simulate=simulate)

    monkeypatch.setattr(train_entropy_model, "validate_entropy_model", listen)
    monkeypatch.setattr(training_run, "time", Clock())
    config = with_stages(
        entropy_config(photos, tokens_file, tmp_path / "run", max_minutes=0.03), steps=10_000, minutes=0.2
    )
    assert until_done(train_entropy_model.train, config) > 2
    assert heard == sorted(heard)
    assert 0.3 < sum(heard) / len(heard) < 0.7
    assert len(heard) < 60
    assert (False, False) in validated
    assert all(simulate == like for simulate, like in validated)


def test_the_loss_is_in_shares_of_what_a_level_costs(
    photos: Path, tokens_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the finest levels, of many times the bits, would rule."""
    levels: set[int] = set()

    def seven_tenths(model: EntropyModel, tokens: Tensor, level: Tensor, *_: Any, **__: Any) -> Tensor:
        levels.update(level.tolist())
        return 0.7 * model.level_bits[level] * tokens[0, 0].numel() + 0 * model.token_bias.sum()

    monkeypatch.setattr(EntropyModel, "code_length", seven_tenths)
    path = train_entropy_model.train(entropy_config(photos, tokens_file, tmp_path / "run"))
    losses = [float(value) for stage, _, name, value in logged(path.parent) if (stage, name) == ("entropy", "loss")]
    assert losses == pytest.approx([0.7] * 8, rel=1e-5)
    assert len(levels) > 3
