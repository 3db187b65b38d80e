"""The layers of the entropy network in exact arithmetic, on any positions of a grid.

Cuts the grid into windows and chunks of rows, so that memory is bounded; the arithmetic on a chunk is that of `Parts`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pqmim.alphabets import Alphabets
from pqmim.config import EntropyModelConfig
from pqmim.exact_numpy import ZERO, Activations, Parts, Stream, position_bias
from pqmim.fixed_point import ACTIVATION_UNIT
from pqmim.grid_plan import OUTSIDE, GridPlan, gather, grid_plan
from pqmim.runtime import Workers
from pqmim.schedule import NUM_QUINCUNX_STEPS, Schedule

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
        plan: of the grid.
        for_attention, for_feed: by layer, (h * w + 1, C / 2), the channels that neighbors mix in before attention and
            before the feed-forward part; ZERO where nothing is known, and outside.
        kv: by layer, (W, T, 2 C), keys and values at the places of the layer's windows.
    """

    def __init__(self, plan: GridPlan) -> None:
        self.plan = plan
        self.for_attention: dict[int, Activations] = {}
        self.for_feed: dict[int, Activations] = {}
        self.kv: dict[int, Activations] = {}


class ExactLayers:
    """Embedding, layers and head.

    Args:
        config: sizes.
        schedule: whose groups have layers of their own.
        tensors: of the model file, checked.
        parts: the arithmetic.
    """

    def __init__(
        self,
        config: EntropyModelConfig,
        schedule: Schedule,
        tensors: Mapping[str, NDArray[Any]],
        parts: Parts,
        workers: Workers,
    ) -> None:
        self._config, self._schedule, self._tensors = config, schedule, tensors
        self._parts, self._workers = parts, workers
        self._alphabets = Alphabets.of(tensors)
        self._token_values = tensors["entropy.token_values"].astype(np.float32)
        self._embed_bias = tensors["entropy.embed.0.bias"].astype(np.float32)
        self._embed_matrix = cache(self._make_embed_matrix)
        self._bias_of = cache(self._make_bias)

    def first_layers(
        self,
        content: Content,
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
        plan, layers = content.plan, self._config.layers_of(0)
        count, half = plan.count, self._config.width // 2

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
                    content.kv[layer] = self._room_for_keys_values(plan, layer)
                mixed = self._attend(
                    plan,
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
            rows = self._feed(plan, layer, positions, rows, seen, None if rows is before else rows)
        return before, rows

    def _room_for_keys_values(self, plan: GridPlan, layer: int) -> Activations:
        windows = plan.windows[self._config.is_shifted(layer)]
        return np.full((*windows.positions.shape, 2 * self._config.width), ZERO, np.uint8)

    def later_layers(self, plan: GridPlan, rows: Rows, group: int, wanted: Positions) -> Rows:
        """The layers of a later group, in which all positions see all; the output is for those that are wanted."""
        everywhere, half = np.arange(plan.count), self._config.width // 2
        places = (0, NUM_QUINCUNX_STEPS, NUM_QUINCUNX_STEPS)

        def shown(rows: Rows) -> Activations:
            return np.concatenate([rows.x[:, half:], np.full((1, half), ZERO, np.uint8)])

        start = rows
        for layer in self._config.layers_of(group):
            if self._config.has_attention(layer):
                mixed = self._attend(plan, layer, everywhere, rows.x, shown(rows), places, None, None, keeps=False)
                rows = self._project(layer, rows, mixed, None if rows is start else rows)
            if self._config.is_last(layer):
                rows = rows.take(wanted)
                return self._feed(plan, layer, wanted, rows, None, rows)
            rows = self._feed(plan, layer, everywhere, rows, shown(rows), None if rows is start else rows)
        raise AssertionError("a group has a last layer")

    def _attend(
        self,
        plan: GridPlan,
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
        windows = plan.windows[self._config.is_shifted(layer)]
        begin, end, num_keys = (int(windows.ends[place]) for place in places)
        num_queries, width = end - begin, self._config.width
        own = np.concatenate([x, np.full((1, width), ZERO, np.uint8)])
        row_of = np.full(plan.count + 1, len(positions))
        row_of[positions] = np.arange(len(positions))
        has_content = np.ones(plan.count + 1, np.bool_)
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
        self._workers.run_chunks(attend, len(windows.positions), chunk)
        window_of, place = np.divmod(windows.place_of[positions], len(windows.order))
        place_of = window_of * num_queries + place - begin
        return lambda part: mixed[place_of[part]]

    def _project(self, layer: int, rows: Rows, mixed: Callable[[slice], Activations], into: Rows | None) -> Rows:
        """Output of the attention of a layer, from what gives some of its rows."""
        return self._rows(lambda part: self._parts.project(layer, rows.h[part], mixed(part)), len(rows.h), into)

    def _feed(
        self,
        plan: GridPlan,
        layer: int,
        positions: Positions,
        rows: Rows,
        seen: Activations | None,
        into: Rows | None,
    ) -> Rows:
        """Feed-forward part of a layer, on channels of neighbors too or on each position's own."""

        def feed(part: slice) -> tuple[Stream, Activations]:
            x = rows.x[part] if seen is None else gather(rows.x[part], seen, plan.neighbors[positions[part]])
            return self._parts.feed(layer, rows.h[part], x)

        return self._rows(feed, len(positions), into)

    def embed(self, group: int, h: Stream, sums: Stream) -> Rows:
        return self._rows(lambda part: self._parts.embed(group, h[part], sums[part]), len(h))

    def embedded_start(self, level: int, count: int) -> Rows:
        """Queries at positions of which nothing is known."""
        sums = self._start_sums(level)[None]
        row = self.embed(0, np.zeros_like(sums), sums)
        return Rows(row.h.repeat(count, axis=0), row.x.repeat(count, axis=0))

    def _start_sums(self, level: int) -> Stream:
        """(C,): embedding sums where nothing is known."""
        flag = self._tensors["entropy.embed.0.weight"][:, level - self._alphabets.num_levels].astype(np.float32)
        return self._embed_bias + flag * np.float32(1 / ACTIVATION_UNIT)

    def sums(self, group: int, tokens: NDArray[np.int64], known: NDArray[np.bool_] | None, level: int) -> Stream:
        """Products of the features of tokens with the embedding.

        Args:
            tokens: (m, n), of the group.
            known: (m, n); None = all.

        Returns:
            (n, C), with what stands for the level and the bias in the first group.
        """
        matrix, of_column, offsets = self._embed_matrix(group)
        own, count = slice(*self._schedule.group_bounds(group)), len(of_column)
        starts = (self._alphabets.value_starts[level, own][of_column] + offsets)[:, None]
        places = tokens * self._alphabets.channels[own, None]
        sums = np.empty((tokens.shape[1], self._config.width), np.float32)

        def add_up(part: slice) -> None:
            features = np.empty((len(matrix), part.stop - part.start), np.float32)
            self._token_values.take(places[:, part][of_column] + starts, out=features[:count])
            features[count:] = 1 / ACTIVATION_UNIT
            if known is not None:
                features[:count] *= known[:, part][of_column]
                features[count:] *= known[:, part]
            np.matmul(features.T, matrix, out=sums[part])
            if group == 0:
                sums[part] += self._start_sums(level)

        self._in_chunks(add_up, len(sums))
        return sums

    def _make_embed_matrix(self, group: int) -> tuple[Stream, NDArray[np.int64], NDArray[np.int64]]:
        """Weights (D + m, C) of the embedding of a group; the sub-quantizer of each of its D channels, and the number
        of the channel there."""
        first, last = self._schedule.group_bounds(group)
        channels = self._alphabets.channels[first:last]
        of_column = np.arange(last - first).repeat(channels)
        offsets = np.arange(len(of_column)) - (channels.cumsum() - channels)[of_column]
        weight = self._tensors[f"entropy.embed.{group}.weight"][:, : len(of_column) + last - first]
        return np.ascontiguousarray(weight.T, np.float32), of_column, offsets

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

    def head(self, hidden: Activations, group: int) -> Activations:
        """Output of the network (n, C) -> what the frequencies of a group are made of, (m, n, R)."""
        first, last = self._schedule.group_bounds(group)
        head = np.empty((last - first, len(hidden), self._config.token_rank), np.uint8)

        def compute(part: slice) -> None:
            head[:, part] = self._parts.head(group, hidden[part])

        self._in_chunks(compute, len(hidden))
        return head

    def _in_chunks(self, function: Callable[[slice], None], count: int) -> None:
        self._workers.run_chunks(function, count, CHUNK_ROWS)
