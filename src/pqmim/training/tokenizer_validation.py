"""What a tokenizer is worth on photos that it was not trained on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pqmim.training.losses import mean_psnr, mean_squared_error
from pqmim.training.tokenizer import Tokenizer
from pqmim.training.training_run import TrainingRun


@torch.no_grad()
def validate_tokenizer(tokenizer: Tokenizer, held_out: Tensor, run: TrainingRun) -> dict[str, float]:
    """bpp under the static prior and PSNR at three trade-offs."""
    low, high = tokenizer.quantizer.levels.w_range()
    pixels = held_out.shape[2] * held_out.shape[3]
    row: dict[str, float] = {}
    for w in (low, math.sqrt(low * high), high):
        rates, errors = [], []
        for x in held_out.split(8):
            level = torch.full((len(x),), tokenizer.quantizer.levels.level(w), device=x.device)
            with run.autocast():
                tokens = tokenizer.encode(x, w)
                x_hat = tokenizer.decode(tokens, level)
            rates.append(tokenizer.quantizer.static_bits(tokens, level) / pixels)
            errors.append(mean_squared_error(x_hat.clamp(0, 1), x))
        row[f"bpp@{w:.4g}"] = float(torch.cat(rates).mean())
        row[f"psnr@{w:.4g}"] = mean_psnr(torch.cat(errors))
    return row
