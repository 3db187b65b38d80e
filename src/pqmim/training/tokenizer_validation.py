"""What a tokenizer is worth on photos that it was not trained on."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pqmim.training.losses import mean_psnr, mean_squared_error
from pqmim.training.tokenizer import Tokenizer
from pqmim.training.training_run import TrainingRun


@torch.no_grad()
def validate_tokenizer(tokenizer: Tokenizer, held_out: Tensor, run: TrainingRun) -> dict[str, float]:
    """bpp under the static prior and PSNR at three trade-offs, and what the codebooks are used for."""
    low, high = tokenizer.quantizer.w_range()
    row: dict[str, float] = {}
    for w in (low, math.sqrt(low * high), high):
        level = tokenizer.quantizer.level(w)
        prior = tokenizer.quantizer.prior_bits()[level]
        rates, errors, used = [], [], torch.zeros_like(prior)
        for x in held_out.split(8):
            with run.autocast():
                tokens = tokenizer.encode(x, w)
                x_hat = tokenizer.decode(tokens, level.expand(len(x)))
            flat = tokens.transpose(0, 1).flatten(1)  # (M, n)
            rates.append(float(prior.gather(1, flat).sum()) / (len(x) * x.shape[2] * x.shape[3]))
            used.scatter_add_(1, flat, torch.ones_like(flat, dtype=used.dtype))
            errors.append(mean_squared_error(x_hat.clamp(0, 1), x))
        share = used / used.sum(1, keepdim=True)
        perplexity = torch.exp2(-(share * share.clamp_min(1e-12).log2()).sum(1))
        row[f"bpp@{w:.4g}"] = float(np.mean(rates))
        row[f"psnr@{w:.4g}"] = mean_psnr(torch.cat(errors))
        row[f"perplexity@{w:.4g}"] = float(perplexity.mean())
        row[f"usage@{w:.4g}"] = float((used > 0).float().mean())
    return row


@torch.no_grad()
def save_sample_pictures(folder: Path, tokenizer: Tokenizer, x: Tensor, step: int, w: float) -> None:
    """Write a sheet, originals above reconstructions at a trade-off, squared latent units per bit."""
    x_hat = tokenizer.decode(tokenizer.encode(x, w), tokenizer.quantizer.level(w).expand(len(x))).clamp(0, 1)
    rows = [torch.cat(list(batch), dim=2) for batch in (x, x_hat)]
    sheet = (torch.cat(rows, dim=1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    folder.mkdir(exist_ok=True)
    Image.fromarray(sheet).save(folder / f"step{step:06d}.png")
