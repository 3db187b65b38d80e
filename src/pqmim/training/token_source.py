"""Tokens of a trained model, made on the fly, for what is trained to decode them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pqmim.training.recipes import DecoderTraining
from pqmim.training.tokenizer import Tokenizer
from pqmim.training.train_tokenizer import w_of_lambda
from pqmim.training.training_run import Draws, TrainingRun


@dataclass(frozen=True)
class Sent:
    """What the decoder gets of some samples.

    Attributes:
        z_q: (B, D, h, w) float32.
        lam: (B,) float32, lambda that their rate stands for.
    """

    z_q: Tensor
    lam: Tensor


class TokenSource:
    """Tokens of crops at random trade-offs, by the frozen analysis and codebooks.

    Args:
        tokenizer: whose analysis and quantizer are used.
        config: range and emphasis of the trade-offs.
        run: device and precision.
    """

    def __init__(self, tokenizer: Tokenizer, config: DecoderTraining, run: TrainingRun) -> None:
        self.tokenizer = tokenizer.requires_grad_(False)
        self.config = config
        self.run = run

    def trade_off(self, fraction: Tensor | float) -> Tensor:
        """Place in the range of trade-offs, 0 the finest, 1 the coarsest -> squared latent units per bit to ask for."""
        low, high = self.tokenizer.quantizer.w_range()
        return low * (high / low) ** torch.as_tensor(fraction, device=self.run.device)

    @torch.no_grad()
    def send(self, x: Tensor, w: Tensor, known: Tensor | None = None) -> Sent:
        """Code crops (B, 3, H, W) at trade-offs (B,); `known`: see `TrainableQuantizer.dequantize`."""
        quantizer = self.tokenizer.quantizer
        level = quantizer.level(w)
        applied = quantizer.applied_w(w, level)
        with self.run.autocast():
            z = self.tokenizer.analysis(x)
        z_q = quantizer.dequantize(quantizer.assign(z, applied, level), level, known)
        # The finest level has too few codewords to reach the slope that its w stands for.
        unit, finest = self.tokenizer.config.autoencoder.latent_unit, self.config.rate.lambda_max
        return Sent(z_q, torch.as_tensor(w_of_lambda(applied, unit)).clamp_max(finest))  # it is its own inverse

    def draw(self, x: Tensor, draws: Draws) -> Sent:
        """Code crops at trade-offs drawn at random, a share of them cut short."""
        count = self.tokenizer.quantizer.num_subquantizers
        w = self.trade_off(draws.uniform() ** (1 / self.config.rate_emphasis))
        kept = 1 + (draws.uniform(1) * (count - 1)).long()
        kept[draws.uniform(1) >= self.config.nested_share] = count
        known = (torch.arange(count, device=x.device) < kept)[:, :, None, None]
        sent = self.send(x, w, known)
        # Samples cut short count as much as coarse ones, else their large errors would rule.
        return Sent(sent.z_q, torch.where(kept[:, 0] == count, sent.lam, self.config.rate.lambda_min))
