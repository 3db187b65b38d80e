"""Raw photos: what cameras write before they make a picture of it. They are developed by LibRaw, if it is there.

Many of them are TIFF files whose first picture is a thumbnail, for which Pillow takes them.
"""

import importlib
import io
from collections.abc import Callable

import numpy as np

from pqmim.errors import ImageError
from pqmim.image_files.samples import Samples
from pqmim.image_files.tags import TagReader
from pqmim.image_files.tiff import PHOTOMETRIC, SIGNATURES, all_ifds

RAW_SUFFIXES = frozenset(
    {
        ".3fr",
        ".arw",
        ".cr2",
        ".cr3",
        ".crw",
        ".dcr",
        ".dng",
        ".erf",
        ".fff",
        ".iiq",
        ".kdc",
        ".mef",
        ".mos",
        ".mrw",
        ".nef",
        ".nrw",
        ".orf",
        ".pef",
        ".raf",
        ".raw",
        ".rw2",
        ".rwl",
        ".sr2",
        ".srf",
        ".srw",
        ".x3f",
    }
)
"""Names by which cameras call raw photos, in lower case."""

_OTHER_SIGNATURES = (
    b"FUJIFILMCCD-RAW",
    b"FOVb",  # Sigma
    b"\0MRM",  # Minolta
    b"II\x1a\0\0\0HEAPCCDR",  # Canon
    b"IIU\0",  # Panasonic
    b"IIRO",
    b"IIRS",
    b"MMOR",  # Olympus
)
_DNG_VERSION = 50706
_SENSOR_PHOTOMETRICS = (32803, 34892)  # color filter array, linear raw


def is_raw(data: bytes, suffix: str) -> bool:
    """Whether a file is a raw photo.

    Args:
        data: the file.
        suffix: of its name, in lower case, for those whose content does not tell; "" if it has none.
    """
    if data.startswith(_OTHER_SIGNATURES) or data[4:12] == b"ftypcrx ":
        return True
    if not data.startswith(SIGNATURES):
        return False
    if suffix in RAW_SUFFIXES or data[8:10] == b"CR" or data[8:12] == b"IIII":  # Canon, Phase One
        return True
    try:
        reader = TagReader(data)
    except ValueError:
        return False
    return any(
        _DNG_VERSION in tags or reader.integer(tags.get(PHOTOMETRIC), 0) in _SENSOR_PHOTOMETRICS
        for _, tags, _ in all_ifds(reader)
    )


def read_raw(data: bytes, check_size: Callable[[int, int], None]) -> Samples:
    """Develop a raw photo as LibRaw does by default, with the white balance of the camera if it names one; upright.

    Raises:
        ImageError: the package for it is not installed, or it cannot develop this file.
    """
    try:
        rawpy = importlib.import_module("rawpy")
    except ImportError:
        raise ImageError("a raw photo: develop it first, or run: pip install 'pqmim[raw]'") from None
    try:
        with rawpy.imread(io.BytesIO(data)) as photo:
            check_size(photo.sizes.width, photo.sizes.height)
            has_balance = min(photo.camera_whitebalance[:3]) > 0
            rgb = photo.postprocess(use_camera_wb=has_balance, gamma=(2.4, 12.92), output_color=rawpy.ColorSpace.sRGB)
    except rawpy.LibRawError as error:
        cause = error.args[0] if error.args else b""
        text = cause.decode("utf-8", "replace") if isinstance(cause, bytes) else str(cause)
        raise ImageError(f"a raw photo that LibRaw cannot develop: {text}") from error
    return Samples(np.asarray(rgb))
