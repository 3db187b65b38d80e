"""The entropy model in exact arithmetic: known tokens -> range-coder frequencies, the same integers on every machine.

A file decodes only if the decoder computes the very frequencies that the encoder used. Floating-point networks do not
promise that: the order of a sum, a fused multiply-add or a library's `exp` changes the last bit. Here every value
between tokens and frequencies is an integer, and only four kinds of operation occur, each with one possible result:

1. *Integer matrix products*: operands of magnitude <= 127, inner dimensions <= `MAX_INNER`, so every partial sum is
   below 2^24 and exact in int32 and float32 alike, in any order of summation, fused or not.
2. *Integer sums* below 2^24 in float32 or 2^53 in float64.
3. *Table look-ups*: the exponentials. The tables are integers stored with the weights, not recomputed.
4. *Single IEEE 754 operations*, one multiplication, division or square root of exactly represented operands, correctly
   rounded by the standard on every machine and followed by rounding (half to even) or clamping.

The arithmetic is done by one of two independent implementations of `Parts`: ONNX Runtime, which has several kernels for
the products, and NumPy. When a model is loaded, each graph is run on a known question and must give NumPy's answer.
docs/exactness.md has the argument at length.

This module drives them: it cuts the grid into windows and chunks of rows, so that memory is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pqmim.entropy_kernels import choose_parts
from pqmim.entropy_weights import check_entropy_weights
from pqmim.exact_numpy import ZERO, Activations, NumpyParts, Stream
from pqmim.fixed_point import ACTIVATION_UNIT
from pqmim.grid_plan import Windows, gather_chunks, grid_plan
from pqmim.model_files import ModelFile
from pqmim.options import Device
from pqmim.runtime import Workers
from pqmim.schedule import Schedule, Step, positions_of

CHUNK_ROWS = 512
"""Positions and"""
CHUNK_WINDOWS = 8
"""windows worked on at a time: what lies between two products then fits the cache, and memory is bounded."""


@dataclass
class EntropyState:
    """What the schedule lets one keep between steps: the embedding sums of the tokens known so far.

    Attributes:
        height, width: of the token grid.
        level: of the image.
        embedded: (h * w, C) float32, integer products of the known tokens' features with the embedding.
    """

    height: int
    width: int
    level: int
    embedded: Stream


class ExactEntropyModel:
    """The entropy network in exact arithmetic.

    Args:
        model: from `model_files.load_model`.
        kernel: one of `entropy_kernels.KERNELS`; None = `PQMIM_KERNEL`, or the fastest that is exact here.
        device: where ONNX Runtime computes, if it is exact there.

    Raises:
        ConfigError: the kernel does not exist, or is not exact on this machine.
        ModelError: a weight is missing or out of bounds, or the graphs cannot be used.
    """

    def __init__(
        self, model: ModelFile, workers: Workers, *, kernel: str | None = None, device: Device = Device.CPU
    ) -> None:
        self._config = model.config.entropy
        self._workers = workers
        sizes = model.config.tokenizer.quantizer
        self.num_subquantizers, self.num_codewords = sizes.num_subquantizers, sizes.num_codewords
        self.schedule = Schedule(self.num_subquantizers, self._config.group_steps)
        tensors = model.tensors
        bounds = tensors["tokenizer.quantizer.boundaries_tensor"]
        self.runs = [slice(int(begin), int(end)) for begin, end in pairwise(bounds)]
        check_entropy_weights(tensors, self._config, self.num_subquantizers, self.num_codewords, self.runs[-1].stop)
        self._token_values: NDArray[np.int8] = tensors["entropy.token_values"]
        self.num_levels = len(self._token_values)
        self._embed_weight: NDArray[np.int8] = tensors["entropy.embed.weight"]
        self._embed_bias = tensors["entropy.embed.bias"].astype(np.float32)
        self._reference = NumpyParts(self._config, self.num_subquantizers, tensors)
        self._parts = choose_parts(model, self._reference, kernel, device)

    @property
    def kernel(self) -> str:
        """Kernel in use, one of `entropy_kernels.KERNELS`."""
        return self._parts.kernel

    def start(self, height: int, width: int, level: int) -> EntropyState:
        """State of a grid of which nothing is known but its level."""
        flag = self._embed_weight[:, self._token_values.shape[2] + self.num_subquantizers + level].astype(np.float32)
        embedded = np.tile(self._embed_bias + flag * round(1 / ACTIVATION_UNIT), (height * width, 1))
        return EntropyState(height, width, level, embedded)

    def reveal(
        self, state: EntropyState, positions: NDArray[np.int64], first: int, last: int, tokens: NDArray[np.int64]
    ) -> None:
        """Make tokens known.

        Args:
            positions: (n,) into the flattened grid.
            first, last: sub-quantizers.
            tokens: (last - first, n) in [0, K).
        """
        columns = slice(self.runs[first].start, self.runs[last - 1].stop)
        num_kept = self._token_values.shape[2]
        flags = self._embed_weight[:, num_kept + first : num_kept + last].astype(np.float32).sum(1)
        weight = self._embed_weight[:, columns].T.astype(np.float32)
        values = self._token_values[state.level]

        def reveal(rows: slice) -> None:
            known = [values[tokens[m - first, rows], self.runs[m]] for m in range(first, last)]
            product = np.concatenate(known, axis=1).astype(np.float32) @ weight
            product += flags * round(1 / ACTIVATION_UNIT)
            state.embedded[positions[rows]] += product

        self._in_chunks(reveal, len(positions))

    def reveal_grid(self, state: EntropyState, tokens: NDArray[np.int64], known: NDArray[np.bool_]) -> None:
        """Make any set of tokens known; both (M, h * w)."""
        first = 0
        while first < self.num_subquantizers:
            last = first + 1
            while last < self.num_subquantizers and np.array_equal(known[last], known[first]):
                last += 1
            positions = np.flatnonzero(known[first])
            if len(positions):
                self.reveal(state, positions, first, last, tokens[first:last, positions])
            first = last

    def hidden(self, state: EntropyState, positions: NDArray[np.int64]) -> Activations:
        """Run the network.

        Args:
            positions: (n,) into the flattened grid, where the output is wanted.

        Returns:
            (n, C), input of `head`.
        """
        plan = grid_plan(state.height, state.width, self._config.window)
        h, x = self._rows(lambda rows: self._parts.embed(state.embedded[rows]), len(state.embedded))
        for layer in range(self._config.num_layers):
            # After the attention of the last layer nothing looks at other positions.
            wanted = positions if layer == self._config.num_layers - 1 else None
            if layer % self._config.attention_every == 0:
                windows = plan.windows[layer // self._config.attention_every % 2]
                h, x = self._attend(layer, h, x, windows, wanted)
            elif wanted is not None:
                h, x = h[wanted], np.concatenate([x[wanted], x[-1:]])
            h, x = self._feed(layer, h, x, plan.shifted if wanted is None else None)
        return x[:-1]

    def _attend(
        self, layer: int, h: Stream, x: Activations, windows: Windows, wanted: NDArray[np.int64] | None
    ) -> tuple[Stream, Activations]:
        """Attention of a layer, for the positions that are wanted."""
        num_keys, row_of = self._config.window**2, windows.row_of
        mixed = np.empty((len(windows.source) * num_keys, x.shape[1]), np.uint8)

        def attend(part: slice) -> None:
            rows = slice(part.start * num_keys, part.stop * num_keys)
            mixed[rows] = self._parts.attend(layer, gather_chunks(x, windows.source[part]), windows.mask[part])

        self._workers.run(attend, self._workers.chunks(len(windows.source), CHUNK_WINDOWS))
        if wanted is not None:
            h, row_of = h[wanted], row_of[wanted]
        return self._rows(lambda rows: self._parts.project(layer, h[rows], mixed[row_of[rows]]), len(h))

    def _feed(
        self, layer: int, h: Stream, x: Activations, shifted: NDArray[np.int32] | None
    ) -> tuple[Stream, Activations]:
        """Feed-forward part of a layer, on shifted channels or on each position's own."""

        def feed(rows: slice) -> tuple[Stream, Activations]:
            return self._parts.feed(layer, h[rows], x[rows] if shifted is None else gather_chunks(x, shifted[rows]))

        return self._rows(feed, len(h))

    def _rows(self, compute: Callable[[slice], tuple[Stream, Activations]], count: int) -> tuple[Stream, Activations]:
        """Run a part on all rows, in chunks: h (n, C), and x (n + 1, C) with a last row for what lies outside."""
        h = np.empty((count, self._config.width), np.float32)
        x = np.full((count + 1, self._config.width), ZERO, np.uint8)

        def store(rows: slice) -> None:
            h[rows], x[rows] = compute(rows)

        self._in_chunks(store, count)
        return h, x

    def head(self, hidden: Activations, group: int) -> Activations:
        """Inputs of `frequencies` for a group of sub-quantizers: (n, C) from `hidden` -> (m, n, R)."""
        first, last = self.schedule.group_bounds(group)
        head = np.empty((last - first, len(hidden), self._config.token_rank), np.uint8)

        def compute(rows: slice) -> None:
            head[:, rows] = self._parts.head(group, hidden[rows])

        self._in_chunks(compute, len(hidden))
        return head

    def frequencies(self, head: Activations, level: int, first: int, *, sharpness: float = 1.0) -> NDArray[np.int32]:
        """Range-coder frequencies of the sub-quantizers from `first` on.

        Args:
            head: (m, n, R), those sub-quantizers' part of `head`; n >= 1.
            level: of the image.
            sharpness: the logits are multiplied by it (the inverse of a sampling temperature). Files are coded at 1.

        Returns:
            (m, n, K), each row >= 1 and summing to 2^16.
        """
        if sharpness != 1.0:
            return self._reference.frequencies(head, level, first, sharpness=sharpness)
        return self._parts.frequencies(head, level, first)

    def frequency_blocks(
        self, head: Activations, level: int, first: int, blocks: Sequence[tuple[slice, slice]]
    ) -> Iterator[NDArray[np.int32]]:
        """`frequencies` of parts of a head, given as sub-quantizers and positions; computed ahead where threads are."""
        return self._workers.map(
            lambda block: self.frequencies(np.ascontiguousarray(head[block]), level, first + block[0].start), blocks
        )

    def positions(self, state: EntropyState, step: Step) -> NDArray[np.int64]:
        """Positions of a step: (n,) into the flattened grid, raster order; n may be 0."""
        return positions_of(step, state.height, state.width)

    def _in_chunks(self, function: Callable[[slice], None], count: int) -> None:
        self._workers.run(function, self._workers.chunks(count, CHUNK_ROWS))
