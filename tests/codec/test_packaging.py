"""What is installed and what is not: versions, wheel, imports."""

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
CONSTRAINTS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
)


def test_no_torchvision_on_cpu_installs() -> None:
    # It replaces torch by a CUDA build, and if the two do not fit, torchmetrics cannot be imported any more.
    if "+cpu" not in importlib.metadata.version("torch"):
        pytest.skip("not a CPU install of torch")
    assert importlib.util.find_spec("torchvision") is None


def test_constraints_are_exact_versions_and_nothing_else() -> None:
    for name, version in CONSTRAINTS.items():
        assert re.fullmatch(r"[A-Za-z0-9._-]+", name)
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version), name
    assert CONSTRAINTS["torch"] == "2.13.0"
    assert list(CONSTRAINTS) == sorted(CONSTRAINTS, key=str.lower)


def test_constraints_cover_all_that_the_dev_extra_installs() -> None:
    constrained = {canonicalize_name(name) for name in CONSTRAINTS}
    extras = PROJECT["optional-dependencies"]
    waiting = [*PROJECT["dependencies"], *extras["train"], *extras["eval"], *extras["dev"]]
    seen = {("pqmim", "")}
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen or name == "pqmim":
                continue
            seen.add((name, extra))
            assert name in constrained
            waiting += [
                line
                for line in importlib.metadata.requires(name) or ()
                if (marker := Requirement(line).marker) is None or marker.evaluate({"extra": extra})
            ]


def test_the_container_the_range_coder_and_image_files_do_not_import_torch() -> None:
    code = (
        "import sys, pqmim.errors, pqmim.bitstream, pqmim.range_coding, pqmim.image_io;sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "src")


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
