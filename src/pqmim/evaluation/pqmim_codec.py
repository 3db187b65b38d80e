"""The codec of this package in the row of those that it is measured beside."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

from pqmim._version import __version__
from pqmim.codec import Codec, load_codec
from pqmim.decoder_files import DEFAULT_DECODER
from pqmim.options import DEFAULT_MODEL


@dataclass(frozen=True)
class PqmimCodec:
    """A pqmim model as an `ImageCodec`.

    Attributes:
        model: name of a shipped token model, or path of one.
        device: "auto", "cpu" or "cuda".
        label: name in results and legends; by default `pqmim (DECODER)`, with the model or its folder if it is not the
            default one.
        threads: to work with; None = as many as the codec takes by itself.
        decoder, realism: as `load_codec` takes them.
    """

    model: str = DEFAULT_MODEL
    device: str = "auto"
    label: str | None = None
    threads: int | None = None
    decoder: str | None = None
    realism: float | None = None
    extension: str = "pqm"
    qualities: tuple[float, ...] = (0.0, 15.0, 30.0, 45.0, 60.0, 75.0, 90.0, 100.0)

    @property
    def name(self) -> str:
        if self.label is not None:
            return self.label
        decoder = DEFAULT_DECODER if self.decoder is None else Path(self.decoder).stem
        if self.realism is not None:
            decoder += f" {self.realism:g}"
        if self.model == DEFAULT_MODEL:
            return f"pqmim ({decoder})"
        path = Path(self.model)
        # Every token model is called "model.safetensors": the folder is what tells them apart.
        return f"pqmim {path.resolve().parent.name if path.stem == 'model' else path.stem} ({decoder})"

    def loaded(self) -> Codec:
        """The codec itself; loaded once per process."""
        return _load_codec(self.model, self.decoder, self.realism, self.device, self.threads)

    def missing(self) -> str | None:
        return None  # a model that cannot be loaded is an error, which `description` raises

    def description(self) -> str:
        codec = self.loaded()
        model = f"model {codec.name} ({codec.model_id.hex()})"
        decoder = f"decoder {codec.decoder_name} ({codec.decoder_id.hex()})"
        return f"pqmim {__version__}, {model}, {decoder}, device {self.device}"

    def encode(self, image: Image.Image, quality: float) -> bytes:
        return self.loaded().encode(image, quality=quality)

    def decode(self, data: bytes) -> Image.Image:
        return self.loaded().decode(data).convert("RGB")


@lru_cache(maxsize=2)
def _load_codec(model: str, decoder: str | None, realism: float | None, device: str, threads: int | None) -> Codec:
    return load_codec(model, decoder, realism=realism, device=device, threads=threads)
