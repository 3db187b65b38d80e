"""The codec: image -> bytes -> image. Joins image files, transforms, step loop and container, which do not know each
other."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pqmim import bitstream
from pqmim.autoencoder import STRIDE
from pqmim.bitstream import Container
from pqmim.checkpoints import LoadedModel, find_model, load_model, shipped_models
from pqmim.config import QualityRange
from pqmim.errors import (
    ConfigError,
    DamagedFileError,
    LimitError,
    ModelMismatchError,
    TokenCheckError,
    UnsupportedFileError,
)
from pqmim.exact_inference import ExactEntropyModel
from pqmim.image_io import ImageLike, Picture, decode_alpha, encode_alpha, load_picture, to_pillow
from pqmim.range_coding import TokenReader, TokenWriter
from pqmim.schedule import Step
from pqmim.token_coding import GivenTokens, RateDistortionChoice, bits_table, code_tokens
from pqmim.tokenizer import Tokenizer

MAX_PIXELS = 100_000_000
"""Default limit on width x height, against files that ask for more memory than there is."""
TILE_POSITIONS = 48
"""Side of the tiles that the transforms work on, positions, without margin."""


@dataclass(frozen=True)
class RateBreakdown:
    """What the tokens of one image cost under four models, bits.

    Attributes:
        uniform: log2 K for each token.
        static: the static prior of the same trade-off, no context.
        exact: the masked model's frequencies, as the file uses them.
        payload: what the range coder wrote.
        file: the whole file.
    """

    uniform: float
    static: float
    exact: float
    payload: float
    file: float


class Codec:
    """A trained model that encodes and decodes images.

    Args:
        model: from `checkpoints.load_model`.
        device: where the networks run.
        kernel: integer-product kernel of the entropy model; None = the fastest of the device.
    """

    def __init__(self, model: LoadedModel, device: torch.device, *, kernel: str | None = None) -> None:
        self.name: str = model.name
        self.model_id: bytes = model.model_id
        self.facts = model.facts
        self.device = device
        self._quality: QualityRange = model.quality
        self._tokenizer: Tokenizer = model.tokenizer.to(device).requires_grad_(False)
        self._margin = self._tokenizer.config.autoencoder.margin
        self._entropy_model = ExactEntropyModel(
            model.entropy_config,
            model.entropy_tensors,
            self._tokenizer.quantizer.runs(),
            device=device,
            kernel=kernel,
        )

    @property
    def kernel(self) -> str:
        """Integer-product kernel in use, one of `exact_inference.KERNELS`."""
        return self._entropy_model.kernel

    def encode(self, image: ImageLike, *, quality: float = 50.0, max_pixels: int = MAX_PIXELS) -> bytes:
        """Compress an image.

        Args:
            image: path, bytes or file of anything that Pillow opens; Pillow image; uint8 array (H, W), (H, W, 3) or
                (H, W, 4). EXIF orientation is applied, other color spaces are converted to sRGB.
            quality: 0 to 100, higher is better and larger; continuous.
            max_pixels: larger images are refused.

        Returns:
            Content of a .pqm file.

        Raises:
            ImageError: the input cannot be read.
            LimitError: more than `max_pixels` pixels.
            ValueError: quality is outside [0, 100].
        """
        picture = load_picture(image, max_pixels=max_pixels)
        writer = TokenWriter()
        level, tokens = self._choose_tokens(picture, quality, writer)
        return self._pack(picture, level, tokens, writer.finish())

    def encode_tokens(self, image: ImageLike, *, quality: float = 50.0) -> NDArray[np.int64]:
        """The token grid (M, h, w) int64 that `encode` sends for an image; arguments and errors as there."""
        _, tokens = self._choose_tokens(load_picture(image, max_pixels=MAX_PIXELS), quality, TokenWriter())
        return np.asarray(tokens.cpu().numpy(), dtype=np.int64)

    def decode(self, data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
        """Decompress the content of a .pqm file.

        Returns:
            RGB or RGBA image of the original size.

        Raises:
            BitstreamError: damaged or truncated, not a .pqm file, or made with another model.
            LimitError: more than `max_pixels` pixels.
        """
        container = self._parse(data, max_pixels)
        tokens = self._read_tokens(container)
        alpha = None
        if container.alpha is not None:
            alpha = decode_alpha(container.alpha, container.width, container.height)
        rgb = self._synthesize(tokens)[: container.height, : container.width]
        return to_pillow(Picture(rgb, alpha))

    def decode_tokens(self, data: bytes, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.int64]:
        """The token grid (M, h, w) int64 of a file; errors as `decode`."""
        tokens = self._read_tokens(self._parse(data, max_pixels))
        return np.asarray(tokens.cpu().numpy(), dtype=np.int64)

    def token_hash(self, data: bytes) -> str:
        """SHA-256 (hex) of a file's token grid as little-endian uint16: equal on every machine."""
        return hashlib.sha256(_token_bytes(torch.from_numpy(self.decode_tokens(data)))).hexdigest()

    @torch.inference_mode()
    def encode_with_rates(self, image: ImageLike, *, quality: float = 50.0) -> tuple[bytes, RateBreakdown]:
        """What `encode` returns, and what its tokens cost: uniform codes, static frequencies, masked model."""
        picture = load_picture(image, max_pixels=MAX_PIXELS)
        level, tokens = self._choose_tokens(picture, quality, TokenWriter())
        writer, counted = TokenWriter(), _CountedTokens(tokens)
        code_tokens(self._entropy_model, writer, tokens.shape[1], tokens.shape[2], level, counted)
        payload = writer.finish()
        data = self._pack(picture, level, tokens, payload)
        quantizer = self._tokenizer.quantizer
        prior = quantizer.prior_bits(self._quality.w(quality))[0]
        return data, RateBreakdown(
            uniform=tokens.numel() * float(np.log2(quantizer.num_codewords)),
            static=float(prior.gather(1, tokens.flatten(1)).double().sum()),
            exact=counted.bits,
            payload=8.0 * len(payload),
            file=8.0 * len(data),
        )

    # -- parts of encode and decode ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def _choose_tokens(self, picture: Picture, quality: float, writer: TokenWriter) -> tuple[int, Tensor]:
        """Run the encoder's loop: level, tokens (M, h, w) int64; `writer` holds the tokens."""
        w = self._quality.w(quality)
        level = int(self._tokenizer.quantizer.level(w))
        z = self._analyze(picture.rgb)
        choice = RateDistortionChoice(self._tokenizer.quantizer, z, w)
        return level, code_tokens(self._entropy_model, writer, z.shape[2], z.shape[3], level, choice)

    def _pack(self, picture: Picture, level: int, tokens: Tensor, payload: bytes) -> bytes:
        height, width = picture.rgb.shape[:2]
        return bitstream.pack(
            Container(
                width=width,
                height=height,
                model_id=self.model_id,
                level=level,
                payload=payload,
                token_check=bitstream.token_check(_token_bytes(tokens)),
                alpha=None if picture.alpha is None else encode_alpha(picture.alpha),
            )
        )

    def _parse(self, data: bytes, max_pixels: int) -> Container:
        container = bitstream.parse(data)
        if container.model_id != self.model_id:
            known = {model.model_id: model.name for model in shipped_models()}
            other = known.get(container.model_id)
            maker = f"{container.model_id.hex()}" + (f" ({other})" if other else "")
            raise ModelMismatchError(f"made with model {maker}, this is {self.model_id.hex()} ({self.name})")
        if container.level >= self._entropy_model.num_levels:
            raise DamagedFileError(f"level {container.level} does not exist in this model")
        if container.steps_sent is not None:
            raise UnsupportedFileError("partial files are not supported by this version")
        if container.width * container.height > max_pixels:
            raise LimitError(f"{container.width} x {container.height} pixels are above the limit of {max_pixels:,}")
        return container

    @torch.inference_mode()
    def _read_tokens(self, container: Container) -> Tensor:
        """Tokens (M, h, w) int64 of a file, checked."""
        reader = TokenReader(container.payload)
        grid = (-(-container.height // STRIDE), -(-container.width // STRIDE))
        tokens = code_tokens(self._entropy_model, reader, *grid, container.level)
        reader.finish()
        if bitstream.token_check(_token_bytes(tokens)) != container.token_check:
            raise TokenCheckError("decoded tokens differ from those that were encoded (run `pqmim selftest`)")
        return tokens

    def _analyze(self, rgb: NDArray[np.uint8]) -> Tensor:
        """(H, W, 3) uint8 -> latent (1, D, h, w) float32; H and W are padded to the stride by repeating the edge."""
        height, width = rgb.shape[:2]
        padding = ((0, -height % STRIDE), (0, -width % STRIDE), (0, 0))
        pixels = torch.from_numpy(np.pad(rgb, padding, mode="edge"))

        def analyze(top: int, bottom: int, left: int, right: int) -> Tensor:
            part = pixels[top * STRIDE : bottom * STRIDE, left * STRIDE : right * STRIDE].to(self.device)
            x = part.permute(2, 0, 1)[None].float() / 255
            return self._tokenizer.analysis(x.contiguous(memory_format=torch.channels_last))[0]  # type: ignore[no-any-return]

        h, w = pixels.shape[0] // STRIDE, pixels.shape[1] // STRIDE
        return assemble_tiles(analyze, h, w, 1, self._margin)[None]

    @torch.inference_mode()
    def _synthesize(self, tokens: Tensor) -> NDArray[np.uint8]:
        """Tokens (M, h, w) -> (16 h, 16 w, 3) uint8."""
        tokens = tokens.to(self.device)

        def synthesize(top: int, bottom: int, left: int, right: int) -> Tensor:
            x_hat = self._tokenizer.decode(tokens[None, :, top:bottom, left:right])[0]
            return x_hat.clamp_(0, 1).mul_(255).round_().to(torch.uint8)

        rgb = assemble_tiles(synthesize, tokens.shape[1], tokens.shape[2], STRIDE, self._margin)
        return np.ascontiguousarray(rgb.permute(1, 2, 0).cpu().numpy())


class _CountedTokens(GivenTokens):
    """Sends given tokens and adds up their ideal code length."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__(tokens)
        self.bits = 0.0
        self._bits_of_frequency = bits_table(tokens.device).double()

    def __call__(self, step: Step, positions: Tensor, frequencies: Tensor) -> Tensor:
        tokens = super().__call__(step, positions, frequencies)
        coded = frequencies.gather(2, tokens[:, :, None])
        self.bits += float(self._bits_of_frequency[coded].sum())
        return tokens


def assemble_tiles(
    transform: Callable[[int, int, int, int], Tensor], height: int, width: int, scale: int, margin: int
) -> Tensor:
    """Apply a transform tile by tile, with a margin that is cut off again: the result of the whole, in bounded memory.

    Args:
        transform: (top, bottom, left, right) in positions -> (C, scale * rows, scale * columns).
        height, width: of the token grid, positions.
        scale: output samples per side of a position.
        margin: positions around a tile that the transform is given too.

    Returns:
        (C, scale * height, scale * width).
    """
    out: Tensor | None = None
    for top in range(0, height, TILE_POSITIONS):
        bottom = min(top + TILE_POSITIONS, height)
        for left in range(0, width, TILE_POSITIONS):
            right = min(left + TILE_POSITIONS, width)
            outer_top, outer_left = max(0, top - margin), max(0, left - margin)
            outer_bottom, outer_right = min(height, bottom + margin), min(width, right + margin)
            tile = transform(outer_top, outer_bottom, outer_left, outer_right)
            if out is None:
                out = tile.new_empty(tile.shape[0], scale * height, scale * width)
            rows = slice(scale * (top - outer_top), scale * (bottom - outer_top))
            columns = slice(scale * (left - outer_left), scale * (right - outer_left))
            out[:, scale * top : scale * bottom, scale * left : scale * right] = tile[:, rows, columns]
    assert out is not None  # a grid has at least one position
    return out


def _token_bytes(tokens: Tensor) -> bytes:
    """Token grid as little-endian uint16, C order."""
    return tokens.cpu().numpy().astype("<u2").tobytes()


def resolve_device(name: str) -> torch.device:
    """'auto', 'cpu' or 'cuda' -> device; auto takes a GPU where there is one.

    Raises:
        ConfigError: unknown name, or CUDA was asked for and is not there.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu or cuda, not {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: no CUDA device is available")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def load_codec(
    name_or_path: str | os.PathLike[str] = "small", *, device: str = "auto", kernel: str | None = None
) -> Codec:
    """Load a shipped model by name, or a model file or run folder by path.

    Args:
        device: "auto" (a GPU where there is one), "cpu" or "cuda".
        kernel: see `exact_inference.KERNELS`; None = the fastest.

    Raises:
        ModelError: no such model, or a damaged file.
        ConfigError: the device is not there.
    """
    return Codec(load_model(find_model(name_or_path)), resolve_device(device), kernel=kernel)
