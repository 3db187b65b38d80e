"""`train`: the parts of a model. PyTorch is imported here and in no other command of the codec."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from pqmim.cli import options as opt
from pqmim.cli.running import one_line_errors
from pqmim.errors import MissingExtraError
from pqmim.reporting import Reporter

Recipe = Annotated[Path, typer.Option("-c", "--config", metavar="RECIPE", help="YAML file of settings.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Change a setting; repeatable.", show_default=False),
]
Resume = Annotated[
    str | None,
    typer.Option(metavar="auto|PATH", help="Go on from a checkpoint; auto: the run's own if there is one."),
]
MaxMinutes = Annotated[
    float | None,
    typer.Option(metavar="N", min=0, help="Write a checkpoint and stop after N minutes.", show_default=False),
]


def train_tokenizer(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Resume = None,
    max_minutes: MaxMinutes = None,
    verbose: opt.Verbose = 0,
) -> None:
    """Train transforms and codebooks."""
    _train("TokenizerTraining", "train_tokenizer", recipe, _with_limit(overrides, max_minutes), resume, verbose)


def train_entropy(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Resume = None,
    max_minutes: MaxMinutes = None,
    verbose: opt.Verbose = 0,
) -> None:
    """Train the entropy model on the tokens of a trained tokenizer."""
    _train("EntropyTraining", "train_entropy_model", recipe, _with_limit(overrides, max_minutes), resume, verbose)


def train_analysis(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Resume = None,
    max_minutes: MaxMinutes = None,
    verbose: opt.Verbose = 0,
) -> None:
    """Train the analysis of a trained model on, for the tokens that it has."""
    _train("AnalysisTraining", "train_analysis", recipe, _with_limit(overrides, max_minutes), resume, verbose)


def train_decoder(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Resume = None,
    max_minutes: MaxMinutes = None,
    verbose: opt.Verbose = 0,
) -> None:
    """Train a decoder for the tokens of a trained model."""
    _train("DecoderTraining", "train_decoder", recipe, _with_limit(overrides, max_minutes), resume, verbose)


@contextmanager
def _missing_packages_named() -> Iterator[None]:
    """Turn the absence of a package into an error that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError((error.name or "?").partition(".")[0], "train") from error


def _with_limit(overrides: list[str] | None, max_minutes: float | None) -> list[str]:
    """Add `--max-minutes` to the changed settings; the last one counts."""
    return [*(overrides or ()), *([] if max_minutes is None else [f"run.max_minutes={max_minutes}"])]


def _train(kind: str, module: str, recipe: Path, overrides: list[str], resume: str | None, verbose: int) -> None:
    """Run a recipe; say what was written, or that the run ended at its time limit, which is no error.

    Args:
        kind: class of the recipe in `pqmim.training.recipes`.
        module: of `pqmim.training`, whose `train` runs it.
    """
    reporter = Reporter(verbosity=verbose)
    with one_line_errors(reporter), _missing_packages_named():
        from pqmim.training import recipes

        config = recipes.load_config(getattr(recipes, kind), recipe, overrides)
        from pqmim.training.training_run import TimeIsUp

        try:
            message = str(import_module(f"pqmim.training.{module}").train(config, resume=resume))
        except TimeIsUp as stop:
            message = str(stop)
        if os.environ.get("RANK", "0") == "0":  # set by torchrun and accelerate; one of the processes is enough
            reporter.text(message)
