"""Networks at run time: sessions, the threads that run them, devices."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pqmim import runtime
from pqmim.decoder_files import DecoderFile, load_decoder
from pqmim.errors import ConfigError, ModelError
from pqmim.model_files import MODEL_FILE, Graph, ModelFile, load_model
from pqmim.options import Device
from pqmim.runtime import FEW_CHUNKS, MAX_THREADS, Session, Workers, default_threads, providers_of, resolve_device


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> ModelFile:
    return load_model(tiny_model / MODEL_FILE)


@pytest.fixture(scope="module")
def decoder(tiny_model: Path) -> DecoderFile:
    return load_decoder(tiny_model / "fine.safetensors")


def z(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(1, 12, 3, 4)).astype(np.float32)


# -- sessions -------------------------------------------------------------------------------------------------------


def test_a_session_has_the_outputs_of_its_graph(decoder: DecoderFile) -> None:
    session = Session(decoder, "synthesis")
    assert session.name == "synthesis"
    outputs = session.run(z=z())
    assert len(outputs) == len(session.outputs) == 1
    assert outputs[0].shape == (48, 64, 3)


@pytest.mark.parametrize("threads", [1, 3])
def test_sessions_do_not_spin_and_have_the_threads_that_were_asked_for(model: ModelFile, threads: int) -> None:
    options = Session(model, "analysis", threads=threads)._session.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.intra_op_num_threads == threads
    assert options.inter_op_num_threads == 1


def test_a_session_may_be_shared_by_threads(decoder: DecoderFile) -> None:
    session = Session(decoder, "synthesis")
    expected = [session.run(z=z(seed))[0] for seed in range(8)]
    with ThreadPoolExecutor(4) as executor:
        for _ in range(3):
            found = list(executor.map(lambda seed: session.run(z=z(seed))[0], range(8)))
            assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_layers_share_a_graph_and_have_weights_of_their_own(model: ModelFile) -> None:
    rng = np.random.default_rng(0)
    h, x = rng.normal(size=(5, 32)).round().astype(np.float32), rng.integers(1, 256, (5, 32), np.uint8)
    outputs = [Session(model, "float32/feed", layer=layer).run(h=h, x=x)[1] for layer in (0, 1)]
    assert not np.array_equal(*outputs)


def test_a_session_keeps_its_weights(tiny_model: Path) -> None:
    """Also when the model file that it was made of is gone."""
    session = Session(load_decoder(tiny_model / "fine.safetensors"), "synthesis")
    expected = session.run(z=z())[0]
    [load_decoder(tiny_model / "fine.safetensors") for _ in range(3)]  # where the first one was
    assert np.array_equal(session.run(z=z())[0], expected)


def changed(decoder: DecoderFile, **tensors: np.ndarray | None) -> DecoderFile:
    kept = {name: tensor for name, tensor in (decoder.tensors | tensors).items() if tensor is not None}
    return replace(decoder, tensors=kept)


def test_graphs_and_weights_that_do_not_fit(decoder: DecoderFile) -> None:
    name = "synthesis.linear"
    weight = decoder.tensors[name]
    for wrong in (None, weight.astype(np.float32), weight[:-1]):
        with pytest.raises(ModelError, match="the graph synthesis of the model cannot be used: ") as caught:
            Session(changed(decoder, **{name: wrong}), "synthesis")
        assert "\n" not in str(caught.value)
    graph = decoder.graphs["synthesis"]
    for wrong_graph in (b"", b"no graph", graph.model[: len(graph.model) // 2]):
        broken = replace(decoder, graphs={"synthesis": Graph(wrong_graph, graph.weights)})
        with pytest.raises(ModelError, match="the graph synthesis of the model cannot be used: ") as caught:
            Session(broken, "synthesis")
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="the model lacks the graph dream"):
        Session(decoder, "dream")


def test_what_goes_wrong_in_a_run(decoder: DecoderFile, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(decoder, "synthesis")
    with pytest.raises(ModelError, match="the graph synthesis of the model failed: ") as caught:
        session.run(z=z()[:, :5])
    assert "\n" not in str(caught.value)

    class Full:
        def run(self, *args: object) -> None:
            raise RuntimeError("bad allocation\nof 5 GB")

    monkeypatch.setattr(session, "_session", Full())
    with pytest.raises(MemoryError, match=r"^bad allocation$"):
        session.run(z=z())


@pytest.mark.parametrize("level", ["off", "basic", "extended", "all"])
def test_levels_of_rewriting_change_no_more_than_a_rounding(decoder: DecoderFile, level: str) -> None:
    expected = Session(decoder, "synthesis").run(z=z())[0].astype(int)
    assert np.abs(Session(decoder, "synthesis", level=level).run(z=z())[0] - expected).max() <= 1


def test_nothing_is_said_on_standard_error(decoder: DecoderFile, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither about hardware nor about graphs that cannot be used, which is raised."""
    with pytest.raises(ModelError):
        Session(replace(decoder, graphs={"broken": Graph(b"no graph", {})}), "broken")
    with pytest.raises(ModelError):
        Session(decoder, "synthesis").run(z=z()[:, :5])
    assert capfd.readouterr() == ("", "")


# -- model files from anywhere --------------------------------------------------------------------------------------


def test_files_may_be_renamed_read_only_or_in_memory(tiny_model: Path, decoder: DecoderFile, tmp_path: Path) -> None:
    """The weights of the graphs are found wherever the file is."""
    expected = Session(decoder, "synthesis").run(z=z())[0]
    data = (tiny_model / "fine.safetensors").read_bytes()
    renamed = tmp_path / "another name.bin"
    renamed.write_bytes(data)
    renamed.chmod(0o400)
    tmp_path.chmod(0o500)
    try:
        loaded = load_decoder(renamed)
    finally:
        tmp_path.chmod(0o700)
    renamed.unlink()  # nothing is read later
    for source in (loaded, load_decoder(data), load_decoder(bytes(bytearray(data)))):
        assert np.array_equal(Session(source, "synthesis").run(z=z())[0], expected)


