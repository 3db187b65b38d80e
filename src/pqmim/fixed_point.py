"""Units and bounds of the exact arithmetic: what an integer of the entropy model stands for, and how large it may be.

An integer stands for `integer * UNIT` of the quantity that the trainable form (`training.layers`) computes in floating
point. The bounds are what the argument of `exact_entropy` rests on.
"""

INT8_MAX = 127
ACTIVATION_UNIT = 1 / 16
"""Of normalized activations, queries, keys, values, hidden units and head outputs, all int8: a range of +-7.9."""
RESIDUAL_UNIT = 1 / 256
"""Of the residual stream."""
RESIDUAL_MAX = 1 << 20
"""Largest magnitude of the residual stream, in units."""
SCORE_UNIT = 1 / 16
"""Of attention scores (nats)."""
ATTENTION_ONE = 127
"""Integer weight of the key with the highest score."""
LOGIT_UNIT = 1 / 64
"""Of the logits (nats)."""
NORM_EPSILON = 1
"""Added to the sum of squares of the residual stream, in units squared."""
EXPONENTIAL_ONE = 1 << 15
"""Table value of the most probable token."""
POSITION_BIAS_MAX = 1 << 15
"""Largest magnitude of a position bias, in SCORE_UNIT."""
TOKEN_BIAS_MAX = 1 << 20
"""Largest magnitude of a token's bias, in LOGIT_UNIT."""
LOGIT_MAX = 1 << 23
"""Largest magnitude of a sharpened logit, in LOGIT_UNIT: their differences stay exact in float32."""
SCALE_MAX = 1 << 30
"""Largest scale; products with it are far from overflow."""
MAX_INNER = 1040
"""Largest inner dimension of an integer product: 1040 * 127^2 < 2^24, so every partial sum is exact in float32."""
SUM_MAX = (1 << 24) - 1
"""Largest magnitude of an integer that float32 carries."""


def bias_room(num_inputs: int) -> int:
    """Largest integer bias with which a sum of `num_inputs` products still stays within SUM_MAX."""
    return SUM_MAX - num_inputs * INT8_MAX**2
