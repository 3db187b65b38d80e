"""Reference codecs: what pqmim is measured beside, each with its settings and its grid of qualities.

Every codec here makes real files through a well-kept library or an installed program.

Where PSNR is the yardstick a codec tuned for something else is a straw man: AVIF and HEIC are therefore tuned
for PSNR here, and what their libraries do untold is a codec of its own (`avif-default`, `heic-default`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pqmim.errors import ConfigError
from pqmim.evaluation.image_codecs import CommandCodec, HeicCodec, ImageCodec, PillowCodec

JPEG2000_BITS_PER_PIXEL = 24  # of the uncompressed image; the ratio 1 of OpenJPEG


def reference_codec_names() -> tuple[str, ...]:
    """Names that `reference_codec` knows, in the order of a legend."""
    return tuple(_FACTORIES)


def reference_codec(name: str, *, threads: int = 1) -> ImageCodec:
    """Return a reference codec, present or missing.

    Args:
        threads: that the encoder may start, where its library lets us say so.

    Raises:
        ConfigError: no such codec.
    """
    if name not in _FACTORIES:
        raise ConfigError(f"no reference codec {name!r}; there are {', '.join(_FACTORIES)}")
    return _FACTORIES[name](threads)


def reference_codecs(names: Iterable[str], *, threads: int = 1) -> tuple[ImageCodec, ...]:
    """Return several reference codecs; `jpeg` and the like as in `reference_codec`, `all` for every one."""
    wanted: dict[str, None] = {}
    for name in names:
        wanted.update(dict.fromkeys(_FACTORIES if name == "all" else (name,)))
    return tuple(reference_codec(name, threads=threads) for name in wanted)


def _jpeg420(quality: float) -> dict[str, Any]:
    return {"quality": round(quality), "subsampling": "4:2:0", "optimize": True}


def _jpeg444(quality: float) -> dict[str, Any]:
    return {"quality": round(quality), "subsampling": "4:4:4", "optimize": True}


def _webp(quality: float) -> dict[str, Any]:
    return {"quality": round(quality), "method": 6}


def _jpeg2000(quality: float) -> dict[str, Any]:
    # OpenJPEG takes a compression ratio, where less is better; ours is the target rate in bits per pixel.
    ratio = max(1.0, JPEG2000_BITS_PER_PIXEL / quality)
    return {"quality_mode": "rates", "quality_layers": [ratio], "irreversible": True, "mct": 1}


@dataclass(frozen=True)
class _JxlSettings:
    """Keyword arguments of the JPEG XL plugin's writer."""

    threads: int

    def __call__(self, quality: float) -> dict[str, Any]:
        return {"quality": round(quality), "effort": 7, "num_threads": self.threads}


@dataclass(frozen=True)
class _AvifSettings:
    """Keyword arguments of Pillow's AVIF writer."""

    threads: int
    tune: str | None

    def __call__(self, quality: float) -> dict[str, Any]:
        return {
            "quality": round(quality),
            "subsampling": "4:4:4",
            "codec": "aom",
            "speed": 4,
            "max_threads": self.threads,
            "autotiling": False,  # or the files would depend on the number of cores
            "advanced": {"tune": self.tune} if self.tune is not None else {},
        }


def _cjpeg(source: Path, target: Path, quality: float) -> list[str]:
    return ["cjpeg", "-quality", f"{quality:g}", "-sample", "2x2", "-outfile", str(target), str(source)]


@dataclass(frozen=True)
class _CjxlCommand:
    """Command line of libjxl's encoder."""

    threads: int

    def __call__(self, source: Path, target: Path, quality: float) -> list[str]:
        threads = f"--num_threads={0 if self.threads == 1 else self.threads}"  # 0 is: no worker besides the caller
        return ["cjxl", str(source), str(target), "-q", f"{quality:g}", "-e", "7", "--quiet", threads]


def _djxl(source: Path, target: Path) -> list[str]:
    return ["djxl", str(source), str(target), "--quiet"]


_JPEG_QUALITIES = (2.0, 5.0, 8.0, 11.0, 15.0, 20.0, 30.0, 45.0, 65.0, 85.0)
_AVIF_QUALITIES = (2.0, 6.0, 10.0, 14.0, 18.0, 24.0, 32.0, 42.0, 54.0, 66.0, 78.0)
_HEIC_QUALITIES = (2.0, 6.0, 10.0, 14.0, 18.0, 24.0, 30.0, 38.0, 46.0, 54.0)


