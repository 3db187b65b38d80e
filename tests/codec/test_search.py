"""The search for a latent: better tokens, the same every time, an end when time is over."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pictures import synthetic_photo
from PIL import Image

from pqmim import search as search_module
from pqmim.decoder_files import find_decoder, load_decoder
from pqmim.distortion import SquaredError, StructuralDissimilarity
from pqmim.model_files import MODEL_FILE, find_model, load_model
from pqmim.networks import Networks
from pqmim.quantizer import Latent
from pqmim.search import search
from pqmim.transforms import TILE_POSITIONS

LEVEL = 2
PHOTO = Path(__file__).parents[2] / "examples" / "photo.png"


@pytest.fixture(scope="module")
def networks(tiny_model: Path) -> Networks:
    return Networks(
        load_model(tiny_model / MODEL_FILE),
        load_decoder(tiny_model / "fine.safetensors"),
        "cpu",
        kernel=None,
        threads=1,
    )


def cost(networks: Networks, z: Latent, pixels: np.ndarray, w: np.ndarray, level: int = LEVEL) -> float:
    """What the search makes small: squared error of the decoded picture and bits, in squared latent units."""
    quantizer = networks.quantizer
    tokens = quantizer.assign(quantizer.channels(z), w, level)
    bits = quantizer.prior_bits[quantizer.alphabets.starts[level, :, None] + tokens]
    z_q = quantizer.dequantize(tokens.reshape(-1, *z.shape[2:]), level)
    error, _ = networks.transforms.differentiate(z_q, SquaredError(pixels))
    return error / networks.transforms.energy + float((bits * w).sum())


def found(
    networks: Networks, pixels: np.ndarray, steps: int, w: float = 4.0, level: int = LEVEL, **options: object
) -> Latent:
    z = networks.transforms.analyze(pixels)
    trade_off = np.full(z[0, 0].size, w, np.float32)
    return search(networks, pixels, z, trade_off, level, SquaredError, num_steps=steps, **options)


def test_more_steps_cost_less() -> None:
    # With a real model: the codewords of the tiny one are too few to choose among.
    path = find_model("photo")
    decoder = load_decoder(find_decoder("fast", path))
    networks = Networks(load_model(path), decoder, "cpu", kernel=None, threads=1)
    with Image.open(PHOTO) as photo:
        pixels = np.asarray(photo.convert("RGB"))[128:288, 256:416]
    w, level = np.full(100, 3.5, np.float32), networks.quantizer.levels.level(3.5)
    latents = [networks.transforms.analyze(pixels)]
    latents += [found(networks, pixels, steps, 3.5, level) for steps in (5, 20)]
    costs = [cost(networks, z, pixels, w, level) for z in latents]
    assert costs[0] > costs[1]
    assert costs[2] < 0.98 * costs[0]


def test_the_same_every_time(networks: Networks) -> None:
    pixels = synthetic_photo(64, 48)
    assert np.array_equal(found(networks, pixels, 4), found(networks, pixels, 4))


def test_structure_can_be_searched_for(networks: Networks) -> None:
    pixels = synthetic_photo(192, 192)
    z = networks.transforms.analyze(pixels)
    w = np.full(z[0, 0].size, 4.0, np.float32)
    moved = search(networks, pixels, z, w, LEVEL, StructuralDissimilarity, num_steps=10)
    judge = StructuralDissimilarity(pixels)
    quantizer = networks.quantizer
    values = []
    for latent in (z, moved):
        tokens = quantizer.assign(quantizer.channels(latent), w, LEVEL).reshape(-1, 12, 12)
        values.append(networks.transforms.differentiate(quantizer.dequantize(tokens, LEVEL), judge)[0])
    assert values[1] < values[0]


def test_an_end_when_time_is_over(networks: Networks) -> None:
    pixels = synthetic_photo(64, 48)
    begin = time.monotonic()
    late = found(networks, pixels, 1_000_000, deadline=begin + 0.5)
    assert np.isfinite(late).all()
    assert not np.array_equal(late, networks.transforms.analyze(pixels))
    at_once = found(networks, pixels, 10, deadline=begin)
    assert np.array_equal(at_once, networks.transforms.analyze(pixels))


def test_tiles_are_searched_one_by_one_and_meet(networks: Networks, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, ...]] = []
    original = search_module._TileSearch.run

    def run(self: search_module._TileSearch, num_steps: int, deadline: float, after: Callable[[int], None]) -> Latent:
        assert deadline == math.inf
        sizes.append(self._analyzed.shape[2:])
        return original(self, num_steps, deadline, after)

    monkeypatch.setattr(search_module._TileSearch, "run", run)
    margin = networks.transforms.margin
    pixels = synthetic_photo(32, 16 * (TILE_POSITIONS + 10))
    told: list[tuple[str, int, int]] = []
    z = found(networks, pixels, 2, on_progress=lambda *how_far: told.append(how_far))
    assert told == [("search", done, 4) for done in (1, 2, 3, 4)]
    assert z.shape == (1, 12, 2, TILE_POSITIONS + 10)
    assert sizes == [(2, TILE_POSITIONS + margin), (2, 10 + margin)]
