"""What is installed and what is not: versions, wheel, extras."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pqmim._version import __version__

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONSTRAINTS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
)


def is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@pytest.mark.skipif(not is_installed("torch"), reason="needs torch")
def test_no_torchvision_on_cpu_installs() -> None:
    # It replaces torch by a CUDA build, and if the two do not fit, torchmetrics cannot be imported any more.
    if "+cpu" not in importlib.metadata.version("torch"):
        pytest.skip("not a CPU install of torch")
    assert not is_installed("torchvision")


def test_constraints_are_exact_versions_and_nothing_else() -> None:
    for name, version in CONSTRAINTS.items():
        assert re.fullmatch(r"[A-Za-z0-9._-]+", name)
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version), name
    assert CONSTRAINTS["torch"] == "2.13.0"
    assert list(CONSTRAINTS) == sorted(CONSTRAINTS, key=str.lower)


def names_of(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


def test_the_codec_depends_on_little() -> None:
    assert names_of(PROJECT["dependencies"]) == {
        "constriction",
        "numpy",
        "onnxruntime",
        "pillow",
        "rich",
        "safetensors",
        "typer",
    }


@pytest.mark.parametrize(
    ("system", "machine", "has_wheels"),
    [
        ("linux", "x86_64", True),
        ("win32", "AMD64", True),
        ("darwin", "arm64", True),
        ("darwin", "x86_64", True),
        ("linux", "aarch64", False),
        ("win32", "ARM64", False),
    ],
)
def test_constriction_is_asked_for_where_it_has_wheels(system: str, machine: str, has_wheels: bool) -> None:
    """It has no sources on PyPI either: asked for elsewhere, nothing could be installed."""
    wanted = [Requirement(line) for line in PROJECT["dependencies"]]
    place = {"sys_platform": system, "platform_machine": machine}
    names = {each.name for each in wanted if each.marker is None or each.marker.evaluate(place)}
    assert ("constriction" in names) == has_wheels
    assert {"numpy", "onnxruntime", "pillow"} <= names


def test_the_two_packages_of_onnx_runtime_never_meet() -> None:
    """They share a folder, and whichever is installed last breaks the other."""
    assert names_of(EXTRAS["gpu"]) == {"onnxruntime-gpu"}
    for name, requirements in EXTRAS.items():
        if name != "gpu":
            assert "onnxruntime-gpu" not in names_of(requirements), name
            assert not any("gpu" in Requirement(line).extras for line in requirements), name


def all_requirements(requirements: list[str]) -> set[str]:
    """Names of what is installed for requirements, and for theirs; those of pqmim's extras among them."""
    waiting = list(requirements)
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            if name == "pqmim":
                waiting += EXTRAS.get(extra, [])
                continue
            waiting += [
                line
                for line in importlib.metadata.requires(name) or ()
                if (marker := Requirement(line).marker) is None or marker.evaluate({"extra": extra})
            ]
    return {name for name, _ in seen} - {"pqmim"}


def test_constraints_cover_all_that_is_installed() -> None:
    """For the codec alone, and where PyTorch is installed for the extra dev."""
    constrained = {canonicalize_name(name) for name in CONSTRAINTS}
    extras = [*EXTRAS["test"], *(EXTRAS["dev"] if is_installed("torch") else ())]
    assert all_requirements([*PROJECT["dependencies"], *extras]) - constrained == set()


def test_what_the_codec_depends_on_does_not_bring_pytorch() -> None:
    heavy = {"torch", "torchvision", "omegaconf", "onnx", "onnxscript", "scipy", "matplotlib"}
    assert all_requirements(PROJECT["dependencies"]) & heavy == set()


@pytest.mark.skipif(not is_installed("hatchling"), reason="needs hatchling")
def test_wheel(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        check=True,
        cwd=ROOT,
        capture_output=True,
    )
    (wheel,) = tmp_path.iterdir()
    assert wheel.name == f"pqmim-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = ROOT / "src" / "pqmim"
    patterns = ("py.typed", "*.py", "*.safetensors", "golden/*")
    shipped = [path for pattern in patterns for path in package.rglob(pattern)]
    assert {path.relative_to(ROOT / "src").as_posix() for path in shipped} <= names
    assert not any(name.startswith(("tests/", "recipes/", "benchmarks/")) for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
