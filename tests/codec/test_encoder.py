"""The encoder: effort, regions, tuning and the share that is sent do what they say."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import synthetic_photo

from pqmim.decoder_files import load_decoder
from pqmim.distortion import SquaredError
from pqmim.encoder import (
    HANDOVER_RATIO,
    LEVEL_REACH,
    MAX_ACTIVITY_FACTOR,
    EncodedTokens,
    PictureEncoder,
    activity_factors,
)
from pqmim.exact_entropy import ExactEntropyModel
from pqmim.file_decoder import tiles_of
from pqmim.model_files import MODEL_FILE, load_model
from pqmim.networks import Networks
from pqmim.options import MAX_EFFORT, EncodeOptions, Region, Tune
from pqmim.quantizer import Latent
from pqmim.range_coding import PrefixReader, TokenReader
from pqmim.search import search
from pqmim.token_coding import code_tokens
from pqmim.transforms import Transforms

LATENT_UNIT = 20.0
"""Grey levels that make one unit of the tiny model's latent."""

TINY_LEVELS = 6
"""Of the tiny model."""


@pytest.fixture(scope="module")
def networks(tiny_model: Path) -> Networks:
    model = load_model(tiny_model / MODEL_FILE)
    assert model.config.tokenizer.analysis.latent_unit == LATENT_UNIT
    return Networks(model, load_decoder(tiny_model / "fine.safetensors"), "cpu", kernel="float32", threads=1)


def encoder_of(networks: Networks, rgb: np.ndarray, **options: object) -> PictureEncoder:
    regions, judge, on_progress = options.pop("regions", ()), options.pop("judge", None), options.pop("told", None)
    return PictureEncoder(networks, rgb, EncodeOptions(**options), regions, judge=judge, on_progress=on_progress)


def picture_of(networks: Networks, encoded: EncodedTokens) -> np.ndarray:
    z = networks.quantizer.dequantize(encoded.tokens, encoded.level)
    return networks.transforms.synthesize(tiles_of(z), *z.shape[2:])


def squared_error(networks: Networks, encoded: EncodedTokens, rgb: np.ndarray) -> np.ndarray:
    """(H, W) mean over the colors."""
    picture = picture_of(networks, encoded)[: rgb.shape[0], : rgb.shape[1]]
    return np.square(picture.astype(float) - rgb).mean(2)


# -- what is sent ----------------------------------------------------------------------------------------------------


def test_the_payload_holds_the_tokens(networks: Networks) -> None:
    """Whatever chose them, the decoder reads the same."""
    for tune, effort in ((tune, effort) for tune in Tune for effort in range(1, MAX_EFFORT + 1)):
        if (tune, effort) == (Tune.VIVID, 1):
            continue
        encoded = encoder_of(networks, synthetic_photo(50, 70), effort=effort, tune=tune, judge=SquaredError).encode(
            3.0
        )
        assert not encoded.is_partial
        reader = TokenReader(encoded.payload)
        assert np.array_equal(code_tokens(networks.entropy_model, reader, 4, 5, encoded.level).tokens, encoded.tokens)
        reader.finish()


@settings(deadline=None, max_examples=8)
@given(st.floats(1e-6, 1), st.integers(1, 40), st.integers(1, 60))
def test_keep_sends_that_share_of_the_tokens(networks: Networks, keep: float, height: int, width: int) -> None:
    rgb = synthetic_photo(height, width)
    encoded = encoder_of(networks, rgb, keep=keep, effort=1).encode(40.0)
    whole = encoder_of(networks, rgb, effort=1).encode(40.0)
    assert encoded.is_partial == (keep < 1)
    assert np.array_equal(encoded.tokens, whole.tokens)
    digits = whole.payload if keep == 1 else whole.payload.ljust(len(encoded.payload), b"\0")
    assert digits.startswith(encoded.payload)  # as if the whole file had been cut
    found = code_tokens(networks.entropy_model, PrefixReader(encoded.payload), *whole.tokens.shape[1:], encoded.level)
    coded = networks.quantizer.alphabets.sizes[whole.level] > 1
    assert coded.tolist() == [True] * 4 + [False] * 4
    num_kept = math.ceil(keep * whole.tokens[coded].size)
    if keep < 1:
        assert num_kept <= int(found.known[coded].sum())
        shorter = code_tokens(
            networks.entropy_model, PrefixReader(encoded.payload[:-1]), *whole.tokens.shape[1:], encoded.level
        )
        assert int(shorter.known[coded].sum()) < num_kept  # not a byte more than it takes
    assert np.array_equal(found.tokens[found.known], whole.tokens[found.known])


