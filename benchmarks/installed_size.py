"""What the install command of the README downloads and leaves on the disk, in an environment of its own.

    python benchmarks/installed_size.py [--source CHECKOUT] [--extras train] [--download-only] [--pypi]

Asks pip what it would download, adds up the sizes that the index gives for these files, installs them into a new
environment, and measures what was added to it, by package. `--download-only` installs nothing: it shows, without the
gigabytes, what a checkout with larger requirements would take from the network. `--pypi` asks pypi.org, whatever this
machine's settings of pip say, as on an ordinary machine. The package itself is built from the checkout; what its build
takes from the index (hatchling) is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from example import ROOT
from measurements import table

MEGA = 1e6


def added_by(pip: Sequence[str | Path], source: Path, extras: str, report: Path) -> list[dict[str, Any]]:
    """What pip would install into an environment: an entry of its report for each package."""
    command = [*pip, "install", "--dry-run", "--report", report, "-c", source / "constraints.txt", f"{source}{extras}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    entries: list[dict[str, Any]] = json.loads(report.read_text("utf-8"))["install"]
    return entries


def download_bytes(url: str) -> int:
    """Size of what a package is downloaded as; 0 for the checkout itself."""
    path = Path(urllib.request.url2pathname(url.removeprefix("file://")))
    if url.startswith("file://"):
        return path.stat().st_size if path.is_file() else 0
    with urllib.request.urlopen(urllib.request.Request(url, method="HEAD")) as answer:
        return int(answer.headers["Content-Length"])


def installed_bytes(site_packages: Path, package: str) -> int:
    """Size of a package's files in an environment, as its list of files names them, and of their compiled forms."""
    program = f"""
from importlib.metadata import files
print(*sorted(set(str(path.locate().resolve()) for path in files({package!r}))), sep="\\n")
"""
    python = site_packages.parents[2] / "bin" / "python"
    paths = subprocess.run([python, "-c", program], check=True, capture_output=True, text=True).stdout.splitlines()
    return sum(Path(path).stat().st_size for path in paths if Path(path).is_file())


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table of the packages and the sums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=ROOT, metavar="CHECKOUT", help="default: this one")
    parser.add_argument("--extras", default="", metavar="NAMES", help="such as train or eval,train")
    parser.add_argument("--download-only", action="store_true", help="install nothing")
    parser.add_argument("--pypi", action="store_true", help="from pypi.org, without settings of pip")
    options = parser.parse_args(arguments)
    if options.pypi:
        for name in [name for name in os.environ if name.startswith("PIP_") and name != "PIP_CERT"]:
            del os.environ[name]
        os.environ["PIP_CONFIG_FILE"] = os.devnull
    source, extras = options.source.resolve(), f"[{options.extras}]" if options.extras else ""

    with tempfile.TemporaryDirectory() as scratch:
        venv = Path(scratch, "venv")
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        pip = [venv / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "--quiet"]
        entries = added_by(pip, source, extras, Path(scratch, "report.json"))
        sizes = {e["metadata"]["name"]: [download_bytes(e["download_info"]["url"])] for e in entries}
        if not options.download_only:
            subprocess.run([*pip, "install", "-c", source / "constraints.txt", f"{source}{extras}"], check=True)
            (site_packages,) = venv.glob("lib/python*/site-packages")
            for name, of in sizes.items():
                of.append(installed_bytes(site_packages, name))
    in_order = sorted(sizes.items(), key=lambda entry: -entry[1][-1])
    totals = [sum(column) for column in zip(*sizes.values(), strict=True)]
    lines = [[name, *(f"{size / MEGA:.1f}" for size in of)] for name, of in [*in_order, ("together", totals)]]
    print(table(["package", "download, MB", *(["installed, MB"] if len(totals) > 1 else [])], lines))


if __name__ == "__main__":
    main()
