"""Weights of the exact entropy model: what there must be, and the bounds that exactness rests on, whoever made the
file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

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

Tensors = Mapping[str, NDArray[Any]]
Expected = tuple[str, type, tuple[int, ...]]
"""Name, type and shape."""


def check_entropy_weights(
    tensors: Tensors, config: EntropyModelConfig, num_subquantizers: int, num_codewords: int, num_kept: int
) -> None:
    """Refuse weights that are missing, or with which a sum might not be exact.

    Args:
        tensors: of a model file.
        num_subquantizers, num_codewords, num_kept: M, K and D' of the tokenizer.

    Raises:
        ModelError: names the tensor.
    """
    num_levels = len(tensors["entropy.token_values"]) if "entropy.token_values" in tensors else 0
    for name, kind, shape in _expected(config, num_subquantizers, num_codewords, num_kept, num_levels):
        tensor = tensors.get(f"entropy.{name}")
        if tensor is None or tensor.dtype != kind or tensor.shape != shape:
            raise ModelError(f"weights lack {name} as {kind.__name__} {shape}")
        if not _is_within_bounds(name, tensor, tensors):
            raise ModelError(f"weights of {name} are out of bounds")


def _expected(
    config: EntropyModelConfig, num_subquantizers: int, num_codewords: int, num_kept: int, num_levels: int
) -> Iterator[Expected]:
    width, rank = config.width, config.token_rank
    yield "token_values", np.int8, (num_levels, num_codewords, num_kept)
    yield from _linear("embed", num_kept + num_subquantizers + num_levels, width)
    for layer in range(config.num_layers):
        prefix = f"layers.{layer}."
        if layer % config.attention_every == 0:
            yield from _linear(prefix + "attention.query_key_value", width, 3 * width)
            yield from _linear(prefix + "attention.project", width, width)
            table = ((2 * config.window - 1) ** 2, width // config.head_width)
            yield prefix + "attention.position_bias", np.int32, table
        yield from _linear(prefix + "feed_forward.expand", width, config.mlp_ratio * width)
        yield from _linear(prefix + "feed_forward.project", config.mlp_ratio * width, width)
    yield from _linear("head", width, num_subquantizers * rank)
    yield "token_factors.weight", np.int8, (num_levels, num_subquantizers, num_codewords, rank)
    yield "token_factors.scale", np.float32, (num_levels, num_subquantizers)
    yield "token_bias", np.int32, (num_levels, num_subquantizers, num_codewords)
    yield "score_table", np.int32, (exponential_table_length(ATTENTION_ONE, SCORE_UNIT),)
    yield "logit_table", np.int32, (exponential_table_length(EXPONENTIAL_ONE, LOGIT_UNIT),)


def _linear(name: str, num_inputs: int, num_outputs: int) -> Iterator[Expected]:
    if num_inputs > MAX_INNER:
        raise ModelError(f"inner dimension {num_inputs} of {name} is above {MAX_INNER}: sums would not be exact")
    yield name + ".weight", np.int8, (num_outputs, num_inputs)
    yield name + ".bias", np.int32, (num_outputs,)
    yield name + ".scale", np.float32, (num_outputs,)


def _is_within_bounds(name: str, tensor: NDArray[Any], tensors: Tensors) -> bool:
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
    if name.endswith("position_bias"):
        largest = POSITION_BIAS_MAX
    elif name == "token_bias":
        largest = TOKEN_BIAS_MAX
    else:
        largest = bias_room(tensors[f"entropy.{name.removesuffix('bias')}weight"].shape[1])
    return bool(-largest <= low and high <= largest)
