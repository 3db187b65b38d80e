"""The entropy model in exact arithmetic: known tokens -> range-coder frequencies, the same integers on every machine.

A file decodes only if the decoder computes the very frequencies that the encoder used. Floating-point networks do not
promise that: the order of a sum, a fused multiply-add or a library's `exp` changes the last bit. Here every value
between tokens and frequencies is an integer, and only four kinds of operation occur, each with one possible result:

1. *Integer matrix products.* Operands are integers of magnitude <= 127, inner dimensions <= `MAX_INNER`, so every
   partial sum is below 2^24 and exact in int32, float32 and float64 alike, in any order of summation, fused or not.
   Products of attention weights (<= 127) and values (<= 127) over at most 1,040 keys are covered by the same bound.
2. *Integer sums.* Sums of squares of the residual stream (<= 2^40 each) run in float64 and stay below 2^53: exact in
   any order. Sums of attention weights and of exponentials (<= 2^15 each) stay below 2^24 or run in float64.
3. *Table look-ups*: the two exponentials. The tables are integers stored with the weights, not recomputed.
4. *Single IEEE 754 operations*, one multiplication, division or square root of exactly represented operands, correctly
   rounded by the standard on every machine and followed by `round` (half to even), `floor` or `clamp`. Each is a
   kernel of its own: nothing is fused or reduced. `torch.addmm`, `addcmul`, `rsqrt`, `exp` and `softmax` do not occur,
   nor does `torch.sqrt` on a CPU (MKL's is not correctly rounded) or `number / tensor` (a reciprocal and a product).

Where floats carry integers they carry integers below 2^24 (float32) or 2^53 (float64).

The products (1) run through one of three kernels that give the same integers: "int8" (`torch._int_mm`; CPU and CUDA,
where a trial shows that it does not saturate), "float32" and "float64" (the oracle). TF32 and bfloat16
multiplication would be harmless, since 8-bit operands fit them and sums are kept in float32; autocast, which
rounds sums, is turned off. `PQMIM_KERNEL` overrides the choice. docs/exactness.md has the argument at length.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pqmim.config import NUM_LEVELS, EntropyModelConfig
from pqmim.errors import ConfigError, ModelError
from pqmim.fixed_point import (
    ACTIVATION_UNIT,
    ATTENTION_ONE,
    INT8_MAX,
    LOGIT_UNIT,
    MAX_INNER,
    NORM_EPSILON,
    RESIDUAL_MAX,
    RESIDUAL_UNIT,
    SCORE_UNIT,
)
from pqmim.range_coding import PRECISION
from pqmim.schedule import Schedule, Step, positions_of
from pqmim.training.entropy_model import EntropyModel
from pqmim.training.layers import (
    QuantizableLinear,
    TransformerLayer,
    WindowPartition,
    quantize_weight,
    relative_index,
    shift_channels,
)

KERNELS = ("int8", "float32", "float64")
EXPONENTIAL_ONE = 1 << 15
"""Table value of the most probable token."""
POSITION_BIAS_MAX = 1 << 15
"""Largest magnitude of a position bias, in SCORE_UNIT."""
CHUNK_ROWS = 512
"""Positions and"""
CHUNK_WINDOWS = 8
"""windows worked on at a time: what lies between two products then fits the cache, and memory is bounded."""
LOGIT_MAX = float(1 << 23)
"""Largest magnitude of a sharpened logit, in LOGIT_UNIT: their differences stay exact in float32."""
SCALE_MAX = 1 << 30
"""Largest scale; products with it are far from overflow."""


def default_kernel(device: torch.device) -> str:
    """The fastest exact kernel of a device; `PQMIM_KERNEL` overrides.

    Raises:
        ConfigError: `PQMIM_KERNEL` names no kernel, or one that is not exact here.
    """
    chosen = os.environ.get("PQMIM_KERNEL")
    if chosen is None:
        # Without AVX-512 VNNI torch multiplies int8 in a plain loop.
        is_fast = device.type == "cuda" or torch.cpu._is_vnni_supported()
        return "int8" if is_fast and is_int8_exact(device) else "float32"
    if chosen not in KERNELS:
        raise ConfigError(f"PQMIM_KERNEL must be one of {', '.join(KERNELS)}, not {chosen!r}")
    if chosen not in exact_kernels(device):
        raise ConfigError(f"PQMIM_KERNEL {chosen} does not give exact products on this machine")
    return chosen


def exact_kernels(device: torch.device) -> tuple[str, ...]:
    """Those of KERNELS that give exact products on a device."""
    return KERNELS if is_int8_exact(device) else tuple(kernel for kernel in KERNELS if kernel != "int8")


@cache
def is_int8_exact(device: torch.device) -> bool:
    """Whether `torch._int_mm` gives exact products on a device: tried on the largest operands of all signs.

    It may be missing there (old GPUs), and x86 processors without VNNI add pairs of products in 16 bits, with
    saturation (pytorch issue 136746; torch goes around it since 2.6, unless the instruction set is limited by
    environment variables).
    """
    for rows, inner, outputs in ((1, MAX_INNER, 8), (32, 64, 192), (300, 192, 64)):
        x = torch.full((rows, inner), INT8_MAX, dtype=torch.int8, device=device)
        x[1::2] *= -1
        weight = torch.full((outputs, inner), INT8_MAX, dtype=torch.int8, device=device)
        weight[1::2] *= -1
        try:
            product = IntegerMatrix(weight, "int8")(x)
        except RuntimeError:
            return False
        if not torch.equal(product, inner * x[:, :1].float() * weight[:, 0].float()):
            return False
    return True


class IntegerMatrix:
    """Right operand of integer products, packed for a kernel.

    Args:
        weight: (n, k) int8 in [-127, 127], k <= MAX_INNER.
    """

    def __init__(self, weight: Tensor, kernel: str) -> None:
        if weight.shape[1] > MAX_INNER:
            raise ModelError(f"inner dimension {weight.shape[1]} is above {MAX_INNER}: sums would not be exact")
        self.kernel = kernel
        self.num_outputs = weight.shape[0]
        if kernel == "int8":
            # CUDA wants both dimensions in multiples of 8; zeros change no sum.
            self.weight = F.pad(weight, (0, -weight.shape[1] % 8, 0, -weight.shape[0] % 8)).t().contiguous()
        else:
            self.weight = weight.t().to(torch.float32 if kernel == "float32" else torch.float64).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        """(m, k) int8 -> (m, n) float32 that carries the exact integer product."""
        if self.kernel != "int8":
            return (x.to(self.weight.dtype) @ self.weight).float()
        rows = x.shape[0]
        short = max(0, 17 - rows) if x.is_cuda else 0  # CUDA wants more than 16 rows
        x = F.pad(x, (0, self.weight.shape[0] - x.shape[1], 0, short))
        return torch._int_mm(x, self.weight)[:rows, : self.num_outputs].float()


def _requantize(x: Tensor, scale: Tensor | float) -> Tensor:
    """Integers in float32 -> int8: one multiplication, round, clamp. Overwrites `x`."""
    return x.mul_(scale).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)


@dataclass
class ExactLinear:
    """Integer product, integer bias, then one multiplication to the unit of what follows."""

    matrix: IntegerMatrix
    bias: Tensor
    """(n,) float32, integers in units of the product."""
    scale: Tensor
    """(n,) float32: from the product's unit to the output's."""

    def accumulate(self, x: Tensor) -> Tensor:
        """(m, k) int8 -> (m, n) float32 integers, before the scale."""
        return self.matrix(x).add_(self.bias)

    def to_int8(self, x: Tensor) -> Tensor:
        """(m, k) int8 -> (m, n) int8 on the activation grid."""
        return _requantize(self.accumulate(x), self.scale)

    def add_to(self, h: Tensor, x: Tensor) -> None:
        """Add the output for (m, k) int8 to the residual stream h, (m, n) float32 integers, in place."""
        h.add_(self.accumulate(x).mul_(self.scale).round_()).clamp_(-RESIDUAL_MAX, RESIDUAL_MAX)


@dataclass
class ExactAttention:
    """Window attention."""

    query_key_value: ExactLinear
    project: ExactLinear
    position_bias: Tensor
    """(heads, window^2, window^2) float32, integers in SCORE_UNIT."""


@dataclass
class ExactLayer:
    """One transformer layer."""

    attention: ExactAttention | None
    expand: ExactLinear
    project: ExactLinear


class ExactState:
    """What the schedule lets one keep between steps: the embedding sums of the tokens known so far.

    Attributes:
        height, width: of the token grid.
        level: of the image, see `EntropyModel`.
        embedded: (h * w, C) float32, integer products of the known tokens' features with the embedding.
    """

    def __init__(self, height: int, width: int, level: int, embedded: Tensor) -> None:
        self.height, self.width, self.level = height, width, level
        self.embedded = embedded


Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")


def _without_autocast(
    method: Callable[Concatenate[ExactEntropyModel, Parameters], Returned],
) -> Callable[Concatenate[ExactEntropyModel, Parameters], Returned]:
    """Shield a method from an autocast region that a caller may be in: it would round float32 products to 16 bits."""

    @wraps(method)
    def shielded(self: ExactEntropyModel, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Returned:
        with torch.autocast(self.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return shielded  # type: ignore[return-value]  # wraps() hides that the method's signature is kept


class ExactEntropyModel:
    """The entropy network in exact arithmetic.

    Args:
        config: sizes of the trainable model.
        tensors: from `export`, on any device.
        runs: columns of each sub-quantizer.
        kernel: one of KERNELS; None = `default_kernel`.

    Raises:
        ModelError: a tensor is missing, has the wrong type, or holds values for which sums might not be exact.
    """

    def __init__(
        self,
        config: EntropyModelConfig,
        tensors: dict[str, Tensor],
        runs: list[slice],
        *,
        device: torch.device,
        kernel: str | None = None,
    ) -> None:
        self.config = config
        self.device = device
        self.kernel = kernel or default_kernel(device)
        # math.sqrt is correctly rounded, `** -0.5` need not be; a float32 number means the same to every kernel.
        self.score_scale = float(np.float32(ACTIVATION_UNIT**2 / (SCORE_UNIT * math.sqrt(config.head_width))))
        self.runs = runs
        self._tensors = tensors
        _check_bounds(tensors)
        self.num_subquantizers = len(runs)
        self.num_codewords = tensors["token_values"].shape[1]
        self.num_levels = tensors["token_bias"].shape[0]
        self.schedule = Schedule(self.num_subquantizers, config.group_steps)
        self.token_values = self._get("token_values", torch.int8)
        self.embed_weight = self._get("embed.weight", torch.int8)
        self.embed_bias = self._get("embed.bias", torch.int32).float()
        self.embed_scale = self._get("embed.scale", torch.float32)
        self.score_table = self._get("score_table", torch.int32).float()
        self.logit_table = self._get("logit_table", torch.int32).float()
        self.token_bias = self._get("token_bias", torch.int32).float()
        self.factor_scale = self._get("token_factors.scale", torch.float32)
        self.factors = self._get("token_factors.weight", torch.int8).float()
        pairs = relative_index(config.window).to(device)
        self.layers = []
        for index in range(config.num_layers):
            prefix = f"layers.{index}."
            attention = None
            if index % config.attention_every == 0:
                bias = self._get(prefix + "attention.position_bias", torch.int32).float()
                attention = ExactAttention(
                    query_key_value=self._linear(prefix + "attention.query_key_value"),
                    project=self._linear(prefix + "attention.project"),
                    position_bias=bias[pairs].permute(2, 0, 1).contiguous(),
                )
            self.layers.append(
                ExactLayer(
                    attention=attention,
                    expand=self._linear(prefix + "feed_forward.expand"),
                    project=self._linear(prefix + "feed_forward.project"),
                )
            )
        rank = config.token_rank
        self.heads = []
        for group in range(self.schedule.num_groups):
            first, last = self.schedule.group_bounds(group)
            self.heads.append(self._linear("head", slice(first * rank, last * rank)))

    def _get(self, name: str, dtype: torch.dtype) -> Tensor:
        tensor = self._tensors.get(name)
        if tensor is None or tensor.dtype != dtype:
            raise ModelError(f"weights lack {name} as {str(dtype).removeprefix('torch.')}")
        return tensor.to(self.device)

    def _linear(self, name: str, rows: slice = slice(None)) -> ExactLinear:
        return ExactLinear(
            IntegerMatrix(self._get(name + ".weight", torch.int8)[rows], self.kernel),
            self._get(name + ".bias", torch.int32)[rows].float(),
            self._get(name + ".scale", torch.float32)[rows],
        )

    def start(self, height: int, width: int, level: int) -> ExactState:
        """State of a grid of which nothing is known but its level."""
        flag = self.embed_weight[:, self.token_values.shape[2] + self.num_subquantizers + level].float()
        embedded = (self.embed_bias + flag * round(1 / ACTIVATION_UNIT)).repeat(height * width, 1)
        return ExactState(height, width, level, embedded)

    @_without_autocast
    def reveal(self, state: ExactState, positions: Tensor, first: int, last: int, tokens: Tensor) -> None:
        """Make tokens known.

        Args:
            positions: (n,) int64 into the flattened grid.
            first, last: sub-quantizers.
            tokens: (n, last - first) int64 in [0, K).
        """
        columns = slice(self.runs[first].start, self.runs[last - 1].stop)
        values = [self.token_values[state.level][:, self.runs[m]][tokens[:, m - first]] for m in range(first, last)]
        num_kept = self.token_values.shape[2]
        flags = self.embed_weight[:, num_kept + first : num_kept + last].float().sum(1) * round(1 / ACTIVATION_UNIT)
        weight = IntegerMatrix(self.embed_weight[:, columns], self.kernel)
        state.embedded[positions] += weight(torch.cat(values, dim=1)).add_(flags)

    def reveal_grid(self, state: ExactState, tokens: Tensor, known: Tensor) -> None:
        """Make any set of tokens known.

        Args:
            tokens: (M, h * w) int64.
            known: (M, h * w) bool.
        """
        first = 0
        while first < self.num_subquantizers:
            last = first + 1
            while last < self.num_subquantizers and torch.equal(known[last], known[first]):
                last += 1
            positions = known[first].nonzero()[:, 0]
            if len(positions):
                self.reveal(state, positions, first, last, tokens[first:last, positions].t())
            first = last

    @_without_autocast
    def hidden(self, state: ExactState, positions: Tensor) -> Tensor:
        """Run the network.

        Args:
            positions: (n,) int64, where the output is wanted.

        Returns:
            (n, C) int8 on the activation grid, input of the heads.
        """
        height, width = state.height, state.width
        partitions = [WindowPartition(height, width, self.config.window, s, self.device) for s in (False, True)]
        h = (state.embedded * self.embed_scale).round_().clamp_(-RESIDUAL_MAX, RESIDUAL_MAX)
        for index, layer in enumerate(self.layers):
            is_last = index == len(self.layers) - 1
            if layer.attention is not None:
                partition = partitions[index // self.config.attention_every % 2]
                mixed = self._attend(layer.attention, self._shift(_normalize(h), height, width), partition)
                if is_last:  # nothing after this point looks at other positions
                    h, mixed = h[positions], mixed[positions]
                for rows, part in zip(h.split(CHUNK_ROWS), mixed.split(CHUNK_ROWS), strict=True):
                    layer.attention.project.add_to(rows, part)
            elif is_last:
                h = h[positions]
            x = _normalize(h)
            if not is_last:
                x = self._shift(x, height, width)
            for rows, part in zip(h.split(CHUNK_ROWS), x.split(CHUNK_ROWS), strict=True):
                layer.project.add_to(rows, layer.expand.to_int8(part).clamp_(min=0))
        return _normalize(h)

    @staticmethod
    def _shift(x: Tensor, height: int, width: int) -> Tensor:
        """`shift_channels` for (h * w, C)."""
        return shift_channels(x.view(1, height, width, -1)).view(height * width, -1)

    def _attend(self, attention: ExactAttention, x: Tensor, partition: WindowPartition) -> Tensor:
        """Window attention: (h * w, C) int8 on the activation grid -> (h * w, C) int8."""
        width, head_width = self.config.width, self.config.head_width
        heads = width // head_width
        dtype = torch.float64 if self.kernel == "float64" else torch.float32
        outputs = []
        windows = partition.split(x.view(1, partition.height, partition.width, width))
        for part, is_inside in zip(windows.split(CHUNK_WINDOWS), partition.is_inside.split(CHUNK_WINDOWS), strict=True):
            n, t, _ = part.shape
            qkv = attention.query_key_value.to_int8(part.reshape(n * t, width))
            q, k, v = qkv.view(n, t, 3, heads, head_width).to(dtype).permute(2, 0, 3, 1, 4)
            scores = (q @ k.transpose(-1, -2)).float()  # (n, heads, T, T) integers
            scores.mul_(self.score_scale).round_().add_(attention.position_bias)
            if partition.has_outside:
                scores.masked_fill_(~is_inside[:, None, None, :], -(1 << 20))
            below = (scores.amax(-1, keepdim=True) - scores).clamp_(max=len(self.score_table) - 1)
            weights = torch.index_select(self.score_table, 0, below.view(-1).to(torch.int32)).view_as(scores)
            mixed = (weights.to(dtype) @ v).float()  # |sum| <= T * 127^2 < 2^24
            mixed.div_(weights.sum(-1, keepdim=True)).round_()
            outputs.append(mixed.to(torch.int8).transpose(1, 2).reshape(n, t, width))
        return partition.join(torch.cat(outputs)).reshape(-1, width)

    @_without_autocast
    def head(self, hidden: Tensor, group: int) -> Tensor:
        """Inputs of `frequencies` for a group of sub-quantizers: (n, C) int8 from `hidden` -> (m, n, R) int8."""
        first, last = self.schedule.group_bounds(group)
        return self.heads[group].to_int8(hidden).view(-1, last - first, self.config.token_rank).transpose(0, 1)

    @_without_autocast
    def frequencies(self, head: Tensor, level: int, first: int, *, sharpness: float = 1.0) -> Tensor:
        """Range-coder frequencies of the sub-quantizers from `first` on.

        Args:
            head: (m, n, R) int8, those sub-quantizers' part of `head`.
            level: of the image.
            sharpness: the logits are multiplied by it (the inverse of a sampling temperature). Files are coded at 1.

        Returns:
            (m, n, K) int32, each row >= 1 and summing to 2^16.
        """
        block = slice(first, first + len(head))
        dtype = torch.float64 if self.kernel == "float64" else torch.float32
        products = torch.bmm(head.to(dtype), self.factors[level, block].transpose(1, 2).to(dtype)).float()
        logits = products.mul_(self.factor_scale[level, block, None, None]).round_()
        logits.add_(self.token_bias[level, block, None])
        if sharpness != 1.0:
            logits.mul_(float(np.float32(sharpness))).round_().clamp_(-LOGIT_MAX, LOGIT_MAX)
        return frequencies_of_logits(logits, self.logit_table)

    def positions(self, state: ExactState, step: Step) -> Tensor:
        """Positions of a step: (n,) int64 into the flattened grid, raster order; n may be 0."""
        return torch.from_numpy(positions_of(step, state.height, state.width)).to(self.device)


def _normalize(h: Tensor) -> Tensor:
    """Root-mean-square normalization: (n, C) float32 integers -> (n, C) int8 on the activation grid."""
    sum_of_squares = h.double().square().sum(-1, keepdim=True) + NORM_EPSILON  # exact: below C * 2^40 < 2^53
    gain = _divide(math.sqrt(h.shape[-1]) / ACTIVATION_UNIT, _square_root(sum_of_squares))
    return _requantize(h.clone(), gain.float())


def _square_root(x: Tensor) -> Tensor:
    """Correctly rounded square root of float64.

    On a CPU it is NumPy's, which is the processor's instruction: torch hands contiguous tensors to MKL, whose result is
    one unit in the last place off for one number in a hundred.
    """
    return torch.from_numpy(np.sqrt(x.numpy())) if x.device.type == "cpu" else x.sqrt()


def _divide(numerator: float, denominator: Tensor) -> Tensor:
    """One correctly rounded division; the operator `/` would multiply by a rounded reciprocal."""
    return torch.full_like(denominator, numerator).div_(denominator)


def frequencies_of_logits(logits: Tensor, table: Tensor) -> Tensor:
    """Integer logits -> frequencies: the one place where probabilities become integers.

    Args:
        logits: (..., K) float32 integers in LOGIT_UNIT.
        table: (n,) float32 integers, exponential of minus its index in LOGIT_UNIT, decreasing from 2^15 to 0.

    Returns:
        (..., K) int32 >= 1 summing to 2^16. The most probable token (the first of equals) takes what rounding leaves.
    """
    num_codewords = logits.shape[-1]
    best, index_of_best = logits.max(-1, keepdim=True)  # documented: the first of equals
    below = (best - logits).clamp_(max=len(table) - 1)
    mass = torch.index_select(table, 0, below.view(-1).to(torch.int32)).view_as(logits)
    total = mass.sum(-1, keepdim=True, dtype=torch.float64)
    share = _divide(float((1 << PRECISION) - num_codewords), total).float()
    frequencies = mass.mul_(share).floor_().add_(1)
    rest = float(1 << PRECISION) - frequencies.sum(-1, keepdim=True)  # sums of integers below 2^24
    return frequencies.scatter_add_(-1, index_of_best, rest).to(torch.int32)


def _check_bounds(tensors: dict[str, Tensor]) -> None:
    """Refuse weights that break the bounds which the module's argument rests on, whoever made the file.

    Raises:
        ModelError: names the tensor.
    """
    largest = {"token_bias": 1 << 20, "score_table": ATTENTION_ONE, "logit_table": EXPONENTIAL_ONE}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.int8:
            is_good = int(tensor.min()) >= -INT8_MAX
        elif tensor.dtype == torch.float32:  # scales
            is_good = bool(((tensor >= 0) & (tensor <= SCALE_MAX)).all())
        elif name.endswith("_table"):
            is_good = int(tensor.min()) >= 0 < int(tensor[0]) <= int(tensor.max()) <= largest[name]
        elif name.endswith("position_bias"):
            is_good = int(tensor.abs().max()) <= POSITION_BIAS_MAX
        elif name in largest:
            is_good = int(tensor.abs().max()) <= largest[name]
        else:
            weight = tensors.get(name.removesuffix("bias") + "weight")
            is_good = weight is not None and int(tensor.abs().max()) <= _bias_room(weight.shape[1])
        if not is_good:
            raise ModelError(f"weights of {name} are out of bounds")


def _bias_room(num_inputs: int) -> int:
    """Largest integer bias with which a sum of products still stays below 2^24."""
    return (1 << 24) - 1 - num_inputs * INT8_MAX**2


def export(model: EntropyModel) -> dict[str, Tensor]:
    """Trainable model -> the integers of its exact form.

    Returns:
        Tensors by name for `ExactEntropyModel`: int8 weights, int32 biases and tables, float32 scales.
    """
    tensors: dict[str, Tensor] = {}
    unit = ACTIVATION_UNIT

    def add_linear(name: str, layer: QuantizableLinear, output_unit: float) -> None:
        integers, row_unit = quantize_weight(layer.weight.detach().float())
        product_unit = row_unit[:, 0] * unit
        tensors[name + ".weight"] = integers.to(torch.int8)
        room = _bias_room(layer.in_features)
        bias = (layer.bias.detach().float() / product_unit).round().clamp(-room, room)
        tensors[name + ".bias"] = bias.to(torch.int32)
        tensors[name + ".scale"] = product_unit / output_unit

    with torch.no_grad():
        tensors["token_values"] = (model.token_values / unit).round().to(torch.int8)
        add_linear("embed", model.embed, RESIDUAL_UNIT)
        for index, layer in enumerate(model.layers):
            assert isinstance(layer, TransformerLayer)
            prefix = f"layers.{index}."
            if layer.attention is not None:
                add_linear(prefix + "attention.query_key_value", layer.attention.query_key_value, unit)
                add_linear(prefix + "attention.project", layer.attention.project, RESIDUAL_UNIT)
                bias = (layer.attention.position_bias / SCORE_UNIT).round()
                bias = bias.clamp(-POSITION_BIAS_MAX, POSITION_BIAS_MAX)
                tensors[prefix + "attention.position_bias"] = bias.to(torch.int32)
            add_linear(prefix + "feed_forward.expand", layer.feed_forward.expand, unit)
            add_linear(prefix + "feed_forward.project", layer.feed_forward.project, RESIDUAL_UNIT)
        add_linear("head", model.head, unit)
        factors, factor_unit = quantize_weight(model.token_factors.float().flatten(2).flatten(0, 1))
        tensors["token_factors.weight"] = factors.view_as(model.token_factors).to(torch.int8)
        tensors["token_factors.scale"] = (factor_unit[:, 0] * unit / LOGIT_UNIT).view(NUM_LEVELS, -1)
        tensors["token_bias"] = (model.token_bias / LOGIT_UNIT).round().clamp(-(1 << 20), 1 << 20).to(torch.int32)
        tensors["score_table"] = _exponential_table(ATTENTION_ONE, SCORE_UNIT)
        tensors["logit_table"] = _exponential_table(EXPONENTIAL_ONE, LOGIT_UNIT)
    return {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}


def _exponential_table(one: int, unit: float) -> Tensor:
    """round(one * exp(-i * unit)) for i = 0, 1, ... down to the first zero, int32."""
    length = math.ceil(math.log(2 * one) / unit) + 1
    return (one * torch.exp(-torch.arange(length, dtype=torch.float64) * unit)).round().to(torch.int32)
