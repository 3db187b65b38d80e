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

`exact_layers` cuts the grid into windows and chunks. This module goes through the steps and keeps what is computed for
known tokens. The network is that of `training.entropy_model`: content of the first group's tokens is
worked on once, when the step that codes it is over; later groups pass over all positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pqmim.alphabets import Alphabets
from pqmim.config import EntropyModelConfig
from pqmim.entropy_kernels import choose_parts
from pqmim.entropy_weights import check_entropy_weights
from pqmim.exact_layers import Content, ExactLayers, Positions, Rows
from pqmim.exact_numpy import Activations, NumpyParts, Stream
from pqmim.grid_plan import grid_plan
from pqmim.model_files import ModelFile
from pqmim.options import Device
from pqmim.runtime import Workers
from pqmim.schedule import NUM_QUINCUNX_STEPS, Step, positions_of


class EntropyState:
    """What is known of a grid while it is coded in the order of the schedule.

    Attributes:
        height, width: of the token grid.
        level: of the image.
        plan: of the grid.
        stream: that of all positions, as the next pass of a later group begins with it; in the first group that of the
            content so far.
        output: that of the positions that the present later group has coded, as the group after it begins.
        content: of the first group, while it is coded.
        waiting: a step of the first group whose content is not yet computed, and the embedding sums of its tokens.
    """

    def __init__(self, height: int, width: int, level: int, config: EntropyModelConfig) -> None:
        self.height, self.width, self.level = height, width, level
        self.plan = grid_plan(height, width, config.window)
        self.stream = Rows.empty(height * width, config.width)
        self.output: Rows | None = None
        self.content = Content(self.plan)
        self.waiting: tuple[Step, Stream] | None = None


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
        tensors = model.tensors
        self.alphabets = Alphabets.of(tensors)
        self.num_subquantizers = self.alphabets.num_subquantizers
        self.schedule = self._config.schedule(self.num_subquantizers)
        check_entropy_weights(tensors, self._config, self.alphabets)
        self._static_frequencies: NDArray[np.int32] = tensors["entropy.static_frequencies"]
        self._reference = NumpyParts(self._config, self.num_subquantizers, tensors)
        self._parts = choose_parts(model, self._reference, kernel, device)
        self._layers = ExactLayers(self._config, self.schedule, tensors, self._parts, workers)

    @property
    def kernel(self) -> str:
        """Kernel in use, one of `entropy_kernels.KERNELS`."""
        return self._parts.kernel

    # -- in the order of the schedule --------------------------------------------------------------------------

    def steps(self, level: int) -> tuple[Step, ...]:
        """Steps in which there is anything to code at a level, or in a later step."""
        end = self.alphabets.end(level)
        return tuple(step for step in self.schedule.steps if step.first < end)

    def num_groups(self, level: int) -> int:
        """Groups up to the last one of which anything is coded at a level."""
        return self.steps(level)[-1].group + 1

    def start(self, height: int, width: int, level: int) -> EntropyState:
        """State of a grid of which nothing is known but its level."""
        return EntropyState(height, width, level, self._config)

    def positions(self, state: EntropyState, step: Step) -> Positions:
        """Positions of a step: (n,) into the flattened grid, raster order; n may be 0."""
        return positions_of(step, state.height, state.width)

    def head(self, state: EntropyState, step: Step) -> Activations | None:
        """Run the network for a step, with all tokens of earlier steps revealed.

        Returns:
            (m, n, R), what `frequencies` are made of; None for the first step, which has static ones and needs no
            network.
        """
        positions = self.positions(state, step)
        if step == self.schedule.steps[0]:
            return None
        self._finish_content(state)
        if step.group == 0:
            queries = self._layers.embedded_start(state.level, len(positions))
            places = (step.begin, step.end, step.begin)
            _, output = self._layers.first_layers(state.content, positions, queries, places, None, is_content=False)
        else:
            state.content = Content(state.plan)
            output = self._layers.later_layers(state.plan, state.stream, step.group, positions)
            if step.group < self.schedule.num_groups - 1:  # another group goes on from it
                if state.output is None:
                    state.output = Rows.empty(state.plan.count, self._config.width)
                state.output.put(positions, output)
        return self._layers.head(output.x, step.group)

    def reveal(self, state: EntropyState, step: Step, tokens: NDArray[np.int64]) -> None:
        """Make the tokens of a step known.

        Args:
            tokens: (m, n) in [0, K), of the positions of the step.
        """
        positions = self.positions(state, step)
        is_end = step == self.schedule.steps_of(step.group)[-1]
        if step == self.steps(state.level)[-1] or len(positions) == 0:
            pass  # nobody asks for more
        elif step.group == 0:
            self._finish_content(state)
            state.waiting = (step, self._layers.sums(0, tokens, None, state.level))
        else:
            sums = self._layers.sums(step.group, tokens, None, state.level)
            for stream in (state.output, None if is_end else state.stream):
                if stream is not None:
                    stream.put(positions, self._layers.embed(step.group, stream.h[positions], sums))
        if is_end and step.group > 0 and state.output is not None:
            state.stream, state.output = state.output, None

    def _finish_content(self, state: EntropyState) -> None:
        """Run the content that waits through the layers of the first group."""
        if state.waiting is None:
            return
        step, sums = state.waiting
        state.waiting = None
        positions, places = self.positions(state, step), (step.begin, step.end, step.end)
        rows = self._layers.embed(0, np.zeros_like(sums), sums)
        rows, _ = self._layers.first_layers(state.content, positions, rows, places, None, is_content=True)
        state.stream.put(positions, rows)

    # -- any known tokens --------------------------------------------------------------------------------------

    def heads_of_known(
        self, height: int, width: int, level: int, tokens: NDArray[np.int64], known: NDArray[np.bool_]
    ) -> Iterator[Activations]:
        """Run the network for any set of known tokens.

        Args:
            tokens, known: (M, h * w).

        Yields:
            For each group (m, n, R) at the n positions where any of its tokens are unknown; each when it is asked for.
        """
        state = self.start(height, width, level)
        groups = [slice(*self.schedule.group_bounds(group)) for group in range(self.schedule.num_groups)]
        is_known: NDArray[np.bool_] = known[groups[0]].max(0)
        is_complete = known[groups[0]].all(0)
        places = (0, NUM_QUINCUNX_STEPS, NUM_QUINCUNX_STEPS)

        def first_group(positions: Positions, *, is_content: bool) -> tuple[Rows, Rows]:
            sums = self._layers.sums(0, tokens[groups[0], positions], known[groups[0], positions], level)
            rows = self._layers.embed(0, np.zeros_like(sums), sums)
            return self._layers.first_layers(state.content, positions, rows, places, is_known, is_content=is_content)

        content, queries = np.flatnonzero(is_known), np.flatnonzero(~is_complete)
        state.stream.put(content, first_group(content, is_content=True)[0])
        before, output = first_group(queries, is_content=False)
        state.stream.put(queries, before)
        state.content = Content(state.plan)
        yield self._layers.head(output.x, 0)
        for group in range(1, self.schedule.num_groups):
            here = np.flatnonzero(known[groups[group]].any(0))
            sums = self._layers.sums(group, tokens[groups[group], here], known[groups[group], here], level)
            state.stream.put(here, self._layers.embed(group, state.stream.h[here], sums))
            state.stream = self._layers.later_layers(state.plan, state.stream, group, np.arange(state.plan.count))
            unknown = np.flatnonzero(~known[groups[group]].all(0))
            yield self._layers.head(state.stream.x[unknown], group)

    # -- frequencies -------------------------------------------------------------------------------------------

    def static_frequencies(self, level: int, first: int, count: int) -> NDArray[np.int32]:
        """Frequencies (m, K) of `count` sub-quantizers that have equally many codewords, wherever they are: those of
        the first step, which need no network."""
        return self._static_frequencies[self.alphabets.codewords(level, first, count)].reshape(count, -1)

    def frequencies(self, head: Activations, level: int, first: int, *, sharpness: float = 1.0) -> NDArray[np.int32]:
        """Range-coder frequencies of the sub-quantizers from `first` on.

        Args:
            head: (m, n, R), the part of `head` of m sub-quantizers that have equally many codewords; n >= 1.
            level: of the image.
            sharpness: the logits are multiplied by it (the inverse of a sampling temperature). Files are coded at 1.

        Returns:
            (m, n, K), each row >= 1 and summing to 2^16.
        """
        if sharpness != 1.0:
            return self._reference.frequencies(head, level, first, sharpness=sharpness)
        return self._parts.frequencies(head, level, first)

    def frequency_blocks(
        self, head: Activations | None, level: int, first: int, blocks: Sequence[tuple[slice, slice]]
    ) -> Iterator[NDArray[np.int32]]:
        """`frequencies` of parts of a head, given as sub-quantizers (that have equally many codewords) and positions.

        Without a head they are those of the first step. They are small: other threads that computed them ahead would
        hold up the one that codes by more than they save.
        """
        if head is None:
            for rows, columns in blocks:
                static = self.static_frequencies(level, first + rows.start, rows.stop - rows.start)
                yield np.repeat(static[:, None], columns.stop - columns.start, axis=1)
            return
        for rows, columns in blocks:
            yield self.frequencies(np.ascontiguousarray(head[rows, columns]), level, first + rows.start)
