"""Product quantizer over runs of ordered latent channels, as the codec uses it.

A position's latent has D channels. They are put in order of their rate, near-dead ones are dropped, and the ordered
list is cut into M *runs* of about equal rate; sub-quantizer m quantizes run m to one of K codewords. The leading
sub-quantizers so hold a channel or two and carry the picture, the last ones hold many quiet channels, where vector
quantization gains most over scalar quantization. Quantization is *entropy-constrained*: a codeword is chosen by

    |z_m - c_k|^2 + w * bits(k),

where w (squared latent units per bit) sets the rate (Chou, Lookabaugh and Gray 1989, "Entropy-constrained vector
quantization"; Jegou, Douze and Schmid 2011, "Product quantization for nearest neighbor search").

w may have any value, but codewords that are right for one w are too dense or too sparse for another. So there is a set
of codebooks for each of a few *levels*, trade-offs spread over the range of rates; `levels.Levels` says which of them
serves what is asked for. The trainable form is `training.trainable_quantizer`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pqmim.config import TokensConfig
from pqmim.errors import ModelError
from pqmim.levels import Levels
from pqmim.runtime import Workers

LOG2 = math.log(2.0)
PREFIX = "tokenizer.quantizer."

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
    num_levels, m, k = sizes.num_levels, sizes.num_subquantizers, sizes.num_codewords
    num_kept = len(tensors[PREFIX + "order"]) if PREFIX + "order" in tensors else 0
    for name, kind, shape in (
        ("order", np.int64, (num_kept,)),
        ("boundaries_tensor", np.int64, (m + 1,)),
        ("codebook", np.float16, (num_levels, k, num_kept)),
        ("default", np.float16, (num_channels,)),
        ("prior_logits", np.float16, (num_levels, m, k)),
        ("level_log_w", np.float16, (num_levels,)),
    ):
        tensor = tensors.get(PREFIX + name)
        if tensor is None or tensor.dtype != kind or tensor.shape != shape:
            raise ModelError(f"weights lack {PREFIX}{name} as {kind.__name__} {shape}")
    order, boundaries = tensors[PREFIX + "order"], tensors[PREFIX + "boundaries_tensor"]
    if len(set(order.tolist()) & set(range(num_channels))) != num_kept:
        raise ModelError(f"weights of {PREFIX}order are out of bounds")
    if boundaries[0] != 0 or boundaries[-1] != num_kept or (np.diff(boundaries) < 1).any():
        raise ModelError(f"weights of {PREFIX}boundaries_tensor are out of bounds")


class ProductQuantizer:
    """At each of L levels M codebooks of K codewords over runs of ordered latent channels.

    Args:
        tensors: of the model file, checked.
        workers: threads that share the sub-quantizers among them.

    Attributes:
        order: (D',) int64, latent channel of each codebook column, D' <= D kept channels, most costly first.
        runs: columns of each sub-quantizer.
        codebook: (L, K, D') float32, codeword k of sub-quantizer m at level l is `codebook[l, k, run m]`.
        default: (D,) float32, latent mean per channel: what a dropped channel or a token not sent decodes to.
        prior_bits: (L, M, K) float32, bits of each token under the static priors.
        levels: which level serves which trade-off.
    """

    def __init__(self, tensors: Mapping[str, NDArray[Any]], workers: Workers) -> None:
        def get(name: str) -> NDArray[Any]:
            return tensors[PREFIX + name]

        self._workers = workers
        self.order: NDArray[np.int64] = get("order")
        boundaries = get("boundaries_tensor").tolist()
        self.runs = [slice(begin, end) for begin, end in pairwise(boundaries)]
        self.codebook = get("codebook").astype(np.float32)
        self.default = get("default").astype(np.float32)
        logits = get("prior_logits").astype(np.float32)
        logits = logits - logits.max(2, keepdims=True)
        self.prior_bits: NDArray[np.float32] = (np.log(np.exp(logits).sum(2, keepdims=True)) - logits) / np.float32(
            LOG2
        )
        self.levels = Levels(get("level_log_w").tolist())
        self._by_level: dict[int, _LevelCodebooks] = {}

    @property
    def num_subquantizers(self) -> int:
        """M."""
        return len(self.runs)

    @property
    def num_codewords(self) -> int:
        """K."""
        return int(self.codebook.shape[1])

    def columns(self, z: Latent) -> NDArray[np.float32]:
        """Latent (1, D, h, w) -> its kept channels in order, (h * w, D')."""
        return np.ascontiguousarray(z[0].reshape(z.shape[1], -1)[self.order].T)

    def distances(self, columns: NDArray[np.float32], m: int, level: int) -> NDArray[np.float32]:
        """Squared distance to every codeword of sub-quantizer m, less the squared length of the values, which decides
        nothing: (n, D') from `columns` -> (n, K)."""
        codebooks = self._codebooks(level)
        distances = columns[:, self.runs[m]] @ codebooks.minus_twice[m]
        distances += codebooks.squares[m]
        return distances

    def assign(self, columns: NDArray[np.float32], w: NDArray[np.float32], level: int) -> Tokens:
        """Entropy-constrained tokens under the static prior.

        Args:
            columns: (n, D') from `columns`.
            w: squared latent units per bit, > 0, as applied; (n,).

        Returns:
            (M, n).
        """
        tokens = np.empty((self.num_subquantizers, len(columns)), np.int64)
        bits = self.prior_bits[level]
        is_uniform = len(w) == 0 or bool((w == w[0]).all())

        def assign(m: int) -> None:
            costs = self.distances(columns, m, level)
            costs += w[0] * bits[m] if is_uniform else w[:, None] * bits[m]
            tokens[m] = costs.argmin(1)

        if len(columns):
            self._workers.run(assign, range(self.num_subquantizers))
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
        for m, run in enumerate(self.runs):
            part = self._codebooks(level).codewords[m][:, tokens[m]]  # (d, h, w)
            if known is not None:
                part = np.where(known[m], part, self.default[self.order[run], None, None])
            z[0, self.order[run]] = part
        return z

    def _codebooks(self, level: int) -> _LevelCodebooks:
        if level not in self._by_level:
            self._by_level[level] = _LevelCodebooks(self.codebook[level], self.runs)
        return self._by_level[level]


class _LevelCodebooks:
    """The codebooks of one level, as products want them.

    Attributes:
        codewords: (d, K) for each sub-quantizer.
    """

    def __init__(self, codebook: NDArray[np.float32], runs: list[slice]) -> None:
        self.codewords = [np.ascontiguousarray(codebook[:, run].T) for run in runs]

    @cached_property
    def minus_twice(self) -> list[NDArray[np.float32]]:
        return [codewords * np.float32(-2) for codewords in self.codewords]

    @cached_property
    def squares(self) -> list[NDArray[np.float32]]:
        return [np.square(codewords).sum(0) for codewords in self.codewords]
