"""The HTML page, in a real browser where there is one, and figures."""

import json
import re
from pathlib import Path

import pytest
from browsers import CHROMIUM, visit
from stand_in_codec import StandInCodec, StandInDecoder, write_photos

from pqmim.errors import ConfigError
from pqmim.evaluation import report
from pqmim.evaluation.benchmark import Benchmark, Timing
from pqmim.evaluation.evaluate import EvaluationOptions, run_evaluation
from pqmim.evaluation.figures import write_benchmark_figures, write_figures
from pqmim.evaluation.reference_codecs import reference_codec
from pqmim.evaluation.report import (
    MAX_PAGE_BYTES,
    ReportOptions,
    bd_rate_table,
    write_report,
)
from pqmim.evaluation.results import Evaluation


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """Three photos, one of them with a name that must not end a script element."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_photos(folder / "photos", number=2)
    write_photos(folder / "photos" / "<b>", number=1)
    return run_evaluation(
        EvaluationOptions(
            folder / "photos",
            folder / "out",
            (StandInCodec(), reference_codec("webp"), reference_codec("jpeg")),
            qualities={"webp": (5, 40, 80), "jpeg": (10, 40, 80)},
            is_quiet=True,
        )
    )


@pytest.fixture(scope="module")
def page(evaluation: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    options = ReportOptions(
        file,
        title="A test & nothing <more>",
        dataset=evaluation.folders[0].parent / "photos",
        codecs=(StandInCodec(), reference_codec("webp")),
        images=2,
        bpp=(4.0,),
    )
    assert write_report(evaluation, options) == file.stat().st_size < MAX_PAGE_BYTES
    return file


def test_page_is_self_contained(page: Path):
    text = page.read_text("utf-8")
    addresses = re.findall(r"(?:src|href|url)\s*[=(:]\s*[\"']?([a-z]+:[^\"') ]*)", text)
    assert all(address.startswith("data:") for address in addresses)
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert text.count("</script>") == 2
    assert "A test &amp; nothing &lt;more>" in text


def test_data_of_the_page(page: Path, evaluation: Evaluation):
    content = re.search(r'id="data">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)
    data = json.loads(content.group(1))
    assert [curve["name"] for curve in data["curves"]] == ["stand-in", "webp", "jpeg"]
    assert len(data["rows"]) == len(evaluation.rows) == 27
    picture = data["pictures"][0]
    assert [version["name"] for version in picture["versions"]] == ["original", "stand-in", "webp"]
    assert all(version["source"].startswith("data:image/webp;base64,") for version in picture["versions"])
    rates = {rate["name"]: rate["percent"] for rate in data["bd"]["psnr-rgb"]["jpeg"]}
    assert rates["stand-in"] > 0 > rates["webp"]


def page_of_decoders(evaluation: Evaluation, file: Path) -> Path:
    """The viewer shows a decoder with three realisms, given out of order."""
    decoders = [StandInDecoder(name=f"bright@{realism:g}", strength=realism) for realism in (1.0, 0.0, 0.5)]
    options = ReportOptions(
        file,
        dataset=evaluation.folders[0].parent / "photos",
        codecs=(StandInCodec(), *decoders, reference_codec("webp")),
        images=1,
        bpp=(4.0,),
    )
    write_report(evaluation, options)
    return file


def test_other_decoders_show_the_same_file(evaluation: Evaluation, tmp_path: Path):
    page = page_of_decoders(evaluation, tmp_path / "decoders.html")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text("utf-8"), re.DOTALL).group(1))
    versions = data["pictures"][0]["versions"]
    assert [(version["name"], version["realism"]) for version in versions] == [
        ("original", None),
        ("stand-in", None),
        ("bright", 1.0),
        ("bright", 0.0),
        ("bright", 0.5),
        ("webp", None),
    ]
    assert len({version["bytes"] for version in versions[1:5]}) == 1
    psnr = {version["realism"]: version["psnr"] for version in versions[2:5]}
    assert psnr[0.0] > psnr[0.5] > psnr[1.0]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_realism_slider_in_a_browser(evaluation: Evaluation, tmp_path: Path):
    findings = visit(page_of_decoders(evaluation, tmp_path / "decoders.html"), "visit_realism.js", tmp_path, width=1200)
    assert findings["names"] == ["original", "stand-in", "bright", "webp"]
    assert findings["before"] == {"hidden": False, "value": "1", "caption": "bright, realism 1", "source": 2}
    assert findings["lowest"] == {
        "hidden": False,
        "value": "0",
        "caption": "bright, realism 0",
        "source": 1,
    }  # stand-in's
    assert findings["middle"] == {"hidden": False, "value": "0.5", "caption": "bright, realism 0.5", "source": 4}
    assert findings["without"]["hidden"]
    assert findings["without"]["caption"] == "webp"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1200, 390])
def test_page_in_a_browser(page: Path, tmp_path: Path, width: int):
    """A script at the end of the page does what a reader does."""
    findings = visit(page, "visit_report.js", tmp_path, width=width)
    assert findings["curves"] == ["stand-in", "webp", "jpeg"]
    assert findings["hidden"] == ["stand-in", "jpeg"]
    assert findings["axis"] == ["bits per pixel", "MS-SSIM RGB (dB)"]
    assert re.match(r"stand-in, quality \d\d?\d?[\d.]* bpp, PSNR RGB \(dB\) [\d.]+", findings["tip"])
    assert [name for name, _ in findings["bd"]] == ["webp", "stand-in"]
    assert re.fullmatch(r"\u2212[\d.]+ %", findings["bd"][0][1])
    sizes = [int(text.replace(",", "")) for text in findings["rising"]]
    assert len(sizes) == 3
    assert sizes == sorted(sizes)
    assert findings["falling"] == findings["rising"][::-1]
    assert findings["clip"].startswith("inset(0px 75% 0px 0px")
    assert findings["width"] == pytest.approx(2 * 176)
    assert findings["captions"] == ["stand-in", "webp"]
    assert findings["sizes"] == ["176x168", "176x168"]
    assert findings["overflow"] <= 0


def test_page_without_pictures(evaluation: Evaluation, tmp_path: Path):
    write_report(evaluation, ReportOptions(tmp_path / "plain.html"))
    assert '"pictures":[]' in (tmp_path / "plain.html").read_text("utf-8")


def test_wrong_options(evaluation: Evaluation, tmp_path: Path):
    with pytest.raises(ConfigError, match="no curve 'vvc'; there are stand-in, webp"):
        write_report(evaluation, ReportOptions(tmp_path / "page.html", anchor="vvc"))
    write_photos(tmp_path / "other", number=1)
    with pytest.raises(ConfigError, match="not the images that were evaluated"):
        write_report(
            evaluation,
            ReportOptions(tmp_path / "page.html", dataset=tmp_path / "other", codecs=(StandInCodec(),)),
        )


def test_page_that_would_be_too_large(evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report, "MAX_PAGE_BYTES", 50_000)
    options = ReportOptions(
        tmp_path / "page.html",
        dataset=evaluation.folders[0].parent / "photos",
        codecs=(StandInCodec(),),
    )
    with pytest.raises(ConfigError, match="larger than 3 MB"):
        write_report(evaluation, options)
    assert not options.output.exists()


def test_figures(evaluation: Evaluation, tmp_path: Path):
    files = write_figures(evaluation, tmp_path)
    assert [file.name for file in files[:2]] == ["rd_psnr-rgb.svg", "rd_psnr-rgb.png"]
    assert all(file.stat().st_size > 5000 for file in files)


def test_benchmark_figures(tmp_path: Path):
    timings = tuple(
        Timing("c", "", size, threads, 50.0, 100, size / 1e3, size / 2e3, 10**6 * size, 10**5 * size)
        for size in (256, 512)
        for threads in (1, 2)
    )
    missed = Timing("d", "", 256, 1, 50.0, problem="took too long")
    files = write_benchmark_figures(Benchmark({}, (*timings, missed), {}), tmp_path)
    assert [file.name for file in files] == [
        f"bench_{name}.{suffix}" for name in ("seconds", "memory") for suffix in ("svg", "png")
    ]


def test_bd_rate_table(evaluation: Evaluation):
    lines = bd_rate_table(evaluation, anchor="jpeg").splitlines()
    assert lines[0] == "| codec | BD-rate against jpeg | overlap, PSNR RGB (dB) |"
    assert re.fullmatch(r"\| webp \| -\d+\.\d % \| \d+\.\d\d to \d+\.\d\d \|", lines[3])
