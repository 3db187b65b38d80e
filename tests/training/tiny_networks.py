"""Tiny networks that are made in a moment, in PyTorch."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from pictures import synthetic_photo

from pqmim.config import (
    AutoencoderConfig,
    EntropyModelConfig,
    QualityRange,
    QuantizerConfig,
    TokenizerConfig,
)
from pqmim.training.autoencoder import Synthesis, grow
from pqmim.training.codebook_fitting import fit_quantizer
from pqmim.training.entropy_model import EntropyModel
from pqmim.training.tokenizer import Tokenizer

TINY_TOKENIZER = TokenizerConfig(
    autoencoder=AutoencoderConfig(latent_channels=12, channels=(8, 8, 16), blocks=(1, 0, 1)),
    quantizer=QuantizerConfig(num_subquantizers=8, num_codewords=96, min_channel_rate=0.12),
)
"""With the codebooks of `make_tiny_tokenizer` the last group of TINY_ENTROPY is silent at the two coarsest levels, one
sub-quantizer of the first group at the last of them."""
TINY_ENTROPY = EntropyModelConfig(
    width=32,
    num_layers=2,
    head_width=16,
    mlp_ratio=2,
    window=4,
    token_rank=4,
    group_steps=(5, 2),
    group_sizes=(5,),
)
TINY_QUALITY = QualityRange(w_at_0=60, w_at_100=0.25)


def make_tiny_tokenizer(seed: int = 0) -> Tokenizer:
    """Tokenizer with the transforms as they start and codebooks fitted to synthetic photos, some with texture."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer(TINY_TOKENIZER).eval()
    photos = np.stack([synthetic_photo(128, 128, i) for i in range(6)] + [_textured_photo(i) for i in range(6)])
    with torch.no_grad():
        for head in (tokenizer.analysis.head, tokenizer.synthesis.head):
            head.weight.normal_(std=0.01)  # so that the convolutional paths take part
        z = tokenizer.analysis(torch.from_numpy(photos).permute(0, 3, 1, 2).float() / 255)
        values = z.permute(0, 2, 3, 1).flatten(0, 2)
        sizes = TINY_TOKENIZER.quantizer
        log_w = torch.linspace(math.log(0.5), math.log(60), sizes.num_levels)
        tokenizer.quantizer = fit_quantizer(values, log_w, sizes)
    return tokenizer


def _textured_photo(seed: int) -> np.ndarray:
    """A synthetic photo with texture of all strengths, most of it faint: (128, 128, 3) uint8."""
    rng = np.random.default_rng(100 + seed)
    strength = rng.exponential(20.0, (8, 8, 1)).repeat(16, 0).repeat(16, 1)
    texture = rng.normal(size=(32, 32, 3)).repeat(4, 0).repeat(4, 1)
    return np.clip(synthetic_photo(128, 128, seed) + strength * texture, 0, 255).astype(np.uint8)


def make_tiny_synthesis(tokenizer: Tokenizer, *, noise: float) -> Synthesis:
    """A deeper synthesis for the tokens of a tokenizer, with more contrast; noise in its last block makes it draw what
    nobody sent."""
    torch.manual_seed(1)
    synthesis = Synthesis(replace(tokenizer.synthesis.config, blocks=(2, 0, 1))).eval()
    grow(synthesis, tokenizer.synthesis)
    with torch.no_grad():
        last = synthesis.convolutional[-1].project
        synthesis.linear.mul_(1.04)
        last.weight.normal_(std=0.02)
        last.bias.copy_(noise * torch.randn(last.bias.shape))
        last.weight.add_(noise * torch.randn(last.weight.shape))
    return synthesis


def make_tiny_entropy_model(tokenizer: Tokenizer, seed: int = 0) -> EntropyModel:
    """Entropy model with random weights large enough that its context matters."""
    torch.manual_seed(seed)
    model = EntropyModel.for_quantizer(TINY_ENTROPY, tokenizer.quantizer).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("position_bias", "sink")):
                parameter.normal_()
            elif name.endswith("bias") and name != "token_bias":
                parameter.normal_(std=0.1)
    return model
