"""What a latent costs and becomes under the masked model, differentiable in the latent.

A token is a hard choice without a gradient. The *soft assignment* weighs all codewords c_k of a sub-quantizer by
p_k 2^(-|z - c_k|^2 / w), p_k being what the entropy model expects; that is the optimal test channel of rate and
distortion at slope w (Blahut 1972, doi:10.1109/TIT.1972.1054855), and on a lattice made for w as fuzzy as uniform
rounding noise. An expectation E[f] under it has the gradient (2 ln 2 / w) (E[f c] - E[f] E[c]): of the bits, and of
the codeword, which is far below one where a value is rounded to zero whatever it is.

Codewords are a step apart, so that the error of the picture has to be expanded to second order about the one that was
chosen. Where two are equally near, the error is the same for both, though its gradient at either says "go": passed
straight through, it makes latents grow beyond what choosing with their rate had made of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pqmim.alphabets import Block
from pqmim.schedule import quincunx_steps
from pqmim.training.entropy_model import EntropyModel, block_logits
from pqmim.training.orders import Orders
from pqmim.training.trainable_quantizer import LOG2, TrainableQuantizer


class SoftGradients(NamedTuple):
    """Gradients of expectations under the soft assignment, each (m, n, d) float32.

    Attributes:
        bits: of the expected bits.
        codeword: of each channel of the expected codeword, in its own value.
        step: of the expected square of the distance from the codeword that was chosen.
    """

    bits: Tensor
    codeword: Tensor
    step: Tensor


def soft_assignment(
    values: Tensor, chosen: Tensor, codewords: Tensor, bits: Tensor, w: float
) -> tuple[Tensor, SoftGradients]:
    """Expected bits under the soft assignment, and gradients in the values.

    Args:
        values: (m, n, d) float32, what m sub-quantizers are given at n positions.
        chosen: (m, n, d) float32, the codewords that they chose.
        codewords: (m, K, d) float32.
        bits: (m, n, K) or (m, 1, K) float32, of each codeword.
        w: squared latent units per bit.

    Returns:
        Expected bits (m, n); the gradients.
    """
    products = torch.baddbmm(codewords.square().sum(2)[:, None], values, codewords.transpose(1, 2), alpha=-2)
    shares = (-LOG2 * (products / w + bits)).softmax(2)  # |z|^2 is the same for all codewords
    expected = (shares * bits).sum(2)
    gradients = []
    for channel in range(values.shape[2]):
        step = codewords[:, None, :, channel] - chosen[:, :, None, channel]
        weighed = shares * step
        mean = weighed.sum(2)
        of_bits = (weighed * bits).sum(2) - mean * expected
        weighed *= step
        square = weighed.sum(2)
        gradients.append(torch.stack([of_bits, square - mean.square(), (weighed * step).sum(2) - mean * square]))
    return expected, SoftGradients(*(torch.stack(gradients, dim=-1) * (2 * LOG2 / w)))


class SoftRate(NamedTuple):
    """What a latent costs, and what its gradient sees of the quantizer.

    Attributes:
        bits: (B,) float32, expected.
        passed: (B, D, h, w) float32, of value zero, to be added to the quantized latent: it has the gradient of the
            expected codewords.
        curvature: (B,) float32, of value zero: it has the gradient of the expected squared step from the quantized
            latent. What an error of the picture, as a function of the quantized latent, has in its second order.
    """

    bits: Tensor
    passed: Tensor
    curvature: Tensor


def soft_rate(
    quantizer: TrainableQuantizer, model: EntropyModel | None, z: Tensor, tokens: Tensor, w: Tensor, level: Tensor
) -> SoftRate:
    """Expected bits of latents, each token predicted in the step that codes it, and what passes of their gradients.

    Args:
        model: None = under static priors.
        z: (B, D, h, w) float32; all that gets a gradient.
        tokens: (B, M, h, w) int64, what later steps know of z.
        w: (B,) float32, squared latent units per bit, as applied.
        level: (B,) int64.
    """
    batch, _, height, width = z.shape
    columns = quantizer.columns(z)
    with torch.no_grad():
        chosen = quantizer.columns(quantizer.dequantize(tokens, level))
        bits, slopes = columns.new_zeros(batch), [torch.zeros_like(columns) for _ in SoftGradients._fields]
        hidden = None
        if model is not None:
            quincunx = torch.from_numpy(quincunx_steps(height, width)).to(z.device)
            hidden = model.hidden(tokens, level, Orders.of_schedule(model.schedule, quincunx))
        for sample, index in enumerate(level.tolist()):
            rows = None if hidden is None else [h[sample] for h in hidden]
            for block, costs in _costs(quantizer, model, rows, index):
                count, own = block.last - block.first, quantizer.block_columns(block)
                values, codewords = (
                    each[sample, :, own].float().unflatten(1, (count, -1)).transpose(0, 1) for each in (columns, chosen)
                )
                expected, found = soft_assignment(
                    values, codewords, quantizer.block_codewords(block), costs, float(w[sample])
                )
                bits[sample] += expected.sum()
                for slope, gradient in zip(slopes, found, strict=True):
                    slope[sample, :, own] = gradient.transpose(0, 1).flatten(1)
    change = columns - columns.detach()
    of_bits, of_codeword, of_step = (slope * change for slope in slopes)
    passed = of_codeword.transpose(1, 2).unflatten(2, (height, width))
    passed = torch.zeros_like(z).index_copy(1, quantizer.order, passed)
    return SoftRate(bits + of_bits.sum((1, 2)), passed, of_step.sum((1, 2)))


def _costs(
    quantizer: TrainableQuantizer, model: EntropyModel | None, hidden: list[Tensor] | None, level: int
) -> Iterator[tuple[Block, Tensor]]:
    """Blocks of sub-quantizers that are coded, and the bits of each codeword: (m, h * w or 1, K)."""
    if model is None or hidden is None:
        for block in quantizer.blocks(level):
            if block.size > 1:
                yield block, quantizer.block_bits(block)[:, None]
        return
    for group, rows in enumerate(hidden):
        head = model.head_of(group, rows.flatten(0, 1))
        first_step = torch.from_numpy(quincunx_steps(*rows.shape[:2]) == 0).to(rows.device).flatten()[:, None]
        for block in model.group_blocks(group, level):
            if block.size == 1:
                continue
            first = model.schedule.group_bounds(group)[0]
            own, codewords = slice(block.first - first, block.last - first), block.codewords
            logits = block_logits(
                head[:, own].transpose(0, 1), model.token_factors[codewords], model.token_bias[codewords]
            )
            costs = -logits.log_softmax(2) / LOG2
            if group == 0:
                costs = torch.where(first_step, quantizer.block_bits(block)[:, None], costs)
            yield block, costs
