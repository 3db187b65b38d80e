"""A small exact model whose every integer follows from a formula, so that its frequencies are known for good.

No random generator is involved: what this model gives depends on the exact arithmetic alone. Run as a program, with
the name of a kernel and a number of threads, it prints the kernel in use and the hash of the frequencies that it gives
while it codes a grid.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from pqmim.alphabets import MAX_CODEWORDS, Alphabets
from pqmim.config import EntropyModelConfig, ModelConfig, QualityRange, QuantizerConfig, TokensConfig
from pqmim.entropy_weights import embed_inputs
from pqmim.exact_entropy import ExactEntropyModel
from pqmim.fixed_point import MAX_INNER
from pqmim.model_files import Graph, ModelFile
from pqmim.range_coding import PRECISION
from pqmim.runtime import Workers

CONFIG = EntropyModelConfig(
    width=96,
    num_layers=4,
    later_layers=2,
    attention_every=2,
    head_width=32,
    mlp_ratio=2,
    window=4,
    token_rank=6,
    group_steps=(5, 2, 1),
    group_sizes=(2, 2),
)
GROUPS = [slice(0, 2), slice(2, 4), slice(4, 5)]
"""Sub-quantizers of each group."""
BOUNDARIES = (0, 1, 2, 4, 7, 12)
RUNS = [slice(0, 1), slice(1, 2), slice(2, 4), slice(4, 7), slice(7, 12)]
SIZES = ((24, 24, 16, 16, 5), (24, 16, 1, 16, 2), (16, 1, 5, 1, 1))
"""Codewords by level and sub-quantizer: silent ones lead a group, end a group, and are a whole one, the last."""
ALPHABETS = Alphabets(np.array(SIZES), np.diff(BOUNDARIES))
NUM_CODEWORDS = 24
"""At most."""
NUM_LEVELS = 3
GRID = (13, 10)
INNER_SIZES = (1, 7, 64, MAX_INNER)
"""Inner dimensions of the products that are tried alone,"""
NUM_PRODUCTS = 9
"""their outputs,"""
VOCABULARIES = (1, 2, 3, 16, 256, MAX_CODEWORDS)
"""and numbers of codewords whose frequencies are."""
FREQUENCIES_HASH = "9353cd47cdc1cf1c10d432f8c59af085facaaaab390ca6b79454ccc436e6f3e9"
"""SHA-256 of `all_frequencies`. It changes only with the arithmetic itself, and then no file that was written
before can be read."""
GRAPHS = Path(__file__).parents[1] / "data" / "formula_graphs.safetensors"
"""Made by tests/make_formula_graphs.py."""


def integers(seed: int, shape: tuple[int, ...], largest: int) -> NDArray[np.int64]:
    """Integers that look random, in [-largest, largest]: Knuth's multiplicative hash of their index."""
    index = np.arange(math.prod(shape), dtype=np.uint64) + np.uint64(1_000_003 * seed + 1)
    mixed = (index * np.uint64(2654435761)) & np.uint64(0xFFFFFFFF)
    mixed = ((mixed ^ (mixed >> np.uint64(15))) * np.uint64(2246822519)) & np.uint64(0xFFFFFFFF)
    return ((mixed >> np.uint64(8)) % np.uint64(2 * largest + 1)).astype(np.int64).reshape(shape) - largest


def exact_tensors() -> dict[str, NDArray[Any]]:
    """Weights of the entropy model as a model file has them, without the prefix of their names."""
    tensors: dict[str, NDArray[Any]] = {}
    m = len(RUNS)

    def add(name: str, shape: tuple[int, ...], largest: int, dtype: type) -> None:
        tensors[name] = integers(len(tensors) + 1, shape, largest).astype(dtype)

    def add_linear(name: str, outputs: int, inputs: int, typical_output: float, *, has_bias: bool = True) -> None:
        add(name + ".weight", (outputs, inputs), 127, np.int8)
        if has_bias:
            add(name + ".bias", (outputs,), 20_000, np.int32)
        row = integers(len(tensors) + 1, (outputs,), 512) / 2048 + 1
        tensors[name + ".scale"] = (row * (typical_output / (73 * 20 * math.sqrt(inputs)))).astype(np.float32)

    add("token_values", (ALPHABETS.num_values,), 127, np.int8)
    schedule = CONFIG.schedule(m)
    for group in range(schedule.num_groups):
        inputs = embed_inputs(ALPHABETS, schedule, group)
        add_linear(f"embed.{group}", CONFIG.width, inputs, 300, has_bias=group == 0)
    for index in range(CONFIG.total_layers):
        prefix = f"layers.{index}."
        if CONFIG.has_attention(index):
            heads = CONFIG.width // CONFIG.head_width
            add_linear(prefix + "attention.query_key_value", 3 * CONFIG.width, CONFIG.width, 24)
            add_linear(prefix + "attention.project", CONFIG.width, CONFIG.width, 200)
            add(prefix + "attention.position_bias", ((2 * CONFIG.window - 1) ** 2, heads), 40, np.int32)
            add(prefix + "attention.sink", (heads,), 40, np.int32)
        add_linear(prefix + "feed_forward.expand", CONFIG.mlp_ratio * CONFIG.width, CONFIG.width, 24)
        add_linear(prefix + "feed_forward.project", CONFIG.width, CONFIG.mlp_ratio * CONFIG.width, 200)
    add_linear("head", m * CONFIG.token_rank, CONFIG.width, 24)
    add("token_factors.weight", (ALPHABETS.num_codewords, CONFIG.token_rank), 127, np.int8)
    tensors["token_factors.scale"] = np.full((NUM_LEVELS, m), 0.03, np.float32)
    add("token_bias", (ALPHABETS.num_codewords,), 100, np.int32)
    static, starts = np.abs(integers(98, (ALPHABETS.num_codewords,), 2000)) + 1, ALPHABETS.starts.ravel()
    static[starts] += (1 << PRECISION) - np.add.reduceat(static, starts)
    tensors["static_frequencies"] = static.astype(np.int32)
    for name, one, unit in (("score_table", 127, 16), ("logit_table", 1 << 15, 64)):
        length = math.ceil(math.log(2 * one) * unit) + 1
        tensors[name] = np.array([round(one * math.exp(-i / unit)) for i in range(length)], np.int32)
    return tensors


