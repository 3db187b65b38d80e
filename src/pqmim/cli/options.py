"""Options that several commands share, and how their texts are read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from pqmim.bitstream import Container
from pqmim.options import DEFAULT_MODEL as DEFAULT_MODEL
from pqmim.options import Device, Fill, FillOptions, Region

DEFAULT_QUALITY = 50.0
MAX_DIGITS = 9
"""Of a side in pixels; more are no picture anywhere."""
UNBOUNDED = 1 << 62
"""A size in bytes that no file reaches."""

Inputs = Annotated[list[str], typer.Argument(metavar="IN", help="Files or folders; '-' is stdin.", show_default=False)]
Output = Annotated[
    str | None,
    typer.Option("-o", "--output", metavar="OUT", help="File, folder, or '-' for stdout. [default: beside the input]"),
]
OutputFolder = Annotated[str, typer.Option("-o", "--output", metavar="OUT", help="Folder for the results.")]
Quality = Annotated[
    float, typer.Option("-q", "--quality", min=0, max=100, help="Higher is better and larger; any number.")
]
FillOption = Annotated[Fill, typer.Option(help="What becomes of tokens that are not there.")]
Seed = Annotated[int, typer.Option(min=0, help="Of sampling; the same seed gives the same picture everywhere.")]
Temperature = Annotated[float, typer.Option(help="Of sampling: 1 is what the model believes, less is tamer.")]
Steps = Annotated[
    int | None,
    typer.Option(
        min=1, help="Of sampling: passes of the network. [default: as many as coding has]", show_default=False
    ),
]


def _model_names() -> list[str]:
    """For the completion of the shell."""
    from pqmim.model_files import shipped_models

    return [model.name for model in shipped_models()]


def _decoder_names() -> list[str]:
    """For the completion of the shell."""
    from pqmim.decoder_files import decoders_beside
    from pqmim.model_files import shipped_models

    return sorted({entry.name for model in shipped_models() for entry in decoders_beside(model.path)})


EncodingModel = Annotated[
    str,
    typer.Option(
        "-m",
        "--model",
        metavar="MODEL",
        help="Name of a shipped token model, or path of one.",
        autocompletion=_model_names,
    ),
]
DecodingModel = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        metavar="MODEL",
        help="Name or path. [default: the one in the file]",
        autocompletion=_model_names,
    ),
]
Decoder = Annotated[
    str | None,
    typer.Option(
        "--decoder",
        metavar="DECODER",
        help="That makes the pictures, name or path. [default: fine]",
        autocompletion=_decoder_names,
        show_default=False,
    ),
]
MadeFor = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="DECODER",
        help="Whose pictures the encoder corrects; every decoder takes the file. [default: fine]",
        autocompletion=_decoder_names,
        show_default=False,
    ),
]
Realism = Annotated[
    float | None,
    typer.Option(
        metavar="R",
        min=0,
        max=1,
        help="Of a decoder that synthesises detail, how much of it. [default: 1]",
        show_default=False,
    ),
]
DeviceOption = Annotated[Device, typer.Option(help="Where the networks run; auto takes a GPU if there is one.")]
Threads = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="Threads of the networks. [default: the cores, at most 8]", show_default=False
    ),
]
Jobs = Annotated[int, typer.Option("-j", "--jobs", metavar="N", min=1, help="Files at a time, each by a process.")]
MaxPixels = Annotated[int, typer.Option(min=1, help="Refuse larger images.")]
Force = Annotated[bool, typer.Option("-f", "--force", help="Overwrite existing outputs.")]
SkipExisting = Annotated[bool, typer.Option("--skip-existing", help="Leave out inputs whose outputs exist.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object per result instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
Verbose = Annotated[
    int,
    typer.Option("-v", "--verbose", count=True, help="Say more; -vv adds tracebacks.", show_default=False),
]


def fill_options(fill: Fill, seed: int, temperature: float, steps: int | None) -> FillOptions:
    """Options about filling as those of the codec."""
    with bad_values():
        return FillOptions(fill, seed, temperature, steps)


@contextmanager
def bad_values() -> Iterator[None]:
    """Turn what the codec says of a value that is out of range into wrong usage."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def only_one_of(values: dict[str, object], *, is_one_needed: bool = False) -> None:
    """Refuse options that contradict each other."""
    given = [name for name, value in values.items() if value is not None]
    if len(given) > 1:
        raise typer.BadParameter(f"give {' or '.join(given)}, not {'both' if len(given) == 2 else 'all'}")
    if is_one_needed and not given:
        raise typer.BadParameter(f"give {' or '.join(values)}")


def check_quality(quality: float | None) -> None:
    """Refuse what is neither below 0 nor above 100."""
    if quality is not None and math.isnan(quality):
        raise typer.BadParameter("nan is not in the range 0<=x<=100", param_hint="'-q' / '--quality'")


def check_bpp(bpp: float | None, name: str) -> None:
    """Refuse a rate that no file can have."""
    if bpp is not None and not 0 < bpp < math.inf:
        raise typer.BadParameter(f"{bpp:g} is not a number above 0", param_hint=f"'{name}'")


def bytes_at(bpp: float, container: Container) -> int:
    """Largest size of a file that has no more bits per pixel than this."""
    return max(1, int(min(bpp * container.width * container.height / 8, UNBOUNDED)))


def folder_of(text: str, option: str = "'-o' / '--output'") -> Path:
    """Path of a folder for results."""
    if text == "-":
        raise typer.BadParameter("must be a folder, not stdout ('./-' is a folder of that name)", param_hint=option)
    return Path(text)


def region(text: str) -> Region:
    """Read a region: X,Y,W,H or X,Y,W,H,WEIGHT."""
    try:
        numbers = [float(part) if index == 4 else int(part) for index, part in enumerate(text.split(","))]
    except ValueError:
        numbers = []
    if not 4 <= len(numbers) <= 5:
        raise typer.BadParameter(f"{text!r} is not X,Y,W,H or X,Y,W,H,WEIGHT", param_hint="'--roi'")
    x, y, width, height = (int(number) for number in numbers[:4])
    return Region(x, y, width, height, *numbers[4:])


def width_and_height(text: str) -> tuple[int, int]:
    """Read a size: WxH."""
    match = re.fullmatch(rf"([1-9]\d{{,{MAX_DIGITS - 1}}})x([1-9]\d{{,{MAX_DIGITS - 1}}})", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a size such as 768x512", param_hint="'--size'")
    return int(match[1]), int(match[2])


def fractions(text: str) -> tuple[float, ...]:
    """Read shares, 0 to 1, with commas between them."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = (math.nan,)
    if not all(0 <= number <= 1 for number in numbers):
        raise typer.BadParameter(f"{text!r} is not a list of shares such as 1,0.5,0", param_hint="'--keeps'")
    return numbers


def whole_numbers(text: str, option: str, *, least: int) -> tuple[int, ...]:
    """Read whole numbers, none below `least`, with commas between them."""
    try:
        numbers = tuple(int(number) for number in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers such as 1,2,4", param_hint=option) from None
    if min(numbers) < least:
        raise typer.BadParameter(f"{min(numbers)} is below {least}", param_hint=option)
    return numbers


def names(text: str) -> tuple[str, ...]:
    """Read names with commas between them."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
