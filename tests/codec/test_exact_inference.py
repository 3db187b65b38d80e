"""Exact arithmetic: one result for every kernel, thread count, order and history (docs/exactness.md)."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_ENTROPY, make_tiny_entropy_model, make_tiny_tokenizer, synthetic_photo
from exact_model import (
    CONFIG,
    FREQUENCIES_HASH,
    GRID,
    NUM_CODEWORDS,
    NUM_LEVELS,
    RUNS,
    coded_frequencies,
    exact_model,
    exact_tensors,
    hash_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pqmim.config import MAX_INNER
from pqmim.errors import ConfigError, ModelError
from pqmim.exact_inference import (
    EXPONENTIAL_ONE,
    KERNELS,
    ExactEntropyModel,
    ExactLinear,
    IntegerMatrix,
    _divide,
    _normalize,
    _square_root,
    default_kernel,
    exact_kernels,
    export,
    frequencies_of_logits,
    is_int8_exact,
)
from pqmim.range_coding import TokenWriter
from pqmim.token_coding import GivenTokens, code_tokens
from pqmim.training.entropy_model import EntropyModel
from pqmim.training.layers import (
    ACTIVATION_UNIT,
    INT8_MAX,
    LOGIT_UNIT,
    RESIDUAL_MAX,
    RESIDUAL_UNIT,
    QuantizableLinear,
    WindowAttention,
    WindowPartition,
    fake_quantize,
    normalize,
)

CPU = torch.device("cpu")
grids = st.tuples(st.integers(1, 9), st.integers(1, 9))


@pytest.fixture(scope="module", params=exact_kernels(CPU))
def kernel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def models() -> dict[str, ExactEntropyModel]:
    return {name: exact_model(name) for name in exact_kernels(CPU)}


@pytest.fixture(scope="module")
def trainable() -> EntropyModel:
    return make_tiny_entropy_model(make_tiny_tokenizer()).requires_grad_(False)


def exact_form(model: EntropyModel, kernel: str = "float64") -> ExactEntropyModel:
    return ExactEntropyModel(model.config, export(model), model.runs, device=CPU, kernel=kernel)


# -- the same integers everywhere ---------------------------------------------------------------------------


def test_golden_integers_with_every_kernel(models: dict[str, ExactEntropyModel]) -> None:
    for name, model in models.items():
        assert hash_of(coded_frequencies(model, *GRID)) == FREQUENCIES_HASH, name


@settings(deadline=None, max_examples=12)
@given(grids)
def test_kernels_agree_on_any_grid(models: dict[str, ExactEntropyModel], grid: tuple[int, int]) -> None:
    hashes = {hash_of(coded_frequencies(model, *grid)) for model in models.values()}
    assert len(hashes) == 1


@pytest.mark.parametrize(
    "environment",
    [
        {"OMP_NUM_THREADS": "2"},
        # As on processors without VNNI or AVX-512, where int8 products would saturate.
        {"OMP_NUM_THREADS": "1", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "default"},
    ],
)
def test_golden_integers_in_other_processes(environment: dict[str, str]) -> None:
    program = Path(__file__).with_name("exact_model.py")
    paths = [str(Path(__file__).parents[2] / "src"), str(program.parent)]
    result = subprocess.run(
        [sys.executable, program],
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=True,
    )
    threads, _, found = result.stdout.split()
    assert threads == environment["OMP_NUM_THREADS"]
    assert found == FREQUENCIES_HASH


def test_settings_of_the_caller_change_nothing(kernel: str) -> None:
    model = exact_model(kernel)
    torch.set_num_threads(2)
    try:
        assert hash_of(coded_frequencies(model, *GRID)) == FREQUENCIES_HASH
    finally:
        torch.set_num_threads(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert hash_of(coded_frequencies(model, *GRID)) == FREQUENCIES_HASH
    torch.set_default_dtype(torch.float64)
    try:
        assert hash_of(coded_frequencies(exact_model(kernel), *GRID)) == FREQUENCIES_HASH
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_golden_integers_on_a_gpu() -> None:
    device = torch.device("cuda")
    for name in exact_kernels(device):
        assert hash_of(coded_frequencies(exact_model(name, device), *GRID)) == FREQUENCIES_HASH, name


def test_one_token_changes_the_frequencies(models: dict[str, ExactEntropyModel]) -> None:
    model = models["float64"]
    state, other = model.start(6, 6, 0), model.start(6, 6, 0)
    positions = torch.arange(36)
    tokens = torch.zeros(36, 2, dtype=torch.int64)
    model.reveal(state, positions, 0, 2, tokens)
    tokens[7, 1] = 3
    model.reveal(other, positions, 0, 2, tokens)
    near = torch.tensor([8])
    before, after = (model.frequencies(model.head(model.hidden(s, near), 2), 0, 3) for s in (state, other))
    assert not torch.equal(before, after)


def test_another_level_gives_other_frequencies(models: dict[str, ExactEntropyModel]) -> None:
    model = models["float64"]
    assert model.num_levels == NUM_LEVELS
    assert len({hash_of(coded_frequencies(model, 4, 5, level)) for level in range(NUM_LEVELS)}) == NUM_LEVELS
    positions = torch.arange(4)
    hidden = [model.hidden(model.start(2, 2, level), positions) for level in range(NUM_LEVELS)]
    assert not torch.equal(hidden[0], hidden[1])  # the network is told it,
    head = model.head(hidden[0], 0)
    by_level = [model.frequencies(head, level, 0) for level in range(NUM_LEVELS)]
    assert not torch.equal(by_level[0], by_level[1])  # and the logits are of its codewords


def test_sub_quantizers_one_by_one_have_the_frequencies_of_the_group(models: dict[str, ExactEntropyModel]) -> None:
    for model in models.values():
        head = model.head(model.hidden(model.start(3, 4, 1), torch.arange(12)), 1)  # of sub-quantizers 1 and 2
        assert head.shape == (2, 12, CONFIG.token_rank)
        together = model.frequencies(head, 1, 1)
        for m in range(2):
            assert torch.equal(model.frequencies(head[m : m + 1], 1, 1 + m), together[m : m + 1])


@settings(deadline=None, max_examples=20)
@given(st.floats(0.01, 100), st.integers(0, NUM_LEVELS - 1))
def test_sharpened_frequencies_are_valid_and_the_same_for_every_kernel(
    models: dict[str, ExactEntropyModel], sharpness: float, level: int
) -> None:
    results = []
    for model in models.values():
        head = model.head(model.hidden(model.start(3, 4, level), torch.arange(12)), 0)
        results.append(model.frequencies(head, level, 0, sharpness=sharpness))
    assert all(torch.equal(result, results[0]) for result in results)
    assert (results[0] >= 1).all()
    assert (results[0].sum(-1) == 1 << 16).all()
    as_coded = model.frequencies(head, level, 0)
    assert torch.equal(model.frequencies(head, level, 0, sharpness=1.0), as_coded)
    (flatter, sharper) = (as_coded, results[0]) if sharpness > 1 else (results[0], as_coded)
    assert (sharper.amax(-1) >= flatter.amax(-1) - 2).all()  # what rounding leaves goes to the first of equals


# -- what the schedule keeps --------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(grids, st.integers(0, 99))
def test_revealing_in_any_order_and_parts(
    models: dict[str, ExactEntropyModel], grid: tuple[int, int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = grid[0] * grid[1]
    tokens = torch.randint(NUM_CODEWORDS, (count, len(RUNS)), generator=generator)
    level = seed % NUM_LEVELS
    for model in models.values():
        at_once = model.start(*grid, level)
        model.reveal(at_once, torch.arange(count), 0, len(RUNS), tokens)
        in_parts = model.start(*grid, level)
        cut = int(torch.randint(1, len(RUNS), (), generator=generator))
        for first, last in ((cut, len(RUNS)), (0, cut)):
            for part in torch.randperm(count, generator=generator).chunk(3):
                model.reveal(in_parts, part, first, last, tokens[part, first:last])
        assert torch.equal(at_once.embedded, in_parts.embedded)
        in_two = model.start(*grid, level)
        known = torch.rand(len(RUNS), count, generator=generator) < 0.5
        known[1] = known[0]
        for part in (known, ~known):
            model.reveal_grid(in_two, tokens.t(), part)
        assert torch.equal(at_once.embedded, in_two.embedded)


def test_hidden_at_some_positions_is_hidden_at_all(models: dict[str, ExactEntropyModel]) -> None:
    for model in models.values():
        state = model.start(5, 6, 2)
        tokens = torch.arange(30)[:, None].expand(-1, 2) % NUM_CODEWORDS
        model.reveal(state, torch.arange(30), 0, 2, tokens)
        everywhere = model.hidden(state, torch.arange(30))
        some = torch.tensor([3, 4, 17, 29])
        assert torch.equal(model.hidden(state, some), everywhere[some])
        assert model.hidden(state, some[:0]).shape == (0, CONFIG.width)
        head, some_head = model.head(everywhere, 1), model.head(everywhere[some], 1)
        assert torch.equal(some_head, head[:, some])
        assert torch.equal(model.frequencies(some_head, 2, 1), model.frequencies(head, 2, 1)[:, some])


# -- operations, each against its definition ----------------------------------------------------------------


@pytest.mark.parametrize("inner", [1, 7, 64, MAX_INNER])
@pytest.mark.parametrize("rows", [1, 16, 33])
def test_products_of_the_largest_operands(kernel: str, inner: int, rows: int) -> None:
    for sign in (1, -1):
        x = torch.full((rows, inner), INT8_MAX, dtype=torch.int8)
        x[::2] = -INT8_MAX
        weight = torch.full((9, inner), sign * INT8_MAX, dtype=torch.int8)
        weight[4:, ::2] = -INT8_MAX
        expected = x.long() @ weight.long().t()
        product = IntegerMatrix(weight, kernel)(x)
        assert product.dtype == torch.float32
        assert torch.equal(product.long(), expected)
    assert inner * INT8_MAX**2 < 1 << 24


def test_products_that_could_be_inexact_are_refused() -> None:
    with pytest.raises(ModelError, match="1041"):
        IntegerMatrix(torch.zeros(8, MAX_INNER + 1, dtype=torch.int8), "float32")


@settings(deadline=None)
@given(st.lists(st.integers(1, 2**52), min_size=1, max_size=40))
def test_square_roots_are_correctly_rounded(numbers: list[int]) -> None:
    # 40 numbers a time and not one: torch.sqrt goes astray in vectors only.
    roots = _square_root(torch.tensor(numbers, dtype=torch.float64))
    for number, root in zip(numbers, roots.tolist(), strict=True):
        below, above = (Fraction(math.nextafter(root, to)) for to in (0.0, math.inf))
        assert ((below + Fraction(root)) / 2) ** 2 < number < ((above + Fraction(root)) / 2) ** 2


@settings(deadline=None)
@given(st.integers(1, 2**24), st.lists(st.integers(1, 2**40), min_size=1, max_size=40))
def test_divisions_are_correctly_rounded(numerator: int, numbers: list[int]) -> None:
    quotients = _divide(float(numerator), torch.tensor(numbers, dtype=torch.float64))
    for number, quotient in zip(numbers, quotients.tolist(), strict=True):
        assert quotient == numerator / number  # Python divides integers with correct rounding


def test_residual_stream_at_its_bounds_normalizes_exactly() -> None:
    h = torch.full((3, 64), float(RESIDUAL_MAX))
    h[1] = 0
    h[2, 1:] = 0
    normalized = _normalize(h)
    assert normalized[0].tolist() == [16] * 64  # one, on the activation grid
    assert normalized[1].tolist() == [0] * 64
    assert normalized[2].tolist() == [INT8_MAX] + [0] * 63  # 8 exceeds the grid
    assert MAX_INNER * RESIDUAL_MAX**2 + 1 < 2**53


@pytest.mark.parametrize("num_codewords", [2, 3, 16, 256, 4096])
def test_frequencies_are_valid_for_any_logits(num_codewords: int) -> None:
    table = exact_tensors()["logit_table"].float()
    generator = torch.Generator().manual_seed(num_codewords)
    rows = [
        torch.zeros(num_codewords),
        torch.full((num_codewords,), -float(1 << 24)),
        torch.arange(num_codewords).float(),
        torch.linspace(-(1 << 24), 1 << 24, num_codewords).round(),
        *(torch.randn(200, num_codewords, generator=generator) * torch.logspace(0, 4, 200)[:, None]).round(),
    ]
    logits = torch.stack(rows)
    frequencies = frequencies_of_logits(logits, table)
    assert frequencies.dtype == torch.int32
    assert (frequencies >= 1).all()
    assert (frequencies.sum(1) == 1 << 16).all()
    assert (frequencies.gather(1, logits.argmax(1, keepdim=True))[:, 0] == frequencies.amax(1)).all()
    first = frequencies[0]
    assert (first[1:] == first[1]).all()  # among equals the first takes what rounding leaves
    assert first[0] >= first[1]


def test_frequencies_follow_the_exponential() -> None:
    table = exact_tensors()["logit_table"].float()
    logits = (torch.randn(500, 32, generator=torch.Generator().manual_seed(0)) * 100).round()
    exact = (logits.double() * LOGIT_UNIT).softmax(1)
    frequencies = frequencies_of_logits(logits, table).double() / (1 << 16)
    extra = (exact * (exact.log2() - frequencies.log2())).sum(1)
    assert extra.max() < 2e-3  # bits


# -- the trainable model says what the exact one does -------------------------------------------------------


def on_grid(shape: tuple[int, ...], deviation: float = 16) -> Tensor:
    """Random int8 activations as the trainable model has them."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * deviation
    return x.round().clamp(-INT8_MAX, INT8_MAX) * ACTIVATION_UNIT


