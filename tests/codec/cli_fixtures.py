"""Fixtures of the tests that run the command line."""

from pathlib import Path

import pytest
from cli_tools import NEED_MODEL, Pqmim, photo
from typer.testing import CliRunner, Result

from pqmim.cli import app


@pytest.fixture
def pqmim(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pqmim:
    """Runs a command in an empty folder; commands that code use the tiny model unless they say otherwise."""
    monkeypatch.chdir(tmp_path)

    def run(command: str, *arguments: str, stdin: bytes | None = None, has_model: bool = True) -> Result:
        model = ["--model", str(tiny_model)] if command in NEED_MODEL and has_model else []
        return CliRunner().invoke(app, [command, *model, *arguments], input=stdin)

    return run


@pytest.fixture
def partial_files(pqmim: Pqmim) -> Path:
    """Folder with two files that hold a part of their tokens, one of them a level deeper."""
    photo("in/a.png", (96, 96))
    photo("in/deep/a.png", (64, 96))
    assert pqmim("encode", "in", "-o", "partial", "--keep", "0.4").exit_code == 0
    return Path("partial")
