"""Encoding and decoding for `map_batches` of Ray Data: each actor loads the model once. Takes bytes and gives bytes.

    import ray
    from pqmim.ray import Encode

    photos = ray.data.read_binary_files("photos", include_paths=True)
    coded = photos.map_batches(Encode, fn_constructor_kwargs={"quality": 60}, batch_size=16, concurrency=4)

Nothing of Ray is needed here: a batch is a dictionary of NumPy arrays. A picture that cannot be coded does not stop the
others: its `bytes` are empty, and `error` says why.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pqmim.bitstream import parse
from pqmim.loaded import decoding_codec, loaded_codec
from pqmim.options import DEFAULT_MODEL, EncodeOptions, FillOptions
from pqmim.reporting import Failure

Batch = dict[str, NDArray[Any]]
"""Columns of equal length."""


@dataclass(frozen=True)
class Coded:
    """What came of one picture, and the columns of a batch that `Encode` and `Decode` set.

    Attributes:
        bytes: the file that was made, empty if there was an error.
        width, height: of the picture, pixels; 0 if there was an error, as the next two.
        bpp: bits of the .pqm file per pixel of the picture.
        seconds: that it took.
        error: what went wrong in one line, else empty.
    """

    bytes: bytes
    width: int = 0
    height: int = 0
    bpp: float = 0.0
    seconds: float = 0.0
    error: str = ""


class Encode:
    """Pictures -> .pqm files.

    Args:
        model: name of a shipped token model, or path of one that every machine has.
        decoder: whose pictures the encoder corrects, name or path; None = the default one.
        quality, target_bytes, target_bpp, options: as `Codec.encode` takes them.
        device: "auto", "cpu" or "cuda"; give `num_gpus` to `map_batches` as well.
        threads: of the networks in each actor.

    Raises:
        ModelError, ConfigError: the model or the device cannot be used.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = DEFAULT_MODEL,
        *,
        decoder: str | os.PathLike[str] | None = None,
        quality: float = 50.0,
        target_bytes: int | None = None,
        target_bpp: float | None = None,
        options: EncodeOptions | None = None,
        device: str = "auto",
        threads: int = 1,
    ) -> None:
        self._codec = loaded_codec(model, decoder, device=device, threads=threads)
        self._quality, self._target_bytes, self._target_bpp = quality, target_bytes, target_bpp
        self._options = options

    def __call__(self, batch: Batch) -> Batch:
        """Encode a batch.

        Args:
            batch: `bytes` has files of pictures; other columns are kept.

        Returns:
            The batch with the columns of `Coded`.
        """
        return _coded(batch, self.encode)

    def encode(self, data: bytes) -> Coded:
        """Encode the content of one file."""
        return _timed(self._encoded, data)

    def _encoded(self, data: bytes) -> Coded:
        file = self._codec.encode(
            data,
            quality=self._quality,
            target_bytes=self._target_bytes,
            target_bpp=self._target_bpp,
            options=self._options,
        )
        return _described(file, file)


class Decode:
    """.pqm files -> pictures.

    Args:
        model: name or path; None = the shipped token model that a file names.
        decoder, realism: as `load_codec` takes them.
        options: as `Codec.decode` takes them.
        picture_format: of the pictures, as Pillow calls it.
        device, threads: as in `Encode`.

    Raises:
        ModelError, ConfigError: the model that is named, or the device, cannot be used.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        decoder: str | os.PathLike[str] | None = None,
        realism: float | None = None,
        options: FillOptions | None = None,
        picture_format: str = "PNG",
        device: str = "auto",
        threads: int = 1,
    ) -> None:
        self._model, self._options, self._format = model, options, picture_format
        self._decoder, self._realism = decoder, realism
        self._device, self._threads = device, threads
        if model is not None:
            loaded_codec(model, decoder, realism=realism, device=device, threads=threads)

    def __call__(self, batch: Batch) -> Batch:
        """Decode a batch.

        Args:
            batch: `bytes` has .pqm files; other columns are kept.

        Returns:
            The batch with the columns of `Coded`.
        """
        return _coded(batch, self.decode)

    def decode(self, data: bytes) -> Coded:
        """Decode the content of one file."""
        return _timed(self._decoded, data)

    def _decoded(self, data: bytes) -> Coded:
        codec = decoding_codec(
            parse(data).model_id,
            self._model,
            self._decoder,
            realism=self._realism,
            device=self._device,
            threads=self._threads,
        )
        file = io.BytesIO()
        codec.decode(data, options=self._options).save(file, self._format)
        return _described(data, file.getvalue())


def _described(pqm: bytes, result: bytes) -> Coded:
    container = parse(pqm)
    return Coded(result, container.width, container.height, 8 * len(pqm) / (container.width * container.height))


def _timed(convert: Callable[[bytes], Coded], data: bytes) -> Coded:
    """Convert one file; whatever goes wrong becomes its error."""
    start = time.perf_counter()
    try:
        coded = convert(data)
    except Exception as error:
        coded = Coded(b"", error=Failure.of(error).cause)
    return Coded(**{**asdict(coded), "seconds": time.perf_counter() - start})


def _coded(batch: Batch, convert: Callable[[bytes], Coded]) -> Batch:
    results = [convert(bytes(data)) for data in batch["bytes"]]
    files = np.empty(len(results), object)  # an array of bytes would end each at its last byte that is not 0
    files[:] = [result.bytes for result in results]
    return {
        **batch,
        "bytes": files,
        "width": np.array([result.width for result in results], np.int64),
        "height": np.array([result.height for result in results], np.int64),
        "bpp": np.array([result.bpp for result in results], np.float64),
        "seconds": np.array([result.seconds for result in results], np.float64),
        "error": np.array([result.error for result in results], object),
    }
