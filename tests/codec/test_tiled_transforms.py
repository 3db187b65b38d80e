"""Transforms of whole pictures: tiles give what the whole gives, and the correction is that of the decoded picture."""

import numpy as np
import pytest
import torch
from conftest import make_tiny_tokenizer, synthetic_photo
from hypothesis import given, settings
from hypothesis import strategies as st

import pqmim.tiled_transforms
from pqmim.config import AutoencoderConfig, QuantizerConfig, TokenizerConfig
from pqmim.tiled_transforms import TiledTransforms, assemble_tiles
from pqmim.training.tokenizer import Tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def transforms() -> TiledTransforms:
    return TiledTransforms(make_tiny_tokenizer().requires_grad_(False), CPU)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 14), st.integers(1, 14), st.integers(1, 6), st.integers(1, 3))
def test_tiles_are_put_together_as_the_whole(height: int, width: int, tile: int, scale: int) -> None:
    whole = torch.arange(2 * height * width * scale**2).view(2, height * scale, width * scale)
    margin = 2
    calls = []

    def transform(top: int, bottom: int, left: int, right: int) -> torch.Tensor:
        assert bottom - top <= tile + 2 * margin
        assert right - left <= tile + 2 * margin
        calls.append((top, left))
        return whole[:, scale * top : scale * bottom, scale * left : scale * right]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pqmim.tiled_transforms, "TILE_POSITIONS", tile)
        assert torch.equal(assemble_tiles(transform, height, width, scale, margin), whole)
    assert len(calls) == -(-height // tile) * -(-width // tile)


@pytest.mark.parametrize("tile", [1, 4])
def test_tiles_leave_no_seams(transforms: TiledTransforms, monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    pixels = synthetic_photo(16 * 12, 16 * 9, 5)
    whole_z = transforms.analyze(pixels)
    z_q = whole_z + torch.randn(whole_z.shape, generator=torch.Generator().manual_seed(0))

    def latent_of(top: int, bottom: int, left: int, right: int) -> torch.Tensor:
        return z_q[:, :, top:bottom, left:right]

    whole_picture = transforms.synthesize(latent_of, 12, 9)
    whole_correction = transforms.correct(z_q, pixels)
    monkeypatch.setattr(pqmim.tiled_transforms, "TILE_POSITIONS", tile)
    assert torch.allclose(transforms.analyze(pixels), whole_z, atol=1e-3)
    assert torch.allclose(transforms.correct(z_q, pixels), whole_correction, atol=1e-3)
    difference = np.abs(transforms.synthesize(latent_of, 12, 9).astype(int) - whole_picture.astype(int))
    assert difference.max() <= 1  # where a float falls on the other side of a half
    assert (difference > 0).mean() < 0.001


def test_analysis_and_synthesis_are_those_of_the_tokenizer(transforms: TiledTransforms) -> None:
    tokenizer = make_tiny_tokenizer().requires_grad_(False)
    pixels = synthetic_photo(32, 48)
    z = transforms.analyze(pixels)
    assert torch.allclose(z, tokenizer.analysis(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255), atol=1e-4)
    picture = transforms.synthesize(lambda t, b, le, r: z[:, :, t:b, le:r], 2, 3)
    assert picture.shape == (32, 48, 3)
    assert picture.dtype == np.uint8
    expected = (tokenizer.synthesis(z).clamp(0, 1) * 255).round()[0].permute(1, 2, 0).numpy()
    assert np.abs(picture - expected).max() <= 1


@pytest.mark.parametrize("latent_unit", [20.0, 7.0])
def test_the_correction_of_an_orthonormal_synthesis_is_the_original_latent(latent_unit: float) -> None:
    autoencoder = AutoencoderConfig(latent_channels=64, channels=(8, 8, 8), blocks=(1, 1, 1), latent_unit=latent_unit)
    config = TokenizerConfig(autoencoder=autoencoder, quantizer=QuantizerConfig(num_subquantizers=2, num_codewords=4))
    torch.manual_seed(0)
    transforms = TiledTransforms(Tokenizer(config).requires_grad_(False), CPU)
    pixels = synthetic_photo(64, 48)
    z = transforms.analyze(pixels)
    z_q = z + 3 * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            corrected = transforms.correct(z_q, pixels)
        assert not corrected.requires_grad
        assert torch.allclose(corrected, z, atol=1e-3)


def test_the_correction_descends(transforms: TiledTransforms) -> None:
    """A step toward it lessens the error of the decoded picture, which the transform of the original need not do."""
    pixels = synthetic_photo(64, 64, 3)
    z = transforms.analyze(pixels)
    z_q = z + 2 * torch.randn(z.shape, generator=torch.Generator().manual_seed(1))

    def error(z: torch.Tensor) -> float:
        picture = transforms.synthesize(lambda t, b, le, r: z[:, :, t:b, le:r], 4, 4)
        return float(np.square(picture.astype(float) - pixels).mean())

    step = transforms.correct(z_q, pixels) - z_q
    assert error(z_q + 0.25 * step) < error(z_q)


def test_the_correction_in_bfloat16_is_about_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    corrected = {}
    for is_fast in (False, True):
        monkeypatch.setattr("pqmim.tiled_transforms.has_fast_bf16", lambda device, is_fast=is_fast: is_fast)
        transforms = TiledTransforms(make_tiny_tokenizer().requires_grad_(False), CPU)
        pixels = synthetic_photo(64, 64, 3)
        z_q = transforms.analyze(pixels).round()
        corrected[is_fast] = transforms.correct(z_q, pixels) - z_q
    assert not torch.equal(corrected[True], corrected[False])
    assert (corrected[True] - corrected[False]).square().mean() < 1e-3 * corrected[False].square().mean()
