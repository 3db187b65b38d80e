"""The codec of this package in the row of those that it is measured beside."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

from pqmim._version import __version__
from pqmim.codec import Codec, load_codec


@dataclass(frozen=True)
class PqmimCodec:
    """A pqmim model as an `ImageCodec`.

    Attributes:
        model: name of a shipped model, or path of a weights file.
        device: "auto", "cpu" or "cuda".
        label: name in results and legends; by default `pqmim-` and the name of the model or its folder.
        threads: to work with; None = as many as the codec takes by itself.
    """

    model: str
    device: str = "auto"
    label: str | None = None
    threads: int | None = None
    extension: str = "pqm"
    qualities: tuple[float, ...] = (0.0, 15.0, 30.0, 45.0, 60.0, 75.0, 90.0, 100.0)

    @property
    def name(self) -> str:
        if self.label is not None:
            return self.label
        path = Path(self.model)
        # Training writes every model as "model.safetensors": the folder is what tells them apart.
        return f"pqmim-{path.resolve().parent.name if path.stem == 'model' else path.stem}"

    def loaded(self) -> Codec:
        """The codec itself; loaded once per process."""
        return _load_codec(self.model, self.device, self.threads)

    def missing(self) -> str | None:
        return None  # a model that cannot be loaded is an error, which `description` raises

    def description(self) -> str:
        codec = self.loaded()
        return f"pqmim {__version__}, model {codec.name} ({codec.model_id.hex()}), device {self.device}"

    def encode(self, image: Image.Image, quality: float) -> bytes:
        return self.loaded().encode(image, quality=quality)

    def decode(self, data: bytes) -> Image.Image:
        return self.loaded().decode(data).convert("RGB")


@lru_cache(maxsize=2)
def _load_codec(model: str, device: str, threads: int | None) -> Codec:
    return load_codec(model, device=device, threads=threads)
