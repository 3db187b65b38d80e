"""The codec: image -> bytes -> image. Joins image files, transforms, step loop and container, which do not know each
other."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pqmim import bitstream, rate_control
from pqmim.bitstream import SCALES, Container
from pqmim.config import STRIDE
from pqmim.encoder import EncodedTokens, PictureEncoder
from pqmim.errors import (
    DamagedFileError,
    ImageError,
    LimitError,
    ModelError,
    ModelMismatchError,
    PqmimError,
    TargetError,
    TokenCheckError,
)
from pqmim.exact_entropy import ExactEntropyModel
from pqmim.fill import expected_latent, sample
from pqmim.image_io import (
    ImageLike,
    Picture,
    decode_alpha,
    encode_alpha,
    load_picture,
    resize_picture,
    to_pillow,
)
from pqmim.model_files import ModelFile, find_model, load_model, shipped_models
from pqmim.options import MAX_PIXELS, EncodeOptions, Fill, FillOptions
from pqmim.quantizer import Latent, ProductQuantizer, Tokens
from pqmim.range_coding import PrefixReader, TokenReader, TokenWriter
from pqmim.runtime import Workers, default_threads, resolve_device
from pqmim.token_coding import Frequencies, GivenTokens, TokenGrid, bits_table, code_tokens
from pqmim.transforms import Transforms

COARSEST_W = 18.0
"""Where a size would take asking for a coarser trade-off than this (squared latent units per bit), the picture is coded
at half its size or less; chosen on the validation photos."""
SCALED_SHARE = 0.9
"""Bytes of a scaled picture per byte of the same one in full size at COARSEST_W, both as the static priors estimate
them: what makes real sizes meet there; measured on the validation photos."""
COARSER = 4.0
"""How far beyond the trade-off of quality 0 a target may take the encoder."""


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image and how much of it was sent.

    Attributes:
        image: RGB or RGBA of the original size.
        invented_share: share of the tokens that were not in the file and were filled, 0 to 1.
        problem: what was wrong with a salvaged file, else empty.
    """

    image: Image.Image
    invented_share: float
    problem: str = ""


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


@dataclass(frozen=True)
class _EncodedFile:
    """A file, and what it was made of."""

    data: bytes
    tokens: EncodedTokens

    @property
    def num_bytes(self) -> int:
        return len(self.data)