def _make_jpeg420(threads: int) -> ImageCodec:
    summary = "JPEG 4:2:0, optimized Huffman tables"
    return PillowCodec("jpeg", "jpg", "JPEG", _JPEG_QUALITIES, _jpeg420, summary, "jpg")


def _make_jpeg444(threads: int) -> ImageCodec:
    summary = "JPEG 4:4:4, optimized Huffman tables"
    return PillowCodec("jpeg444", "jpg", "JPEG", _JPEG_QUALITIES, _jpeg444, summary, "jpg")


def _make_mozjpeg(threads: int) -> ImageCodec:
    return CommandCodec(
        name="mozjpeg",
        extension="jpg",
        qualities=_JPEG_QUALITIES,
        encoder=_cjpeg,
        decoder=None,
        version_command=("cjpeg", "-version"),
        version_marker="mozjpeg",
        summary="mozjpeg 4:2:0, progressive, trellis quantization",
    )


def _make_jpeg2000(threads: int) -> ImageCodec:
    qualities = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.9, 1.3, 2.0)
    summary = "JPEG 2000, irreversible 9/7 wavelet, color transform, one layer; quality is the target bpp"
    return PillowCodec("jpeg2000", "jp2", "JPEG2000", qualities, _jpeg2000, summary, "jpg_2000")


def _make_webp(threads: int) -> ImageCodec:
    qualities = (0.0, 2.0, 4.0, 8.0, 15.0, 25.0, 40.0, 60.0, 75.0, 85.0, 92.0)
    return PillowCodec("webp", "webp", "WEBP", qualities, _webp, "WebP (lossy, 4:2:0), method 6", "webp")


def _make_avif(threads: int) -> ImageCodec:
    settings = _AvifSettings(threads, "psnr")
    summary = f"AVIF 4:4:4, libaom speed 4, tune psnr, {_counted(threads)}, no tiles"
    return PillowCodec("avif", "avif", "AVIF", _AVIF_QUALITIES, settings, summary, "avif")


def _make_avif_default(threads: int) -> ImageCodec:
    settings = _AvifSettings(threads, None)
    qualities = (5.0, 10.0, 15.0, 20.0, 26.0, 33.0, 42.0, 54.0, 68.0)
    summary = f"AVIF 4:4:4, libaom speed 4, libavif's own tuning, {_counted(threads)}, no tiles"
    return PillowCodec("avif-default", "avif", "AVIF", qualities, settings, summary, "avif")


def _make_heic(threads: int) -> ImageCodec:
    parameters = {"tune": "psnr", "x265:psy-rd": "0", "x265:psy-rdoq": "0"}
    summary = "HEIC 4:4:4, x265, libheif's preset slow, tune psnr, psycho-visual terms off"
    return HeicCodec("heic", _HEIC_QUALITIES, parameters, summary)


def _make_heic_default(threads: int) -> ImageCodec:
    summary = "HEIC 4:4:4, x265, libheif's preset slow and its own tuning"
    return HeicCodec("heic-default", (5.0, 10.0, 15.0, 20.0, 25.0, 32.0, 40.0, 48.0), {}, summary)


def _make_jxl(threads: int) -> ImageCodec:
    """JPEG XL through the Pillow plugin, or through libjxl's programs where only they are installed."""
    # Not below 20: there libjxl halves the image's size, which costs 2 dB and makes a step in the curve.
    qualities = (20.0, 24.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 87.0)
    summary, settings = "JPEG XL, effort 7", _JxlSettings(threads)
    plugin = PillowCodec("jxl", "jxl", "JXL", qualities, settings, summary, None, "pillow_jxl")
    if plugin.missing() is None:
        return plugin
    return CommandCodec(
        name="jxl",
        extension="jxl",
        qualities=qualities,
        encoder=_CjxlCommand(threads),
        decoder=_djxl,
        version_command=("cjxl", "--version"),
        version_marker="cjxl",
        summary=summary,
    )


def _counted(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


_FACTORIES: dict[str, Callable[[int], ImageCodec]] = {
    "jpeg": _make_jpeg420,
    "jpeg444": _make_jpeg444,
    "mozjpeg": _make_mozjpeg,
    "jpeg2000": _make_jpeg2000,
    "webp": _make_webp,
    "jxl": _make_jxl,
    "avif": _make_avif,
    "avif-default": _make_avif_default,
    "heic": _make_heic,
    "heic-default": _make_heic_default,
}
