"""Transforms: a DCT to start from, a receptive field within the margin, any size."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pqmim.config import STRIDE, AutoencoderConfig
from pqmim.training.autoencoder import Analysis, Synthesis, block_dct_basis, grow

CONFIGS = [
    AutoencoderConfig(latent_channels=12, channels=(8, 8, 16), blocks=(1, 0, 1)),
    AutoencoderConfig(latent_channels=12, channels=(8, 8, 8), blocks=(0, 0, 0)),
    AutoencoderConfig(latent_channels=12, channels=(8, 8, 8), blocks=(1, 1, 2)),
    AutoencoderConfig(latent_channels=12, channels=(8, 8, 8), blocks=(3, 1, 0)),
    AutoencoderConfig(latent_channels=12, channels=(8, 8, 8), blocks=(0, 3, 1)),
    AutoencoderConfig(
        latent_channels=12,
        channels=(8, 8, 8),
        blocks=(1, 1, 1),
        synthesis_channels=(8, 12, 8),
        synthesis_blocks=(1, 3, 2),
    ),
]


def randomize(module: nn.Module) -> nn.Module:
    """Give every weight a part in the result, in float64 so that nothing drowns in rounding."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.double()


def influence(transform: nn.Module, x: Tensor, row: int, column: int, cells: tuple[int, int]) -> Tensor:
    """Output positions that depend on the input at one position: (h, w) bool."""
    changed = x.clone()
    height, width = cells
    changed[..., row * height : (row + 1) * height, column * width : (column + 1) * width] += 1
    difference = (transform(changed) - transform(x)).abs().amax((0, 1))
    if difference.shape[0] > x.shape[2]:  # of an image: by position
        difference = difference.unfold(0, STRIDE, STRIDE).unfold(1, STRIDE, STRIDE).amax((2, 3))
    return difference > 0


def test_basis_is_orthonormal_and_starts_with_the_mean() -> None:
    basis = block_dct_basis(768).double()
    assert torch.allclose(basis @ basis.t(), torch.eye(768, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(basis[0], torch.full((768,), 768**-0.5, dtype=torch.float64))
    assert torch.equal(block_dct_basis(40), block_dct_basis(768)[:40])


def test_untrained_transforms_with_all_channels_are_the_identity() -> None:
    torch.manual_seed(0)
    config = AutoencoderConfig(latent_channels=768, channels=(8, 8, 8), blocks=(1, 1, 1))
    x = torch.rand(2, 3, 32, 48)
    z = Analysis(config.analysis)(x)
    assert z.shape == (2, 768, 2, 3)
    assert torch.allclose(Synthesis(config.synthesis)(z), x, atol=1e-5)
    # One unit of the latent is `latent_unit` grey levels of an orthonormal function.
    energy = ((x - 0.5) * 255 / config.latent_unit).square().sum()
    assert torch.isclose(z.square().sum(), energy, rtol=1e-4)


def test_untrained_transforms_with_few_channels_keep_what_is_smooth() -> None:
    config = AutoencoderConfig(latent_channels=64, channels=(8, 8, 8), blocks=(1, 1, 1))
    y, x = torch.meshgrid(torch.arange(48) / 48, torch.arange(64) / 64, indexing="ij")
    image = torch.stack([0.5 + 0.3 * torch.sin(3 * x), 0.2 + 0.5 * y, 0.5 + 0.2 * x * y])[None]
    error = (Synthesis(config.synthesis)(Analysis(config.analysis)(image)) - image).square().mean()
    assert error < (2 / 255) ** 2


@pytest.mark.parametrize("config", CONFIGS)
def test_receptive_field_is_within_the_margin(config: AutoencoderConfig) -> None:
    analysis, synthesis = randomize(Analysis(config.analysis)), randomize(Synthesis(config.synthesis))
    margin = max(config.analysis.margin, config.synthesis.margin)
    side = 2 * margin + 3
    middle = margin + 1
    near = torch.zeros(side, side, dtype=torch.bool)
    near[1:-1, 1:-1] = True  # positions at most `margin` from the middle
    x = torch.rand(1, 3, STRIDE * side, STRIDE * side, dtype=torch.float64)
    z = torch.randn(1, config.latent_channels, side, side, dtype=torch.float64)
    with torch.no_grad():
        for seen in (
            influence(analysis, x, middle, middle, (STRIDE, STRIDE)),
            influence(synthesis, z, middle, middle, (1, 1)),
        ):
            assert seen[middle, middle]
            assert not (seen & ~near).any()
    assert margin <= 1 + 2 * sum(config.synthesis_blocks or config.blocks) + 1  # and not wastefully wide


@pytest.mark.parametrize("config", CONFIGS[:3])
def test_a_part_with_margin_is_the_whole(config: AutoencoderConfig) -> None:
    margin = max(config.analysis.margin, config.synthesis.margin)
    analysis, synthesis = randomize(Analysis(config.analysis)), randomize(Synthesis(config.synthesis))
    rows, columns = 2 * margin + 2, 2 * margin + 5
    x = torch.rand(1, 3, STRIDE * rows, STRIDE * columns, dtype=torch.float64)
    with torch.no_grad():
        whole = analysis(x)
        part = analysis(x[..., : STRIDE * (margin + 2)])
        assert torch.allclose(part[..., :2], whole[..., :2], rtol=1e-12, atol=1e-9)
        picture = synthesis(whole)
        part = synthesis(whole[:, :, 2:, :])[:, :, STRIDE * margin :]
        assert torch.allclose(part, picture[:, :, STRIDE * (2 + margin) :], rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 7), (5, 2)])
