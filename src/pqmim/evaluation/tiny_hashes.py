"""BlurHash and ThumbHash, what pages show today while a picture loads: to compare with.

Both keep the lowest frequencies of a cosine transform. Written from their descriptions, https://blurha.sh and
https://evanw.github.io/thumbhash, since ThumbHash's package cannot be installed beside a current Pillow; on test
pictures the hashes are those of the packages blurhash-python 1.2.2 and thumbhash-python 1.0.1.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pqmim.evaluation.pixel_metrics import Pixels

Values = NDArray[np.float64]

DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz#$%*+,-.:;=?@[]^_{|}~"
BLURHASH_SOURCE_SIDE = 96
"""Pixels: a BlurHash is made of a small picture, as its authors advise; it holds 9 waves at most."""
THUMBHASH_SOURCE_SIDE = 100
"""Pixels: the largest picture that a ThumbHash may be made of."""


def blurhash_of(image: Image.Image, columns: int = 4, rows: int = 3) -> str:
    """BlurHash of an RGB image.

    Args:
        columns, rows: waves across and down, 1 to 9.

    Returns:
        4 + 2 * columns * rows characters.
    """
    small = _shrunk(image.convert("RGB"), BLURHASH_SOURCE_SIDE)
    linear = _linear(np.asarray(small, np.float64) / 255)
    height, width = linear.shape[:2]
    across, down = _waves(columns, np.arange(width) / width), _waves(rows, np.arange(height) / height)
    waves = np.einsum("jy,ix,yxc->jic", down, across, linear) / (height * width)
    waves = waves.reshape(-1, 3) * 2
    mean, others = waves[0] / 2, waves[1:]
    largest = min(max(math.floor(np.abs(others).max(initial=0) * 166 - 0.5), 0), 82)
    red, green, blue = np.floor(_srgb(mean) * 255 + 0.5).astype(int).tolist()
    steps = np.sign(others) * np.sqrt(np.abs(others) * 166 / (largest + 1))
    levels = np.clip(np.floor(steps * 9 + 9.5), 0, 18).astype(int).tolist()
    text = _digits(columns - 1 + 9 * (rows - 1), 1) + _digits(largest, 1) + _digits(red << 16 | green << 8 | blue, 4)
    return text + "".join(_digits((r * 19 + g) * 19 + b, 2) for r, g, b in levels)


def picture_of_blurhash(text: str, width: int, height: int) -> Pixels:
    """Picture (height, width, 3) uint8 of a BlurHash."""
    rows, columns = (part + 1 for part in divmod(_number(text[0]), 9))
    mean = _number(text[2:6])
    waves = np.empty((rows * columns, 3))
    waves[0] = _linear(np.array([mean >> 16, mean >> 8 & 255, mean & 255]) / 255)
    for index in range(1, len(waves)):
        number = _number(text[4 + 2 * index : 6 + 2 * index])
        steps = (np.array([number // 361, number // 19 % 19, number % 19]) - 9) / 9
        waves[index] = np.sign(steps) * np.square(steps) * (_number(text[1]) + 1) / 166
    across, down = _waves(columns, np.arange(width) / width), _waves(rows, np.arange(height) / height)
    linear = np.einsum("jy,ix,jic->yxc", down, across, waves.reshape(rows, columns, 3))
    return _bytes(_srgb(linear.clip(0, 1)))


def thumbhash_of(image: Image.Image) -> bytes:
    """ThumbHash of an image, with its alpha if it has some: 16 to 25 bytes."""
    small = _shrunk(image.convert("RGBA"), THUMBHASH_SOURCE_SIDE)
    pixels = np.asarray(small, np.float64) / 255
    width, height = small.size
    alpha = pixels[:, :, 3]
    mean = (pixels[:, :, :3] * alpha[:, :, None]).sum((0, 1)) / max(alpha.sum(), 1e-9)
    has_alpha = bool((alpha < 1).any())
    red, green, blue = np.moveaxis(mean + alpha[:, :, None] * (pixels[:, :, :3] - mean), 2, 0)

    sides = [max(1, _rounded((5 if has_alpha else 7) * side / max(width, height))) for side in small.size]
    brightness = _kept_waves((red + green + blue) / 3, *(max(3, side) for side in sides))
    yellow, redness = _kept_waves((red + green) / 2 - blue, 3, 3), _kept_waves(red - green, 3, 3)
    start = _rounded(63 * brightness[0]) | _rounded(31.5 + 31.5 * yellow[0]) << 6
    start |= _rounded(31.5 + 31.5 * redness[0]) << 12 | _rounded(31 * brightness[1]) << 18 | has_alpha << 23
    shape = sides[1 if width > height else 0] | (width > height) << 15
    shape |= _rounded(63 * yellow[1]) << 3 | _rounded(63 * redness[1]) << 9
    data = start.to_bytes(3, "little") + shape.to_bytes(2, "little")
    channels = [brightness, yellow, redness]
    if has_alpha:
        channels.append(_kept_waves(alpha, 5, 5))
        data += bytes([_rounded(15 * channels[3][0]) | _rounded(15 * channels[3][1]) << 4])
    halves = [_rounded(15 * wave) for _, _, waves in channels for wave in waves]
    halves += [0] * (len(halves) % 2)
    return data + bytes(low | high << 4 for low, high in zip(halves[::2], halves[1::2], strict=True))


def picture_of_thumbhash(data: bytes, width: int, height: int) -> Pixels:
    """Picture (height, width, 4) uint8 of a ThumbHash, whose own idea of the size is approximate."""
    start, shape = int.from_bytes(data[:3], "little"), int.from_bytes(data[3:5], "little")
    has_alpha = bool(start >> 23)
    sides = [5 if has_alpha else 7, shape & 7]
    columns, rows = (max(3, side) for side in (sides if shape >> 15 else sides[::-1]))
    halves = iter([half for byte in data[6 if has_alpha else 5 :] for half in (byte & 15, byte >> 4)])

    def channel(mean: float, scale: float, columns: int, rows: int) -> Values:
        waves = np.zeros((rows, columns))
        waves[0, 0] = mean
        for down, across in _kept(columns, rows):
            waves[down, across] = 2 * (next(halves) / 7.5 - 1) * scale
        across_waves = _waves(columns, (np.arange(width) + 0.5) / width)
        return _waves(rows, (np.arange(height) + 0.5) / height).T @ waves @ across_waves

    brightness = channel((start & 63) / 63, (start >> 18 & 31) / 31, columns, rows)
    yellow = channel((start >> 6 & 63) / 31.5 - 1, 1.25 * (shape >> 3 & 63) / 63, 3, 3)
    redness = channel((start >> 12 & 63) / 31.5 - 1, 1.25 * (shape >> 9 & 63) / 63, 3, 3)
    alpha = channel((data[5] & 15) / 15, (data[5] >> 4) / 15, 5, 5) if has_alpha else np.ones((height, width))
    blue = brightness - 2 / 3 * yellow
    red = (3 * brightness - blue + redness) / 2
    return _bytes(np.stack([red, red - redness, blue, alpha], 2).clip(0, 1))


def _kept_waves(channel: Values, columns: int, rows: int) -> tuple[float, float, list[float]]:
    """Mean, largest other wave, and the others, 0 to 1 where 0.5 is none."""
    height, width = channel.shape
    across = _waves(columns, (np.arange(width) + 0.5) / width)
    waves = _waves(rows, (np.arange(height) + 0.5) / height) @ channel @ across.T / (height * width)
    others = np.array([waves[position] for position in _kept(columns, rows)])
    scale = float(np.abs(others).max())
    return float(waves[0, 0]), scale, (others / scale / 2 + 0.5 if scale else others).tolist()


def _kept(columns: int, rows: int) -> list[tuple[int, int]]:
    """(down, across) of the waves of a triangle, without the mean."""
    return [(j, i) for j in range(rows) for i in range(columns) if i * rows + j > 0 and i * rows < columns * (rows - j)]


def _waves(count: int, places: Values) -> Values:
    """Cosine waves at places from 0 to 1: (count, n)."""
    return np.cos(np.pi * np.arange(count)[:, None] * places)


def _shrunk(image: Image.Image, side: int) -> Image.Image:
    """An image no larger than a square."""
    if max(image.size) <= side:
        return image
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BOX)


def _linear(srgb: Values) -> Values:
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def _srgb(linear: Values) -> Values:
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * np.maximum(linear, 0) ** (1 / 2.4) - 0.055)


def _bytes(values: Values) -> Pixels:
    return np.floor(values * 255 + 0.5).astype(np.uint8)


def _rounded(value: float) -> int:
    """Halves up, as both descriptions have it."""
    return math.floor(value + 0.5)


def _digits(number: int, count: int) -> str:
    return "".join(DIGITS[number // 83**place % 83] for place in reversed(range(count)))


def _number(text: str) -> int:
    value = 0
    for digit in text:
        value = value * 83 + DIGITS.index(digit)
    return value
