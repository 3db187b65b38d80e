"""Exact arithmetic: one result for every kernel, thread count, order and history (docs/exactness.md)."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from exact_model import (
    CONFIG,
    FREQUENCIES_HASH,
    GRID,
    NUM_CODEWORDS,
    NUM_LEVELS,
    RUNS,
    coded_frequencies,
    exact_model,
    hash_of,
    model_file,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pqmim import entropy_kernels
from pqmim.codec import load_codec
from pqmim.entropy_kernels import GRAPH_KERNELS, exact_kernels
from pqmim.exact_entropy import ExactEntropyModel
from pqmim.model_files import ModelFile, find_model, load_model
from pqmim.options import Device
from pqmim.runtime import Session, Workers
from pqmim.selftest import GOLDEN, read_golden

HERE = exact_kernels(model_file())
"""Kernels that are exact on this machine."""
grids = st.tuples(st.integers(1, 9), st.integers(1, 9))


@pytest.fixture(scope="module")
def models() -> dict[str, ExactEntropyModel]:
    return {name: exact_model(name) for name in HERE}


@pytest.fixture(scope="module")
def model(models: dict[str, ExactEntropyModel]) -> ExactEntropyModel:
    return models["numpy"]


# -- the same integers everywhere ---------------------------------------------------------------------------


def test_only_one_kernel_needs_a_special_processor() -> None:
    assert set(GRAPH_KERNELS) - {"qgemm-s8"} <= set(HERE)
    assert HERE[-1] == "numpy"


def test_golden_integers_with_every_kernel(models: dict[str, ExactEntropyModel]) -> None:
    for name, model in models.items():
        assert model.kernel == name
        assert hash_of(coded_frequencies(model, *GRID)) == FREQUENCIES_HASH, name


@settings(deadline=None, max_examples=12)
@given(grids)
def test_kernels_agree_on_any_grid(models: dict[str, ExactEntropyModel], grid: tuple[int, int]) -> None:
    hashes = {hash_of(coded_frequencies(model, *grid)) for model in models.values()}
    assert len(hashes) == 1


@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize("kernel", HERE)
def test_golden_integers_with_more_threads(kernel: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # So many chunks that threads overtake each other.
    monkeypatch.setattr("pqmim.exact_entropy.CHUNK_ROWS", 8)
    monkeypatch.setattr("pqmim.exact_entropy.CHUNK_WINDOWS", 1)
    assert hash_of(coded_frequencies(exact_model(kernel, threads), *GRID)) == FREQUENCIES_HASH


@pytest.mark.parametrize(
    ("kernel", "threads", "environment"),
    [
        (GRAPH_KERNELS[1], 2, {"OMP_NUM_THREADS": "2"}),
        ("numpy", 1, {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}),
        # As on processors without AVX-512 and without AVX.
        ("numpy", 2, {"OPENBLAS_CORETYPE": "Haswell"}),
        ("numpy", 1, {"OPENBLAS_CORETYPE": "Prescott", "NPY_DISABLE_CPU_FEATURES": "every one"}),
    ],
)
def test_golden_integers_in_other_processes(kernel: str, threads: int, environment: dict[str, str]) -> None:
    program = Path(__file__).with_name("exact_model.py")
    paths = [str(Path(__file__).parents[2] / "src"), str(program.parent)]
    if "NPY_DISABLE_CPU_FEATURES" in environment:
        found = np.show_config(mode="dicts")["SIMD Extensions"]["found"]  # type: ignore[index]
        environment = environment | {"NPY_DISABLE_CPU_FEATURES": " ".join(found)}
    result = subprocess.run(
        [sys.executable, program, kernel, str(threads)],
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == [kernel, FREQUENCIES_HASH]


@pytest.mark.parametrize("kernel", HERE)
def test_settings_of_the_caller_change_nothing(kernel: str) -> None:
    with np.errstate(all="raise"):  # nothing overflows, underflows or is divided by zero
        assert hash_of(coded_frequencies(exact_model(kernel), *GRID)) == FREQUENCIES_HASH


@pytest.mark.skipif("CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="needs a GPU")
def test_golden_integers_on_a_gpu() -> None:
    for kernel in (None, "float32"):
        model = ExactEntropyModel(model_file(), Workers(1), kernel=kernel, device=Device.CUDA)
        assert hash_of(coded_frequencies(model, *GRID)) == FREQUENCIES_HASH


@pytest.mark.parametrize("level", ["off", "basic", "extended", "all"])
@pytest.mark.parametrize("kernel", sorted(set(GRAPH_KERNELS) & set(HERE)))
def test_golden_integers_however_far_graphs_are_rewritten(
    kernel: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entropy_kernels, "Session", functools.partial(Session, level=level))
    assert hash_of(coded_frequencies(exact_model(kernel), *GRID)) == FREQUENCIES_HASH


@functools.cache
def shipped(name: str) -> ModelFile:
    return load_model(find_model(name))


def golden_tokens(file: str) -> tuple[ModelFile, NDArray[np.int64], int]:
    """Model, token grid and level of a golden file."""
    from pqmim.bitstream import parse

    data, model = (GOLDEN / file).read_bytes(), read_golden()[file]["model"]
    return shipped(model), load_codec(model, device="cpu").decode_tokens(data), parse(data).level


def step_by_step(model: ExactEntropyModel, tokens: NDArray[np.int64], level: int) -> list[NDArray[np.int32]]:
    """Frequencies of every step for tokens that are known beforehand."""
    state = model.start(*tokens.shape[1:], level)
    rows = tokens.reshape(len(tokens), -1)
    coded = []
    for step in model.schedule.steps:
        positions = model.positions(state, step)
        coded.append(model.frequencies(model.head(model.hidden(state, positions), step.group), level, step.first))
        model.reveal(state, positions, step.first, step.last, rows[step.first : step.last, positions])
    return coded


@pytest.mark.parametrize(
    ("file", "is_rewritten"), [("fast-odd.pqm", True), ("fast-crop-q60.pqm", False), ("fine-crop-q60.pqm", False)]
)
def test_real_tokens_step_by_step_against_numpy(file: str, is_rewritten: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel of ONNX Runtime gives NumPy's integers in every step, however far it rewrites the graphs."""
    model_of_file, tokens, level = golden_tokens(file)
    expected = step_by_step(ExactEntropyModel(model_of_file, Workers(1), kernel="numpy"), tokens, level)
    assert all((f.sum(2) == 1 << 16).all() and (f >= 1).all() for f in expected)
    for rewriting in ("off", "basic", "extended", "all") if is_rewritten else ("basic",):
        monkeypatch.setattr(entropy_kernels, "Session", functools.partial(Session, level=rewriting))
        for kernel in exact_kernels(model_of_file)[:-1]:
            found = step_by_step(ExactEntropyModel(model_of_file, Workers(2), kernel=kernel), tokens, level)
            for step, (of_graphs, of_numpy) in enumerate(zip(found, expected, strict=True)):
                assert np.array_equal(of_graphs, of_numpy), (kernel, rewriting, step)


