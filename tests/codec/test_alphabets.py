"""Alphabets: where codewords and their values lie, and which sub-quantizers are silent."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pqmim.alphabets import Alphabets, Block

SIZES = [[8, 8, 5, 5, 1], [5, 1, 5, 3, 1], [3, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 2]]
CHANNELS = [1, 1, 2, 3, 1]


@st.composite
def any_alphabets(draw: st.DrawFn) -> Alphabets:
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 6)))
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 511]), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    channels = draw(st.lists(st.integers(1, 3), min_size=shape[1], max_size=shape[1]))
    return Alphabets(np.reshape(sizes, shape), np.array(channels))


def places(alphabets: Alphabets) -> Iterator[tuple[int, int, int, int]]:
    """Level, sub-quantizer and where its codewords and their values begin, one after the other."""
    codeword = value = 0
    for level, m in np.ndindex(*alphabets.sizes.shape):
        yield level, m, codeword, value
        codeword += int(alphabets.sizes[level, m])
        value += int(alphabets.sizes[level, m] * alphabets.channels[m])
    assert (codeword, value) == (alphabets.num_codewords, alphabets.num_values)


@given(any_alphabets())
def test_codewords_follow_each_other_by_level_and_sub_quantizer(alphabets: Alphabets) -> None:
    assert (alphabets.num_levels, alphabets.num_subquantizers) == alphabets.sizes.shape
    for level, m, codeword, value in places(alphabets):
        assert alphabets.starts[level, m] == codeword
        assert alphabets.value_starts[level, m] == value


@given(any_alphabets(), st.data())
def test_blocks_are_neighbors_alike(alphabets: Alphabets, data: st.DataObject) -> None:
    level = data.draw(st.integers(0, alphabets.num_levels - 1))
    first = data.draw(st.integers(0, alphabets.num_subquantizers - 1))
    last = data.draw(st.integers(first + 1, alphabets.num_subquantizers))
    blocks = alphabets.blocks(level, first, last)
    assert [m for block in blocks for m in range(block.first, block.last)] == list(range(first, last))
    kinds = []
    for block in blocks:
        members = range(block.first, block.last)
        (kind,) = {(int(alphabets.sizes[level, m]), int(alphabets.channels[m])) for m in members}
        assert kind == (block.size, block.channels)
        kinds.append(kind)
        assert block.codewords.start == alphabets.starts[level, block.first]
        assert block.values.start == alphabets.value_starts[level, block.first]
        assert block.codewords.stop - block.codewords.start == len(members) * block.size
        assert block.values.stop - block.values.start == len(members) * block.size * block.channels
    assert all(before != after for before, after in pairwise(kinds))


def test_blocks_by_example() -> None:
    alphabets = Alphabets(np.array(SIZES), np.array(CHANNELS))
    assert alphabets.blocks(0, 0, 5) == (
        Block(0, 2, 8, 1, slice(0, 16), slice(0, 16)),
        Block(2, 3, 5, 2, slice(16, 21), slice(16, 26)),
        Block(3, 4, 5, 3, slice(21, 26), slice(26, 41)),
        Block(4, 5, 1, 1, slice(26, 27), slice(41, 42)),
    )
    assert alphabets.blocks(1, 1, 3) == (
        Block(1, 2, 1, 1, slice(32, 33), slice(47, 48)),
        Block(2, 3, 5, 2, slice(33, 38), slice(48, 58)),
    )


@pytest.mark.parametrize(("level", "num_coded", "end"), [(0, 4, 4), (1, 3, 4), (2, 1, 1), (3, 0, 1), (4, 1, 5)])
def test_what_is_coded_at_a_level(level: int, num_coded: int, end: int) -> None:
    """To the last sub-quantizer that is not silent; the first one even where all are."""
    alphabets = Alphabets(np.array(SIZES), np.array(CHANNELS))
    assert alphabets.num_coded(level) == num_coded
    assert alphabets.end(level) == end


def test_those_of_a_model_file() -> None:
    boundaries = np.array([0, 1, 2, 4, 7, 8])
    tensors = {"tokenizer.quantizer.sizes": np.array(SIZES), "tokenizer.quantizer.boundaries_tensor": boundaries}
    alphabets = Alphabets.of(tensors)
    assert alphabets.sizes.tolist() == SIZES
    assert alphabets.channels.tolist() == CHANNELS
