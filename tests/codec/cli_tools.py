"""Helpers of the tests that run the command line."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from typer.testing import Result

NOBODY = 65534
NEED_MODEL = ("encode", "decode", "tokens", "generate", "inpaint", "gallery")

RESULT_LINE = re.compile(r"\S+\.pqm  [\d,]+ B  \d+\.\d{3} bpp  \d+\.\d{2} s")
ONE_LINE_ERROR = re.compile(r"pqmim: [^\n]+\n")

Pqmim = Callable[..., Result]


def photo(path: str, size: tuple[int, int] = (40, 24), mode: str = "RGB") -> Path:
    """Write a small smooth picture and return its path."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([4 * x, 6 * y, 255 - 2 * x - 2 * y], axis=-1).clip(0, 255).astype(np.uint8)
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rgb).convert(mode).save(file)
    return file


def opened(path: str | Path) -> Image.Image:
    """Read a picture and close its file."""
    with Image.open(path) as image:
        image.load()
        return image


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(opened(path))


def files_below(folder: str) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


@contextmanager
def no_rights() -> Iterator[None]:
    """Take away from root what lets it go everywhere. What is imported first in here must lie where all may read."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def run_child(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False, **options
    )
