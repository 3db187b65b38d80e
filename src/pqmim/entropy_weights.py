"""Weights of the exact entropy model: what there must be, and the bounds that exactness rests on, whoever made the
file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pqmim.alphabets import Alphabets
from pqmim.config import EntropyModelConfig
from pqmim.errors import ModelError
from pqmim.fixed_point import (
    ATTENTION_ONE,
    EXPONENTIAL_ONE,
    INT8_MAX,
    LOGIT_UNIT,
    MAX_INNER,
    POSITION_BIAS_MAX,
    SCALE_MAX,
    SCORE_UNIT,
    TOKEN_BIAS_MAX,
    bias_room,
    exponential_table_length,
)
from pqmim.range_coding import PRECISION
from pqmim.schedule import Schedule

Tensors = Mapping[str, NDArray[Any]]
Expected = tuple[str, type, tuple[int, ...]]
"""Name, type and shape."""


def check_entropy_weights(tensors: Tensors, config: EntropyModelConfig, alphabets: Alphabets) -> None:
    """Refuse weights that are missing, or with which a sum might not be exact.

    Args:
        tensors: of a model file.
        alphabets: of its tokenizer.

    Raises:
        ModelError: names the tensor.
    """
    for name, kind, shape in _expected(config, alphabets):
        tensor = tensors.get(f"entropy.{name}")
        if tensor is None or tensor.dtype != kind or tensor.shape != shape:
            raise ModelError(f"weights lack {name} as {kind.__name__} {shape}")
        if not _is_within_bounds(name, tensor, tensors, alphabets):
            raise ModelError(f"weights of {name} are out of bounds")


def embed_inputs(alphabets: Alphabets, schedule: Schedule, group: int) -> int:
    """Inputs of the embedding of a group's tokens: channels of their codewords and a flag each, levels in the first."""
    first, last = schedule.group_bounds(group)
    values = int(alphabets.channels[first:last].sum())
    return values + last - first + (alphabets.num_levels if group == 0 else 0)


def _expected(config: EntropyModelConfig, alphabets: Alphabets) -> Iterator[Expected]:
    width, rank, num_levels = config.width, config.token_rank, alphabets.num_levels
    num_codewords, num_subquantizers = alphabets.num_codewords, alphabets.num_subquantizers
    schedule = config.schedule(num_subquantizers)
    yield "token_values", np.int8, (alphabets.num_values,)
    for group in range(schedule.num_groups):
        num_inputs = embed_inputs(alphabets, schedule, group)
        yield from _linear(f"embed.{group}", num_inputs, width, has_bias=group == 0)
    for layer in range(config.total_layers):
        prefix = f"layers.{layer}."
        if config.has_attention(layer):
            heads = width // config.head_width
            yield from _linear(prefix + "attention.query_key_value", width, 3 * width)
            yield from _linear(prefix + "attention.project", width, width)
            yield prefix + "attention.position_bias", np.int32, ((2 * config.window - 1) ** 2, heads)
            yield prefix + "attention.sink", np.int32, (heads,)
        yield from _linear(prefix + "feed_forward.expand", width, config.mlp_ratio * width)
        yield from _linear(prefix + "feed_forward.project", config.mlp_ratio * width, width)
    yield from _linear("head", width, num_subquantizers * rank)
    yield "token_factors.weight", np.int8, (num_codewords, rank)
    yield "token_factors.scale", np.float32, (num_levels, num_subquantizers)
    yield "token_bias", np.int32, (num_codewords,)
    yield "static_frequencies", np.int32, (num_codewords,)
    yield "score_table", np.int32, (exponential_table_length(ATTENTION_ONE, SCORE_UNIT),)
    yield "logit_table", np.int32, (exponential_table_length(EXPONENTIAL_ONE, LOGIT_UNIT),)


def _linear(name: str, num_inputs: int, num_outputs: int, *, has_bias: bool = True) -> Iterator[Expected]:
    if num_inputs > MAX_INNER:
        raise ModelError(f"inner dimension {num_inputs} of {name} is above {MAX_INNER}: sums would not be exact")
    yield name + ".weight", np.int8, (num_outputs, num_inputs)
    if has_bias:
        yield name + ".bias", np.int32, (num_outputs,)
    yield name + ".scale", np.float32, (num_outputs,)


def _is_within_bounds(name: str, tensor: NDArray[Any], tensors: Tensors, alphabets: Alphabets) -> bool:
    if tensor.size == 0:
        return False
    low, high = tensor.min(), tensor.max()
    if tensor.dtype == np.int8:
        return bool(low >= -INT8_MAX)
    if tensor.dtype == np.float32:  # scales; NaN compares false
        return bool(low >= 0 and high <= SCALE_MAX)
    if name.endswith("_table"):
        return bool(
            low >= 0 and tensor[0] > 0 and high <= (ATTENTION_ONE if name == "score_table" else EXPONENTIAL_ONE)
        )
    if name == "static_frequencies":
        totals = np.add.reduceat(tensor, alphabets.starts.ravel(), dtype=np.int64)
        return bool(low >= 1 and (totals == 1 << PRECISION).all())
    if name.endswith(("position_bias", "sink")):
        largest = POSITION_BIAS_MAX
    elif name == "token_bias":
        largest = TOKEN_BIAS_MAX
    else:
        largest = bias_room(tensors[f"entropy.{name.removesuffix('bias')}weight"].shape[1])
    return bool(-largest <= low and high <= largest)
