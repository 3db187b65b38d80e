"""The codec: image -> bytes -> image. What people call; the work is done by `FileEncoder` and `FileDecoder`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pqmim.bitstream import Container, parse
from pqmim.config import STRIDE
from pqmim.decoder_files import DecoderFile, find_decoder, load_decoder
from pqmim.distortion import DistortionOf
from pqmim.errors import ImageError, LimitError, ModelError
from pqmim.file_decoder import FileDecoder
from pqmim.file_encoder import FileEncoder
from pqmim.image_io import ImageLike, Picture, load_mask, load_picture, to_pillow
from pqmim.metadata import Metadata, unpack
from pqmim.model_files import ModelFile, find_model, load_model
from pqmim.networks import Networks
from pqmim.options import DEFAULT_MODEL, MAX_PIXELS, EncodeOptions, Fill, FillOptions, OnProgress
from pqmim.quantizer import Tokens
from pqmim.range_coding import TokenWriter
from pqmim.token_coding import Frequencies, GivenTokens, TokenGrid, bits_table, code_tokens, token_bytes

NO_TOKEN = 0xFFFF
"""Stands in uint16 arrays where a partial file holds no token."""


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image and how much of it was sent.

    Attributes:
        image: RGB or RGBA of the original size.
        invented_share: share of the tokens that were not in the file and were filled, 0 to 1.
        problem: what was wrong with a salvaged file, else empty.
        metadata: of the original, as far as the file keeps them; the image is upright sRGB whatever they say.
    """

    image: Image.Image
    invented_share: float
    problem: str = ""
    metadata: Metadata = Metadata()  # noqa: RUF009 (it is frozen)


