"""Check that this machine decodes files to the tokens they were made of, and to the pictures of other machines.

The package holds a few small files, and `golden.json` with the SHA-256 of the token grid of each. They are
decoded with every kernel that claims to be exact here; one differing token would change a hash. So would one sample of
their pictures by the decoders whose sums are exact.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from pqmim.codec import Codec
from pqmim.decoder_files import find_decoder, load_decoder
from pqmim.entropy_kernels import exact_kernels
from pqmim.errors import BitstreamError, ModelError
from pqmim.model_files import find_model, load_model
from pqmim.options import Device
from pqmim.runtime import resolve_device

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

    Keys: `model` and `decoder`, names of those that it was made with; `tokens`, SHA-256 (hex) as of `Codec.token_hash`;
    `width` and `height` in pixels; `alpha`, SHA-256 of the alpha channel's bytes or null; `thumbnail`, 8 x 8 RGB
    averages of the pixels that the decoder makes, as a flat list; `pictures`, SHA-256 of the pixels that each decoder
    whose sums are exact makes, by its name.

    Raises:
        ModelError: the package lacks them.
    """
    try:
        golden: dict[str, dict[str, Any]] = json.loads((GOLDEN / "golden.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{GOLDEN / 'golden.json'}: {error.strerror}") from error
    return golden


def run(device: str = "auto") -> Iterator[Check]:
    """Decode the golden files and compare the hashes of their tokens and, on the CPU, of their pictures.

    Args:
        device: "cpu", "cuda", or "auto": the CPU and, if there is one, the GPU.

    Yields:
        One check for each device, kernel and file, and one for each picture.

    Raises:
        ModelError, ConfigError: the package lacks a file or model; the device is not there.
    """
    golden = read_golden()
    places = {Device.CPU, resolve_device(device)} if device == Device.AUTO else {resolve_device(device)}
    for name in sorted({facts["model"] for facts in golden.values()}):
        path = find_model(name)
        model, decoder = load_model(path), load_decoder(find_decoder(None, path))
        files = {file: facts for file, facts in golden.items() if facts["model"] == name}
        for place in sorted(places):
            # On a GPU the codec itself decides what it trusts it with.
            for kernel in exact_kernels(model) if place is Device.CPU else (None,):
                codec = Codec(model, decoder, place, kernel=kernel)
                for file, facts in files.items():
                    error = _problem_of(file, "tokens", codec.token_hash, facts["tokens"])
                    yield Check(f"{file} ({place}, {codec.kernel})", error)
        if Device.CPU in places:
            for decoder_name in sorted({each for facts in files.values() for each in facts["pictures"]}):
                codec = Codec(model, load_decoder(find_decoder(decoder_name, path)), Device.CPU)
                for file, facts in files.items():
                    error = _problem_of(file, "pixels", partial(picture_hash, codec), facts["pictures"][decoder_name])
                    yield Check(f"{file} ({Device.CPU}, picture by {decoder_name})", error)


def picture_hash(codec: Codec, data: bytes) -> str:
    """SHA-256 (hex) of the samples of a decoded file."""
    return hashlib.sha256(codec.decode(data).tobytes()).hexdigest()


def _problem_of(file: str, what: str, hash_of: Callable[[bytes], str], expected: str) -> str | None:
    try:
        is_right = hash_of((GOLDEN / file).read_bytes()) == expected
    except (BitstreamError, OSError) as error:
        return str(error)
    return None if is_right else f"decoded to other {what}"