def test_any_size(rows: int, columns: int) -> None:
    config = CONFIGS[0]
    x = torch.rand(1, 3, STRIDE * rows, STRIDE * columns)
    with torch.no_grad():
        z = Analysis(config.analysis)(x)
        assert z.shape == (1, 12, rows, columns)
        assert Synthesis(config.synthesis)(z).shape == x.shape


def test_autocast_leaves_the_linear_path_in_full_precision() -> None:
    config = AutoencoderConfig(latent_channels=64, channels=(8, 8, 8), blocks=(0, 0, 0))
    x = torch.rand(1, 3, 16, 16)
    analysis, synthesis = Analysis(config.analysis), Synthesis(config.synthesis)
    with torch.no_grad():
        z = analysis(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(analysis(x), z)
            assert synthesis(z).dtype == torch.float32


def test_a_larger_latent_begins_with_the_next_functions_of_the_block_transform() -> None:
    torch.manual_seed(0)
    small = AutoencoderConfig(latent_channels=12, channels=(8, 8, 8), blocks=(1, 0, 1))
    large = replace(small, latent_channels=20, channels=(8, 12, 8), blocks=(1, 1, 1))
    x, added = torch.rand(1, 3, 48, 64), block_dct_basis(20)[12:]
    with torch.no_grad():
        earlier, analysis = Analysis(small), Analysis(large)
        for parameter in earlier.parameters():
            parameter.normal_(std=0.1)
        grow(analysis, earlier)
        z = analysis(x)
        assert torch.allclose(z[:, :12], earlier(x), atol=1e-4)
        blocks = F.pixel_unshuffle(x - 0.5, STRIDE)
        expected = torch.einsum("dc,bchw->bdhw", added * (255 / small.latent_unit), blocks)
        assert torch.allclose(z[:, 12:], expected, atol=1e-3)

        before, synthesis = Synthesis(small), Synthesis(large)
        for parameter in before.parameters():
            parameter.normal_(std=0.1)
        grow(synthesis, before)
        without = before(z[:, :12])
        assert torch.allclose(synthesis(torch.cat([z[:, :12], torch.zeros_like(z[:, 12:])], 1)), without, atol=1e-4)
        more = torch.einsum("dc,bdhw->bchw", added * (small.latent_unit / 255), z[:, 12:])
        assert torch.allclose(synthesis(z) - without, F.pixel_shuffle(more, STRIDE), atol=1e-3)
        with pytest.raises(ValueError, match="fewer latent channels"):
            grow(Analysis(small), analysis)
        with pytest.raises(ValueError, match="fewer latent channels"):
            grow(Synthesis(small), synthesis)
