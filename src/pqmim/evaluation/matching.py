"""Files of a given size: what makes pictures of several codecs comparable."""

from __future__ import annotations

import math

from PIL import Image

from pqmim.evaluation.image_codecs import ImageCodec

MAX_ENCODINGS = 9
FINEST = 0.003
"""Step between two qualities, as a share of the codec's scale, below which a search ends."""


class SizeMatcher:
    """Encodes one image into files as near to given sizes as the codec's quality scale allows.

    Sizes are looked for along the line through the logarithms of the sizes known so far, those of earlier targets too.

    Args:
        tolerance: relative difference from a target at which a file is near enough.
    """

    def __init__(self, codec: ImageCodec, image: Image.Image, tolerance: float = 0.01) -> None:
        self._codec, self._image, self._tolerance = codec, image, tolerance
        self._low, self._high = codec.qualities[0], codec.qualities[-1]
        self._files: dict[float, bytes] = {}

    def match(self, target: int, guess: float | None = None) -> tuple[float, bytes]:
        """Find the file for a target.

        Args:
            target: bytes.
            guess: quality that is likely to give it.

        Returns:
            Its quality and the file: the nearest one known, which may be far if the codec's scale ends before.
        """
        for _ in range(MAX_ENCODINGS):
            quality = self._next_quality(target, guess)
            if quality in self._files:
                break
            self._files[quality] = self._codec.encode(self._image, quality)
            if self._miss(quality, target) <= self._tolerance:
                break
        nearest = min(self._files, key=lambda quality: self._miss(quality, target))
        return nearest, self._files[nearest]

    def _miss(self, quality: float, target: int) -> float:
        return abs(math.log(len(self._files[quality]) / target))

    def _next_quality(self, target: int, guess: float | None) -> float:
        """The quality to try; one that was tried if no other would be nearer."""
        if not self._files:
            middle = (self._low + self._high) / 2 if guess is None else guess
            return min(max(middle, self._low), self._high)
        below = max((q for q, data in self._files.items() if len(data) <= target), default=None)
        above = min((q for q, data in self._files.items() if len(data) > target), default=None)
        if below is not None and above is not None and below < above:
            if above - below < FINEST * (self._high - self._low):
                return below
            low, high = (math.log(len(self._files[q])) for q in (below, above))
            share = (math.log(target) - low) / (high - low)
            return below + (above - below) * min(max(share, 0.05), 0.95)
        end = above if below is None else below
        assert end is not None  # there is a file, and it is one or the other
        # Sizes known to one side only: on along the line through them, a little further so as to pass the target.
        known = sorted(self._files)
        step = (self._high - self._low) / 8
        if len(known) > 1:
            first, last = (math.log(len(self._files[q])) for q in (known[0], known[-1]))
            if last > first:
                step = 1.2 * abs(math.log(target) - math.log(len(self._files[end]))) * (known[-1] - known[0])
                step = max(step / (last - first), 2 * FINEST * (self._high - self._low))
        return min(max(end + (-step if below is None else step), self._low), self._high)
