"""Fixtures of the tests that need PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pictures import synthetic_photo
from PIL import Image
from training.tiny_networks import make_tiny_tokenizer

from pqmim.training.checkpoints import save_tokenizer


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a few small photos to train on."""
    folder = tmp_path_factory.mktemp("photos")
    for index in range(10):
        Image.fromarray(synthetic_photo(72 + index, 80, index)).save(folder / f"{index:02}.png")
    return folder


@pytest.fixture(scope="session")
def tokens_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File of the tiny tokenizer."""
    path = tmp_path_factory.mktemp("tokens") / "tokenizer.safetensors"
    save_tokenizer(path, make_tiny_tokenizer(), {})
    return path
