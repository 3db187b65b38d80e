"""Color spaces that are not sRGB, and the way from them to sRGB.

A color space is a curve from samples to linear light for each channel and a matrix to linear sRGB. The numbers are
those of ITU-T H.273 (the code points that PNG, AVIF and HEIF share), the PNG specification and IEC 61966-2-1.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Curve = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""From samples in [0, 1] to linear light, where 1 is white."""

Chromaticities = tuple[float, float, float, float, float, float, float, float]
"""x and y of white, red, green and blue."""

_D65 = (0.3127, 0.3290)
_ILLUMINANT_C = (0.310, 0.316)
_SRGB: Chromaticities = (*_D65, 0.640, 0.330, 0.300, 0.600, 0.150, 0.060)
_PRIMARIES: dict[int, Chromaticities] = {
    1: _SRGB,
    4: (*_ILLUMINANT_C, 0.67, 0.33, 0.21, 0.71, 0.14, 0.08),  # BT.470 M
    5: (*_D65, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),  # BT.470 B, G
    6: (*_D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),  # SMPTE 170M
    7: (*_D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),  # SMPTE 240M
    8: (*_ILLUMINANT_C, 0.681, 0.319, 0.243, 0.692, 0.145, 0.049),  # film
    9: (*_D65, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),  # BT.2020
    10: (1 / 3, 1 / 3, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0),  # XYZ
    11: (0.314, 0.351, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),  # DCI-P3
    12: (*_D65, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),  # Display P3
    22: (*_D65, 0.630, 0.340, 0.295, 0.605, 0.155, 0.077),  # EBU 3213
}
_UNSPECIFIED = 2
_PQ, _HLG = 16, 18

_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])

SDR_WHITE = 203.0
"""Luminance of white in HDR pictures, cd/m2 (ITU-R BT.2408)."""
_HLG_PEAK = 1000.0
_HLG_SYSTEM_GAMMA = 1.2
_LUMINANCE = np.array([0.2126, 0.7152, 0.0722], np.float32)
_KNEE = 0.6
"""Linear light up to which tone mapping leaves all as it is."""
_LARGEST_FACTOR = 100.0
"""Between primaries of any use, the factors are below 5."""
_STRIP_PIXELS = 1 << 18


@dataclass(frozen=True, eq=False)
class ColorSpace:
    """What the samples of a picture mean.

    Attributes:
        curves: for red, green and blue.
        matrix: (3, 3), from linear light in these primaries to linear sRGB.
        is_hdr: whether light may be brighter than white.
        system_gamma: from the light of a scene to that of a display, applied to the luminance.
    """

    curves: tuple[Curve, Curve, Curve]
    matrix: NDArray[np.float64]
    is_hdr: bool = False
    system_gamma: float = 1.0


