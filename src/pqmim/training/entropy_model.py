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

from pqmim.alphabets import Alphabets, Block
from pqmim.config import EntropyModelConfig
from pqmim.entropy_weights import embed_inputs
from pqmim.fixed_point import ACTIVATION_UNIT, INT8_MAX, LOGIT_UNIT
from pqmim.schedule import NUM_QUINCUNX_STEPS, quincunx_steps
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
from pqmim.training.token_places import TokenPlaces
from pqmim.training.trainable_quantizer import LOG2, TrainableQuantizer

NEAR = 0.3
"""Codewords within so many standard deviations of the mean are told from all others by a factor of their own."""
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
        alphabets: of the tokenizer, N codewords with V values.

    Attributes:
        token_values: (V,) float32, codeword values on the activation grid, a constant of the tokenizer.
        prior: (N,) float32, natural logarithms of the static probabilities, which the first step is coded with, a
            constant of the tokenizer.
        level_bits: (L,) float32, bits of a position under them.
        schedule: the steps that files are coded in.
    """

    token_values: Tensor
    prior: Tensor
    level_bits: Tensor

    def __init__(self, config: EntropyModelConfig, alphabets: Alphabets) -> None:
        super().__init__()
        self.config = config
        self.alphabets = alphabets
        self.places = TokenPlaces(alphabets)
        self.num_levels, self.num_subquantizers = alphabets.num_levels, alphabets.num_subquantizers
        self.schedule = config.schedule(self.num_subquantizers)
        self.register_buffer("token_values", torch.zeros(alphabets.num_values))
        self.register_buffer("prior", torch.zeros(alphabets.num_codewords))
        self.register_buffer("level_bits", torch.zeros(self.num_levels))
        self.embed = nn.ModuleList(
            QuantizableLinear(embed_inputs(alphabets, self.schedule, group), config.width, bias=group == 0)
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
        self.head = QuantizableLinear(config.width, self.num_subquantizers * config.token_rank)
        self.token_factors = nn.Parameter(torch.zeros(alphabets.num_codewords, config.token_rank))
        self.token_bias = nn.Parameter(torch.zeros(alphabets.num_codewords))

    def group_blocks(self, group: int, level: int) -> tuple[Block, ...]:
        """The sub-quantizers of a group at a level, those with alphabets alike together."""
        return self.alphabets.blocks(level, *self.schedule.group_bounds(group))

    @classmethod
    def for_quantizer(cls, config: EntropyModelConfig, quantizer: TrainableQuantizer) -> EntropyModel:
        """Untrained model for a trained product quantizer; predicts about the static prior."""
        model = cls(config, quantizer.alphabets)
        with torch.no_grad():
            deviations = _deviations(quantizer)
            for level in range(model.num_levels):
                for block in quantizer.blocks(level):
                    bits = quantizer.block_bits(block)
                    model.prior[block.codewords] = -LOG2 * bits.flatten()
                    model.level_bits[level] += (bits * torch.exp2(-bits)).sum()
                    deviation = deviations[quantizer.block_columns(block)].view(len(bits), 1, -1)
                    value = _centered(quantizer, block) / deviation
                    grid = (value * (INT8_MAX / VALUE_DEVIATIONS)).round().clamp(-INT8_MAX, INT8_MAX)
                    model.token_values[block.values] = grid.flatten() * ACTIVATION_UNIT
                    model.token_factors[block.codewords] = _first_factors(value, config.token_rank).flatten(0, 1)
            model.token_bias.copy_(model.prior)
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
        known = known.expand(len(tokens), last - first, -1, -1).to(self.token_values.dtype)
        values = self.token_values[self.places.values(tokens, level, first)] * self.places.by_column(known, first)
        flags = known.permute(0, 2, 3, 1)
        parts = [values.permute(0, 2, 3, 1)]
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
        first = self.schedule.group_bounds(group)[0]
        head = self.head_of(group, hidden[order], simulate=simulate)
        sent, lengths, start = tokens[order], [head[:0, :, 0]], 0  # there may be no rows
        factors, bias = self._by_block(self.token_factors), self._by_block(self.token_bias)
        for index, count in zip(*(part.tolist() for part in level.unique(return_counts=True)), strict=True):
            rows = slice(start, start + count)
            start += count
            parts = []
            for block in self.group_blocks(group, index):
                own = slice(block.first - first, block.last - first)
                if block.size == 1:
                    parts.append(head.new_zeros(count, own.stop - own.start))
                    continue
                where = block.codewords.start
                logits = block_logits(head[rows, own].transpose(0, 1), factors[where], bias[where], simulate=simulate)
                nats = F.cross_entropy(logits.flatten(0, 1), sent[rows, own].t().flatten(), reduction="none")
                parts.append(nats.view(-1, count).t())
            lengths.append(torch.cat(parts, dim=1))
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return torch.cat(lengths)[back] / LOG2

    def head_of(self, group: int, hidden: Tensor, *, simulate: bool = False) -> Tensor:
        """The head's output for the sub-quantizers of a group: (n, C) rows of `hidden` -> (n, m, R) float32."""
        first, last = self.schedule.group_bounds(group)
        rank = self.config.token_rank
        head = self.head(hidden, simulate, slice(first * rank, last * rank)).float()
        return fake_quantize(head, ACTIVATION_UNIT, simulate=simulate).view(len(hidden), last - first, rank)

    def _by_block(self, flat: Tensor) -> dict[int, Tensor]:
        """What belongs to all codewords, cut into the blocks of all groups and levels, by where they begin: one
        operation, so that a gradient is put together once."""
        groups = range(self.schedule.num_groups)
        blocks = [b.codewords for level in range(self.num_levels) for g in groups for b in self.group_blocks(g, level)]
        parts = flat.split([b.stop - b.start for b in blocks])
        return dict(zip((b.start for b in blocks), parts, strict=True))

    def code_length(self, tokens: Tensor, level: Tensor, orders: Orders, *, simulate: bool = False) -> Tensor:
        """Bits of all tokens that are predicted, (B,) float32.

        Args:
            tokens: (B, M, h, w) int64.
            level: (B,) int64.
        """
        bits = self.token_bias.new_zeros(len(tokens))
        sample = torch.arange(len(tokens), device=tokens.device)[:, None, None]
        for group, hidden in enumerate(self.hidden(tokens, level, orders, simulate=simulate)):
            predicted, unknown = orders.wanted(group)
            predicted = predicted.expand(hidden.shape[:3])
            own = tokens[:, slice(*self.schedule.group_bounds(group))].permute(0, 2, 3, 1)[predicted]
            samples = sample.expand_as(predicted)[predicted]
            lengths = self.token_bits(group, hidden[predicted], own, level[samples], simulate=simulate)
            if unknown is not None:
                lengths = lengths * unknown.permute(0, 2, 3, 1)[predicted]
            bits = bits.index_add(0, samples, lengths.sum(1))
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
                first = orders.query == 0
                static = -self.prior[self.places.codewords(own.permute(0, 3, 1, 2), level)].double().sum(1) / LOG2
                lengths = torch.where(first, static, lengths)
            bits.append(
                lengths.new_zeros(NUM_QUINCUNX_STEPS).index_add_(0, quincunx.flatten(), lengths.sum(0).flatten())
            )
        return torch.stack(bits)


