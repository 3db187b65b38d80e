"""Kinds of files by their suffix: what commands take from folders, and what they do not write."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path

import typer

from pqmim.jobs import Kinds

PQM = frozenset({".pqm"})
NO_PICTURES = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"})
"""What Pillow recognizes but cannot, or not everywhere, turn into pixels; left alone in folders."""
RAW = ".3fr .arw .cr2 .cr3 .dng .nef .nrw .orf .pef .raf .raw .rw2 .srw"
OPTIONAL = (
    (".heic .heif .hif", "pillow_heif", "run: pip install 'pqmim[heif]'"),
    (".jxl", "pillow_jxl", "run: pip install pillow-jxl-plugin"),
    (RAW, "rawpy", "raw photo; run: pip install 'pqmim[raw]'"),
)
"""(suffixes, package that reads them, why such files are left out of folders of images without it)."""
OPTIONAL_SUFFIXES = frozenset(suffix for suffixes, _, _ in OPTIONAL for suffix in suffixes.split())
OTHER_OUTPUTS = frozenset({".npy", ".html", ".safetensors", ".pdf", ".svg"})


def image_suffixes() -> frozenset[str]:
    """Lower-case suffixes of all that can be encoded here."""
    from PIL import Image

    suffixes = Image.registered_extensions()  # loads all plugins, without which Image.OPEN is empty
    openable = (Image.OPEN.keys() - NO_PICTURES) | {"MPO"}  # which is opened as the JPEG that it begins with
    optional = (names.split() for names, package, _ in OPTIONAL if find_spec(package) is not None)
    # Whether another part of the process has registered a plugin does not matter.
    always = {suffix for suffix, name in suffixes.items() if name in openable} - OPTIONAL_SUFFIXES
    return frozenset(always).union(*optional)


def images() -> Kinds:
    """What is taken from folders of images."""
    left_out = {suffix: why for suffixes, _, why in OPTIONAL for suffix in suffixes.split()}
    return Kinds(image_suffixes(), {"": "file without an extension", **left_out})


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
    is_known = suffix in suffixes or suffix in image_suffixes() | PQM | OPTIONAL_SUFFIXES | OTHER_OUTPUTS
    if len(inputs) != 1 or os.path.isdir(inputs[0]):
        if is_known:
            folder = f"{output}{os.sep}"
            raise typer.BadParameter(f"{output} is the name of one file; for several, name a folder: {folder}")
    elif suffix not in suffixes and (is_known or is_any_other):
        raise typer.BadParameter(f"{output}: this command writes {', '.join(suffixes)} files")
