"""The example that trains on tokens: what each form of a picture is, and that simple classes are learned."""

from __future__ import annotations

import importlib
import io
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from pqmim.codec import load_codec  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="not part of the source distribution")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("classify_tokens")


def test_patches_hold_the_pixels_of_their_positions(example: ModuleType) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    patches = example.as_patches(Image.fromarray(pixels))
    assert patches.shape == (768, 2, 3)
    expected = pixels[16:32, 32:48].astype(np.float32) / 127.5 - 1
    assert np.array_equal(patches[:, 1, 2].reshape(16, 16, 3), expected)


def test_the_jpeg_is_the_largest_that_fits(example: ModuleType) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    image = Image.fromarray(pixels)
    sizes = []
    for quality in example.JPEG_QUALITIES:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality, optimize=True)
        sizes.append(len(file.getvalue()))
    limit = sizes[40]
    assert len(example.jpeg_of_size(image, limit)) == max(size for size in sizes if size <= limit)
    assert len(example.jpeg_of_size(image, 1)) == sizes[0]


def test_classes_that_differ_in_their_brightness_are_told_apart(
    example: ModuleType, tiny_model: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    for name, level in (("dark", 50), ("bright", 200)):
        (tmp_path / name).mkdir()
        for number in range(10):
            pixels = np.clip(rng.normal(level, 20, (40, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    codec = load_codec(tiny_model, device="cpu")
    outcomes = example.compare(tmp_path, codec, side=32, quality=50, epochs=15)
    assert list(outcomes) == ["tokens", "pixels", "jpeg"]
    assert outcomes["jpeg"].accuracy == 1.0
    assert outcomes["tokens"].num_bytes == outcomes["pixels"].num_bytes
    assert all(0 <= outcome.accuracy <= 1 and outcome.seconds > 0 for outcome in outcomes.values())


def test_one_class_is_not_enough(example: ModuleType, tiny_model: Path, photos: Path) -> None:
    with pytest.raises(SystemExit, match="needs folders of at least two classes"):
        example.compare(photos, load_codec(tiny_model), side=32, quality=50, epochs=1)
