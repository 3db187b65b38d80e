"""What Pillow has decoded, as samples of the full range and an alpha channel, whatever the mode."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pqmim.errors import ImageError
from pqmim.image_files.color import ColorSpace


@dataclass
class Samples:
    """A picture as it is in its file.

    Attributes:
        colors: (H, W, 1) or (H, W, 3), uint8 or uint16 over the full range; or a Pillow image of mode CMYK or LAB.
        alpha: (H, W) uint8, 255 is opaque; None if there is no alpha channel.
        profile: ICC profile of the colors.
        space: what the colors mean if there is no profile; None is sRGB.
        orientation: 1 to 8, as EXIF numbers them.
    """

    colors: NDArray[Any] | Image.Image
    alpha: NDArray[np.uint8] | None = None
    profile: bytes | None = None
    space: ColorSpace | None = None
    orientation: int = 1


def colors_of(image: Image.Image) -> NDArray[Any] | Image.Image:
    """Return the colors of a loaded image, without alpha; see `Samples`.

    Raises:
        ImageError: the samples are outside of the range that is known to be black to white.
    """
    mode = image.mode
    if mode in ("CMYK", "LAB"):
        return image
    if mode in ("L", "RGB"):
        return _channels(image)
    if mode.startswith("I;16"):
        return np.array(image)[:, :, np.newaxis].astype(np.uint16, copy=False)
    if mode == "I":  # 32 bits wide, but its usual content is 16-bit grey
        levels = np.array(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise ImageError("32-bit integer samples outside 0 to 65535")
        return levels[:, :, np.newaxis].astype(np.uint16)
    if mode == "F":
        return grey_of_floats(np.array(image))
    if mode == "La":  # Pillow undoes the multiplication by alpha only on the way to LA and RGBA
        return _channels(image.convert("LA"))[:, :, :1]
    if mode == "RGBa":
        image = image.convert("RGBA")
    if mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # straight to RGB, Pillow warns of the transparency that we have already
    if image.mode in ("LA", "RGBA", "RGBX"):
        return _channels(image)[:, :, :-1]
    return _channels(image.convert("L" if mode == "1" else "RGB"))


def alpha_of(image: Image.Image) -> NDArray[np.uint8] | None:
    """Return alpha (H, W) uint8, or None if the image has no alpha channel and no transparent color."""
    if not image.has_transparency_data:
        return None
    if image.mode.startswith("I"):
        # A 16-bit grey PNG may name one transparent level, which Pillow does not convert.
        return alpha_of_key(np.array(image)[:, :, np.newaxis], (image.info["transparency"],))
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("LA", "RGBA"):
        return np.array(image.getchannel("A"))
    return np.array(image.convert("RGBA").getchannel("A"))


def alpha_of_key(samples: NDArray[Any], key: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return alpha (H, W) uint8 of a picture (H, W, C) in which one color is transparent."""
    return np.where((samples == np.array(key)).all(axis=2), np.uint8(0), np.uint8(255))


def from_16_bit(samples: NDArray[Any]) -> NDArray[np.uint8]:
    """Scale uint16 samples to the nearest of 256 levels: 65535 becomes 255."""
    return ((samples.astype(np.uint32) + 128) // 257).astype(np.uint8)


def grey_of_floats(levels: NDArray[Any]) -> NDArray[np.uint16]:
    """Scale (H, W) or (H, W, C) from 0 to 1 to uint16, (H, W, C). Raises ImageError: outside of 0 to 1."""
    if not (levels.min() >= 0 and levels.max() <= 1):  # also refuses NaN
        raise ImageError("floating-point samples outside 0 to 1")
    scaled = np.rint(levels.astype(np.float64) * 65535).astype(np.uint16)
    return scaled[:, :, np.newaxis] if levels.ndim == 2 else scaled


def as_rgb(samples: NDArray[Any]) -> NDArray[np.uint8]:
    """Return grey or RGB samples (H, W, 1 or 3), uint8 or uint16, as (H, W, 3) uint8."""
    if samples.dtype == np.uint16:
        samples = from_16_bit(samples)
    return np.repeat(samples, 3, axis=2) if samples.shape[2] == 1 else samples


def turned(channels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn an (H, W) or (H, W, C) picture upright, by the number that EXIF has for it."""
    if orientation >= 5:
        channels = channels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        channels = channels[::-1]
    if orientation in (2, 3, 6, 7):
        channels = channels[:, ::-1]
    return np.ascontiguousarray(channels)


def _channels(image: Image.Image) -> NDArray[np.uint8]:
    channels = np.array(image)
    return channels[:, :, np.newaxis] if channels.ndim == 2 else channels
