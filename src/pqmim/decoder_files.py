"""Decoders: files with a synthesis transform for the tokens of one token model, and its gradient.

They lie beside the token model's file. A decoder has a name and an id of its own, a hash of its configuration and its
weights, and says which token model it is for; any decoder of a token model decodes any of its files.

A decoder may name its *faithful* one, of the same shape, which it was fine-tuned from for pictures that look real. Then
*realism* r in [0, 1] weighs the two: weights are (1 - r) * faithful + r * own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pqmim.config import TransformConfig
from pqmim.errors import ModelError
from pqmim.model_files import (
    DECODER_FORMAT,
    ID_BYTES,
    MODEL_FILE,
    SUFFIX,
    ModelFile,
    NetworkFile,
    digest,
    load_file,
    name_of_id,
    read_metadata,
)

DEFAULT_DECODER = "fine"
"""Taken where none is named, if it is there."""
SYNTHESIS_PREFIX = "synthesis."


@dataclass(frozen=True)
class DecoderFile(NetworkFile):
    """Content of a decoder's file.

    Its tensors are "synthesis.*" (float16), its graphs "synthesis", "synthesis_forward" and "synthesis_vjp".

    Attributes:
        token_model: id of the token model that it is for.
        faithful: id of the decoder that it was fine-tuned from for realism, if it was.
        realism: weight of its own weights, the rest being the faithful decoder's; None without a faithful one.
    """

    decoder_id: bytes
    token_model: bytes
    config: TransformConfig
    faithful: bytes | None = None
    realism: float | None = None


@dataclass(frozen=True)
class DecoderEntry:
    """A decoder in a folder, of which only the metadata were read; attributes as of `DecoderFile`."""

    name: str
    decoder_id: bytes
    token_model: bytes
    faithful: bytes | None
    path: Path
    description: str


def compute_decoder_id(config: dict[str, Any], tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """The id of a decoder: a hash of its configuration, as JSON holds it, and its weights, without graphs."""
    return digest(config, tensors)[:ID_BYTES]


def decoders_beside(model: Path) -> list[DecoderEntry]:
    """Decoders in the folder of a token model's file, by name; what is no decoder is passed over."""
    found = []
    for path in model.parent.glob(f"*{SUFFIX}"):
        try:
            metadata = read_metadata(path, DECODER_FORMAT)
            found.append(_entry(path, metadata))
        except (ModelError, KeyError, ValueError, TypeError):
            continue
    return sorted(found, key=lambda entry: entry.name)


def _entry(path: Path, metadata: dict[str, Any]) -> DecoderEntry:
    faithful = metadata.get("faithful")
    return DecoderEntry(
        str(metadata["name"]),
        bytes.fromhex(metadata["decoder_id"]),
        bytes.fromhex(metadata["token_model"]),
        None if faithful is None else bytes.fromhex(faithful),
        path,
        str(metadata["facts"].get("description", "")),
    )


def find_decoder(name_or_path: str | os.PathLike[str] | None, model: Path) -> Path:
    """Path of a decoder's file.

    Args:
        name_or_path: name of a decoder beside the token model, or path of a decoder's file; None = `fine`, or the only
            one that there is.
        model: file of the token model.

    Raises:
        ModelError: there is none; the message lists those that there are.
    """
    entries = {entry.name: entry.path for entry in decoders_beside(model)}
    names = ", ".join(entries)
    if name_or_path is None:
        if DEFAULT_DECODER in entries:
            return entries[DEFAULT_DECODER]
        if len(entries) == 1:
            return next(iter(entries.values()))
        if not entries:
            raise ModelError(f"{model}: no decoder lies beside this token model")
        raise ModelError(f"{model}: name one of its decoders: {names}")
    if str(name_or_path) in entries:
        return entries[str(name_or_path)]
    path = Path(name_or_path)
    if path.is_file():
        return path
    model_name = model.parent.name if model.name == MODEL_FILE else model.name
    raise ModelError(
        f"{name_or_path}: no such decoder ({model_name} has {names or 'none'}; or a path to a decoder's file)"
    )


def load_decoder(source: Path | bytes, *, realism: float | None = None) -> DecoderFile:
    """Read a decoder's file, from the disk or from its bytes, and check it.

    Args:
        realism: 0 to 1, for a decoder that has its faithful one beside it; None = 1 for such a decoder.

    Raises:
        ModelError: missing, damaged, no decoder; or realism is asked of a decoder that has none.
        ValueError: realism is out of range.
    """
    metadata, weights, graphs, label = load_file(source, DECODER_FORMAT)
    try:
        config = TransformConfig.from_dict(metadata["config"])
    except ValueError as error:
        raise ModelError(f"{label}: configuration of another version of pqmim: {error}") from error
    decoder_id = compute_decoder_id(metadata["config"], weights)
    try:
        entry = _entry(Path(), metadata)
    except (KeyError, ValueError, TypeError) as error:
        raise ModelError(f"{label}: damaged model file") from error
    if decoder_id != entry.decoder_id:
        raise ModelError(f"{label}: damaged model file (its content does not match its id)")
    decoder = DecoderFile(
        entry.name, weights, graphs, metadata["facts"], decoder_id, entry.token_model, config, entry.faithful
    )
    if entry.faithful is None:
        if realism is not None:
            raise ModelError(f"{label}: the decoder {entry.name} has no realism to choose")
        return decoder
    realism = 1.0 if realism is None else realism
    if not 0 <= realism <= 1:
        raise ValueError(f"realism must be 0 to 1, not {realism:g}")
    if realism == 1:
        return replace(decoder, realism=1.0)
    return _interpolated(decoder, _faithful_beside(source, decoder, label), realism, label)


def _faithful_beside(source: Path | bytes, decoder: DecoderFile, label: str) -> DecoderFile:
    """The faithful decoder of another one, from the same folder."""
    assert decoder.faithful is not None
    for entry in [] if isinstance(source, bytes) else decoders_beside(source):
        if entry.decoder_id == decoder.faithful:
            return load_decoder(entry.path)
    raise ModelError(
        f"{label}: realism below 1 needs the decoder {decoder.faithful.hex()}, which does not lie beside {decoder.name}"
    )


def _interpolated(decoder: DecoderFile, faithful: DecoderFile, realism: float, label: str) -> DecoderFile:
    if faithful.config != decoder.config or faithful.tensors.keys() != decoder.tensors.keys():
        raise ModelError(f"{label}: the decoders {decoder.name} and {faithful.name} are not of one shape")

    def mix(name: str) -> NDArray[Any]:
        own, other = (tensors[name].astype(np.float32) for tensors in (decoder.tensors, faithful.tensors))
        mixed: NDArray[Any] = (np.float32(1 - realism) * other + np.float32(realism) * own).astype(np.float16)
        return mixed

    return replace(decoder, tensors={name: mix(name) for name in decoder.tensors}, realism=realism)


def check_fits(decoder: DecoderFile, model: ModelFile) -> None:
    """Refuse a decoder that is for another token model.

    Raises:
        ModelError: names both.
    """
    if decoder.token_model != model.model_id:
        raise ModelError(
            f"the decoder {decoder.name} is for the token model {name_of_id(decoder.token_model)}, "
            f"not for {model.model_id.hex()} ({model.name})"
        )
    if decoder.config.latent_channels != model.config.tokenizer.analysis.latent_channels:
        raise ModelError(f"the decoder {decoder.name} is for another latent than that of {model.name}")
