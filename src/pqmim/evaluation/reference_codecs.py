"""Reference codecs: what pqmim is measured beside, all behind one small protocol.

Every codec here makes real files through a well-kept library or an installed program. A codec whose library
is absent stays in the list and says so (`missing`), so that an evaluation can report it and not leave it out.

Where PSNR is the yardstick a codec tuned for something else is a straw man: AVIF and HEIC are therefore tuned
for PSNR here, and what their libraries do untold is a codec of its own (`avif-default`, `heic-default`).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, features
from PIL import __version__ as PILLOW_VERSION

from pqmim.errors import ConfigError, ImageError

COMMAND_TIMEOUT = 600  # seconds for one image; an encoder that hangs must not hang an evaluation
JPEG2000_BITS_PER_PIXEL = 24  # of the uncompressed image; the ratio 1 of OpenJPEG


class ImageCodec(Protocol):
    """Image in, bytes out, and back. `quality` is the codec's own scale; more is better for every codec."""

    @property
    def name(self) -> str:
        """Short name: a file name, a legend entry and what the command line takes."""

    @property
    def extension(self) -> str:
        """Suffix of its files, without a dot."""

    @property
    def qualities(self) -> tuple[float, ...]:
        """Points of its rate-distortion curve unless the user gives others."""

    def missing(self) -> str | None:
        """Say why the codec cannot run here; None if it can."""

    def description(self) -> str:
        """Settings and library versions. Equal descriptions promise equal files."""

    def encode(self, image: Image.Image, quality: float) -> bytes:
        """Compress an RGB image into a complete file."""

    def decode(self, data: bytes) -> Image.Image:
        """Decompress a file made by `encode` into an RGB image."""


@dataclass(frozen=True)
class PillowCodec:
    """A format that Pillow writes, itself or through a plugin.

    Attributes:
        settings: quality -> keyword arguments of `Image.save`.
        summary: the settings in words.
        feature: name that `PIL.features` knows the library by; None for a plugin.
        plugin: module whose import teaches Pillow the format.
    """

    name: str
    extension: str
    format: str
    qualities: tuple[float, ...]
    settings: Callable[[float], dict[str, Any]]
    summary: str
    feature: str | None
    plugin: str | None = None

    def missing(self) -> str | None:
        if self.plugin is not None:
            return _missing_package(self.plugin)
        if self.feature is not None and not features.check(self.feature):
            return f"this Pillow {PILLOW_VERSION} is built without {self.feature}"
        return None

    def description(self) -> str:
        if self.plugin is not None:
            return f"{self.summary}; {_package_version(self.plugin)}"
        assert self.feature is not None  # one of the two is set
        library = "libjpeg-turbo" if features.check("libjpeg_turbo") and self.feature == "jpg" else self.feature
        version = features.version("libjpeg_turbo" if library == "libjpeg-turbo" else self.feature)
        return f"{self.summary}; Pillow {PILLOW_VERSION}, {library} {version}"

    def encode(self, image: Image.Image, quality: float) -> bytes:
        self._load_plugin()
        file = io.BytesIO()
        image.save(file, format=self.format, **self.settings(quality))
        return file.getvalue()

    def decode(self, data: bytes) -> Image.Image:
        self._load_plugin()
        with Image.open(io.BytesIO(data), formats=(self.format,)) as image:
            return image.convert("RGB")

    def _load_plugin(self) -> None:
        if self.plugin is not None:
            importlib.import_module(self.plugin)


@dataclass(frozen=True)
class HeicCodec:
    """HEIC through pillow-heif (libheif, x265), without registering it with Pillow for the whole process.

    Attributes:
        parameters: of the x265 encoder, as libheif names them.
    """

    name: str
    qualities: tuple[float, ...]
    parameters: Mapping[str, str]
    summary: str
    extension: str = "heic"

    def missing(self) -> str | None:
        absent = _missing_package("pillow_heif")
        if absent is not None:
            return absent
        import pillow_heif

        if not pillow_heif.libheif_info()["HEIF"]:
            return "this pillow-heif is built without x265"
        return None

    def description(self) -> str:
        import pillow_heif

        info = pillow_heif.libheif_info()
        versions = f"pillow-heif {pillow_heif.__version__}, libheif {info['libheif']}, {info['HEIF']}"
        return f"{self.summary}; {versions}"

    def encode(self, image: Image.Image, quality: float) -> bytes:
        import pillow_heif

        file = io.BytesIO()
        # pillow-heif adds to the dictionary that it is given: hand over a copy.
        pillow_heif.from_pillow(image).save(file, quality=round(quality), chroma=444, enc_params=dict(self.parameters))
        return file.getvalue()

    def decode(self, data: bytes) -> Image.Image:
        import pillow_heif

        image: Image.Image = pillow_heif.open_heif(data, convert_hdr_to_8bit=True).to_pillow()
        return image.convert("RGB")


