"""A learned image codec: product-quantized tokens, entropy-coded with a masked image model.

>>> data = pqmim.encode("photo.jpg", quality=50)    # bytes of a .pqm file; or target_bytes=1000
>>> pqmim.decode(data).save("photo.png")            # a Pillow image

For many images load the model once with `load_codec` and use the methods of `Codec`. All errors are drawn in
`pqmim.errors`.
"""

from __future__ import annotations

import io
import os
from importlib import import_module
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, BinaryIO

from pqmim._version import __version__
from pqmim.errors import (
    BitstreamError,
    ConfigError,
    DamagedFileError,
    ImageError,
    LimitError,
    MissingExtraError,
    ModelError,
    ModelMismatchError,
    NotAPqmFileError,
    OutputError,
    PqmimError,
    TargetError,
    TokenCheckError,
    TruncatedFileError,
    UnsupportedFileError,
)
from pqmim.options import DEFAULT_MODEL, EncodeOptions, Fill, FillOptions, Region, Tune

if TYPE_CHECKING:
    from os import PathLike

    from PIL.Image import Image

    from pqmim.codec import Codec, load_codec
    from pqmim.image_io import ImageLike

__all__ = [
    "BitstreamError",
    "Codec",
    "ConfigError",
    "DamagedFileError",
    "EncodeOptions",
    "Fill",
    "FillOptions",
    "ImageError",
    "LimitError",
    "MissingExtraError",
    "ModelError",
    "ModelMismatchError",
    "NotAPqmFileError",
    "OutputError",
    "PqmimError",
    "Region",
    "TargetError",
    "TokenCheckError",
    "TruncatedFileError",
    "Tune",
    "UnsupportedFileError",
    "__version__",
    "decode",
    "encode",
    "load_codec",
]
_IN_CODEC = ("Codec", "load_codec")
"""Public names that are imported on first use, since NumPy, Pillow and ONNX Runtime come with them."""


def encode(
    image: ImageLike,
    *,
    quality: float = 50.0,
    target_bytes: int | None = None,
    target_bpp: float | None = None,
    options: EncodeOptions | None = None,
    model: str | PathLike[str] = DEFAULT_MODEL,
    decoder: str | PathLike[str] | None = None,
    device: str = "auto",
) -> bytes:
    """Compress one image.

    Args:
        image: path, bytes of an image file, open binary file, Pillow image, or array of uint8, uint16 or
            bool: (H, W) or (H, W, 1 to 4).
        quality: 0 to 100; higher is better and larger. Of no effect if there is a target.
        target_bytes: largest size of the file, at least 1; the file comes as near as it can.
        target_bpp: the same in bits per pixel of the image, above 0; not together with `target_bytes`.
        options: effort, regions and more; None = the defaults.
        model: name of a shipped token model, or path of one.
        decoder: whose pictures the encoder corrects: name of a decoder of the model, or its path; None = `fine`, if it
            is there, or `vivid` with `Tune.VIVID`. The file is decoded by every decoder of the model.
        device: "auto", "cpu" or "cuda"; the bytes are decodable on any of them.

    Returns:
        The content of a .pqm file. It is above a target only if no smaller file is possible.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
        ImageError: `image` cannot be read as an image.
        LimitError: it has more than `options.max_pixels` pixels, 100 million unless given.
        TargetError: the target cannot be met, and `options.strict`.
        ModelError, ConfigError: the model, the decoder, the device or `Tune.VIVID` cannot be used.
    """
    _check_type("quality", quality, Real, "a number")
    _check_type("target_bytes", target_bytes, (Integral, type(None)), "a whole number or None")
    _check_type("target_bpp", target_bpp, (Real, type(None)), "a number or None")
    _check_type("options", options, (EncodeOptions, type(None)), "EncodeOptions or None")
    _check_type("model", model, (str, os.PathLike), "a name or a path")
    _check_type("decoder", decoder, (str, os.PathLike, type(None)), "a name, a path or None")
    _check_type("device", device, str, "a string")
    from pqmim.loaded import loaded_codec

    judge = None
    if options is not None and options.tune == Tune.VIVID:
        from pqmim.perceptual.tuning import VIVID, require_vivid, vivid_judge

        decoder = decoder or VIVID
        require_vivid(model, decoder)
        judge = vivid_judge()
    return loaded_codec(model, decoder, device=device).encode(
        _readable(image),
        quality=quality,
        target_bytes=target_bytes,
        target_bpp=target_bpp,
        options=options,
        judge=judge,
    )