def test_one_token_changes_the_frequencies(model: ExactEntropyModel) -> None:
    state, other = model.start(6, 6, 0), model.start(6, 6, 0)
    positions = np.arange(36)
    tokens = np.zeros((2, 36), np.int64)
    model.reveal(state, positions, 0, 2, tokens)
    tokens[1, 7] = 3
    model.reveal(other, positions, 0, 2, tokens)
    near = np.array([8])
    before, after = (model.frequencies(model.head(model.hidden(s, near), 2), 0, 3) for s in (state, other))
    assert not np.array_equal(before, after)


def test_another_level_gives_other_frequencies(model: ExactEntropyModel) -> None:
    assert model.num_levels == NUM_LEVELS
    assert len({hash_of(coded_frequencies(model, 4, 5, level)) for level in range(NUM_LEVELS)}) == NUM_LEVELS
    positions = np.arange(4)
    hidden = [model.hidden(model.start(2, 2, level), positions) for level in range(NUM_LEVELS)]
    assert not np.array_equal(hidden[0], hidden[1])  # the network is told it,
    head = model.head(hidden[0], 0)
    by_level = [model.frequencies(head, level, 0) for level in range(NUM_LEVELS)]
    assert not np.array_equal(by_level[0], by_level[1])  # and the logits are of its codewords


def test_sub_quantizers_one_by_one_have_the_frequencies_of_the_group(models: dict[str, ExactEntropyModel]) -> None:
    for model in models.values():
        head = model.head(model.hidden(model.start(3, 4, 1), np.arange(12)), 1)  # of sub-quantizers 1 and 2
        assert head.shape == (2, 12, CONFIG.token_rank)
        together = model.frequencies(head, 1, 1)
        for m in range(2):
            assert np.array_equal(model.frequencies(head[m : m + 1], 1, 1 + m), together[m : m + 1])


@pytest.mark.parametrize("threads", [1, 3])
def test_blocks_of_a_head_have_its_frequencies(threads: int) -> None:
    model = exact_model(threads=threads)
    head = model.head(model.hidden(model.start(3, 4, 1), np.arange(12)), 2)  # of sub-quantizers 3 and 4
    together = model.frequencies(head, 1, 3)
    blocks = [(slice(m, m + 1), slice(start, start + 5)) for m in range(2) for start in (0, 5, 10)]
    found = list(model.frequency_blocks(head, 1, 3, blocks))
    assert all(np.array_equal(f, together[block]) for f, block in zip(found, blocks, strict=True))


