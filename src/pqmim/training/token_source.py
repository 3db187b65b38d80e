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
        low, high = self.tokenizer.quantizer.levels.w_range()
        return low * (high / low) ** torch.as_tensor(fraction, device=self.run.device)

    @torch.no_grad()
    def send(self, x: Tensor, w: Tensor, kept: Tensor | None = None) -> Sent:
        """Code crops (B, 3, H, W) at trade-offs (B,).

        Args:
            kept: (B,), share of the sub-quantizers whose tokens are sent, the leading ones; None = all.
        """
        quantizer = self.tokenizer.quantizer
        level = quantizer.level(w)
        applied = quantizer.applied_w(w, level)
        with self.run.autocast():
            z = self.tokenizer.analysis(x)
        known = None
        if kept is not None:
            coded = (quantizer.sizes > 1).sum(1)[level]
            known = torch.arange(quantizer.num_subquantizers, device=x.device) < (kept * coded).ceil()[:, None]
            known = known[..., None, None]
        z_q = quantizer.dequantize(quantizer.assign(z, applied, level), level, known)
        # Beyond the range of training there is nothing to be gained.
        unit, finest = self.tokenizer.config.autoencoder.latent_unit, self.config.rate.lambda_max
        return Sent(z_q, torch.as_tensor(w_of_lambda(applied, unit)).clamp_max(finest))  # it is its own inverse

    def draw(self, x: Tensor, draws: Draws) -> Sent:
        """Code crops at trade-offs drawn at random, a share of them cut short."""
        w = self.trade_off(draws.uniform() ** (1 / self.config.rate_emphasis))
        kept = draws.uniform()
        whole = draws.uniform() >= self.config.nested_share
        sent = self.send(x, w, torch.where(whole, 1.0, kept))
        # Samples cut short count as much as coarse ones, else their large errors would rule.
        return Sent(sent.z_q, torch.where(whole, sent.lam, self.config.rate.lambda_min))