@dataclass(frozen=True)
class RateBreakdown:
    """What the tokens of one image cost under four models, bits.

    Attributes:
        uniform: log2 K for each token.
        static: the static prior of the same level, no context.
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
    """A token model and one of its decoders; encodes and decodes images, by several threads at once if asked to.

    What is encoded is decoded by every decoder of the token model; the encoder corrects what it sees in the pictures of
    this one.

    Args:
        model: from `model_files.load_model`.
        decoder: from `decoder_files.load_decoder`.
        device, kernel, threads: see `networks.Networks`.

    Attributes:
        name, model_id: of the token model.
        decoder_name, decoder_id: of the decoder.
        realism: 0 to 1, of a decoder that draws detail which nobody sent; None of all others.
    """

    def __init__(
        self,
        model: ModelFile,
        decoder: DecoderFile,
        device: str = "auto",
        *,
        kernel: str | None = None,
        threads: int | None = None,
    ) -> None:
        self.name, self.model_id = model.name, model.model_id
        self.decoder_name, self.decoder_id = decoder.name, decoder.decoder_id
        self.realism = decoder.realism
        self._networks = Networks(model, decoder, device, kernel=kernel, threads=threads)
        self._encoder, self._decoder = FileEncoder(self._networks), FileDecoder(self._networks)

    @property
    def kernel(self) -> str:
        """How integer products are computed, one of `entropy_kernels.KERNELS`."""
        return self._networks.entropy_model.kernel

    # -- encode -----------------------------------------------------------------------------------------------------

    def encode(
        self,
        image: ImageLike,
        *,
        quality: float = 50.0,
        target_bytes: int | None = None,
        target_bpp: float | None = None,
        options: EncodeOptions | None = None,
        judge: DistortionOf | None = None,
        on_progress: OnProgress | None = None,
    ) -> bytes:
        """Compress an image.

        Args:
            image: path, bytes or file of anything that Pillow opens; Pillow image; uint8 array (H, W), (H, W, 3) or
                (H, W, 4). EXIF orientation is applied, other color spaces are converted to sRGB.
            quality: 0 to 100, higher is better and larger; continuous. Of no effect if there is a target.
            target_bytes: largest size of the file, at least 1. The file comes as near as it can.
            target_bpp: the same in bits per pixel of the image, above 0; not together with `target_bytes`.
            options: how; None = the defaults.
            judge: what a search for `Tune.VIVID` judges decoded pictures by, such as
                `pqmim.perceptual.tuning.vivid_judge()` loads; needed with it, of no other tune.
            on_progress: told how far the encoding is.

        Returns:
            Content of a .pqm file. It is above the target only if no smaller file is possible, which is an error if
            `options.strict`.

        Raises:
            ImageError: the input cannot be read.
            LimitError: more than `options.max_pixels` pixels.
            TargetError: the target cannot be met, and `options.strict`.
            ValueError: an argument is out of range, or `Tune.VIVID` has no judge.
        """
        options = options or EncodeOptions()
        return self._encoder.encode(
            image, quality, target_bytes, target_bpp, options, judge=judge, on_progress=on_progress
        ).data

    def encode_tokens(self, image: ImageLike, *, quality: float = 50.0) -> NDArray[np.int64]:
        """The token grid (M, h, w) int64 that `encode` sends for an image; arguments and errors as there."""
        return self.encode_with_tokens(image, quality=quality)[1]

    def encode_with_tokens(self, image: ImageLike, *, quality: float = 50.0) -> tuple[bytes, NDArray[np.int64]]:
        """What `encode` returns, and its token grid (M, h, w) int64; arguments and errors as there."""
        encoded = self._encoder.encode(image, quality, None, None, EncodeOptions())
        return encoded.data, encoded.tokens.tokens

    def encode_with_rates(
        self, image: ImageLike, *, quality: float = 50.0, options: EncodeOptions | None = None
    ) -> tuple[bytes, RateBreakdown]:
        """What `encode` returns, and what its tokens cost: uniform codes, static frequencies, masked model."""
        encoded = self._encoder.encode(image, quality, None, None, options or EncodeOptions())
        tokens, level = encoded.tokens.tokens, encoded.tokens.level
        writer, counted = TokenWriter(), _CountedTokens(tokens)
        code_tokens(self._networks.entropy_model, writer, tokens.shape[1], tokens.shape[2], level, counted)
        quantizer = self._networks.quantizer
        return encoded.data, RateBreakdown(
            uniform=tokens[0].size * float(np.log2(quantizer.alphabets.sizes[level]).sum()),
            static=quantizer.static_bits(tokens.reshape(len(tokens), -1), level),
            exact=counted.bits,
            payload=8.0 * len(writer.finish()),
            file=8.0 * len(encoded.data),
        )

    # -- decode -----------------------------------------------------------------------------------------------------

    def decode(self, data: bytes, *, options: FillOptions | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
        """Decompress the content of a .pqm file.

        Args:
            options: what becomes of tokens that a partial file does not hold; None = the most likely picture.
            max_pixels: larger images are refused.

        Returns:
            RGB or RGBA image of the original size.

        Raises:
            BitstreamError: damaged or truncated, not a .pqm file, or made with another model.
            LimitError: more than `max_pixels` pixels.
        """
        return self.decode_with_report(data, options=options, max_pixels=max_pixels).image

    def decode_with_report(
        self,
        data: bytes,
        *,
        options: FillOptions | None = None,
        salvage: bool = False,
        max_pixels: int = MAX_PIXELS,
        after_step: Callable[[Image.Image], None] | None = None,
    ) -> DecodedImage:
        """Decompress, and say how much of the picture was in the file.

        Args:
            options, max_pixels: as in `decode`.
            salvage: decode what can be decoded of a file that was cut or damaged by accident.
            after_step: called with the picture after every step of the schedule, what is missing filled as likely.

        Raises:
            As `decode`; a salvaged file only if its header cannot be read.
        """
        options = options or FillOptions()
        container, problem = self._decoder.parse(data, max_pixels, salvage=salvage)

        def show(grid: TokenGrid) -> None:
            if after_step is not None:
                latent = self._decoder.expected_latent(grid, container.level)
                after_step(self._decoder.picture_of(latent, container, None))

        metadata, metadata_problem = self._decoder.metadata_of(container, salvage=salvage)
        grid, token_problem = self._decoder.read_tokens(
            container, salvage=salvage, after_step=show if after_step else None
        )
        alpha, alpha_problem = self._decoder.alpha_of(container, salvage=salvage)
        image = self._decoder.picture_of(self._decoder.filled(grid, container.level, options), container, alpha)
        problems = "; ".join(filter(None, (problem, metadata_problem, token_problem, alpha_problem)))
        return DecodedImage(image, 1 - grid.known_share, problems, metadata)

    def metadata(self, data: bytes) -> Metadata:
        """EXIF, ICC profile and XMP that a file keeps of its original; nothing unless it was asked to.

        Raises:
            BitstreamError: damaged or truncated, or not a .pqm file.
        """
        section = parse(data).metadata
        return Metadata() if section is None else unpack(section)

    def decode_tokens(self, data: bytes, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.int64]:
        """The token grid (M, h, w) int64 of a file, -1 where a partial file holds none; errors as `decode`."""
        container, _ = self._decoder.parse(data, max_pixels)
        grid, _ = self._decoder.read_tokens(container)
        return np.where(grid.known, grid.tokens, -1)

    def embed(self, tokens: NDArray[np.integer], level: int | None = None) -> NDArray[np.float32]:
        """Codeword vectors of a token grid: what the synthesis transform makes a picture of.

        Args:
            tokens: (M, h, w) of any integer type; -1, or 65535 if unsigned, where there is none: the mean stands there.
            level: of the file that the tokens are of (`bitstream.parse(data).level`), since each has codebooks of its
                own; None = the level that serves quality 50.

        Returns:
            (D, h, w) float32.

        Raises:
            ValueError: wrong shape, a token that the model does not have, or no such level.
        """
        quantizer = self._networks.quantizer
        if level is None:
            level = quantizer.levels.level(self._networks.w(50.0))
        if not 0 <= level < len(quantizer.levels):
            raise ValueError(f"a level is 0 to {len(quantizer.levels) - 1}, not {level}")
        if tokens.ndim != 3 or len(tokens) != quantizer.num_subquantizers or tokens.dtype.kind not in "iu":
            raise ValueError(
                f"tokens must be integers ({quantizer.num_subquantizers}, h, w), not {tokens.dtype} {tokens.shape}"
            )
        known = tokens != (-1 if tokens.dtype.kind == "i" else NO_TOKEN)
        sent = np.where(known, tokens, 0).astype(np.int64)
        is_out = (sent < 0) | (sent >= quantizer.alphabets.sizes[level, :, None, None])
        if is_out.any():
            m = int(is_out.any((1, 2)).argmax())
            most = int(quantizer.alphabets.sizes[level, m]) - 1
            raise ValueError(f"a token of sub-quantizer {m} at level {level} is 0 to {most}")
        latent: NDArray[np.float32] = quantizer.dequantize(sent, level, known)[0]
        return latent

    def token_hash(self, data: bytes) -> str:
        """SHA-256 (hex) of a file's token grid as little-endian uint16: equal on every machine."""
        return hashlib.sha256(token_bytes(self.decode_tokens(data))).hexdigest()

    # -- what the model believes ------------------------------------------------------------------------------------

    def generate(
        self, width: int, height: int, *, quality: float = 50.0, options: FillOptions | None = None
    ) -> Image.Image:
        """Draw a picture of which nothing was sent.

        Args:
            width, height: pixels.
            quality: which trade-off the tokens are those of: low ones are simpler pictures.
            options: `fill` is of no effect.

        Raises:
            LimitError: too many pixels.
        """
        if width < 1 or height < 1:
            raise ValueError(f"a picture has at least 1 x 1 pixels, not {width} x {height}")
        if width * height > MAX_PIXELS:
            raise LimitError(f"{width} x {height} pixels are above the limit of {MAX_PIXELS:,}")
        options = replace(options or FillOptions(), fill=Fill.SAMPLE)
        level = self._networks.quantizer.levels.level(self._networks.w(quality))
        grid = TokenGrid.unknown(self._networks.quantizer.num_subquantizers, -(-height // STRIDE), -(-width // STRIDE))
        container = Container(width, height, self.model_id, level, 1, b"", is_partial=True)
        return self._decoder.picture_of(self._decoder.filled(grid, level, options), container, None)

    def inpaint(
        self, image: ImageLike, mask: ImageLike, *, quality: float = 50.0, options: FillOptions | None = None
    ) -> Image.Image:
        """Draw a part of a picture anew, from what is around it.

        Args:
            mask: image of the same size, bright where the picture is to be drawn anew. Positions (16 x 16 pixels)
                that it touches are.
            quality: of the tokens.
            options: how the tokens are drawn; `Fill.LIKELY` gives the expectation.

        Returns:
            The image, changed where the mask is bright only.

        Raises:
            ImageError: an input cannot be read, or their sizes differ.
        """
        picture, is_masked = load_picture(image, max_pixels=MAX_PIXELS), load_mask(mask, max_pixels=MAX_PIXELS)
        height, width = picture.rgb.shape[:2]
        if is_masked.shape != (height, width):
            raise ImageError(
                f"the mask is {is_masked.shape[1]} x {is_masked.shape[0]} pixels, the image {width} x {height}"
            )
        encoded = self._encoder.picture_encoder(picture, 1, EncodeOptions()).encode(self._networks.w(quality))
        padded = np.pad(is_masked, ((0, -height % STRIDE), (0, -width % STRIDE)))
        h, w = encoded.tokens.shape[1:]
        touched = padded.reshape(h, STRIDE, w, STRIDE).any((1, 3))
        grid = TokenGrid(encoded.tokens, np.broadcast_to(~touched, encoded.tokens.shape))
        container = Container(width, height, self.model_id, encoded.level, 1, b"", is_partial=True)
        drawn = self._decoder.picture_of(
            self._decoder.filled(grid, encoded.level, options or FillOptions(Fill.SAMPLE)), container, None
        )
        rgb = np.where(is_masked[:, :, None], np.asarray(drawn), picture.rgb)
        return to_pillow(Picture(rgb, picture.alpha))


class _CountedTokens(GivenTokens):
    """Sends given tokens and adds up their ideal code length."""

    def __init__(self, tokens: Tokens) -> None:
        super().__init__(tokens)
        self.bits = 0.0

    def __call__(self, first: int, positions: NDArray[np.int64], frequencies: Frequencies) -> NDArray[np.int64]:
        tokens = super().__call__(first, positions, frequencies)
        coded = np.take_along_axis(frequencies, tokens[:, :, None], 2)
        self.bits += float(bits_table()[coded].sum(dtype=np.float64))
        return tokens


def load_codec(
    model: str | os.PathLike[str] = DEFAULT_MODEL,
    decoder: str | os.PathLike[str] | None = None,
    *,
    realism: float | None = None,
    device: str = "auto",
    kernel: str | None = None,
    threads: int | None = None,
) -> Codec:
    """Load a token model and one of its decoders.

    Args:
        model: name of a shipped token model, path of a token model's file or its folder.
        decoder: name of a decoder beside the token model, or path of a decoder's file; None = `fine`, or the only one
            that there is.
        realism: 0 to 1, how far a decoder that was fine-tuned for pictures that look real departs from the faithful one
            that it was made from; None = 1. Only for such a decoder.
        device, kernel, threads: see `networks.Networks`.

    Raises:
        ModelError: no such model or decoder, a damaged file, a decoder of another token model, or realism for a decoder
            that has none.
        ConfigError: the device or the kernel is not there.
        ValueError: realism is out of range.
    """
    path = find_model(model)
    loaded = load_model(path)
    loaded_decoder = load_decoder(find_decoder(decoder, path), realism=realism)
    try:
        return Codec(loaded, loaded_decoder, device, kernel=kernel, threads=threads)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
