"""The encoder: a picture and what is asked for -> the tokens to send.

What the decoder need not know is decided here: the trade-off between rate and distortion, anywhere in the picture and
to hit a size, and which tokens are the best under it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pqmim.config import STRIDE
from pqmim.distortion import DistortionOf, StructuralDissimilarity
from pqmim.networks import Networks
from pqmim.options import EFFORTS, EncodeOptions, OnProgress, Region, Tune
from pqmim.quantizer import Latent, Tokens
from pqmim.range_coding import TokenWriter
from pqmim.search import search
from pqmim.token_coding import STATIC_SHARE, Budget, PrefixWriter, RateDistortionChoice, TokenGrid, code_tokens

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
OWN_SHARE = 0.75
"""How far an estimate of the size follows the frequencies that a picture's tokens have, not those of all pictures."""
HANDOVER_POSITIONS = 512
"""Positions that say where levels hand over to each other."""
HANDOVER_SHARE = 0.97
"""Share of the bits under the static priors that the leading sub-quantizers have by which this is judged."""
FINE_W = 0.3
"""Levels that end with a finer trade-off hand over at the same one for all pictures: sizes meet there anyhow."""
HANDOVER_RATIO = 0.987
"""Where two levels give files of the same size: estimated bytes of the coarser per byte of the finer; measured on the
validation photos."""
SIZE_SLOPE = 0.21
"""About how fast the logarithm of a size falls with that of the trade-off that one level applies."""
MAX_SHIFT = 0.5
"""Most that a handover moves for one picture, in logarithms of the trade-off."""


@dataclass(frozen=True)
class EncodedTokens:
    """Tokens of a picture and the payload that says them.

    Attributes:
        level: whose codebooks they are from.
        tokens: (M, h, w).
        payload: the range coder's digits, of all tokens or of the first ones.
        is_partial: whether only the first tokens are in the payload.
    """

    level: int
    tokens: Tokens
    payload: bytes
    is_partial: bool


