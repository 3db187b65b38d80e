"""Exact arithmetic: one result for every kernel, thread count, order and history (docs/exactness.md)."""

import functools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from exact_model import (
    ALPHABETS,
    CONFIG,
    FREQUENCIES_HASH,
    GROUPS,
    NUM_CODEWORDS,
    NUM_LEVELS,
    RUNS,
    SIZES,
    all_frequencies,
    block_frequencies,
    coded_frequencies,
    exact_model,
    formula_tokens,
    hash_of,
    is_same,
    model_file,
    step_frequencies,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pqmim import entropy_kernels
from pqmim.codec import load_codec
from pqmim.entropy_kernels import GRAPH_KERNELS, exact_kernels
from pqmim.exact_entropy import ExactEntropyModel
from pqmim.exact_numpy import ZERO, frequencies_of_logits
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
        assert hash_of(all_frequencies(model)) == FREQUENCIES_HASH, name


@settings(deadline=None, max_examples=12)
@given(grids)
def test_kernels_agree_on_any_grid(models: dict[str, ExactEntropyModel], grid: tuple[int, int]) -> None:
    hashes = {hash_of(coded_frequencies(model, *grid)) for model in models.values()}
    assert len(hashes) == 1


@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize("kernel", HERE)
def test_golden_integers_with_more_threads(kernel: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # So many chunks that threads overtake each other.
    monkeypatch.setattr("pqmim.exact_layers.CHUNK_ROWS", 8)
    monkeypatch.setattr("pqmim.runtime.FEW_CHUNKS", 1)
    assert hash_of(all_frequencies(exact_model(kernel, threads))) == FREQUENCIES_HASH


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
        assert hash_of(all_frequencies(exact_model(kernel))) == FREQUENCIES_HASH


@pytest.mark.skipif("CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="needs a GPU")
def test_golden_integers_on_a_gpu() -> None:
    for kernel in (None, "float32"):
        model = ExactEntropyModel(model_file(), Workers(1), kernel=kernel, device=Device.CUDA)
        assert hash_of(all_frequencies(model)) == FREQUENCIES_HASH


@pytest.mark.parametrize("level", ["off", "basic", "extended", "all"])
@pytest.mark.parametrize("kernel", sorted(set(GRAPH_KERNELS) & set(HERE)))
def test_golden_integers_however_far_graphs_are_rewritten(
    kernel: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entropy_kernels, "Session", functools.partial(Session, level=level))
    assert hash_of(all_frequencies(exact_model(kernel))) == FREQUENCIES_HASH


@functools.cache
def shipped(name: str) -> ModelFile:
    return load_model(find_model(name))


def golden_tokens(file: str) -> tuple[ModelFile, NDArray[np.int64], int]:
    """Model, token grid and level of a golden file."""
    from pqmim.bitstream import parse

    data, model = (GOLDEN / file).read_bytes(), read_golden()[file]["model"]
    return shipped(model), load_codec(model, device="cpu").decode_tokens(data), parse(data).level


@pytest.mark.parametrize(
    ("file", "is_rewritten"), [("fast-odd.pqm", True), ("fast-crop-q60.pqm", False), ("fine-crop-q60.pqm", False)]
)
def test_real_tokens_step_by_step_against_numpy(file: str, is_rewritten: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel of ONNX Runtime gives NumPy's integers in every step, however far it rewrites the graphs."""
    model_of_file, tokens, level = golden_tokens(file)
    expected = step_frequencies(ExactEntropyModel(model_of_file, Workers(1), kernel="numpy"), tokens, level)
    assert all((f.sum(2) == 1 << 16).all() and (f >= 1).all() for step in expected for f in step)
    for rewriting in ("off", "basic", "extended", "all") if is_rewritten else ("basic",):
        monkeypatch.setattr(entropy_kernels, "Session", functools.partial(Session, level=rewriting))
        for kernel in exact_kernels(model_of_file)[:-1]:
            found = step_frequencies(ExactEntropyModel(model_of_file, Workers(2), kernel=kernel), tokens, level)
            assert all(is_same(found, expected)), (kernel, rewriting)


def head_of(model: ExactEntropyModel, height: int, width: int, level: int, group: int) -> NDArray[np.uint8]:
    """Head outputs of a group where nothing is known."""
    unknown = np.zeros((len(RUNS), height * width), np.int64)
    heads = model.heads_of_known(height, width, level, unknown, unknown.astype(np.bool_))
    return list(heads)[group]


def test_another_level_gives_other_frequencies(model: ExactEntropyModel) -> None:
    assert model.alphabets.num_levels == NUM_LEVELS
    assert len({hash_of(coded_frequencies(model, 4, 5, level)) for level in range(NUM_LEVELS)}) == NUM_LEVELS
    heads = [head_of(model, 2, 2, level, 0)[:1] for level in range(NUM_LEVELS)]
    assert not np.array_equal(heads[0], heads[1])  # the network is told it,
    by_level = [model.frequencies(heads[0], level, 0) for level in range(NUM_LEVELS)]
    assert [f.shape[2] for f in by_level] == [sizes[0] for sizes in SIZES]
    assert not np.array_equal(by_level[0], by_level[1])  # and the logits are of its codewords


def test_sub_quantizers_one_by_one_have_the_frequencies_of_the_group(models: dict[str, ExactEntropyModel]) -> None:
    for model in models.values():
        head = head_of(model, 3, 4, 0, 1)  # of sub-quantizers 2 and 3
        assert head.shape == (2, 12, CONFIG.token_rank)
        together = model.frequencies(head, 0, 2)
        assert together.shape == (2, 12, 16)
        for m in range(2):
            assert np.array_equal(model.frequencies(head[m : m + 1], 0, 2 + m), together[m : m + 1])


def test_frequencies_are_those_of_their_definition(models: dict[str, ExactEntropyModel]) -> None:
    """Factors and biases of each codeword where the alphabets of all before it end."""
    tensors, table = model_file().tensors, model_file().tensors["entropy.logit_table"].astype(np.float32)
    start = 0
    for level, m in np.ndindex(NUM_LEVELS, len(RUNS)):
        own = slice(start, start + SIZES[level][m])
        start = own.stop
        group = next(group for group, members in enumerate(GROUPS) if m < members.stop)
        for model in models.values():
            head = head_of(model, 2, 3, level, group)[m - GROUPS[group].start][None]
            products = (head[0].astype(int) - ZERO) @ tensors["entropy.token_factors.weight"][own].astype(int).T
            logits = np.rint(products.astype(np.float32) * tensors["entropy.token_factors.scale"][level, m])
            expected = frequencies_of_logits(logits + tensors["entropy.token_bias"][own].astype(np.float32), table)
            assert np.array_equal(model.frequencies(head, level, m)[0], expected)
            static = model.static_frequencies(level, m, 1)
            assert np.array_equal(static[0], tensors["entropy.static_frequencies"][own])
    assert start == ALPHABETS.num_codewords


def test_blocks_of_a_head_have_its_frequencies() -> None:
    model = exact_model()
    head = head_of(model, 3, 4, 0, 1)  # of sub-quantizers 2 and 3
    together = model.frequencies(head, 0, 2)
    blocks = [(slice(m, m + 1), slice(start, start + 5)) for m in range(2) for start in (0, 5, 10)]
    found = list(model.frequency_blocks(head, 0, 2, blocks))
    assert all(np.array_equal(f, together[block]) for f, block in zip(found, blocks, strict=True))


@settings(deadline=None, max_examples=20)
@given(st.floats(0.01, 100), st.integers(0, NUM_LEVELS - 1))
def test_sharpened_frequencies_are_valid_and_the_same_for_every_kernel(
    models: dict[str, ExactEntropyModel], sharpness: float, level: int
) -> None:
    results = []
    for model in models.values():
        head = head_of(model, 3, 4, level, 0)[:1]
        results.append(model.frequencies(head, level, 0, sharpness=sharpness))
    assert all(np.array_equal(result, results[0]) for result in results)
    assert (results[0] >= 1).all()
    assert (results[0].sum(-1) == 1 << 16).all()
    as_coded = model.frequencies(head, level, 0)
    assert np.array_equal(model.frequencies(head, level, 0, sharpness=1.0), as_coded)
    (flatter, sharper) = (as_coded, results[0]) if sharpness > 1 else (results[0], as_coded)
    assert (sharper.max(-1) >= flatter.max(-1) - 2).all()  # what rounding leaves goes to the first of equals


# -- what is kept, and who sees it --------------------------------------------------------------------------


def everything_at_once(
    model: ExactEntropyModel, tokens: NDArray[np.int64], level: int
) -> list[list[NDArray[np.int32]]]:
    """`step_frequencies` but the first, and of all steps, by definition: both streams at all positions, what may not be
    seen masked."""
    m, height, width = tokens.shape
    parts, rows, window = model._reference, tokens.reshape(m, -1), CONFIG.window
    count, schedule = height * width, model.schedule
    label = np.empty(count, np.int64)
    for index, step in enumerate(schedule.steps_of(0)):
        label[model.positions(model.start(height, width, level), step)] = index
    y, x = np.divmod(np.arange(count), width)

    def shift(own: NDArray[np.uint8], content: NDArray[np.uint8], limit: NDArray[np.int64]) -> NDArray[np.uint8]:
        mixed, chunk = own.copy(), CONFIG.width // 16
        ways = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
        for index, (dy, dx) in enumerate(ways, start=8):
            columns = slice(index * chunk, (index + 1) * chunk)
            for p in range(count):
                neighbor = (y[p] + dy) * width + x[p] + dx
                is_inside = 0 <= y[p] + dy < height and 0 <= x[p] + dx < width
                is_seen = is_inside and label[neighbor] <= limit[p]
                mixed[p, columns] = content[neighbor, columns] if is_seen else 128
        return mixed

    def attend(
        layer: int, own: NDArray[np.uint8], content: NDArray[np.uint8], limit: NDArray[np.int64]
    ) -> NDArray[np.uint8]:
        mixed = np.empty((count, CONFIG.width), np.uint8)
        offset = window // 2 if CONFIG.is_shifted(layer) else 0
        window_of = (y + offset) // window * 1000 + (x + offset) // window
        kv = parts.keys_values(layer, content)
        table = model_file().tensors[f"entropy.layers.{layer}.attention.position_bias"]
        for p in range(count):
            keys = np.flatnonzero((window_of == window_of[p]) & (label <= limit[p]))
            if len(keys) == 0:
                keys = np.array([p])  # hidden by the mask
            mask = np.where(label[keys] <= limit[p], 0, -(1 << 20)).astype(np.float32)[None, None, None]
            pairs = (y[p] - y[keys] + window - 1) * (2 * window - 1) + x[p] - x[keys] + window - 1
            bias = table[pairs].T[:, None].astype(np.float32)
            mixed[p] = parts.attend(layer, own[None, None, p], kv[None, keys], bias, mask)[0]
        return mixed

    def layer_of(
        layer: int, h: NDArray[np.float32], own: NDArray[np.uint8], content: NDArray[np.uint8], limit: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        if CONFIG.has_attention(layer):
            seen = shift(content, content, label if limit is not everything else everything)
            mixed = attend(layer, shift(own, content, limit), seen, limit)
            return parts.project(layer, h, mixed)
        return h, own

    everything = np.full(count, 99)
    nothing_known = np.zeros((m, count), np.bool_)
    first = slice(*schedule.group_bounds(0))
    zeros = np.zeros((count, CONFIG.width), np.float32)
    content = parts.embed(0, zeros, model._layers.sums(0, rows[first], None, level))
    query = parts.embed(0, zeros, model._layers.sums(0, rows[first], nothing_known[first], level))
    for layer in CONFIG.layers_of(0):
        before = content
        new_query = layer_of(layer, *query, content[1], label - 1)
        content = layer_of(layer, *content, content[1], label)
        if CONFIG.is_last(layer):
            query = parts.feed(layer, *new_query)
        else:
            query = parts.feed(layer, new_query[0], shift(new_query[1], content[1], label - 1))
            content = parts.feed(layer, content[0], shift(content[1], content[1], label))
    frequencies = []
    for step in schedule.steps_of(0)[1:]:
        positions = model.positions(model.start(height, width, level), step)
        head = model._layers.head(query[1][positions], 0)
        frequencies.append(block_frequencies(model, head, level, 0, first.stop, len(positions)))
    stream = before
    for group in range(1, schedule.num_groups):
        own_rows = slice(*schedule.group_bounds(group))
        output = (np.empty_like(stream[0]), np.empty_like(stream[1]))
        for step in schedule.steps_of(group):
            positions = model.positions(model.start(height, width, level), step)
            known = np.tile(np.isin(np.arange(count), positions, invert=True), (m, 1))
            for later in schedule.steps_of(group):
                if later.begin > step.begin:
                    known[:, model.positions(model.start(height, width, level), later)] = False
            sums = model._layers.sums(group, rows[own_rows], known[own_rows], level)
            h, x_of = parts.embed(group, stream[0], sums)
            h, x_of = np.where(known[0][:, None], h, stream[0]), np.where(known[0][:, None], x_of, stream[1])
            for layer in CONFIG.layers_of(group):
                h, x_of = layer_of(layer, h, x_of, x_of, everything)
                h, x_of = parts.feed(layer, h, x_of if CONFIG.is_last(layer) else shift(x_of, x_of, everything))
            output[0][positions], output[1][positions] = h[positions], x_of[positions]
            head = model._layers.head(x_of[positions], group)
            frequencies.append(block_frequencies(model, head, level, own_rows.start, own_rows.stop, len(positions)))
        stream = parts.embed(group, output[0], model._layers.sums(group, rows[own_rows], None, level))
    return frequencies


@pytest.mark.parametrize(("grid", "level"), [((4, 8), 0), ((7, 5), 1), ((7, 5), 2), ((9, 9), 1)])
def test_what_is_kept_is_what_a_pass_over_everything_gives(
    model: ExactEntropyModel, grid: tuple[int, int], level: int
) -> None:
    tokens = formula_tokens(*grid, level)
    expected = everything_at_once(model, tokens, level)
    static, *found = step_frequencies(model, tokens, level)
    coded = [m for m in range(GROUPS[0].stop) if SIZES[level][m] > 1]
    rows = [row for block in static for row in block]
    assert all((row == model.static_frequencies(level, m, 1)).all() for m, row in zip(coded, rows, strict=True))
    assert len(found) == (6 if level == 2 else 7)  # at the coarsest level the last group is silent
    assert all(is_same(found, expected[: len(found)]))
    assert not any(expected[len(found) :])


def test_steps_end_with_the_last_token_that_is_sent(model: ExactEntropyModel) -> None:
    assert [len(model.steps(level)) for level in range(NUM_LEVELS)] == [8, 8, 7]
    assert model.steps(2) == model.schedule.steps[:7]
    assert [sum(map(len, step)) for step in coded_frequencies(model, 8, 8, 2)] == [1] * 7
    assert [sum(map(len, step)) for step in coded_frequencies(model, 8, 8, 1)] == [*[2] * 5, 1, 1, 1]


@pytest.mark.parametrize("changed", range(8))
def test_no_step_sees_its_own_or_a_later_token(model: ExactEntropyModel, changed: int) -> None:
    tokens = formula_tokens(8, 8)
    before = step_frequencies(model, tokens)
    step = model.schedule.steps[changed]
    positions = model.positions(model.start(8, 8, 1), step)
    rows = tokens.reshape(len(tokens), -1)
    own = slice(step.first, step.last)
    rows[own, positions] = (rows[own, positions] + 5) % ALPHABETS.sizes[1, own, None]
    same = is_same(before, step_frequencies(model, tokens))
    assert all(same[: changed + 1])
    assert not any(same[changed + 1 :])


def test_the_first_step_needs_no_network(model: ExactEntropyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_layers", None)
    state = model.start(5, 5, 0)
    assert model.head(state, model.schedule.steps[0]) is None
    static = model.static_frequencies(0, 0, 2)
    assert static.shape == (2, NUM_CODEWORDS)
    assert (static.sum(-1) == 1 << 16).all()
    blocks = list(model.frequency_blocks(None, 0, 0, [(slice(0, 2), slice(2, 6)), (slice(1, 2), slice(0, 3))]))
    assert np.array_equal(blocks[0], np.repeat(static[:, None], 4, axis=1))
    assert np.array_equal(blocks[1], np.repeat(static[1:, None], 3, axis=1))


# -- any known tokens ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=15)
@given(grids, st.sampled_from([0.0, 0.2, 0.7, 1.0]), st.integers(0, 99))
def test_unknown_tokens_have_no_influence_and_kernels_agree(
    models: dict[str, ExactEntropyModel], grid: tuple[int, int], share: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    shape, level = (len(RUNS), grid[0] * grid[1]), seed % NUM_LEVELS
    known = rng.random(shape) < share
    expected = None
    for model in models.values():
        others = rng.integers(ALPHABETS.sizes[level, :, None], size=shape)
        tokens = np.where(known, formula_tokens(*grid, level).reshape(shape), others)
        heads = list(model.heads_of_known(*grid, level, tokens, known))
        assert [len(head) for head in heads] == [2, 2, 1]
        for head, rows in zip(heads, GROUPS, strict=True):
            assert head.shape[1:] == ((~known[rows]).any(0).sum(), CONFIG.token_rank)
        expected = heads if expected is None else expected
        assert all(np.array_equal(head, e) for head, e in zip(heads, expected, strict=True))


def test_known_tokens_have_influence_within_their_group_and_after_it(model: ExactEntropyModel) -> None:
    tokens, known = np.zeros((len(RUNS), 36), np.int64), np.zeros((len(RUNS), 36), np.bool_)
    known[:, 7] = True
    before = list(model.heads_of_known(6, 6, 0, tokens, known))
    for group, m in enumerate((0, 2, 4)):
        other = tokens.copy()
        other[m, 7] = 3
        after = list(model.heads_of_known(6, 6, 0, other, known))
        same = [np.array_equal(b, a) for b, a in zip(before, after, strict=True)]
        assert same == [earlier < group for earlier in range(3)]


def test_embedding_sums_are_those_of_their_definition(model: ExactEntropyModel) -> None:
    """Weights times 127-fold values, plus flags of what is known and of the level."""
    tensors = model_file().tensors
    some, known = (
        np.array([[5, 1], [0, 12], [15, 3], [7, 14], [4, 2]]),
        np.array([[1, 0], [1, 1], [0, 1], [1, 1], [1, 0]]),
    )
    place = 0
    for level in range(NUM_LEVELS):
        tokens, values = some % ALPHABETS.sizes[level, :, None], []
        for m, run in enumerate(RUNS):
            shape = SIZES[level][m], run.stop - run.start
            own = tensors["entropy.token_values"][place : place + math.prod(shape)]
            values.append(own.reshape(shape).astype(np.int64))
            place += math.prod(shape)
        for group, rows in enumerate(GROUPS):
            weight = tensors[f"entropy.embed.{group}.weight"].astype(np.int64)
            start, stop = RUNS[rows.start].start, RUNS[rows.stop - 1].stop
            sums = model._layers.sums(group, tokens[rows], known[rows].astype(np.bool_), level)
            for position in range(2):
                features = np.zeros(weight.shape[1], np.int64)
                for m in range(rows.start, rows.stop):
                    if known[m, position]:
                        features[RUNS[m].start - start : RUNS[m].stop - start] = values[m][tokens[m, position]]
                        features[stop - start + m - rows.start] = 16  # one, in units of activations
                expected = weight @ features
                if group == 0:
                    features[level - NUM_LEVELS] = 16
                    expected = weight @ features + tensors["entropy.embed.0.bias"]
                assert sums[position].tolist() == expected.tolist()
            everything = np.ones((rows.stop - rows.start, 2), np.bool_)
            given = model._layers.sums(group, tokens[rows], everything, level)
            assert np.array_equal(model._layers.sums(group, tokens[rows], None, level), given)
    assert place == ALPHABETS.num_values


def test_a_chunk_more_or_less_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for rows in (1, 7, 100_000):
        monkeypatch.setattr("pqmim.exact_layers.CHUNK_ROWS", rows)
        assert hash_of(all_frequencies(exact_model())) == FREQUENCIES_HASH
