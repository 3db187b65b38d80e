"""Image -> .pqm file: at a quality, or at a size, which may take a smaller picture or fewer tokens."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from pqmim import bitstream, metadata, rate_control
from pqmim.bitstream import SCALES, Container
from pqmim.distortion import DistortionOf
from pqmim.encoder import EncodedTokens, PictureEncoder
from pqmim.errors import TargetError
from pqmim.image_io import (
    ImageLike,
    Picture,
    encode_alpha,
    in_memory,
    load_metadata,
    load_picture,
    resize_picture,
)
from pqmim.networks import Networks
from pqmim.options import EncodeOptions, OnProgress, Tune
from pqmim.token_coding import token_bytes

COARSEST_W = 15.0
"""Where a size would take asking for a coarser trade-off than this (squared latent units per bit), the picture is coded
at half its size or less; chosen on the validation photos."""
SCALED_SHARE = 0.9
"""Bytes of a scaled picture per byte of the same one in full size at COARSEST_W, both as the encoder estimates them:
what makes real sizes meet there; measured on the validation photos."""
COARSER = 4.0
"""How far beyond the trade-off of quality 0 a target may take the encoder."""
MAX_TARGET_BYTES = 1 << 40
"""Targets above this, which no picture reaches, are the same."""


EncoderAt = Callable[[int], PictureEncoder]
"""Encoder of a picture, coded this many times smaller."""


@dataclass(frozen=True)
class EncodedFile:
    """A file, and what it was made of."""

    data: bytes
    tokens: EncodedTokens

    @property
    def num_bytes(self) -> int:
        return len(self.data)


class FileEncoder:
    """Writes .pqm files with the networks of a model."""

    def __init__(self, networks: Networks) -> None:
        self._networks = networks

    def encode(
        self,
        image: ImageLike,
        quality: float,
        target_bytes: int | None,
        target_bpp: float | None,
        options: EncodeOptions,
        *,
        judge: DistortionOf | None = None,
        on_progress: OnProgress | None = None,
    ) -> EncodedFile:
        """See `Codec.encode`."""
        if target_bytes is not None and target_bpp is not None:
            raise ValueError("give target_bytes or target_bpp, not both")
        if target_bytes is not None and not target_bytes >= 1:
            raise ValueError(f"target_bytes must be at least 1, not {target_bytes}")
        if target_bpp is not None and not 0 < target_bpp < np.inf:
            raise ValueError(f"target_bpp must be a number above 0, not {target_bpp:g}")
        if options.keep_metadata:
            image = in_memory(image)  # it is read twice
        picture = load_picture(image, max_pixels=options.max_pixels)
        section = _metadata_section(image, picture) if options.keep_metadata else None
        height, width = picture.rgb.shape[:2]
        if target_bpp is not None:
            target_bytes = max(1, int(min(target_bpp * height * width / 8, MAX_TARGET_BYTES)))
        alpha = None if picture.alpha is None else encode_alpha(picture.alpha)

        frame = Container(
            width, height, self._networks.model_id, 0, 1, b"", is_partial=True, alpha=alpha, metadata=section
        )
        if target_bytes is not None and section is not None:
            frame = _with_room_for_metadata(frame, target_bytes, options)

        def encoder_at(scale: int) -> PictureEncoder:
            return self.picture_encoder(picture, scale, options, judge=judge, on_progress=on_progress)

        def pack(tokens: EncodedTokens, scale: int) -> EncodedFile:
            container = replace(frame, level=tokens.level, scale=scale, payload=tokens.payload)
            if not tokens.is_partial:
                check = bitstream.token_check(token_bytes(tokens.tokens))
                container = replace(container, is_partial=False, token_check=check)
            return EncodedFile(bitstream.pack(container), tokens)

        if target_bytes is None:
            w, scale = self._networks.w(quality), options.scale or 1
            encoder = encoder_at(scale)
            if options.scale is None and w > COARSEST_W:
                encoder, scale, w = self._fitting_encoder(encoder_at, SCALED_SHARE * encoder.estimate_bytes(w), options)
            return pack(encoder.encode(w), scale)
        return self._encode_to_size(encoder_at, min(target_bytes, MAX_TARGET_BYTES), options, pack, frame)

    def _encode_to_size(
        self,
        encoder_at: EncoderAt,
        target: int,
        options: EncodeOptions,
        pack: Callable[[EncodedTokens, int], EncodedFile],
        frame: Container,
    ) -> EncodedFile:
        """Encode to at most `target` bytes, if that is possible; `frame` is the container without payload."""
        room = max(1, target - bitstream.overhead(frame))
        expected = room / (rate_control.TYPICAL_RATIO * options.keep)
        encoder, scale, _ = self._fitting_encoder(encoder_at, expected, options)
        best = rate_control.search(
            lambda w, num_bytes: pack(encoder.encode(w, num_bytes), scale),
            lambda w: options.keep * encoder.estimate_bytes(w),
            target,
            self._w_range,
            # It depends on the payload as long as the mini form is possible.
            overhead=lambda num_bytes: bitstream.overhead(
                replace(frame, payload=bytes(min(num_bytes, bitstream.MINI_MAX_PAYLOAD + 1)))
            ),
        )
        if best.num_bytes > target:  # leave out the last tokens: the decoder fills them
            smallest = bitstream.smallest_size(best.data, keep_metadata=True)
            if options.strict and smallest > target:
                raise TargetError(f"no file of {target:,} bytes is possible; the smallest has {smallest:,}")
            data = bitstream.truncate(best.data, max(target, smallest), keep_metadata=True)
            best = EncodedFile(data, best.tokens)
        return best

    @property
    def _w_range(self) -> tuple[float, float]:
        return self._networks.w(100), COARSER * self._networks.w(0)

    def _fitting_encoder(
        self, encoder_at: EncoderAt, num_bytes: float, options: EncodeOptions
    ) -> tuple[PictureEncoder, int, float]:
        """Encoder at the scale that suits a size best, the scale, and the trade-off that about gives the size.

        Args:
            num_bytes: of the payload, as the encoder estimates it.
        """
        for scale in SCALES if options.scale is None else (options.scale,):
            encoder = encoder_at(scale)
            w = rate_control.solve(encoder.estimate_bytes, num_bytes, self._w_range)
            if w <= COARSEST_W:
                break
        return encoder, scale, w

    def picture_encoder(
        self,
        picture: Picture,
        scale: int,
        options: EncodeOptions,
        *,
        judge: DistortionOf | None = None,
        on_progress: OnProgress | None = None,
    ) -> PictureEncoder:
        """Encoder of a picture, coded this many times smaller."""
        rgb = picture.rgb
        if scale > 1:
            height, width = rgb.shape[:2]
            rgb = resize_picture(rgb, -(-width // scale), -(-height // scale))
        regions = [region.scaled_down(scale) for region in options.regions]
        # Errors of a picture in which detail was made up say little about what is to be sent.
        networks = self._networks if options.tune == Tune.VIVID else self._networks.faithful
        return PictureEncoder(networks, rgb, options, regions, judge=judge, on_progress=on_progress)


def _metadata_section(image: ImageLike, picture: Picture) -> bytes | None:
    """Pack what is kept of an image besides its pixels; None if there is nothing.

    A profile that the decoded picture cannot be converted to is left out with a warning.

    Raises:
        ImageError: it is too much.
    """
    found = load_metadata(image)
    if found.icc:
        is_grey = bool((picture.rgb == picture.rgb[:, :, :1]).all())
        if metadata.in_profile(Image.new("RGB", (1, 1)), found.icc, is_grey_allowed=is_grey) is None:
            warnings.warn("the ICC profile is of no use for an sRGB picture and is not kept", stacklevel=2)
            found = replace(found, icc=None)
    return metadata.pack(found) or None


def _with_room_for_metadata(frame: Container, target_bytes: int, options: EncodeOptions) -> Container:
    """Leave metadata out, with a warning, if they alone are above a target.

    Raises:
        TargetError: they are, and `options.strict`.
    """
    smallest = bitstream.overhead(frame)
    if smallest <= target_bytes:
        return frame
    text = f"the metadata have no room in {target_bytes:,} bytes; the smallest file with them has {smallest:,}"
    if options.strict:
        raise TargetError(text)
    warnings.warn(f"{text}: they are not kept", stacklevel=2)
    return replace(frame, metadata=None)