def test_keep_after_corrections(networks: Networks) -> None:
    encoder = encoder_of(networks, synthetic_photo(64, 64), effort=3, keep=0.5)
    whole = encoder_of(networks, synthetic_photo(64, 64), effort=3)
    for w in (3.0, 5.0):
        encoded = encoder.encode(w)
        assert np.array_equal(whole.encode(w).tokens, encoded.tokens)
        found = code_tokens(networks.entropy_model, PrefixReader(encoded.payload), 4, 4, encoded.level)
        assert 0.5 <= found.known_share < 0.7


def test_a_quality_is_the_trade_off_that_is_asked_for(tiny_model: Path, networks: Networks) -> None:
    quality = load_model(tiny_model / MODEL_FILE).config.quality
    for percent in (0.0, 35.0, 50.0, 100.0):
        assert networks.w(percent) == quality.w(percent)


# -- effort ----------------------------------------------------------------------------------------------------------


def test_effort_lowers_what_it_is_for(networks: Networks) -> None:
    """Squared error of the picture plus price of the bits, over a few pictures, falls with the corrections."""
    w = 1.5
    costs = []
    for effort in range(1, MAX_EFFORT + 1):
        cost = 0.0
        for seed in range(3):
            rgb = synthetic_photo(96, 96, seed)
            encoded = encoder_of(networks, rgb, effort=effort).encode(w)
            distortion = 3 * squared_error(networks, encoded, rgb).sum() / LATENT_UNIT**2  # squared latent units
            cost += distortion + w * 8 * len(encoded.payload)
        costs.append(cost)
    assert costs[1] < costs[0]
    assert min(costs[2:]) < costs[1] * 1.005
    assert max(costs[1:]) < costs[0]


def test_effort_is_the_number_of_corrections_and_a_second_size_takes_none(
    networks: Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"start": 0, "correct": 0}

    def count(of: type, name: str) -> None:
        original: Callable[..., object] = getattr(of, name)

        def counted(*args: object) -> object:
            calls[name] += 1
            return original(*args)

        monkeypatch.setattr(of, name, counted)

    count(ExactEntropyModel, "start")
    count(Transforms, "correct")
    for effort, corrections in enumerate((0, 2, 5), 1):
        encoder = encoder_of(networks, synthetic_photo(32, 32), effort=effort)
        calls.update(start=0, correct=0)
        encoder.encode(3.0)
        assert calls == {"start": 1, "correct": corrections}
        encoder.encode(3.5)
        assert calls == {"start": 2, "correct": corrections}
        encoder.estimate_bytes(3.0)
        assert calls == {"start": 2, "correct": corrections}


