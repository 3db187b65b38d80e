"""The entropy model in exact arithmetic: known tokens -> range-coder frequencies, the same integers on every machine.

A file decodes only if the decoder computes the very frequencies that the encoder used. Floating-point networks do not
promise that: the order of a sum, a fused multiply-add or a library's `exp` changes the last bit. Here every value
between tokens and frequencies is an integer, and only four kinds of operation occur, each with one possible result:

1. *Integer matrix products*: operands of magnitude <= 127, inner dimensions <= `MAX_INNER`, so every partial sum is below
   2^24 and exact in int32 and float32 alike, in any order of summation, fused or not.
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

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pqmim.config import ModelConfig
from pqmim.errors import ConfigError
from pqmim.exact_numpy import ZERO, Activations, NumpyParts, Parts, Stream, TokenFactors
from pqmim.fixed_point import ACTIVATION_UNIT, RESIDUAL_MAX
from pqmim.model_files import ModelFile
from pqmim.options import Device
from pqmim.runtime import CPU_PROVIDERS, CUDA_PROVIDERS, Session, Workers
from pqmim.schedule import Schedule, Step, positions_of

GRAPH_KERNELS = ("qgemm-s8", "qgemm", "matmulinteger", "float32")
"""How ONNX Runtime multiplies: QGemm on unsigned by signed operands (exact where the processor has VNNI) or unsigned by
unsigned ones, standard ONNX's MatMulInteger, or integers in float32."""
KERNELS = (*GRAPH_KERNELS, NumpyParts.kernel)
CHUNK_ROWS = 512
"""Positions and"""
CHUNK_WINDOWS = 8
"""windows worked on at a time: what lies between two products then fits the cache, and memory is bounded."""
OUTSIDE = -float(1 << 20)
"""Added to the score of a key that is outside of the grid."""
TRIAL_ROWS, TRIAL_RUNS = 256, 3
"""Rows and repetitions of the trial that finds the fastest kernel."""


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
        model: from `model_files.load_model`; its weights are within bounds.
        kernel: one of KERNELS; None = `PQMIM_KERNEL`, or the fastest that is exact here.
        device: where ONNX Runtime computes, if it is exact there.

    Raises:
        ConfigError: the kernel does not exist, or is not exact on this machine.
        ModelError: the graphs cannot be used.
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
        self.runs = [slice(int(begin), int(end)) for begin, end in zip(bounds, bounds[1:], strict=False)]
        self._token_values: NDArray[np.int8] = tensors["entropy.token_values"]
        self.num_levels = len(self._token_values)
        self._embed_weight: NDArray[np.int8] = tensors["entropy.embed.weight"]
        self._embed_bias = tensors["entropy.embed.bias"].astype(np.float32)
        self._reference = NumpyParts(self._config, self.num_subquantizers, tensors)
        self._parts = _choose_parts(model, self._reference, kernel, device)

    @property
    def kernel(self) -> str:
        """Kernel in use, one of KERNELS."""
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
        parts, count = self._parts, len(state.embedded)
        plan = _grid_plan(state.height, state.width, self._config.window)
        h = np.empty_like(state.embedded)
        x = np.full((count + 1, self._config.width), ZERO, np.uint8)  # the last row is what lies outside

        def embed(rows: slice) -> None:
            h[rows], x[rows] = parts.embed(state.embedded[rows])

        self._in_chunks(embed, count)
        for layer in range(self._config.num_layers):
            is_last = layer == self._config.num_layers - 1
            if layer % self._config.attention_every == 0:
                windows = plan.windows[layer // self._config.attention_every % 2]
                mixed = self._attend(layer, x, windows)
                row_of = windows.row_of
                if is_last:  # nothing after this point looks at other positions
                    row_of, h = row_of[positions], h[positions]
                    x = np.empty_like(x, shape=(len(positions) + 1, x.shape[1]))

                def project(rows: slice, layer: int = layer) -> None:
                    h[rows], x[rows] = parts.project(layer, h[rows], mixed[row_of[rows]])

                self._in_chunks(project, len(h))
            elif is_last:
                h, x = h[positions], x[np.append(positions, count)]
            x_before, x = x, np.full_like(x, ZERO)

            def feed(rows: slice, layer: int = layer, is_last: bool = is_last) -> None:
                moved = x_before[rows] if is_last else _gather(x_before, plan.shifted[rows])
                h[rows], x[rows] = parts.feed(layer, h[rows], moved)

            self._in_chunks(feed, len(h))
        return x[: len(positions)]

    def _attend(self, layer: int, x: Activations, windows: _Windows) -> Activations:
        num_keys = self._config.window**2
        mixed = np.empty((len(windows.source) * num_keys, x.shape[1]), np.uint8)

        def attend(part: slice) -> None:
            rows = slice(part.start * num_keys, part.stop * num_keys)
            mixed[rows] = self._parts.attend(layer, _gather(x, windows.source[part]), windows.mask[part])

        self._workers.run(attend, self._workers.chunks(len(windows.source), CHUNK_WINDOWS))
        return mixed

    def head(self, hidden: Activations, group: int) -> Activations:
        """Inputs of `frequencies` for a group of sub-quantizers: (n, C) from `hidden` -> (m, n, R)."""
        first, last = self.schedule.group_bounds(group)
        head = np.empty((last - first, len(hidden), self._config.token_rank), np.uint8)

        def compute(rows: slice) -> None:
            head[:, rows] = self._parts.head(group, hidden[rows])

        self._in_chunks(compute, len(hidden))
        return head

    def frequencies(
        self, head: Activations, level: int, first: int, *, sharpness: float = 1.0
    ) -> NDArray[np.int32]:
        """Range-coder frequencies of the sub-quantizers from `first` on.

        Args:
            head: (m, n, R), those sub-quantizers' part of `head`.
            level: of the image.
            sharpness: the logits are multiplied by it (the inverse of a sampling temperature). Files are coded at 1.

        Returns:
            (m, n, K), each row >= 1 and summing to 2^16.
        """
        if sharpness != 1.0:
            return self._reference.frequencies(head, level, first, sharpness=sharpness)
        return self._parts.frequencies(head, level, first)

    def positions(self, state: EntropyState, step: Step) -> NDArray[np.int64]:
        """Positions of a step: (n,) into the flattened grid, raster order; n may be 0."""
        return positions_of(step, state.height, state.width)

    def _in_chunks(self, function: Callable[[slice], None], count: int) -> None:
        self._workers.run(function, self._workers.chunks(count, CHUNK_ROWS))


@dataclass(frozen=True)
class _Windows:
    """A grid cut into W windows of T positions.

    Attributes:
        source: (W, T * 16) int32, where the 16 chunks of channels of each place in a window come from, as rows of
            `_chunks_of`; the shift of channels is in it.
        row_of: (h * w,) int64, the place of each position.
        mask: (W, 1, 1, T) float32, `OUTSIDE` for places outside of the grid.
    """

    source: NDArray[np.int32]
    row_of: NDArray[np.int64]
    mask: Stream


@dataclass(frozen=True)
class _GridPlan:
    """Where things are in a grid of one size.

    Attributes:
        shifted: (h * w, 16) int32, where the 16 chunks of channels of each position come from after the shift.
        windows: cut at multiples of the window, and half a window beside them.
    """

    shifted: NDArray[np.int32]
    windows: tuple[_Windows, _Windows]


@lru_cache(maxsize=4)
def _grid_plan(height: int, width: int, window: int) -> _GridPlan:
    shifted = _shift_sources(height, width)
    return _GridPlan(shifted[:-1], (_windows(height, width, window, 0, shifted), _windows(height, width, window, window // 2, shifted)))


def _shift_sources(height: int, width: int) -> NDArray[np.int32]:
    """Mixing of neighbors at no arithmetic: half of the channels move by one position, in eight directions.

    Returns:
        (h * w + 1, 16) int32: chunk of C / 16 channels that each chunk comes from; the last row is what lies outside.
    """
    count = height * width
    y, x = np.divmod(np.arange(count), width)
    rows = np.full((count + 1, 16), count)
    rows[:count, :8] = np.arange(count)[:, None]
    directions = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
    for chunk, (dy, dx) in enumerate(directions, start=8):
        from_y, from_x = y + dy, x + dx
        is_inside = (from_y >= 0) & (from_y < height) & (from_x >= 0) & (from_x < width)
        rows[:count, chunk] = np.where(is_inside, from_y * width + from_x, count)
    return (rows * 16 + np.arange(16)).astype(np.int32)


def _windows(height: int, width: int, window: int, offset: int, shifted: NDArray[np.int32]) -> _Windows:
    rows, columns = (-(-(offset + side) // window) for side in (height, width))
    grid = np.full((rows * window, columns * window), height * width)
    grid[offset : offset + height, offset : offset + width] = np.arange(height * width).reshape(height, width)
    places = grid.reshape(rows, window, columns, window).transpose(0, 2, 1, 3).reshape(rows * columns, window**2)
    row_of = np.empty(height * width + 1, np.int64)
    row_of[places.ravel()] = np.arange(places.size)
    mask = np.where(places == height * width, np.float32(OUTSIDE), np.float32(0))[:, None, None]
    return _Windows(shifted[places].reshape(len(places), -1), row_of[:-1], mask)


def _gather(x: Activations, source: NDArray[np.int32]) -> Activations:
    """Put rows together from chunks of a sixteenth of the channels: (rows, C)."""
    return x.reshape(-1, x.shape[1] // 16).take(source.ravel(), axis=0).reshape(-1, x.shape[1])


class _GraphParts:
    """`Parts` in ONNX Runtime; see there for the methods."""

    def __init__(self, model: ModelFile, kernel: str, providers: tuple[Any, ...] = CPU_PROVIDERS) -> None:
        config = model.config.entropy
        self.kernel = kernel

        def session(name: str, layer: int = 0) -> Session:
            return Session(name, model.graphs[name], model.tensors, layer=layer, providers=providers)

        layers = range(config.num_layers)
        self._factors = TokenFactors(model.tensors)
        self._embed, self._frequencies = session("embed"), session("frequencies")
        self._attention = {layer: session(f"{kernel}/attend", layer) for layer in layers[:: config.attention_every]}
        self._project = {layer: session(f"{kernel}/project", layer) for layer in self._attention}
        self._feed = [session(f"{kernel}/feed", layer) for layer in layers]
        self._heads = [session(f"{kernel}/head.{group}") for group in range(len(config.group_steps))]

    def embed(self, embedded: Stream) -> tuple[Stream, Activations]:
        h, x = self._embed.run(embedded=embedded)
        return h, x

    def attend(self, layer: int, x: Activations, mask: Stream) -> Activations:
        return self._attention[layer].run(x=x, mask=mask)[0]

    def project(self, layer: int, h: Stream, mixed: Activations) -> tuple[Stream, Activations]:
        h, x = self._project[layer].run(h=h, mixed=mixed)
        return h, x

    def feed(self, layer: int, h: Stream, x: Activations) -> tuple[Stream, Activations]:
        h, x = self._feed[layer].run(h=h, x=x)
        return h, x

    def head(self, group: int, x: Activations) -> Activations:
        return self._heads[group].run(x=x)[0]

    def frequencies(self, head: Activations, level: int, first: int) -> NDArray[np.int32]:
        return self._frequencies.run(head=head, **self._factors.of(level, first, len(head)))[0]


def _choose_parts(model: ModelFile, reference: NumpyParts, kernel: str | None, device: Device) -> Parts:
    """The kernel that was asked for, or the fastest; NumPy if no other gives its answers."""
    kernel = kernel or os.environ.get("PQMIM_KERNEL")
    if kernel is not None and kernel not in KERNELS:
        raise ConfigError(f"the kernel must be one of {', '.join(KERNELS)}, not {kernel!r}")
    if device is Device.CUDA and kernel in (None, "float32"):
        parts = _GraphParts(model, "float32", CUDA_PROVIDERS)
        if is_exact(parts, reference, model.config):
            return parts
    for name in kernels_by_speed(model) if kernel is None else (kernel,):
        if name == reference.kernel:
            return reference
        parts = _GraphParts(model, name)
        if is_exact(parts, reference, model.config):
            return parts
    if kernel is not None:
        raise ConfigError(f"the kernel {kernel} does not give exact products on this machine")
    return reference


def exact_kernels(model: ModelFile) -> tuple[str, ...]:
    """Those of KERNELS that give exact products on this machine."""
    quantizer = model.config.tokenizer.quantizer
    reference = NumpyParts(model.config.entropy, quantizer.num_subquantizers, model.tensors)
    graphs = (name for name in GRAPH_KERNELS if is_exact(_GraphParts(model, name), reference, model.config))
    return (*graphs, reference.kernel)


def kernels_by_speed(model: ModelFile) -> list[str]:
    """The kernels of ONNX Runtime, the one that is fastest in a short trial first."""
    config = model.config.entropy
    rng = np.random.default_rng(0)
    h = rng.integers(-1000, 1000, (TRIAL_ROWS, config.width)).astype(np.float32)
    x = rng.integers(1, 256, (TRIAL_ROWS, config.width), np.uint8)
    seconds = {}
    for kernel in GRAPH_KERNELS:
        name = f"{kernel}/feed"
        feed = Session(name, model.graphs[name], model.tensors)
        times = []
        for _ in range(TRIAL_RUNS):
            start = time.perf_counter()
            feed.run(h=h, x=x)
            times.append(time.perf_counter() - start)
        seconds[kernel] = min(times)
    return sorted(seconds, key=seconds.__getitem__)


def is_exact(parts: Parts, reference: Parts, config: ModelConfig) -> bool:
    """Whether an implementation gives the answers of another to known questions, operands of extreme size among them."""
    rng = np.random.default_rng(0)
    width, num_keys = config.entropy.width, config.entropy.window**2

    def activations(rows: int) -> Activations:
        x = rng.integers(ZERO - 127, ZERO + 128, (rows, width)).astype(np.uint8)
        x[::3] = np.where(x[::3] < ZERO, ZERO - 127, ZERO + 127)
        x[0], x[-1] = ZERO + 127, ZERO - 127
        return x

    questions: list[tuple[str, tuple[Any, ...]]] = []
    embedded = rng.integers(-(1 << 22), 1 << 22, (4, width)).astype(np.float32)
    questions.append(("embed", (embedded,)))
    mask = np.zeros((1, 1, 1, num_keys), np.float32)
    mask[..., :3] = OUTSIDE
    for layer in range(config.entropy.num_layers):
        h = rng.integers(-RESIDUAL_MAX, RESIDUAL_MAX, (5, width)).astype(np.float32)
        h[1:] = rng.integers(-2000, 2000, (4, width))
        if layer % config.entropy.attention_every == 0:
            questions += [("attend", (layer, activations(num_keys), mask)), ("project", (layer, h, activations(5)))]
        questions.append(("feed", (layer, h, activations(5))))
    heads = [reference.head(group, activations(5)) for group in range(len(config.entropy.group_steps))]
    questions += [("head", (group, activations(5))) for group in range(len(heads))]
    questions.append(("frequencies", (heads[0], 0, 0)))
    for name, arguments in questions:
        answers = [getattr(implementation, name)(*arguments) for implementation in (parts, reference)]
        for got, wanted in zip(*((a if isinstance(a, tuple) else (a,)) for a in answers), strict=True):
            if not np.array_equal(got, wanted):
                return False
    return True
