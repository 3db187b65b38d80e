"""Pillow plugin: after `import pqmim.pillow`, `Image.open` reads .pqm files and `Image.save` writes them.

Nothing heavy is imported before the first picture is decoded or saved. As with Pillow's own plugins, what `Image.open`
has no parameter for is a variable of this module.
"""

from __future__ import annotations

import os
from dataclasses import fields
from typing import IO, TYPE_CHECKING, Any

from PIL import Image, ImageFile

import pqmim
from pqmim.bitstream import MAGIC, MINI_MAGIC, at_coded_size, pack, parse, salvage
from pqmim.errors import BitstreamError, DamagedFileError, PqmimError, UnsupportedFileError
from pqmim.loaded import decoding_codec
from pqmim.options import EncodeOptions

if TYPE_CHECKING:
    from PIL._imaging import PixelAccess

FORMAT = "PQM"
DECODE_MODEL: str | os.PathLike[str] | None = None
"""Name or path of the token model that decodes all files; None = the shipped one that a file names."""
DECODER: str | os.PathLike[str] | None = None
"""Name or path of the decoder that makes all pictures; None = the default one of the token model."""
REALISM: float | None = None
"""0 to 1, of a decoder that synthesises detail, how much of it; None = 1. No other decoder has it."""
DECODE_THREADS: int | None = None
"""Threads that decode a picture; None = the cores, at most 8. 1 suits processes that are many already."""


class PqmImageFile(ImageFile.ImageFile):
    """A .pqm file: size and mode come from its header, pixels from `load`.

    After loading, `info["invented_share"]` is the share of the tokens that a partial file does not hold and that were
    filled, 0 to 1.
    """

    format = FORMAT
    format_description = "Product-quantized masked image"
    _data: bytes | None = None  # until loaded; also of copies and of what was pickled
    _problem = ""

    def _open(self) -> None:
        assert self.fp is not None
        data = self.fp.read()
        try:
            container, problem = salvage(data)
            # The magic of the mini form is short: what begins with it and does not fit its checksum may be anything.
            if problem and data.startswith(MINI_MAGIC) and not ImageFile.LOAD_TRUNCATED_IMAGES:
                raise DamagedFileError(problem)
        except UnsupportedFileError as error:
            if data.startswith(MAGIC):
                raise OSError(str(error)) from error
            raise SyntaxError(str(error)) from error
        except BitstreamError as error:
            raise SyntaxError(str(error)) from error  # how Pillow is told to try its other formats
        self._data, self._problem = data, problem
        self._size = (container.width, container.height)
        self._mode = "RGB" if container.alpha is None else "RGBA"

    def draft(self, mode: str | None, size: tuple[int, int] | None) -> tuple[str, tuple[int, int, float, float]] | None:
        """Leave out scaling back a picture that was coded several times smaller, if that is large enough.

        A file that was coded in full size, or with alpha, has no cheaper picture than the whole one.

        Args:
            mode: of no effect.
            size: least width and height, pixels.

        Returns:
            The mode and the box that the picture fills, or None if nothing changes.
        """
        if self._data is None or self._problem or size is None or self.mode != "RGB":
            return None
        coded = at_coded_size(parse(self._data))
        if (coded.width, coded.height) == self.size or coded.width < size[0] or coded.height < size[1]:
            return None
        self._data, self._size = pack(coded), (coded.width, coded.height)
        return self.mode, (0, 0, coded.width, coded.height)

    def load(self) -> PixelAccess | None:
        """Decode the pixels.

        Raises:
            OSError: the file is damaged or cut short, and `ImageFile.LOAD_TRUNCATED_IMAGES` is not set; or there is no
                model for it.
        """
        if self._data is not None:
            self.im = self._decoded(self._data).im
            self.readonly = 0
            if self.fp is not None and self._exclusive_fp:
                self.fp.close()
            self.fp = self._data = None
        return super().load()

    def verify(self) -> None:
        """Check the checksum of the file, and close it.

        Raises:
            OSError: it does not fit.
        """
        if self._problem:
            raise OSError(self._problem)
        super().verify()

    def _decoded(self, data: bytes) -> Image.Image:
        if self._problem and not ImageFile.LOAD_TRUNCATED_IMAGES:
            raise OSError(f"image file is truncated or damaged ({self._problem})")
        try:
            model_id = salvage(data)[0].model_id
            codec = decoding_codec(model_id, DECODE_MODEL, DECODER, realism=REALISM, threads=DECODE_THREADS)
            # Pillow's own limit on pixels was asked when the file was opened.
            decoded = codec.decode_with_report(data, salvage=bool(self._problem), max_pixels=self.width * self.height)
        except PqmimError as error:
            raise OSError(str(error)) from error
        self.info["invented_share"] = decoded.invented_share
        return decoded.image


def _accept(prefix: bytes) -> bool:
    return prefix.startswith((MAGIC, MINI_MAGIC))


def _save(image: Image.Image, file: IO[bytes], filename: str | bytes) -> None:
    """Write a picture; the parameters of `Image.save` are those of `pqmim.encode` and of `EncodeOptions`."""
    asked: dict[str, Any] = image.encoderinfo
    arguments = {
        name: asked[name] for name in ("quality", "target_bytes", "target_bpp", "model", "decoder") if name in asked
    }
    options = {field.name: asked[field.name] for field in fields(EncodeOptions) if field.name in asked}
    try:
        data = pqmim.encode(image, options=EncodeOptions(**options), **arguments)
    except PqmimError as error:
        raise OSError(str(error)) from error
    file.write(data)


Image.register_open(FORMAT, PqmImageFile, _accept)
Image.register_save(FORMAT, _save)
Image.register_extension(FORMAT, ".pqm")
Image.register_mime(FORMAT, "image/x-pqm")
