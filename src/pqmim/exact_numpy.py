"""The parts of the exact entropy model in NumPy: what every other kernel is checked against, and what is left if none
is exact on a machine.

Independent of the graphs (`training.entropy_graphs`), after the same description: docs/exactness.md. Every value is an
integer; where floats carry integers these are below 2^24 (float32) or 2^53 (float64). Only exact sums, table look-ups
and single correctly rounded operations occur.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pqmim.alphabets import Alphabets
from pqmim.config import EntropyModelConfig
from pqmim.fixed_point import ACTIVATION_UNIT, INT8_MAX, LOGIT_MAX, NORM_EPSILON, RESIDUAL_MAX, score_scale
from pqmim.range_coding import PRECISION

ZERO = 128
"""The uint8 that stands for 0 in activations."""

Activations = NDArray[np.uint8]
Stream = NDArray[np.float32]


class Parts(Protocol):
    """The arithmetic of the entropy model, part by part, on chunks of n rows.

    The residual stream h is (n, C) float32 that carries integers, activations x are (n, C) uint8 in which ZERO stands
    for 0.
    """

    kernel: str

    def embed(self, group: int, h: Stream, embedded: Stream) -> tuple[Stream, Activations]:
        """Add the embedding sums (n, C) of tokens of a group to the residual stream -> h, x."""
        ...

    def keys_values(self, layer: int, x: Activations) -> Activations:
        """Keys and values (n, 2 C) of content."""
        ...

    def attend(self, layer: int, x: Activations, kv: Activations, bias: Stream, mask: Stream) -> Activations:
        """What queries take from the content of their windows.

        Args:
            x: (windows, Q, C), from which the queries are made.
            kv: (windows, T, 2 C), from `keys_values`.
            bias: (heads, Q, T) integers in SCORE_UNIT, by relative position.
            mask: (windows or 1, 1, 1, T), 0 or a large negative integer where there is no content.

        Returns:
            (windows * Q, C).
        """
        ...

    def project(self, layer: int, h: Stream, mixed: Activations) -> tuple[Stream, Activations]:
        """Add the attention's output to the residual stream -> h, x."""
        ...

    def feed(self, layer: int, h: Stream, x: Activations) -> tuple[Stream, Activations]:
        """Add the feed-forward part's output to the residual stream -> h, x."""
        ...

    def head(self, group: int, x: Activations) -> Activations:
        """Output of the network -> (m, n, R), what the frequencies of the m sub-quantizers of a group are made of."""
        ...

    def frequencies(self, head: Activations, level: int, first: int) -> NDArray[np.int32]:
        """Range-coder frequencies.

        Args:
            head: (m, n, R), those of `head` that belong to the sub-quantizers from `first` on, which have equally many
                codewords.

        Returns:
            (m, n, K), each row >= 1 and summing to 2^16.
        """
        ...


def position_bias(table: NDArray[np.int32], window: int) -> Stream:
    """Table of relative positions ((2 * window - 1)^2, heads) -> (heads, T, T), of queries and keys in raster order."""
    y, x = (axis.ravel() for axis in np.mgrid[:window, :window])
    pairs = (y[:, None] - y + window - 1) * (2 * window - 1) + x[:, None] - x + window - 1
    return np.ascontiguousarray(table[pairs].transpose(2, 0, 1), np.float32)


