"""Peak rates: the maker's for known GPUs, else measured; bfloat16 where it is faster."""

import pytest
import torch

from pqmim.training import throughput
from pqmim.training.throughput import is_bf16_faster, matmul_rate, peak_rate

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_is_measured(dtype: torch.dtype) -> None:
    assert 1e7 < matmul_rate(CPU, dtype, seconds=0.01, sizes=(64, 128)) < 1e15


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA L4", 121e12)],
)
def test_known_gpus_have_their_nominal_peak(name: str, peak: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak_rate.cache_clear()
    assert peak_rate(torch.device("cuda"), torch.bfloat16) == peak
    peak_rate.cache_clear()


@pytest.mark.parametrize("is_faster", [True, False])
def test_bf16_is_tried(is_faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def rate(device: torch.device, dtype: torch.dtype, **settings: object) -> float:
        return 2.0 if (dtype == torch.bfloat16) == is_faster else 1.0

    monkeypatch.setattr(throughput, "matmul_rate", rate)
    is_bf16_faster.cache_clear()
    assert is_bf16_faster(CPU) == is_faster
    is_bf16_faster.cache_clear()