# -- workers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_work_is_done_by_as_many_threads(threads: int) -> None:
    workers = Workers(threads)
    barrier = threading.Barrier(threads)
    used: set[int] = set()

    def work(item: int) -> None:
        used.add(threading.get_ident())
        barrier.wait(30)

    workers.run(work, range(2 * threads))
    assert len(used) == threads
    assert (threading.get_ident() in used) == (threads == 1)


@pytest.mark.parametrize("threads", [1, 3])
def test_what_is_raised_reaches_the_caller_and_the_workers_go_on(threads: int) -> None:
    workers = Workers(threads)

    def work(item: int) -> None:
        if item == 3:
            raise ValueError("item 3")

    for _ in range(2):
        with pytest.raises(ValueError, match="item 3"):
            workers.run(work, range(10))
    with pytest.raises(ValueError, match="item 3"):
        workers.run(work, [3])
    done: list[int] = []
    workers.run(done.append, range(10))
    assert sorted(done) == list(range(10))


@pytest.mark.parametrize("threads", [1, 3])
def test_one_item_is_done_by_the_caller(threads: int) -> None:
    by: list[int] = []
    Workers(threads).run(lambda item: by.append(threading.get_ident()), [0])
    assert by == [threading.get_ident()]


def test_several_callers_share_the_workers() -> None:
    workers = Workers(2)
    done: list[list[int]] = [[] for _ in range(20)]
    with ThreadPoolExecutor(4) as executor:
        list(executor.map(lambda seed: workers.run(done[seed].append, range(50)), range(20)))
    assert [sorted(items) for items in done] == [list(range(50))] * 20


@given(st.integers(0, 5000), st.integers(1, 600), st.integers(1, 9))
def test_chunks(count: int, size: int, threads: int) -> None:
    """In order, complete, none too large, about equal, as many for each thread if one piece does not hold them."""
    workers = Workers.__new__(Workers)  # without starting threads
    workers.threads = threads
    chunks = workers.chunks(count, size)
    rows = [row for chunk in chunks for row in range(chunk.start, chunk.stop)]
    assert rows == list(range(count))
    lengths = [chunk.stop - chunk.start for chunk in chunks]
    if count:
        assert 1 <= min(lengths) <= max(lengths) <= size
        assert max(lengths) - min(lengths) <= 1
        assert len(chunks) == 1 if count <= size else len(chunks) % threads == 0 or len(chunks) == count
        assert len(chunks) < count / size + threads + 1


@pytest.mark.parametrize("num_chunks", [1, FEW_CHUNKS - 1, FEW_CHUNKS, 100])
def test_few_chunks_are_done_by_the_caller(num_chunks: int) -> None:
    rows: list[int] = []
    used: set[int] = set()

    def work(chunk: slice) -> None:
        rows.extend(range(chunk.start, chunk.stop))
        used.add(threading.get_ident())

    Workers(num_chunks).run_chunks(work, 7 * num_chunks, 7)
    assert sorted(rows) == list(range(7 * num_chunks))
    assert (used == {threading.get_ident()}) == (num_chunks < FEW_CHUNKS)


# -- threads and devices --------------------------------------------------------------------------------------------


def test_default_threads_are_the_cores_one_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def cores(number: int) -> Callable[[int], set[int]]:
        return lambda pid: set(range(number))

    for number, expected in ((1, 1), (3, 3), (MAX_THREADS, MAX_THREADS), (64, MAX_THREADS)):
        monkeypatch.setattr(os, "sched_getaffinity", cores(number), raising=False)
        assert default_threads() == expected
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS and Windows
    for number, expected in ((None, 1), (2, 2), (64, MAX_THREADS)):
        monkeypatch.setattr(os, "cpu_count", lambda number=number: number)
        assert default_threads() == expected


@pytest.mark.parametrize("has_cuda", [False, True])
def test_devices(monkeypatch: pytest.MonkeyPatch, has_cuda: bool) -> None:
    monkeypatch.setattr(runtime, "has_cuda", lambda: has_cuda)
    assert resolve_device("cpu") is Device.CPU
    assert resolve_device("auto") is (Device.CUDA if has_cuda else Device.CPU)
    with pytest.raises(ConfigError, match="device must be auto, cpu or cuda, not 'tpu'"):
        resolve_device("tpu")
    if has_cuda:
        assert resolve_device("cuda") is Device.CUDA
    else:
        with pytest.raises(ConfigError, match=r"cannot use CUDA here.*onnxruntime-gpu \(the extra gpu\).*never beside"):
            resolve_device("cuda")


def test_a_build_for_cuda_without_its_libraries_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.has_cuda.cache_clear()
    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    session = onnxruntime.InferenceSession

    def without_libraries(*arguments: Any, providers: list[str], **options: Any) -> onnxruntime.InferenceSession:
        assert providers == ["CUDAExecutionProvider"]
        return session(*arguments, providers=["CPUExecutionProvider"], **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", without_libraries)
    try:
        assert not runtime.has_cuda()
    finally:
        runtime.has_cuda.cache_clear()


def test_a_gpu_multiplies_in_full_precision() -> None:
    """And what it cannot do is done by the CPU."""
    assert providers_of(Device.CPU) == ("CPUExecutionProvider",)
    assert providers_of(Device.CUDA) == (("CUDAExecutionProvider", {"use_tf32": 0}), "CPUExecutionProvider")
