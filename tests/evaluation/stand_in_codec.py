"""A codec small enough to reason about, in place of pqmim's and the references'."""

import io
import zlib
from dataclasses import dataclass, field

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class StandInCodec:
    """Keeps the upper bits of every sample and deflates them; `quality` is the number of bits."""

    name: str = "stand-in"
    extension: str = "bits"
    qualities: tuple[float, ...] = (1.0, 3.0, 5.0)
    version: int = 1
    log: list[str] = field(default_factory=list, compare=False, repr=False)

    def missing(self) -> str | None:
        return None

    def description(self) -> str:
        return f"stand-in {self.version}"

    def encode(self, image: Image.Image, quality: float) -> bytes:
        self.log.append(f"encode {image.width}x{image.height} {quality:g}")
        pixels = np.asarray(image).astype(np.uint16)
        step = 256 >> round(quality)
        file = io.BytesIO()
        np.save(file, (pixels // step * step + step // 2).astype(np.uint8))
        return zlib.compress(file.getvalue())

    def decode(self, data: bytes) -> Image.Image:
        return Image.fromarray(np.load(io.BytesIO(zlib.decompress(data))))


@dataclass(frozen=True)
class StandInDecoder(StandInCodec):
    """Another decoder of the same files: brighter the higher its realism is."""

    strength: float | None = None

    @property
    def decoder_name(self) -> str:
        return "bright"

    def takes_files_of(self, other: object) -> bool:
        return isinstance(other, StandInCodec)

    def decode(self, data: bytes) -> Image.Image:
        bright = round(60 * (self.strength or 0))
        return Image.fromarray((np.asarray(super().decode(data)).astype(int) + bright).clip(0, 255).astype(np.uint8))


def write_photos(folder, number: int = 3, size: tuple[int, int] = (176, 168)) -> None:
    """Write `number` different PNG pictures of `size` (width, height)."""
    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[: size[1], : size[0]]
    for index in range(number):
        waves = [np.sin(x / (11 + index)), np.cos(y / 17), np.sin((x + y) / 23)]
        noise = np.random.default_rng(index).normal(0, 5, (size[1], size[0], 3))
        pixels = np.clip(128 + 90 * np.stack(waves, axis=2) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"photo{index}.png")
