"""The self test: what it decodes, and that it finds a machine out that decodes something else."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pqmim import selftest
from pqmim.entropy_kernels import exact_kernels
from pqmim.errors import ConfigError, ModelError
from pqmim.exact_entropy import ExactEntropyModel
from pqmim.model_files import find_model, load_model
from pqmim.options import Device

FEW = ("fast-odd.pqm", "fast-pixel.pqm", "fine-pixel.pqm")


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, object]]:
    """A few of the golden files, which are as good here as all of them."""
    golden = {name: facts for name, facts in selftest.read_golden().items() if name in FEW}
    assert golden.keys() == set(FEW)
    monkeypatch.setattr(selftest, "read_golden", lambda: golden)
    return golden


def test_every_file_with_every_kernel() -> None:
    checks = list(selftest.run("cpu"))
    kernels = exact_kernels(load_model(find_model("photo")))
    by_whom = (*kernels, "picture by fast", "picture by fine", "picture by vivid")
    expected = {f"{name} (cpu, {each})" for name in FEW for each in by_whom}
    assert {check.name for check in checks} == expected
    assert len(checks) == len(expected)
    assert all(check.error is None for check in checks)


def test_the_choice_of_the_caller_is_no_choice_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PQMIM_KERNEL", "numpy")
    assert len({check.name.split(", ")[1] for check in selftest.run("cpu")}) > 2


def test_one_wrong_frequency_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ExactEntropyModel.frequencies

    def spoilt(self: ExactEntropyModel, head: NDArray[np.uint8], level: int, first: int) -> NDArray[np.int32]:
        frequencies = original(self, head, level, first)
        if self.kernel != "float32":
            return frequencies
        frequencies = frequencies.copy()
        frequencies[0, 0] = np.roll(frequencies[0, 0], 1)
        return frequencies

    monkeypatch.setattr(ExactEntropyModel, "frequencies", spoilt)
    checks = {check.name: check.error for check in selftest.run("cpu")}
    for name, error in checks.items():
        if "float32" not in name:
            assert error is None, name
    wrong = [error for name, error in checks.items() if "odd" in name and "float32" in name]
    assert len(wrong) == 1
    assert wrong[0]
    assert "\n" not in wrong[0]


def test_other_tokens_and_pixels_are_an_error(few: dict[str, dict[str, object]]) -> None:
    few["fast-odd.pqm"] = few["fast-odd.pqm"] | {"tokens": "0" * 64}
    pictures = few["fine-pixel.pqm"]["pictures"]
    assert isinstance(pictures, dict)
    few["fine-pixel.pqm"] = few["fine-pixel.pqm"] | {"pictures": pictures | {"fine": "0" * 64}}
    found = {(check.name.split()[0], "picture" in check.name, check.error) for check in selftest.run("cpu")}
    assert {(file, is_picture, error) for file, is_picture, error in found if error is not None} == {
        ("fast-odd.pqm", False, "decoded to other tokens"),
        ("fine-pixel.pqm", True, "decoded to other pixels"),
    }


def test_damaged_and_missing_files_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FEW:
        shutil.copy(selftest.GOLDEN / name, tmp_path)
    (tmp_path / FEW[0]).write_bytes((tmp_path / FEW[0]).read_bytes()[:-1])
    (tmp_path / FEW[1]).unlink()
    monkeypatch.setattr(selftest, "GOLDEN", tmp_path)
    errors = {check.name.split()[0]: check.error for check in selftest.run("cpu")}
    assert errors["fine-pixel.pqm"] is None
    assert "checksum" in (errors[FEW[0]] or "")
    assert "No such file" in (errors[FEW[1]] or "")


def test_a_package_without_golden_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(selftest, "GOLDEN", tmp_path)
    with pytest.raises(ModelError, match=r"golden\.json: No such file"):
        next(selftest.run("cpu"))


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="auto, cpu or cuda"):
        next(selftest.run("tpu"))
    monkeypatch.setattr("pqmim.runtime.has_cuda", lambda: False)
    with pytest.raises(ConfigError, match="cannot use CUDA"):
        next(selftest.run("cuda"))
    assert {check.name for check in selftest.run("auto")} == {check.name for check in selftest.run("cpu")}


def test_where_there_is_a_gpu_both_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Device, str | None]] = []

    class Stub:
        kernel = "float32"

        def __init__(self, model: object, decoder: object, device: Device, *, kernel: str | None = None) -> None:
            made.append((device, kernel))

        def token_hash(self, data: bytes) -> str:
            return ""

        def decode(self, data: bytes) -> Image.Image:
            return Image.new("RGB", (1, 1))

    monkeypatch.setattr(selftest, "Codec", Stub)
    monkeypatch.setattr("pqmim.runtime.has_cuda", lambda: True)
    checks: Iterator[selftest.Check] = selftest.run("auto")
    assert {check.name.split("(")[1].split(",")[0] for check in checks} == {"cpu", "cuda"}
    assert (Device.CUDA, None) in made
    assert (Device.CPU, "numpy") in made
    made.clear()
    list(selftest.run("cuda"))
    assert {device for device, _ in made} == {Device.CUDA}
