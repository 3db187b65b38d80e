"""A learned image codec: product-quantized tokens, entropy-coded with a masked image model.

>>> data = pqmim.encode("photo.jpg", quality=50)    # bytes of a .pqm file
>>> pqmim.decode(data).save("photo.png")            # a Pillow image

For many images load the model once with `load_codec` and use the methods of `Codec`. All errors are drawn in
`pqmim.errors`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

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
    TokenCheckError,
    TruncatedFileError,
    UnsupportedFileError,
)

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
    "ImageError",
    "LimitError",
    "MissingExtraError",
    "ModelError",
    "ModelMismatchError",
    "NotAPqmFileError",
    "OutputError",
    "PqmimError",
    "TokenCheckError",
    "TruncatedFileError",
    "UnsupportedFileError",
    "__version__",
    "decode",
    "encode",
    "load_codec",
]


def encode(
    image: ImageLike, *, quality: float = 50.0, model: str | PathLike[str] = "small", device: str = "auto"
) -> bytes:
    """Compress one image.

    Args:
        image: path, bytes of an image file, open binary file, Pillow image, or array of uint8, uint16 or
            bool: (H, W) or (H, W, 1 to 4).
        quality: 0 to 100; higher is better and larger.
        model: name of a shipped model, or path of a model.
        device: "auto", "cpu" or "cuda"; the bytes are decodable on any of them.

    Returns:
        The content of a .pqm file.

    Raises:
        ImageError: `image` cannot be read as an image.
        LimitError: it has more than 100 million pixels.
        ModelError, ConfigError: the model or the device cannot be used.
    """
    return _codec(str(model), device).encode(image, quality=quality)


def decode(data: bytes, *, model: str | PathLike[str] | None = None, device: str = "auto") -> Image:
    """Decompress one image.

    Args:
        data: content of a .pqm file.
        model: as in `encode`; None takes the shipped model that the file names.
        device: as in `encode`.

    Returns:
        An RGB image, or an RGBA image if the original had an alpha channel.

    Raises:
        BitstreamError: the file is damaged, or was made with another model.
        LimitError: it has more than 100 million pixels.
        ModelError, ConfigError: the model or the device cannot be used.
    """
    if model is None:
        from pqmim.bitstream import parse
        from pqmim.checkpoints import shipped_model_of

        model = shipped_model_of(parse(data).model_id).name
    return _codec(str(model), device).decode(data)


@lru_cache(maxsize=2)
def _codec(model: str, device: str) -> Codec:
    """Load a codec once for many calls."""
    from pqmim.codec import load_codec

    return load_codec(model, device=device)


def __getattr__(name: str) -> Any:
    """Import on first use what needs torch, so that `import pqmim` is quick."""
    if name in ("Codec", "load_codec"):
        import pqmim.codec

        return getattr(pqmim.codec, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
