"""Convolutions that give the same numbers everywhere: sums of products that are exact, in whatever order.

`IntegerConv2d` multiplies 8-bit integers. What it reads is one of 256 values, `step` apart; weights are one of 129
values of their output channel. ONNX Runtime computes that with 8-bit products (`transform_graphs` writes the same
rounding as QuantizeLinear), several times as fast as in float32. Weights have a bit less than they could: processors
without VNNI add two products in 16 bits, with saturation, and 2 * 255 * 64 < 2^15 saturates nowhere.

`ExactConv2d` stays in float32, where 8 bits are too few. What it reads and its weights are multiples of powers of two,
so chosen that float32 has all sums up to twice the largest that calibration saw.

Training sees float32 values that are rounded to those that the decoder has.

Source: Jacob et al. 2018, arXiv:1712.05877 (training through rounding).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VALUES = 256
WEIGHT_MAX = 64
CALIBRATION_VALUES = 1 << 16
"""Numbers of each tensor whose rounding is tried."""
RANGES = tuple(2.0 ** (-i / 4) for i in range(25))
"""Steps that are tried: multiples of that at which nothing is out of range."""

INPUT_BITS, FLOAT32_BITS = 13, 24
"""Of the largest value that exact sums are made of; of a float32 number."""
FIRST_STEP, LEAST_STEP = 1 / 16, 2.0**-16
"""Before calibration; the smallest that it sets."""


class Rounding(nn.Module):
    """Rounds to one of 256 values `step` apart; the gradient passes where a value is in range.

    Attributes:
        lowest: of these values, in steps.
    """

    lowest = -VALUES // 2
    step: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] | None = None
        self.register_buffer("step", torch.tensor(FIRST_STEP))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        if self.seen is not None:
            self.seen.append(x.flatten()[:: x.numel() // CALIBRATION_VALUES + 1])
            return self.exact(x)
        return self.rounded(x)

    def exact(self, x: Tensor) -> Tensor:
        """What it would be without rounding."""
        return x

    def rounded(self, x: Tensor) -> Tensor:
        """What it is."""
        zero = torch.tensor(-self.lowest, dtype=torch.int32, device=x.device)
        return torch.fake_quantize_per_tensor_affine(x.float(), self.step, zero, 0, VALUES - 1)


class RoundedRectifier(Rounding):
    """Rectifier: rounds to one of 256 values of which none is negative."""

    lowest = 0

    def exact(self, x: Tensor) -> Tensor:
        return F.relu(x)


class IntegerConv2d(nn.Conv2d):
    """A convolution whose weights are rounded; its input is to be rounded by a `Rounding`."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name in nn.Conv2d)
        return F.conv2d(input, rounded_weight(self.weight), self.bias, padding=self.padding)


class ExactSums(nn.Module):
    """A convolution whose float32 sums are exact."""

    input_unit: Tensor
    weight_unit: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.largest: tuple[float, float] | None = None
        self.register_buffer("input_unit", torch.tensor(2.0**-10))
        self.register_buffer("weight_unit", torch.tensor(2.0**-14))

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, padding: int = 0) -> Tensor:
        """(B, C, H, W), (D, C, h, w), (D,) -> (B, D, H, W)."""
        if self.largest is not None:
            with torch.no_grad():
                sums = F.conv2d(x.abs(), weight.abs(), None if bias is None else bias.abs(), padding=padding)
                self.largest = max(self.largest[0], float(x.abs().max())), max(self.largest[1], float(sums.max()))
            return F.conv2d(x, weight, bias, padding=padding)
        if bias is not None:
            bias = multiples(bias, self.input_unit * self.weight_unit)
        return F.conv2d(multiples(x, self.input_unit), multiples(weight, self.weight_unit), bias, padding=padding)


class ExactLinear(ExactSums):
    """A matrix for the channels at each place; not in bfloat16."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, padding: int = 0) -> Tensor:
        """(B, C, h, w), (D, C) -> (B, D, h, w)."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float(), weight.float()[:, :, None, None], bias, padding)


class ExactConv2d(nn.Conv2d):
    """A convolution whose float32 sums are exact; the sides of its kernel are equal."""

    def __init__(self, inputs: int, outputs: int, kernel: int, padding: int = 0) -> None:
        super().__init__(inputs, outputs, kernel, padding=padding)
        self.sums = ExactSums()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name in nn.Conv2d)
        return self.sums(input, self.weight, self.bias, self.kernel_size[0] // 2)  # type: ignore[no-any-return]


def multiples(x: Tensor, unit: Tensor) -> Tensor:
    """The nearest multiples of a unit; gradients pass."""
    return x + ((x / unit).round() * unit - x).detach()


def rounded_weight(weight: Tensor) -> Tensor:
    """(O, ...) -> the same, -64 to 64 times a step of each output; gradients pass."""
    step = weight_step(weight)
    zero = torch.zeros(len(step), dtype=torch.int32, device=weight.device)
    return torch.fake_quantize_per_channel_affine(weight.float(), step, zero, 0, -WEIGHT_MAX, WEIGHT_MAX)


def weight_step(weight: Tensor) -> Tensor:
    """Step of each output: (O, ...) -> (O,) float32, positive."""
    largest = weight.detach().float().abs().flatten(1).amax(1)
    return largest.clamp_min(torch.finfo(torch.float16).tiny) / WEIGHT_MAX


@torch.no_grad()
def calibrate(network: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Set the steps of all roundings to those that move the least what they round, squared errors over `inputs`.

    The units of exact sums are the largest with which they are exact.

    Args:
        network: has not been trained with roundings.
        inputs: of the network.
    """
    roundings = [module for module in network.modules() if isinstance(module, Rounding)]
    exact = [module for module in network.modules() if isinstance(module, ExactSums)]
    for rounding in roundings:
        rounding.seen = []
    for sums in exact:
        sums.largest = 0.0, 0.0
    for x in inputs:
        network(x)
    for rounding in roundings:
        assert rounding.seen
        values, rounding.seen = torch.cat(rounding.seen), None
        widest = float(rounding.exact(values).abs().max()) / (VALUES - 1 + rounding.lowest)
        if widest < LEAST_STEP:  # a block that adds nothing yet; it could never learn to
            continue
        errors = []
        for share in RANGES:
            rounding.step.fill_(widest * share).copy_(rounding.step.half())  # as files have it
            errors.append(float((rounding(values) - rounding.exact(values)).square().mean()))
        best = RANGES[errors.index(min(errors))]
        rounding.step.fill_(widest * best).copy_(rounding.step.half())
    for sums in exact:
        assert sums.largest is not None
        (largest, largest_sum), sums.largest = sums.largest, None
        if largest_sum > 0:
            input_unit = 2.0 ** (math.ceil(math.log2(largest)) - INPUT_BITS)
            sums.input_unit.fill_(input_unit)
            sums.weight_unit.fill_(2.0 ** math.ceil(math.log2(2 * largest_sum / input_unit) - FLOAT32_BITS))
