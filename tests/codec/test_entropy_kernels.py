"""Choice of the kernel: the fastest that is exact, and one that is not is found out."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from exact_model import (
    ALPHABETS,
    CONFIG,
    FREQUENCIES_HASH,
    RUNS,
    all_frequencies,
    coded_frequencies,
    exact_model,
    hash_of,
    model_file,
)
from numpy.typing import NDArray

from pqmim import entropy_kernels
from pqmim.entropy_kernels import GRAPH_KERNELS, KERNELS, GraphParts, exact_kernels, is_exact, kernels_by_speed
from pqmim.errors import ConfigError, ModelError
from pqmim.exact_entropy import ExactEntropyModel
from pqmim.exact_numpy import NumpyParts, _Linear
from pqmim.model_files import ModelFile
from pqmim.options import Device
from pqmim.runtime import CPU_PROVIDERS, Session, Workers


@pytest.fixture(autouse=True)
def _no_choice_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PQMIM_KERNEL", raising=False)


def reference() -> NumpyParts:
    return NumpyParts(CONFIG, len(RUNS), model_file().tensors)


def test_a_kernel_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PQMIM_KERNEL", "numpy")
    assert exact_model().kernel == "numpy"
    assert exact_model("float32").kernel == "float32"  # an argument is nearer than the environment
    monkeypatch.setenv("PQMIM_KERNEL", "bfloat16")
    with pytest.raises(ConfigError, match="qgemm-s8, qgemm, matmulinteger, float32, numpy, not 'bfloat16'"):
        exact_model()
    with pytest.raises(ConfigError, match="not 'float16'"):
        exact_model("float16")
    monkeypatch.setenv("PQMIM_KERNEL", "")
    assert exact_model().kernel in exact_kernels(model_file())


def test_without_a_choice_the_fastest_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(kernels_by_speed(model_file())) == sorted(GRAPH_KERNELS)
    assert set(KERNELS) >= set(exact_kernels(model_file()))
    for fastest in ("qgemm", "matmulinteger", "float32"):
        others = [kernel for kernel in GRAPH_KERNELS if kernel != fastest]
        monkeypatch.setattr(entropy_kernels, "kernels_by_speed", lambda model, f=fastest, o=others: [f, *o])
        assert exact_model().kernel == fastest


# -- kernels that are not exact -----------------------------------------------------------------------------


def saturating_product(x: NDArray[np.int64], weight: NDArray[np.int64]) -> NDArray[np.int64]:
    """What x86 processors without VNNI make of int8: one operand shifted to 0 to 255, pairs added in 16 bits."""
    products = (x + 128)[:, :, None] * weight[None]  # (n, k, outputs)
    pairs = (products[:, ::2] + products[:, 1::2]).clip(-(1 << 15), (1 << 15) - 1)
    return pairs.sum(1) - 128 * weight.sum(0)


class SaturatingLinear(_Linear):
    """A linear layer on such a processor."""

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        y = saturating_product(x.astype(np.int64), self._matrix.astype(np.int64)).astype(np.float32)
        return (y + self._bias) * self._scale


class SaturatingParts(NumpyParts):
    """The entropy model on such a processor."""

    kernel = "qgemm-s8"

    def _linear(self, name: str, first: int = 0, last: int | None = None) -> _Linear:
        layer = super()._linear(name, first, last)
        layer.__class__ = SaturatingLinear
        return layer


class OffByOne(Session):
    """A session one element of whose last output is off by one."""

    name_of_victim = ""

    def run(self, **inputs: NDArray[Any]) -> list[NDArray[Any]]:
        outputs = super().run(**inputs)
        if self.name == self.name_of_victim:
            outputs[-1].flat[-1] += 1
        return outputs


class Failing(Session):
    """A session that fails, as where an operator has no implementation."""

    def run(self, **inputs: NDArray[Any]) -> list[NDArray[Any]]:
        if "/" in self.name:
            raise ModelError("not for this processor")
        return super().run(**inputs)


def test_saturation_is_found_out() -> None:
    small = np.ones((3, 8), np.int64)
    assert np.array_equal(saturating_product(small, small.T), np.full((3, 3), 8))  # it looks harmless
    saturating = SaturatingParts(CONFIG, len(RUNS), model_file().tensors)
    assert not is_exact(saturating, reference(), model_file().config)
    assert is_exact(reference(), reference(), model_file().config)


PARTS = ("keys_values", "attend", "project", "feed", "head.0", "head.2")
GRAPHS = ["embed", "frequencies", *(f"float32/{name}" for name in PARTS)]


@pytest.mark.parametrize("name", GRAPHS)
def test_one_wrong_integer_anywhere_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entropy_kernels, "Session", OffByOne)
    monkeypatch.setattr(OffByOne, "name_of_victim", name)
    assert not is_exact(GraphParts(model_file(), "float32"), reference(), model_file().config)
    monkeypatch.setattr(OffByOne, "name_of_victim", "none")
    assert is_exact(GraphParts(model_file(), "float32"), reference(), model_file().config)


def test_frequencies_of_every_size_of_alphabets_are_asked_for() -> None:
    """In the first group at the finest level, also where it is all that there is."""
    tensors = dict(model_file().tensors)
    sizes = np.array([[7, 7, 3, 2, 1]])
    starts = ALPHABETS.starts[0]
    own = np.concatenate([start + np.arange(size) for start, size in zip(starts, sizes[0], strict=True)])
    tensors["tokenizer.quantizer.sizes"] = sizes
    tensors["entropy.token_factors.weight"] = tensors["entropy.token_factors.weight"][own]
    tensors["entropy.token_bias"] = tensors["entropy.token_bias"][own]
    config = replace(CONFIG, group_steps=(5,), group_sizes=())
    asked: list[tuple[int, int]] = []

    class Watched(NumpyParts):
        def frequencies(self, head: NDArray[np.uint8], level: int, first: int, **options: float) -> NDArray[np.int32]:
            asked.append((first, len(head)))
            return super().frequencies(head, level, first, **options)

    whole = replace(model_file().config, entropy=config)
    assert is_exact(Watched(config, len(RUNS), tensors), NumpyParts(config, len(RUNS), tensors), whole)
    assert asked == [(0, 2), (2, 1), (3, 1), (4, 1)]


def test_another_layer_s_weights_are_found_out() -> None:
    """The question is put to every layer."""
    for layer in range(CONFIG.total_layers):
        name = f"entropy.layers.{layer}.feed_forward.project.bias"
        tensors = model_file().tensors | {name: model_file().tensors[name] + 40}
        other = NumpyParts(CONFIG, len(RUNS), tensors)
        assert not is_exact(other, reference(), model_file().config)


@pytest.fixture
def saturation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor on which signed operands saturate, and are fastest."""

    def parts(model: ModelFile, kernel: str, providers: tuple[Any, ...] = CPU_PROVIDERS) -> NumpyParts | GraphParts:
        if kernel == "qgemm-s8":
            return SaturatingParts(CONFIG, len(RUNS), model.tensors)
        return GraphParts(model, kernel, providers)

    monkeypatch.setattr(entropy_kernels, "GraphParts", parts)
    monkeypatch.setattr(entropy_kernels, "kernels_by_speed", lambda model: list(GRAPH_KERNELS))


