"""The entropy model: a masked transformer over the token grid, trainable form.

Given any pattern of known tokens it predicts the probabilities of all others, so one network serves every step of the
schedule and also fills in what was not sent (masked image modelling as in arXiv:2212.07372). This is the float form for
training; with `simulate=True` it rounds as the exact form does (`exact_entropy`), which alone codes files.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pqmim.config import EntropyModelConfig
from pqmim.fixed_point import ACTIVATION_UNIT, INT8_MAX, LOGIT_UNIT, RESIDUAL_UNIT
from pqmim.schedule import Schedule, Step, quincunx_steps
from pqmim.training.layers import (
    QuantizableLinear,
    TransformerLayer,
    WindowPartition,
    fake_quantize,
    normalize,
    quantize_weight,
    round_through,
)
from pqmim.training.trainable_quantizer import LOG2, TrainableQuantizer

VALUE_DEVIATIONS = 4.0
"""Codeword values enter the network in int8 over this many standard deviations of their channel."""


class EntropyModel(nn.Module):
    """Masked transformer: known tokens -> logits of the unknown ones.

    A known token enters as the values of its codeword, which lets codewords that are near each other share what is
    learned; its logits are inner products of a head output with one factor per codeword.

    Each image has a *level*, one of L trade-offs between rate and distortion, which says what codebooks its
    tokens are from: the logits start from the static prior of that level, and the network is told it.

    Args:
        config: sizes.
        num_levels, num_subquantizers, num_codewords, num_kept: L, M, K and D' of the tokenizer.

    Attributes:
        token_values: (L, K, D') float32, codeword values on the activation grid, a constant of the tokenizer.
        schedule: the steps that files are coded in.
    """

    token_values: Tensor

    def __init__(
        self,
        config: EntropyModelConfig,
        num_levels: int,
        num_subquantizers: int,
        num_codewords: int,
        num_kept: int,
        runs: list[slice],
    ) -> None:
        super().__init__()
        self.config = config
        self.runs = runs
        self.schedule = Schedule(num_subquantizers, config.group_steps)
        self.num_levels, self.num_subquantizers, self.num_codewords = num_levels, num_subquantizers, num_codewords
        self.register_buffer("token_values", torch.zeros(num_levels, num_codewords, num_kept))
        self.embed = QuantizableLinear(num_kept + num_subquantizers + num_levels, config.width)
        self.layers = nn.ModuleList(
            TransformerLayer(
                config.width,
                config.head_width,
                config.mlp_ratio,
                config.window,
                has_attention=index % config.attention_every == 0,
                is_last=index == config.num_layers - 1,
            )
            for index in range(config.num_layers)
        )
        self.head = QuantizableLinear(config.width, num_subquantizers * config.token_rank)
        self.token_factors = nn.Parameter(torch.zeros(num_levels, num_subquantizers, num_codewords, config.token_rank))
        self.token_bias = nn.Parameter(torch.zeros(num_levels, num_subquantizers, num_codewords))

    @classmethod
    def for_quantizer(cls, config: EntropyModelConfig, quantizer: TrainableQuantizer) -> EntropyModel:
        """Untrained model for a trained product quantizer; predicts about the static prior."""
        q = quantizer
        model = cls(config, q.num_levels, q.num_subquantizers, q.num_codewords, len(q.order), q.runs())
        with torch.no_grad():
            priors = quantizer.prior_logits.log_softmax(2)  # (L, M, K)
            model.token_bias.copy_(priors)
            model.token_factors.normal_(std=0.3)
            for m, run in enumerate(quantizer.runs()):
                centered = quantizer.codebook[:, :, run] - quantizer.default[quantizer.order[run]]  # (L, K, d)
                # The finest level knows the channels' spread best; one unit for all levels lets them share what is
                # learned.
                deviation = (priors[0, m].exp() @ centered[0].square()).sqrt().clamp_min(1e-6)
                grid = (centered / deviation * (INT8_MAX / VALUE_DEVIATIONS)).round().clamp(-INT8_MAX, INT8_MAX)
                model.token_values[:, :, run] = grid * ACTIVATION_UNIT
                # Start where a few numbers say much: the distance from the mean (the local activity), the values
                # themselves (the local mean) and their squares.
                value = (centered / deviation).clamp(-4, 4)
                distance = value.square().mean(2, keepdim=True)
                start = torch.cat([distance.sqrt(), distance.clamp(max=4), value, value.square().clamp(max=4)], dim=2)
                start = start[..., : config.token_rank]
                model.token_factors[:, m, :, : start.shape[2]] = start
            nn.init.zeros_(model.head.bias)
            model.head.weight.mul_(0.02)
        return model

    def features(self, tokens: Tensor, known: Tensor, level: Tensor) -> Tensor:
        """Input of the network.

        Args:
            tokens: (B, M, h, w) int64; ignored where unknown.
            known: (B, M, h, w) bool.
            level: (B,) int64 in [0, L).

        Returns:
            (B, h, w, D' + M + L) float32: codeword values (0 if unknown), one known-flag per sub-quantizer, the level
            as one of L flags.
        """
        levels = F.one_hot(level, self.num_levels).float()[:, None, None].expand(-1, *tokens.shape[2:], -1)
        which = level[:, None, None]
        parts = [
            self.token_values[:, :, run][which, tokens[:, m]] * known[:, m, :, :, None]
            for m, run in enumerate(self.runs)
        ]
        return torch.cat([*parts, known.permute(0, 2, 3, 1).float(), levels], dim=-1)

    def hidden(self, features: Tensor, *, simulate: bool = False) -> Tensor:
        """Features (B, h, w, D' + M + L) -> (B, h, w, C) float32 on the activation grid, ready for `logits`."""
        height, width = features.shape[1:3]
        partitions = [
            WindowPartition(height, width, self.config.window, shifted, features.device) for shifted in (False, True)
        ]
        h = self.embed(features, simulate).float()
        if simulate:
            h = round_through(h * (1 / RESIDUAL_UNIT)) * RESIDUAL_UNIT
        for index, layer in enumerate(self.layers):
            h = layer(h, partitions[index // self.config.attention_every % 2], simulate)
        return normalize(h, simulate=simulate)

    def logits(self, hidden: Tensor, level: Tensor, first: int, last: int, *, simulate: bool = False) -> Tensor:
        """Logits of sub-quantizers `first` to `last` at some positions.

        Args:
            hidden: (n, C) rows of `hidden`.
            level: (n,) int64, level of the image that a row is from.

        Returns:
            (n, last - first, K) float32, nats, unnormalized.
        """
        rank = self.config.token_rank
        rows = slice(first * rank, last * rank)
        factors = self.token_factors[:, first:last]  # (L, m, K, R)
        if simulate:
            integers, unit = quantize_weight(self.head.weight[rows])
            head = hidden @ integers.t() * unit[:, 0] + self.head.bias[rows]
            factor_integers, factor_unit = quantize_weight(factors.flatten(2).flatten(0, 1))
            factors = factor_integers.view_as(factors)
        else:
            head = hidden @ self.head.weight[rows].t() + self.head.bias[rows]
        head = fake_quantize(head.float(), ACTIVATION_UNIT, simulate=simulate)
        head = head.view(-1, last - first, rank).transpose(0, 1)  # (m, n, R)
        products = head.new_zeros(head.shape[1], last - first, self.num_codewords)
        for index in level.unique().tolist():
            of_level = level == index
            product = torch.bmm(head[:, of_level], factors[index].transpose(1, 2)).float()
            if simulate:
                product = product * factor_unit.view(self.num_levels, -1)[index, :, None, None]
            products[of_level] = product.transpose(0, 1)
        logits = products + self.token_bias[:, first:last][level]
        if simulate:
            logits = round_through(logits * (1 / LOGIT_UNIT)) * LOGIT_UNIT
        return logits

    def code_length(
        self, tokens: Tensor, known: Tensor, predicted: Tensor, level: Tensor, group: int, *, simulate: bool = False
    ) -> Tensor:
        """Bits of each predicted token.

        Args:
            tokens: (B, M, h, w) int64.
            known: (B, M, h, w) bool.
            predicted: (B, h, w) bool, where the tokens of `group` are predicted.
            level: (B,) int64.

        Returns:
            (n * m,) float32 for the n predicted positions and the m sub-quantizers of the group.
        """
        first, last = self.schedule.group_bounds(group)
        hidden = self.hidden(self.features(tokens, known, level), simulate=simulate)[predicted]
        levels = level[:, None, None].expand_as(predicted)[predicted]
        logits = self.logits(hidden, levels, first, last, simulate=simulate)
        targets = tokens[:, first:last].permute(0, 2, 3, 1)[predicted]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none") / LOG2

    @torch.no_grad()
    def schedule_bits(self, tokens: Tensor, level: Tensor, *, simulate: bool = False) -> float:
        """Bits of whole token grids (B, M, h, w) of levels (B,), coded step by step as in a file."""
        quincunx = torch.from_numpy(quincunx_steps(*tokens.shape[2:])).to(tokens.device)
        bits = 0.0
        for step in self.schedule.steps:
            here, predicted = (mask.expand(len(tokens), -1, -1) for mask in step_masks(step, quincunx))
            known = torch.zeros_like(tokens, dtype=torch.bool)
            known[:, : step.first] = True
            known[:, step.first : step.last] = here[:, None]
            lengths = self.code_length(tokens, known, predicted, level, step.group, simulate=simulate)
            bits += float(lengths.double().sum())
        return bits


def step_masks(step: Step, quincunx: Tensor) -> tuple[Tensor, Tensor]:
    """Positions (h, w) bool where the step's group is known before the step, and where the step codes it."""
    return quincunx < step.begin, (quincunx >= step.begin) & (quincunx < step.end)
