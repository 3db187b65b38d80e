"""How fast a training runs: floating-point operations of a step, and the most that the device can do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache

import torch

NOMINAL_PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
"""Dense bf16 operations per second by part of the GPU's name, from the maker's data sheets; the first match counts."""
GPU_SIZES, CPU_SIZES = (4096, 8192), (512, 1024, 2048)
"""Sides of the matrices whose products are tried."""


def matmul_rate(
    device: torch.device, dtype: torch.dtype, *, seconds: float = 0.3, sizes: Sequence[int] | None = None
) -> float:
    """Measure the best rate of matrix products: floating-point operations per second.

    Args:
        dtype: of the matrices.
        seconds: how long to try each size; the best rate of all products counts. Other work on the device lowers it.
        sizes: sides of the matrices; None = what suits the device.
    """
    best = 0.0
    for size in sizes or (GPU_SIZES if device.type == "cuda" else CPU_SIZES):
        left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
        left @ right  # the first call sets things up
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            synchronize(device)
            start = time.perf_counter()
            left @ right
            synchronize(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


@cache
def peak_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Peak of the device in a type, operations per second.

    In bf16 it is the nominal one of known GPUs, else that of matrix products, measured.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, peak in NOMINAL_PEAKS.items():
            if part in name:
                return peak
    return matmul_rate(device, dtype)


@cache
def is_bf16_faster(device: torch.device) -> bool:
    """Whether products of matrices take less time in bfloat16 than in float32; processors without instructions for it
    take many times as long."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    rates = [matmul_rate(device, dtype, seconds=0.03, sizes=(512,)) for dtype in (torch.bfloat16, torch.float32)]
    return rates[0] > rates[1]


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU still has to do; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
