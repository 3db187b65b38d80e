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

This module drives them: it cuts the grid into windows and chunks of rows, so that memory is bounded, and keeps what is
computed for known tokens. The network is that of `training.entropy_model`: content of the first group's tokens is
worked on once, when the step that codes it is over; later groups pass over all positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pqmim.entropy_kernels import choose_parts
from pqmim.entropy_weights import check_entropy_weights
from pqmim.exact_numpy import ZERO, Activations, NumpyParts, Stream, position_bias
from pqmim.fixed_point import ACTIVATION_UNIT
from pqmim.grid_plan import OUTSIDE, gather, grid_plan
from pqmim.model_files import ModelFile
from pqmim.options import Device
from pqmim.runtime import Workers
from pqmim.schedule import NUM_QUINCUNX_STEPS, Schedule, Step, positions_of

CHUNK_ROWS = 512
"""Positions that are worked on at a time, and keys in windows: what lies between two products then fits the cache, and
memory is bounded."""

Positions = NDArray[np.int64]
"""(n,) into the flattened grid, ascending."""


@dataclass
class Rows:
    """The residual stream at some positions.

    Attributes:
        h: (n, C).
        x: (n, C), its normalization.
    """

    h: Stream
    x: Activations

    @classmethod
    def empty(cls, count: int, width: int) -> Rows:
        """Room for `count` rows."""
        return cls(np.empty((count, width), np.float32), np.empty((count, width), np.uint8))

    def put(self, where: Positions | slice, rows: Rows) -> None:
        """Overwrite some rows."""
        self.h[where], self.x[where] = rows.h, rows.x

    def take(self, where: Positions) -> Rows:
        """Some rows."""
        return Rows(self.h[where], self.x[where])


class Content:
    """What the first group's layers keep of known tokens, and show to others.

    Attributes:
        for_attention, for_feed: by layer, (h * w + 1, C / 2), the channels that neighbors mix in before attention and
            before the feed-forward part; ZERO where nothing is known, and outside.
        kv: by layer, (W, T, 2 C), keys and values at the places of the layer's windows.
    """

    def __init__(self) -> None:
        self.for_attention: dict[int, Activations] = {}
        self.for_feed: dict[int, Activations] = {}
        self.kv: dict[int, Activations] = {}