def decode(
    data: bytes | str | PathLike[str] | BinaryIO,
    *,
    options: FillOptions | None = None,
    model: str | PathLike[str] | None = None,
    decoder: str | PathLike[str] | None = None,
    realism: float | None = None,
    device: str = "auto",
) -> Image:
    """Decompress one image.

    Args:
        data: a .pqm file: its bytes, its path, or the file itself, opened in binary mode.
        options: what becomes of tokens that a partial file does not hold; None = the most likely picture.
        model: as in `encode`; None takes the shipped model that the file names.
        decoder: that makes the picture, named as in `encode`.
        realism: 0 to 1, of a decoder that synthesises detail, how much of it; None = 1. No other decoder has it.
        device: as in `encode`.

    Returns:
        An RGB image, or an RGBA image if the original had an alpha channel.

    Raises:
        TypeError: an argument is of the wrong type.
        BitstreamError: the file cannot be read, is damaged, or was made with another model.
        LimitError: it has more than 100 million pixels.
        ModelError, ConfigError: the model, the decoder or the device cannot be used.
        ValueError: realism is out of range.
    """
    _check_type("options", options, (FillOptions, type(None)), "FillOptions or None")
    _check_type("model", model, (str, os.PathLike, type(None)), "a name, a path or None")
    _check_type("decoder", decoder, (str, os.PathLike, type(None)), "a name, a path or None")
    _check_type("realism", realism, (Real, type(None)), "a number or None")
    _check_type("device", device, str, "a string")
    content = _content(data)
    from pqmim.bitstream import parse
    from pqmim.loaded import decoding_codec

    codec = decoding_codec(parse(content).model_id, model, decoder, realism=realism, device=device)
    return codec.decode(content, options=options)


def _check_type(name: str, value: object, kinds: type | tuple[type, ...], wanted: str) -> None:
    if not isinstance(value, kinds):
        raise TypeError(f"{name} must be {wanted}, not {_kind(value)}")


def _kind(value: object) -> str:
    return "a text file" if isinstance(value, io.TextIOBase) else type(value).__name__


def _is_binary_file(value: object) -> bool:
    return hasattr(value, "read") and not isinstance(value, io.TextIOBase)


def _readable(image: ImageLike) -> ImageLike:
    """Refuse what is no image in any form."""
    if isinstance(image, (bytearray, memoryview)):
        return bytes(image)
    is_array = hasattr(type(image), "__array_interface__")  # of arrays and of Pillow images
    if not (isinstance(image, (str, bytes, os.PathLike)) or is_array or _is_binary_file(image)):
        raise TypeError(f"image must be a path, bytes, a binary file, a Pillow image or an array, not {_kind(image)}")
    return image


def _content(data: bytes | str | PathLike[str] | BinaryIO) -> bytes:
    """Bytes of a file, from all that people have of it."""
    if isinstance(data, (str, os.PathLike)):
        try:
            with open(data, "rb") as file:
                return file.read()
        except OSError as error:
            raise BitstreamError(error.strerror or str(error)) from error
    content: object = data
    if not isinstance(data, (bytes, bytearray, memoryview)) and _is_binary_file(data):
        content = data.read()
    if isinstance(content, (bytes, bytearray, memoryview)):
        return bytes(content)
    raise TypeError(f"data must be bytes, a path or a binary file, not {_kind(data)}")


def __getattr__(name: str) -> Any:
    """Import on first use what is heavy, so that `import pqmim` is quick."""
    if name in _IN_CODEC:
        return getattr(import_module("pqmim.codec"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