@settings(deadline=None, max_examples=20)
@given(st.floats(0.01, 100), st.integers(0, NUM_LEVELS - 1))
def test_sharpened_frequencies_are_valid_and_the_same_for_every_kernel(
    models: dict[str, ExactEntropyModel], sharpness: float, level: int
) -> None:
    results = []
    for model in models.values():
        head = model.head(model.hidden(model.start(3, 4, level), np.arange(12)), 0)
        results.append(model.frequencies(head, level, 0, sharpness=sharpness))
    assert all(np.array_equal(result, results[0]) for result in results)
    assert (results[0] >= 1).all()
    assert (results[0].sum(-1) == 1 << 16).all()
    as_coded = model.frequencies(head, level, 0)
    assert np.array_equal(model.frequencies(head, level, 0, sharpness=1.0), as_coded)
    (flatter, sharper) = (as_coded, results[0]) if sharpness > 1 else (results[0], as_coded)
    assert (sharper.max(-1) >= flatter.max(-1) - 2).all()  # what rounding leaves goes to the first of equals


# -- what the schedule keeps --------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(grids, st.integers(0, 99))
def test_revealing_in_any_order_and_parts(
    models: dict[str, ExactEntropyModel], grid: tuple[int, int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    count = grid[0] * grid[1]
    tokens = rng.integers(NUM_CODEWORDS, size=(len(RUNS), count))
    level = seed % NUM_LEVELS
    for model in models.values():
        at_once = model.start(*grid, level)
        model.reveal(at_once, np.arange(count), 0, len(RUNS), tokens)
        in_parts = model.start(*grid, level)
        cut = int(rng.integers(1, len(RUNS)))
        for first, last in ((cut, len(RUNS)), (0, cut)):
            for part in np.array_split(rng.permutation(count), 3):
                model.reveal(in_parts, part, first, last, tokens[first:last, part])
        assert np.array_equal(at_once.embedded, in_parts.embedded)
        in_two = model.start(*grid, level)
        known = rng.random((len(RUNS), count)) < 0.5
        known[1] = known[0]
        for part in (known, ~known):
            model.reveal_grid(in_two, tokens, part)
        assert np.array_equal(at_once.embedded, in_two.embedded)


def test_embedding_sums_are_those_of_their_definition(model: ExactEntropyModel) -> None:
    """Weights times 127-fold values, plus flags of what is known and of the level, one position at a time."""
    tensors = model_file().tensors
    weight, bias = (tensors[f"entropy.embed.{part}"].astype(np.int64) for part in ("weight", "bias"))
    values = tensors["entropy.token_values"][2].astype(np.int64)
    tokens, known = np.array([[5], [0], [23], [7], [11]]), [0, 2, 4]
    features = np.zeros(weight.shape[1], np.int64)
    for m in known:
        features[RUNS[m]] = values[tokens[m, 0], RUNS[m]]
        features[RUNS[-1].stop + m] = 16  # one, in units of activations
    features[RUNS[-1].stop + len(RUNS) + 2] = 16  # the level
    state = model.start(1, 1, 2)
    model.reveal_grid(state, tokens, np.isin(np.arange(5), known)[:, None])
    assert state.embedded[0].tolist() == (weight @ features + bias).tolist()


@pytest.mark.parametrize("threads", [1, 2])
def test_hidden_at_some_positions_is_hidden_at_all(threads: int) -> None:
    for kernel in HERE:
        model = exact_model(kernel, threads)
        state = model.start(5, 6, 2)
        model.reveal(state, np.arange(30), 0, 2, np.tile(np.arange(30) % NUM_CODEWORDS, (2, 1)))
        everywhere = model.hidden(state, np.arange(30))
        some = np.array([3, 4, 17, 29])
        assert np.array_equal(model.hidden(state, some), everywhere[some])
        assert model.hidden(state, some[:0]).shape == (0, CONFIG.width)
        head, some_head = model.head(everywhere, 1), model.head(everywhere[some], 1)
        assert np.array_equal(some_head, head[:, some])
        assert np.array_equal(model.frequencies(some_head, 2, 1), model.frequencies(head, 2, 1)[:, some])


def test_a_chunk_more_or_less_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for rows, windows in ((1, 1), (7, 3), (4096, 4096)):
        monkeypatch.setattr("pqmim.exact_entropy.CHUNK_ROWS", rows)
        monkeypatch.setattr("pqmim.exact_entropy.CHUNK_WINDOWS", windows)
        assert hash_of(coded_frequencies(exact_model(), *GRID)) == FREQUENCIES_HASH
