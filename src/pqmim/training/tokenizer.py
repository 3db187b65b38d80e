"""The tokenizer: image <-> token grid (a VQ-VAE with a product quantizer, the PQ-VAE of arXiv:2212.07372)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pqmim.alphabets import Alphabets
from pqmim.config import TokenizerConfig
from pqmim.training.autoencoder import Analysis, Synthesis
from pqmim.training.trainable_quantizer import TrainableQuantizer


class Tokenizer(nn.Module):
    """Analysis transform, product quantizer, synthesis transform.

    Args:
        config: sizes.
        alphabets: of the codebooks; None = they are to be fitted yet.
    """

    def __init__(self, config: TokenizerConfig, alphabets: Alphabets | None = None) -> None:
        super().__init__()
        self.config = config
        channels = config.autoencoder.latent_channels
        self.analysis = Analysis(config.autoencoder.analysis)
        self.synthesis = Synthesis(config.autoencoder.synthesis)
        self.quantizer = TrainableQuantizer(channels, config.quantizer, alphabets)

    def encode(self, x: Tensor, w: Tensor | float) -> Tensor:
        """Images -> tokens under the static prior.

        Args:
            x: (B, 3, H, W) float32 in [0, 1], sides multiples of 16.
            w: asked for, squared latent units per bit, one number or one per sample.

        Returns:
            (B, M, H / 16, W / 16) int64, of the levels `quantizer.level(w)`.
        """
        asked = torch.as_tensor(w, dtype=torch.float32).expand(len(x))
        level = self.quantizer.level(asked)
        return self.quantizer.assign(self.analysis(x), self.quantizer.applied_w(asked, level), level)

    def decode(self, tokens: Tensor, level: Tensor) -> Tensor:
        """Tokens (B, M, h, w) of levels (B,) -> reconstruction (B, 3, 16 h, 16 w) float32, not clamped."""
        return self.synthesis(self.quantizer.dequantize(tokens, level))  # type: ignore[no-any-return]