def test_the_search_for_structure_takes_the_place_of_corrections(
    networks: Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []

    def counted(*arguments: object, num_steps: int, **options: object) -> Latent:
        steps.append(num_steps)
        return search(*arguments, num_steps=num_steps, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("pqmim.encoder.search", counted)
    monkeypatch.setattr(Transforms, "correct", None)
    rgb = synthetic_photo(96, 96)
    searched = encoder_of(networks, rgb, tune=Tune.MS_SSIM, effort=3).encode(3.0)
    assert steps == [5]
    plain = encoder_of(networks, rgb, tune=Tune.MS_SSIM, effort=1).encode(3.0)
    assert not np.array_equal(searched.tokens, plain.tokens)


def test_the_search_for_tune_vivid_has_the_judge_of_the_caller(networks: Networks) -> None:
    judged: list[tuple[int, ...]] = []

    def judge(pixels: np.ndarray) -> SquaredError:
        judged.append(pixels.shape)
        return SquaredError(pixels)

    rgb = synthetic_photo(96, 96)
    costs = []
    for tune, effort in ((Tune.PSNR, 1), (Tune.VIVID, 2), (Tune.VIVID, 3)):
        encoded = encoder_of(networks, rgb, tune=tune, effort=effort, judge=judge).encode(1.5)
        error = 3 * squared_error(networks, encoded, rgb).sum() / LATENT_UNIT**2
        costs.append(error + 1.5 * 8 * len(encoded.payload))
    assert judged == [(96, 96, 3)] * 2
    assert max(costs[1:]) < costs[0]
    for tune in (Tune.PSNR, Tune.MS_SSIM):
        encoder_of(networks, rgb, tune=tune, effort=3, judge=judge).encode(1.5)
    assert len(judged) == 2
    with pytest.raises(ValueError, match="tune vivid needs a judge"):
        encoder_of(networks, rgb, tune=Tune.VIVID)


def test_progress_is_told(networks: Networks) -> None:
    told: list[tuple[str, int, int]] = []
    num_steps = len(networks.entropy_model.schedule.steps)
    coded = [("tokens", done, num_steps) for done in range(1, num_steps + 1)]
    # A position for each step at least: one without positions is not told of.
    rgb, tell = synthetic_photo(128, 128), lambda *how_far: told.append(how_far)
    encoder_of(networks, rgb, effort=2, told=tell).encode(3.0)
    assert told == [("corrections", 1, 2), ("corrections", 2, 2), *coded]
    told.clear()
    encoder_of(networks, rgb, effort=3, tune=Tune.MS_SSIM, told=tell).encode(3.0)
    assert told == [*(("search", done, 5) for done in range(1, 6)), *coded]


# -- where the bits go -----------------------------------------------------------------------------------------------


def at_equal_size(networks: Networks, rgb: np.ndarray, num_bytes: int, **options: object) -> EncodedTokens:
    """The largest encoding that is not above a size."""
    encoder = encoder_of(networks, rgb, effort=1, **options)
    fitting = [e for w in np.geomspace(50, 3000, 40) if len((e := encoder.encode(float(w))).payload) <= num_bytes]
    return max(fitting, key=lambda e: len(e.payload))


def test_a_region_is_better_at_equal_bytes(networks: Networks) -> None:
    rgb = synthetic_photo(160, 160, 2)
    plain = encoder_of(networks, rgb, effort=1).encode(160.0)  # where the tiny model has bits to shift
    with_region = at_equal_size(networks, rgb, len(plain.payload), regions=(Region(32, 48, 64, 48, 16.0),))
    assert len(with_region.payload) <= len(plain.payload)
    inside = np.zeros(rgb.shape[:2], dtype=bool)
    inside[48:96, 32:96] = True
    before, after = (squared_error(networks, encoded, rgb) for encoded in (plain, with_region))
    assert 10 * np.log10(before[inside].mean() / after[inside].mean()) > 0.5  # dB
    assert after[~inside].mean() > before[~inside].mean()


def test_a_region_of_small_weight_is_worse(networks: Networks) -> None:
    rgb = synthetic_photo(96, 96, 2)
    region = Region(0, 0, 48, 96, 0.02)
    plain, lessened = (encoder_of(networks, rgb, effort=1, regions=regions).encode(2.0) for regions in ((), (region,)))
    assert len(lessened.payload) < len(plain.payload)
    before, after = (squared_error(networks, encoded, rgb) for encoded in (plain, lessened))
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
def test_regions_outside_the_picture_change_nothing(networks: Networks, region: Region) -> None:
    rgb = synthetic_photo(64, 64)
    plain = encoder_of(networks, rgb, effort=1).encode(3.0)
    assert encoder_of(networks, rgb, effort=1, regions=(region,)).encode(3.0).payload == plain.payload


def test_factors_of_regions(networks: Networks) -> None:
    """Positions that a region touches, also where it leaves the picture; weights of overlapping ones multiply."""
    regions = (Region(15, 16, 2, 1, 4.0), Region(-10, 20, 12, 5000, 2.0), Region(40, 0, 100, 1, 0.5))
    encoder = encoder_of(networks, synthetic_photo(50, 60), regions=regions)
    expected = np.ones((4, 4), np.float32)
    expected[1, :2] /= 4
    expected[1:, 0] /= 2
    expected[0, 2:] /= 0.5
    assert np.array_equal(encoder._factors.reshape(4, 4), expected)


def test_activity_factors() -> None:
    rng = np.random.default_rng(0)
    pixels = np.full((160, 320, 3), 128, np.uint8)
    pixels[:, 160:] = rng.integers(0, 256, (160, 160, 3))
    factors = activity_factors(pixels)
    assert factors.shape == (10, 20)
    assert float(np.log(factors).mean()) == pytest.approx(0, abs=0.02)
    assert factors[:, :9].max() < 1 < factors[:, 11:].min()  # less for quiet parts, whose errors show
    assert float(factors.min()) >= 1 / MAX_ACTIVITY_FACTOR - 1e-6
    assert float(factors.max()) <= MAX_ACTIVITY_FACTOR + 1e-6
    for shape in ((16, 16), (16, 64), (64, 16)):
        flat = activity_factors(np.full((*shape, 3), 7, np.uint8))
        assert np.allclose(flat, np.ones((shape[0] // 16, shape[1] // 16)))


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_activity_factors_of_photos_have_geometric_mean_one(rows: int, columns: int, seed: int) -> None:
    factors = activity_factors(synthetic_photo(16 * rows, 16 * columns, seed))
    assert np.isfinite(factors).all()
    assert float(np.log(factors).mean()) == pytest.approx(0, abs=1e-3)


def test_tuning_for_structure_gives_quiet_parts_more(networks: Networks) -> None:
    rng = np.random.default_rng(0)
    rgb = synthetic_photo(96, 192)
    rgb[:, 96:] = rng.integers(0, 256, (12, 12, 3)).repeat(8, 0).repeat(8, 1)
    plain, tuned = (
        squared_error(networks, encoder_of(networks, rgb, tune=tune, effort=1).encode(160.0), rgb)
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
@pytest.mark.parametrize("tune", [Tune.PSNR, Tune.MS_SSIM])
def test_a_second_encoding_hits_a_size(networks: Networks, share: float, tune: Tune) -> None:
    encoder = encoder_of(networks, busy_photo(), effort=1, tune=tune)
    first = encoder.encode(3.0)
    wanted = share * len(first.payload)
    second = encoder.encode(3.0, wanted)
    assert second.level == first.level
    assert len(second.payload) == pytest.approx(wanted, rel=0.01)
    reader = TokenReader(second.payload)
    assert np.array_equal(code_tokens(networks.entropy_model, reader, 16, 16, second.level).tokens, second.tokens)
    reader.finish()


def test_a_size_is_forgotten(networks: Networks) -> None:
    """What an encoding had to hit is of no effect on later ones that have to hit none."""
    free, bound = (encoder_of(networks, busy_photo()) for _ in range(2))
    for encoder in (free, bound):
        encoder.encode(10.0)
    expected = free.encode(11.0)
    assert bound.encode(11.0, 0.96 * len(expected.payload)).payload != expected.payload
    assert bound.encode(11.0).payload == expected.payload


def test_sizes_that_cannot_be_hit_change_nothing(networks: Networks) -> None:
    """In the first call, after a change of level, or if the last tokens are not sent."""
    for keep, first_w in ((1.0, None), (1.0, 0.5), (0.5, 10.0)):
        free, bound = (encoder_of(networks, busy_photo(), effort=1, keep=keep) for _ in range(2))
        if first_w is not None:
            assert free.encode(first_w).payload == bound.encode(first_w).payload
        expected = free.encode(10.0)
        found = bound.encode(10.0, 0.5 * len(expected.payload))
        assert np.array_equal(found.tokens, expected.tokens)
        assert found.payload == expected.payload


def test_the_level_of_the_last_encoding_stays_for_trade_offs_near_by(networks: Networks) -> None:
    handover = next(w for w in np.geomspace(1, 60, 2000).tolist() if networks.quantizer.levels.level(w) == 3)
    near, far = LEVEL_REACH * 0.95, LEVEL_REACH * 1.05
    encoder = encoder_of(networks, synthetic_photo(32, 32), effort=1)
    assert [encoder.encode(w).level for w in (0.95 * handover, handover * near, handover * far)] == [2, 2, 3]
    assert [encoder.encode(w).level for w in (handover / near, handover / far)] == [3, 2]


@pytest.mark.parametrize(("shape", "step"), [((96, 112), 1.05), ((16, 16), 1.3)])
def test_estimates_fall_with_the_trade_off_and_are_of_the_right_order(
    networks: Networks, shape: tuple[int, int], step: float
) -> None:
    """Within a level; where the next one takes over, a small step up may be."""
    ws = np.geomspace(*networks.quantizer.levels.w_range(), 24).tolist()
    encoder = encoder_of(networks, synthetic_photo(*shape), effort=1)
    estimates = [encoder.estimate_bytes(w) for w in ws]
    levels = [networks.quantizer.levels.level(w) for w in ws]
    assert set(levels) == set(range(TINY_LEVELS))
    for (level, estimate), (next_level, next_estimate) in pairwise(zip(levels, estimates, strict=True)):
        assert next_estimate <= estimate * (1.0 if level == next_level else step)
    assert estimates[-1] < 0.7 * estimates[0]
    for index in (0, 12, 23):  # of a model that has learned nothing beside static priors
        assert len(encoder.encode(ws[index]).payload) == pytest.approx(estimates[index], rel=0.3, abs=2)


@pytest.mark.parametrize("w", [2.0, 5.5, 7.0, 14.0])
def test_estimates_are_between_own_and_static_frequencies(networks: Networks, w: float) -> None:
    rgb, quantizer = busy_photo(), networks.quantizer
    encoder = encoder_of(networks, rgb, effort=1)
    encoded = encoder.encode(w)
    estimate = encoder.estimate_bytes(w)
    channels = quantizer.channels(networks.transforms.analyze(rgb))
    # The trade-off that is applied is the encoder's own, near the one of the levels.
    applied = np.full(channels.shape[1], encoder._applied_w(w, encoded.level), np.float32)
    tokens = quantizer.assign(channels, applied, encoded.level)
    own, static = quantizer.own_bits(tokens, encoded.level), quantizer.static_bits(tokens, encoded.level)
    assert own < static
    assert math.log(8 * estimate) == pytest.approx(0.75 * math.log(own) + 0.25 * math.log(static), abs=1e-6)


@pytest.mark.parametrize("finer", range(TINY_LEVELS - 1))
def test_levels_hand_over_where_a_picture_takes_as_many_bytes_with_either(networks: Networks, finer: int) -> None:
    """With either the levels' own trade-offs or the picture's, one level ends where the other one begins."""
    levels = networks.quantizer.levels
    encoder = encoder_of(networks, busy_photo(), effort=1)
    handover = next(w for w in np.geomspace(*levels.w_range(), 4000).tolist() if levels.level(w) > finer)

    def sizes(applied: Sequence[float]) -> float:
        first, second = (encoder._bytes_at(w, finer + index) for index, w in enumerate(applied))
        return abs(math.log(first * HANDOVER_RATIO / second))

    moved = sizes([encoder._applied_w(handover, finer + index) for index in (0, 1)])
    assert moved < 0.03 or moved < 0.75 * sizes(levels.handover(finer))


def test_estimates_of_a_part_are_those_of_the_whole(networks: Networks, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of(networks, synthetic_photo(16 * 20, 16 * 20))
    whole = encoder.estimate_bytes(3.0)
    monkeypatch.setattr("pqmim.encoder.SAMPLED_POSITIONS", 100)
    assert encoder.estimate_bytes(3.0) == pytest.approx(whole, rel=0.2)
