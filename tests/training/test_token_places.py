"""Where codewords and values of tokens lie, against the definition, one token at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training.token_tools import RAGGED, draw_tokens

from pqmim.alphabets import Alphabets
from pqmim.training.token_places import TokenPlaces


@st.composite
def any_alphabets(draw: st.DrawFn) -> Alphabets:
    num_levels, m = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    sizes = draw(st.lists(st.integers(1, 6), min_size=num_levels * m, max_size=num_levels * m))
    channels = draw(st.lists(st.integers(1, 4), min_size=m, max_size=m))
    return Alphabets(np.array(sizes).reshape(num_levels, m), np.array(channels))


@given(any_alphabets(), st.data())
def test_places_against_a_loop_over_everything(alphabets: Alphabets, data: st.DataObject) -> None:
    """All codewords are listed in their order, and each token is looked up among them."""
    sizes, channels = alphabets.sizes.tolist(), alphabets.channels.tolist()
    codewords = [(level, m, k) for level, row in enumerate(sizes) for m, size in enumerate(row) for k in range(size)]
    values = [(*codeword, i) for codeword in codewords for i in range(channels[codeword[1]])]
    first = data.draw(st.integers(0, len(channels) - 1))
    last = data.draw(st.integers(first + 1, len(channels)))
    level = torch.tensor(data.draw(st.lists(st.integers(0, len(sizes) - 1), min_size=1, max_size=3)))
    tokens = draw_tokens(alphabets, level, 2, 3, seed=data.draw(st.integers(0, 99)))[:, first:last]

    places = TokenPlaces(alphabets)
    found, found_values = places.codewords(tokens, level, first), places.values(tokens, level, first)
    columns = [(m, i) for m in range(first, last) for i in range(channels[m])]
    assert found.shape == tokens.shape
    assert found_values.shape == (len(level), len(columns), 2, 3)
    for b, index in enumerate(level.tolist()):
        for y, x in np.ndindex(2, 3):
            here = [(index, m, k) for m, k in enumerate(tokens[b, :, y, x].tolist(), first)]
            assert [codewords[place] for place in found[b, :, y, x].tolist()] == here
            expected = [(index, m, int(tokens[b, m - first, y, x]), i) for m, i in columns]
            assert [values[place] for place in found_values[b, :, y, x].tolist()] == expected


def test_what_is_said_of_sub_quantizers_is_said_of_their_columns() -> None:
    places = TokenPlaces(RAGGED)
    assert places.boundaries.tolist() == [0, 1, 2, 4, 8]
    mask = torch.arange(4)[None, :, None, None].expand(2, 4, 1, 3)
    assert places.by_column(mask)[1, :, 0, 2].tolist() == [0, 1, 2, 2, 3, 3, 3, 3]
    assert places.by_column(mask[:, 1:3], first=1)[0, :, 0, 0].tolist() == [1, 2, 2]


@pytest.mark.parametrize("is_saved", [False, True])
def test_places_follow_their_module_but_are_no_weights(is_saved: bool) -> None:
    places = TokenPlaces(RAGGED)
    if is_saved:
        assert places.state_dict() == {}
    else:
        assert {buffer.device.type for buffer in places.to("meta").buffers()} == {"meta"}
