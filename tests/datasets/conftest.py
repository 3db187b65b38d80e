"""Fixtures of the tests of data sets and bulk coding: pictures in folders that name their classes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pictures import synthetic_photo
from PIL import Image

sys.path.append(str(Path(__file__).parent.parent / "codec"))  # whose helpers run the command line


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Folder with three pictures of two classes and one of none, 40 x 24 pixels or more."""
    folder = tmp_path / "photos"
    for number, name in enumerate(("cat/a.png", "cat/b.v2.png", "dog/deep/a.png", "loose.png")):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(synthetic_photo(24 + 8 * number, 40, number)).save(path)
    return folder
