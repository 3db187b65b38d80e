"""`pqmim eval` and `pqmim bench`, from the outside."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from pqmim.cli import app


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, empty but for a photo."""
    monkeypatch.chdir(tmp_path)
    y, x = np.mgrid[0:48, 0:64]
    Path("photos").mkdir()
    Image.fromarray(np.stack([3 * x, 4 * y, 255 - 2 * x - 2 * y], axis=-1).clip(0, 255).astype(np.uint8)).save(
        "photos/a.png"
    )
    return tmp_path


def pqmim(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def files_below(folder: str) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def test_eval_compares_with_a_reference(folder: Path, tiny_model: Path) -> None:
    grids = ("--quality-grid", "10,90", "--quality-grid", "jpeg:10,50,90", "--metrics", "psnr")
    command = ("eval", "photos", "-o", "out", "-m", str(tiny_model), "--reference", "jpeg", *grids)
    result = pqmim(*command, "--anchor", "jpeg")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "| codec | BD-rate against jpeg |" in result.stdout
    assert f"| pqmim {tiny_model.name} (fine) |" in result.stdout
    made = files_below("out")
    assert {"evaluation.json", "per_image.csv", "report.html", "rd_psnr-rgb.svg"} <= set(made)

    quiet = pqmim(*command, "--quiet", "--no-report")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")
    wrong = pqmim(*command, "--anchor", "gif")
    assert wrong.exit_code == 1
    assert re.fullmatch(r"pqmim: [^\n]+\n", wrong.stderr)


def test_ablation_prints_its_table(folder: Path, tiny_model: Path) -> None:
    result = pqmim("eval", "photos", "-o", "out", "-m", str(tiny_model), "--ablation")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("| variant | quality |")
    assert "ablation.csv" in files_below("out")


def test_bench_times_each_size(folder: Path) -> None:
    result = pqmim("bench", "-o", "out", "--reference", "jpeg", "--sizes", "256,1024", "--threads", "1")
    assert result.exit_code == 0, result.stderr
    assert [line.split("  ")[1] for line in result.stdout.splitlines()] == ["256 x 256", "1024 x 1024"]
    assert {"bench.csv", "bench.json", "bench_seconds.svg"} <= set(files_below("out"))
    assert pqmim("bench", "-o", "out", "--sizes", "big").exit_code == 2


def test_bench_needs_no_extra(folder: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("matplotlib.figure", "torch", "pytorch_msssim", "bjontegaard"):
        monkeypatch.setitem(sys.modules, package, None)
    result = pqmim("bench", "-o", "out", "-m", str(tiny_model), "--sizes", "64", "--threads", "1")
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1
    assert "figures: warning: not drawn: the package matplotlib is not installed" in result.stderr
    assert files_below("out") == ["bench.csv", "bench.json"]
