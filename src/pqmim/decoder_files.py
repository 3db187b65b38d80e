"""Decoders: files with a synthesis transform for the tokens of one token model, and its gradient.

They lie beside the token model's file. A decoder has a name and an id of its own, a hash of its configuration and its
weights, and says which token model it is for; any decoder of a token model decodes any of its files.

A decoder may name its *faithful* one, of the same shape, which it was fine-tuned from for pictures that look real. Its
file holds the difference to that one's weights, where there is one, in int8 with a unit for each output, which takes
less than half the room, and *realism* r in [0, 1] says how much of it is added: weights are faithful + r * difference.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pqmim.config import SynthesisConfig
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
DIFFERENCE_PREFIX, UNIT_PREFIX = "difference.", "unit."
"""Of the tensors, int8 and float32, of a decoder that was fine-tuned from a faithful one."""


@dataclass(frozen=True)
class DecoderFile(NetworkFile):
    """Content of a decoder's file.

    Its tensors are "synthesis.*" (float16), its graphs "synthesis", "synthesis_forward" and "synthesis_vjp".

    Attributes:
        token_model: id of the token model that it is for.
        faithful: id of the decoder that it was fine-tuned from for realism, if it was.
        realism: how much of the difference to the faithful decoder is in the tensors; None without one.
        faithful_decoder: that one.
    """

    decoder_id: bytes
    token_model: bytes
    config: SynthesisConfig
    faithful: bytes | None = None
    realism: float | None = None
    faithful_decoder: DecoderFile | None = None

    @property
    def is_exact(self) -> bool:
        """Whether its sums of products are exact, so that its pictures are the same on every CPU."""
        return bool(self.config.integer_blocks)


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
    """The id of a decoder: a hash of its configuration, as JSON holds it, and its file's weights, without graphs."""
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
        realism: 0 to 1, for a decoder that was fine-tuned from a faithful one; None = 1 for such a decoder.

    Raises:
        ModelError: missing, damaged, no decoder; the faithful decoder does not lie beside it; or realism is asked of a
            decoder that has none.
        ValueError: realism is out of range.
    """
    metadata, weights, graphs, label = load_file(source, DECODER_FORMAT)
    try:
        config = SynthesisConfig.from_dict(metadata["config"])
    except ValueError as error:
        raise ModelError(f"{label}: configuration of another version of pqmim: {error}") from error
    try:
        entry = _entry(Path(), metadata)
    except (KeyError, ValueError, TypeError) as error:
        raise ModelError(f"{label}: damaged model file") from error
    # The id is not computed anew: the hash of the content covers it, and hashing the weights twice takes longer.
    decoder = DecoderFile(
        entry.name, weights, graphs, metadata["facts"], entry.decoder_id, entry.token_model, config, entry.faithful
    )
    if entry.faithful is None:
        if realism is not None:
            raise ModelError(f"{label}: the decoder {entry.name} has no realism to choose")
        return decoder
    realism = 1.0 if realism is None else realism
    if not 0 <= realism <= 1:
        raise ValueError(f"realism must be 0 to 1, not {realism:g}")
    faithful = load_decoder(faithful_file(source, decoder))
    tensors = _moved(decoder, faithful, realism, label)
    return replace(decoder, tensors=tensors, realism=realism, faithful_decoder=faithful)


def faithful_file(source: Path | bytes, decoder: DecoderFile) -> Path:
    """File of the decoder that another one was fine-tuned from, which lies in the same folder.

    Raises:
        ModelError: it does not.
    """
    assert decoder.faithful is not None
    for entry in [] if isinstance(source, bytes) else decoders_beside(source):
        if entry.decoder_id == decoder.faithful and entry.faithful is None:
            return entry.path
    label = decoder.name if isinstance(source, bytes) else source
    raise ModelError(
        f"{label}: needs the decoder {decoder.faithful.hex()}, which it was made from, and which does not lie beside it"
    )


def difference(own: Mapping[str, NDArray[Any]], faithful: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """What the file of a fine-tuned decoder holds.

    Args:
        own, faithful: "synthesis.*" of both, of the same shapes.
    """
    found: dict[str, NDArray[Any]] = {}
    for name, tensor in own.items():
        if np.array_equal(tensor, faithful[name]):
            continue
        moved = (tensor.astype(np.float32) - faithful[name].astype(np.float32)).reshape(len(tensor), -1)
        unit = np.maximum(np.abs(moved).max(1, keepdims=True) / np.float32(127), np.float32(1e-12))
        key = name.removeprefix(SYNTHESIS_PREFIX)
        found[DIFFERENCE_PREFIX + key] = np.rint(moved / unit).astype(np.int8).reshape(tensor.shape)
        found[UNIT_PREFIX + key] = unit[:, 0]
    return found


def _moved(decoder: DecoderFile, faithful: DecoderFile, realism: float, label: str) -> dict[str, NDArray[Any]]:
    """Weights of the faithful decoder, moved towards those of the other one."""
    stored, complaint = (
        decoder.tensors,
        f"{label}: the decoders {decoder.name} and {faithful.name} are not of one shape",
    )
    if faithful.config != decoder.config:
        raise ModelError(complaint)

    def weight(name: str, start: NDArray[Any]) -> NDArray[Any]:
        key = name.removeprefix(SYNTHESIS_PREFIX)
        if DIFFERENCE_PREFIX + key not in stored:
            return start
        moved, unit = stored[DIFFERENCE_PREFIX + key], stored[UNIT_PREFIX + key]
        if moved.shape != start.shape or unit.shape != (len(start),):
            raise KeyError
        rows = moved.reshape(len(start), -1) * (unit * np.float32(realism))[:, None]
        total: NDArray[Any] = (start.astype(np.float32) + rows.reshape(start.shape)).astype(np.float16)
        return total

    try:
        return {name: weight(name, start) for name, start in faithful.tensors.items()}
    except KeyError as error:
        raise ModelError(complaint) from error


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