@pytest.mark.usefixtures("saturation")
def test_another_kernel_takes_the_place_of_one_that_saturates(monkeypatch: pytest.MonkeyPatch) -> None:
    assert exact_kernels(model_file()) == ("qgemm", "matmulinteger", "float32", "numpy")
    model = exact_model()
    assert model.kernel == "qgemm"
    assert hash_of(all_frequencies(model)) == FREQUENCIES_HASH
    monkeypatch.setenv("PQMIM_KERNEL", "qgemm-s8")
    with pytest.raises(ConfigError, match="kernel qgemm-s8 does not give exact products on this machine"):
        exact_model()
    monkeypatch.setenv("PQMIM_KERNEL", "qgemm")
    with pytest.raises(ConfigError, match="qgemm-s8"):
        exact_model("qgemm-s8")


@pytest.mark.parametrize("session", [OffByOne, Failing])
def test_numpy_is_left_if_no_kernel_is_exact(session: type[Session], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entropy_kernels, "Session", session)
    monkeypatch.setattr(OffByOne, "name_of_victim", "frequencies")
    assert exact_kernels(model_file()) == ("numpy",)
    for device in (Device.CPU, Device.CUDA):
        model = ExactEntropyModel(model_file(), Workers(1), device=device)
        assert model.kernel == "numpy"
    assert hash_of(all_frequencies(model)) == FREQUENCIES_HASH
    for kernel in GRAPH_KERNELS:
        with pytest.raises(ConfigError, match=f"kernel {kernel} does not give exact products on this machine"):
            exact_model(kernel)


