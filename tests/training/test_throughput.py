"""Peak rates: the maker's for known GPUs, else measured."""

import pytest
import torch

from pqmim.training.throughput import matmul_rate, peak_rate


def test_a_cpu_is_measured() -> None:
    rate = matmul_rate(torch.device("cpu"), seconds=0.05)
    assert 1e8 < rate < 1e15


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA L4", 121e12)],
)
def test_known_gpus_have_their_nominal_peak(name: str, peak: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak_rate.cache_clear()
    assert peak_rate(torch.device("cuda")) == peak
