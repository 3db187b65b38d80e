"""Files of a given size."""

from dataclasses import dataclass, field

import pytest
from PIL import Image

from pqmim.evaluation.matching import MAX_ENCODINGS, SizeMatcher
from pqmim.evaluation.reference_codecs import reference_codec

IMAGE = Image.radial_gradient("L").convert("RGB")


@dataclass
class Exponential:
    """A codec whose files have 100 * 2^(quality / 10) bytes."""

    qualities: tuple[float, ...] = (0.0, 100.0)
    tried: list[float] = field(default_factory=list)

    def encode(self, image: Image.Image, quality: float) -> bytes:
        self.tried.append(quality)
        return bytes(round(100 * 2 ** (quality / 10)))


@pytest.mark.parametrize("target", [101, 400, 3200, 80_000])
@pytest.mark.parametrize("guess", [None, 0.0, 30.0, 100.0])
def test_a_regular_codec_is_matched_in_few_encodings(target: int, guess: float | None) -> None:
    codec = Exponential()
    quality, data = SizeMatcher(codec, IMAGE).match(target, guess)
    assert len(data) == pytest.approx(target, rel=0.012)
    assert quality in codec.tried
    assert len(codec.tried) <= 5


def test_a_good_guess_is_all_it_takes() -> None:
    codec = Exponential()
    assert SizeMatcher(codec, IMAGE).match(400, 20.0) == (20.0, bytes(400))
    assert codec.tried == [20.0]


def test_sizes_beyond_the_scale_give_its_ends() -> None:
    codec = Exponential()
    matcher = SizeMatcher(codec, IMAGE)
    assert matcher.match(10)[0] == 0
    assert matcher.match(10**6)[0] == 100
    assert len(codec.tried) <= 2 * MAX_ENCODINGS


def test_earlier_targets_save_encodings() -> None:
    codec = Exponential()
    matcher = SizeMatcher(codec, IMAGE)
    matcher.match(400)
    before = len(codec.tried)
    matcher.match(500)
    assert len(codec.tried) - before <= 2


@pytest.mark.parametrize("target", [1500, 2500])
def test_a_codec_of_whole_qualities(target: int) -> None:
    codec = reference_codec("jpeg")
    _, data = SizeMatcher(codec, IMAGE).match(target)
    sizes = [len(codec.encode(IMAGE, quality)) for quality in range(2, 86)]
    nearest = min(sizes, key=lambda size: abs(size - target))
    assert len(data) == nearest or abs(len(data) - target) <= 0.01 * target
