"""How the exact entropy model multiplies here: the kernels of ONNX Runtime, the trial that finds the fastest, and the
check that it is exact."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pqmim.config import ModelConfig
from pqmim.errors import ConfigError, ModelError
from pqmim.exact_numpy import ZERO, Activations, NumpyParts, Parts, Stream, TokenFactors
from pqmim.fixed_point import RESIDUAL_MAX
from pqmim.grid_plan import OUTSIDE
from pqmim.model_files import ModelFile
from pqmim.options import Device
from pqmim.runtime import CPU_PROVIDERS, CUDA_PROVIDERS, Session

GRAPH_KERNELS = ("qgemm-s8", "qgemm", "matmulinteger", "float32")
"""How ONNX Runtime multiplies: QGemm on unsigned by signed operands (exact where the processor has VNNI) or unsigned by
unsigned ones, standard ONNX's MatMulInteger, or integers in float32."""
KERNELS = (*GRAPH_KERNELS, NumpyParts.kernel)
TRIAL_ROWS, TRIAL_RUNS = 64, 8
"""Rows and repetitions of the trial that finds the fastest kernel."""
QUESTION_ROWS = 37
"""Rows of a known question: whole blocks of the kernels and a rest."""


class GraphParts:
    """`Parts` in ONNX Runtime; see there for the methods."""

    def __init__(self, model: ModelFile, kernel: str, providers: tuple[Any, ...] = CPU_PROVIDERS) -> None:
        config = model.config.entropy
        self.kernel = kernel

        def session(name: str, layer: int = 0) -> Session:
            return Session(model, name, layer=layer, providers=providers)

        layers, groups = range(config.total_layers), range(len(config.group_steps))
        attending = [layer for layer in layers if config.has_attention(layer)]
        self._factors = TokenFactors(model.tensors)
        self._embed, self._frequencies = [session("embed", group) for group in groups], session("frequencies")
        self._keys_values = {layer: session(f"{kernel}/keys_values", layer) for layer in attending}
        self._attend = {layer: session(f"{kernel}/attend", layer) for layer in attending}
        self._project = {layer: session(f"{kernel}/project", layer) for layer in attending}
        self._feed = [session(f"{kernel}/feed", layer) for layer in layers]
        self._heads = [session(f"{kernel}/head.{group}") for group in groups]

    def embed(self, group: int, h: Stream, embedded: Stream) -> tuple[Stream, Activations]:
        h, x = self._embed[group].run(h=h, embedded=embedded)
        return h, x

    def keys_values(self, layer: int, x: Activations) -> Activations:
        return self._keys_values[layer].run(x=x)[0]

    def attend(self, layer: int, x: Activations, kv: Activations, bias: Stream, mask: Stream) -> Activations:
        return self._attend[layer].run(x=x, kv=kv, bias=bias, mask=mask)[0]

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


def choose_parts(model: ModelFile, reference: NumpyParts, kernel: str | None, device: Device) -> Parts:
    """The kernel that was asked for, or the fastest; NumPy if no other gives its answers."""
    kernel = kernel or os.environ.get("PQMIM_KERNEL") or None
    if kernel is not None and kernel not in KERNELS:
        raise ConfigError(f"the kernel must be one of {', '.join(KERNELS)}, not {kernel!r}")
    if kernel == reference.kernel:
        return reference
    candidates = [(name, CPU_PROVIDERS) for name in ([kernel] if kernel else kernels_by_speed(model))]
    if device is Device.CUDA and kernel in (None, "float32"):
        candidates.insert(0, ("float32", CUDA_PROVIDERS))
    for name, providers in candidates:
        parts = exact_parts(model, name, reference, providers)
        if parts is not None:
            return parts
    if kernel is not None:
        raise ConfigError(f"the kernel {kernel} does not give exact products on this machine")
    return reference


def exact_parts(
    model: ModelFile, kernel: str, reference: NumpyParts, providers: tuple[Any, ...] = CPU_PROVIDERS
) -> GraphParts | None:
    """A kernel of ONNX Runtime, if it gives the reference's answers on this machine."""
    try:
        parts = GraphParts(model, kernel, providers)
        return parts if is_exact(parts, reference, model.config) else None
    except ModelError:  # an operator is not implemented here, or the file lacks graphs of the kernel
        return None


