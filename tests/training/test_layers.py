"""Blocks of the entropy model: windows, shifts, rounding with gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pqmim.fixed_point import ACTIVATION_UNIT, INT8_MAX
from pqmim.training.layers import (
    UNSEEN,
    QuantizableLinear,
    Sight,
    WindowAttention,
    WindowPartition,
    fake_quantize,
    normalize,
    partitions_of,
    quantize_weight,
    relative_index,
    round_through,
    shift_channels,
)

CPU = torch.device("cpu")


@given(st.integers(1, 11), st.integers(1, 11), st.sampled_from([2, 4, 8]), st.booleans(), st.integers(1, 2))
def test_windows_split_and_join(height: int, width: int, window: int, shifted: bool, batch: int) -> None:
    partition = WindowPartition(height, width, window, shifted, CPU)
    x = torch.arange(1, batch * height * width * 3 + 1).view(batch, height, width, 3)
    windows = partition.split(x)
    num_windows = partition.rows * partition.columns
    assert windows.shape == (batch * num_windows, window**2, 3)
    assert torch.equal(partition.join(windows), x)
    assert torch.equal(windows[:num_windows, :, 0] > 0, partition.is_inside)
    assert partition.is_inside.any(1).all()  # every window has a key to attend to


def test_shifted_windows_straddle_the_others() -> None:
    x = torch.arange(64).view(1, 8, 8, 1)
    plain = WindowPartition(8, 8, 4, False, CPU).split(x)
    shifted = WindowPartition(8, 8, 4, True, CPU).split(x)
    assert len(plain) == 4
    assert len(shifted) == 9
    middle = set(shifted[4].flatten().tolist())
    assert middle == {8 * y + x for y in range(2, 6) for x in range(2, 6)}


def test_relative_index_depends_on_the_difference_alone() -> None:
    window = 4
    index = relative_index(window)
    seen: dict[tuple[int, int], int] = {}
    for query in range(window**2):
        for key in range(window**2):
            difference = (query // window - key // window, query % window - key % window)
            assert seen.setdefault(difference, int(index[query, key])) == int(index[query, key])
    assert len(set(seen.values())) == len(seen) == (2 * window - 1) ** 2


def test_shift_channels_moves_eight_ways() -> None:
    height, width, channels = 5, 6, 32
    x = torch.randn(1, 2, height, width, channels)
    y = shift_channels(x)
    assert torch.equal(y[..., :16], x[..., :16])
    moves = set()
    for i in range(8):
        chunk = slice(16 + 2 * i, 18 + 2 * i)
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                moved = torch.zeros_like(x[..., chunk])
                rows = slice(max(0, -dy), height - max(0, dy)), slice(max(0, dy), height - max(0, -dy))
                columns = slice(max(0, -dx), width - max(0, dx)), slice(max(0, dx), width - max(0, -dx))
                moved[:, :, rows[0], columns[0]] = x[:, :, rows[1], columns[1], chunk]
                if torch.equal(y[..., chunk], moved):
                    moves.add((dy, dx))
    assert len(moves) == 8
    assert (0, 0) not in moves


def test_neighbors_show_content_of_the_labels_that_a_stream_sees() -> None:
    torch.manual_seed(0)
    content, query = torch.randint(3, (1, 4, 5)), torch.randint(4, (1, 4, 5))
    content[0, 0, 0] = UNSEEN
    sight = Sight.by_labels(content, query, partitions_of(4, 5, 4, CPU))
    x = torch.randn(2, 1, 4, 5, 16) + 10  # never zero
    y = shift_channels(x, sight.neighbors)
    ways = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
    for row in range(4):
        for column in range(5):
            for i, (dy, dx) in enumerate(ways):
                from_row, from_column = row + dy, column + dx
                is_inside = 0 <= from_row < 4 and 0 <= from_column < 5
                label = int(content[0, from_row, from_column]) if is_inside else UNSEEN
                for stream, is_seen in enumerate((label <= content[0, row, column], label < query[0, row, column])):
                    expected = x[0, 0, from_row, from_column, 8 + i] if is_inside and is_seen else torch.tensor(0.0)
                    assert y[stream, 0, row, column, 8 + i] == expected


def test_rounding_passes_gradients() -> None:
    x = torch.tensor([-2.5, -0.4, 0.5, 1.5, 3.2], requires_grad=True)
    y = round_through(x)
    assert y.tolist() == [-2, 0, 0, 2, 3]  # half to even
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1] * 5


@pytest.mark.parametrize("simulate", [False, True])
def test_fake_quantization_clamps_and_keeps_gradients_inside(simulate: bool) -> None:
    unit = ACTIVATION_UNIT
    x = torch.tensor([-100.0, -1.03, 0.02, 2.49, 50.0], requires_grad=True)
    y = fake_quantize(x, unit, simulate=simulate)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    integers = y / unit
    assert integers.abs().max() == INT8_MAX
    assert bool((integers == integers.round()).all()) == simulate
    assert (y[1:4] - x[1:4]).abs().max() <= unit / 2


def test_weights_use_the_whole_range_of_each_row() -> None:
    weight = torch.randn(5, 7) * torch.tensor([1e-3, 1, 10, 0, 1e4])[:, None]
    integers, unit = quantize_weight(weight)
    assert torch.equal(integers, integers.round())
    assert integers[[0, 1, 2, 4]].abs().amax(1).tolist() == [INT8_MAX] * 4
    assert integers[3].abs().max() == 0
    assert ((integers * unit - weight).abs() <= 0.501 * unit).all()


def test_simulated_linear_is_near_and_trains() -> None:
    torch.manual_seed(0)
    layer = QuantizableLinear(64, 32)
    x = torch.randn(10, 64)
    assert (layer(x, simulate=True) - layer(x)).abs().max() < 0.05
    layer(x, simulate=True).square().sum().backward()
    assert layer.weight.grad is not None
    assert (layer.weight.grad != 0).all()


def test_normalization_has_unit_power_and_no_singularity() -> None:
    h = torch.randn(4, 64) * torch.tensor([1e-2, 1, 100, 0])[:, None]
    normalized = normalize(h, simulate=False)
    assert torch.allclose(normalized[:3].square().mean(1), torch.ones(3), atol=0.01)
    assert (normalized[3] == 0).all()


@pytest.mark.parametrize("simulate", [False, True])
def test_attention_sees_content_that_may_be_seen_and_nothing_else(simulate: bool) -> None:
    torch.manual_seed(0)
    attention = WindowAttention(32, 16, 4).requires_grad_(False)
    partitions = partitions_of(3, 5, 4, CPU)
    content, query = torch.randint(3, (1, 3, 5)), torch.randint(4, (1, 3, 5))
    content[0, 1, 2] = UNSEEN
    sight = Sight.by_labels(content, query, partitions)
    x = fake_quantize(torch.randn(2, 1, 3, 5, 32), ACTIVATION_UNIT, simulate=True)
    for shifted in (False, True):
        seen = sight.windows[shifted]
        y = attention(x, seen, partitions[shifted], 0, simulate)
        assert y.isfinite().all()
        queries = attention(x, seen[:, :, 16:], partitions[shifted], 1, simulate)
        assert torch.allclose(queries, y[1:], atol=1e-5)
        other = x.clone()
        other[0, 0, content[0] == 2] = 3.0
        changed = attention(other, seen, partitions[shifted], 0, simulate)
        assert torch.allclose(changed[0, content < 2], y[0, content < 2], atol=1e-5)
        assert torch.allclose(changed[1, query < 3], y[1, query < 3], atol=1e-5)
        assert not torch.allclose(changed[1, query == 3], y[1, query == 3], atol=1e-3)
        nothing = attention.project(torch.zeros(32), simulate)
        assert torch.allclose(y[1, query == 0], nothing, atol=1e-5)  # who sees nothing gets zero


def test_content_of_equal_values_is_their_mean_but_for_the_sink() -> None:
    torch.manual_seed(0)
    attention = WindowAttention(32, 16, 4).requires_grad_(False)
    partitions = partitions_of(3, 5, 4, CPU)
    everything = Sight.everything(partitions)
    x = fake_quantize(torch.randn(1, 1, 1, 1, 32), ACTIVATION_UNIT, simulate=True).expand(1, 1, 3, 5, 32)
    attention.sink.fill_(-50)
    for simulate in (False, True):
        for shifted in (False, True):  # what is outside has no say
            out = attention(x, everything.windows[shifted], partitions[shifted], 0, simulate)
            assert torch.allclose(out, out[:, :, :1, :1].expand_as(out), atol=1e-5)