class PictureEncoder:
    """Encodes one picture as often as it takes.

    Args:
        rgb: (H, W, 3) uint8.
        options: what concerns the tokens: effort, tune, keep.
        regions: in pixels of `rgb`.
        judge: what a search for `Tune.VIVID` judges decoded pictures by; of no other tune.
        on_progress: told how far an encoding is.

    Raises:
        ValueError: `Tune.VIVID` without a judge.
    """

    def __init__(
        self,
        networks: Networks,
        rgb: NDArray[np.uint8],
        options: EncodeOptions,
        regions: Sequence[Region] = (),
        *,
        judge: DistortionOf | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        if options.tune == Tune.VIVID and judge is None:
            raise ValueError("tune vivid needs a judge, such as pqmim.perceptual.tuning.vivid_judge() loads")
        self._networks = networks
        self._transforms = networks.transforms
        self._quantizer = networks.quantizer
        self._entropy_model = networks.entropy_model
        self._options = options
        padding = ((0, -rgb.shape[0] % STRIDE), (0, -rgb.shape[1] % STRIDE), (0, 0))
        self._pixels = np.pad(rgb, padding, mode="edge")
        self._z = self._transforms.analyze(self._pixels)
        self._num_pixels = rgb.shape[0] * rgb.shape[1]
        self._on_progress = on_progress
        effort = EFFORTS[options.effort - 1]
        self._num_corrections = effort.corrections
        steps = {Tune.PSNR: 0, Tune.MS_SSIM: effort.structure_steps, Tune.VIVID: effort.vivid_steps}
        self._num_steps = steps[Tune(options.tune)]
        self._judge = StructuralDissimilarity if judge is None or options.tune != Tune.VIVID else judge
        # A search has weighed the decoded picture against static bits; to weigh other ones afterwards undoes a part.
        self._static_share = 1.0 if self._num_steps else STATIC_SHARE
        self._deadline = time.monotonic() + options.max_seconds
        self._factors = self._trade_off_factors(regions)
        self._target: Latent | None = None
        self._level: int | None = None
        self._shifts: dict[int, float] = {}
        self._spent: list[float] = []

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
        w_here = np.float32(self._applied_w(w, level)) * self._factors
        if self._target is None:
            self._target = self._searched(w_here, level) if self._num_steps else self._corrected(w_here, level)
        choice = RateDistortionChoice(self._quantizer, self._target, w_here, level, budget, self._static_share)
        writer = PrefixWriter(self._num_kept(level)) if is_partial else TokenWriter()
        tokens = self._coded(writer, level, choice)
        self._spent = choice.spent
        return EncodedTokens(level, tokens, writer.finish(), is_partial)

    def _searched(self, w: NDArray[np.float32], level: int) -> Latent:
        """The latent, moved to where its tokens decode best for their bits; w is (h * w,), as applied."""
        return search(
            self._networks,
            self._pixels,
            self._z,
            w,
            level,
            self._judge,
            num_steps=self._num_steps,
            deadline=self._deadline,
            on_progress=self._on_progress,
        )

    def _corrected(self, w: NDArray[np.float32], level: int) -> Latent:
        """The latent, moved towards what makes the *decoded* picture right: gradient steps through the quantizer.

        Tokens are chosen under the static prior, so this takes no pass of the entropy model.

        Args:
            w: (h * w,) as applied.
        """
        target, number = self._z, self._num_corrections
        height, width = self._z.shape[2:]
        for index in range(1, number + 1):
            tokens = self._quantizer.assign(self._quantizer.channels(target), w, level).reshape(-1, height, width)
            correction = self._transforms.correct(self._quantizer.dequantize(tokens, level), self._pixels)
            correction -= self._z
            correction *= np.float32(CORRECTION_GAIN / number)
            target = target + correction
            self._tell("corrections", index, number)
        return target

    def _coded(self, writer: TokenWriter | PrefixWriter, level: int, choice: RateDistortionChoice) -> Tokens:
        """Choose and write all tokens, (M, h, w)."""
        num_steps, done = len(self._entropy_model.steps(level)), 0

        def after_step(_: TokenGrid) -> None:
            nonlocal done
            done += 1
            self._tell("tokens", done, num_steps)

        height, width = self._z.shape[2:]
        grid = code_tokens(self._entropy_model, writer, height, width, level, choice, after_step=after_step)
        return grid.tokens

    def _tell(self, what: str, done: int, total: int) -> None:
        if self._on_progress is not None:
            self._on_progress(what, done, total)

    def estimate_bytes(self, w: float) -> float:
        """Size of the payload as the frequencies of its tokens foretell it, cheap: about 1.2 times the real one."""
        level = self._level_for(w)
        return self._bytes_at(self._applied_w(w, level), level)

    def _bytes_at(self, applied: float, level: int) -> float:
        """The same for a trade-off as applied."""
        num_sampled: int = self._sample.shape[1]
        return self._bits(self._sample, applied, level) / 8 * len(self._factors) / num_sampled

    def _bits(self, channels: NDArray[np.float32], applied: float, level: int, count: int | None = None) -> float:
        """Bits of some positions, a mean of those under the frequencies of their tokens and under the static priors, of
        all or of the `count` leading sub-quantizers."""
        w = np.full(channels.shape[1], applied, np.float32)
        tokens = self._quantizer.assign(channels, w, level, count)
        own, static = self._quantizer.own_bits(tokens, level), self._quantizer.static_bits(tokens, level)
        return math.pow(own, OWN_SHARE) * math.pow(max(0.0, static), 1 - OWN_SHARE)

    def _applied_w(self, w: float, level: int) -> float:
        """What a level applies when w is asked for: levels hand over to each other where this picture takes about as
        many bytes with either, so that sizes grow evenly."""
        levels = self._quantizer.levels
        for finer in range(max(0, level - 1), min(level + 1, len(levels) - 1)):
            if finer not in self._shifts:
                self._shifts[finer] = self._shift(finer)
        return levels.moved(self._shifts).applied_w(w, level)

    def _shift(self, finer: int) -> float:
        """What is added to the logarithm of the w that a level ends with, and taken from that with which the next one
        begins: a guess by the typical slope, then a step of the secant."""
        ends = self._quantizer.levels.handover(finer)
        if ends[0] < FINE_W:
            return 0.0
        sample = self._sample[:, :: -(-self._sample.shape[1] // HANDOVER_POSITIONS)].copy()
        count = self._quantizer.num_leading(finer, HANDOVER_SHARE)

        def ratio(shift: float) -> float:
            applied = (ends[0] * math.exp(shift), ends[1] * math.exp(-shift))
            bits = [max(8.0, self._bits(sample, w, finer + index, count)) for index, w in enumerate(applied)]
            return math.log(bits[0] * HANDOVER_RATIO / bits[1])

        def within_reach(shift: float) -> float:
            return min(max(shift, -MAX_SHIFT), MAX_SHIFT)

        before = ratio(0.0)
        guess = within_reach(before / (2 * SIZE_SLOPE))
        slope = (before - ratio(guess)) / guess if guess else 0.0
        return within_reach(before / slope) if slope > 0 else guess

    def _level_for(self, w: float) -> int:
        """Level for a trade-off; that of the last encoding stays for others near by: a search meets no jumps."""
        finest, level, coarsest = (
            self._quantizer.levels.level(w * reach) for reach in (1 / LEVEL_REACH, 1, LEVEL_REACH)
        )
        return self._level if self._level is not None and finest <= self._level <= coarsest else level

    def _num_kept(self, level: int) -> int:
        return math.ceil(self._options.keep * self._quantizer.alphabets.num_coded(level) * len(self._factors))

    @cached_property
    def _sample(self) -> NDArray[np.float32]:
        """Channels of the positions that estimates are made from, (D', n)."""
        z = self._z.reshape(*self._z.shape[:2], 1, -1)
        return self._quantizer.channels(z[..., :: -(-z.shape[3] // SAMPLED_POSITIONS)])

    def _trade_off_factors(self, regions: Sequence[Region]) -> NDArray[np.float32]:
        """What w is multiplied by at each position: (h * w,)."""
        factors = np.ones(self._z.shape[2:], np.float32)
        if self._options.tune == Tune.MS_SSIM:
            factors *= activity_factors(self._pixels)
        for region in regions:
            rows = slice(max(0, region.y // STRIDE), max(0, -(-(region.y + region.height) // STRIDE)))
            columns = slice(max(0, region.x // STRIDE), max(0, -(-(region.x + region.width) // STRIDE)))
            factors[rows, columns] /= region.weight
        return np.asarray(factors.ravel())


def activity_factors(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Trade-off factors that follow the local contrast, geometric mean 1.

    Structural similarity divides errors by the local variance, so the trade-off may rise with it.

    Args:
        pixels: (16 h, 16 w, 3) uint8.

    Returns:
        (h, w) float32.
    """
    height, width = pixels.shape[0] // STRIDE, pixels.shape[1] // STRIDE
    blocks = pixels.mean(2, dtype=np.float32).reshape(height, STRIDE, width, STRIDE)
    variance = blocks.var((1, 3), dtype=np.float64) + 10.0  # grey levels squared
    smooth = _mean_of_neighbors(np.log(variance))
    log_factors = ACTIVITY_EXPONENT * (smooth - smooth.mean())
    limit = math.log(MAX_ACTIVITY_FACTOR)
    return np.asarray(np.exp(log_factors.clip(-limit, limit)), np.float32)


def _mean_of_neighbors(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over each 3 x 3 neighborhood, of what lies inside."""
    height, width = values.shape
    padded = np.pad(np.stack([values, np.ones_like(values)]), ((0, 0), (1, 1), (1, 1)))
    shifts = [padded[:, dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3)]
    total, count = np.sum(shifts, axis=0)
    return np.asarray(total / count)
