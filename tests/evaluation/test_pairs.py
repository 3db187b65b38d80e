"""The page of blind comparisons, in a real browser where there is one, and the ratings of its answers."""

import base64
import io
import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsers import CHROMIUM, visit
from PIL import Image
from stand_in_codec import StandInCodec, write_photos

from pqmim.errors import ConfigError
from pqmim.evaluation import pairs
from pqmim.evaluation.pairs import PairsOptions, draw_pairs, elo_of, pairs_content, ratings, write_pairs
from pqmim.evaluation.reference_codecs import reference_codec


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> PairsOptions:
    folder = tmp_path_factory.mktemp("pairs") / "some <b> photos"
    write_photos(folder, number=3)
    return PairsOptions(folder, (StandInCodec(), reference_codec("webp")), bpp=(4.0,))


@pytest.fixture(scope="module")
def content(options: PairsOptions) -> dict[str, Any]:
    return pairs_content(options)


def answer(left: str, right: str, choice: str) -> dict[str, Any]:
    return {"left": left, "right": right, "choice": choice}


def test_content_is_what_the_codecs_make(options: PairsOptions, content: dict[str, Any]):
    assert content["codecs"] == ["stand-in", "webp"]
    assert [picture["name"] for picture in content["pictures"]] == ["photo0.png", "photo1.png", "photo2.png"]
    for picture in content["pictures"]:
        original = np.asarray(Image.open(options.dataset / picture["name"]))
        sources = [picture["original"], *(version["source"] for version in picture["versions"])]
        shown = [np.asarray(Image.open(io.BytesIO(base64.b64decode(s.partition(",")[2])))) for s in sources]
        assert np.array_equal(shown[0], original)
        assert 0 < np.abs(shown[1].astype(int) - original).max() <= 2**7
        assert len({version["bytes"] for version in picture["versions"]}) == 2  # files of their own


def test_pictures_are_spread_and_large_ones_cut(options: PairsOptions, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pairs, "MAX_SIDE", 100)
    few = pairs_content(replace(options, images=2))
    assert [picture["name"] for picture in few["pictures"]] == ["photo0.png", "photo2.png"]
    data = base64.b64decode(few["pictures"][0]["original"].partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (100, 100)


def test_order_is_random_complete_and_seeded():
    drawn = draw_pairs(40, 3, seed=7)
    assert drawn == draw_pairs(40, 3, seed=7) != draw_pairs(40, 3, seed=8)
    assert Counter((picture, frozenset(sides)) for picture, *sides in drawn) == Counter(
        (picture, frozenset(sides)) for picture in range(40) for sides in ((0, 1), (0, 2), (1, 2))
    )
    assert [picture for picture, _, _ in drawn] != sorted(picture for picture, _, _ in drawn)
    on_the_left = sum(left < right for _, left, right in drawn)
    assert 35 < on_the_left < 85


def test_one_codec_is_no_comparison(options: PairsOptions):
    for codecs in ((StandInCodec(),), (StandInCodec(), StandInCodec())):
        with pytest.raises(ConfigError, match="two codecs or more"):
            pairs_content(replace(options, codecs=codecs))


def test_elo_of_two_is_the_logarithm_of_their_odds():
    """9.5 wins to 0.5, the half added to each side: 400 log10(10 / 1)."""
    elo = elo_of(np.array([[0, 9.5], [0.5, 0]]))
    assert elo[0] - elo[1] == pytest.approx(400 * math.log10(10.0 / 1.0), abs=1e-3)
    assert elo.mean() == pytest.approx(1500)
    assert elo_of(np.array([[0, 3], [3, 0]])) == pytest.approx([1500, 1500])


def test_elo_finds_the_strengths_that_made_the_wins(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pairs, "PRIOR", 0.0)
    strength = np.array([4.0, 2.0, 1.0, 0.5])
    wins = 100 * strength[:, None] / (strength[:, None] + strength[None, :])
    np.fill_diagonal(wins, 0)
    elo = elo_of(wins)
    np.testing.assert_allclose(elo - elo[2], 400 * np.log10(strength), atol=1e-3)


def test_ratings_of_answers():
    answers = [answer("a", "b", "left")] * 6 + [answer("b", "a", "right")] * 6 + [answer("a", "b", "tie")] * 2
    answers += [answer("c", "b", "right"), answer("b", "c", "tie")] * 5
    found = ratings(answers)
    assert [(rating.codec, rating.answers) for rating in found] == [("a", 14), ("b", 24), ("c", 10)]
    assert np.mean([rating.elo for rating in found]) == pytest.approx(1500)
    assert found[0].elo - found[1].elo == pytest.approx(400 * math.log10(13.5 / 1.5), abs=1e-3)
    for rating in found:
        assert rating.low < rating.elo < rating.high


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    files[0].write_text(json.dumps({"answers": [answer("a", "b", "left")] * 9}), "utf-8")
    files[1].write_text(json.dumps({"answers": [answer("b", "a", "tie")]}), "utf-8")
    assert pairs.main([str(file) for file in files]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\| a \| 1700 \| \d+ to \d+ \| 10 \|", printed[2])
    assert pairs.main([]) == 2
    for wrong in ("{}", "[", '{"answers": [{"left": "a", "right": "a", "choice": "left"}]}', '{"answers": []}'):
        files[0].write_text(wrong, "utf-8")
        capsys.readouterr()
        assert pairs.main([str(files[0])]) == 1
        assert re.fullmatch(r"pqmim: [^\n]+\n", capsys.readouterr().err)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_page_in_a_browser(options: PairsOptions, content: dict[str, Any], tmp_path: Path):
    page = tmp_path / "pairs.html"
    assert write_pairs(options, page) == 3
    text = page.read_text("utf-8")
    assert "http" not in text
    assert text.count("</script>") == 2
    findings = visit(page, "visit_pairs.js", tmp_path, width=1200)
    assert (findings["first"], findings["second"], findings["undone"]) == ("1 of 3", "2 of 3", "1 of 3")
    assert findings["zoomed"] == "real"
    assert findings["last"] == "All 3 are answered. Save the answers."
    assert findings["sizes"] == ["176x168"] * 3
    saved = findings["saved"]
    assert saved["codecs"] == ["stand-in", "webp"]
    assert [each["choice"] for each in saved["answers"]] == ["right", "tie", "left"]
    assert [(each["left"], each["right"], each["picture"]) for each in saved["answers"]] == [
        (saved["codecs"][left], saved["codecs"][right], f"photo{picture}.png")
        for picture, left, right in content["pairs"]
    ]
    assert ratings(saved["answers"])