class EntropyState:
    """What is known of a grid while it is coded in the order of the schedule.

    Attributes:
        height, width: of the token grid.
        level: of the image.
        stream: that of all positions, as the next pass of a later group begins with it; in the first group that of the
            content so far.
        output: that of the positions that the present later group has coded, as the group after it begins.
        content: of the first group, while it is coded.
        waiting: a step of the first group whose content is not yet computed, and the embedding sums of its tokens.
    """

    def __init__(self, height: int, width: int, level: int, num_channels: int) -> None:
        self.height, self.width, self.level = height, width, level
        self.stream = Rows.empty(height * width, num_channels)
        self.output: Rows | None = None
        self.content: Content | None = Content()
        self.waiting: tuple[Step, Stream] | None = None

    @property
    def num_positions(self) -> int:
        """Of the grid."""
        return self.height * self.width


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
        check_entropy_weights(tensors, self._config, self.runs, self.num_codewords)
        self._token_values: NDArray[np.int8] = tensors["entropy.token_values"]
        self.num_levels = len(self._token_values)
        self._first_frequencies: NDArray[np.int32] = tensors["entropy.first_frequencies"]
        self._embed_bias = tensors["entropy.embed.0.bias"].astype(np.float32)
        self._tensors = tensors
        self._reference = NumpyParts(self._config, self.num_subquantizers, tensors)
        self._parts = choose_parts(model, self._reference, kernel, device)
        self._embed_matrix = cache(self._make_embed_matrix)
        self._bias_of = cache(self._make_bias)

    @property
    def kernel(self) -> str:
        """Kernel in use, one of `entropy_kernels.KERNELS`."""
        return self._parts.kernel

    # -- in the order of the schedule --------------------------------------------------------------------------

    def start(self, height: int, width: int, level: int) -> EntropyState:
        """State of a grid of which nothing is known but its level."""
        return EntropyState(height, width, level, self._config.width)

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
            queries = self._embedded_start(state.level, len(positions))
            places = (step.begin, step.end, step.begin)
            _, output = self._first_layers(state, positions, queries, places, None, is_content=False)
        else:
            state.content = None
            output = self._later_layers(state, state.stream, step.group, positions)
            if step.group < self.schedule.num_groups - 1:  # another group goes on from it
                if state.output is None:
                    state.output = Rows.empty(state.num_positions, self._config.width)
                state.output.put(positions, output)
        return self._head(output.x, step.group)

    def reveal(self, state: EntropyState, step: Step, tokens: NDArray[np.int64]) -> None:
        """Make the tokens of a step known.

        Args:
            tokens: (m, n) in [0, K), of the positions of the step.
        """
        positions = self.positions(state, step)
        is_end = step == self.schedule.steps_of(step.group)[-1]
        if (is_end and step.group == self.schedule.num_groups - 1) or len(positions) == 0:
            pass  # nobody asks for more
        elif step.group == 0:
            self._finish_content(state)
            state.waiting = (step, self._sums(0, tokens, None, state.level))
        else:
            sums = self._sums(step.group, tokens, None, state.level)
            for stream in (state.output, None if is_end else state.stream):
                if stream is not None:
                    stream.put(positions, self._embed(step.group, stream.h[positions], sums))
        if is_end and step.group > 0 and state.output is not None:
            state.stream, state.output = state.output, None

    def _finish_content(self, state: EntropyState) -> None:
        """Run the content that waits through the layers of the first group."""
        if state.waiting is None:
            return
        step, sums = state.waiting
        state.waiting = None
        positions, places = self.positions(state, step), (step.begin, step.end, step.end)
        rows = self._embed(0, np.zeros_like(sums), sums)
        rows, _ = self._first_layers(state, positions, rows, places, None, is_content=True)
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
            sums = self._sums(0, tokens[groups[0], positions], known[groups[0], positions], level)
            rows = self._embed(0, np.zeros_like(sums), sums)
            return self._first_layers(state, positions, rows, places, is_known, is_content=is_content)

        content, queries = np.flatnonzero(is_known), np.flatnonzero(~is_complete)
        state.stream.put(content, first_group(content, is_content=True)[0])
        before, output = first_group(queries, is_content=False)
        state.stream.put(queries, before)
        state.content = None
        yield self._head(output.x, 0)
        for group in range(1, self.schedule.num_groups):
            here = np.flatnonzero(known[groups[group]].any(0))
            sums = self._sums(group, tokens[groups[group], here], known[groups[group], here], level)
            state.stream.put(here, self._embed(group, state.stream.h[here], sums))
            state.stream = self._later_layers(state, state.stream, group, np.arange(state.num_positions))
            unknown = np.flatnonzero(~known[groups[group]].all(0))
            yield self._head(state.stream.x[unknown], group)

    # -- frequencies -------------------------------------------------------------------------------------------

    def static_frequencies(self, level: int) -> NDArray[np.int32]:
        """Frequencies (m, K) of the tokens of the first step, wherever they are; they need no network."""
        frequencies: NDArray[np.int32] = self._first_frequencies[level]
        return frequencies

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
        self, head: Activations | None, level: int, first: int, blocks: Sequence[tuple[slice, slice]]
    ) -> Iterator[NDArray[np.int32]]:
        """`frequencies` of parts of a head, given as sub-quantizers and positions; computed ahead where threads are.

        Without a head they are those of the first step.
        """
        if head is None:
            static = self.static_frequencies(level)
            for rows, columns in blocks:
                count = columns.stop - columns.start
                yield np.repeat(static[rows, None], count, axis=1)
            return
        yield from self._workers.map(
            lambda block: self.frequencies(np.ascontiguousarray(head[block]), level, first + block[0].start), blocks
        )

    # -- the network -------------------------------------------------------------------------------------------

    def _first_layers(
        self,
        state: EntropyState,
        positions: Positions,
        rows: Rows,
        places: tuple[int, int, int],
        is_known: NDArray[np.bool_] | None,
        *,
        is_content: bool,
    ) -> tuple[Rows, Rows]:
        """The layers of the first group.

        Args:
            positions: of the rows.
            places: quincunx steps, the first one and the end of those that the positions are of, and the end of those
                that are seen.
            is_known: (h * w,), where there is content; None = at all places that are seen.
            is_content: whether the rows are content, which is kept, or queries.

        Returns:
            Rows before the last layer, and, of queries, behind it.
        """
        assert state.content is not None
        content, layers = state.content, self._config.layers_of(0)
        count, half = state.num_positions, self._config.width // 2

        def shown(kept: dict[int, Activations], layer: int, rows: Rows) -> Activations:
            if layer not in kept:
                kept[layer] = np.full((count + 1, half), ZERO, np.uint8)
            if is_content:
                kept[layer][positions] = rows.x[:, half:]
            return kept[layer]

        before = rows
        for layer in layers:
            if self._config.is_last(layer):
                before = rows
            if self._config.has_attention(layer):
                if layer not in content.kv:
                    content.kv[layer] = self._room_for_keys_values(state, layer)
                mixed = self._attend(
                    state,
                    layer,
                    positions,
                    rows.x,
                    shown(content.for_attention, layer, rows),
                    places,
                    is_known,
                    content.kv[layer],
                    keeps=is_content,
                )
                if is_content and self._config.is_last(layer):
                    break
                rows = self._project(layer, rows, mixed, None if rows is before else rows)
            elif is_content and self._config.is_last(layer):
                break
            seen = None if self._config.is_last(layer) else shown(content.for_feed, layer, rows)
            rows = self._feed(state, layer, positions, rows, seen, None if rows is before else rows)
        return before, rows

    def _room_for_keys_values(self, state: EntropyState, layer: int) -> Activations:
        plan = grid_plan(state.height, state.width, self._config.window)
        windows = plan.windows[self._config.is_shifted(layer)]
        return np.full((*windows.positions.shape, 2 * self._config.width), ZERO, np.uint8)

    def _later_layers(self, state: EntropyState, rows: Rows, group: int, wanted: Positions) -> Rows:
        """The layers of a later group, in which all positions see all; the output is for those that are wanted."""
        everywhere, half = np.arange(state.num_positions), self._config.width // 2
        places = (0, NUM_QUINCUNX_STEPS, NUM_QUINCUNX_STEPS)

        def shown(rows: Rows) -> Activations:
            return np.concatenate([rows.x[:, half:], np.full((1, half), ZERO, np.uint8)])

        start = rows
        for layer in self._config.layers_of(group):
            if self._config.has_attention(layer):
                mixed = self._attend(state, layer, everywhere, rows.x, shown(rows), places, None, None, keeps=False)
                rows = self._project(layer, rows, mixed, None if rows is start else rows)
            if self._config.is_last(layer):
                rows = rows.take(wanted)
                return self._feed(state, layer, wanted, rows, None, rows)
            rows = self._feed(state, layer, everywhere, rows, shown(rows), None if rows is start else rows)
        raise AssertionError("a group has a last layer")

    def _attend(
        self,
        state: EntropyState,
        layer: int,
        positions: Positions,
        x: Activations,
        seen: Activations,
        places: tuple[int, int, int],
        is_known: NDArray[np.bool_] | None,
        kv: Activations | None,
        *,
        keeps: bool,
    ) -> Callable[[slice], Activations]:
        """Attention of a layer.

        Args:
            x: (n, C), of the positions.
            seen: (h * w + 1, C / 2), what neighbors mix in.
            places, is_known: see `_first_layers`.
            kv: keys and values of content; None = those of the positions, for this time alone.
            keeps: whether those of the positions are to be put there.

        Returns:
            What gives some of the rows (n, C).
        """
        plan = grid_plan(state.height, state.width, self._config.window)
        windows = plan.windows[self._config.is_shifted(layer)]
        begin, end, num_keys = (int(windows.ends[place]) for place in places)
        num_queries, width = end - begin, self._config.width
        own = np.concatenate([x, np.full((1, width), ZERO, np.uint8)])
        row_of = np.full(state.num_positions + 1, len(positions))
        row_of[positions] = np.arange(len(positions))
        has_content = np.ones(state.num_positions + 1, np.bool_)
        has_content[:-1] = True if is_known is None else is_known
        has_content[-1] = False
        bias = self._bias_of(layer, begin, end, num_keys)
        is_wanted = not (keeps and self._config.is_last(layer))  # nothing follows content's last attention
        mixed = np.empty((len(windows.positions) * num_queries if is_wanted else 0, width), np.uint8)

        def attend(part: slice) -> None:
            at = windows.positions[part, begin:end]
            y = gather(own[row_of[at.ravel()]], seen, plan.neighbors[at.ravel()])
            if kv is None or keeps:
                own_kv = self._parts.keys_values(layer, y).reshape(*at.shape, 2 * width)
            if kv is None:
                here = own_kv
            else:
                if keeps:
                    kv[part, begin:end] = own_kv
                here = np.ascontiguousarray(kv[part, :num_keys])
            if is_wanted:
                has = has_content[windows.positions[part, None, None, :num_keys]]
                mask = np.where(has[:1] if has.all() else has, np.float32(0), np.float32(OUTSIDE))
                rows = slice(part.start * num_queries, part.stop * num_queries)
                mixed[rows] = self._parts.attend(layer, y.reshape(*at.shape, width), here, bias, mask)

        chunk = max(1, CHUNK_ROWS // max(num_queries, num_keys))
        self._workers.run(attend, self._workers.chunks(len(windows.positions), chunk))
        window_of, place = np.divmod(windows.place_of[positions], len(windows.order))
        place_of = window_of * num_queries + place - begin
        return lambda part: mixed[place_of[part]]

    def _project(self, layer: int, rows: Rows, mixed: Callable[[slice], Activations], into: Rows | None) -> Rows:
        """Output of the attention of a layer, from what gives some of its rows."""
        return self._rows(lambda part: self._parts.project(layer, rows.h[part], mixed(part)), len(rows.h), into)

    def _feed(
        self,
        state: EntropyState,
        layer: int,
        positions: Positions,
        rows: Rows,
        seen: Activations | None,
        into: Rows | None,
    ) -> Rows:
        """Feed-forward part of a layer, on channels of neighbors too or on each position's own."""
        neighbors = grid_plan(state.height, state.width, self._config.window).neighbors

        def feed(part: slice) -> tuple[Stream, Activations]:
            x = rows.x[part] if seen is None else gather(rows.x[part], seen, neighbors[positions[part]])
            return self._parts.feed(layer, rows.h[part], x)

        return self._rows(feed, len(positions), into)

    def _embed(self, group: int, h: Stream, sums: Stream) -> Rows:
        return self._rows(lambda part: self._parts.embed(group, h[part], sums[part]), len(h))

    def _embedded_start(self, level: int, count: int) -> Rows:
        """Queries at positions of which nothing is known."""
        sums = self._start_sums(level)[None]
        row = self._embed(0, np.zeros_like(sums), sums)
        return Rows(row.h.repeat(count, axis=0), row.x.repeat(count, axis=0))

    def _start_sums(self, level: int) -> Stream:
        """(C,): embedding sums where nothing is known."""
        flag = self._tensors["entropy.embed.0.weight"][:, level - self.num_levels].astype(np.float32)
        return self._embed_bias + flag * np.float32(1 / ACTIVATION_UNIT)

    def _sums(self, group: int, tokens: NDArray[np.int64], known: NDArray[np.bool_] | None, level: int) -> Stream:
        """Products of the features of tokens with the embedding.

        Args:
            tokens: (m, n), of the group.
            known: (m, n); None = all.

        Returns:
            (n, C), with what stands for the level and the bias in the first group.
        """
        matrix, of_column = self._embed_matrix(group)
        first, last = self.schedule.group_bounds(group)
        columns = slice(self.runs[first].start, self.runs[last - 1].stop)
        values = np.ascontiguousarray(self._token_values[level, :, columns].T, np.float32)  # (D, K)
        starts = np.arange(len(values))[:, None] * self.num_codewords
        sums = np.empty((tokens.shape[1], self._config.width), np.float32)

        def add_up(part: slice) -> None:
            features = np.empty((len(matrix), part.stop - part.start), np.float32)
            values.ravel().take(tokens[:, part][of_column] + starts, out=features[: len(values)])
            features[len(values) :] = 1 / ACTIVATION_UNIT
            if known is not None:
                features[: len(values)] *= known[:, part][of_column]
                features[len(values) :] *= known[:, part]
            np.matmul(features.T, matrix, out=sums[part])
            if group == 0:
                sums[part] += self._start_sums(level)

        self._in_chunks(add_up, len(sums))
        return sums

    def _make_embed_matrix(self, group: int) -> tuple[Stream, NDArray[np.int64]]:
        """Weights (D + m, C) of the embedding of a group, and the sub-quantizer of each of its D channels."""
        first, last = self.schedule.group_bounds(group)
        of_column = np.concatenate([np.full(run.stop - run.start, m) for m, run in enumerate(self.runs[first:last])])
        weight = self._tensors[f"entropy.embed.{group}.weight"][:, : len(of_column) + last - first]
        return np.ascontiguousarray(weight.T, np.float32), of_column

    def _make_bias(self, layer: int, begin: int, end: int, num_keys: int) -> Stream:
        """Position bias (heads, Q, T) of the places from `begin` to `end` towards the first ones."""
        table = self._tensors[f"entropy.layers.{layer}.attention.position_bias"]
        side = self._config.window
        order = grid_plan(side, side, side).windows[self._config.is_shifted(layer)].order
        bias = position_bias(table, side)[:, order[begin:end]]
        return np.ascontiguousarray(bias[:, :, order[:num_keys]])

    def _rows(
        self, compute: Callable[[slice], tuple[Stream, Activations]], count: int, into: Rows | None = None
    ) -> Rows:
        """Run a part on all rows, in chunks; the outcome may take the place of the rows that it is made of."""
        rows = Rows.empty(count, self._config.width) if into is None else into

        def store(part: slice) -> None:
            rows.h[part], rows.x[part] = compute(part)

        self._in_chunks(store, count)
        return rows

    def _head(self, hidden: Activations, group: int) -> Activations:
        """Output of the network (n, C) -> what the frequencies of a group are made of, (m, n, R)."""
        first, last = self.schedule.group_bounds(group)
        head = np.empty((last - first, len(hidden), self._config.token_rank), np.uint8)

        def compute(part: slice) -> None:
            head[:, part] = self._parts.head(group, hidden[part])

        self._in_chunks(compute, len(hidden))
        return head

    def _in_chunks(self, function: Callable[[slice], None], count: int) -> None:
        self._workers.run(function, self._workers.chunks(count, CHUNK_ROWS))
