"""Pictures as files: in which format they are written, and what they say of themselves."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pqmim.cli.kinds import is_file_name
from pqmim.errors import OutputError
from pqmim.options import Fill, FillOptions

if TYPE_CHECKING:
    from PIL.Image import Image

    from pqmim.codec import Codec, DecodedImage
    from pqmim.metadata import Metadata

EXIF_IMAGE_DESCRIPTION = 0x010E
MAX_JPEG_EXIF, MAX_JPEG_XMP = 65_527, 65_504
"""Bytes that one segment of a JPEG has room for."""


class PictureFormat(StrEnum):
    """What pictures are written as."""

    PNG = "png"
    JPG = "jpg"
    WEBP = "webp"
    AVIF = "avif"


SUFFIXES = {f".{name}": name for name in PictureFormat} | {".jpeg": PictureFormat.JPG}
DEFAULT_QUALITY = {PictureFormat.JPG: 95, PictureFormat.WEBP: 95, PictureFormat.AVIF: 90}
"""Of the lossy formats, on their own scales: little is lost again."""


@dataclass(frozen=True)
class PictureWriter:
    """Makes files of pictures.

    Attributes:
        format: PNG is without loss.
        quality: 0 to 100, of the other formats; None = high.
    """

    format: PictureFormat = PictureFormat.PNG
    quality: int | None = None

    def file(self, image: Image, comment: str = "", metadata: Metadata | None = None) -> bytes:
        """Content of a file.

        Args:
            image: RGB or RGBA.
            comment: kept in PNG as text, keyword "Comment", in other formats as EXIF "ImageDescription"; none if empty.
            metadata: of the original. The picture is converted to the profile if it can be. What the format or the
                profile does not allow is left out, with a warning.

        Raises:
            OutputError: the format cannot hold the picture.
        """
        from pqmim.image_io import save_png
        from pqmim.metadata import EXIF_PREFIX, Metadata

        file = io.BytesIO()
        if self.format is PictureFormat.JPG:
            image = _over_white(image)
        if metadata:
            image, metadata = self._prepared(image, metadata)
        if self.format is PictureFormat.PNG:
            save_png(image, file, comment=comment, metadata=metadata or Metadata())
            return file.getvalue()
        options: dict[str, Any] = {"quality": DEFAULT_QUALITY[self.format] if self.quality is None else self.quality}
        exif = metadata.exif if metadata else None
        if comment or self.format is PictureFormat.AVIF:  # Pillow's writer of AVIF reads and writes the tags
            options["exif"] = _exif_with(exif, comment)
        elif exif:
            options["exif"] = EXIF_PREFIX + exif
        if metadata:
            options |= {"icc_profile": metadata.icc, "xmp": metadata.xmp or b""}
        if self.format is not PictureFormat.WEBP:  # which always halves the resolution of color
            options["subsampling"] = "4:4:4"
        if self.format is PictureFormat.JPG:
            options["optimize"] = True
        try:
            image.save(file, format="JPEG" if self.format is PictureFormat.JPG else self.format.upper(), **options)
        except (OSError, ValueError, KeyError) as error:  # KeyError: this Pillow was built without the format
            reason = f"this Pillow writes no {self.format}" if isinstance(error, KeyError) else str(error)
            raise OutputError(f"cannot be written as {self.format}: {reason}") from error
        return file.getvalue()

    def _prepared(self, image: Image, metadata: Metadata) -> tuple[Image, Metadata]:
        """Picture in the colors of the profile, and metadata that are true of it and fit into the format."""
        from pqmim.image_files.tags import exif_of_upright, xmp_of_upright
        from pqmim.metadata import in_profile

        if metadata.icc:
            is_grey_allowed = self.format in (PictureFormat.PNG, PictureFormat.JPG)
            converted = in_profile(image, metadata.icc, is_grey_allowed=is_grey_allowed)
            if converted is None:
                warnings.warn("the colors cannot be converted to the ICC profile: the picture is sRGB", stacklevel=2)
                metadata = replace(metadata, icc=None)
            else:
                image = converted
        exif, xmp = metadata.exif, metadata.xmp
        if exif:
            exif = exif_of_upright(exif, is_srgb=metadata.icc is None)
        if xmp:
            xmp = xmp_of_upright(xmp)
        if self.format is PictureFormat.JPG and len(exif or b"") > MAX_JPEG_EXIF:
            warnings.warn(f"EXIF of {len(exif or b''):,} bytes has no room in a JPEG and is left out", stacklevel=2)
            exif = None
        if self.format is PictureFormat.JPG and len(xmp or b"") > MAX_JPEG_XMP:
            warnings.warn(f"XMP of {len(xmp or b''):,} bytes has no room in a JPEG and is left out", stacklevel=2)
            xmp = None
        return image, replace(metadata, exif=exif, xmp=xmp)


def _exif_with(exif: bytes | None, comment: str) -> bytes:
    """EXIF block that Pillow writes, with a comment behind what the picture's description is already.

    A block that Pillow cannot read is left out with a warning.
    """
    from PIL import Image as images

    from pqmim.metadata import EXIF_PREFIX

    tags = images.Exif()
    try:
        if exif:
            tags.load(EXIF_PREFIX + exif)
        if comment:
            tags[EXIF_IMAGE_DESCRIPTION] = "; ".join(filter(None, (tags.get(EXIF_IMAGE_DESCRIPTION), comment)))
        return tags.tobytes() if len(tags) else b""
    except Exception:  # Pillow raises whatever broken tags lead to
        warnings.warn("the EXIF is broken and is left out", stacklevel=2)
        return _exif_with(None, comment)


def picture_writer(output: str | None, wanted: PictureFormat | None, quality: int | None) -> PictureWriter:
    """What writes the pictures that decoding gives.

    Args:
        output: as the user gave it; the suffix of a file decides on the format.
        wanted: for where no suffix does.
    """
    named = SUFFIXES.get(Path(output).suffix.lower()) if output is not None and is_file_name(output) else None
    if named is not None and wanted not in (None, named):
        raise typer.BadParameter(f"{output} is no name for {wanted}", param_hint="'--format'")
    chosen = named or wanted or PictureFormat.PNG
    if quality is not None and chosen is PictureFormat.PNG:
        raise typer.BadParameter("PNG is without loss; write .jpg, .webp or .avif", param_hint="'--quality'")
    return PictureWriter(chosen, quality)


def _over_white(image: Image) -> Image:
    """Lay a picture with alpha over white, with a warning."""
    if image.mode != "RGBA":
        return image
    from PIL import Image as images

    warnings.warn("JPEG has no alpha channel: the picture is laid over white", stacklevel=2)
    white = images.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB")


def synthesis_note(codec: Codec) -> str:
    """Say that detail was synthesised, and by what; empty of a faithful decoder."""
    if not codec.realism:
        return ""
    decoder = f"{codec.decoder_name} ({codec.decoder_id.hex()})"
    return f"detail was synthesised by the decoder {decoder}, realism {codec.realism:g}"


def joined(*parts: str) -> str:
    """A comment of several parts, those that are empty left out; empty if all are."""
    said = "; ".join(filter(None, parts))
    return f"pqmim: {said}" if said else ""


def provenance(decoded: DecodedImage, options: FillOptions, codec: Codec) -> str:
    """Say what of a picture was not in its file; empty if everything was."""
    parts = []
    if decoded.invented_share:
        share = percent(decoded.invented_share)
        parts.append(f"{share} of the tokens were not in the file and were filled ({how_filled(options)})")
    if decoded.problem:
        parts.append(f"salvaged: {decoded.problem}")
    return joined(*parts, synthesis_note(codec))


def how_filled(options: FillOptions) -> str:
    """Say how tokens were filled, so that it can be done again."""
    if options.fill is not Fill.SAMPLE:
        return options.fill.value
    text = f"sample, seed {options.seed}, temperature {options.temperature:g}"
    return text if options.num_steps is None else f"{text}, {options.num_steps} steps"


def percent(share: float) -> str:
    """Write a share so that neither next to nothing looks like nothing, nor nearly all like all."""
    number = 100 * share
    if 0 < share < 1:
        number = min(max(number, 0.1), 99.9)
    return f"{number:.1f} %"