class TokenFactors:
    """What turns head outputs into logits, by level and sub-quantizer.

    Attributes:
        alphabets: how many codewords each has.
        weight: (N, R) int8.
        scale: (L, M) float32.
        bias: (N,) int32.
    """

    def __init__(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        self.alphabets = Alphabets.of(tensors)
        self.weight: NDArray[np.int8] = tensors["entropy.token_factors.weight"]
        self.scale: NDArray[np.float32] = tensors["entropy.token_factors.scale"]
        self.bias: NDArray[np.int32] = tensors["entropy.token_bias"]

    def of(self, level: int, first: int, count: int) -> dict[str, NDArray[Any]]:
        """Those of `count` sub-quantizers that have equally many codewords: factors (m, K, R), scale (m, 1, 1), bias
        (m, 1, K)."""
        own = self.alphabets.codewords(level, first, count)
        return {
            "factors": self.weight[own].reshape(count, -1, self.weight.shape[1]),
            "scale": self.scale[level, first : first + count, None, None],
            "bias": self.bias[own].reshape(count, 1, -1),
        }


class NumpyParts:
    """`Parts` in NumPy; see there for the methods.

    Args:
        config: sizes.
        tensors: of the model file, checked.
    """

    kernel = "numpy"

    def __init__(self, config: EntropyModelConfig, num_subquantizers: int, tensors: Mapping[str, NDArray[Any]]) -> None:
        self._config = config
        self._tensors = tensors
        self._schedule = config.schedule(num_subquantizers)
        self._factors = TokenFactors(tensors)
        self._linears: dict[tuple[str, int, int], _Linear] = {}

    @property
    def alphabets(self) -> Alphabets:
        """Those of the tokens."""
        return self._factors.alphabets

    def embed(self, group: int, h: Stream, embedded: Stream) -> tuple[Stream, Activations]:
        return self._added(h, embedded * self._tensors[f"entropy.embed.{group}.scale"])

    def keys_values(self, layer: int, x: Activations) -> Activations:
        width = self._config.width
        linear = self._linear(f"layers.{layer}.attention.query_key_value", width, 3 * width)
        return _activations(linear.requantized(_values(x)))

    def attend(self, layer: int, x: Activations, kv: Activations, bias: Stream, mask: Stream) -> Activations:
        width, head_width = self._config.width, self._config.head_width
        count, num_keys, heads = len(x), kv.shape[1], width // head_width
        linear = self._linear(f"layers.{layer}.attention.query_key_value", 0, width)
        q = (
            linear.requantized(_values(x.reshape(-1, width)))
            .reshape(count, -1, heads, head_width)
            .transpose(0, 2, 1, 3)
        )
        k, v = _values(kv).reshape(count, num_keys, 2, heads, head_width).transpose(2, 0, 3, 1, 4)
        scores = q @ k.transpose(0, 1, 3, 2)  # (windows, heads, Q, T) integers
        scores *= np.float32(score_scale(head_width))
        np.rint(scores, out=scores)
        scores += bias + mask
        sink = self._tensors[f"entropy.layers.{layer}.attention.sink"].astype(np.float32)[:, None, None]
        best = np.maximum(scores.max(-1, keepdims=True), sink)
        weights = _looked_up(self._score_table, best - scores)
        total = weights.sum(-1, keepdims=True) + _looked_up(self._score_table, best - sink)
        mixed = weights @ v  # |sum| <= T * 127^2 < 2^24
        mixed /= total
        np.rint(mixed, out=mixed)
        return _activations(mixed.transpose(0, 2, 1, 3).reshape(-1, width))

    def project(self, layer: int, h: Stream, mixed: Activations) -> tuple[Stream, Activations]:
        return self._added(h, self._linear(f"layers.{layer}.attention.project")(_values(mixed)))

    def feed(self, layer: int, h: Stream, x: Activations) -> tuple[Stream, Activations]:
        hidden = self._linear(f"layers.{layer}.feed_forward.expand").requantized(_values(x))
        np.maximum(hidden, 0, out=hidden)
        return self._added(h, self._linear(f"layers.{layer}.feed_forward.project")(hidden))

    def head(self, group: int, x: Activations) -> Activations:
        first, last = self._schedule.group_bounds(group)
        rank = self._config.token_rank
        head = self._linear("head", first * rank, last * rank).requantized(_values(x))
        return _activations(head.reshape(-1, last - first, rank).transpose(1, 0, 2))

    def frequencies(self, head: Activations, level: int, first: int, *, sharpness: float = 1.0) -> NDArray[np.int32]:
        """See `Parts.frequencies`.

        Args:
            sharpness: the logits are multiplied by it (the inverse of a sampling temperature). Files are coded at 1.
        """
        factors = self._factors.of(level, first, len(head))
        logits = _values(head) @ factors["factors"].transpose(0, 2, 1).astype(np.float32)
        logits *= factors["scale"]
        np.rint(logits, out=logits)
        logits += factors["bias"].astype(np.float32)
        if sharpness != 1.0:
            logits *= np.float32(sharpness)
            np.rint(logits, out=logits)
            np.clip(logits, -LOGIT_MAX, LOGIT_MAX, out=logits)
        return frequencies_of_logits(logits, self._logit_table)

    @staticmethod
    def _added(h: Stream, update: Stream) -> tuple[Stream, Activations]:
        """Round an update, add it to the residual stream -> h, x."""
        h = h + np.rint(update)
        np.clip(h, -RESIDUAL_MAX, RESIDUAL_MAX, out=h)  # in place: before NumPy 2 the result would be float64
        return h, _normalize(h)

    @cached_property
    def _score_table(self) -> Stream:
        return self._tensors["entropy.score_table"].astype(np.float32)

    @cached_property
    def _logit_table(self) -> Stream:
        return self._tensors["entropy.logit_table"].astype(np.float32)

    def _linear(self, name: str, first: int = 0, last: int | None = None) -> _Linear:
        rows = slice(first, last)
        key = (name, first, last or 0)
        if key not in self._linears:
            weight, bias, scale = (
                self._tensors[f"entropy.{name}.{part}"][rows] for part in ("weight", "bias", "scale")
            )
            self._linears[key] = _Linear(weight, bias, scale)
        return self._linears[key]


class _Linear:
    """Integer product, integer bias, one multiplication to the unit of what follows."""

    def __init__(self, weight: NDArray[np.int8], bias: NDArray[np.int32], scale: NDArray[np.float32]) -> None:
        self._matrix = np.ascontiguousarray(weight.T, np.float32)
        self._bias, self._scale = bias.astype(np.float32), scale

    def __call__(self, x: Stream) -> Stream:
        """(n, k) integers -> (n, outputs), not rounded."""
        y = x @ self._matrix
        y += self._bias
        y *= self._scale
        return y

    def requantized(self, x: Stream) -> Stream:
        """(n, k) integers -> (n, outputs) integers in [-127, 127]."""
        y = self(x)
        np.rint(y, out=y)
        return np.clip(y, -INT8_MAX, INT8_MAX, out=y)


def _values(x: Activations) -> Stream:
    return x.astype(np.float32) - np.float32(ZERO)


def _activations(values: Stream) -> Activations:
    return (values + np.float32(ZERO)).astype(np.uint8)


def _looked_up(table: Stream, index: Stream) -> Stream:
    """Entries of a table at integers >= 0, the last one for all beyond."""
    return table[np.minimum(index, len(table) - 1).astype(np.int32)]


def _normalize(h: Stream) -> Activations:
    """Root-mean-square normalization."""
    squares = np.square(h.astype(np.float64)).sum(-1, keepdims=True) + NORM_EPSILON  # exact: below C * 2^40 < 2^53
    # NumPy's square root is the processor's instruction, which is correctly rounded.
    gain = math.sqrt(h.shape[-1]) / ACTIVATION_UNIT / np.sqrt(squares)
    normalized = h * gain.astype(np.float32)
    np.rint(normalized, out=normalized)
    return _activations(np.clip(normalized, -INT8_MAX, INT8_MAX, out=normalized))


def frequencies_of_logits(logits: Stream, table: Stream) -> NDArray[np.int32]:
    """Integer logits -> frequencies: the one place where probabilities become integers.

    Args:
        logits: (..., K) float32 integers in LOGIT_UNIT.
        table: (n,) float32 integers, exponential of minus its index in LOGIT_UNIT, decreasing from 2^15 to 0.

    Returns:
        (..., K) int32 >= 1 summing to 2^16. The most probable token (the first of equals) takes what rounding leaves.
    """
    mass = _looked_up(table, logits.max(-1, keepdims=True) - logits)
    total = mass.sum(-1, keepdims=True, dtype=np.float64)
    share = (((1 << PRECISION) - logits.shape[-1]) / total).astype(np.float32)
    mass *= share
    frequencies = np.floor(mass, out=mass).astype(np.int32) + 1
    best = logits.argmax(-1)[..., None]  # documented: the first of equals
    rest = (1 << PRECISION) - frequencies.sum(-1, keepdims=True, dtype=np.int32)
    np.put_along_axis(frequencies, best, np.take_along_axis(frequencies, best, -1) + rest, -1)
    return frequencies
