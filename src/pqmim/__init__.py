"""A learned image codec: product-quantized tokens, entropy-coded with a masked image model.

>>> data = pqmim.encode("photo.jpg", quality=50)    # bytes of a .pqm file; or target_bytes=1000
>>> pqmim.decode(data).save("photo.png")            # a Pillow image

For many images load the model once with `load_codec` and use the methods of `Codec`. All errors are drawn in
`pqmim.errors`.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
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
    TargetError,
    TokenCheckError,
    TruncatedFileError,
    UnsupportedFileError,
)

if TYPE_CHECKING:
    from os import PathLike

    from PIL.Image import Image

    from pqmim.codec import Codec, EncodeOptions, FillOptions, load_codec
    from pqmim.encoder import Region, Tune
    from pqmim.fill import Fill
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
_NEEDS_TORCH = {
    "Codec": "pqmim.codec",
    "EncodeOptions": "pqmim.codec",
    "Fill": "pqmim.fill",
    "FillOptions": "pqmim.codec",
    "Region": "pqmim.encoder",
    "Tune": "pqmim.encoder",
    "load_codec": "pqmim.codec",
}
"""Public names that are imported on first use, and where they live."""


def encode(
    image: ImageLike,
    *,
    quality: float = 50.0,
    target_bytes: int | None = None,
    target_bpp: float | None = None,
    options: EncodeOptions | None = None,
    model: str | PathLike[str] = "small",
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
        model: name of a shipped model, or path of a model.
        device: "auto", "cpu" or "cuda"; the bytes are decodable on any of them.

    Returns:
        The content of a .pqm file. It is above a target only if no smaller file is possible.

    Raises:
        ImageError: `image` cannot be read as an image.
        LimitError: it has more than `options.max_pixels` pixels, 100 million unless given.
        TargetError: the target cannot be met, and `options.strict`.
        ModelError, ConfigError: the model or the device cannot be used.
    """
    codec = _codec(str(model), device)
    return codec.encode(image, quality=quality, target_bytes=target_bytes, target_bpp=target_bpp, options=options)


def decode(
    data: bytes,
    *,
    options: FillOptions | None = None,
    model: str | PathLike[str] | None = None,
    device: str = "auto",
) -> Image:
    """Decompress one image.

    Args:
        data: content of a .pqm file.
        options: what becomes of tokens that a partial file does not hold; None = the most likely picture.
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
    return _codec(str(model), device).decode(data, options=options)


@lru_cache(maxsize=2)
def _codec(model: str, device: str) -> Codec:
    """Load a codec once for many calls."""
    from pqmim.codec import load_codec

    return load_codec(model, device=device)


def __getattr__(name: str) -> Any:
    """Import on first use what needs torch, so that `import pqmim` is quick."""
    if name in _NEEDS_TORCH:
        return getattr(import_module(_NEEDS_TORCH[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
