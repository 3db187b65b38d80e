"""Previews: a picture in a few hundred bytes, for the time until the real one is there.

A preview is a .pqm file like any other, of a copy so small that its bytes suffice: as a rule in the mini form, with 9
bytes around the tokens. Its header has the size of the copy, which keeps the aspect ratio, not that of the original.
"""

from __future__ import annotations

import base64
import io
import math
import os
import warnings
from typing import Literal

import numpy as np
from PIL import Image

from pqmim.bitstream import at_coded_size, pack, parse
from pqmim.codec import Codec
from pqmim.errors import LimitError, TargetError
from pqmim.image_io import ImageLike, decode_alpha, encode_alpha, load_picture, to_pillow
from pqmim.loaded import decoding_codec, loaded_codec
from pqmim.options import DEFAULT_MODEL, MAX_PIXELS, EncodeOptions

Color = tuple[int, int, int]
"""Red, green, blue, 0 to 255, sRGB."""
Model = str | os.PathLike[str] | Codec
"""Name of a shipped token model, path of one, or a codec that is loaded."""
Decoder = str | os.PathLike[str] | None
"""Name or path of a decoder, None = the default one; of no effect beside a codec that is loaded."""

SIDES = (12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Longer sides of the copies that may be coded, pixels."""
SIDE_OF_ONE_BYTE = 9.5
"""Pixels. The best side grows about with the square root of the bytes; chosen on training photos."""
REACH = 1.4
"""Copies up to so many times longer or shorter than that are tried. At 1.7 training photos had 0.05 dB more in 200
bytes, and took a third longer to decode."""
ALPHA_SHARE = 0.65
"""Most of a preview's bytes that alpha may take; chosen on training photos with made outlines."""
ALPHA_VALUES = (256, 16, 4, 2)
"""Numbers of values that alpha may have, the finest first."""
THREADS = 1
"""Pictures are so small that handing work to a second thread takes longer than doing it."""
WEBP_QUALITY = 75
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)
_SMOOTH = Image.Resampling.LANCZOS


def encode(
    image: ImageLike,
    max_bytes: int = 200,
    *,
    model: Model = DEFAULT_MODEL,
    decoder: Decoder = None,
    background: Color = _WHITE,
) -> bytes:
    """Make a preview.

    Copies of several sizes are coded, and the one that shows most of the picture is taken.

    Alpha is kept coarsely where there are few bytes: with fewer values, in a smaller copy. If none is small enough, as
    below 80 to 100 bytes, the picture is laid over a background, with a warning.

    Args:
        image: as `pqmim.encode` takes it.
        max_bytes: largest size of the preview.
        model: that codes it.
        decoder: that it is made for; every other one decodes it, too.
        background: where there is no room for alpha.

    Returns:
        A .pqm file.

    Raises:
        ImageError: the input cannot be read.
        LimitError: it has more than 100 million pixels.
        TargetError: no preview is so small.
        ValueError: `max_bytes` is below 1.
        ModelError: the model cannot be used.
    """
    if max_bytes < 1:
        raise ValueError(f"max_bytes must be at least 1, not {max_bytes}")
    codec = model if isinstance(model, Codec) else loaded_codec(model, decoder, device="cpu", threads=THREADS)
    whole = to_pillow(load_picture(image, max_pixels=MAX_PIXELS))
    if whole.mode == "RGBA" and whole.getchannel("A").getextrema() == (255, 255):
        whole = whole.convert("RGB")
    if whole.mode == "RGBA":
        preview = _best(codec, whole, max_bytes)
        if preview is not None:
            return preview
        warnings.warn(f"{max_bytes} bytes have no room for alpha: the picture is laid over a background", stacklevel=2)
        whole = _over(whole, background)
    preview = _best(codec, whole, max_bytes)
    assert preview is not None  # what has no alpha can be coded
    return preview


def decode(data: bytes, max_side: int = 96, *, model: Model | None = None, decoder: Decoder = None) -> Image.Image:
    """Decode a preview, or any other .pqm file, as a small picture.

    Args:
        max_side: longer side of the result, pixels, at least 1; a smaller picture is scaled up.
        model: None takes the shipped token model that the file names.
        decoder: that makes the picture.

    Returns:
        RGB, or RGBA if the preview has alpha.

    Raises:
        BitstreamError: damaged, not a .pqm file, or made with another model.
        LimitError: a file of more than 100 million pixels.
        ModelError: the model cannot be used.
        ValueError: `max_side` is below 1.
    """
    if max_side < 1:
        raise ValueError(f"max_side must be at least 1, not {max_side}")
    return _coded_picture(data, model, decoder).resize(_fitting(aspect_ratio(data), max_side), _SMOOTH)


def to_data_url(
    data: bytes,
    max_side: int = 64,
    format: Literal["webp", "png"] = "webp",  # noqa: A002 (as Pillow calls it)
    *,
    model: Model | None = None,
    decoder: Decoder = None,
) -> str:
    """Decode a preview as a picture that every page can show.

    Args:
        max_side, model, decoder: as in `decode`; errors as there.
        format: "webp", small and lossy, or "png".

    Returns:
        data:image/webp;base64,...
    """
    if format not in ("webp", "png"):
        raise ValueError(f"format must be webp or png, not {format!r}")
    file = io.BytesIO()
    decode(data, max_side, model=model, decoder=decoder).save(
        file, format.upper(), quality=WEBP_QUALITY, method=6, optimize=True
    )
    return f"data:image/{format};base64,{base64.b64encode(file.getvalue()).decode()}"


