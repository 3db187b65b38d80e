"""Kinds of files by their suffix: what commands take from folders, and what they do not write."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

import typer

from pqmim.jobs import Kinds

PQM = frozenset({".pqm"})
NO_PICTURES = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"})
"""What Pillow recognizes but cannot, or not everywhere, turn into pixels; left alone in folders."""
RAW = ".3fr .arw .cr2 .cr3 .dng .nef .nrw .orf .pef .raf .raw .rw2 .srw"
LEFT_OUT = {
    "": "file without an extension",
    **dict.fromkeys((".heic", ".heif", ".hif"), "run: pip install pillow-heif"),
    ".jxl": "run: pip install pillow-jxl-plugin",
    **dict.fromkeys(RAW.split(), "raw photo"),
}
"""Suffix -> why such files are left out of folders of images, unless Pillow has learned to open them."""
OTHER_OUTPUTS = frozenset({".npy", ".html", ".safetensors", ".pdf", ".svg"})


def image_suffixes() -> frozenset[str]:
    """Lower-case suffixes of the pictures that Pillow opens."""
    from PIL import Image

    suffixes = Image.registered_extensions()  # loads all plugins, without which Image.OPEN is empty
    openable = (Image.OPEN.keys() - NO_PICTURES) | {"MPO"}  # which is opened as the JPEG that it begins with
    return frozenset(suffix for suffix, name in suffixes.items() if name in openable)


def images() -> Kinds:
    """What is taken from folders of images."""
    return Kinds(image_suffixes(), LEFT_OUT)


def is_file_name(output: str | None) -> bool:
    """Whether an output can be a file or becomes one, rather than stdout, a folder or a device."""
    if output is None or output == "-" or output.endswith(("/", os.sep)):
        return False
    return os.path.isfile(output) or not os.path.exists(output)


def check_output(inputs: Sequence[str], output: str | None, suffixes: Collection[str], *, is_any_other: bool) -> None:
    """Refuse to write one kind of file under the name of another, and several files under the name of one.

    Args:
        inputs: as the user gave them.
        output: as the user gave it.
        suffixes: of what the command writes.
        is_any_other: refuse all other suffixes, not only those of kinds that are known.
    """
    if output is None or not is_file_name(output):
        return
    suffix = Path(output).suffix.lower()
    if not suffix:
        return
    is_known = suffix in suffixes or suffix in image_suffixes() | PQM | LEFT_OUT.keys() | OTHER_OUTPUTS
    if len(inputs) != 1 or os.path.isdir(inputs[0]):
        if is_known:
            folder = f"{output}{os.sep}"
            raise typer.BadParameter(f"{output} is the name of one file; for several, name a folder: {folder}")
    elif suffix not in suffixes and (is_known or is_any_other):
        raise typer.BadParameter(f"{output}: this command writes {', '.join(suffixes)} files")
