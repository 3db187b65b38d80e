"""What a search for `Tune.VIVID` needs: a judge with the right gradient, one clear line where something is missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures import synthetic_photo
from torch import Tensor, nn

import pqmim
from pqmim.codec import load_codec
from pqmim.distortion import SquaredError, planes_of
from pqmim.errors import ConfigError
from pqmim.perceptual import features, tuning
from pqmim.perceptual.features import FeatureError, feature_distance, texture_distance
from pqmim.perceptual.packages import EFFICIENTNET_LITE0, WeightPackage, is_installed

needs_weights = pytest.mark.skipif(not is_installed(EFFICIENTNET_LITE0), reason="the weights are not installed")
VIVID = pqmim.EncodeOptions(effort=2, tune=pqmim.Tune.VIVID)


class Smooth(nn.Module):
    """Stands in for a trained network: features at two depths that are smooth in the pixels."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.kernel = nn.Parameter(torch.randn(8, 3, 3, 3, generator=generator), requires_grad=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        first = torch.tanh(F.conv2d(images, self.kernel.to(images.dtype), padding=1))
        return [first, F.avg_pool2d(first, 2) ** 2]


def test_distance_is_of_directions() -> None:
    some = [torch.rand(2, 5, 3, 4) for _ in range(3)]
    assert float(feature_distance([2 * each for each in some], some).max()) < 1e-6
    torch.testing.assert_close(feature_distance([-each for each in some], some), torch.full((2,), 4.0))


def test_textures_may_lie_elsewhere() -> None:
    """What is shuffled within squares has the same texture; what is weaker or of another kind has not."""
    torch.manual_seed(0)
    offset = torch.randn(2, 6, 1, 1)  # what all of a texture shares
    some = [offset + 0.5 * torch.randn(2, 6, side, side) for side in (64, 32, 16, 8)]
    assert float(texture_distance(some, some).max()) == 0
    elsewhere = [offset + 0.5 * torch.randn(2, 6, side, side) for side in (64, 32, 16, 8)]
    weaker = [offset + 0.5 * (each - offset) for each in some]
    other = [each - 2 * offset for each in some]
    distances = [float(texture_distance(each, some).mean()) for each in (elsewhere, weaker, other)]
    assert 5 * distances[0] < 2 * distances[1] < distances[2]
    assert float(feature_distance(elsewhere, some).mean()) > float(feature_distance(weaker, some).mean())
    last = [*some[:3], some[3] + 1]  # there too few features make a square
    assert float(texture_distance(last, some).max()) == 0


def test_an_equal_picture_has_no_error() -> None:
    pixels = synthetic_photo(16, 24)
    value, gradient = FeatureError(Smooth(), pixels)(planes_of(pixels))
    assert value == pytest.approx(0, abs=1e-9)
    assert np.abs(gradient).max() == pytest.approx(0, abs=1e-6)


def test_gradient_is_that_of_the_value() -> None:
    pixels = synthetic_photo(16, 24)
    rng = np.random.default_rng(0)
    picture = (planes_of(pixels) * 0.8 + 0.1 + rng.normal(0, 0.03, (1, 3, 16, 24))).astype(np.float32)
    error = FeatureError(Smooth(), pixels)
    _, gradient = error(picture)
    for _ in range(3):
        direction = rng.normal(size=picture.shape).astype(np.float32)
        ahead, behind = (error(picture + np.float32(step) * direction)[0] for step in (1e-2, -1e-2))
        assert (ahead - behind) / 2e-2 == pytest.approx(float((gradient * direction).sum()), rel=0.02, abs=0.02)


def test_the_first_picture_sets_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a share of the squared error the gradient is as long as that of the squared error."""
    monkeypatch.setattr(features, "SQUARED_ERROR_SHARE", 0.0)
    pixels = synthetic_photo(16, 24)
    picture = planes_of(pixels) * np.float32(0.7) + np.float32(0.1)
    error = FeatureError(Smooth(), pixels)
    lengths = [np.linalg.norm(judge(picture)[1]) for judge in (error, SquaredError(pixels))]
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-4)
    nearer = planes_of(pixels) * np.float32(0.97) + np.float32(0.01)
    assert error(nearer)[0] < 0.5 * error(picture)[0]


@needs_weights
def test_encoding_for_vivid(tiny_model: Path) -> None:
    photo = synthetic_photo(64, 96)
    data = pqmim.encode(photo, options=VIVID, model=tiny_model, quality=90)
    codec = load_codec(tiny_model, "vivid")
    assert data == codec.encode(photo, options=VIVID, quality=90, judge=tuning.vivid_judge())
    assert data != codec.encode(photo, options=pqmim.EncodeOptions(effort=2), quality=90)
    assert np.asarray(pqmim.decode(data, model=tiny_model)).shape == photo.shape


def test_all_that_is_missing_is_named(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("model", "fine"):
        (tmp_path / f"{name}.safetensors").write_bytes((tiny_model / f"{name}.safetensors").read_bytes())
    monkeypatch.setattr(tuning, "EFFICIENTNET_LITE0", WeightPackage("not-there==1.0", "not_there"))
    begin = "^tune vivid needs the decoder vivid and the packages of pqmim.perceptual.: "
    package = "the package not-there is not installed; run: pip install [^\n]+"
    with pytest.raises(ConfigError, match=f"{begin}the decoder vivid: no such decoder .*; {package}$"):
        tuning.require_vivid(tmp_path)
    with pytest.raises(ConfigError, match=f"{begin}{package}$"):
        pqmim.encode(synthetic_photo(16, 16), options=VIVID, model=tiny_model)
    monkeypatch.undo()
    if is_installed(EFFICIENTNET_LITE0):
        tuning.require_vivid(tiny_model)
        tuning.require_vivid(tmp_path, "fine")
        with pytest.raises(ConfigError, match=f"{begin}the decoder vivid: no such decoder [^;]*; or a path"):
            tuning.require_vivid(tmp_path)
