"""What the tests of web/ need: Node.js, its packages, and Chromium. Where one is missing they are skipped; with
CI_REQUIRES_CHROMIUM=1 they fail."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

WEB = Path(__file__).resolve().parents[2] / "web"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def lacking(what: str) -> NoReturn:
    if os.environ.get("CI_REQUIRES_CHROMIUM") == "1":
        pytest.fail(f"{what} is missing")
    pytest.skip(f"{what} is missing")


@pytest.fixture(scope="session")
def node() -> str:
    """Path of Node.js."""
    return shutil.which("node") or lacking("Node.js")


@pytest.fixture(scope="session")
def built(node: str) -> Path:
    """Folder of the built package."""
    if importlib.util.find_spec("onnx") is None:  # the script that makes the weights reads graphs
        lacking("the package onnx")
    if not (WEB / "node_modules").is_dir():
        lacking("web/node_modules (run: npm ci --prefix web)")
    npm = shutil.which("npm") or lacking("npm")
    environment = {**os.environ, "PYTHON": sys.executable}
    subprocess.run([npm, "run", "build"], cwd=WEB, env=environment, check=True, timeout=300)
    return WEB / "dist"


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of Chromium."""
    return next(filter(None, map(shutil.which, BROWSERS)), None) or lacking("Chromium")