def assert_same_but_for_ties(exact: Tensor, simulated: Tensor, unit: float) -> None:
    """Integers against multiples of `unit`: equal, but where a float sum falls to the other side of a half."""
    difference = (exact.double() - simulated.double() / unit).abs()
    assert difference.max() <= 1.01
    assert (difference > 0.01).double().mean() < 0.01


def test_normalization_as_simulated() -> None:
    h = (torch.randn(200, 32, generator=torch.Generator().manual_seed(0)) * 300).round()
    assert_same_but_for_ties(_normalize(h), normalize(h * RESIDUAL_UNIT, simulate=True), ACTIVATION_UNIT)


def test_linear_layers_as_simulated(trainable: EntropyModel, kernel: str) -> None:
    model = exact_form(trainable, kernel)
    exact, layer = model.layers[0].expand, trainable.layers[0].feed_forward.expand
    assert isinstance(exact, ExactLinear)
    assert isinstance(layer, QuantizableLinear)
    x = on_grid((100, 32))
    simulated = fake_quantize(layer(x, simulate=True), ACTIVATION_UNIT, simulate=True)
    assert_same_but_for_ties(exact.to_int8((x / ACTIVATION_UNIT).to(torch.int8)), simulated, ACTIVATION_UNIT)


def test_attention_as_simulated(trainable: EntropyModel, kernel: str) -> None:
    model = exact_form(trainable, kernel)
    attention = trainable.layers[0].attention
    assert isinstance(attention, WindowAttention)
    exact = model.layers[0].attention
    assert exact is not None
    for shifted in (False, True):
        partition = WindowPartition(6, 7, TINY_ENTROPY.window, shifted, CPU)
        x = on_grid((1, 6, 7, 32))
        simulated = attention(x, partition, True) / RESIDUAL_UNIT
        integers = (x / ACTIVATION_UNIT).to(torch.int8).view(42, 32)
        h = torch.zeros(42, 32)
        exact.project.add_to(h, model._attend(exact, integers, partition))
        # A tie in one weight moves a mean of values by at most a unit, and that the output by a little.
        difference = (h - simulated.reshape(42, 32)).abs()
        assert difference.mean() < 1
        assert difference.max() < 30


