"""Fixtures shared by all tests. Nothing here needs PyTorch."""

from __future__ import annotations

from pathlib import Path

import pytest
from pictures import synthetic_photo
from PIL import Image


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """Folder with a tiny `model.safetensors`, made by tests/make_tiny_model.py; not to be written to."""
    return Path(__file__).parent / "data" / "tiny"


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """A small synthetic photo, 70 x 45 pixels."""
    return Image.fromarray(synthetic_photo(45, 70))
