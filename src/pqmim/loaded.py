"""Codecs that a process loads once, for functions that are called without one."""

from __future__ import annotations

import os
import threading
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pqmim.codec import Codec

MAX_LOADED = 4
"""Codecs that are kept; the one that was used least recently goes first."""

_one_at_a_time = threading.Lock()


Name = str | os.PathLike[str]


def loaded_codec(
    model: Name,
    decoder: Name | None = None,
    *,
    realism: float | None = None,
    device: str = "auto",
    threads: int | None = None,
) -> Codec:
    """Load a codec at the first call; threads that ask for it meanwhile wait and get the same one.

    Args:
        model, decoder, realism, device, threads: as `codec.load_codec` takes them.

    Raises:
        ModelError, ConfigError, ValueError: as there.
    """
    with _one_at_a_time:
        # A fork of this process would have the codec but not its threads.
        chosen = None if decoder is None else os.fspath(decoder)
        return _load(os.fspath(model), chosen, realism, device, threads, os.getpid())


def decoding_codec(
    model_id: bytes,
    model: Name | None,
    decoder: Name | None = None,
    *,
    realism: float | None = None,
    device: str = "auto",
    threads: int | None = None,
) -> Codec:
    """Codec for a file: of the token model that is named, else of the shipped one that the file names.

    Args:
        model_id: as the file has it; of no effect if a model is named.
        decoder, realism, device, threads: as `loaded_codec` takes them.

    Raises:
        ModelMismatchError: no model is named, and the file's is not shipped.
        ModelError, ConfigError, ValueError: as in `loaded_codec`.
    """
    if model is None:
        from pqmim.model_files import shipped_model_of

        model = shipped_model_of(model_id).name
    return loaded_codec(model, decoder, realism=realism, device=device, threads=threads)


@lru_cache(maxsize=MAX_LOADED)
def _load(
    model: str, decoder: str | None, realism: float | None, device: str, threads: int | None, process: int
) -> Codec:
    from pqmim.codec import load_codec

    return load_codec(model, decoder, realism=realism, device=device, threads=threads)