@pytest.mark.parametrize("depth", range(1, TINY_ENTROPY.num_layers + 1))
def test_every_depth_as_simulated(depth: int) -> None:
    tokenizer = make_tiny_tokenizer()
    config = TINY_ENTROPY.model_copy(update={"num_layers": depth})
    torch.manual_seed(depth)
    model = EntropyModel.for_quantizer(config, tokenizer.quantizer).requires_grad_(False)
    model.embed.weight.mul_(4)  # in a larger residual stream a half that is rounded the other way weighs less
    exact = exact_form(model)
    tokens = torch.randint(16, (1, 3, 9, 7))
    known = torch.zeros_like(tokens, dtype=torch.bool)
    known[:, :1] = True
    level = depth % NUM_LEVELS
    state = exact.start(9, 7, level)
    exact.reveal(state, torch.arange(63), 0, 1, tokens[0, :1].flatten(1).t())
    hidden = exact.hidden(state, torch.arange(63))
    simulated = model.hidden(model.features(tokens, known, torch.tensor([level])), simulate=True).view(63, -1)
    difference = (hidden.double() - simulated.double() / ACTIVATION_UNIT).abs()
    assert difference.max() <= 2
    assert difference.mean() < 0.15
    for group in range(exact.schedule.num_groups):
        first, last = exact.schedule.group_bounds(group)
        expected = model.logits(simulated, torch.full((63,), level), first, last, simulate=True).softmax(2)
        found = exact.frequencies(exact.head(hidden, group), level, first).transpose(0, 1).double() / (1 << 16)
        extra_bits = (expected * (expected.log2() - found.log2())).sum(2).mean()
        assert abs(extra_bits) < 0.003


