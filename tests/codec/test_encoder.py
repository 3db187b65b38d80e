"""The encoder: effort, regions, tuning and the share that is sent do what they say."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import make_tiny_entropy_model, make_tiny_tokenizer, synthetic_photo
from hypothesis import given, settings
from hypothesis import strategies as st

from pqmim.config import NUM_LEVELS
from pqmim.encoder import (
    CORRECTIONS,
    LEVEL_REACH,
    MAX_ACTIVITY_FACTOR,
    MAX_EFFORT,
    EncodedTokens,
    PictureEncoder,
    Region,
    TokenChoiceOptions,
    Tune,
    activity_factors,
)
from pqmim.exact_inference import ExactEntropyModel, export
from pqmim.range_coding import PrefixReader, TokenReader
from pqmim.tiled_transforms import TiledTransforms
from pqmim.token_coding import code_tokens
from pqmim.training.tokenizer import Tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tiny_tokenizer().requires_grad_(False)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> ExactEntropyModel:
    trainable = make_tiny_entropy_model(tokenizer)
    return ExactEntropyModel(trainable.config, export(trainable), trainable.runs, device=CPU, kernel="float32")


def encoder_of(tokenizer: Tokenizer, model: ExactEntropyModel, rgb: np.ndarray, **options: object) -> PictureEncoder:
    transforms = TiledTransforms(tokenizer, CPU)
    return PictureEncoder(transforms, tokenizer.quantizer, model, rgb, TokenChoiceOptions(**options))


def picture_of(tokenizer: Tokenizer, encoded: EncodedTokens) -> np.ndarray:
    z = tokenizer.quantizer.dequantize(encoded.tokens[None], torch.tensor([encoded.level]))
    transforms = TiledTransforms(tokenizer, CPU)
    return transforms.synthesize(lambda t, b, le, r: z[:, :, t:b, le:r], *z.shape[2:])


def squared_error(tokenizer: Tokenizer, encoded: EncodedTokens, rgb: np.ndarray) -> np.ndarray:
    """(H, W) mean over the colors."""
    picture = picture_of(tokenizer, encoded)[: rgb.shape[0], : rgb.shape[1]]
    return np.square(picture.astype(float) - rgb).mean(2)


# -- what is sent ----------------------------------------------------------------------------------------------------


def test_the_payload_holds_the_tokens(tokenizer: Tokenizer, model: ExactEntropyModel) -> None:
    for effort in range(1, MAX_EFFORT + 1):
        encoded = encoder_of(tokenizer, model, synthetic_photo(50, 70), effort=effort).encode(3.0)
        assert not encoded.is_partial
        reader = TokenReader(encoded.payload)
        assert torch.equal(code_tokens(model, reader, 4, 5, encoded.level).tokens, encoded.tokens)
        reader.finish()


@settings(deadline=None, max_examples=8)
@given(st.floats(1e-6, 1), st.integers(1, 40), st.integers(1, 60))
def test_keep_sends_that_share_of_the_tokens(
    tokenizer: Tokenizer, model: ExactEntropyModel, keep: float, height: int, width: int
) -> None:
    rgb = synthetic_photo(height, width)
    encoded = encoder_of(tokenizer, model, rgb, keep=keep, effort=1).encode(3.0)
    whole = encoder_of(tokenizer, model, rgb, effort=1).encode(3.0)
    assert encoded.is_partial == (keep < 1)
    assert torch.equal(encoded.tokens, whole.tokens)
    digits = whole.payload if keep == 1 else whole.payload.ljust(len(encoded.payload), b"\0")
    assert digits.startswith(encoded.payload)  # as if the whole file had been cut
    found = code_tokens(model, PrefixReader(encoded.payload), *whole.tokens.shape[1:], encoded.level)
    num_kept = math.ceil(keep * whole.tokens.numel())
    if keep < 1:
        assert num_kept <= int(found.known.sum())
        shorter = code_tokens(model, PrefixReader(encoded.payload[:-1]), *whole.tokens.shape[1:], encoded.level)
        assert int(shorter.known.sum()) < num_kept  # not a byte more than it takes
    assert torch.equal(found.tokens[found.known], whole.tokens[found.known])


def test_keep_after_corrections(tokenizer: Tokenizer, model: ExactEntropyModel) -> None:
    encoder = encoder_of(tokenizer, model, synthetic_photo(64, 64), effort=3, keep=0.5)
    whole = encoder_of(tokenizer, model, synthetic_photo(64, 64), effort=3)
    for w in (3.0, 5.0):
        encoded = encoder.encode(w)
        assert torch.equal(whole.encode(w).tokens, encoded.tokens)
        found = code_tokens(model, PrefixReader(encoded.payload), 4, 4, encoded.level)
        assert 0.5 <= found.known_share < 0.7


# -- effort ----------------------------------------------------------------------------------------------------------


def test_effort_lowers_what_it_is_for(tokenizer: Tokenizer, model: ExactEntropyModel) -> None:
    """Squared error of the picture plus price of the bits, over a few pictures, falls with the corrections."""
    w = 1.5
    unit = tokenizer.config.autoencoder.latent_unit
    costs = []
    for effort in range(1, MAX_EFFORT + 1):
        cost = 0.0
        for seed in range(3):
            rgb = synthetic_photo(96, 96, seed)
            encoded = encoder_of(tokenizer, model, rgb, effort=effort).encode(w)
            distortion = 3 * squared_error(tokenizer, encoded, rgb).sum() / unit**2  # squared latent units
            cost += distortion + w * 8 * len(encoded.payload)
        costs.append(cost)
    assert costs[1] < costs[0]
    assert min(costs[2:]) < costs[1] * 1.005
    assert max(costs[1:]) < costs[0]


def test_effort_is_the_number_of_corrections_and_a_second_size_takes_none(
    tokenizer: Tokenizer, model: ExactEntropyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"start": 0, "correct": 0}

    def count(of: type, name: str) -> None:
        original: Callable[..., object] = getattr(of, name)

        def counted(*args: object) -> object:
            calls[name] += 1
            return original(*args)

        monkeypatch.setattr(of, name, counted)

    count(ExactEntropyModel, "start")
    count(TiledTransforms, "correct")
    for effort, corrections in enumerate(CORRECTIONS, 1):
        encoder = encoder_of(tokenizer, model, synthetic_photo(32, 32), effort=effort)
        calls.update(start=0, correct=0)
        encoder.encode(3.0)
        assert calls == {"start": 1, "correct": corrections}
        encoder.encode(3.5)
        assert calls == {"start": 2, "correct": corrections}
        encoder.estimate_bytes(3.0)
        assert calls == {"start": 2, "correct": corrections}


# -- where the bits go -----------------------------------------------------------------------------------------------


def at_equal_size(
    tokenizer: Tokenizer, model: ExactEntropyModel, rgb: np.ndarray, num_bytes: int, **options: object
) -> EncodedTokens:
    """The largest encoding that is not above a size."""
    encoder = encoder_of(tokenizer, model, rgb, effort=1, **options)
    fitting = [e for w in np.geomspace(50, 3000, 40) if len((e := encoder.encode(float(w))).payload) <= num_bytes]
    return max(fitting, key=lambda e: len(e.payload))


def test_a_region_is_better_at_equal_bytes(tokenizer: Tokenizer, model: ExactEntropyModel) -> None:
    rgb = synthetic_photo(160, 160, 2)
    plain = encoder_of(tokenizer, model, rgb, effort=1).encode(500.0)  # where the tiny model has bits to shift
    with_region = at_equal_size(tokenizer, model, rgb, len(plain.payload), regions=(Region(32, 48, 64, 48, 16.0),))
    assert len(with_region.payload) <= len(plain.payload)
    inside = np.zeros(rgb.shape[:2], dtype=bool)
    inside[48:96, 32:96] = True
    before, after = (squared_error(tokenizer, encoded, rgb) for encoded in (plain, with_region))
    assert 10 * np.log10(before[inside].mean() / after[inside].mean()) > 0.5  # dB
    assert after[~inside].mean() > before[~inside].mean()


def test_a_region_of_small_weight_is_worse(tokenizer: Tokenizer, model: ExactEntropyModel) -> None:
    rgb = synthetic_photo(96, 96, 2)
    region = Region(0, 0, 48, 96, 0.02)
    plain, lessened = (
        encoder_of(tokenizer, model, rgb, effort=1, regions=regions).encode(2.0) for regions in ((), (region,))
    )
    assert len(lessened.payload) < len(plain.payload)
    before, after = (squared_error(tokenizer, encoded, rgb) for encoded in (plain, lessened))
    assert after[:, :48].mean() > before[:, :48].mean()


@pytest.mark.parametrize(
    "region",
    [
        Region(1000, 1000, 5, 5),
        Region(-500, -500, 20, 20),
        Region(64, 64, 1, 1),
        Region(-16, -16, 16, 16),
        Region(0, -32, 64, 16),
    ],
)
def test_regions_outside_the_picture_change_nothing(
    tokenizer: Tokenizer, model: ExactEntropyModel, region: Region
) -> None:
    rgb = synthetic_photo(64, 64)
    plain = encoder_of(tokenizer, model, rgb, effort=1).encode(3.0)
    assert encoder_of(tokenizer, model, rgb, effort=1, regions=(region,)).encode(3.0).payload == plain.payload


def test_factors_of_regions(tokenizer: Tokenizer, model: ExactEntropyModel) -> None:
    """Positions that a region touches, also where it leaves the picture; weights of overlapping ones multiply."""
    regions = (Region(15, 16, 2, 1, 4.0), Region(-10, 20, 12, 5000, 2.0), Region(40, 0, 100, 1, 0.5))
    encoder = encoder_of(tokenizer, model, synthetic_photo(50, 60), regions=regions)
    expected = torch.ones(4, 4)
    expected[1, :2] /= 4
    expected[1:, 0] /= 2
    expected[0, 2:] /= 0.5
    assert torch.equal(encoder._factors.view(4, 4), expected)


def test_activity_factors() -> None:
    rng = np.random.default_rng(0)
    pixels = np.full((160, 320, 3), 128, np.uint8)
    pixels[:, 160:] = rng.integers(0, 256, (160, 160, 3))
    factors = activity_factors(pixels)
    assert factors.shape == (10, 20)
    assert float(factors.log().mean()) == pytest.approx(0, abs=0.02)
    assert factors[:, :9].max() < 1 < factors[:, 11:].min()  # less for quiet parts, whose errors show
    assert float(factors.min()) >= 1 / MAX_ACTIVITY_FACTOR - 1e-6
    assert float(factors.max()) <= MAX_ACTIVITY_FACTOR + 1e-6
    for shape in ((16, 16), (16, 64), (64, 16)):
        flat = activity_factors(np.full((*shape, 3), 7, np.uint8))
        assert torch.allclose(flat, torch.ones(shape[0] // 16, shape[1] // 16))


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_activity_factors_of_photos_have_geometric_mean_one(rows: int, columns: int, seed: int) -> None:
    factors = activity_factors(synthetic_photo(16 * rows, 16 * columns, seed))
    assert bool(factors.isfinite().all())
    assert float(factors.log().mean()) == pytest.approx(0, abs=1e-3)


def test_tuning_for_structure_gives_quiet_parts_more(tokenizer: Tokenizer, model: ExactEntropyModel) -> None:
    rng = np.random.default_rng(0)
    rgb = synthetic_photo(96, 192)
    rgb[:, 96:] = rng.integers(0, 256, (96, 96, 3))
    plain, tuned = (
        squared_error(tokenizer, encoder_of(tokenizer, model, rgb, tune=tune, effort=1).encode(500.0), rgb)
        for tune in (Tune.PSNR, Tune.MS_SSIM)
    )
    assert tuned[:, :80].mean() < 0.97 * plain[:, :80].mean()
    assert tuned[:, 112:].mean() > plain[:, 112:].mean()


# -- the size --------------------------------------------------------------------------------------------------------


def busy_photo() -> np.ndarray:
    """A photo with textures of all strengths: the tiny model has bits to move."""
    rng = np.random.default_rng(0)
    strength = rng.uniform(0, 100, (16, 16, 1)).repeat(16, 0).repeat(16, 1)
    texture = rng.normal(size=(64, 64, 3)).repeat(4, 0).repeat(4, 1)
    return np.clip(synthetic_photo(256, 256) + strength * texture, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("share", [0.96, 0.98, 1.03])
@pytest.mark.parametrize("tune", Tune)
def test_a_second_encoding_hits_a_size(
    tokenizer: Tokenizer, model: ExactEntropyModel, share: float, tune: Tune
) -> None:
    encoder = encoder_of(tokenizer, model, busy_photo(), effort=1, tune=tune)
    first = encoder.encode(10.0)
    wanted = share * len(first.payload)
    second = encoder.encode(10.0, wanted)
    assert second.level == first.level
    assert len(second.payload) == pytest.approx(wanted, rel=0.01)
    reader = TokenReader(second.payload)
    assert torch.equal(code_tokens(model, reader, 16, 16, second.level).tokens, second.tokens)
    reader.finish()


def test_a_size_is_forgotten(tokenizer: Tokenizer, model: ExactEntropyModel) -> None:
    """What an encoding had to hit is of no effect on later ones that have to hit none."""
    free, bound = (encoder_of(tokenizer, model, busy_photo()) for _ in range(2))
    for encoder in (free, bound):
        encoder.encode(10.0)
    expected = free.encode(11.0)
    assert bound.encode(11.0, 0.96 * len(expected.payload)).payload != expected.payload
    assert bound.encode(11.0).payload == expected.payload


def test_sizes_that_cannot_be_hit_change_nothing(tokenizer: Tokenizer, model: ExactEntropyModel) -> None:
    """In the first call, after a change of level, or if the last tokens are not sent."""
    for keep, first_w in ((1.0, None), (1.0, 0.5), (0.5, 10.0)):
        free, bound = (encoder_of(tokenizer, model, busy_photo(), effort=1, keep=keep) for _ in range(2))
        if first_w is not None:
            assert free.encode(first_w).payload == bound.encode(first_w).payload
        expected = free.encode(10.0)
        found = bound.encode(10.0, 0.5 * len(expected.payload))
        assert torch.equal(found.tokens, expected.tokens)
        assert found.payload == expected.payload


def test_the_level_of_the_last_encoding_stays_for_trade_offs_near_by(
    tokenizer: Tokenizer, model: ExactEntropyModel
) -> None:
    handover = next(w for w in np.geomspace(1, 60, 2000).tolist() if tokenizer.quantizer.level(w) == 3)
    near, far = LEVEL_REACH * 0.95, LEVEL_REACH * 1.05
    encoder = encoder_of(tokenizer, model, synthetic_photo(32, 32), effort=1)
    assert [encoder.encode(w).level for w in (0.95 * handover, handover * near, handover * far)] == [2, 2, 3]
    assert [encoder.encode(w).level for w in (handover / near, handover / far)] == [3, 2]


@pytest.mark.parametrize(("shape", "step"), [((96, 112), 1.05), ((16, 16), 1.3)])
def test_estimates_fall_with_the_trade_off_and_are_of_the_right_order(
    tokenizer: Tokenizer, model: ExactEntropyModel, shape: tuple[int, int], step: float
) -> None:
    """Within a level; where the next one takes over, a small step up may be."""
    ws = np.geomspace(*tokenizer.quantizer.w_range(), 24).tolist()
    encoder = encoder_of(tokenizer, model, synthetic_photo(*shape), effort=1)
    estimates = [encoder.estimate_bytes(w) for w in ws]
    levels = tokenizer.quantizer.level(torch.tensor(ws)).tolist()
    assert set(levels) == set(range(NUM_LEVELS))
    for (level, estimate), (next_level, next_estimate) in pairwise(zip(levels, estimates, strict=True)):
        assert next_estimate <= estimate * (1.0 if level == next_level else step)
    assert estimates[-1] < 0.7 * estimates[0]
    for index in (0, 12, 23):
        assert len(encoder.encode(ws[index]).payload) == pytest.approx(estimates[index], rel=0.2, abs=1)


@pytest.mark.parametrize("w", [2.0, 5.5, 7.0, 14.0])
def test_estimates_are_what_the_tokens_of_the_tokenizer_cost(
    tokenizer: Tokenizer, model: ExactEntropyModel, w: float
) -> None:
    rgb = busy_photo()
    tokens = tokenizer.encode(torch.from_numpy(rgb).permute(2, 0, 1)[None].float() / 255, w)
    bits = tokenizer.quantizer.prior_bits()[tokenizer.quantizer.level(w)].gather(1, tokens[0].flatten(1)).sum()
    assert encoder_of(tokenizer, model, rgb).estimate_bytes(w) == pytest.approx(float(bits) / 8, rel=1e-3)


def test_estimates_of_a_part_are_those_of_the_whole(
    tokenizer: Tokenizer, model: ExactEntropyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_of(tokenizer, model, synthetic_photo(16 * 20, 16 * 20))
    whole = encoder.estimate_bytes(3.0)
    monkeypatch.setattr("pqmim.encoder.SAMPLED_POSITIONS", 100)
    assert encoder.estimate_bytes(3.0) == pytest.approx(whole, rel=0.2)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("effort", [0, MAX_EFFORT + 1, -1])
def test_effort_is_checked(effort: int) -> None:
    with pytest.raises(ValueError, match=f"effort must be 1 to {MAX_EFFORT}"):
        TokenChoiceOptions(effort=effort)


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.01, math.nan, math.inf])
def test_keep_is_checked(keep: float) -> None:
    with pytest.raises(ValueError, match="keep must be above 0"):
        TokenChoiceOptions(keep=keep)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_weights_are_checked(weight: float) -> None:
    with pytest.raises(ValueError, match="weight"):
        Region(0, 0, 1, 1, weight)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 1)])
def test_sizes_of_regions_are_checked(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1 x 1"):
        Region(0, 0, *size)
