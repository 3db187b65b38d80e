"""Operations of the exact arithmetic, each against its definition, in NumPy and in ONNX Runtime (docs/exactness.md)."""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from exact_model import CONFIG, GROUPS, INNER_SIZES, NUM_PRODUCTS, VOCABULARIES, exact_tensors, model_file
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pqmim.entropy_kernels import GRAPH_KERNELS, GraphParts, exact_kernels
from pqmim.exact_numpy import ZERO, NumpyParts, Parts, _Linear, _normalize, frequencies_of_logits
from pqmim.fixed_point import EXPONENTIAL_ONE, INT8_MAX, LOGIT_UNIT, MAX_INNER, RESIDUAL_MAX, bias_room
from pqmim.range_coding import PRECISION
from pqmim.runtime import Session

HERE = exact_kernels(model_file())
GRAPHS_HERE = [kernel for kernel in HERE if kernel in GRAPH_KERNELS]


def session(name: str, tensors: dict[str, NDArray[Any]] | None = None) -> Session:
    return Session(replace(model_file(), tensors=tensors or model_file().tensors), name)


def in_numpy(function: np.ufunc) -> Callable[..., NDArray[Any]]:
    return lambda *operands: function(*operands)


def in_a_graph(name: str) -> Callable[..., NDArray[Any]]:
    graph = session(name)
    return lambda *operands: graph.run(**dict(zip("ab", operands, strict=False)))[0]


# -- products -----------------------------------------------------------------------------------------------


