"""BD-rate: the average difference in rate between two curves at equal quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pqmim.errors import MissingExtraError


@dataclass(frozen=True)
class BdRate:
    """Average difference in rate at equal quality.

    Attributes:
        percent: of the anchor's rate; negative is a saving. None if the curves do not overlap.
        low: lower end of the qualities that both curves reach, in units of the metric.
        high: upper end; nothing outside [low, high] was used.
    """

    percent: float | None
    low: float
    high: float


def bd_rate(
    anchor_bpp: Sequence[float],
    anchor_quality: Sequence[float],
    test_bpp: Sequence[float],
    test_quality: Sequence[float],
) -> BdRate:
    """Compute BD-rate with Akima interpolation over the overlap of two curves, without extrapolation.

    Args:
        anchor_bpp: rates of the anchor, bits per pixel, in any order.
        anchor_quality: quality at those rates, higher is better (MS-SSIM in dB, see `ms_ssim_db`).

    Raises:
        MissingExtraError: the package `bjontegaard` is not installed.

    Source: Bjontegaard, VCEG-M33; interpolation as advised by Herglotz et al. 2022 (package `bjontegaard`).
    Differs: a point that costs more bits for no more quality is left out, since the curve must be a function.
    """
    try:
        from bjontegaard import bd_rate as package_bd_rate
    except ImportError as error:
        raise MissingExtraError("bjontegaard", "eval") from error
    anchor = rising(anchor_bpp, anchor_quality)
    test = rising(test_bpp, test_quality)
    low, high = max(anchor[1][0], test[1][0]), min(anchor[1][-1], test[1][-1])
    if low >= high or min(len(anchor[0]), len(test[0])) < 2:
        return BdRate(None, low, high)
    percent = package_bd_rate(*anchor, *test, method="akima", require_matching_points=False, min_overlap=0)
    return BdRate(float(percent), low, high)


def rising(bpp: Sequence[float], quality: Sequence[float]) -> tuple[list[float], list[float]]:
    """Sort a curve by rate and keep the points that are better than all cheaper ones."""
    rates: list[float] = []
    qualities: list[float] = []
    for rate, value in sorted(zip(bpp, quality, strict=True)):
        if not qualities or value > qualities[-1]:
            rates.append(rate)
            qualities.append(value)
    return rates, qualities
