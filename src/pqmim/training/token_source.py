"""Tokens of a trained model, made on the fly, for what is trained to make or decode them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pqmim.training.recipes import RateDraws
from pqmim.training.tokenizer import Tokenizer
from pqmim.training.train_tokenizer import w_of_lambda
from pqmim.training.training_run import Draws, TrainingRun


@dataclass(frozen=True)
class Sent:
    """What the decoder gets of some samples.

    Attributes:
        tokens: (B, M, h, w) int64.
        z_q: (B, D, h, w) float32.
        level: (B,) int64.
        w: (B,) float32, squared latent units per bit, as applied.
        lam: (B,) float32, lambda that their rate stands for.
    """

    tokens: Tensor
    z_q: Tensor
    level: Tensor
    w: Tensor
    lam: Tensor


class TokenSource:
    """Tokens of crops at random trade-offs, by the frozen analysis and codebooks.

    Args:
        tokenizer: whose analysis and quantizer are used.
        config: range and emphasis of the trade-offs.
        run: device and precision.
    """

    def __init__(self, tokenizer: Tokenizer, config: RateDraws, run: TrainingRun) -> None:
        self.tokenizer = tokenizer.requires_grad_(False)
        self.config = config
        self.run = run

    def trade_off(self, fraction: Tensor | float) -> Tensor:
        """Place in the range of trade-offs, 0 the finest, 1 the coarsest -> squared latent units per bit to ask for."""
        low, high = self.tokenizer.quantizer.levels.w_range()
        return low * (high / low) ** torch.as_tensor(fraction, device=self.run.device)

    @torch.no_grad()
    def quantize(self, z: Tensor, w: Tensor, kept: Tensor | None = None) -> Sent:
        """Choose tokens of latents (B, D, h, w) under the static priors, at trade-offs asked for (B,).

        Args:
            kept: (B,), share of the sub-quantizers whose tokens are sent, the leading ones; None = all.
        """
        quantizer = self.tokenizer.quantizer
        level = quantizer.level(w)
        applied = quantizer.applied_w(w, level)
        known = None
        if kept is not None:
            coded = (quantizer.sizes > 1).sum(1)[level]
            known = torch.arange(quantizer.num_subquantizers, device=z.device) < (kept * coded).ceil()[:, None]
            known = known[..., None, None]
        tokens = quantizer.assign(z, applied, level)
        # Beyond the range of training there is nothing to be gained.
        unit, finest = self.tokenizer.config.autoencoder.latent_unit, self.config.rate.lambda_max
        lam = torch.as_tensor(w_of_lambda(applied, unit)).clamp_max(finest)  # it is its own inverse
        return Sent(tokens, quantizer.dequantize(tokens, level, known), level, applied, lam)

    @torch.no_grad()
    def send(self, x: Tensor, w: Tensor, kept: Tensor | None = None) -> Sent:
        """Code crops (B, 3, H, W) at trade-offs asked for (B,), see `quantize`."""
        with self.run.autocast():
            z = self.tokenizer.analysis(x)
        return self.quantize(z, w, kept)

    def draw(self, x: Tensor, draws: Draws) -> Sent:
        """Code crops at trade-offs drawn at random, a share of them cut short."""
        with torch.no_grad(), self.run.autocast():
            z = self.tokenizer.analysis(x)
        return self.draw_of(z, draws)[0]

    def draw_of(self, z: Tensor, draws: Draws) -> tuple[Sent, Tensor]:
        """The same for latents; and which of them are whole, (B,) bool."""
        w = self.trade_off(draws.uniform() ** (1 / self.config.rate_emphasis))
        kept = draws.uniform()
        whole = draws.uniform() >= self.config.nested_share
        sent = self.quantize(z, w, torch.where(whole, 1.0, kept))
        # Samples cut short count as much as coarse ones, else their large errors would rule.
        return replace(sent, lam=torch.where(whole, sent.lam, self.config.rate.lambda_min)), whole
