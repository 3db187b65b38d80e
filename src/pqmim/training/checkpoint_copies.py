"""Half-precision copies of checkpoints in parts of bounded size: what training goes on from on another machine.

A checkpoint proper holds weights, their averages and the optimizer's state in float32, some seven times the size. The
copy holds the averaged weights alone; training that goes on from it begins with a fresh optimizer.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from pqmim.errors import ConfigError, OutputError


def write_copy(folder: Path, name: str, state: dict[str, Any], part_bytes: int) -> list[Path]:
    """Write a copy as NAME.0, NAME.1, ...; parts of an earlier, larger one are removed.

    Args:
        state: of `TrainingRun.save`: "module", perhaps "ema" and "optimizer", and what is no weight.
        part_bytes: most bytes of a part.

    Raises:
        OutputError: it cannot be written.
    """
    copy = {key: value for key, value in state.items() if key not in ("module", "ema", "optimizer")}
    averaged = {n.removeprefix("module."): t for n, t in state.get("ema", {}).items() if n != "n_averaged"}
    copy["module"] = {
        n: t.half() if torch.is_floating_point(t) else t for n, t in (averaged or state["module"]).items()
    }
    buffer = io.BytesIO()
    torch.save(copy, buffer)
    data = buffer.getvalue()
    parts = [folder / f"{name}.{index}" for index in range(-(-len(data) // part_bytes))]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for index, part in enumerate(parts):
            temporary = part.with_name(part.name + ".tmp")
            temporary.write_bytes(data[index * part_bytes : (index + 1) * part_bytes])
            os.replace(temporary, part)
        for stale in set(_parts(folder, name)) - set(parts):
            stale.unlink()
    except OSError as error:
        raise OutputError(f"{folder}: {error.strerror}") from error
    return parts


def read_copy(folder: Path, name: str) -> dict[str, Any] | None:
    """Content of a copy, weights in float32; None if there is none.

    Raises:
        ConfigError: a part is missing or damaged.
    """
    parts = _parts(folder, name)
    if not parts:
        return None
    data = b"".join(part.read_bytes() for part in parts)
    try:
        copy: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (RuntimeError, UnpicklingError, EOFError, ValueError) as error:
        raise ConfigError(f"{folder}/{name}.*: a part is missing or damaged") from error
    copy["module"] = {n: t.float() if torch.is_floating_point(t) else t for n, t in copy["module"].items()}
    return copy


def _parts(folder: Path, name: str) -> list[Path]:
    numbered = [path for path in folder.glob(f"{name}.*") if path.suffix[1:].isdigit()]
    return sorted(numbered, key=lambda path: int(path.suffix[1:]))
