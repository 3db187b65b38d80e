"""Data sets: folders of images."""

from __future__ import annotations

from pathlib import Path

from pqmim.errors import ConfigError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".ppm", ".jp2"})


def find_images(dataset: Path) -> dict[str, Path]:
    """Find the images of a data set: name relative to the folder -> file, sorted.

    Raises:
        ConfigError: there is none.
    """
    if dataset.is_file():
        return {dataset.name: dataset}
    files = sorted(file for file in dataset.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ConfigError(f"{dataset}: no images there")
    return {file.relative_to(dataset).as_posix(): file for file in files}
