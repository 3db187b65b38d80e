"""Alphabets and codebooks as no training would give them, and tokens of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from training.tiny_networks import TINY_ENTROPY, TINY_TOKENIZER

from pqmim.alphabets import Alphabets
from pqmim.config import QuantizerConfig, TokenizerConfig
from pqmim.training.tokenizer import Tokenizer

RAGGED = Alphabets(
    np.array([[16, 16, 7, 9], [12, 12, 5, 1], [9, 5, 5, 5], [7, 1, 4, 4], [3, 3, 1, 1], [2, 1, 2, 1]]),
    np.array([1, 1, 2, 4]),
)
"""Of six levels and four sub-quantizers of eight channels; with neighbors that are alike, and silent ones anywhere."""
RAGGED_ENTROPY = replace(TINY_ENTROPY, group_sizes=(2,))
"""The second of its groups says nothing at the fifth level."""


def make_ragged_tokenizer() -> Tokenizer:
    """Tokenizer with random codebooks and four of twelve channels dropped."""
    torch.manual_seed(0)
    config = TokenizerConfig(TINY_TOKENIZER.autoencoder, QuantizerConfig(num_subquantizers=4, num_codewords=16))
    tokenizer = Tokenizer(config, RAGGED).eval()
    quantizer = tokenizer.quantizer
    quantizer.order.copy_(torch.randperm(quantizer.num_channels)[:8])
    quantizer.level_range.copy_(torch.arange(6.0)[:, None] + torch.tensor([-2.0, 1.12]))
    for parameter in quantizer.parameters():
        torch.nn.init.normal_(parameter)
    return tokenizer


def draw_tokens(alphabets: Alphabets, level: Tensor, height: int, width: int, seed: int = 0) -> Tensor:
    """Uniform tokens of levels (B,): (B, M, height, width) int64."""
    sizes = torch.from_numpy(alphabets.sizes)[level][..., None, None]
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand((*sizes.shape[:2], height, width), generator=generator) * sizes).long()
