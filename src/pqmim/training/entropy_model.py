"""The entropy model: a masked transformer over the token grid that is decoded with a cache, trainable form.

The first group of sub-quantizers is predicted by two streams that share their weights (the second masking of M2T,
arXiv:2304.07313): *content* where tokens are known, *queries* where they are asked for. Only content is seen by others.
Content of a step sees content up to its own step, a query sees content of earlier steps, so that nothing that is
computed for a known token ever changes. The picture is known coarsely then, and each later group has a short trunk of
its own, which goes on from the first one's streams and sees all positions.

So one pass of training predicts every token of every step. Any set of known tokens can be taken too (`Orders.random`):
a share of the training does so, for what was not sent must be filled in (masked image modelling as in
arXiv:2212.07372).

This is the float form for training; with `simulate=True` it rounds as the exact form does (`exact_entropy`), which
alone codes files.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pqmim.config import EntropyModelConfig
from pqmim.fixed_point import ACTIVATION_UNIT, INT8_MAX, LOGIT_UNIT
from pqmim.schedule import NUM_QUINCUNX_STEPS, Schedule, quincunx_steps
from pqmim.training.layers import (
    QuantizableLinear,
    Sight,
    TransformerLayer,
    fake_quantize,
    normalize,
    partitions_of,
    quantize_weight,
    round_through,
    to_residual,
)
from pqmim.training.orders import LaterPass, Orders
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
        first_prior: (L, m, K) float32, natural logarithms of the static probabilities that the first step is coded
            with, a constant of the tokenizer.
        schedule: the steps that files are coded in.
    """

    token_values: Tensor
    first_prior: Tensor

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
        first_step = self.schedule.steps[0]
        self.register_buffer("first_prior", torch.zeros(num_levels, first_step.last, num_codewords))
        self.embed = nn.ModuleList(
            QuantizableLinear(self.num_inputs(group), config.width, bias=group == 0)
            for group in range(self.schedule.num_groups)
        )
        self.layers = nn.ModuleList(
            TransformerLayer(
                config.width,
                config.head_width,
                config.mlp_ratio,
                config.window,
                has_attention=config.has_attention(layer),
                is_shifted=config.is_shifted(layer),
                is_last=config.is_last(layer),
            )
            for layer in range(config.total_layers)
        )
        self.head = QuantizableLinear(config.width, num_subquantizers * config.token_rank)
        self.token_factors = nn.Parameter(torch.zeros(num_levels, num_subquantizers, num_codewords, config.token_rank))
        self.token_bias = nn.Parameter(torch.zeros(num_levels, num_subquantizers, num_codewords))

    def num_inputs(self, group: int) -> int:
        """Inputs of the embedding of a group's tokens: values and known-flags, and levels for the first."""
        first, last = self.schedule.group_bounds(group)
        values = int(self.runs[last - 1].stop - self.runs[first].start)
        return values + last - first + (self.num_levels if group == 0 else 0)

    @classmethod
    def for_quantizer(cls, config: EntropyModelConfig, quantizer: TrainableQuantizer) -> EntropyModel:
        """Untrained model for a trained product quantizer; predicts about the static prior."""
        q = quantizer
        model = cls(config, q.num_levels, q.num_subquantizers, q.num_codewords, len(q.order), q.runs())
        with torch.no_grad():
            priors = quantizer.prior_logits.log_softmax(2)  # (L, M, K)
            model.token_bias.copy_(priors)
            model.first_prior.copy_(priors[:, : model.first_prior.shape[1]])
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

    def embedded(self, group: int, tokens: Tensor, known: Tensor, level: Tensor, *, simulate: bool = False) -> Tensor:
        """What the tokens of a group add to the residual stream.

        Args:
            tokens: (B, m, h, w) int64, of the group; ignored where unknown.
            known: (B or 1, m or 1, h, w) bool.
            level: (B,) int64 in [0, L).

        Returns:
            (B, h, w, C) float32: of codeword values (0 if unknown), one known-flag per sub-quantizer, for the first
            group the level as one of L flags.
        """
        first, last = self.schedule.group_bounds(group)
        which = level[:, None, None]
        flags = known.expand(len(tokens), last - first, -1, -1).permute(0, 2, 3, 1).to(self.token_values.dtype)
        parts = [
            self.token_values[:, :, run][which, tokens[:, m]] * flags[..., m, None]
            for m, run in enumerate(self.runs[first:last])
        ]
        parts.append(flags)
        if group == 0:
            levels = F.one_hot(level, self.num_levels).to(flags.dtype)
            parts.append(levels[:, None, None].expand(*flags.shape[:3], -1))
        return to_residual(self.embed[group](torch.cat(parts, dim=-1), simulate).float(), simulate=simulate)

    def hidden(self, tokens: Tensor, level: Tensor, orders: Orders, *, simulate: bool = False) -> list[Tensor]:
        """Run the network over everything.

        Args:
            tokens: (B, M, h, w) int64.
            level: (B,) int64.

        Returns:
            For each group (B, h, w, C) float32 on the activation grid, ready for `code_length`, where it is predicted.
        """
        config, (batch, _, height, width) = self.config, tokens.shape
        groups = [tokens[:, slice(*self.schedule.group_bounds(group))] for group in range(self.schedule.num_groups)]
        partitions = partitions_of(height, width, config.window, tokens.device)
        sight = Sight.by_labels(orders.content, orders.query, partitions)
        asked = orders.known & (orders.query > orders.content)[:, None]
        h = torch.stack(
            [self.embedded(0, groups[0], known, level, simulate=simulate) for known in (orders.known, asked)]
        )
        own = [self.layers[layer] for layer in config.layers_of(0)]
        for layer in own[:-1]:
            h = layer(h, sight, partitions, simulate)
        outputs = [own[-1](h, sight, partitions, simulate, first=1)[0]]
        # The later groups go on before the last layer, which content need not pass then.
        going_on = torch.where(orders.is_complete[..., None], h[0], h[1])
        everything = Sight.everything(partitions)
        for group, passes in enumerate(orders.passes, start=1):
            known = torch.cat([each.known.expand(batch, -1, height, width) for each in passes])
            count = len(passes)
            update = self.embedded(
                group, groups[group].repeat(count, 1, 1, 1), known, level.repeat(count), simulate=simulate
            )
            h = to_residual(going_on.repeat(count, 1, 1, 1) + update, simulate=simulate)
            for number in config.layers_of(group):
                if config.is_last(number) and not config.has_attention(number):
                    h = _at_predicted(h, passes)
                h = self.layers[number](h[None], everything, partitions, simulate)[0]
            h = _at_predicted(h, passes) if len(h) > batch else h
            outputs.append(h)
            going_on = h
            if orders.is_whole and group + 1 < len(groups):
                all_known = torch.ones_like(known[:1])
                going_on = going_on + self.embedded(group, groups[group], all_known, level, simulate=simulate)
        return [normalize(h, simulate=simulate) for h in outputs]

    def token_bits(
        self, group: int, hidden: Tensor, tokens: Tensor, level: Tensor, *, simulate: bool = False
    ) -> Tensor:
        """Code lengths of the tokens of a group at some positions.

        Args:
            hidden: (n, C) rows of `hidden`.
            tokens: (n, m) int64.
            level: (n,) int64, level of the image that a row is from.

        Returns:
            (n, m) float32, bits.
        """
        order = level.argsort(stable=True)
        lengths = [
            F.cross_entropy(
                self.logits(group, hidden[rows], index, simulate=simulate).flatten(0, 1),
                tokens[rows].t().flatten(),
                reduction="none",
            ).view(-1, len(rows))
            for index, rows in _rows_by_level(level, order)
        ]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return torch.cat(lengths, dim=1).t()[back] / LOG2

    def logits(self, group: int, hidden: Tensor, level: int, *, simulate: bool = False) -> Tensor:
        """Logits of the tokens of a group: rows (n, C) of `hidden`, of one level -> (m, n, K) float32, nats."""
        first, last = self.schedule.group_bounds(group)
        rank = self.config.token_rank
        head = self.head(hidden, simulate, slice(first * rank, last * rank)).float()
        head = fake_quantize(head, ACTIVATION_UNIT, simulate=simulate)
        head = head.view(-1, last - first, rank).transpose(0, 1)  # (m, n, R)
        factors = self.token_factors[level, first:last]  # (m, K, R)
        if simulate:
            integers, unit = quantize_weight(factors.flatten(1))
            products = torch.bmm(head, integers.view_as(factors).transpose(1, 2)).float() * unit[..., None]
        else:
            products = torch.bmm(head, factors.transpose(1, 2)).float()
        logits = products + self.token_bias[level, first:last, None]
        return round_through(logits * (1 / LOGIT_UNIT)) * LOGIT_UNIT if simulate else logits

    def code_length(self, tokens: Tensor, level: Tensor, orders: Orders, *, simulate: bool = False) -> Tensor:
        """Bits of all tokens that are predicted, in all.

        Args:
            tokens: (B, M, h, w) int64.
            level: (B,) int64.
        """
        bits = self.token_bias.new_zeros(())
        for group, hidden in enumerate(self.hidden(tokens, level, orders, simulate=simulate)):
            predicted, unknown = orders.wanted(group)
            predicted = predicted.expand(hidden.shape[:3])
            own = tokens[:, slice(*self.schedule.group_bounds(group))].permute(0, 2, 3, 1)[predicted]
            levels = level[:, None, None].expand_as(predicted)[predicted]
            lengths = self.token_bits(group, hidden[predicted], own, levels, simulate=simulate)
            if unknown is not None:
                lengths = lengths * unknown.permute(0, 2, 3, 1)[predicted]
            bits = bits + lengths.sum()
        return bits

    @torch.no_grad()
    def schedule_bits(self, tokens: Tensor, level: Tensor, *, simulate: bool = False) -> Tensor:
        """Bits of whole token grids, coded step by step as in a file.

        Args:
            tokens: (B, M, h, w) int64.
            level: (B,) int64.

        Returns:
            (groups, 5) float64, by quincunx step.
        """
        quincunx = torch.from_numpy(quincunx_steps(*tokens.shape[2:])).to(tokens.device)
        orders = Orders.of_schedule(self.schedule, quincunx)
        bits = []
        for group, hidden in enumerate(self.hidden(tokens, level, orders, simulate=simulate)):
            own = tokens[:, slice(*self.schedule.group_bounds(group))].permute(0, 2, 3, 1)  # (B, h, w, m)
            levels = level[:, None, None].expand(own.shape[:3])
            lengths = self.token_bits(
                group, hidden.flatten(0, 2), own.flatten(0, 2), levels.flatten(), simulate=simulate
            )
            lengths = lengths.double().sum(1).view(own.shape[:3])
            if group == 0:
                static = -self.first_prior[level].gather(2, own.flatten(1, 2).transpose(1, 2)).sum(1) / LOG2
                first = orders.query == 0
                lengths = torch.where(first, static.view(own.shape[:3]).double(), lengths)
            bits.append(
                lengths.new_zeros(NUM_QUINCUNX_STEPS).index_add_(0, quincunx.flatten(), lengths.sum(0).flatten())
            )
        return torch.stack(bits)


def _at_predicted(h: Tensor, passes: tuple[LaterPass, ...]) -> Tensor:
    """Of the passes' outputs, one after the other, those where they are wanted: (P * B, h, w, C) -> (B, h, w, C)."""
    outputs = h.chunk(len(passes))
    chosen = outputs[-1]
    for output, each in zip(outputs[:-1], passes[:-1], strict=True):
        chosen = torch.where(each.predicted[..., None], output, chosen)
    return chosen


def _rows_by_level(level: Tensor, order: Tensor) -> list[tuple[int, Tensor]]:
    """Levels that occur, and the rows of each; `order` sorts the rows by level."""
    levels, counts = level.unique(return_counts=True)
    return list(zip(levels.tolist(), order.split(counts.tolist()), strict=True))