@pytest.mark.parametrize("level", [0, 4])
def test_payload_is_as_long_as_the_float_model_says(trainable: EntropyModel, level: int) -> None:
    photo = torch.from_numpy(synthetic_photo(256, 320)).permute(2, 0, 1)[None].float() / 255
    tokens = make_tiny_tokenizer().requires_grad_(False).encode(photo, 0.5)
    writer = TokenWriter()
    code_tokens(exact_form(trainable), writer, 16, 20, level, GivenTokens(tokens[0]))
    coded = 8 * len(writer.finish())
    for simulate in (False, True):
        estimated = trainable.schedule_bits(tokens, torch.tensor([level]), simulate=simulate)
        assert abs(coded - estimated) < 0.01 * estimated + 64


# -- choice of the kernel, and weights that break the argument ----------------------------------------------


def test_kernel_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PQMIM_KERNEL", "float64")
    assert default_kernel(CPU) == "float64"
    assert exact_model().kernel == "float64"
    monkeypatch.setenv("PQMIM_KERNEL", "bfloat16")
    with pytest.raises(ConfigError, match="int8, float32, float64"):
        default_kernel(CPU)
    monkeypatch.delenv("PQMIM_KERNEL")
    assert default_kernel(CPU) in exact_kernels(CPU)


def saturating_product(x: Tensor, weight: Tensor) -> Tensor:
    """What x86 processors without VNNI make of int8: one operand shifted to 0 to 255, pairs added in 16 bits."""
    products = (x.long() + 128)[:, :, None] * weight.long()[None]  # (m, k, n)
    pairs = (products[:, ::2] + products[:, 1::2]).clamp(-(1 << 15), (1 << 15) - 1)
    return (pairs.sum(1) - 128 * weight.long().sum(0)).int()


