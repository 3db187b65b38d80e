"""Blocks of the entropy model in its trainable form.

When they simulate the exact form, which computes with integers (`fixed_point`), they round to the same grids and pass
gradients straight through.

A layer works on *streams* of the same positions, (S, B, h, w, C): the first is the content, which alone is seen by
other positions; a second one, if there is one, are queries (`entropy_model`). What is seen by whom says a `Sight`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pqmim.fixed_point import (
    ACTIVATION_UNIT,
    ATTENTION_ONE,
    INT8_MAX,
    NORM_EPSILON,
    RESIDUAL_UNIT,
    SCORE_UNIT,
)

UNSEEN = 1 << 20
"""Label of content that does not exist: nobody sees it."""
SINK_START = -2.0
"""Score, nats, of the key that every query sees, in an untrained network."""
NEIGHBORS = [(dy, dx) for dy in (0, 1, 2) for dx in (0, 1, 2) if (dy, dx) != (1, 1)]
"""Where the eight neighbors are in a grid with a margin of one position."""


def round_through(x: Tensor) -> Tensor:
    """Round half to even; gradient of the identity."""
    return x + (x.round() - x).detach()


def fake_quantize(x: Tensor, unit: float, *, simulate: bool) -> Tensor:
    """Clamp to the int8 range of a grid; when simulating, round to it too."""
    if not simulate:
        return x.clamp(-INT8_MAX * unit, INT8_MAX * unit)
    return round_through(x * (1 / unit)).clamp(-INT8_MAX, INT8_MAX) * unit


def to_residual(h: Tensor, *, simulate: bool) -> Tensor:
    """When simulating, round to the grid of the residual stream."""
    return round_through(h * (1 / RESIDUAL_UNIT)) * RESIDUAL_UNIT if simulate else h


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Per-row symmetric int8: (n, k) float -> integers in [-127, 127] (n, k) and units (n, 1), both float."""
    unit = weight.detach().abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / INT8_MAX
    return round_through(weight / unit), unit


class QuantizableLinear(nn.Linear):
    """Linear layer whose weights are rounded to int8 per output when simulating."""

    def forward(self, x: Tensor, simulate: bool = False, rows: slice = slice(None)) -> Tensor:
        """(..., in) -> (..., out), or those outputs that are wanted."""
        weight = self.weight[rows]
        bias = None if self.bias is None else self.bias[rows]
        if not simulate:
            return F.linear(x, weight, bias)
        integers, unit = quantize_weight(weight)
        y = F.linear(x, integers) * unit[:, 0]
        return y if bias is None else y + bias


def normalize(h: Tensor, *, simulate: bool) -> Tensor:
    """Root-mean-square normalization to the activation grid; its gain lives in the weights that follow."""
    sum_of_squares = h.square().sum(-1, keepdim=True) + NORM_EPSILON * RESIDUAL_UNIT**2
    return fake_quantize(h * (math.sqrt(h.shape[-1]) * sum_of_squares.rsqrt()), ACTIVATION_UNIT, simulate=simulate)


@dataclass(frozen=True)
class Sight:
    """Which content each stream sees.

    Attributes:
        neighbors: (S, B or 1, h, w, 8) bool, in the order of `NEIGHBORS`; None = all. What is outside of the grid gives
            zeros in any case.
        windows: for windows that are not shifted and such that are, (B * W or W, 1, S * T, T) bool: the keys that a
            query sees.
    """

    neighbors: Tensor | None
    windows: tuple[Tensor, Tensor]

    @classmethod
    def everything(cls, partitions: tuple[WindowPartition, WindowPartition]) -> Sight:
        """One stream that sees the whole grid."""
        plain, shifted = (partition.is_inside[:, None, None, :] for partition in partitions)
        return cls(None, (plain, shifted))

    @classmethod
    def by_labels(cls, content: Tensor, query: Tensor, partitions: tuple[WindowPartition, WindowPartition]) -> Sight:
        """Two streams, of which content sees content of labels up to its own, and queries that of lower labels.

        Args:
            content: (B or 1, h, w) int64; `UNSEEN` where there is none.
            query: the same, below `UNSEEN`.
        """
        height, width = content.shape[1:]
        padded = F.pad(content, (1, 1, 1, 1), value=UNSEEN)
        around = torch.stack([padded[:, y : y + height, x : x + width] for y, x in NEIGHBORS], dim=-1)
        neighbors = torch.stack([around <= content[..., None], around < query[..., None]])

        def visible(partition: WindowPartition) -> Tensor:
            keys, queries = (partition.split(labels[..., None], UNSEEN)[..., 0] for labels in (content, query))
            seen = [keys[:, None, :] <= keys[:, :, None], keys[:, None, :] < queries[:, :, None]]
            return torch.cat(seen, dim=1)[:, None]

        plain, shifted = (visible(partition) for partition in partitions)
        return cls(neighbors, (plain, shifted))


