"""Image codecs behind one small protocol: what Pillow writes, HEIC, and pairs of installed programs.

A codec whose library is absent stays in the list and says so (`missing`), so that an evaluation can report it and not
leave it out.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from PIL import Image, features
from PIL import __version__ as PILLOW_VERSION

from pqmim.errors import ImageError

COMMAND_TIMEOUT = 600  # seconds for one image; an encoder that hangs must not hang an evaluation


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


@runtime_checkable
class DecoderCodec(Protocol):
    """What an `ImageCodec` has besides if it is one of several decoders that the same files have."""

    @property
    def decoder_name(self) -> str:
        """As `ImageCodec.name`, the same for all strengths of one decoder."""

    @property
    def strength(self) -> float | None:
        """Realism of a decoder that draws detail which was not sent, 0 to 1; None of others."""

    def takes_files_of(self, other: ImageCodec) -> bool:
        """Whether it decodes the other's files."""


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
