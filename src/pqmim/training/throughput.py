"""How fast a training runs: floating-point operations of a step, and the most that the device can do."""

from __future__ import annotations

import time
from functools import cache

import torch

NOMINAL_PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
"""Dense bf16 operations per second by part of the GPU's name, from the maker's data sheets; the first match counts."""


def matmul_rate(device: torch.device, *, seconds: float = 0.3) -> float:
    """Measure the best rate of bf16 matrix products: floating-point operations per second.

    Args:
        seconds: how long to try each size; the best rate of all products counts. Other work on the device lowers it.
    """
    best = 0.0
    for size in (4096, 8192) if device.type == "cuda" else (512, 1024, 2048):
        left, right = (torch.ones(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
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
def peak_rate(device: torch.device) -> float:
    """Peak of the device in bf16, operations per second: nominal for known GPUs, else measured by a matrix product."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in NOMINAL_PEAKS.items():
            if part in name:
                return peak
    return matmul_rate(device)


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU still has to do; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
