"""`pqmim train`, from the outside."""

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pqmim.cli import app


def test_training_that_stops_at_its_time_limit_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pqmim.training.training_run import TimeIsUp

    monkeypatch.chdir(tmp_path)

    seen: list[Any] = []

    def train(config: Any, *, resume: str | None) -> Path:
        seen.append((config.run.seed, resume))
        if resume is None:
            raise TimeIsUp("60 minutes are over")
        return config.run.output / "tokenizer.safetensors"  # type: ignore[no-any-return]

    monkeypatch.setattr("pqmim.training.train_tokenizer.train", train)
    Path("recipe.yaml").write_text("data: {path: photos}\nrun: {output: runs, seed: 3}\n")
    command = ("train", "tokenizer", "-c", "recipe.yaml", "--set", "run.seed=4", "--set", "run.bf16=false")
    stopped = CliRunner().invoke(app, command)
    assert (stopped.exit_code, stopped.stdout) == (0, "60 minutes are over\n")
    done = CliRunner().invoke(app, [*command, "--resume", "auto"])
    assert (done.exit_code, done.stdout) == (0, f"{Path('runs/tokenizer.safetensors')}\n")
    assert seen == [(4, None), (4, "auto")]
    wrong = CliRunner().invoke(app, [*command, "--set", "run.sed=4"])
    assert wrong.exit_code == 1
    assert re.fullmatch(r"pqmim: [^\n]+\n", wrong.stderr)
    assert "run.sed" in wrong.stderr


def test_a_recipe_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    missing = CliRunner().invoke(app, ["train", "tokenizer", "-c", "missing.yaml"])
    assert (missing.exit_code, missing.stderr) == (1, "pqmim: missing.yaml: No such file or directory\n")