@cache
def model_file() -> ModelFile:
    """What the exact model needs of a model file; not to be changed."""
    with safetensors.safe_open(GRAPHS, "numpy") as file:
        weights = json.loads(file.metadata()["weights"])
        graphs = {name: Graph(file.get_tensor(name).tobytes(), weights[name]) for name in weights}
    tensors = {f"entropy.{name}": tensor for name, tensor in exact_tensors().items()}
    tensors["tokenizer.quantizer.boundaries_tensor"] = np.array(BOUNDARIES)
    tensors["tokenizer.quantizer.sizes"] = np.array(SIZES)
    tokens = TokensConfig(quantizer=QuantizerConfig(len(RUNS), NUM_CODEWORDS, NUM_LEVELS))
    return ModelFile("formula", tensors, graphs, {}, bytes(4), ModelConfig(tokens, CONFIG, QualityRange()))


def exact_model(kernel: str | None = None, threads: int = 1) -> ExactEntropyModel:
    return ExactEntropyModel(model_file(), Workers(threads), kernel=kernel)


def block_frequencies(
    model: ExactEntropyModel, head: NDArray[np.uint8] | None, level: int, first: int, last: int, count: int
) -> list[NDArray[np.int32]]:
    """Frequencies of the sub-quantizers from `first` to `last` (exclusive) that are not silent, at `count` positions:
    (m, n, K) for those with alphabets alike.

    Args:
        head: (last - first, n, R); None = static frequencies.
    """
    blocks = [block for block in model.alphabets.blocks(level, first, last) if block.size > 1]
    if head is not None:
        return [model.frequencies(head[b.first - first : b.last - first], level, b.first) for b in blocks]
    static = [model.static_frequencies(level, b.first, b.last - b.first) for b in blocks]
    return [np.repeat(of_block[:, None], count, axis=1) for of_block in static]


def step_frequencies(
    model: ExactEntropyModel, tokens: NDArray[np.int64], level: int = 1
) -> list[list[NDArray[np.int32]]]:
    """`block_frequencies` of every step while tokens (M, h, w) are coded."""
    state = model.start(*tokens.shape[1:], level)
    rows = tokens.reshape(len(tokens), -1)
    coded = []
    for step in model.steps(level):
        positions = model.positions(state, step)
        if len(positions) == 0:
            continue
        head = model.head(state, step)
        coded.append(block_frequencies(model, head, level, step.first, step.last, len(positions)))
        model.reveal(state, step, rows[step.first : step.last, positions])
    return coded


def formula_tokens(height: int, width: int, level: int = 1) -> NDArray[np.int64]:
    """Tokens (M, height, width) of a formula."""
    drawn = np.abs(integers(99, (len(RUNS), height, width), NUM_CODEWORDS - 1))
    return drawn % ALPHABETS.sizes[level, :, None, None]


def coded_frequencies(
    model: ExactEntropyModel, height: int, width: int, level: int = 1
) -> list[list[NDArray[np.int32]]]:
    """`step_frequencies` of formula tokens."""
    return step_frequencies(model, formula_tokens(height, width, level), level)


def all_frequencies(model: ExactEntropyModel) -> list[list[NDArray[np.int32]]]:
    """`coded_frequencies` of GRID at all levels."""
    return [step for level in range(NUM_LEVELS) for step in coded_frequencies(model, *GRID, level)]


def is_same(coded: list[list[NDArray[np.int32]]], other: list[list[NDArray[np.int32]]]) -> list[bool]:
    """Which steps have the same frequencies."""
    pairs = zip(coded, other, strict=True)
    return [all(np.array_equal(a, b) for a, b in zip(*steps, strict=True)) for steps in pairs]


def hash_of(coded: list[list[NDArray[np.int32]]]) -> str:
    """SHA-256 (hex) of frequencies."""
    return hashlib.sha256(b"".join(block.astype("<i4").tobytes() for step in coded for block in step)).hexdigest()


if __name__ == "__main__":
    chosen = exact_model(sys.argv[1], int(sys.argv[2]))
    print(chosen.kernel, hash_of(all_frequencies(chosen)))
