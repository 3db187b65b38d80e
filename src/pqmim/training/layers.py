"""Blocks of the entropy model in its trainable form.

When they simulate the exact form, which computes with integers (`fixed_point`), they round to the same grids and pass
gradients straight through.
"""

from __future__ import annotations

import math

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


def round_through(x: Tensor) -> Tensor:
    """Round half to even; gradient of the identity."""
    return x + (x.round() - x).detach()


def fake_quantize(x: Tensor, unit: float, *, simulate: bool) -> Tensor:
    """Clamp to the int8 range of a grid; when simulating, round to it too."""
    if not simulate:
        return x.clamp(-INT8_MAX * unit, INT8_MAX * unit)
    return round_through(x * (1 / unit)).clamp(-INT8_MAX, INT8_MAX) * unit


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Per-row symmetric int8: (n, k) float -> integers in [-127, 127] (n, k) and units (n, 1), both float."""
    unit = weight.detach().abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / INT8_MAX
    return round_through(weight / unit), unit


class QuantizableLinear(nn.Linear):
    """Linear layer whose weights are rounded to int8 per output when simulating."""

    def forward(self, x: Tensor, simulate: bool = False) -> Tensor:
        """(..., in) -> (..., out)."""
        if not simulate:
            return F.linear(x, self.weight, self.bias)
        integers, unit = quantize_weight(self.weight)
        return F.linear(x, integers) * unit[:, 0] + self.bias


def normalize(h: Tensor, *, simulate: bool) -> Tensor:
    """Root-mean-square normalization to the activation grid; its gain lives in the weights that follow."""
    sum_of_squares = h.square().sum(-1, keepdim=True) + NORM_EPSILON * RESIDUAL_UNIT**2
    return fake_quantize(h * (math.sqrt(h.shape[-1]) * sum_of_squares.rsqrt()), ACTIVATION_UNIT, simulate=simulate)


def shift_channels(x: Tensor) -> Tensor:
    """Convolutional mixing at no arithmetic: half of the channels move by one position, in eight directions.

    Args:
        x: (B, h, w, C); C a multiple of 16. Channels C/2 .. C are eight equal chunks.

    Returns:
        The same shape; what enters from outside the grid is zero.
    """
    channels = x.shape[-1]
    chunk = channels // 16
    height, width = x.shape[1:3]
    padded = F.pad(x[..., channels // 2 :], (0, 0, 1, 1, 1, 1))
    offsets = [(dy, dx) for dy in (0, 1, 2) for dx in (0, 1, 2) if (dy, dx) != (1, 1)]
    moved = [
        padded[:, dy : dy + height, dx : dx + width, i * chunk : (i + 1) * chunk] for i, (dy, dx) in enumerate(offsets)
    ]
    return torch.cat([x[..., : channels // 2], *moved], dim=-1)


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
        inside = F.pad(torch.ones(1, height, width, 1, device=device), (0, 0, *self.padding))
        self.is_inside = self._cut(inside)[..., 0] > 0
        """(num_windows, window^2) bool."""
        self.has_outside = any(self.padding)

    def _cut(self, x: Tensor) -> Tensor:
        batch, channels, n = x.shape[0], x.shape[-1], self.window
        x = x.view(batch, self.rows, n, self.columns, n, channels)
        return x.transpose(2, 3).reshape(batch * self.rows * self.columns, n * n, channels)

    def split(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B * num_windows, window^2, C)."""
        return self._cut(F.pad(x, (0, 0, *self.padding)))

    def join(self, windows: Tensor) -> Tensor:
        """Inverse of `split`."""
        n, channels = self.window, windows.shape[-1]
        x = windows.view(-1, self.rows, self.columns, n, n, channels).transpose(2, 3)
        x = x.reshape(-1, self.rows * n, self.columns * n, channels)
        left, _, top, _ = self.padding
        return x[:, top : top + self.height, left : left + self.width]


def relative_index(window: int) -> Tensor:
    """Index of each (query, key) pair of a window into a table of relative positions: (window^2, window^2) int64."""
    y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    y, x = y.flatten(), x.flatten()
    span = 2 * window - 1
    return (y[:, None] - y[None, :] + window - 1) * span + (x[:, None] - x[None, :] + window - 1)


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with a relative position bias."""

    def __init__(self, width: int, head_width: int, window: int) -> None:
        super().__init__()
        self.num_heads = width // head_width
        self.head_width = head_width
        self.window = window
        self.query_key_value = QuantizableLinear(width, 3 * width)
        self.project = QuantizableLinear(width, width)
        self.position_bias = nn.Parameter(torch.zeros((2 * window - 1) ** 2, self.num_heads))
        self.register_buffer("pairs", relative_index(window), persistent=False)

    def bias(self) -> Tensor:
        """(heads, window^2, window^2): nats added to the scores."""
        return self.position_bias[self.get_buffer("pairs")].permute(2, 0, 1)

    def forward(self, x: Tensor, partition: WindowPartition, simulate: bool) -> Tensor:
        """(B, h, w, C) on the activation grid -> update of the residual stream, the same shape."""
        qkv = fake_quantize(self.query_key_value(x, simulate), ACTIVATION_UNIT, simulate=simulate)
        windows = partition.split(qkv)  # (n, T, 3 C)
        n, t, _ = windows.shape
        q, k, v = windows.view(n, t, 3, self.num_heads, self.head_width).permute(2, 0, 3, 1, 4)  # (n, heads, T, width)
        outside = ~partition.is_inside[:, None, None, :]  # (num_windows, 1, 1, T)
        outside = outside.repeat(n // outside.shape[0], 1, 1, 1)
        if simulate:
            scores = round_through((q @ k.transpose(-1, -2)).float() * (self.head_width**-0.5 / SCORE_UNIT))
            scores = scores + round_through(self.bias() / SCORE_UNIT)
            scores = scores.masked_fill(outside, -torch.inf)
            scores = (scores - scores.amax(-1, keepdim=True).detach()) * SCORE_UNIT
            weights = round_through(scores.exp() * ATTENTION_ONE)
            mixed = (weights @ v.float()) / weights.sum(-1, keepdim=True)
            mixed = fake_quantize(mixed, ACTIVATION_UNIT, simulate=True)
        else:
            mask = self.bias().to(q.dtype).masked_fill(outside, -torch.inf)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        mixed = partition.join(mixed.transpose(1, 2).reshape(n, t, -1))
        return self.project(mixed, simulate)  # type: ignore[no-any-return]


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
        is_last: the last layer's feed-forward part sees its own position alone, so that it need not be computed where
            no token is coded.
    """

    def __init__(
        self, width: int, head_width: int, mlp_ratio: int, window: int, *, has_attention: bool, is_last: bool
    ) -> None:
        super().__init__()
        self.attention = WindowAttention(width, head_width, window) if has_attention else None
        self.feed_forward = FeedForward(width, mlp_ratio * width)
        self.is_last = is_last

    def forward(self, h: Tensor, partition: WindowPartition, simulate: bool) -> Tensor:
        """Residual stream (B, h, w, C) float32 -> the same shape."""
        if self.attention is not None:
            h = h + self.attention(shift_channels(normalize(h, simulate=simulate)), partition, simulate)
            if simulate:
                h = round_through(h * (1 / RESIDUAL_UNIT)) * RESIDUAL_UNIT
        x = normalize(h, simulate=simulate)
        h = h + self.feed_forward(x if self.is_last else shift_channels(x), simulate)
        return round_through(h * (1 / RESIDUAL_UNIT)) * RESIDUAL_UNIT if simulate else h