def block_logits(head: Tensor, factors: Tensor, bias: Tensor, *, simulate: bool = False) -> Tensor:
    """Logits of the tokens of m sub-quantizers with K codewords each.

    Args:
        head: (m, n, R), their part of the head's output.
        factors, bias: (m * K, R) and (m * K,), their part of `EntropyModel.token_factors` and `token_bias`.

    Returns:
        (m, n, K) float32, nats.
    """
    factors = factors.view(len(head), -1, head.shape[2])
    if simulate:
        integers, unit = quantize_weight(factors.flatten(1))
        products = torch.bmm(head, integers.view_as(factors).transpose(1, 2)).float() * unit[..., None]
    else:
        products = torch.bmm(head, factors.transpose(1, 2)).float()
    logits = products + bias.view(len(head), 1, -1)
    return round_through(logits * (1 / LOGIT_UNIT)) * LOGIT_UNIT if simulate else logits


def _at_predicted(h: Tensor, passes: tuple[LaterPass, ...]) -> Tensor:
    """Of the passes' outputs, one after the other, those where they are wanted: (P * B, h, w, C) -> (B, h, w, C)."""
    outputs = h.chunk(len(passes))
    chosen = outputs[-1]
    for output, each in zip(outputs[:-1], passes[:-1], strict=True):
        chosen = torch.where(each.predicted[..., None], output, chosen)
    return chosen


def _deviations(quantizer: TrainableQuantizer) -> Tensor:
    """Standard deviation of the codewords of each column: (D',) float32.

    The finest level knows the channels' spread best; one unit for all levels lets them share what is learned.
    """
    parts = []
    for block in quantizer.blocks(0):
        shares = torch.exp2(-quantizer.block_bits(block))[:, None]
        parts.append(torch.bmm(shares, _centered(quantizer, block).square()).flatten())
    return torch.cat(parts).sqrt().clamp_min(1e-6)


def _centered(quantizer: TrainableQuantizer, block: Block) -> Tensor:
    """Codewords of a block less the mean, (m, K, d)."""
    codewords = quantizer.block_codewords(block)
    mean = quantizer.default[quantizer.order[quantizer.block_columns(block)]]
    return codewords - mean.view(len(codewords), 1, -1)


def _first_factors(value: Tensor, rank: int) -> Tensor:
    """Factors to begin with, where a few numbers say much: the distance from the mean (the local activity), the values
    themselves (the local mean) and their squares.

    Args:
        value: (m, K, d), codewords in standard deviations of their channels, less the mean.

    Returns:
        (m, K, R).
    """
    value = value.clamp(-4, 4)
    distance = value.square().mean(2, keepdim=True)
    near = torch.exp(-(value / NEAR).square().mean(2, keepdim=True))
    start = torch.cat([distance.sqrt(), distance.clamp(max=4), near, value, value * value.abs(), value.square()], dim=2)
    factors = 0.3 * torch.randn(*value.shape[:2], rank)
    factors[..., : start.shape[2]] = start[..., :rank]
    return factors