def test_a_kernel_without_an_implementation_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where ONNX Runtime lacks an operator: no session is made."""

    class Missing(Session):
        def __init__(self, model: ModelFile, name: str, **options: Any) -> None:
            if name.startswith("qgemm"):
                raise ModelError("no such operator")
            super().__init__(model, name, **options)

    monkeypatch.setattr(entropy_kernels, "Session", Missing)
    assert exact_kernels(model_file()) == ("matmulinteger", "float32", "numpy")
    assert exact_model().kernel in ("matmulinteger", "float32")


@pytest.mark.parametrize("answers_rightly", [True, False])
def test_a_gpu_is_trusted_if_it_answers_rightly(answers_rightly: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for a GPU: the entropy model runs there, or on the CPU."""
    asked: list[tuple[str, tuple[Any, ...]]] = []

    class Parts(GraphParts):
        def __init__(self, model: ModelFile, kernel: str, providers: tuple[Any, ...] = CPU_PROVIDERS) -> None:
            asked.append((kernel, providers))
            super().__init__(model, kernel)
            self.is_wrong = providers != CPU_PROVIDERS and not answers_rightly

        def feed(self, layer: int, h: NDArray[np.float32], x: NDArray[np.uint8]) -> Any:
            h, x = super().feed(layer, h, x)
            return h + self.is_wrong, x

    monkeypatch.setattr(entropy_kernels, "GraphParts", Parts)
    monkeypatch.setattr(entropy_kernels, "kernels_by_speed", lambda model: ["matmulinteger"])
    model = ExactEntropyModel(model_file(), Workers(1), device=Device.CUDA)
    assert asked[0] == ("float32", entropy_kernels.CUDA_PROVIDERS)
    assert model.kernel == ("float32" if answers_rightly else "matmulinteger")
    assert len(asked) == (1 if answers_rightly else 2)
    assert hash_of(coded_frequencies(model, 3, 4)) == hash_of(coded_frequencies(exact_model("numpy"), 3, 4))


def test_a_model_may_lack_the_graphs_of_a_kernel() -> None:
    for lacking in ("qgemm", "qgemm/head.1"):
        graphs = {name: graph for name, graph in model_file().graphs.items() if not name.startswith(lacking)}
        model = replace(model_file(), graphs=graphs)
        assert "matmulinteger" in exact_kernels(model)
        assert "qgemm" not in exact_kernels(model)
        assert ExactEntropyModel(model, Workers(1)).kernel != "qgemm"


def test_memory_that_runs_out_is_not_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: Session, **inputs: NDArray[Any]) -> list[NDArray[Any]]:
        raise MemoryError("bad allocation")

    monkeypatch.setattr(Session, "run", run)
    function: Callable[[], object]
    for function in (exact_model, lambda: exact_model("float32")):
        with pytest.raises(MemoryError):
            function()
