"""From the integers of an exact entropy model back to weights that training goes on from; the inverse of
`export.export_entropy`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pqmim.alphabets import Alphabets
from pqmim.fixed_point import ACTIVATION_UNIT, LOGIT_UNIT, RESIDUAL_UNIT, SCORE_UNIT
from pqmim.model_files import ENTROPY_PREFIX, ModelFile

ONTO_RESIDUAL = ("embed.", ".project.")
"""What names of layers have in them whose output is added to the residual stream."""


def import_entropy(model: ModelFile) -> dict[str, Tensor]:
    """State of an `EntropyModel`, but for what its tokenizer says: float32 weights by name.

    Exported again they are the same integers.
    """
    tensors = {
        name.removeprefix(ENTROPY_PREFIX): torch.from_numpy(np.array(tensor))
        for name, tensor in model.tensors.items()
        if name.startswith(ENTROPY_PREFIX)
    }
    alphabets, state = Alphabets.of(model.tensors), {}
    for name, tensor in tensors.items():
        if name.endswith((".position_bias", ".sink")):
            state[name] = tensor * SCORE_UNIT
        elif name == "token_bias":
            state[name] = tensor * LOGIT_UNIT
        elif name == "token_values":
            state[name] = tensor * ACTIVATION_UNIT
        elif name == "token_factors.scale":
            unit = tensor.flatten() * (LOGIT_UNIT / ACTIVATION_UNIT)
            by_codeword = unit.repeat_interleave(torch.from_numpy(alphabets.sizes.flatten()))
            state["token_factors"] = tensors["token_factors.weight"] * by_codeword[:, None]
        elif name.endswith(".scale"):
            layer = name.removesuffix("scale")
            is_residual = any(part in layer for part in ONTO_RESIDUAL)
            product_unit = tensor * (RESIDUAL_UNIT if is_residual else ACTIVATION_UNIT)
            state[layer + "weight"] = tensors[layer + "weight"] * (product_unit / ACTIVATION_UNIT)[:, None]
            if layer + "bias" in tensors:
                state[layer + "bias"] = tensors[layer + "bias"] * product_unit
    return state
