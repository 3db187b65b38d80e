"""Modules of web/ against the Python package, in Node.js."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from network_cases import network_cases
from web_cases import all_cases

from pqmim import __version__

HERE = Path(__file__).parent


@pytest.mark.usefixtures("built")
def test_modules_agree_with_python(node: str, tmp_path: Path) -> None:
    run_tests(node, "modules.test.mjs", all_cases(), tmp_path)


@pytest.mark.usefixtures("built")
def test_networks_agree_with_python(node: str, tiny_model: Path, tmp_path: Path) -> None:
    run_tests(node, "networks.test.mjs", network_cases(tiny_model, tmp_path), tmp_path)


def run_tests(node: str, name: str, cases: object, folder: Path) -> None:
    """Run a file of tests of Node.js, which reads the cases."""
    path = folder / "cases.json"
    path.write_text(json.dumps(cases))
    command = [node, "--test", "--test-reporter=tap", str(HERE / name)]
    environment = {**os.environ, "PQMIM_CASES": str(path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert "# fail 0" in result.stdout
    assert "# skipped 0" in result.stdout


@pytest.mark.usefixtures("built")
def test_package_is_self_contained() -> None:
    package = json.loads((HERE.parents[1] / "web" / "package.json").read_text())
    assert package["version"] == __version__
    assert "dependencies" not in package  # what the page needs of ONNX Runtime is copied
    lock = (HERE.parents[1] / "web" / "package-lock.json").read_text()
    assert "resolved" not in lock
    assert "://" not in lock
