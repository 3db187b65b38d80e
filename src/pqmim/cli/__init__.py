"""The command line. Thin: each command turns options into calls of the library and errors into lines.

Every command is a function in one of the modules below. `running` is what they share: the way from inputs and options
to `batch.run_jobs`, and the codecs of a call. From there it goes on to `codec`.

Nothing heavy is imported here; a command imports the codec when it needs a network, so that `pqmim --help`, `info` and
`models` answer at once.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from pqmim._version import __version__
from pqmim.cli.bulk import bulk
from pqmim.cli.coding import decode, encode
from pqmim.cli.drawing import gallery, generate, inpaint
from pqmim.cli.inspecting import info, models, selftest, truncate
from pqmim.cli.measuring import bench, evaluate
from pqmim.cli.previewing import preview
from pqmim.cli.tokens import tokens
from pqmim.cli.training import train_analysis, train_decoder, train_entropy, train_tokenizer
from pqmim.reporting import Reporter

__all__ = ["app", "main"]

TRAINING = "train"

app = typer.Typer(
    help="A learned image codec: photos in, small .pqm files out, and back.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"pqmim {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("-V", "--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    # The codec has threads of its own: those of NumPy's products would only spin beside them. PyTorch keeps all of its.
    if context.invoked_subcommand != TRAINING:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


for command in (encode, decode, truncate, tokens, preview, info, generate, inpaint, gallery, models, selftest):
    app.command()(command)
app.command("eval")(evaluate)
app.command()(bench)
app.command()(bulk)
train_app = typer.Typer(help="Train a model from a recipe.", no_args_is_help=True, rich_markup_mode=None)
train_app.command("tokenizer")(train_tokenizer)
train_app.command("entropy")(train_entropy)
train_app.command("analysis")(train_analysis)
train_app.command("decoder")(train_decoder)
app.add_typer(train_app, name=TRAINING)


def main() -> None:
    """Entry point of the `pqmim` command."""
    # Threads that spin while they wait slow each other down tenfold where another process wants the same cores. OpenMP
    # reads these when a library that uses it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    _fill_closed_streams()
    try:
        app(prog_name="pqmim")
    except OSError as error:  # of a standard stream: commands catch all others
        Reporter.message(f"stdout: {error.strerror or error}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else the interpreter tries again to write what is buffered
        sys.exit(1)


def _fill_closed_streams() -> None:
    """Take the descriptors of standard streams that the caller closed, so that no file gets one of them.

    `sys.stdin` and `sys.stdout` stay None.
    """
    for descriptor, stream in enumerate((sys.stdin, sys.stdout, sys.stderr)):
        if stream is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (typer puts its messages there)