class Codec:
    """A trained model that encodes and decodes images.

    It may be used by several threads at once.

    Args:
        model: from `model_files.load_model`.
        device: "auto", "cpu" or "cuda", where the networks run.
        kernel: how the entropy model multiplies, one of `entropy_kernels.KERNELS`; None = the fastest that is exact.
        threads: to work with; None = the cores of this process, at most `runtime.MAX_THREADS`.
    """

    def __init__(
        self, model: ModelFile, device: str = "auto", *, kernel: str | None = None, threads: int | None = None
    ) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        self.name = model.name
        self.model_id = model.model_id
        self.facts = model.facts
        self.device = resolve_device(device)
        workers = Workers(threads or default_threads())
        self._quality = model.config.quality
        self._quantizer = ProductQuantizer(model.tensors, workers)
        self._transforms = Transforms(model, threads=workers.threads, device=self.device)
        self._entropy_model = ExactEntropyModel(model, workers, kernel=kernel, device=self.device)

    @property
    def kernel(self) -> str:
        """How integer products are computed, one of `entropy_kernels.KERNELS`."""
        return self._entropy_model.kernel

    # -- encode -----------------------------------------------------------------------------------------------------

    def encode(
        self,
        image: ImageLike,
        *,
        quality: float = 50.0,
        target_bytes: int | None = None,
        target_bpp: float | None = None,
        options: EncodeOptions | None = None,
    ) -> bytes:
        """Compress an image.

        Args:
            image: path, bytes or file of anything that Pillow opens; Pillow image; uint8 array (H, W), (H, W, 3) or
                (H, W, 4). EXIF orientation is applied, other color spaces are converted to sRGB.
            quality: 0 to 100, higher is better and larger; continuous. Of no effect if there is a target.
            target_bytes: largest size of the file, at least 1. The file comes as near as it can.
            target_bpp: the same in bits per pixel of the image, above 0; not together with `target_bytes`.
            options: how; None = the defaults.

        Returns:
            Content of a .pqm file. It is above the target only if no smaller file is possible, which is an error if
            `options.strict`.

        Raises:
            ImageError: the input cannot be read.
            LimitError: more than `options.max_pixels` pixels.
            TargetError: the target cannot be met, and `options.strict`.
            ValueError: an argument is out of range.
        """
        return self._encode(image, quality, target_bytes, target_bpp, options or EncodeOptions()).data

    def encode_tokens(self, image: ImageLike, *, quality: float = 50.0) -> NDArray[np.int64]:
        """The token grid (M, h, w) int64 that `encode` sends for an image; arguments and errors as there."""
        return self._encode(image, quality, None, None, EncodeOptions()).tokens.tokens

    def encode_with_rates(
        self, image: ImageLike, *, quality: float = 50.0, options: EncodeOptions | None = None
    ) -> tuple[bytes, RateBreakdown]:
        """What `encode` returns, and what its tokens cost: uniform codes, static frequencies, masked model."""
        encoded = self._encode(image, quality, None, None, options or EncodeOptions())
        tokens, level = encoded.tokens.tokens, encoded.tokens.level
        writer, counted = TokenWriter(), _CountedTokens(tokens)
        code_tokens(self._entropy_model, writer, tokens.shape[1], tokens.shape[2], level, counted)
        prior = self._quantizer.prior_bits[level]
        static = np.take_along_axis(prior, tokens.reshape(len(tokens), -1), 1)
        return encoded.data, RateBreakdown(
            uniform=tokens.size * float(np.log2(self._quantizer.num_codewords)),
            static=float(static.sum(dtype=np.float64)),
            exact=counted.bits,
            payload=8.0 * len(writer.finish()),
            file=8.0 * len(encoded.data),
        )

    def _encode(
        self,
        image: ImageLike,
        quality: float,
        target_bytes: int | None,
        target_bpp: float | None,
        options: EncodeOptions,
    ) -> _EncodedFile:
        if target_bytes is not None and target_bpp is not None:
            raise ValueError("give target_bytes or target_bpp, not both")
        if target_bytes is not None and not target_bytes >= 1:
            raise ValueError(f"target_bytes must be at least 1, not {target_bytes}")
        if target_bpp is not None and not 0 < target_bpp < np.inf:
            raise ValueError(f"target_bpp must be a number above 0, not {target_bpp:g}")
        picture = load_picture(image, max_pixels=options.max_pixels)
        height, width = picture.rgb.shape[:2]
        if target_bpp is not None:
            target_bytes = max(1, int(target_bpp * height * width / 8))
        alpha = None if picture.alpha is None else encode_alpha(picture.alpha)

        frame = Container(width, height, self.model_id, 0, 1, b"", is_partial=True, alpha=alpha)

        def pack(tokens: EncodedTokens, scale: int) -> _EncodedFile:
            container = replace(frame, level=tokens.level, scale=scale, payload=tokens.payload)
            if not tokens.is_partial:
                check = bitstream.token_check(_token_bytes(tokens.tokens))
                container = replace(container, is_partial=False, token_check=check)
            return _EncodedFile(bitstream.pack(container), tokens)

        if target_bytes is None:
            w, scale = self._w(quality), options.scale or 1
            encoder = self._encoder(picture, scale, options)
            if options.scale is None and w > COARSEST_W:
                encoder, scale, w = self._fitting_encoder(picture, SCALED_SHARE * encoder.estimate_bytes(w), options)
            return pack(encoder.encode(w), scale)
        return self._encode_to_size(picture, target_bytes, options, pack, frame)

    def _encode_to_size(
        self,
        picture: Picture,
        target: int,
        options: EncodeOptions,
        pack: Callable[[EncodedTokens, int], _EncodedFile],
        frame: Container,
    ) -> _EncodedFile:
        """Encode to at most `target` bytes, if that is possible; `frame` is the container without payload."""
        room = max(1, target - bitstream.overhead(frame))
        expected = room / (rate_control.TYPICAL_RATIO * options.keep)
        encoder, scale, _ = self._fitting_encoder(picture, expected, options)
        best = rate_control.search(
            lambda w, num_bytes: pack(encoder.encode(w, num_bytes), scale),
            lambda w: options.keep * encoder.estimate_bytes(w),
            target,
            self._w_range,
            overhead=lambda num_bytes: bitstream.overhead(replace(frame, payload=bytes(num_bytes))),
        )
        if best.num_bytes > target:  # leave out the last tokens: the decoder fills them
            smallest = bitstream.smallest_size(best.data)
            if options.strict and smallest > target:
                raise TargetError(f"no file of {target:,} bytes is possible; the smallest has {smallest:,}")
            best = _EncodedFile(bitstream.truncate(best.data, max(target, smallest)), best.tokens)
        return best

    def _w(self, quality: float) -> float:
        """Trade-off to ask for at a quality: only those where codewords fit well. Between two levels sizes jump, and a
        target is the way to what lies between."""
        return self._quantizer.levels.asking_for(self._quality.w(quality))

    @property
    def _w_range(self) -> tuple[float, float]:
        return self._w(100), COARSER * self._w(0)

    def _fitting_encoder(
        self, picture: Picture, num_bytes: float, options: EncodeOptions
    ) -> tuple[PictureEncoder, int, float]:
        """Encoder at the scale that suits a size best, the scale, and the trade-off that about gives the size.

        Args:
            num_bytes: of the payload, under the static priors.
        """
        for scale in SCALES if options.scale is None else (options.scale,):
            encoder = self._encoder(picture, scale, options)
            w = rate_control.solve(encoder.estimate_bytes, num_bytes, self._w_range)
            if w <= COARSEST_W:
                break
        return encoder, scale, w

    def _encoder(self, picture: Picture, scale: int, options: EncodeOptions) -> PictureEncoder:
        rgb = picture.rgb
        if scale > 1:
            height, width = rgb.shape[:2]
            rgb = resize_picture(rgb, -(-width // scale), -(-height // scale))
        regions = [region.scaled_down(scale) for region in options.regions]
        return PictureEncoder(self._transforms, self._quantizer, self._entropy_model, rgb, options, regions)

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
        container, problem = self._parse(data, max_pixels, salvage=salvage)

        def show(grid: TokenGrid) -> None:
            if after_step is not None:
                latent = expected_latent(self._entropy_model, self._quantizer, grid, container.level)
                after_step(self._picture_of(latent, container, None))

        grid, token_problem = self._read_tokens(container, salvage=salvage, after_step=show if after_step else None)
        alpha, alpha_problem = self._alpha_of(container, salvage=salvage)
        image = self._picture_of(self._filled(grid, container.level, options), container, alpha)
        problems = "; ".join(filter(None, (problem, token_problem, alpha_problem)))
        return DecodedImage(image, 1 - grid.known_share, problems)

    def decode_tokens(self, data: bytes, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.int64]:
        """The token grid (M, h, w) int64 of a file, -1 where a partial file holds none; errors as `decode`."""
        container, _ = self._parse(data, max_pixels)
        grid, _ = self._read_tokens(container)
        return np.where(grid.known, grid.tokens, -1)

    def token_hash(self, data: bytes) -> str:
        """SHA-256 (hex) of a file's token grid as little-endian uint16: equal on every machine."""
        return hashlib.sha256(_token_bytes(self.decode_tokens(data))).hexdigest()

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
        level = self._quantizer.levels.level(self._w(quality))
        grid = TokenGrid.unknown(self._quantizer.num_subquantizers, -(-height // STRIDE), -(-width // STRIDE))
        container = Container(width, height, self.model_id, level, 1, b"", is_partial=True)
        return self._picture_of(self._filled(grid, level, options), container, None)

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
        picture, wanted = load_picture(image, max_pixels=MAX_PIXELS), load_picture(mask, max_pixels=MAX_PIXELS)
        height, width = picture.rgb.shape[:2]
        if wanted.rgb.shape != picture.rgb.shape:
            raise ImageError(
                f"the mask is {wanted.rgb.shape[1]} x {wanted.rgb.shape[0]} pixels, the image {width} x {height}"
            )
        encoded = self._encoder(picture, 1, EncodeOptions()).encode(self._w(quality))
        is_masked = wanted.rgb.max(2) > 127
        padded = np.pad(is_masked, ((0, -height % STRIDE), (0, -width % STRIDE)))
        h, w = encoded.tokens.shape[1:]
        touched = padded.reshape(h, STRIDE, w, STRIDE).any((1, 3))
        grid = TokenGrid(encoded.tokens, np.broadcast_to(~touched, encoded.tokens.shape))
        container = Container(width, height, self.model_id, encoded.level, 1, b"", is_partial=True)
        drawn = self._picture_of(
            self._filled(grid, encoded.level, options or FillOptions(Fill.SAMPLE)), container, None
        )
        rgb = np.where(is_masked[:, :, None], np.asarray(drawn), picture.rgb)
        return to_pillow(Picture(rgb, picture.alpha))

    # -- parts ------------------------------------------------------------------------------------------------------

    def _parse(self, data: bytes, max_pixels: int, *, salvage: bool = False) -> tuple[Container, str]:
        """Read a container that this model decodes, and what is wrong with it if salvaging."""
        container, problem = bitstream.salvage(data) if salvage else (bitstream.parse(data), "")
        if not self.model_id.startswith(container.model_id):
            known = [model.name for model in shipped_models() if model.model_id.startswith(container.model_id)]
            maker = container.model_id.hex() + "".join(f" ({name})" for name in known)
            raise ModelMismatchError(f"made with model {maker}, this is {self.model_id.hex()} ({self.name})")
        if container.level >= self._entropy_model.num_levels:
            raise DamagedFileError(f"level {container.level} does not exist in this model")
        if container.width * container.height > max_pixels:
            raise LimitError(f"{container.width} x {container.height} pixels are above the limit of {max_pixels:,}")
        return container, problem

    def _read_tokens(
        self,
        container: Container,
        *,
        salvage: bool = False,
        after_step: Callable[[TokenGrid], None] | None = None,
    ) -> tuple[TokenGrid, str]:
        """Tokens of a file, checked, and what is wrong with them if salvaging."""
        scaled = (-(-side // container.scale) for side in (container.height, container.width))
        height, width = (-(-side // STRIDE) for side in scaled)
        if container.is_partial:
            reader = PrefixReader(container.payload)
            return code_tokens(self._entropy_model, reader, height, width, container.level, after_step=after_step), ""
        complete = TokenReader(container.payload)
        grid = code_tokens(self._entropy_model, complete, height, width, container.level, after_step=after_step)
        complete.finish()
        check = container.token_check
        if check is not None and bitstream.token_check(_token_bytes(grid.tokens)) != check:
            problem = "decoded tokens differ from those that were encoded (run `pqmim selftest`)"
            if not salvage:
                raise TokenCheckError(problem)
            return grid, problem
        return grid, ""

    def _alpha_of(self, container: Container, *, salvage: bool) -> tuple[NDArray[np.uint8] | None, str]:
        if container.alpha is None:
            return None, ""
        try:
            return decode_alpha(container.alpha, container.width, container.height), ""
        except PqmimError as error:
            if not salvage:
                raise
            return None, str(error)

    def _filled(self, grid: TokenGrid, level: int, options: FillOptions) -> Callable[[int, int, int, int], Latent]:
        """Latent of a grid, tile by tile, with what is unknown filled."""
        quantizer = self._quantizer
        known: NDArray[np.bool_] | None = None
        tokens = grid.tokens
        if not grid.is_complete:
            if options.fill == Fill.LIKELY:
                return _tiles_of(expected_latent(self._entropy_model, quantizer, grid, level))
            if options.fill == Fill.SAMPLE:
                tokens = sample(
                    self._entropy_model,
                    grid,
                    level,
                    seed=options.seed,
                    temperature=options.temperature,
                    num_steps=options.num_steps,
                )
            else:
                known = grid.known

        def latent_of(top: int, bottom: int, left: int, right: int) -> Latent:
            tile = (slice(None), slice(top, bottom), slice(left, right))
            return quantizer.dequantize(tokens[tile], level, None if known is None else known[tile])

        return latent_of

    def _picture_of(
        self,
        latent_of: Callable[[int, int, int, int], Latent] | Latent,
        container: Container,
        alpha: NDArray[np.uint8] | None,
    ) -> Image.Image:
        """Synthesize, crop, scale back."""
        if isinstance(latent_of, np.ndarray):
            latent_of = _tiles_of(latent_of)
        height, width = (-(-side // container.scale) for side in (container.height, container.width))
        rgb = self._transforms.synthesize(latent_of, -(-height // STRIDE), -(-width // STRIDE))[:height, :width]
        if container.scale > 1:
            rgb = resize_picture(rgb, container.width, container.height)
        return to_pillow(Picture(rgb, alpha))


def _tiles_of(z: Latent) -> Callable[[int, int, int, int], Latent]:
    """Parts of a latent (1, D, h, w)."""
    return lambda top, bottom, left, right: np.ascontiguousarray(z[:, :, top:bottom, left:right])


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


def _token_bytes(tokens: Tokens) -> bytes:
    """Token grid as little-endian uint16, C order."""
    return tokens.astype("<u2").tobytes()


def load_codec(
    name_or_path: str | os.PathLike[str] = "small",
    *,
    device: str = "auto",
    kernel: str | None = None,
    threads: int | None = None,
) -> Codec:
    """Load a shipped model by name, or a model file or run folder by path.

    Args:
        device, kernel, threads: see `Codec`.

    Raises:
        ModelError: no such model, or a damaged file.
        ConfigError: the device or the kernel is not there.
    """
    path = find_model(name_or_path)
    model = load_model(path)
    try:
        return Codec(model, device, kernel=kernel, threads=threads)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
