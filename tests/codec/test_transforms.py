"""Transforms of whole pictures: tiles give what the whole gives, and the correction is that of the decoded picture."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pictures import synthetic_photo

import pqmim.transforms
from pqmim.decoder_files import DecoderFile, load_decoder
from pqmim.errors import ModelError
from pqmim.file_decoder import tiles_of
from pqmim.model_files import MODEL_FILE, ModelFile, load_model
from pqmim.quantizer import Latent
from pqmim.transforms import Transforms, assemble_tiles, sums_of_neighbors


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> ModelFile:
    return load_model(tiny_model / MODEL_FILE)


@pytest.fixture(scope="module")
def decoder(tiny_model: Path) -> DecoderFile:
    return load_decoder(tiny_model / "fine.safetensors")


@pytest.fixture(scope="module")
def transforms(model: ModelFile, decoder: DecoderFile) -> Transforms:
    return Transforms(model, decoder, threads=1)


def noise(like: Latent, seed: int = 0) -> Latent:
    return np.random.default_rng(seed).normal(size=like.shape).astype(np.float32)


# -- tiles ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 14), st.integers(1, 14), st.integers(1, 6), st.integers(1, 3))
def test_tiles_are_put_together_as_the_whole(height: int, width: int, tile: int, scale: int) -> None:
    whole = np.arange(2 * height * width * scale**2).reshape(height * scale, width * scale, 2)
    margin = 2
    calls = []

    def transform(top: int, bottom: int, left: int, right: int) -> NDArray[np.int64]:
        assert bottom - top <= tile + 2 * margin
        assert right - left <= tile + 2 * margin
        calls.append((top, left))
        return whole[scale * top : scale * bottom, scale * left : scale * right]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pqmim.transforms, "TILE_POSITIONS", tile)
        assembled = assemble_tiles(transform, height, width, scale, margin)
    assert np.array_equal(assembled, whole)
    assert assembled.dtype == whole.dtype
    assert len(calls) == -(-height // tile) * -(-width // tile)


@pytest.mark.parametrize("tile", [1, 4])
def test_tiles_leave_no_seams(transforms: Transforms, monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    pixels = synthetic_photo(16 * 12, 16 * 9, 5)
    whole_z = transforms.analyze(pixels)
    z_q = whole_z + noise(whole_z)
    whole_picture = transforms.synthesize(tiles_of(z_q), 12, 9)
    whole_correction = transforms.correct(z_q, pixels)
    monkeypatch.setattr(pqmim.transforms, "TILE_POSITIONS", tile)
    assert np.allclose(transforms.analyze(pixels), whole_z, atol=1e-3)
    assert np.allclose(transforms.correct(z_q, pixels), whole_correction, atol=1e-3)
    difference = np.abs(transforms.synthesize(tiles_of(z_q), 12, 9).astype(int) - whole_picture.astype(int))
    assert difference.max() <= 1  # where a float falls on the other side of a half
    assert (difference > 0).mean() < 0.001


def test_margins_are_as_wide_as_the_networks_see(transforms: Transforms, model: ModelFile) -> None:
    """What lies beyond the margin has no influence: not one bit of the result changes."""
    margin = max(model.config.tokenizer.analysis.margin, transforms.margin)
    size = 2 * margin + 3
    pixels = synthetic_photo(16 * size, 16 * size)
    z = transforms.analyze(pixels)
    inside = slice(margin, size - margin)
    around = pixels.copy()
    around[0], around[-1] = 255, 0
    around[:, 0], around[:, -1] = 0, 255
    assert np.allclose(transforms.analyze(around)[:, :, inside, inside], z[:, :, inside, inside], atol=1e-5)
    other = z.copy()
    other[:, :, [0, -1]] += 50
    other[:, :, :, [0, -1]] += 50
    rows = slice(16 * inside.start, 16 * inside.stop)
    pictures = [transforms.synthesize(tiles_of(latent), size, size)[rows, rows].astype(int) for latent in (z, other)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


@pytest.mark.parametrize("threads", [2, 4])
def test_threads_change_no_more_than_a_rounding(
    model: ModelFile, decoder: DecoderFile, transforms: Transforms, threads: int
) -> None:
    several = Transforms(model, decoder, threads=threads)
    pixels = synthetic_photo(64, 96)
    z = transforms.analyze(pixels)
    assert np.allclose(several.analyze(pixels), z, atol=1e-4)
    assert np.allclose(several.correct(z, pixels), transforms.correct(z, pixels), atol=1e-3)
    pictures = [made.synthesize(tiles_of(z), 4, 6).astype(int) for made in (several, transforms)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


# -- what they compute ----------------------------------------------------------------------------------------------


def test_shapes_and_types(transforms: Transforms) -> None:
    pixels = synthetic_photo(32, 48)
    z = transforms.analyze(pixels)
    assert z.shape == (1, 12, 2, 3)
    assert z.dtype == np.float32
    assert z.flags.c_contiguous
    picture = transforms.synthesize(tiles_of(z), 2, 3)
    assert picture.shape == (32, 48, 3)
    assert picture.dtype == np.uint8
    assert transforms.correct(z, pixels).shape == z.shape


def test_a_synthesis_of_the_analysis_is_about_the_picture(transforms: Transforms) -> None:
    pixels = synthetic_photo(64, 64)
    picture = transforms.synthesize(tiles_of(transforms.analyze(pixels)), 4, 4)
    error = np.square(picture.astype(float) - pixels).mean()
    assert error < 0.3 * pixels.astype(float).var()  # a tiny model that never was trained


def test_samples_are_clipped(transforms: Transforms) -> None:
    z = np.zeros((1, 12, 2, 2), np.float32)
    for brightness, sample in ((1e4, 255), (-1e4, 0)):
        z[:, 0] = brightness  # the mean of a block
        assert (transforms.synthesize(tiles_of(z), 2, 2) == sample).all()


@pytest.mark.parametrize("latent_unit", [20.0, 7.0])
def test_the_correction_of_an_orthonormal_synthesis_is_the_original_latent(
    model: ModelFile, decoder: DecoderFile, latent_unit: float
) -> None:
    """A synthesis that is a matrix of orthonormal columns stands in for the network."""
    config = replace(decoder.config, latent_unit=latent_unit)
    transforms = Transforms(model, replace(decoder, config=config), threads=1)
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(768, 768)))
    basis *= latent_unit / 255  # a unit of the latent in samples from 0 to 1

    def synthesize(z: Latent) -> NDArray[np.float32]:
        blocks = np.einsum("pd,bdyx->bpyx", basis, z).reshape(3, 16, 16, *z.shape[2:])
        return blocks.transpose(0, 3, 1, 4, 2).reshape(1, 3, 16 * z.shape[2], 16 * z.shape[3]).astype(np.float32)

    def backward(gradient: NDArray[np.float32]) -> Latent:
        _, _, height, width = gradient.shape
        blocks = gradient.reshape(3, height // 16, 16, width // 16, 16).transpose(0, 2, 4, 1, 3)
        return np.einsum("pd,pyx->dyx", basis, blocks.reshape(768, height // 16, width // 16))[None].astype(np.float32)

    def run_backward(gradient: NDArray[np.float32], kept: NDArray[np.float32]) -> list[Latent]:
        assert kept.shape == gradient.shape
        return [backward(gradient)]

    def run_forward(z: Latent) -> list[NDArray[np.float32]]:
        picture = synthesize(z)
        return [picture, picture.copy()]

    transforms.__dict__["_forward"] = SimpleNamespace(run=run_forward, outputs=("picture", "kept"))
    transforms.__dict__["_vjp"] = SimpleNamespace(run=run_backward)
    pixels = synthetic_photo(64, 48)
    scale = (latent_unit / 255) ** 2
    z = backward(pixels.transpose(2, 0, 1)[None].astype(np.float32) / 255) / np.float32(scale)
    assert np.allclose(synthesize(z)[0].transpose(1, 2, 0) * 255, pixels, atol=1e-3)
    z_q = z + 3 * noise(z)
    assert np.allclose(transforms.correct(z_q, pixels), z, atol=1e-3)


def test_the_correction_descends(transforms: Transforms) -> None:
    """A step toward it lessens the error of the decoded picture, which the transform of the original need not do."""
    pixels = synthetic_photo(64, 64, 3)
    z = transforms.analyze(pixels)
    z_q = z + 2 * noise(z, 1)

    def error(z: Latent) -> float:
        return float(np.square(transforms.synthesize(tiles_of(z), 4, 4).astype(float) - pixels).mean())

    step = transforms.correct(z_q, pixels) - z_q
    assert error(z_q + np.float32(0.25) * step) < error(z_q)


def test_the_correction_is_the_gradient_of_the_error(transforms: Transforms, decoder: DecoderFile) -> None:
    """Against differences of the squared error in random directions."""
    pixels = synthetic_photo(32, 48, 2)
    z = transforms.analyze(pixels) + 1
    unit = decoder.config.latent_unit
    gradient = (z - transforms.correct(z, pixels)).astype(np.float64) * 2 * (unit / 255) ** 2

    def error(z: Latent) -> float:
        picture = transforms._forward.run(z=z)[0][0].transpose(1, 2, 0).astype(np.float64)
        return float(np.square(picture - pixels / 255).sum())

    for seed in range(4):
        direction = noise(z, seed)
        step = np.float32(1e-2)
        difference = (error(z + step * direction) - error(z - step * direction)) / (2 * float(step))
        assert difference == pytest.approx(float((gradient * direction).sum()), rel=0.02)


# -- graphs that are not there --------------------------------------------------------------------------------------


def test_a_correction_promises_no_more_than_there_is_to_undo(
    transforms: Transforms, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = synthetic_photo(64, 96)
    z_q = transforms.analyze(pixels)
    z_q = z_q + noise(z_q)
    monkeypatch.setattr(pqmim.transforms, "MOST_UNDONE", 1e9)
    whole = transforms.correct(z_q, pixels) - z_q
    picture, _ = transforms._forward.run(z=z_q)[:2]
    difference = np.square(picture[0] - pixels.transpose(2, 0, 1) / 255).sum(0)
    errors = sums_of_neighbors(difference.reshape(4, 16, 6, 16).sum((1, 3)).astype(np.float32))
    assert errors[1, 1] == pytest.approx(difference[:48, :48].sum(), rel=1e-4)
    promised = sums_of_neighbors(np.float32(transforms.energy) * np.square(whole[0]).sum(0))
    most = float(np.median(promised / errors))  # so that it matters at half of the positions
    monkeypatch.setattr(pqmim.transforms, "MOST_UNDONE", most)
    limited = transforms.correct(z_q, pixels) - z_q
    factors = np.minimum(1, most * errors / promised)
    assert 0.3 < (factors == 1).mean() < 0.7
    assert np.allclose(limited[0], whole[0] * factors, atol=1e-3 * np.abs(whole).max())


def test_graphs_are_made_ready_when_they_are_needed(model: ModelFile, decoder: DecoderFile) -> None:
    """A decoder can do without the graphs of an encoder."""
    graphs = {"synthesis": decoder.graphs["synthesis"]}
    transforms = Transforms(replace(model, graphs={}), replace(decoder, graphs=graphs), threads=1)
    assert transforms.synthesize(tiles_of(np.zeros((1, 12, 2, 3), np.float32)), 2, 3).shape == (32, 48, 3)
    for missing in (
        lambda: transforms.analyze(synthetic_photo(16, 16)),
        lambda: transforms.correct(np.zeros((1, 12, 1, 1), np.float32), synthetic_photo(16, 16)),
    ):
        with pytest.raises(ModelError, match="lacks the graph"):
            missing()
