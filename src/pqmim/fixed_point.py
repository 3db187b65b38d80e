"""Units and bounds of the exact arithmetic, which its trainable and its exact form share.

In the exact form an integer stands for `integer * UNIT` of the quantity that the trainable form computes in floating
point. The bounds keep every sum exact in float32, in any order (docs/exactness.md).
"""

from __future__ import annotations

import math

import numpy as np

INT8_MAX = 127
"""Largest magnitude of an operand of an integer product."""
MAX_INNER = 1040
"""Largest inner dimension of integer products: 1040 * 127^2 < 2^24."""
ACTIVATION_UNIT = 1 / 16
"""Of normalized activations, queries, keys, values, hidden units and head outputs, all int8: a range of +-7.9."""
RESIDUAL_UNIT = 1 / 256
"""Of the residual stream."""
RESIDUAL_MAX = 1 << 20
"""Largest magnitude of the residual stream, in units."""
SCORE_UNIT = 1 / 16
"""Of attention scores (nats)."""
POSITION_BIAS_MAX = 1 << 15
"""Largest magnitude of a position bias, in SCORE_UNIT."""
ATTENTION_ONE = 127
"""Integer weight of the key with the highest score."""
LOGIT_UNIT = 1 / 64
"""Of the logits (nats)."""
TOKEN_BIAS_MAX = 1 << 20
"""Largest magnitude of what is added to a logit, in LOGIT_UNIT."""
LOGIT_MAX = 1 << 23
"""Largest magnitude of a sharpened logit, in LOGIT_UNIT: their differences stay exact in float32."""
EXPONENTIAL_ONE = 1 << 15
"""Table value of the most probable token."""
NORM_EPSILON = 1
"""Added to the sum of squares of the residual stream, in units squared."""
SCALE_MAX = 1 << 30
"""Largest scale; products with it are far from overflow."""


def bias_room(num_inputs: int) -> int:
    """Largest integer bias with which a sum of `num_inputs` products still stays below 2^24."""
    return (1 << 24) - 1 - num_inputs * INT8_MAX**2


def score_scale(head_width: int) -> float:
    """From products of queries and keys to SCORE_UNIT, a float32 number, which means the same to every kernel."""
    # math.sqrt is correctly rounded, `** -0.5` need not be.
    return float(np.float32(ACTIVATION_UNIT**2 / (SCORE_UNIT * math.sqrt(head_width))))


def exponential_table_length(one: int, unit: float) -> int:
    """Entries of a table round(one * exp(-i * unit)), i = 0, 1, ..., down to the first zero."""
    return math.ceil(math.log(2 * one) / unit) + 1