def srgb_to_linear(samples: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sRGB curve."""
    return np.where(samples <= 0.04045, samples / 12.92, ((samples + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(light: NDArray[np.float64]) -> NDArray[np.float64]:
    """The inverse of the sRGB curve."""
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * np.maximum(light, 0.0031308) ** (1 / 2.4) - 0.055)


def gamma_curve(exponent: float) -> Curve:
    """A power law."""
    return lambda samples: samples**exponent


def cicp_space(primaries: int, transfer: int) -> ColorSpace | None:
    """Return the color space of two code points of ITU-T H.273, None if it is sRGB or as good as sRGB.

    The curves of television (BT.709, 601, 2020) are read as that of sRGB, as browsers do: they describe cameras,
    and what people see of such pictures are displays with about the curve of sRGB. Unspecified is sRGB too.
    Warns of HDR pictures, which are fitted into the range of sRGB, and of code points that are not known.
    """
    if primaries == _UNSPECIFIED and transfer == _UNSPECIFIED:
        return None
    chromaticities = _PRIMARIES.get(1 if primaries == _UNSPECIFIED else primaries)
    curve = _TRANSFERS.get(transfer)
    if chromaticities is None or curve is None:
        warnings.warn(f"colors of an unknown kind (CICP {primaries}/{transfer}) are read as sRGB", stacklevel=2)
        return None
    is_hdr = transfer in (_PQ, _HLG)
    if is_hdr:
        name = "PQ" if transfer == _PQ else "HLG"
        warnings.warn(f"an HDR picture ({name}): what is brighter than white becomes white or near it", stacklevel=2)
    if chromaticities == _SRGB and curve is srgb_to_linear:
        return None
    system_gamma = _HLG_SYSTEM_GAMMA if transfer == _HLG else 1.0
    return ColorSpace((curve, curve, curve), primaries_to_srgb(chromaticities), is_hdr, system_gamma)


def gamma_space(gamma: float, chromaticities: Chromaticities | None) -> ColorSpace | None:
    """Return the color space that a PNG describes by numbers, None if it is sRGB or as good as sRGB.

    Args:
        gamma: exponent from light to samples, 1 / 2.2 for about sRGB.
        chromaticities: sRGB's if None.
    """
    if not 0.05 < gamma < 20:  # no picture
        return None
    matrix = np.eye(3)
    if chromaticities is not None and np.abs(np.subtract(chromaticities, _SRGB)).max() > 0.002:
        try:
            with np.errstate(all="ignore"):
                matrix = primaries_to_srgb(chromaticities)
        except (np.linalg.LinAlgError, ZeroDivisionError):
            matrix = np.full((3, 3), np.nan)
        if not np.abs(matrix).max() < _LARGEST_FACTOR:  # also refuses NaN
            warnings.warn("the chromaticities of the PNG make no sense and are ignored", stacklevel=2)
            matrix = np.eye(3)
    is_srgb_curve = abs(gamma * 2.2 - 1) < 0.05
    if is_srgb_curve and (matrix == np.eye(3)).all():
        return None
    curve = gamma_curve(1 / gamma)
    return ColorSpace((curve, curve, curve), matrix)


def adobe_rgb() -> ColorSpace:
    """Adobe RGB (1998)."""
    curve = gamma_curve(563 / 256)
    return ColorSpace((curve, curve, curve), primaries_to_srgb((*_D65, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)))


def primaries_to_srgb(chromaticities: Chromaticities) -> NDArray[np.float64]:
    """Return the (3, 3) matrix from linear light in some primaries to linear sRGB; white stays white."""
    return np.asarray(np.linalg.inv(_to_xyz(_SRGB)) @ _to_xyz(chromaticities))


def xyz_d50_to_srgb() -> NDArray[np.float64]:
    """Return the (3, 3) matrix from XYZ relative to D50, as in ICC profiles, to linear sRGB."""
    d50 = np.array([0.9642, 1.0, 0.8249])
    return np.asarray(np.linalg.inv(_to_xyz(_SRGB)) @ _adaptation(d50, _xyz(*_D65)))


def to_srgb(samples: NDArray[Any], space: ColorSpace) -> NDArray[np.uint8]:
    """Convert a picture to sRGB; colors outside of sRGB are clipped, HDR is compressed above the mid-tones.

    Args:
        samples: (H, W, 1) or (H, W, 3) uint8 or uint16, full range.

    Returns:
        (H, W, 3) uint8.
    """
    height, width, channels = samples.shape
    levels = np.linspace(0, 1, int(np.iinfo(samples.dtype).max) + 1)
    with np.errstate(all="ignore"):  # curves from files may be anything
        tables = [np.nan_to_num(np.clip(curve(levels), 0, 1e4)).astype(np.float32) for curve in space.curves]
    matrix = space.matrix.T.astype(np.float32)
    num_rows = max(1, _STRIP_PIXELS // width)
    strips = [slice(top, top + num_rows) for top in range(0, height, num_rows)]

    def light_of(strip: slice) -> NDArray[np.float32]:
        light = np.stack([tables[i][samples[strip, :, i % channels]] for i in range(3)], axis=2) @ matrix
        if space.system_gamma != 1:
            light *= np.maximum(light @ _LUMINANCE, 0)[:, :, np.newaxis] ** (space.system_gamma - 1)
        return light

    peak = max(float(light_of(strip).max()) for strip in strips) if space.is_hdr else 1.0
    coded = np.rint(linear_to_srgb(np.linspace(0, 1, 65536)) * 255).astype(np.uint8)
    rgb = np.empty((height, width, 3), np.uint8)
    for strip in strips:
        light = light_of(strip)
        if peak > 1:
            light *= _tone_mapping(light.max(axis=2, keepdims=True), peak)
        rgb[strip] = coded[np.rint(np.clip(light, 0, 1) * 65535).astype(np.uint16)]
    return rgb


def _tone_mapping(brightest: NDArray[np.float32], peak: float) -> NDArray[np.float32]:
    """Return factors that bring light from [0, peak] to [0, 1] and leave what is below the knee.

    Above the knee it is Reinhard's curve with a white point; hue stays, since a pixel has one factor.
    """
    above = np.maximum(brightest - _KNEE, 0) / (1 - _KNEE)
    limit = (peak - _KNEE) / (1 - _KNEE)
    mapped = _KNEE + (1 - _KNEE) * above * (1 + above / limit**2) / (1 + above)
    return np.where(brightest > _KNEE, mapped / np.maximum(brightest, _KNEE), np.float32(1)).astype(np.float32)


def _pq_to_light(samples: NDArray[np.float64]) -> NDArray[np.float64]:
    """SMPTE ST 2084, 10,000 cd/m2 at most."""
    powered = samples ** (32 / 2523)
    light = np.maximum(powered - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * powered)
    return 10_000 / SDR_WHITE * light ** (16384 / 2610)


def _hlg_to_light(samples: NDArray[np.float64]) -> NDArray[np.float64]:
    """ARIB STD-B67: light of the scene, scaled such that the system gamma gives that of a display of 1,000 cd/m2."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    light = np.where(samples <= 0.5, samples**2 / 3, (np.exp((samples - c) / a) + b) / 12)
    return np.asarray((_HLG_PEAK / SDR_WHITE) ** (1 / _HLG_SYSTEM_GAMMA) * light)


def _smpte_240m_to_light(samples: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(samples < 0.0913, samples / 4, ((samples + 0.1115) / 1.1115) ** (1 / 0.45))


_TRANSFERS: dict[int, Curve] = {
    _UNSPECIFIED: srgb_to_linear,
    4: gamma_curve(2.2),
    5: gamma_curve(2.8),
    7: _smpte_240m_to_light,
    8: gamma_curve(1.0),
    9: lambda samples: np.where(samples > 0, 100 ** (samples - 1), 0),
    10: lambda samples: np.where(samples > 0, (100 * np.sqrt(10)) ** (samples - 1), 0),
    _PQ: _pq_to_light,
    17: lambda samples: 52.37 / 48 * samples**2.6,
    _HLG: _hlg_to_light,
} | dict.fromkeys((1, 6, 11, 12, 13, 14, 15), srgb_to_linear)


def _to_xyz(chromaticities: Chromaticities) -> NDArray[np.float64]:
    """Return the (3, 3) matrix from linear light to XYZ relative to D65, where white is (1, 1, 1)."""
    white = _xyz(*chromaticities[:2])
    primaries = np.stack([_xyz(*chromaticities[i : i + 2], is_primary=True) for i in (2, 4, 6)], axis=1)
    return _adaptation(white, _xyz(*_D65)) @ (primaries * np.linalg.solve(primaries, white))


def _xyz(x: float, y: float, *, is_primary: bool = False) -> NDArray[np.float64]:
    """Return XYZ of a chromaticity, of luminance 1 (a primary: in any scale)."""
    return np.array([x, y, 1 - x - y] if is_primary else [x / y, 1.0, (1 - x - y) / y])


def _adaptation(white: NDArray[np.float64], to: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return Bradford's (3, 3) matrix from XYZ under one white to XYZ under another."""
    return np.asarray(np.linalg.inv(_BRADFORD) @ np.diag((_BRADFORD @ to) / (_BRADFORD @ white)) @ _BRADFORD)
