"""Schedules cover every token once, each step halving the spacing of what is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pqmim.config import EntropyModelConfig
from pqmim.schedule import QUINCUNX, Schedule, positions_of, quincunx_steps

even_schedules = st.lists(st.integers(1, 5), min_size=1, max_size=4).flatmap(
    lambda steps: st.builds(Schedule, st.integers(len(steps), 40), st.just(tuple(steps)))
)


def with_sizes(groups: list[tuple[int, int]]) -> Schedule:
    """Of the steps and the size of each group."""
    steps, sizes = zip(*groups, strict=True)
    return Schedule(sum(sizes), steps, sizes[:-1])


uneven_schedules = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=4).map(with_sizes)
schedules = even_schedules | uneven_schedules


@given(schedules, st.integers(1, 13), st.integers(1, 13))
def test_every_token_is_coded_once(schedule: Schedule, height: int, width: int) -> None:
    coded = np.zeros((schedule.num_subquantizers, height * width), dtype=int)
    for step in schedule.steps:
        positions = positions_of(step, height, width)
        assert (np.diff(positions) > 0).all()  # raster order
        coded[step.first : step.last, positions] += 1
    assert (coded == 1).all()


@given(schedules)
def test_groups_follow_each_other_and_have_their_steps(schedule: Schedule) -> None:
    steps = schedule.steps
    assert [step.group for step in steps] == sorted(step.group for step in steps)
    assert len(steps) == sum(schedule.group_steps)
    for group in range(schedule.num_groups):
        own = schedule.steps_of(group)
        assert len(own) == schedule.group_steps[group]
        assert {(step.first, step.last) for step in own} == {schedule.group_bounds(group)}
        assert [step.begin for step in own] == [0, *(step.end for step in own[:-1])]
        assert own[-1].end == 5
    bounds = [schedule.group_bounds(group) for group in range(schedule.num_groups)]
    assert [first for first, _ in bounds] == [0, *(last for _, last in bounds[:-1])]
    assert bounds[-1][1] == schedule.num_subquantizers


@given(even_schedules)
def test_without_sizes_groups_are_dealt_evenly(schedule: Schedule) -> None:
    sizes = [step.last - step.first for step in schedule.steps]
    assert max(sizes) - min(sizes) <= 1


def test_groups_of_given_sizes() -> None:
    schedule = Schedule(9, (5, 2, 1), (1, 3))
    assert [schedule.group_bounds(group) for group in range(3)] == [(0, 1), (1, 4), (4, 9)]
    assert Schedule(4, (5,), ()).group_bounds(0) == (0, 4)


def test_quincunx_shares_and_spacing() -> None:
    steps = quincunx_steps(16, 16)
    shares = [(steps == step).mean() for step in range(5)]
    assert shares == [1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2]
    y, x = np.mgrid[:16, :16]
    for step in range(5):
        known = np.argwhere(steps <= step)
        squared = ((known[:, None] - known[None]) ** 2).sum(2)
        assert squared[squared > 0].min() == 16 / 2**step
    assert ((steps == 4) == ((x + y) % 2 == 0)).all()


def test_the_tile_of_the_documentation() -> None:
    assert quincunx_steps(4, 4).tolist() == QUINCUNX.tolist()
    assert QUINCUNX.tolist() == [[4, 2, 4, 0], [3, 4, 3, 4], [4, 1, 4, 2], [3, 4, 3, 4]]


def test_steps_that_join() -> None:
    (only,) = Schedule(3, (1,)).steps
    assert (only.begin, only.end, only.first, only.last) == (0, 5, 0, 3)
    assert [(step.begin, step.end) for step in Schedule(3, (2,)).steps] == [(0, 4), (4, 5)]


@pytest.mark.parametrize("group_steps", [(), (0,), (6,), (1, 1, 1)])
def test_bad_schedules(group_steps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"there must be|a group has"):
        Schedule(2, group_steps)


@pytest.mark.parametrize("group_sizes", [(3, 6), (0, 3), (4, -1), (9, 1), (5, 5)])
def test_groups_without_sub_quantizers(group_sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a group has at least 1 of 9 sub-quantizers"):
        Schedule(9, (5, 2, 1), group_sizes)
    with pytest.raises(ValueError, match="a group has at least 1 of 9 sub-quantizers"):
        EntropyModelConfig(group_steps=(5, 2, 1), group_sizes=group_sizes).schedule(9)


@pytest.mark.parametrize("group_sizes", [(), (1,), (1, 1, 1)])
def test_all_groups_but_the_last_have_a_size(group_sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="group_sizes must name all groups of group_steps but the last"):
        EntropyModelConfig(group_steps=(5, 2, 1), group_sizes=group_sizes)
    with pytest.raises(ValueError, match="all of 3 groups but the last have a size, not"):
        Schedule(9, (5, 2, 1), group_sizes)
