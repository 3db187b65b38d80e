""".pqm file -> image, in steps: container, tokens, what was not sent, picture."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pqmim import bitstream, metadata
from pqmim.bitstream import Container
from pqmim.config import STRIDE
from pqmim.errors import DamagedFileError, LimitError, ModelMismatchError, PqmimError, TokenCheckError
from pqmim.fill import expected_latent, sample
from pqmim.image_io import Picture, decode_alpha, resize_picture, to_pillow
from pqmim.metadata import Metadata
from pqmim.model_files import name_of_id
from pqmim.networks import Networks
from pqmim.options import Fill, FillOptions
from pqmim.quantizer import Latent
from pqmim.range_coding import PrefixReader, TokenReader
from pqmim.token_coding import TokenGrid, code_tokens, token_bytes


class FileDecoder:
    """Reads .pqm files with the networks of a model."""

    def __init__(self, networks: Networks) -> None:
        self._networks = networks

    def parse(self, data: bytes, max_pixels: int, *, salvage: bool = False) -> tuple[Container, str]:
        """Read a container that this model decodes, and what is wrong with it if salvaging."""
        container, problem = bitstream.salvage(data) if salvage else (bitstream.parse(data), "")
        if not self._networks.model_id.startswith(container.model_id):
            maker = name_of_id(container.model_id)
            raise ModelMismatchError(
                f"made with model {maker}, this is {self._networks.model_id.hex()} ({self._networks.name})"
            )
        if container.level >= self._networks.entropy_model.alphabets.num_levels:
            raise DamagedFileError(f"level {container.level} does not exist in this model")
        if container.width * container.height > max_pixels:
            raise LimitError(f"{container.width} x {container.height} pixels are above the limit of {max_pixels:,}")
        return container, problem

    def read_tokens(
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
            return code_tokens(
                self._networks.entropy_model, reader, height, width, container.level, after_step=after_step
            ), ""
        complete = TokenReader(container.payload)
        grid = code_tokens(
            self._networks.entropy_model, complete, height, width, container.level, after_step=after_step
        )
        complete.finish()
        check = container.token_check
        if check is not None and bitstream.token_check(token_bytes(grid.tokens)) != check:
            problem = "decoded tokens differ from those that were encoded (run `pqmim selftest`)"
            if not salvage:
                raise TokenCheckError(problem)
            return grid, problem
        return grid, ""

    def alpha_of(self, container: Container, *, salvage: bool) -> tuple[NDArray[np.uint8] | None, str]:
        """Alpha channel of a file, and what is wrong with it if salvaging."""
        if container.alpha is None:
            return None, ""
        try:
            return decode_alpha(container.alpha, container.width, container.height), ""
        except PqmimError as error:
            if not salvage:
                raise
            return None, str(error)

    def metadata_of(self, container: Container, *, salvage: bool) -> tuple[Metadata, str]:
        """Metadata of a file, and what is wrong with them if salvaging."""
        if container.metadata is None:
            return Metadata(), ""
        try:
            return metadata.unpack(container.metadata), ""
        except PqmimError as error:
            if not salvage:
                raise
            return Metadata(), str(error)

    def filled(self, grid: TokenGrid, level: int, options: FillOptions) -> Callable[[int, int, int, int], Latent]:
        """Latent of a grid, tile by tile, with what is unknown filled."""
        quantizer = self._networks.quantizer
        known: NDArray[np.bool_] | None = None
        tokens = grid.tokens
        if not grid.is_complete:
            if options.fill == Fill.LIKELY:
                return tiles_of(self.expected_latent(grid, level))
            if options.fill == Fill.SAMPLE:
                tokens = sample(
                    self._networks.entropy_model,
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

    def picture_of(
        self,
        latent_of: Callable[[int, int, int, int], Latent] | Latent,
        container: Container,
        alpha: NDArray[np.uint8] | None,
    ) -> Image.Image:
        """Synthesize, crop, scale back."""
        if isinstance(latent_of, np.ndarray):
            latent_of = tiles_of(latent_of)
        height, width = (-(-side // container.scale) for side in (container.height, container.width))
        rgb = self._networks.transforms.synthesize(latent_of, -(-height // STRIDE), -(-width // STRIDE))[
            :height, :width
        ]
        if container.scale > 1:
            rgb = resize_picture(rgb, container.width, container.height)
        return to_pillow(Picture(rgb, alpha))

    def expected_latent(self, grid: TokenGrid, level: int) -> Latent:
        """See `fill.expected_latent`."""
        return expected_latent(self._networks.entropy_model, self._networks.quantizer, grid, level)


def tiles_of(z: Latent) -> Callable[[int, int, int, int], Latent]:
    """Parts of a latent (1, D, h, w)."""
    return lambda top, bottom, left, right: np.ascontiguousarray(z[:, :, top:bottom, left:right])
