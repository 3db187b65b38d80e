"""The product quantizer in training, and the factorized density that comes before it.

What it does is told in `pqmim.quantizer`; its codebooks are fitted by `codebook_fitting`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from pqmim.alphabets import Alphabets, Block
from pqmim.config import QuantizerConfig
from pqmim.levels import Levels
from pqmim.training.token_places import TokenPlaces

LOG2 = math.log(2.0)


class FactorizedDensity(nn.Module):
    """Independent logistic mixture per channel, integrated over the quantization bin; prior of the first stage.

    Source: the factorized prior of Balle et al. 2018, arXiv:1802.01436, section 6.1. Differs: a mixture of three
    logistics in place of a small monotone network, because its integral over a bin of any width is closed-form.
    """

    NUM_COMPONENTS = 3

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        shape = (self.NUM_COMPONENTS, num_channels, 1, 1)
        self.weight = nn.Parameter(torch.zeros(shape))
        self.mean = nn.Parameter(torch.zeros(shape))
        start = torch.linspace(-1.0, 2.5, self.NUM_COMPONENTS)  # scales from 0.4 to 12 latent units
        self.log_scale = nn.Parameter(start[:, None, None, None].expand(shape).clone())

    def bits(self, z: Tensor, step: Tensor) -> Tensor:
        """Code length of each latent value in a bin of width `step` around it.

        Args:
            z: (B, D, h, w) float32.
            step: (B, 1, 1, 1) float32, width of the quantization bin in latent units.

        Returns:
            (B, D, h, w) float32, bits.
        """
        weight = self.weight.softmax(dim=0)
        inverse_scale = torch.exp(-self.log_scale)
        mass = torch.zeros_like(z)
        for k in range(self.NUM_COMPONENTS):
            u = (z - self.mean[k]).abs()  # by symmetry; keeps both sigmoids in their accurate tail
            upper = torch.sigmoid((0.5 * step - u) * inverse_scale[k])
            lower = torch.sigmoid((-0.5 * step - u) * inverse_scale[k])
            mass = mass + weight[k] * (upper - lower)
        return -torch.log2(mass.clamp_min(1e-9))


class TrainableQuantizer(nn.Module):
    """At each of L levels M codebooks over runs of ordered latent channels, each of as many codewords as it needs.

    Args:
        num_channels: D.
        config: L and M.
        alphabets: of fitted codebooks; None = there are none yet, each channel in order has its mean as only codeword.

    Attributes:
        alphabets: how many codewords each sub-quantizer has at each level, N in all with V values.
        order: (D',) int64, latent channel of each codebook column, D' <= D kept channels, most costly first.
        boundaries_tensor: (M + 1,) int64; run m is columns boundaries[m] to boundaries[m + 1].
        sizes: (L, M) int64, those of `alphabets`.
        codebook: (V,) float32, codewords as `Alphabets` places them.
        default: (D,) float32, latent mean per channel: what a dropped channel or a token not sent decodes to.
        prior_logits: (N,) float32, static log-probabilities of the tokens (natural, unnormalized).
        level_range: (L, 2) float32, natural logarithms of the finest and the coarsest w that each level applies, both
            ascending.
    """

    order: Tensor
    boundaries_tensor: Tensor
    sizes: Tensor
    level_range: Tensor

    def __init__(self, num_channels: int, config: QuantizerConfig, alphabets: Alphabets | None = None) -> None:
        super().__init__()
        if alphabets is None:
            shape = (config.num_levels, config.num_subquantizers)
            alphabets = Alphabets(np.ones(shape, np.int64), np.ones(shape[1], np.int64))
        self.num_channels = num_channels
        self.alphabets = alphabets
        self.num_levels, self.num_subquantizers = alphabets.num_levels, alphabets.num_subquantizers
        self.places = TokenPlaces(alphabets)
        self.register_buffer("boundaries_tensor", self.places.boundaries.clone())
        self.register_buffer("order", torch.arange(int(self.boundaries_tensor[-1])))
        self.register_buffer("sizes", torch.from_numpy(alphabets.sizes.copy()))
        self.codebook = nn.Parameter(torch.zeros(alphabets.num_values))
        self.default = nn.Parameter(torch.zeros(num_channels))
        self.prior_logits = nn.Parameter(torch.zeros(alphabets.num_codewords))
        log_w = torch.arange(self.num_levels, dtype=torch.float32)
        self.register_buffer("level_range", torch.stack([log_w - 1, log_w + 1], dim=1))

    @property
    def boundaries(self) -> list[int]:
        """Column where each run starts, and the end of the last."""
        return [int(b) for b in self.boundaries_tensor]

    def runs(self) -> list[slice]:
        """Columns of each sub-quantizer."""
        b = self.boundaries
        return [slice(b[m], b[m + 1]) for m in range(self.num_subquantizers)]

    def blocks(self, level: int) -> tuple[Block, ...]:
        """All sub-quantizers, those with alphabets alike together."""
        return self.alphabets.blocks(level, 0, self.num_subquantizers)

    def block_columns(self, block: Block) -> slice:
        """Columns of the sub-quantizers of a block."""
        return slice(int(self.boundaries_tensor[block.first]), int(self.boundaries_tensor[block.last]))

    def block_codewords(self, block: Block) -> Tensor:
        """Codewords of a block, (m, K, d)."""
        return self.codebook[block.values].view(block.last - block.first, block.size, block.channels)

    def block_bits(self, block: Block) -> Tensor:
        """Bits of the tokens of a block under their static priors: (m, K) float32."""
        logits = self.prior_logits[block.codewords].view(-1, block.size)
        return -torch.log_softmax(logits, dim=1) / LOG2

    def prior_bits(self) -> Tensor:
        """Bits of each token under the static priors: (N,) float32."""
        levels = range(self.num_levels)
        return torch.cat([self.block_bits(block).flatten() for level in levels for block in self.blocks(level)])

    def static_bits(self, tokens: Tensor, level: Tensor) -> Tensor:
        """Bits of tokens (B, M, h, w) of levels (B,) under the static priors, of each sample: (B,) float32."""
        return self.prior_bits()[self.places.codewords(tokens, level)].sum((1, 2, 3))

    @property
    def levels(self) -> Levels:
        """Which level serves which trade-off."""
        return Levels(self.level_range.tolist())

    def level(self, w: Tensor) -> Tensor:
        """Levels that serve trade-offs, squared latent units per bit: (B,) -> (B,) int64."""
        levels = self.levels
        return torch.tensor([levels.level(each) for each in w.tolist()], device=self.level_range.device)

    def applied_w(self, w: Tensor, level: Tensor) -> Tensor:
        """The w at which the codewords of levels are chosen when others are asked for: (B,), (B,) -> (B,) float32."""
        levels = self.levels
        applied = [levels.applied_w(*each) for each in zip(w.tolist(), level.tolist(), strict=True)]
        return torch.tensor(applied, dtype=torch.float32, device=self.level_range.device)

    def columns(self, z: Tensor) -> Tensor:
        """Latent (B, D, h, w) -> its kept channels in order, (B, h * w, D')."""
        return z[:, self.order].flatten(2).transpose(1, 2)

    @torch.no_grad()
    def assign(self, z: Tensor, w: Tensor | float, level: Tensor) -> Tensor:
        """Entropy-constrained tokens of a latent under the static prior.

        Args:
            z: (B, D, h, w) float32.
            w: squared latent units per bit, > 0, as applied; a number, one per sample (B,), or one per position
                (B, h * w).
            level: (B,) int64.

        Returns:
            (B, M, h, w) int64.
        """
        batch, _, height, width = z.shape
        columns, positions = self.columns(z), height * width
        weight = torch.as_tensor(w, dtype=torch.float32, device=z.device)
        weight = weight.expand(batch, positions) if weight.ndim == 0 else weight.view(batch, -1).expand(-1, positions)
        tokens = torch.zeros(batch, positions, self.num_subquantizers, dtype=torch.int64, device=z.device)
        for index in level.unique().tolist():
            samples = level == index
            values, weights = columns[samples].flatten(0, 1), weight[samples].flatten()
            chosen = [self._choose(values, weights, block) for block in self.blocks(index)]
            tokens[samples] = torch.cat(chosen, dim=1).view(-1, positions, self.num_subquantizers)
        return tokens.transpose(1, 2).reshape(batch, -1, height, width)

    def _choose(self, columns: Tensor, w: Tensor, block: Block) -> Tensor:
        """Tokens of a block for columns (n, D') and trade-offs (n,): (n, m) int64."""
        count = block.last - block.first
        if block.size == 1:
            return torch.zeros(len(columns), count, dtype=torch.int64, device=columns.device)
        values = columns[:, self.block_columns(block)].reshape(len(columns), count, -1).transpose(0, 1)  # (m, n, d)
        codewords = self.block_codewords(block)
        with torch.autocast(columns.device.type, enabled=False):  # a small difference of large numbers
            costs = torch.baddbmm(
                codewords.square().sum(2)[:, None], values.float(), codewords.transpose(1, 2), alpha=-2
            )
        return costs.addcmul_(w[:, None], self.block_bits(block)[:, None]).argmin(2).t()

    def dequantize(self, tokens: Tensor, level: Tensor, known: Tensor | None = None) -> Tensor:
        """Tokens -> quantized latent.

        Args:
            tokens: (B, M, h, w) int64.
            level: (B,) int64.
            known: (B, M, h, w) or broadcastable bool; where False the token is ignored and the mean is used.

        Returns:
            (B, D, h, w) float32; differentiable in the codewords and the means.
        """
        values = self.codebook[self.places.values(tokens, level)]
        default = self.default[None, :, None, None]
        if known is not None:
            known = self.places.by_column(known.expand(-1, self.num_subquantizers, -1, -1))
            values = torch.where(known, values, default[:, self.order])
        z = default.expand(len(tokens), -1, *tokens.shape[2:])
        return z.index_copy(1, self.order, values)
