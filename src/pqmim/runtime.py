"""Networks at run time: ONNX Runtime sessions over the tensors of a file, and the threads that run them.

Nothing here waits by spinning: on a busy machine a thread that spins takes the core from the one that it waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

import onnxruntime
from numpy.typing import NDArray

from pqmim.cores import num_usable_cores
from pqmim.errors import ConfigError, ModelError
from pqmim.model_files import NetworkFile
from pqmim.options import Device

MAX_THREADS = 8
"""Threads that are taken unless more are asked for: beyond them a picture gets hardly faster."""
FEW_CHUNKS = 16
"""Fewer of them are done by one thread: measured on two cores, where several take 10 % longer with 6 and 3 % less time
with 24."""
CHANGES_VALUES = ("MatMulScaleFusion", "DivMulFusion")
"""Rewrites of ONNX Runtime that round differently from what a graph says. The graphs give them no occasion; this is the
second lock on the door."""
CPU_PROVIDERS = ("CPUExecutionProvider",)
CUDA_PROVIDERS: tuple[Any, ...] = (("CUDAExecutionProvider", {"use_tf32": 0}), *CPU_PROVIDERS)

Item = TypeVar("Item")

onnxruntime.set_default_logger_severity(3)  # warnings about hardware that nobody asked for


class Session:
    """One graph, ready to run; may be used by several threads at once.

    Args:
        model: file that has the graph and its weights.
        name: of the graph.
        layer: that "{layer}" stands for in the names of the graph's weights.
        threads: that work on one run.
        providers: of ONNX Runtime.
        level: how far ONNX Runtime may rewrite the graph: "off", "basic", "extended" or "all".

    Raises:
        ModelError: there is no such graph, or it does not fit the weights.
    """

    def __init__(
        self,
        model: NetworkFile,
        name: str,
        *,
        layer: int = 0,
        threads: int = 1,
        providers: tuple[Any, ...] = CPU_PROVIDERS,
        level: str = "basic",
    ) -> None:
        if name not in model.graphs:
            raise ModelError(f"the model lacks the graph {name}")
        graph = model.graphs[name]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what goes wrong is raised
        options.graph_optimization_level = _LEVELS[level]
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            weights = {init: model.tensors[tensor.format(layer=layer)] for init, tensor in graph.weights.items()}
            self._weights = [onnxruntime.OrtValue.ortvalue_from_numpy(weight) for weight in weights.values()]
            options.add_external_initializers(list(weights), self._weights)
            self._session = onnxruntime.InferenceSession(
                graph.model, options, providers=list(providers), disabled_optimizers=list(CHANGES_VALUES)
            )
        except Exception as error:  # ONNX Runtime's exceptions have no common root of their own
            raise ModelError(f"the graph {name} of the model cannot be used: {_first_line(error)}") from error
        self.name = name
        self.outputs = tuple(output.name for output in self._session.get_outputs())

    def run(self, **inputs: NDArray[Any]) -> list[NDArray[Any]]:
        """Outputs for inputs by name.

        Raises:
            MemoryError: there is not enough.
            ModelError: the graph cannot be run.
        """
        try:
            outputs: list[NDArray[Any]] = self._session.run(None, inputs)
        except Exception as error:
            if "alloc" in str(error).lower():  # how ONNX Runtime says it
                raise MemoryError(_first_line(error)) from error
            raise ModelError(f"the graph {self.name} of the model failed: {_first_line(error)}") from error
        return outputs


_LEVELS = {
    "off": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


class Workers:
    """Runs a function on many small pieces of work, in as many threads as were asked for.

    Args:
        threads: 1 = the caller's own.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._executor = ThreadPoolExecutor(threads, "pqmim") if threads > 1 else None

    def run(self, function: Callable[[Item], None], items: Sequence[Item]) -> None:
        """Do all of it."""
        if self._executor is None or len(items) == 1:
            for item in items:
                function(item)
        else:
            for _ in self._executor.map(function, items):
                pass

    def run_chunks(self, function: Callable[[slice], None], count: int, size: int) -> None:
        """Do `count` rows in `chunks`; few of these in the caller's thread."""
        chunks = self.chunks(count, size)
        if len(chunks) < FEW_CHUNKS:
            for chunk in chunks:
                function(chunk)
        else:
            self.run(function, chunks)

    def chunks(self, count: int, size: int) -> list[slice]:
        """Cut `count` rows into pieces of at most `size`, all about equal, as many for each thread; what one
        piece holds stays whole: handing parts of it over takes longer than the work."""
        rounds = -(-count // (size * self.threads))
        number = 1 if count <= size else rounds * self.threads
        bounds = [count * index // number for index in range(number + 1)]
        return [slice(begin, end) for begin, end in pairwise(bounds) if end > begin]


def default_threads() -> int:
    """The cores that this process may use, at most MAX_THREADS."""
    return min(num_usable_cores(), MAX_THREADS)


def resolve_device(name: str) -> Device:
    """'auto', 'cpu' or 'cuda' -> where the networks run; auto takes a GPU where ONNX Runtime can use one.

    Raises:
        ConfigError: unknown name, or CUDA was asked for and is not there.
    """
    try:
        device = Device(name)
    except ValueError:
        raise ConfigError(f"device must be auto, cpu or cuda, not {name!r}") from None
    if device is Device.CPU or has_cuda():
        return Device.CPU if device is Device.CPU else Device.CUDA
    if device is Device.CUDA:
        raise ConfigError(
            "device cuda: ONNX Runtime cannot use CUDA here; that takes CUDA's libraries, and the package "
            "onnxruntime-gpu (the extra gpu) in place of onnxruntime, never beside it"
        )
    return Device.CPU


@cache
def has_cuda() -> bool:
    """Whether ONNX Runtime runs a graph on a GPU: one that was built for it may still lack CUDA's libraries."""
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return False
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(_IDENTITY, options, providers=["CUDAExecutionProvider"])
    return "CUDAExecutionProvider" in session.get_providers()


_IDENTITY = (
    b'\x08\t\x12\x00:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08'
    b"\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)
"""The smallest graph: y = x."""


def providers_of(device: Device) -> tuple[Any, ...]:
    """What ONNX Runtime runs a graph with."""
    return CUDA_PROVIDERS if device is Device.CUDA else CPU_PROVIDERS


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