def layer(weight: NDArray[np.int64], bias: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Tensors of a layer whose outputs are its integers."""
    scale = np.ones(len(weight), np.float32)
    parts = {"weight": weight.astype(np.int8), "bias": bias.astype(np.int32), "scale": scale}
    return {f"entropy.product.{name}": tensor for name, tensor in parts.items()}


def product(
    kernel: str, tensors: dict[str, NDArray[Any]], x: NDArray[np.int64], *, is_hidden: bool = False
) -> NDArray[Any]:
    """A linear layer of a kernel on integers (n, k): (n, NUM_PRODUCTS) float32."""
    if kernel == "numpy":
        return _Linear(*(tensors[f"entropy.product.{part}"] for part in ("weight", "bias", "scale")))(
            x.astype(np.float32)
        )
    kind = "hidden" if is_hidden else "product"
    activations = (x if is_hidden else x + ZERO).astype(np.uint8)
    return session(f"{kernel}/{kind}.{x.shape[1]}", tensors).run(x=activations)[0]


@pytest.mark.parametrize("inner", INNER_SIZES)
@pytest.mark.parametrize("rows", [1, 16, 33])
@pytest.mark.parametrize("kernel", HERE)
def test_products_of_the_largest_operands(kernel: str, inner: int, rows: int) -> None:
    room = bias_room(inner)
    for sign in (1, -1):
        x = np.full((rows, inner), INT8_MAX)
        x[::2] = -INT8_MAX
        weight = np.full((NUM_PRODUCTS, inner), sign * INT8_MAX)
        weight[4:, ::2] = -INT8_MAX
        for bias in (np.zeros(NUM_PRODUCTS, int), np.resize([room, -room], NUM_PRODUCTS)):
            tensors = layer(weight, bias)
            found = product(kernel, tensors, x)
            assert found.dtype == np.float32
            assert np.array_equal(found, x @ weight.T + bias)
            hidden = np.abs(x)
            assert np.array_equal(product(kernel, tensors, hidden, is_hidden=True), hidden @ weight.T + bias)
    assert inner * INT8_MAX**2 + room < 1 << 24


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(INNER_SIZES), st.integers(1, 40), st.integers(0, 999))
def test_products_of_any_operands(inner: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(-INT8_MAX, INT8_MAX + 1, (rows, inner))
    weight = rng.integers(-INT8_MAX, INT8_MAX + 1, (NUM_PRODUCTS, inner))
    bias = rng.integers(-bias_room(inner), bias_room(inner) + 1, NUM_PRODUCTS)
    for kernel in HERE:
        assert np.array_equal(product(kernel, layer(weight, bias), x), x @ weight.T + bias)
        hidden = np.abs(x)
        found = product(kernel, layer(weight, bias), hidden, is_hidden=True)
        assert np.array_equal(found, hidden @ weight.T + bias)


# -- single operations that are correctly rounded -----------------------------------------------------------


@pytest.mark.parametrize("square_root", [in_numpy(np.sqrt), in_a_graph("square_root")], ids=["numpy", "onnxruntime"])
@settings(deadline=None)
@given(numbers=st.lists(st.integers(1, 2**52), min_size=1, max_size=40))
def test_square_roots_are_correctly_rounded(
    square_root: Callable[..., NDArray[np.float64]], numbers: list[int]
) -> None:
    # 40 numbers a time and not one: some libraries go astray in vectors only.
    roots = square_root(np.array(numbers, np.float64))
    for number, root in zip(numbers, roots.tolist(), strict=True):
        below, above = (Fraction(math.nextafter(root, to)) for to in (0.0, math.inf))
        assert ((below + Fraction(root)) / 2) ** 2 < number < ((above + Fraction(root)) / 2) ** 2


@pytest.mark.parametrize("divide", [in_numpy(np.divide), in_a_graph("quotient.float64")], ids=["numpy", "onnxruntime"])
@settings(deadline=None)
@given(numerator=st.integers(1, 2**24), numbers=st.lists(st.integers(1, 2**40), min_size=1, max_size=40))
def test_divisions_are_correctly_rounded(
    divide: Callable[..., NDArray[np.float64]], numerator: int, numbers: list[int]
) -> None:
    operands = np.array(numbers, np.float64)
    quotients = divide(np.full_like(operands, numerator), operands)
    for number, quotient in zip(numbers, quotients.tolist(), strict=True):
        assert quotient == numerator / number  # Python divides integers with correct rounding


@pytest.mark.parametrize("divide", [in_numpy(np.divide), in_a_graph("quotient.float32")], ids=["numpy", "onnxruntime"])
@settings(deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(-(2**24), 2**24), st.integers(1, 2**24)), min_size=1, max_size=40))
def test_divisions_in_single_precision_are_correctly_rounded(
    divide: Callable[..., NDArray[np.float32]], pairs: list[tuple[int, int]]
) -> None:
    a, b = np.array(pairs, np.float32).T.copy()
    for (numerator, number), quotient in zip(pairs, divide(a, b), strict=True):
        below, above = (Fraction(float(np.nextafter(quotient, np.float32(to)))) for to in (-np.inf, np.inf))
        here = Fraction(float(quotient))
        assert (below + here) / 2 <= Fraction(numerator, number) <= (above + here) / 2


# -- normalization ------------------------------------------------------------------------------------------


def test_residual_stream_at_its_bounds_normalizes_exactly() -> None:
    h = np.full((3, 64), RESIDUAL_MAX, np.float32)
    h[1] = 0
    h[2, 1:] = 0
    normalized = _normalize(h).astype(int) - ZERO
    assert normalized[0].tolist() == [16] * 64  # one, on the activation grid
    assert normalized[1].tolist() == [0] * 64
    assert normalized[2].tolist() == [INT8_MAX] + [0] * 63  # 8 exceeds the grid
    assert MAX_INNER * RESIDUAL_MAX**2 + 1 < 2**53


@functools.cache
def parts_of(kernel: str) -> Parts:
    model = model_file()
    count = model.config.tokenizer.quantizer.num_subquantizers
    return NumpyParts(CONFIG, count, model.tensors) if kernel == "numpy" else GraphParts(model, kernel)


PARTS = (parts_of("numpy"), parts_of("float32"))
"""Those whose graphs are not about the same as another's."""


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 9999), st.sampled_from([1, 30, 1000, 1 << 15, (1 << 24) - 1]))
def test_embedding_sums_to_the_residual_stream(seed: int, largest: int) -> None:
    """Against correctly rounded operations one by one, in Python's integers and fractions."""
    rng = np.random.default_rng(seed)
    embedded = rng.integers(-largest, largest + 1, (3, CONFIG.width)).astype(np.float32)
    before = rng.integers(-RESIDUAL_MAX, RESIDUAL_MAX + 1, embedded.shape).astype(np.float32)
    scale = model_file().tensors["entropy.embed.0.scale"]
    expected_h = np.clip(before + np.rint(embedded * scale), -RESIDUAL_MAX, RESIDUAL_MAX)  # one operation each
    expected_x = []
    for row in expected_h.tolist():
        total = sum(int(value) ** 2 for value in row) + 1
        gain = np.float32((math.sqrt(CONFIG.width) * 16) / math.sqrt(total))
        expected_x.append([min(max(round(float(np.float32(value) * gain)), -127), 127) for value in row])
    for parts in PARTS:
        h, x = parts.embed(0, before, embedded)
        assert np.array_equal(h, expected_h), parts.kernel
        assert (x.astype(int) - ZERO).tolist() == expected_x, parts.kernel