def average_color(data: bytes, *, model: Model | None = None, decoder: Decoder = None) -> Color:
    """Mean color of what is visible in a preview.

    Not even the first bytes of a file say anything without the network, so this decodes the picture; errors as in
    `decode`.

    Returns:
        Mean of the sRGB values, weighted by alpha.
    """
    return _mean_of_visible(_coded_picture(data, model, decoder))


def aspect_ratio(data: bytes) -> float:
    """Width over height, from the header alone.

    Raises:
        BitstreamError: damaged, or not a .pqm file.
    """
    container = parse(data)
    return container.width / container.height


def _best(codec: Codec, whole: Image.Image, max_bytes: int) -> bytes | None:
    """Preview that shows most of a picture; None if there is none with its alpha."""
    sizes = _sizes_to_try(whole, max_bytes)
    wanted = whole.resize(sizes[-1], _SMOOTH, reducing_gap=3.0)
    best, least_error = None, math.inf
    for size in sizes:
        copy = _codable(whole.resize(size, _SMOOTH, reducing_gap=3.0), max_bytes)
        if copy is None:
            continue
        try:
            data = codec.encode(copy, target_bytes=max_bytes, options=EncodeOptions(scale=1, strict=True))
        except TargetError:
            if copy.mode == "RGBA":
                continue
            raise
        error = _error(wanted, codec.decode(data).resize(wanted.size, _SMOOTH))
        if error < least_error:
            best, least_error = data, error
    return best


def _sizes_to_try(whole: Image.Image, max_bytes: int) -> list[tuple[int, int]]:
    """Sizes of copies, rising; none is larger than the picture. Alpha leaves few bytes for colors: smaller ones."""
    good = min(max(SIDE_OF_ONE_BYTE * math.sqrt(max_bytes), SIDES[0]), SIDES[-1])
    least, most = (SIDES[0], good) if whole.mode == "RGBA" else (good / REACH, good * REACH)
    sides = dict.fromkeys(min(side, max(whole.size)) for side in SIDES if least <= side <= most)
    return [_fitting(whole.width / whole.height, side) for side in sides]


def _fitting(ratio: float, side: int) -> tuple[int, int]:
    """Width and height of this ratio, the longer one given."""
    return (side, max(1, round(side / ratio))) if ratio >= 1 else (max(1, round(side * ratio)), side)


def _codable(copy: Image.Image, max_bytes: int) -> Image.Image | None:
    """A copy as it is coded: with simple alpha, or without if it is opaque; None if there is no room for alpha."""
    if copy.mode == "RGB":
        return copy
    for number in ALPHA_VALUES:
        alpha = copy.getchannel("A").point([_nearest(value, number) for value in range(256)])
        if len(encode_alpha(np.asarray(alpha))) <= ALPHA_SHARE * max_bytes:
            break
    else:
        return None
    colors = _with_colors_everywhere(copy)
    if alpha.getextrema() != (255, 255):
        colors.putalpha(alpha)
    return colors


def _nearest(value: int, number: int) -> int:
    """The nearest of so many values, the first 0 and the last 255."""
    return round(round(value / 255 * (number - 1)) * 255 / (number - 1))


def _with_colors_everywhere(image: Image.Image) -> Image.Image:
    """An RGBA picture as RGB: where it is transparent, a smooth continuation of its colors, which takes few bytes."""
    filled = Image.new("RGBA", image.size, (*_mean_of_visible(image), 255))
    side = 2
    while side < max(image.size):
        coarse = image.resize(_fitting(image.width / image.height, side), Image.Resampling.BOX)
        filled.alpha_composite(coarse.resize(image.size, Image.Resampling.BICUBIC))
        side *= 2
    filled.alpha_composite(image)
    return filled.convert("RGB")


def _mean_of_visible(image: Image.Image) -> Color:
    """Mean of the colors of an image, each weighted by its alpha; black if nothing is visible."""
    pixels = np.asarray(image.convert("RGBA"), np.float64).reshape(-1, 4)
    weights = pixels[:, 3]
    red, green, blue = np.rint(weights @ pixels[:, :3] / max(1.0, weights.sum())).astype(int).tolist()
    return red, green, blue


def _over(image: Image.Image, color: Color) -> Image.Image:
    """Lay a picture over a color."""
    below = Image.new("RGBA", image.size, color)
    below.alpha_composite(image.convert("RGBA"))
    return below.convert("RGB")


def _error(wanted: Image.Image, shown: Image.Image) -> float:
    """Squared error of all samples, over black and over white if there is alpha."""
    pairs = [(wanted, shown)]
    if "RGBA" in (wanted.mode, shown.mode):
        pairs = [(_over(wanted, color), _over(shown, color)) for color in (_BLACK, _WHITE)]
    return float(sum(np.square(np.asarray(a, np.float64) - np.asarray(b)).sum() for a, b in pairs))


def _coded_picture(data: bytes, model: Model | None, decoder: Decoder) -> Image.Image:
    """Picture of a file in the size in which it was coded.

    Raises:
        BitstreamError, LimitError, ModelError: see `decode`.
    """
    container = parse(data)
    if container.width * container.height > MAX_PIXELS:
        raise LimitError(f"{container.width} x {container.height} pixels are above the limit of {MAX_PIXELS:,}")
    codec = model
    if not isinstance(codec, Codec):
        codec = decoding_codec(container.model_id, codec, decoder, device="cpu", threads=THREADS)
    picture = codec.decode(pack(at_coded_size(container)))
    if container.alpha is not None:
        alpha = Image.fromarray(decode_alpha(container.alpha, container.width, container.height))
        picture.putalpha(alpha.resize(picture.size, Image.Resampling.BOX))
    return picture
