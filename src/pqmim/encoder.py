"""The encoder: a picture and what is asked for -> the tokens to send.

What the decoder need not know is decided here: the trade-off between rate and distortion, anywhere in the picture and
to hit a size, and which tokens are the best under it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pqmim.exact_inference import ExactEntropyModel
from pqmim.range_coding import TokenWriter
from pqmim.tiled_transforms import TiledTransforms
from pqmim.token_coding import Budget, PrefixWriter, RateDistortionChoice, code_tokens
from pqmim.training.autoencoder import STRIDE
from pqmim.training.trainable_quantizer import TrainableQuantizer

CORRECTIONS = (0, 2, 5)
"""Corrections of the latent from the decoded picture at effort 1, 2 and 3."""
MAX_EFFORT = len(CORRECTIONS)
DEFAULT_EFFORT = 2
CORRECTION_GAIN = 0.3
"""Share of the corrections, all together, that is added to the latent; chosen on the validation photos."""
ACTIVITY_EXPONENT = 0.25
"""How strongly `Tune.MS_SSIM` takes bits from busy parts of the picture; chosen on the validation photos."""
MAX_ACTIVITY_FACTOR = 3.0
"""Largest factor by which it changes the trade-off, up or down."""
LEVEL_REACH = 1.5
"""A search keeps the level of its last encoding for trade-offs up to this factor outside of those that it serves."""
SAMPLED_POSITIONS = 4096
"""Positions of a large picture that stand for all in an estimate of the size."""


class Tune(StrEnum):
    """What the encoder spends its bits for."""

    PSNR = "psnr"
    """Least squared error: the same trade-off everywhere."""
    MS_SSIM = "ms-ssim"
    """Structure: more for quiet parts of the picture, less for busy ones, where errors hide."""


@dataclass(frozen=True)
class Region:
    """A rectangle that matters more than the rest (or less).

    Attributes:
        x, y: upper left corner, pixels.
        width, height: pixels.
        weight: an error inside counts this many times as much as one outside; > 0.
    """

    x: int
    y: int
    width: int
    height: int
    weight: float = 8.0

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1:
            raise ValueError("a region must be at least 1 x 1 pixels")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"the weight of a region must be above 0, not {self.weight:g}")


@dataclass(frozen=True)
class TokenChoiceOptions:
    """How tokens are chosen.

    Attributes:
        effort: 1 to MAX_EFFORT; more looks more often at the decoded picture and corrects what the tokens stand for.
        tune: what the bits are spent for.
        regions: parts of the picture with a weight of their own.
        keep: share of the tokens that is sent, in coding order, above 0 and at most 1.
    """

    effort: int = DEFAULT_EFFORT
    tune: Tune = Tune.PSNR
    regions: tuple[Region, ...] = ()
    keep: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.effort <= MAX_EFFORT:
            raise ValueError(f"effort must be 1 to {MAX_EFFORT}, not {self.effort}")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be above 0 and at most 1, not {self.keep:g}")
        Tune(self.tune)  # refuses other strings


@dataclass(frozen=True)
class EncodedTokens:
    """Tokens of a picture and the payload that says them.

    Attributes:
        level: whose codebooks they are from.
        tokens: (M, h, w) int64.
        payload: the range coder's digits, of all tokens or of the first ones.
        is_partial: whether only the first tokens are in the payload.
    """

    level: int
    tokens: Tensor
    payload: bytes
    is_partial: bool


class PictureEncoder:
    """Encodes one picture as often as it takes.

    Args:
        rgb: (H, W, 3) uint8.
        options: regions in pixels of `rgb`.
    """

    def __init__(
        self,
        transforms: TiledTransforms,
        quantizer: TrainableQuantizer,
        entropy_model: ExactEntropyModel,
        rgb: NDArray[np.uint8],
        options: TokenChoiceOptions,
    ) -> None:
        self._transforms = transforms
        self._quantizer = quantizer
        self._entropy_model = entropy_model
        self._options = options
        padding = ((0, -rgb.shape[0] % STRIDE), (0, -rgb.shape[1] % STRIDE), (0, 0))
        self._pixels = np.pad(rgb, padding, mode="edge")
        self._z = transforms.analyze(self._pixels)
        self._num_pixels = rgb.shape[0] * rgb.shape[1]
        self._factors = self._trade_off_factors()
        self._target: Tensor | None = None
        self._level: int | None = None
        self._spent: list[float] = []

    @torch.no_grad()
    def encode(self, w: float, num_bytes: float | None = None) -> EncodedTokens:
        """Choose and code tokens at a trade-off that is asked for, squared latent units per bit.

        A second call takes over the corrected latent of the first. If it has the level of the first, it knows well
        enough where the bits go to hit a size.

        Args:
            num_bytes: of the payload, to be hit by small changes of the trade-off on the way; of no effect in the first
                call, or if not all tokens are kept.
        """
        level, is_partial = self._level_for(w), self._options.keep < 1
        budget = None
        if num_bytes is not None and level == self._level and not is_partial:
            budget = Budget(8 * num_bytes, self._spent)
        self._level = level
        height, width = self._z.shape[2:]
        levels = torch.tensor([level], device=self._z.device)
        w_here = self._quantizer.applied_w(w, levels) * self._factors
        if self._target is None:
            self._target = self._corrected(w_here, levels)
        choice = RateDistortionChoice(self._quantizer, self._target, w_here, level, budget)
        writer = PrefixWriter(self._num_kept()) if is_partial else TokenWriter()
        tokens = code_tokens(self._entropy_model, writer, height, width, level, choice).tokens
        self._spent = choice.spent
        return EncodedTokens(level, tokens, writer.finish(), is_partial)

    def _corrected(self, w: Tensor, level: Tensor) -> Tensor:
        """The latent, moved towards what makes the *decoded* picture right: gradient steps through the quantizer.

        Tokens are chosen under the static prior, so this takes no pass of the entropy model.

        Args:
            w: (h * w,) as applied.
            level: (1,) int64.
        """
        target, number = self._z, CORRECTIONS[self._options.effort - 1]
        for _ in range(number):
            tokens = self._quantizer.assign(target, w[None], level)
            correction = self._transforms.correct(self._quantizer.dequantize(tokens, level), self._pixels) - self._z
            target = target + CORRECTION_GAIN / number * correction
        return target

    @torch.no_grad()
    def estimate_bytes(self, w: float) -> float:
        """Size of the payload under the static priors, cheap."""
        z = self._z.flatten(2)
        stride = -(-z.shape[2] // SAMPLED_POSITIONS)
        part = z[:, :, ::stride, None]
        level = self._level_for(w)
        which = torch.tensor([level], device=z.device)
        tokens = self._quantizer.assign(part, self._quantizer.applied_w(w, which), which)
        bits = self._quantizer.prior_bits()[level].gather(1, tokens[0].flatten(1)).sum()
        return float(bits) * z.shape[2] / part.shape[2] / 8

    def _level_for(self, w: float) -> int:
        """Level for a trade-off; that of the last encoding stays for others near by: a search meets no jumps."""
        finest, level, coarsest = self._quantizer.level(torch.tensor([w / LEVEL_REACH, w, w * LEVEL_REACH])).tolist()
        return self._level if self._level is not None and finest <= self._level <= coarsest else level

    def _num_kept(self) -> int:
        return math.ceil(self._options.keep * self._quantizer.num_subquantizers * self._z.shape[2] * self._z.shape[3])

    def _trade_off_factors(self) -> Tensor:
        """What w is multiplied by at each position: (h * w,) float32."""
        height, width = self._z.shape[2:]
        factors = torch.ones(height, width)
        if self._options.tune == Tune.MS_SSIM:
            factors *= activity_factors(self._pixels)
        for region in self._options.regions:
            rows = slice(max(0, region.y // STRIDE), max(0, -(-(region.y + region.height) // STRIDE)))
            columns = slice(max(0, region.x // STRIDE), max(0, -(-(region.x + region.width) // STRIDE)))
            factors[rows, columns] /= region.weight
        return factors.flatten().to(self._z.device)


def activity_factors(pixels: NDArray[np.uint8]) -> Tensor:
    """Trade-off factors that follow the local contrast, geometric mean 1.

    Structural similarity divides errors by the local variance, so the trade-off may rise with it.

    Args:
        pixels: (16 h, 16 w, 3) uint8.

    Returns:
        (h, w) float32.
    """
    grey = torch.from_numpy(pixels).float().mean(2)[None, None]
    mean = F.avg_pool2d(grey, STRIDE)
    variance = (F.avg_pool2d(grey.square(), STRIDE) - mean.square()).clamp_min(0) + 10.0  # grey levels squared
    smooth = F.avg_pool2d(variance.log(), 3, stride=1, padding=1, count_include_pad=False)[0, 0]
    log_factors = ACTIVITY_EXPONENT * (smooth - smooth.mean())
    return log_factors.clamp(-math.log(MAX_ACTIVITY_FACTOR), math.log(MAX_ACTIVITY_FACTOR)).exp()