# -- types --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", HERE)
def test_parts_have_the_types_that_their_rounding_rests_on(kernel: str) -> None:
    """A product in float64 would be rounded otherwise: NumPy's promotions are not to creep in."""
    parts = parts_of(kernel)
    rng = np.random.default_rng(0)
    num_keys = CONFIG.window**2
    x = rng.integers(1, 256, (num_keys, CONFIG.width), np.uint8)
    sums = rng.integers(-4000, 4000, x.shape).astype(np.float32)
    h, _ = embedded = parts.embed(1, np.zeros_like(sums), sums)
    kv = parts.keys_values(0, x)
    mixed = attended(parts, x, kv)
    for stream, activations in (embedded, parts.project(0, h, mixed), parts.feed(1, h, x)):
        assert stream.dtype == np.float32
        assert activations.dtype == np.uint8
    head = parts.head(1, x)
    assert (kv.dtype, mixed.dtype, head.dtype) == (np.uint8, np.uint8, np.uint8)
    assert parts.frequencies(head[:1], 0, GROUPS[1].start).dtype == np.int32


@pytest.mark.parametrize(
    ("value", "total"), [(2608, 107135208), (2356, 324604160), (2737, 92969553), (3459, 88935795), (671, 546425761)]
)
def test_products_are_rounded_to_single_precision_before_they_are_rounded_to_integers(value: int, total: int) -> None:
    """Where the exact product lies beyond a half, and the nearest float32 is the half itself, which goes to even."""
    row, rest = [value], total - 1 - value**2
    while rest:  # squares that add up to the total
        row.append(math.isqrt(rest))
        rest -= row[-1] ** 2
    h = np.zeros((1, CONFIG.width), np.float32)
    h[0, : len(row)] = row
    gain = np.float32((math.sqrt(CONFIG.width) * 16) / math.sqrt(total))
    in_single = round(float(np.float32(value) * gain))
    assert in_single != round(value * float(gain))
    assert _normalize(h)[0, 0] == ZERO + in_single
    nothing = np.full((1, CONFIG.width), ZERO, np.uint8)  # an update of what the biases give
    for kernel in HERE:
        parts = parts_of(kernel)
        update = parts.project(0, np.zeros_like(h), nothing)[0]
        h_out, x_out = parts.project(0, h - update, nothing)
        assert np.array_equal(h_out, h)
        assert x_out[0, 0] == ZERO + in_single, kernel


# -- attention ----------------------------------------------------------------------------------------------