def exact_kernels(model: ModelFile) -> tuple[str, ...]:
    """Those of KERNELS that give exact products on this machine."""
    quantizer = model.config.tokenizer.quantizer
    reference = NumpyParts(model.config.entropy, quantizer.num_subquantizers, model.tensors)
    graphs = (name for name in GRAPH_KERNELS if exact_parts(model, name, reference) is not None)
    return (*graphs, reference.kernel)


def kernels_by_speed(model: ModelFile) -> list[str]:
    """The kernels of ONNX Runtime that run here, the one that is fastest in a short trial first."""
    config = model.config.entropy
    rng = np.random.default_rng(0)
    h = rng.integers(-1000, 1000, (TRIAL_ROWS, config.width)).astype(np.float32)
    x = rng.integers(1, 256, (TRIAL_ROWS, config.width), np.uint8)
    seconds = {}
    for kernel in GRAPH_KERNELS:
        times = []
        try:
            feed = Session(model, f"{kernel}/feed")
            for _ in range(TRIAL_RUNS):
                start = time.perf_counter()
                feed.run(h=h, x=x)
                times.append(time.perf_counter() - start)
        except ModelError:  # as in `exact_parts`
            continue
        seconds[kernel] = min(times)
    return sorted(seconds, key=seconds.__getitem__)


def is_exact(parts: Parts, reference: NumpyParts, config: ModelConfig) -> bool:
    """Whether an implementation gives the answers of another to known questions, among them extreme operands."""
    rng = np.random.default_rng(0)
    width, num_keys = config.entropy.width, config.entropy.window**2

    def activations(rows: int) -> Activations:
        x = rng.integers(ZERO - 127, ZERO + 128, (rows, width)).astype(np.uint8)
        x[::3] = np.where(x[::3] < ZERO, ZERO - 127, ZERO + 127)
        x[0], x[-1] = ZERO + 127, ZERO - 127
        return x

    questions: list[tuple[str, tuple[Any, ...]]] = []

    def stream() -> Stream:
        h = rng.integers(-RESIDUAL_MAX, RESIDUAL_MAX, (QUESTION_ROWS, width)).astype(np.float32)
        h[1:] = rng.integers(-2000, 2000, (QUESTION_ROWS - 1, width))
        return h

    for group in range(len(config.entropy.group_steps)):
        embedded = rng.integers(-(1 << 22), 1 << 22, (QUESTION_ROWS, width)).astype(np.float32)
        questions.append(("embed", (group, stream(), embedded)))
    mask = np.zeros((2, 1, 1, num_keys), np.float32)
    mask[0, ..., :3] = mask[1] = OUTSIDE
    heads = (width // config.entropy.head_width, QUESTION_ROWS, num_keys)
    bias = rng.integers(-300, 300, heads).astype(np.float32)
    for layer in range(config.entropy.total_layers):
        if config.entropy.has_attention(layer):
            queries = activations(2 * QUESTION_ROWS).reshape(2, QUESTION_ROWS, width)
            kv = activations(4 * num_keys).reshape(2, num_keys, 2 * width)
            questions += [
                ("keys_values", (layer, activations(QUESTION_ROWS))),
                ("attend", (layer, queries, kv, bias, mask)),
                ("project", (layer, stream(), activations(QUESTION_ROWS))),
            ]
        questions.append(("feed", (layer, stream(), activations(QUESTION_ROWS))))
    outputs = [reference.head(group, activations(QUESTION_ROWS)) for group in range(len(config.entropy.group_steps))]
    questions += [("head", (group, activations(QUESTION_ROWS))) for group in range(len(outputs))]
    blocks = reference.alphabets.blocks(0, 0, len(outputs[0]))  # each size of alphabets may be computed in its own way
    questions += [("frequencies", (outputs[0][block.first : block.last], 0, block.first)) for block in blocks]
    for name, arguments in questions:
        answers = [getattr(implementation, name)(*arguments) for implementation in (parts, reference)]
        for got, wanted in zip(*((a if isinstance(a, tuple) else (a,)) for a in answers), strict=True):
            if not np.array_equal(got, wanted):
                return False
    return True
