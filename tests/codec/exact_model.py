"""A small exact model whose every integer follows from a formula, so that its frequencies are known for good.

No random generator is involved: what this model gives depends on the exact arithmetic alone. Run as a program it
prints the number of threads, the kernel, and the hash of the frequencies that it gives while it codes a grid.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from pqmim.config import EntropyModelConfig
from pqmim.exact_inference import ExactEntropyModel, default_kernel

CONFIG = EntropyModelConfig(
    width=96,
    num_layers=4,
    attention_every=2,
    head_width=32,
    mlp_ratio=2,
    window=4,
    token_rank=6,
    group_steps=(5, 2, 1),
)
RUNS = [slice(0, 1), slice(1, 2), slice(2, 4), slice(4, 7), slice(7, 12)]
NUM_CODEWORDS = 24
CPU = torch.device("cpu")
NUM_LEVELS = 3
GRID = (13, 10)
FREQUENCIES_HASH = "09fbf06be6e702731ee0eae059cbef1f7bd13ba31bfe7d2906925a56655f8a20"
"""SHA-256 of `coded_frequencies`. It changes only with the arithmetic itself, and then no file that was written
before can be read."""


def integers(seed: int, shape: tuple[int, ...], largest: int) -> np.ndarray:
    """Integers that look random, in [-largest, largest]: Knuth's multiplicative hash of their index."""
    index = np.arange(math.prod(shape), dtype=np.uint64) + np.uint64(1_000_003 * seed + 1)
    mixed = (index * np.uint64(2654435761)) & np.uint64(0xFFFFFFFF)
    mixed = ((mixed ^ (mixed >> np.uint64(15))) * np.uint64(2246822519)) & np.uint64(0xFFFFFFFF)
    return ((mixed >> np.uint64(8)) % np.uint64(2 * largest + 1)).astype(np.int64).reshape(shape) - largest


def exact_tensors() -> dict[str, Tensor]:
    """Weights as `export` gives them."""
    tensors: dict[str, Tensor] = {}
    num_kept, m = RUNS[-1].stop, len(RUNS)

    def add(name: str, shape: tuple[int, ...], largest: int, dtype: torch.dtype) -> None:
        tensors[name] = torch.from_numpy(integers(len(tensors) + 1, shape, largest)).to(dtype)

    def add_linear(name: str, outputs: int, inputs: int, typical_output: float) -> None:
        add(name + ".weight", (outputs, inputs), 127, torch.int8)
        add(name + ".bias", (outputs,), 20_000, torch.int32)
        row = torch.from_numpy(integers(len(tensors) + 1, (outputs,), 512)).double() / 2048 + 1
        tensors[name + ".scale"] = (row * (typical_output / (73 * 20 * math.sqrt(inputs)))).float()

    add("token_values", (NUM_LEVELS, NUM_CODEWORDS, num_kept), 127, torch.int8)
    add_linear("embed", CONFIG.width, num_kept + m + NUM_LEVELS, 300)
    for index in range(CONFIG.num_layers):
        prefix = f"layers.{index}."
        if index % CONFIG.attention_every == 0:
            heads = CONFIG.width // CONFIG.head_width
            add_linear(prefix + "attention.query_key_value", 3 * CONFIG.width, CONFIG.width, 24)
            add_linear(prefix + "attention.project", CONFIG.width, CONFIG.width, 200)
            add(prefix + "attention.position_bias", ((2 * CONFIG.window - 1) ** 2, heads), 40, torch.int32)
        add_linear(prefix + "feed_forward.expand", CONFIG.mlp_ratio * CONFIG.width, CONFIG.width, 24)
        add_linear(prefix + "feed_forward.project", CONFIG.width, CONFIG.mlp_ratio * CONFIG.width, 200)
    add_linear("head", m * CONFIG.token_rank, CONFIG.width, 24)
    add("token_factors.weight", (NUM_LEVELS, m, NUM_CODEWORDS, CONFIG.token_rank), 127, torch.int8)
    tensors["token_factors.scale"] = torch.full((NUM_LEVELS, m), 0.03, dtype=torch.float32)
    add("token_bias", (NUM_LEVELS, m, NUM_CODEWORDS), 100, torch.int32)
    for name, one, unit in (("score_table", 127, 16), ("logit_table", 1 << 15, 64)):
        length = math.ceil(math.log(2 * one) * unit) + 1
        table = [round(one * math.exp(-i / unit)) for i in range(length)]
        tensors[name] = torch.tensor(table, dtype=torch.int32)
    return tensors


def exact_model(kernel: str | None = None, device: torch.device = CPU) -> ExactEntropyModel:
    return ExactEntropyModel(CONFIG, exact_tensors(), RUNS, device=device, kernel=kernel)


def coded_frequencies(model: ExactEntropyModel, height: int, width: int, level: int = 1) -> list[np.ndarray]:
    """Frequencies of every step while a grid of formula tokens is coded: (m, n, K) int32 each."""
    tokens = np.abs(integers(99, (model.num_subquantizers, height * width), model.num_codewords - 1))
    state = model.start(height, width, level)
    coded = []
    for step in model.schedule.steps:
        positions = model.positions(state, step)
        frequencies = model.frequencies(model.head(model.hidden(state, positions), step.group), level, step.first)
        coded.append(frequencies.cpu().numpy())
        values = torch.from_numpy(tokens[step.first : step.last, positions.cpu().numpy()].T.copy())
        if len(positions):
            model.reveal(state, positions, step.first, step.last, values.to(model.device))
    return coded


def hash_of(coded: list[np.ndarray]) -> str:
    """SHA-256 (hex) of frequencies."""
    return hashlib.sha256(b"".join(f.astype("<i4").tobytes() for f in coded)).hexdigest()


if __name__ == "__main__":
    print(torch.get_num_threads(), default_kernel(CPU), hash_of(coded_frequencies(exact_model(), *GRID)))