def shift_channels(x: Tensor, neighbors: Tensor | None = None) -> Tensor:
    """Convolutional mixing at no arithmetic: half of the channels come from the content of the eight neighbors.

    Args:
        x: (S, B, h, w, C); C a multiple of 16. Channels C/2 .. C are eight equal chunks.
        neighbors: see `Sight`.

    Returns:
        The same shape; what is outside the grid or not seen is zero.
    """
    streams, batch, height, width, channels = x.shape
    chunk = channels // 16
    padded = F.pad(x[0, ..., channels // 2 :], (0, 0, 1, 1, 1, 1))
    moved = [
        padded[:, dy : dy + height, dx : dx + width, i * chunk : (i + 1) * chunk]
        for i, (dy, dx) in enumerate(NEIGHBORS)
    ]
    mixed = torch.stack(moved, dim=-2)[None]  # (1, B, h, w, 8, chunk)
    if neighbors is not None:
        mixed = mixed * neighbors[..., None].to(mixed.dtype)
    return torch.cat([x[..., : channels // 2], mixed.flatten(-2).expand(streams, batch, -1, -1, -1)], dim=-1)


class WindowPartition:
    """Cuts an h x w grid into windows, shifted by half a window in every other layer.

    The grid is padded to whole windows; padded positions are masked out as keys.

    Args:
        height, width: of the grid, positions.
        window: side of a window, positions.
        shifted: whether this layer's windows are shifted.
    """

    def __init__(self, height: int, width: int, window: int, shifted: bool, device: torch.device) -> None:
        self.height, self.width, self.window = height, width, window
        offset = window // 2 if shifted else 0
        self.padding = (
            offset,
            -(offset + width) % window,
            offset,
            -(offset + height) % window,
        )  # left right top bottom
        self.rows = (offset + height + self.padding[3]) // window
        self.columns = (offset + width + self.padding[1]) // window
        inside = torch.ones(1, height, width, 1, device=device)
        self.is_inside = self.split(inside)[..., 0] > 0
        """(num_windows, window^2) bool."""

    def split(self, x: Tensor, outside: float = 0.0) -> Tensor:
        """(B, h, w, C) -> (B * num_windows, window^2, C); `outside` is what fills the padding."""
        x = F.pad(x, (0, 0, *self.padding), value=outside)
        batch, channels, n = x.shape[0], x.shape[-1], self.window
        x = x.view(batch, self.rows, n, self.columns, n, channels)
        return x.transpose(2, 3).reshape(batch * self.rows * self.columns, n * n, channels)

    def join(self, windows: Tensor) -> Tensor:
        """Inverse of `split`."""
        n, channels = self.window, windows.shape[-1]
        x = windows.view(-1, self.rows, self.columns, n, n, channels).transpose(2, 3)
        x = x.reshape(-1, self.rows * n, self.columns * n, channels)
        left, _, top, _ = self.padding
        return x[:, top : top + self.height, left : left + self.width]


def partitions_of(
    height: int, width: int, window: int, device: torch.device
) -> tuple[WindowPartition, WindowPartition]:
    """The windows of a grid, not shifted and shifted."""
    return (
        WindowPartition(height, width, window, False, device),
        WindowPartition(height, width, window, True, device),
    )


def relative_index(window: int) -> Tensor:
    """Index of each (query, key) pair of a window into a table of relative positions: (window^2, window^2) int64."""
    y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    y, x = y.flatten(), x.flatten()
    span = 2 * window - 1
    return (y[:, None] - y[None, :] + window - 1) * span + (x[:, None] - x[None, :] + window - 1)


class WindowAttention(nn.Module):
    """Multi-head attention within windows, with a relative position bias.

    Every query sees one key more, the *sink*, of a score of its own and value zero: a query that sees no content
    gets zero.
    """

    def __init__(self, width: int, head_width: int, window: int) -> None:
        super().__init__()
        self.width = width
        self.num_heads = width // head_width
        self.head_width = head_width
        self.query_key_value = QuantizableLinear(width, 3 * width)
        self.project = QuantizableLinear(width, width)
        self.position_bias = nn.Parameter(torch.zeros((2 * window - 1) ** 2, self.num_heads))
        self.sink = nn.Parameter(torch.full((self.num_heads,), SINK_START))
        self.register_buffer("pairs", relative_index(window), persistent=False)

    def bias(self) -> Tensor:
        """(heads, window^2, window^2): nats added to the scores."""
        return self.position_bias[self.get_buffer("pairs")].permute(2, 0, 1)

    def forward(self, x: Tensor, seen: Tensor, partition: WindowPartition, first: int, simulate: bool) -> Tensor:
        """Update of the residual stream.

        Args:
            x: (S, B, h, w, C) on the activation grid.
            seen: keys that each query sees, see `Sight.windows`; of the streams that are wanted.
            first: the first stream that is wanted.

        Returns:
            (S - first, B, h, w, C).
        """

        def heads(y: Tensor) -> Tensor:  # (B, h, w, n * C) -> (n, windows, heads, T, head_width)
            y = partition.split(fake_quantize(y, ACTIVATION_UNIT, simulate=simulate))
            return y.view(*y.shape[:2], -1, self.num_heads, self.head_width).permute(2, 0, 3, 1, 4)

        queries = x[first:]
        q = heads(self.query_key_value(queries.flatten(0, 1), simulate, slice(self.width)))[0]
        k, v = heads(self.query_key_value(x[0], simulate, slice(self.width, None)))
        streams, (count, _, t, _) = len(queries), k.shape
        q = q.view(streams, count, self.num_heads, t, self.head_width).permute(1, 2, 0, 3, 4).flatten(2, 3)
        scores = (q @ k.transpose(-1, -2)).float() * (self.head_width**-0.5 / SCORE_UNIT)  # (count, heads, S * T, T)
        bias, sink = self.bias() / SCORE_UNIT, self.sink[:, None, None] / SCORE_UNIT
        if simulate:
            scores, bias, sink = round_through(scores), round_through(bias), round_through(sink)
        scores = scores.view(count, self.num_heads, streams, t, t) + bias[:, None]
        scores = scores.flatten(2, 3).view(-1, len(seen), *scores.shape[1:2], streams * t, t)
        scores = scores.masked_fill(~seen, -torch.inf).flatten(0, 1)
        best = torch.maximum(scores.amax(-1, keepdim=True), sink).detach()
        weights = ((scores - best) * SCORE_UNIT).exp() * ATTENTION_ONE
        rest = ((sink - best) * SCORE_UNIT).exp() * ATTENTION_ONE
        if simulate:
            weights, rest = round_through(weights), round_through(rest)
        mixed = (weights.to(v.dtype) @ v).float() / (weights.sum(-1, keepdim=True) + rest)
        mixed = fake_quantize(mixed, ACTIVATION_UNIT, simulate=simulate)
        mixed = mixed.view(count, self.num_heads, streams, t, self.head_width).permute(2, 0, 3, 1, 4)
        joined = partition.join(mixed.reshape(streams * count, t, self.width))
        return self.project(joined.view(streams, *x.shape[1:]), simulate)  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand = QuantizableLinear(width, hidden)
        self.project = QuantizableLinear(hidden, width)

    def forward(self, x: Tensor, simulate: bool) -> Tensor:
        """(..., C) on the activation grid -> update of the residual stream."""
        hidden = F.relu(fake_quantize(self.expand(x, simulate), ACTIVATION_UNIT, simulate=simulate))
        return self.project(hidden, simulate)  # type: ignore[no-any-return]


class TransformerLayer(nn.Module):
    """Pre-normalized window attention, if it has one, and a feed-forward part on shifted channels.

    Args:
        has_attention: whether this layer attends.
        is_shifted: whether its windows are shifted by half.
        is_last: the last layer's feed-forward part sees its own position alone, so that it need not be computed where
            no token is coded.
    """

    def __init__(
        self,
        width: int,
        head_width: int,
        mlp_ratio: int,
        window: int,
        *,
        has_attention: bool,
        is_shifted: bool,
        is_last: bool,
    ) -> None:
        super().__init__()
        self.attention = WindowAttention(width, head_width, window) if has_attention else None
        self.feed_forward = FeedForward(width, mlp_ratio * width)
        self.is_shifted = is_shifted
        self.is_last = is_last

    def forward(
        self,
        h: Tensor,
        sight: Sight,
        partitions: tuple[WindowPartition, WindowPartition],
        simulate: bool,
        first: int = 0,
    ) -> Tensor:
        """Residual streams (S, B, h, w, C) float32 -> those from `first` on; only a last layer may leave out some."""
        if self.attention is not None:
            x = shift_channels(normalize(h, simulate=simulate), sight.neighbors)
            seen = sight.windows[self.is_shifted]
            t = seen.shape[-1]
            update = self.attention(x, seen[:, :, first * t :], partitions[self.is_shifted], first, simulate)
            h = to_residual(h[first:] + update, simulate=simulate)
        else:
            h = h[first:]
        x = normalize(h, simulate=simulate)
        h = h + self.feed_forward(x if self.is_last else shift_channels(x, sight.neighbors), simulate)
        return to_residual(h, simulate=simulate)