def attended(
    parts: Parts, x: NDArray[np.uint8], kv: NDArray[np.uint8], mask: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Attention of layer 0 in one window, without a position bias: (n, C)."""
    if mask is None:
        mask = np.zeros((1, 1, 1, len(kv)), np.float32)
    bias = np.zeros((CONFIG.width // CONFIG.head_width, len(x), len(kv)), np.float32)
    return parts.attend(0, x[None], kv[None], bias, mask)


def without_sink(least: int = -(1 << 15)) -> tuple[Parts, Parts]:
    """Parts in which no query takes to the sink."""
    sink = {"entropy.layers.0.attention.sink": np.full(CONFIG.width // CONFIG.head_width, least, np.int32)}
    model = replace(model_file(), tensors=model_file().tensors | sink)
    count = model.config.tokenizer.quantizer.num_subquantizers
    return NumpyParts(CONFIG, count, model.tensors), GraphParts(model, "float32")


def test_keys_without_content_have_no_say() -> None:
    """Whatever lies in their places, queries take from the others."""
    rng = np.random.default_rng(0)
    num_keys, known = CONFIG.window**2, 5
    mask = np.zeros((1, 1, 1, num_keys), np.float32)
    mask[..., known:] = -float(1 << 20)
    x = rng.integers(1, 256, (3, CONFIG.width), np.uint8)
    kv = rng.integers(1, 256, (num_keys, 2 * CONFIG.width), np.uint8)
    other = kv.copy()
    other[known:] = rng.integers(1, 256, other[known:].shape)
    for parts in PARTS:
        assert np.array_equal(attended(parts, x, kv, mask), attended(parts, x, other, mask))
        assert np.array_equal(attended(parts, x, kv, mask), attended(parts, x, kv[:known]))
        assert not np.array_equal(attended(parts, x, kv), attended(parts, x, other))
        mask_all = np.full_like(mask, -float(1 << 20))
        assert (attended(parts, x, kv, mask_all) == ZERO).all()  # the sink alone is left


def test_a_mean_of_equal_values_is_the_value_without_a_sink_and_less_with_one() -> None:
    rng = np.random.default_rng(1)
    x = rng.integers(1, 256, (3, CONFIG.width), np.uint8)
    kv = np.tile(rng.integers(1, 256, 2 * CONFIG.width, np.uint8), (7, 1))
    values = kv[0, CONFIG.width :]
    for parts in without_sink():
        assert (attended(parts, x, kv) == values).all()
    for parts in without_sink(1 << 15):
        assert (attended(parts, x, kv) == ZERO).all()
    scores = np.zeros_like(kv)
    scores[:, : CONFIG.width] = ZERO  # all scores are zero, as is that of the sink
    scores[:, CONFIG.width :] = values
    for parts in without_sink(0):
        expected = np.rint((values.astype(np.float32) - ZERO) * 7 / 8)
        assert (attended(parts, x, scores).astype(int) - ZERO == expected).all()


# -- frequencies --------------------------------------------------------------------------------------------

LOGIT_TABLE = exact_tensors()["logit_table"].astype(np.float32)


def frequencies_in_numpy(logits: NDArray[np.float32]) -> NDArray[np.int32]:
    return frequencies_of_logits(logits, LOGIT_TABLE)


def frequencies_in_a_graph(logits: NDArray[np.float32]) -> NDArray[np.int32]:
    """Frequencies of logits (n, K) that are handed over as biases."""
    count, num_codewords = logits.shape
    rank = CONFIG.token_rank
    return session("frequencies").run(
        head=np.full((count, 1, rank), ZERO, np.uint8),
        factors=np.zeros((count, num_codewords, rank), np.int8),
        scale=np.ones((count, 1, 1), np.float32),
        bias=logits.astype(np.int32)[:, None],
    )[0][:, 0]


def many_logits(num_codewords: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(num_codewords)
    rows = [
        np.zeros((1, num_codewords)),
        np.full((1, num_codewords), -(1 << 24)),
        np.arange(num_codewords)[None],
        np.linspace(-(1 << 24), 1 << 24, num_codewords).round()[None],
        (rng.normal(size=(200, num_codewords)) * np.logspace(0, 4, 200)[:, None]).round(),
    ]
    return np.concatenate(rows).astype(np.float32)


@pytest.mark.parametrize("num_codewords", VOCABULARIES)
def test_frequencies_are_valid_for_any_logits(num_codewords: int) -> None:
    logits = many_logits(num_codewords)
    frequencies = frequencies_in_numpy(logits.copy())
    assert frequencies.dtype == np.int32
    assert (frequencies >= 1).all()
    assert (frequencies.sum(1) == 1 << PRECISION).all()
    best = np.take_along_axis(frequencies, logits.argmax(1)[:, None], 1)
    assert (best[:, 0] == frequencies.max(1)).all()
    first, *others = frequencies[0].tolist()
    assert len(set(others)) <= 1  # among equals the first takes what rounding leaves
    assert first >= max(others, default=0)


@pytest.mark.parametrize("num_codewords", VOCABULARIES)
def test_frequencies_of_a_graph_are_those_of_numpy(num_codewords: int) -> None:
    logits = many_logits(num_codewords)
    assert np.array_equal(frequencies_in_a_graph(logits), frequencies_in_numpy(logits))


def test_frequencies_follow_their_definition_in_integers() -> None:
    """Share and products in exact fractions: floating point differs by a rounding, which a floor may show by one."""
    for row in many_logits(16)[[2, 50, 100, 150, 200]]:
        indices = np.minimum(row.max() - row, len(LOGIT_TABLE) - 1).astype(int)
        masses = LOGIT_TABLE[indices].astype(int).tolist()
        exact = [1 + math.floor(Fraction(mass * ((1 << PRECISION) - 16), sum(masses))) for mass in masses]
        found = frequencies_in_numpy(row[None].copy())[0]
        others = np.arange(16) != row.argmax()
        assert (np.abs(found - exact)[others] <= 1).all()
        assert found[~others][0] == (1 << PRECISION) - found[others].sum()


def test_frequencies_follow_the_exponential() -> None:
    logits = (np.random.default_rng(0).normal(size=(500, 32)) * 100).round().astype(np.float32)
    exact = np.exp((logits.astype(np.float64) - logits.max(1, keepdims=True)) * LOGIT_UNIT)
    exact /= exact.sum(1, keepdims=True)
    frequencies = frequencies_in_numpy(logits) / (1 << PRECISION)
    extra = (exact * (np.log2(exact) - np.log2(frequencies))).sum(1)
    assert extra.max() < 2e-3  # bits


def test_the_table_of_exponentials_falls_from_one_to_zero() -> None:
    assert LOGIT_TABLE[0] == EXPONENTIAL_ONE
    assert LOGIT_TABLE[-1] == 0
    assert (np.diff(LOGIT_TABLE) <= 0).all()
    assert LOGIT_TABLE[64] == pytest.approx(EXPONENTIAL_ONE / math.e, abs=1)