def no_product(x: Tensor, weight: Tensor) -> Tensor:
    raise RuntimeError("not for this device")


@pytest.mark.parametrize("product", [saturating_product, no_product])
def test_products_that_saturate_or_fail_are_found_out(
    monkeypatch: pytest.MonkeyPatch, product: Callable[[Tensor, Tensor], Tensor]
) -> None:
    small = torch.ones(3, 8, dtype=torch.int8)
    if product is saturating_product:
        assert torch.equal(product(small, small.t()), torch.full((3, 3), 8, dtype=torch.int32))
    monkeypatch.setattr(torch, "_int_mm", product)
    is_int8_exact.cache_clear()
    try:
        assert not is_int8_exact(CPU)
        assert default_kernel(CPU) == "float32"
        assert exact_kernels(CPU) == ("float32", "float64")
        monkeypatch.setenv("PQMIM_KERNEL", "int8")
        with pytest.raises(ConfigError, match="exact"):
            default_kernel(CPU)
    finally:
        is_int8_exact.cache_clear()


def _with(name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    tensors = exact_tensors()
    tensors[name] = change(tensors[name])
    return tensors


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("layers.0.feed_forward.expand.weight", lambda t: torch.full_like(t, -128)),
        ("token_values", lambda t: torch.full_like(t, -128)),
        ("layers.0.feed_forward.expand.bias", lambda t: t + (1 << 24)),
        ("embed.bias", lambda t: t - (1 << 24)),
        ("embed.scale", lambda t: t * torch.nan),
        ("head.scale", lambda t: t * torch.inf),
        ("token_factors.scale", lambda t: -t),
        ("layers.0.attention.position_bias", lambda t: t + (1 << 20)),
        ("token_bias", lambda t: t - (1 << 22)),
        ("score_table", lambda t: t * 2),
        ("score_table", lambda t: t * 0),
        ("logit_table", lambda t: t - 1),
        ("logit_table", lambda t: t + EXPONENTIAL_ONE),
    ],
)
def test_weights_out_of_bounds_are_refused(name: str, change: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ModelError, match=name):
        ExactEntropyModel(CONFIG, _with(name, change), RUNS, device=CPU)


def test_missing_weights_are_named() -> None:
    tensors = exact_tensors()
    del tensors["embed.scale"]
    with pytest.raises(ModelError, match=r"embed\.scale"):
        ExactEntropyModel(CONFIG, tensors, RUNS, device=CPU)
    with pytest.raises(ModelError, match="head"):
        ExactEntropyModel(CONFIG, _with("head.weight", lambda t: t.int()), RUNS, device=CPU)


def test_exported_integers_are_within_bounds(trainable: EntropyModel) -> None:
    with torch.no_grad():
        trainable.embed.bias[0] = 1e9  # a trained model may hold anything
        tensors = export(trainable)
        trainable.embed.bias[0] = 0
    assert set(KERNELS) >= set(exact_kernels(CPU))
    ExactEntropyModel(trainable.config, tensors, trainable.runs, device=CPU, kernel="float32")
    assert int(tensors["score_table"][-1]) == 0
    assert int(tensors["logit_table"][-1]) == 0
    assert (tensors["logit_table"].diff() <= 0).all()
    assert np.isclose(tensors["logit_table"][64].item(), EXPONENTIAL_ONE / math.e, atol=1)
