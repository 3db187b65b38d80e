"""The gallery page: what it shows, and that it needs nothing else."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pqmim.codec import Codec, load_codec
from pqmim.errors import LimitError
from pqmim.evaluation.gallery import GalleryOptions, Strip, gallery_page, make_strip
from pqmim.options import FillOptions

OPTIONS = GalleryOptions(keeps=(1.0, 0.5, 0.0), quality=80, filling=FillOptions(seed=7, temperature=0.5))


@pytest.fixture(scope="module")
def codec(tiny_model: Path) -> Codec:
    return load_codec(tiny_model, device="cpu")


@pytest.fixture(scope="module")
def strip(codec: Codec, photo: Image.Image) -> Strip:
    return make_strip(codec, "a<b>.png", photo, OPTIONS)


def test_strip(codec: Codec, strip: Strip, photo: Image.Image) -> None:
    complete, half, empty = strip.kept
    assert [len(kept.pictures) for kept in strip.kept] == [1, 2, 2]
    assert complete.known_share == 1
    assert half.known_share == pytest.approx(0.5, abs=0.1)
    assert empty.known_share == 0
    assert complete.num_bytes == len(codec.encode(photo, quality=80)) > half.num_bytes > empty.num_bytes
    decoded = codec.decode(codec.encode(photo, quality=80))
    np.testing.assert_array_equal(complete.pictures[0], decoded)
    assert (half.pictures[0] != half.pictures[1]).any()


def test_page(strip: Strip) -> None:
    page = gallery_page([strip, strip], "Bread & butter", OPTIONS, model="tiny")
    assert page.count("<section>") == 2
    assert page.count("<img ") == 2 * (1 + 1 + 2 + 2)
    assert all(source.startswith("data:image/webp;base64,") for source in re.findall(r'src="([^"]*)"', page))
    assert "http" not in page
    assert "<script" not in page
    assert "Bread &amp; butter" in page
    assert "a&lt;b&gt;.png" in page
    assert "Model tiny, quality 80; sampled with seed 7, temperature 0.5" in page
    shares = re.findall(r">([\d.]+) % of the tokens<", page)
    assert (shares[0], shares[2]) == ("100", "0")
    captions = re.findall(r"<figcaption>(\d+)\u00a0B, (\d\.\d{3})\u00a0bpp, (\d+\.\d\d)\u00a0dB<", page)
    assert captions[0] == (
        str(strip.kept[0].num_bytes),
        f"{8 * strip.kept[0].num_bytes / (70 * 45):.3f}",
        captions[0][2],
    )
    assert len(captions) == 2 * 5
    assert len(page) < 200_000


@pytest.mark.parametrize("keeps", [(), (1.5,), (-0.1,), (float("nan"),)])
def test_wrong_shares(keeps: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="keeps must"):
        GalleryOptions(keeps=keeps)


def test_pixel_limit(codec: Codec, photo: Image.Image) -> None:
    with pytest.raises(LimitError):
        make_strip(codec, "a", photo, GalleryOptions(max_pixels=100))
