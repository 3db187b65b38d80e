"""Product quantizer over runs of ordered channels, and the factorized density that comes before it in training.

A position's latent has D channels. They are put in order of their rate, near-dead ones are dropped, and the ordered
list is cut into M *runs* of about equal rate; sub-quantizer m quantizes run m to one of K codewords. The leading
sub-quantizers so hold a channel or two and carry the picture, the last ones hold many quiet channels, where vector
quantization gains most over scalar quantization. Quantization is *entropy-constrained*: a codeword is chosen by

    |z_m - c_k|^2 + w * bits(k),

where w (squared latent units per bit) sets the rate (Chou, Lookabaugh and Gray 1989, "Entropy-constrained vector
quantization"; Jegou, Douze and Schmid 2011, "Product quantization for nearest neighbor search").
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pqmim.config import NUM_PRIORS

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


class ProductQuantizer(nn.Module):
    """M codebooks of K codewords over runs of ordered latent channels.

    Attributes:
        order: (D',) int64, latent channel of each codebook column, D' <= D kept channels, most costly first.
        boundaries: M + 1 column indices; run m is columns boundaries[m] to boundaries[m + 1].
        codebook: (K, D') float32, codeword k of sub-quantizer m is `codebook[k, run m]`.
        default: (D,) float32, latent mean per channel: what a dropped channel or a token not sent decodes to.
        prior_logits: (L, M, K) float32, static log-probabilities of the tokens (natural, unnormalized) at L trade-offs.
        prior_log_w: (L,) float32, ascending, natural logarithm of w at those trade-offs.
    """

    order: Tensor
    boundaries_tensor: Tensor
    prior_log_w: Tensor

    def __init__(self, num_channels: int, num_kept: int, num_subquantizers: int, num_codewords: int) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.num_codewords = num_codewords
        self.num_subquantizers = num_subquantizers
        self.register_buffer("order", torch.arange(num_kept))
        boundaries = torch.linspace(0, num_kept, num_subquantizers + 1).round().long()
        self.register_buffer("boundaries_tensor", boundaries)
        self.codebook = nn.Parameter(torch.zeros(num_codewords, num_kept))
        self.default = nn.Parameter(torch.zeros(num_channels))
        self.prior_logits = nn.Parameter(torch.zeros(NUM_PRIORS, num_subquantizers, num_codewords))
        self.register_buffer("prior_log_w", torch.arange(NUM_PRIORS, dtype=torch.float32))

    @property
    def boundaries(self) -> list[int]:
        """Column where each run starts, and the end of the last."""
        return [int(b) for b in self.boundaries_tensor]

    def runs(self) -> list[slice]:
        """Columns of each sub-quantizer."""
        b = self.boundaries
        return [slice(b[m], b[m + 1]) for m in range(self.num_subquantizers)]

    def prior_bits(self, w: Tensor | float) -> Tensor:
        """Bits of each token under the static prior at a trade-off, interpolated between the priors kept.

        Args:
            w: (B,) or a number, squared latent units per bit, > 0.

        Returns:
            (B, M, K) float32; B is 1 for a number.
        """
        log_w = torch.as_tensor(w, dtype=torch.float32, device=self.prior_log_w.device).reshape(-1).log()
        grid = self.prior_log_w
        upper = torch.searchsorted(grid, log_w).clamp(1, len(grid) - 1)
        share = ((log_w - grid[upper - 1]) / (grid[upper] - grid[upper - 1])).clamp(0, 1)[:, None, None]
        bits = -torch.log_softmax(self.prior_logits, dim=2) / LOG2
        return torch.lerp(bits[upper - 1], bits[upper], share)

    def level(self, w: Tensor | float) -> Tensor:
        """Index of the static prior nearest to a trade-off: (B,) or a number -> (B,) or () int64."""
        log_w = torch.as_tensor(w, dtype=torch.float32, device=self.prior_log_w.device).log()
        return (log_w[..., None] - self.prior_log_w).abs().argmin(-1)

    def columns(self, z: Tensor) -> Tensor:
        """Latent (B, D, h, w) -> its kept channels in order, positions last but one: (B * h * w, D')."""
        return z[:, self.order].permute(0, 2, 3, 1).reshape(-1, len(self.order))

    def squared_distances(self, columns: Tensor, m: int) -> Tensor:
        """Squared distance to every codeword of sub-quantizer m.

        Args:
            columns: (n, D') float32 from `columns`.

        Returns:
            (n, K) float32, squared latent units.
        """
        run = self.runs()[m]
        values, codewords = columns[:, run], self.codebook[:, run]
        return torch.addmm(
            (values.square().sum(1, keepdim=True) + codewords.square().sum(1)), values, codewords.t(), alpha=-2
        )

    @torch.no_grad()
    def assign(self, z: Tensor, w: Tensor | float) -> Tensor:
        """Entropy-constrained tokens of a latent under the static prior.

        Args:
            z: (B, D, h, w) float32.
            w: squared latent units per bit, > 0; a number or one per sample (B,).

        Returns:
            (B, M, h, w) int64.
        """
        batch, _, height, width = z.shape
        columns = self.columns(z)
        weight = torch.as_tensor(w, dtype=torch.float32, device=z.device).expand(batch)
        penalty = weight[:, None, None] * self.prior_bits(weight)  # (B, M, K)
        tokens = [
            self.squared_distances(columns, m).view(batch, height * width, -1).add_(penalty[:, m, None]).argmin(dim=2)
            for m in range(self.num_subquantizers)
        ]
        return torch.stack(tokens, dim=1).view(batch, -1, height, width)

    def dequantize(self, tokens: Tensor, known: Tensor | None = None) -> Tensor:
        """Tokens -> quantized latent.

        Args:
            tokens: (B, M, h, w) int64 in [0, K).
            known: (B, M, h, w) or broadcastable bool; where False the token is ignored and the mean is used.

        Returns:
            (B, D, h, w) float32; differentiable in the codewords and the means.
        """
        batch, _, height, width = tokens.shape
        z = self.default[None, :, None, None].expand(batch, -1, height, width)
        parts = []
        for m, run in enumerate(self.runs()):
            part = self.codebook[:, run][tokens[:, m]].permute(0, 3, 1, 2)
            if known is not None:
                part = torch.where(known[:, m : m + 1], part, self.default[self.order[run]][None, :, None, None])
            parts.append(part)
        return z.index_copy(1, self.order, torch.cat(parts, dim=1))


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
    values: Tensor, num_codewords: int, w: float, iterations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Entropy-constrained Lloyd iterations for one sub-quantizer (Chou, Lookabaugh and Gray 1989).

    Args:
        values: (n, d) float32 training vectors.
        w: squared units per bit.

    Returns:
        Codewords (K, d), most frequent first, and their probabilities (K,), none of them zero.
    """
    codewords = _initial_codewords(values, num_codewords, w, generator)
    probabilities = torch.full((num_codewords,), 1 / num_codewords)
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


def fit_priors(quantizer: ProductQuantizer, z: Tensor, iterations: int) -> None:
    """Fit the static priors to latents: at each trade-off in `prior_log_w`, assignment and counts in turn.

    Args:
        quantizer: with its codewords; `prior_logits[0]` as starting point for the finest trade-off.
        z: (1, D, n, 1) float32 latents.
    """
    for level, log_w in enumerate(quantizer.prior_log_w):
        if level > 0:  # each starts from the next finer one: from above, cheap tokens attract more and more
            quantizer.prior_logits.data[level] = quantizer.prior_logits.data[level - 1]
        for _ in range(iterations):
            tokens = quantizer.assign(z, math.exp(float(log_w)))
            for m in range(quantizer.num_subquantizers):
                usage = torch.bincount(tokens[0, m].flatten(), minlength=quantizer.num_codewords).float() + 0.05
                quantizer.prior_logits.data[level, m] = (usage / usage.sum()).log()
