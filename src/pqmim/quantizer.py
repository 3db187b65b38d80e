"""Product quantizer over runs of ordered latent channels, as the codec uses it.

A position's latent has D channels. They are put in order of their rate, near-dead ones are dropped, and the ordered
list is cut into M *runs*; sub-quantizer m quantizes run m to one of its codewords. The leading sub-quantizers so carry
the picture. A run may be one channel, its codewords a lattice (`training.codebook_fitting`), or several. Quantization
is *entropy-constrained*: a codeword is chosen by

    |z_m - c_k|^2 + w * bits(k),

where w (squared latent units per bit) sets the rate (Chou, Lookabaugh and Gray 1989, "Entropy-constrained vector
quantization"; Jegou, Douze and Schmid 2011, "Product quantization for nearest neighbor search").

w may have any value, but codewords that are right for one w are too dense or too sparse for another. So there is a set
of codebooks for each of a few *levels*, trade-offs spread over the range of rates, with as many codewords for each
sub-quantizer as it needs there (`alphabets`); `levels.Levels` says which level serves what is asked for. The trainable
form is `training.trainable_quantizer`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pqmim.alphabets import Alphabets
from pqmim.config import TokensConfig
from pqmim.errors import ModelError
from pqmim.levels import Levels
from pqmim.runtime import Workers

LOG2 = math.log(2.0)
PREFIX = "tokenizer.quantizer."

PRIOR_POSITIONS = 16
"""Positions that a static prior counts for beside those of a picture."""
FEW_CODEWORDS = 12
"""Up to so many costs are compared one after the other, for all positions at once, which is faster."""
FEW_POSITIONS = 1 << 13
"""For fewer of them one thread chooses tokens: it takes 0.4 to 0.6 of the time of two at 1,536, as much at 6,144."""

Latent = NDArray[np.float32]
"""(1, D, h, w)."""
Tokens = NDArray[np.int64]
"""(M, h, w), in [0, K)."""


def check_quantizer_weights(tensors: Mapping[str, NDArray[Any]], config: TokensConfig) -> None:
    """Refuse weights that are missing, or do not fit together.

    Raises:
        ModelError: names the tensor.
    """
    sizes, num_channels = config.quantizer, config.analysis.latent_channels
    num_levels, m = sizes.num_levels, sizes.num_subquantizers
    num_kept = len(tensors[PREFIX + "order"]) if PREFIX + "order" in tensors else 0

    def check(name: str, kind: type, shape: tuple[int, ...]) -> NDArray[Any]:
        tensor = tensors.get(PREFIX + name)
        if tensor is None or tensor.dtype != kind or tensor.shape != shape:
            raise ModelError(f"weights lack {PREFIX}{name} as {kind.__name__} {shape}")
        return tensor

    order, boundaries = check("order", np.int64, (num_kept,)), check("boundaries_tensor", np.int64, (m + 1,))
    if len(set(order.tolist()) & set(range(num_channels))) != num_kept:
        raise ModelError(f"weights of {PREFIX}order are out of bounds")
    if boundaries[0] != 0 or boundaries[-1] != num_kept or (np.diff(boundaries) < 1).any():
        raise ModelError(f"weights of {PREFIX}boundaries_tensor are out of bounds")
    num_codewords = check("sizes", np.int64, (num_levels, m))
    if num_codewords.min() < 1 or num_codewords.max() > sizes.num_codewords:
        raise ModelError(f"weights of {PREFIX}sizes are out of bounds")
    alphabets = Alphabets.of(tensors)
    check("codebook", np.float16, (alphabets.num_values,))
    check("default", np.float16, (num_channels,))
    check("prior_logits", np.float16, (alphabets.num_codewords,))
    applied = check("level_range", np.float16, (num_levels, 2)).astype(np.float64).T
    starts, ends = applied[0, 1:], applied[1, :-1]
    if not (_rises(applied) and (starts <= ends).all() and _rises(starts + ends)):
        raise ModelError(f"weights of {PREFIX}level_range are out of bounds")


def _rises(values: NDArray[Any]) -> bool:
    """Whether numbers are finite and become larger along the first axis."""
    return bool(np.isfinite(values).all() and (np.diff(values.astype(np.float64), axis=0) > 0).all())


class ProductQuantizer:
    """At each of L levels M codebooks over runs of ordered latent channels, each of as many codewords as it needs.

    Args:
        tensors: of the model file, checked.
        workers: threads that share the sub-quantizers among them.

    Attributes:
        order: (D',) int64, latent channel of each codebook column, D' <= D kept channels, most costly first.
        runs: channels, in order, of each sub-quantizer.
        alphabets: how many codewords each sub-quantizer has at each level.
        default: (D,) float32, latent mean per channel: what a dropped channel or a token not sent decodes to.
        levels: which level serves which trade-off.
    """

    def __init__(self, tensors: Mapping[str, NDArray[Any]], workers: Workers) -> None:
        def get(name: str) -> NDArray[Any]:
            return tensors[PREFIX + name]

        self._workers = workers
        self.order: NDArray[np.int64] = get("order")
        boundaries = get("boundaries_tensor").tolist()
        self.runs = [slice(begin, end) for begin, end in pairwise(boundaries)]
        self.alphabets = Alphabets.of(tensors)
        self._codebook = get("codebook").astype(np.float32)
        self._prior_logits = get("prior_logits")
        self.default = get("default").astype(np.float32)
        self.levels = Levels(get("level_range").tolist())
        self._by_level: dict[int, list[_Codebook]] = {}

    @property
    def num_subquantizers(self) -> int:
        """M."""
        return len(self.runs)

    @cached_property
    def prior_bits(self) -> NDArray[np.float32]:
        """(N,), bits of each token under the static priors."""
        starts, counts = self.alphabets.starts.ravel(), self.alphabets.sizes.ravel()
        logits = self._prior_logits.astype(np.float32)
        logits -= np.maximum.reduceat(logits, starts).repeat(counts)
        total = np.add.reduceat(np.exp(logits), starts)
        bits: NDArray[np.float32] = (np.log(total).repeat(counts) - logits) / np.float32(LOG2)
        return bits

    def static_bits(self, tokens: Tokens, level: int) -> float:
        """Bits of tokens (m, n) of the m leading sub-quantizers under the static prior of a level."""
        places = self.alphabets.starts[level, : len(tokens), None] + tokens
        return float(self.prior_bits[places].sum(dtype=np.float64))

    def num_leading(self, level: int, share: float) -> int:
        """How many leading sub-quantizers have this share of the bits under the static prior of a level."""
        bits = self.prior_bits[self.alphabets.codewords(level, 0, self.num_subquantizers)]
        starts = self.alphabets.starts[level] - self.alphabets.starts[level, 0]
        total = np.add.reduceat(bits * np.exp2(-bits), starts).cumsum()
        return min(int(np.searchsorted(total, share * total[-1])) + 1, len(total))

    def own_bits(self, tokens: Tokens, level: int) -> float:
        """Bits of tokens (m, n) of the m leading sub-quantizers under their own frequencies, drawn towards the static
        prior of a level.

        A picture's tokens are not as frequent as those of all pictures; what the masked model will make of them follows
        their own frequencies twice as closely (docs/experiments.md).
        """
        own = self.alphabets.codewords(level, 0, len(tokens))
        places = self.alphabets.starts[level, : len(tokens), None] - own.start + tokens
        counts = np.bincount(places.ravel(), minlength=own.stop - own.start)
        used = counts.nonzero()[0]
        drawn = counts[used] + PRIOR_POSITIONS * np.exp2(-self.prior_bits[own][used], dtype=np.float64)
        bits = counts[used] @ np.log2((tokens.shape[1] + PRIOR_POSITIONS) / drawn)
        return max(0.0, float(bits))  # rounding of what is certain

    def codewords(self, m: int, level: int) -> NDArray[np.float32]:
        """Codewords of a sub-quantizer at a level, (K, d)."""
        return self._codebooks(level)[m].codewords.T

    def channels(self, z: Latent) -> NDArray[np.float32]:
        """Latent (1, D, h, w) -> its kept channels in order, (D', h * w)."""
        channels: NDArray[np.float32] = z[0].reshape(z.shape[1], -1)[self.order]
        return channels

    def distances(self, values: NDArray[np.float32], m: int, level: int) -> NDArray[np.float32]:
        """Squared distance to every codeword of sub-quantizer m, less the squared length of the values, which decides
        nothing: values (d, n) of its channels -> (K, n)."""
        codebook = self._codebooks(level)[m]
        # A matrix product with an inner dimension of one takes many times as long.
        distances = codebook.minus_twice * values if len(values) == 1 else codebook.minus_twice @ values
        distances += codebook.squares[:, None]
        return distances

    def assign(
        self, channels: NDArray[np.float32], w: NDArray[np.float32], level: int, count: int | None = None
    ) -> Tokens:
        """Entropy-constrained tokens under the static prior.

        Args:
            channels: (D', n) from `channels`.
            w: squared latent units per bit, > 0, as applied; (n,).
            count: leading sub-quantizers that are wanted; None = all.

        Returns:
            (M or count, n).
        """
        tokens = np.zeros((self.num_subquantizers if count is None else count, len(w)), np.int64)
        starts, sizes = self.alphabets.starts[level], self.alphabets.sizes[level, : len(tokens)]
        is_uniform = len(w) == 0 or bool((w == w[0]).all())

        def assign(m: int) -> None:
            bits = self.prior_bits[starts[m] : starts[m] + sizes[m], None]
            costs = self.distances(channels[self.runs[m]], m, level)
            costs += w[0] * bits if is_uniform else w * bits
            tokens[m] = index_of_least(costs)

        wanted = np.flatnonzero(sizes > 1).tolist() if len(w) else []
        if len(w) < FEW_POSITIONS:
            for m in wanted:
                assign(m)
        else:
            self._workers.run(assign, wanted)
        return tokens

    def dequantize(self, tokens: Tokens, level: int, known: NDArray[np.bool_] | None = None) -> Latent:
        """Tokens -> quantized latent.

        Args:
            known: (M, h, w); where False the token is ignored and the mean is used.

        Returns:
            (1, D, h, w).
        """
        _, height, width = tokens.shape
        z = np.empty((1, len(self.default), height, width), np.float32)
        z[:] = self.default[:, None, None]
        for m, (run, codebook) in enumerate(zip(self.runs, self._codebooks(level), strict=True)):
            part = codebook.codewords[:, tokens[m]]  # (d, h, w)
            if known is not None:
                part = np.where(known[m], part, self.default[self.order[run], None, None])
            z[0, self.order[run]] = part
        return z

    def _codebooks(self, level: int) -> list[_Codebook]:
        if level not in self._by_level:
            alphabets = self.alphabets
            shapes = zip(alphabets.value_starts[level], alphabets.sizes[level], alphabets.channels, strict=True)
            self._by_level[level] = [
                _Codebook(self._codebook[start : start + k * d].reshape(k, d)) for start, k, d in shapes
            ]
        return self._by_level[level]


def index_of_least(costs: NDArray[np.float32]) -> NDArray[np.int64]:
    """Which of K costs is least, the first of equals: (K, n) -> (n,)."""
    if len(costs) > FEW_CODEWORDS:
        return np.asarray(costs.argmin(0))
    least, index = costs[0].copy(), np.zeros(costs.shape[1], np.int64)
    for k, cost in enumerate(costs[1:], start=1):
        np.copyto(index, k, where=cost < least)
        np.minimum(least, cost, out=least)
    return index


class _Codebook:
    """The codewords of a sub-quantizer at a level, as products want them.

    Attributes:
        codewords: (d, K).
    """

    def __init__(self, codewords: NDArray[np.float32]) -> None:
        self.codewords = np.ascontiguousarray(codewords.T)

    @cached_property
    def minus_twice(self) -> NDArray[np.float32]:
        """(K, d)."""
        return np.ascontiguousarray(self.codewords.T * np.float32(-2))

    @cached_property
    def squares(self) -> NDArray[np.float32]:
        squares: NDArray[np.float32] = np.square(self.codewords).sum(0)
        return squares
