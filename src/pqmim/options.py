"""What a caller may ask of the codec: options and their checks. Imports no network and no NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

from pqmim.bitstream import SCALES

DEFAULT_MODEL = "photo"
"""The shipped token model that is taken where none is named."""
MAX_PIXELS = 100_000_000
"""Default limit on width x height, against files that ask for more memory than there is."""


OnProgress = Callable[[str, int, int], None]
"""Told how far an encoding is: (what is being done, in a word or two; parts of it that are done, parts in all)."""


@dataclass(frozen=True)
class Effort:
    """How long the encoder thinks.

    Attributes:
        corrections: of the latent from the decoded picture.
        structure_steps: of a search (`search`) in place of corrections, for `Tune.MS_SSIM`.
        vivid_steps: the same for `Tune.VIVID`.
    """

    corrections: int = 0
    structure_steps: int = 0
    vivid_steps: int = 0


EFFORTS = (Effort(), Effort(corrections=2, vivid_steps=5), Effort(corrections=5, structure_steps=5, vivid_steps=10))
"""From effort 1 on."""
MAX_EFFORT = len(EFFORTS)
DEFAULT_EFFORT = 2


class Device(StrEnum):
    """Where the networks run."""

    AUTO = "auto"
    """On a GPU where there is one."""
    CPU = "cpu"
    CUDA = "cuda"


class Tune(StrEnum):
    """What the encoder spends its bits for."""

    PSNR = "psnr"
    """Least squared error: the same trade-off everywhere."""
    MS_SSIM = "ms-ssim"
    """Structure: more for quiet parts of the picture, less for busy ones, where errors hide."""
    VIVID = "vivid"
    """What a network that names objects sees, in pictures of a decoder that synthesises detail."""


class Fill(StrEnum):
    """What becomes of unknown tokens."""

    LIKELY = "likely"
    """Expectation of the latent."""
    SAMPLE = "sample"
    """Drawn from the model."""
    NONE = "none"
    """The mean of all pictures, whatever is known."""


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

    def scaled_down(self, scale: int) -> Region:
        """The region in a picture that is `scale` times smaller."""
        return replace(
            self,
            x=self.x // scale,
            y=self.y // scale,
            width=-(-(self.x + self.width) // scale) - self.x // scale,
            height=-(-(self.y + self.height) // scale) - self.y // scale,
        )


@dataclass(frozen=True)
class EncodeOptions:
    """How to encode, but for the rate.

    Attributes:
        effort: 1 to MAX_EFFORT; more looks more often at the decoded picture and corrects what the tokens stand for.
        tune: what the bits are spent for.
        regions: parts of the picture that matter more, pixels of the image.
        keep: share of the tokens to send, in coding order, above 0 and at most 1; the decoder fills the rest.
        scale: code the picture this many times smaller, one of `bitstream.SCALES`; None = as suits the rate.
        strict: a target below what is possible is an error.
        max_pixels: larger images are refused.
        max_seconds: after which a search ends, whatever the effort; what it found by then has to do.
        keep_metadata: EXIF, ICC profile and XMP of the image become a part of the file, and count for its size.
    """

    effort: int = DEFAULT_EFFORT
    tune: Tune = Tune.PSNR
    regions: tuple[Region, ...] = ()
    keep: float = 1.0
    scale: int | None = None
    strict: bool = False
    max_pixels: int = MAX_PIXELS
    max_seconds: float = math.inf
    keep_metadata: bool = False

    def __post_init__(self) -> None:
        if not self.max_seconds > 0:
            raise ValueError(f"max_seconds must be above 0, not {self.max_seconds:g}")
        if self.scale is not None and self.scale not in SCALES:
            raise ValueError(f"scale must be one of {', '.join(map(str, SCALES))}, not {self.scale}")
        if not 1 <= self.effort <= MAX_EFFORT:
            raise ValueError(f"effort must be 1 to {MAX_EFFORT}, not {self.effort}")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be above 0 and at most 1, not {self.keep:g}")
        Tune(self.tune)  # refuses other strings
        if self.tune == Tune.VIVID and self.effort == 1:
            raise ValueError("tune vivid needs effort 2 or 3: at effort 1 no decoded picture is looked at")


@dataclass(frozen=True)
class FillOptions:
    """What becomes of tokens that a file does not hold.

    Attributes:
        fill: see `Fill`.
        seed: for sampling, >= 0; the same seed gives the same picture everywhere.
        temperature: for sampling, above 0; 1 draws from the model's probabilities, less is tamer.
        num_steps: for sampling, passes of the network; None = as many as the schedule has.
    """

    fill: Fill = Fill.LIKELY
    seed: int = 0
    temperature: float = 1.0
    num_steps: int | None = None

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, not {self.seed}")
        if not 0.01 <= self.temperature <= 100:
            raise ValueError(f"temperature must be 0.01 to 100, not {self.temperature:g}")
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.num_steps}")
        Fill(self.fill)  # refuses other strings
