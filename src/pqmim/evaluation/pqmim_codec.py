"""The codec of this package in the row of those that it is measured beside."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

from pqmim._version import __version__
from pqmim.codec import Codec, load_codec
from pqmim.decoder_files import DEFAULT_DECODER
from pqmim.evaluation.image_codecs import ImageCodec
from pqmim.options import DEFAULT_MODEL


@dataclass(frozen=True)
class PqmimCodec:
    """A token model and one of its decoders as an `ImageCodec`, and as a `DecoderCodec`.

    Attributes:
        model: name of a shipped token model, or path of one.
        device: "auto", "cpu" or "cuda".
        label: name in results and legends; by default `pqmim-DECODER`, `pqmim-DECODER@REALISM`, with the folder of a
            model that is not the default one before the decoder.
        threads: to work with; None = as many as the codec takes by itself.
        decoder, realism: as `load_codec` takes them.
        made_for: decoder whose pictures the encoder corrects; None = the one that decodes.
    """

    model: str = DEFAULT_MODEL
    device: str = "auto"
    label: str | None = None
    threads: int | None = None
    decoder: str | None = None
    realism: float | None = None
    made_for: str | None = None
    extension: str = "pqm"
    qualities: tuple[float, ...] = (0.0, 15.0, 30.0, 45.0, 60.0, 75.0, 90.0, 100.0)

    @property
    def name(self) -> str:
        if self.label is not None:
            return self.label
        return self.decoder_name if self.realism is None else f"{self.decoder_name}@{self.realism:g}"

    @property
    def decoder_name(self) -> str:
        parts = ["pqmim"]
        if self.model != DEFAULT_MODEL:
            path = Path(self.model)
            # Every token model is called "model.safetensors": the folder is what tells them apart.
            parts.append(path.resolve().parent.name if path.stem == "model" else path.stem)
        if self.decoder is not None:
            parts.append(Path(self.decoder).stem)
        elif self.model == DEFAULT_MODEL:
            parts.append(DEFAULT_DECODER)
        return "-".join(parts)

    @property
    def strength(self) -> float | None:
        return self.loaded().realism

    def takes_files_of(self, other: ImageCodec) -> bool:
        return isinstance(other, PqmimCodec) and self.loaded().model_id == other.loaded().model_id

    def loaded(self) -> Codec:
        """The codec that decodes; loaded once per process."""
        return _load_codec(self.model, self.decoder, self.realism, self.device, self.threads)

    def missing(self) -> str | None:
        return None  # a model that cannot be loaded is an error, which `description` raises

    def description(self) -> str:
        codec, encoder = self.loaded(), self._encoder()
        parts = [
            f"pqmim {__version__}",
            f"model {codec.name} ({codec.model_id.hex()})",
            f"decoder {codec.decoder_name} ({codec.decoder_id.hex()})",
            f"device {self.device}",
        ]
        if codec.realism is not None:
            parts.insert(3, f"realism {codec.realism:g}")
        if encoder.decoder_id != codec.decoder_id:
            parts.append(f"files made for {encoder.decoder_name} ({encoder.decoder_id.hex()})")
        return ", ".join(parts)

    def encode(self, image: Image.Image, quality: float) -> bytes:
        return self._encoder().encode(image, quality=quality)

    def decode(self, data: bytes) -> Image.Image:
        return self.loaded().decode(data).convert("RGB")

    def _encoder(self) -> Codec:
        if self.made_for is None:
            return self.loaded()
        return _load_codec(self.model, self.made_for, None, self.device, self.threads)


def parse_decoder(text: str) -> tuple[str, float | None]:
    """Read a decoder as it is named where several are measured: `fine`, `vivid@0.5`, a path.

    Returns:
        Name or path, and realism if one is given.
    """
    name, at, realism = text.rpartition("@")
    try:
        return (name, float(realism)) if at else (text, None)
    except ValueError:
        return text, None


@lru_cache(maxsize=8)
def _load_codec(model: str, decoder: str | None, realism: float | None, device: str, threads: int | None) -> Codec:
    return load_codec(model, decoder, realism=realism, device=device, threads=threads)
