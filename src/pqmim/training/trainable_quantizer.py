"""Product quantizer over runs of ordered channels, and the factorized density that comes before it in training.

A position's latent has D channels. They are put in order of their rate, near-dead ones are dropped, and the ordered
list is cut into M *runs* of about equal rate; sub-quantizer m quantizes run m to one of K codewords. The leading
sub-quantizers so hold a channel or two and carry the picture, the last ones hold many quiet channels, where vector
quantization gains most over scalar quantization. Quantization is *entropy-constrained*: a codeword is chosen by

    |z_m - c_k|^2 + w * bits(k),

where w (squared latent units per bit) sets the rate (Chou, Lookabaugh and Gray 1989, "Entropy-constrained vector
quantization"; Jegou, Douze and Schmid 2011, "Product quantization for nearest neighbor search").

w may have any value, but codewords that are right for one w are too dense or too sparse for another. So there is a set
of codebooks for each of a few *levels*, trade-offs spread over the range of rates (`pqmim.levels`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pqmim.config import QuantizerConfig
from pqmim.levels import level_ends, level_starts

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
    """At each of L levels M codebooks of K codewords over runs of ordered latent channels.

    Attributes:
        order: (D',) int64, latent channel of each codebook column, D' <= D kept channels, most costly first.
        boundaries: M + 1 column indices; run m is columns boundaries[m] to boundaries[m + 1].
        codebook: (L, K, D') float32, codeword k of sub-quantizer m at level l is `codebook[l, k, run m]`.
        default: (D,) float32, latent mean per channel: what a dropped channel or a token not sent decodes to.
        prior_logits: (L, M, K) float32, static log-probabilities of the tokens (natural, unnormalized).
        level_log_w: (L,) float32, ascending, natural logarithm of the w that each level was made for.
    """

    order: Tensor
    boundaries_tensor: Tensor
    level_log_w: Tensor

    def __init__(self, num_channels: int, num_kept: int, sizes: QuantizerConfig) -> None:
        super().__init__()
        self.num_channels = num_channels
        num_levels = self.num_levels = sizes.num_levels
        num_codewords = self.num_codewords = sizes.num_codewords
        num_subquantizers = self.num_subquantizers = sizes.num_subquantizers
        self.register_buffer("order", torch.arange(num_kept))
        boundaries = torch.linspace(0, num_kept, num_subquantizers + 1).round().long()
        self.register_buffer("boundaries_tensor", boundaries)
        self.codebook = nn.Parameter(torch.zeros(num_levels, num_codewords, num_kept))
        self.default = nn.Parameter(torch.zeros(num_channels))
        self.prior_logits = nn.Parameter(torch.zeros(num_levels, num_subquantizers, num_codewords))
        self.register_buffer("level_log_w", torch.arange(num_levels, dtype=torch.float32))

    @property
    def boundaries(self) -> list[int]:
        """Column where each run starts, and the end of the last."""
        return [int(b) for b in self.boundaries_tensor]

    def runs(self) -> list[slice]:
        """Columns of each sub-quantizer."""
        b = self.boundaries
        return [slice(b[m], b[m + 1]) for m in range(self.num_subquantizers)]

    def prior_bits(self) -> Tensor:
        """Bits of each token under the static priors: (L, M, K) float32."""
        return -torch.log_softmax(self.prior_logits, dim=2) / LOG2

    def level(self, w: Tensor | float) -> Tensor:
        """Level that serves a trade-off: (B,) or a number, squared latent units per bit -> (B,) or () int64."""
        return torch.bucketize(self._log(w), self._handovers()[0])

    def applied_w(self, w: Tensor | float, level: Tensor) -> Tensor:
        """The w at which the codewords of a level are chosen when another is asked for.

        Args:
            w: asked for, squared latent units per bit; (B,) or a number.
            level: (B,) or () int64; any, though those far from `level(w)` are of little use.

        Returns:
            Squared latent units per bit, float32, of the common shape; rises with w.
        """
        slope, asked, applied = self._line(level)
        return (applied + slope * (self._log(w) - asked)).exp()

    def asking_for(self, w: float) -> float:
        """What to ask for to have w itself applied, by the level made for about that w, whose codewords fit best."""
        log_w = self._log(w)
        asked, ends, starts = self._handovers()
        no_limit = asked.new_tensor([torch.inf])
        serves = (log_w >= torch.cat([-no_limit, starts])) & (log_w <= torch.cat([ends, no_limit]))
        level = torch.where(serves, (log_w - self.level_log_w).abs(), torch.inf).argmin()
        slope, at, applied = self._line(level)
        return float((at + (log_w - applied) / slope).exp())

    def _line(self, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Slope, and a point (asked for, applied), of the line that a level's w follows, in logarithms.

        The line goes through the two handovers of the level. The outermost ones have but one, and the slope of their
        neighbors; where there is no neighbor with two, it is 1.
        """
        asked, ends, starts = self._handovers()
        if len(asked) < 2:
            zero = torch.zeros_like(level, dtype=torch.float32)
            if len(asked) == 0:
                return zero + 1, zero, zero
            return zero + 1, zero + asked[0], torch.where(level > 0, starts[0], ends[0])
        inner = level.clamp(1, len(asked) - 1)
        slope = (ends[inner] - starts[inner - 1]) / (asked[inner] - asked[inner - 1])
        first = (level - 1).clamp_min(0)
        return slope, asked[first], torch.where(level > 0, starts[first], ends[0])

    def w_range(self) -> tuple[float, float]:
        """Finest and coarsest trade-off worth asking for: squared latent units per bit."""
        made_for = self.level_log_w.exp()
        return float(made_for[0]) / 2, float(made_for[-1]) * 1.2

    def _log(self, w: Tensor | float) -> Tensor:
        return torch.as_tensor(w, dtype=torch.float32, device=self.level_log_w.device).log()

    def _handovers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logarithms of w where a level hands over to the next, each (L - 1,): asked for, applied by the finer level,
        applied by the coarser one."""
        made_for = self.level_log_w
        ends = made_for[:-1] + made_for.new_tensor(level_ends(self.num_levels)).log()
        starts = made_for[1:] + made_for.new_tensor(level_starts(self.num_levels)).log()
        return (ends + starts) / 2, ends, starts

    def columns(self, z: Tensor) -> Tensor:
        """Latent (B, D, h, w) -> its kept channels in order, (B, h * w, D')."""
        return z[:, self.order].flatten(2).transpose(1, 2)

    def squared_distances(self, columns: Tensor, m: int, level: Tensor) -> Tensor:
        """Squared distance to every codeword of sub-quantizer m.

        Args:
            columns: (B, n, D') float32 from `columns`.
            level: (B,) int64.

        Returns:
            (B, n, K) float32, squared latent units.
        """
        run = self.runs()[m]
        values, codewords = columns[..., run], self.codebook[level][..., run]
        squares = values.square().sum(2, keepdim=True) + codewords.square().sum(2)[:, None]
        with torch.autocast(columns.device.type, enabled=False):  # a small difference of large numbers
            return torch.baddbmm(squares, values.float(), codewords.transpose(1, 2), alpha=-2)

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
        columns, bits = self.columns(z), self.prior_bits()[level]  # (B, n, D'), (B, M, K)
        weight = torch.as_tensor(w, dtype=torch.float32, device=z.device)
        if weight.ndim < 2:
            weight = weight.expand(batch)[:, None]
        tokens = torch.empty(batch, self.num_subquantizers, height * width, dtype=torch.int64, device=z.device)
        for m in range(self.num_subquantizers):
            distances = self.squared_distances(columns, m, level)
            tokens[:, m] = distances.addcmul_(weight[:, :, None], bits[:, m, None]).argmin(dim=2)
        return tokens.view(batch, -1, height, width)

    def smoothed_bits(self, z: Tensor, tokens: Tensor, w: Tensor, level: Tensor) -> Tensor:
        """Rate of chosen tokens, made differentiable: min over k of |z_m - c_k|^2 / w + bits(k), in bits.

        This is the Moreau envelope of the rate as a function of the latent: it falls as the latent comes nearer to
        the cheap codeword that was chosen for it, while the rate itself is piecewise constant.

        Args:
            z: (B, D, h, w) float32.
            tokens: (B, M, h, w) int64, what `assign` chose.
            w: (B,) squared latent units per bit, as applied.
            level: (B,) int64.

        Returns:
            (B, M, h, w) float32; differentiable in the latent, the codewords and the prior.
        """
        batch, _, height, width = z.shape
        columns, penalty = self.columns(z), self.prior_bits()[level]
        bits = []
        for m, run in enumerate(self.runs()):
            chosen = tokens[:, m].flatten(1)  # (B, n)
            codewords = self.codebook[:, :, run][level[:, None], chosen]
            error = (columns[..., run] - codewords).square().sum(2)
            bits.append(error / w[:, None] + penalty[:, m].gather(1, chosen))
        return torch.stack(bits, dim=1).view(batch, -1, height, width)

    def dequantize(self, tokens: Tensor, level: Tensor, known: Tensor | None = None) -> Tensor:
        """Tokens -> quantized latent.

        Args:
            tokens: (B, M, h, w) int64 in [0, K).
            level: (B,) int64.
            known: (B, M, h, w) or broadcastable bool; where False the token is ignored and the mean is used.

        Returns:
            (B, D, h, w) float32; differentiable in the codewords and the means.
        """
        which = level[:, None, None]
        parts = []
        for m, run in enumerate(self.runs()):
            part = self.codebook[:, :, run][which, tokens[:, m]].permute(0, 3, 1, 2)
            if known is not None:
                part = torch.where(known[:, m : m + 1], part, self.default[self.order[run]][None, :, None, None])
            parts.append(part)
        return self.scatter_columns(torch.cat(parts, dim=1))

    def scatter_columns(self, values: Tensor) -> Tensor:
        """Codebook columns (B, D', h, w) -> latent (B, D, h, w), dropped channels at their mean."""
        batch, _, height, width = values.shape
        z = self.default[None, :, None, None].expand(batch, -1, height, width)
        return z.index_copy(1, self.order, values)


def order_channels(bits: Tensor, num_subquantizers: int, min_rate: float) -> tuple[Tensor, list[int]]:
    """Order channels by rate and cut the list into runs of about equal rate.

    Args:
        bits: (D,) float32, mean bits per position of each channel.
        num_subquantizers: M, number of runs.
        min_rate: channels below this many bits are left out, as long as M channels remain.

    Returns:
        Channels in order, most costly first (D',) int64; M + 1 boundaries into it.
    """
    order = bits.argsort(descending=True, stable=True)
    num_kept = max(num_subquantizers, int((bits > min_rate).sum()))
    order = order[:num_kept]
    rates = bits[order].double().tolist()
    boundaries = [0]
    remaining = sum(rates)
    for m in range(num_subquantizers):
        runs_left = num_subquantizers - m
        start = boundaries[-1]
        share, end, taken = remaining / runs_left, start, 0.0
        while end < num_kept - (runs_left - 1) and (end == start or taken + 0.5 * rates[end] < share):
            taken += rates[end]
            end += 1
        if runs_left == 1:
            end = num_kept
        remaining -= taken
        boundaries.append(end)
    return order, boundaries


def fit_codebook(
    values: Tensor,
    num_codewords: int,
    w: float,
    iterations: int,
    generator: torch.Generator,
    start: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Entropy-constrained Lloyd iterations for one sub-quantizer (Chou, Lookabaugh and Gray 1989).

    Args:
        values: (n, d) float32 training vectors.
        w: squared units per bit.
        start: codewords and probabilities to refine; None = `_initial_codewords`.

    Returns:
        Codewords (K, d) and their probabilities (K,), none of them zero; most frequent first, or in the order of
        `start`.
    """
    if start is None:
        codewords = _initial_codewords(values, num_codewords, w, generator)
        probabilities = torch.full((num_codewords,), 1 / num_codewords)
    else:
        codewords, probabilities = start
    for iteration in range(iterations):
        distances = torch.addmm(codewords.square().sum(1)[None], values, codewords.t(), alpha=-2)
        costs, tokens = (distances - w * torch.log2(probabilities)).min(dim=1)
        usage = torch.bincount(tokens, minlength=num_codewords).float()
        sums = torch.zeros_like(codewords).index_add_(0, tokens, values)
        codewords = torch.where(usage[:, None] > 0, sums / usage[:, None].clamp_min(1), codewords)
        probabilities = (usage + 0.1) / (usage + 0.1).sum()
        unused = (usage == 0).nonzero()[:, 0]
        if len(unused) and iteration < iterations - 2:  # restart them where the cost is high
            errors = (costs + values.square().sum(1)).clamp_min(1e-9)
            codewords[unused] = values[_draw(errors, len(unused), generator)]
    if start is not None:
        return codewords, probabilities
    order = probabilities.argsort(descending=True, stable=True)
    return codewords[order], probabilities[order]


def _initial_codewords(values: Tensor, num_codewords: int, w: float, generator: torch.Generator) -> Tensor:
    """The fullest cells of a cubic lattice, and vectors far from all of them: (K, d).

    Entropy-constrained cells are of nearly equal size, dense and sparse regions alike, so a lattice with the spacing
    that belongs to w is a far better start than a random sample, which crowds into the center.
    """
    spacing = math.sqrt(6 / LOG2 * w)
    cells, counts = torch.unique((values / spacing).round(), dim=0, return_counts=True)
    if len(cells) > num_codewords:
        cells = cells[counts.argsort(descending=True, stable=True)[: 3 * num_codewords // 4]]
    codewords = cells * spacing
    distances = torch.addmm(codewords.square().sum(1)[None], values, codewords.t(), alpha=-2).amin(1)
    errors = (distances + values.square().sum(1)).clamp_min(1e-9)
    return torch.cat([codewords, values[_draw(errors, num_codewords - len(codewords), generator)]])


def _draw(chances: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` different indices, (count,) int64, drawn in proportion to `chances`."""
    if count == 0:
        return torch.empty(0, dtype=torch.int64)
    population = min(len(chances), 1 << 20)  # multinomial has a limit
    return torch.multinomial(chances[:population], min(count, population), generator=generator)
