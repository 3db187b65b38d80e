"""Levels: which codebooks serve which trade-off, and where one hands over to the next."""

import math
from itertools import pairwise

import numpy as np
import pytest

from pqmim.levels import Levels

APPLIED = ((0.06, 0.5), (0.26, 3.5), (1.8, 9.2), (4.8, 24.3), (12.2, 62.0), (32.0, 200.0))
"""The finest level ends early, and the next one begins early."""


@pytest.fixture(scope="module")
def levels() -> Levels:
    return Levels(np.log(APPLIED).tolist())


def test_levels_take_turns_over_the_range_of_trade_offs(levels: Levels) -> None:
    found = [levels.level(w) for w in np.geomspace(0.1, 1000, 400)]
    assert len(levels) == 6
    assert found[0] == 0
    assert found[-1] == 5
    assert {b - a for a, b in pairwise(found)} == {0, 1}
    assert [levels.level(w) for w in (1.3, 3.4, 9.0, 23.0, 60.0)] == [1, 2, 3, 4, 5]


def test_levels_hand_over_where_their_ranges_say(levels: Levels) -> None:
    """Within a level the applied trade-off rises with the one asked for; at a handover it steps back."""
    ws = np.geomspace(0.1, 1000, 4000)
    serving = np.array([levels.level(w) for w in ws])
    for level in range(5):
        of_level = [levels.applied_w(w, level) for w in ws[serving == level]]
        of_next = [levels.applied_w(w, level + 1) for w in ws[serving == level + 1]]
        assert (np.diff(of_level) > 0).all()
        assert of_level[-1] == pytest.approx(APPLIED[level][1], rel=0.02)
        assert of_next[0] == pytest.approx(APPLIED[level + 1][0], rel=0.02)
    for w in (0.01, 3.0, 5000.0):  # a level that does not serve w goes on as it would
        assert levels.applied_w(1.1 * w, 3) > levels.applied_w(w, 3)


def test_range_worth_asking_for(levels: Levels) -> None:
    """The outermost levels apply the ends of their ranges there."""
    finest, coarsest = levels.w_range()
    assert (levels.level(finest), levels.level(coarsest)) == (0, 5)
    assert levels.applied_w(finest, 0) == pytest.approx(0.06)
    assert levels.applied_w(coarsest, 5) == pytest.approx(200.0)


@pytest.mark.parametrize("number", [1, 2, 3, 17, 64])
def test_any_number_of_levels(number: int) -> None:
    made_for = np.geomspace(0.05, 60, number)
    applied = [(math.log(w / 2), math.log(w * 2.7)) for w in made_for]
    levels = Levels(applied)
    assert len(levels) == number
    ws = np.geomspace(*levels.w_range(), 500)
    serving = [levels.level(w) for w in ws]
    assert serving == sorted(serving)
    assert serving[-1] == number - 1
    found = [levels.applied_w(w, level) for w, level in zip(ws, serving, strict=True)]
    assert (found[0], found[-1]) == pytest.approx((made_for[0] / 2, made_for[-1] * 2.7))
    for (level, w), (next_level, next_w) in pairwise(zip(serving, found, strict=True)):
        assert next_w > w or next_level > level


def test_one_level_applies_what_is_asked_for() -> None:
    levels = Levels([(-1.0, 2.0)])
    assert [levels.level(w) for w in (0.01, 1, 100)] == [0, 0, 0]
    assert levels.applied_w(3.0, 0) == pytest.approx(3.0)
    assert levels.w_range() == pytest.approx((math.exp(-1), math.exp(2)))