@dataclass(frozen=True)
class CommandCodec:
    """A codec that is a pair of installed programs working on files.

    Attributes:
        encoder: (input PPM, output file, quality) -> command line; its first word is the program.
        decoder: (input file, output PPM) -> command line, or None where Pillow reads the format.
        version_command: prints the version, to either stream.
        version_marker: must occur in what it prints; tells mozjpeg's cjpeg from libjpeg's.
    """

    name: str
    extension: str
    qualities: tuple[float, ...]
    encoder: Callable[[Path, Path, float], list[str]]
    decoder: Callable[[Path, Path], list[str]] | None
    version_command: tuple[str, ...]
    version_marker: str
    summary: str

    def missing(self) -> str | None:
        programs = [self.version_command[0]]
        if self.decoder is not None:
            programs.append(self.decoder(Path(), Path())[0])
        for program in programs:
            if shutil.which(program) is None:
                return f"the program {program} is not installed"
        if self.version_marker not in self._version():
            return f"the program {programs[0]} that is installed is not {self.version_marker}'s"
        return None

    def description(self) -> str:
        return f"{self.summary}; {self._version().splitlines()[0].strip()}"

    def encode(self, image: Image.Image, quality: float) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder, "image.ppm"), Path(folder, f"image.{self.extension}")
            image.save(source)
            _run(self.encoder(source, target, quality))
            return target.read_bytes()

    def decode(self, data: bytes) -> Image.Image:
        if self.decoder is None:
            with Image.open(io.BytesIO(data)) as image:
                return image.convert("RGB")
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder, f"image.{self.extension}"), Path(folder, "image.ppm")
            source.write_bytes(data)
            _run(self.decoder(source, target))
            with Image.open(target) as image:
                return image.convert("RGB")

    def _version(self) -> str:
        done = subprocess.run(self.version_command, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout + done.stderr


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


@dataclass(frozen=True)
class PublishedCurve:
    """A rate-distortion curve that others measured on Kodak; quoted, never re-measured.

    Attributes:
        name: always begins with "published".
        bpp: rising, bits per pixel.
        metrics: "psnr-rgb" in dB, "ms-ssim-rgb" in [0, 1] where the source gives it; one number per rate.
        source: repository, commit and file the figures were copied from.
    """

    name: str
    bpp: tuple[float, ...]
    metrics: Mapping[str, tuple[float, ...]]
    source: str


def published_kodak_curves() -> tuple[PublishedCurve, ...]:
    """Read the published Kodak curves that ship with the package."""
    content = json.loads(resources.files("pqmim.evaluation").joinpath("published_kodak.json").read_text("utf-8"))
    return tuple(
        PublishedCurve(
            name=f"published {curve['name']}",
            bpp=tuple(curve["bpp"]),
            metrics={key: tuple(values) for key, values in curve["metrics"].items()},
            source=curve["source"],
        )
        for curve in content["curves"]
    )


def _missing_package(module: str) -> str | None:
    """Say that a package cannot be imported; None if it can."""
    try:
        importlib.import_module(module)
    except ImportError:
        return f"the package {module.replace('_', '-')} is not installed"
    return None


def _package_version(module: str) -> str:
    """Package name and version of an importable module."""
    package = importlib.metadata.packages_distributions()[module][0]
    return f"{package} {importlib.metadata.version(package)}"


def _run(command: list[str]) -> None:
    """Run a codec's program; its last words become the error."""
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT, check=True)
    except subprocess.CalledProcessError as error:
        words = (error.stderr or error.stdout or "no message").strip().splitlines()[-1]
        raise ImageError(f"{command[0]} failed: {words}") from error
    except subprocess.TimeoutExpired as error:
        raise ImageError(f"{command[0]} took longer than {COMMAND_TIMEOUT} s") from error


# Settings are functions or small classes of this module, so that a codec can be sent to a worker process.


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
_AVIF_QUALITIES = (2.0, 6.0, 10.0, 14.0, 18.0, 24.0, 32.0, 42.0, 54.0)
_HEIC_QUALITIES = (2.0, 6.0, 10.0, 14.0, 18.0, 24.0, 30.0, 38.0)


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
    qualities = (0.0, 2.0, 4.0, 8.0, 15.0, 25.0, 40.0, 60.0, 75.0, 85.0)
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
