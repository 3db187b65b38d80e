"""Check that this machine decodes files to the tokens they were made of.

The package holds a few small files, and `golden.json` with the SHA-256 of the token grid of each. They are
decoded with every kernel that claims to be exact here; one differing token would change a hash.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from pqmim.codec import load_codec, resolve_device
from pqmim.errors import BitstreamError, ModelError
from pqmim.exact_inference import exact_kernels

GOLDEN = Path(str(resources.files("pqmim") / "golden"))
"""Folder of the golden files; `benchmarks/make_golden.py` writes it."""


@dataclass(frozen=True)
class Check:
    """Result of one check.

    Attributes:
        name: file, device and kernel.
        error: what went wrong, in one line; None = nothing.
    """

    name: str
    error: str | None


def read_golden() -> dict[str, dict[str, Any]]:
    """What is known of each golden file, by file name.

    Keys: `model` name; `tokens`, SHA-256 (hex) as of `Codec.token_hash`; `width` and `height` in pixels;
    `alpha`, SHA-256 of the alpha channel's bytes or null; `thumbnail`, 8 x 8 RGB averages of the pixels as a
    flat list.

    Raises:
        ModelError: the package lacks them.
    """
    try:
        golden: dict[str, dict[str, Any]] = json.loads((GOLDEN / "golden.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{GOLDEN / 'golden.json'}: {error.strerror}") from error
    return golden


def run(device: str = "auto") -> Iterator[Check]:
    """Decode the golden files and compare the hashes of their tokens.

    Args:
        device: "cpu", "cuda", or "auto": the CPU and, if there is one, the GPU.

    Yields:
        One check for each device, kernel and file.

    Raises:
        ModelError, ConfigError: the package lacks a file or model; the device is not there.
    """
    golden = read_golden()
    devices = [resolve_device(device)]
    if device == "auto" and devices[0].type != "cpu":
        devices.insert(0, torch.device("cpu"))
    for place in devices:
        for kernel in exact_kernels(place):
            for model in sorted({facts["model"] for facts in golden.values()}):
                codec = load_codec(model, device=place.type, kernel=kernel)
                for name, facts in golden.items():
                    if facts["model"] == model:
                        error = None
                        try:
                            if codec.token_hash((GOLDEN / name).read_bytes()) != facts["tokens"]:
                                error = "decoded to other tokens"
                        except (BitstreamError, OSError) as problem:
                            error = str(problem)
                        yield Check(f"{name} ({place.type}, {kernel})", error)
