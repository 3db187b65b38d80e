"""`pqmim preview`: files, data URLs, and the page."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import pytest
from cli_tools import ONE_LINE_ERROR, Pqmim, files_below, photo
from PIL import Image

from pqmim import preview
from pqmim.bitstream import parse

pytest_plugins = ["cli_fixtures"]


@pytest.fixture
def run(pqmim: Pqmim, tiny_model: Path) -> Pqmim:
    return lambda *arguments, **options: pqmim("preview", "--model", str(tiny_model), *arguments, **options)


def test_files(run: Pqmim, tiny_model: Path) -> None:
    source = photo("in/a.png", (150, 100))
    photo("in/deep/b.jpg", (60, 100))
    result = run("in", "-o", "out")
    assert (result.exit_code, result.stderr) == (0, "")
    assert files_below("out") == ["a.preview.pqm", "deep/b.preview.pqm"]
    data = Path("out/a.preview.pqm").read_bytes()
    assert data == preview.encode(source, 200, model=tiny_model)
    container = parse(data)
    line = rf"out/a\.preview\.pqm  {container.width} x {container.height}  {len(data)} B  \d+\.\d\d s"
    assert re.fullmatch(line, result.stdout.splitlines()[0])

    assert run("in/a.png", "--bytes", "30").exit_code == 0
    assert Path("in/a.preview.pqm").stat().st_size <= 30
    again = run("in/a.png", "--bytes", "30")
    assert again.exit_code == 1
    assert ONE_LINE_ERROR.fullmatch(again.stderr)
    assert "exists already" in again.stderr
    assert run("in/a.png", "-f", "--quiet").stdout == ""
    assert run("in/a.png", "--skip-existing").exit_code == 0


def test_streams(run: Pqmim, tiny_model: Path) -> None:
    source = photo("a.png", (64, 64))
    result = run("-", stdin=source.read_bytes())
    assert result.exit_code == 0
    assert result.stdout_bytes == preview.encode(source, model=tiny_model)
    assert "stdout  " in result.stderr


def test_processes(run: Pqmim) -> None:
    for name in ("a", "b", "c"):
        photo(f"in/{name}.png", (48, 32))
    assert run("in", "-o", "one").exit_code == run("in", "-o", "two", "-j", "2").exit_code == 0
    for name in files_below("one"):
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes()


def test_data_urls(run: Pqmim) -> None:
    photo("a.png", (90, 60))
    result = run("a.png", "--data-url", "-o", "-", "--max-side", "30")
    assert result.exit_code == 0
    url = result.stdout.removesuffix("\n")
    assert url.startswith("data:image/webp;base64,")
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        assert image.size == (30, 20)
    result = run("a.png", "--data-url", "--json")
    assert result.exit_code == 0
    record = json.loads(result.stdout)
    assert Path("a.preview.txt").read_text() == record["data_url"] + "\n"
    assert (record["input"], record["output"], record["warnings"]) == ("a.png", "a.preview.txt", [])
    assert record["bytes"] <= 200
    assert (record["width"] / record["height"]) == pytest.approx(1.5, rel=0.05)


def test_page(run: Pqmim) -> None:
    photo("a<b>.png", (96, 64))
    photo("clear.png", (400, 200), "RGBA")
    result = run("a<b>.png", "clear.png", "--html", "--bytes", "60")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert len(lines) == 3
    assert re.fullmatch(r"previews\.html  2 images  [\d,]+ B", lines[2])
    page = Path("previews.html").read_text("utf-8")
    assert page.count("<section>") == 2
    assert page.count("<img ") == 8
    assert all(source.startswith("data:image/webp;base64,") for source in re.findall(r'src="([^"]*)"', page))
    assert "http" not in page
    assert "<script" not in page
    assert "a&lt;b&gt;.png" in page
    assert "Previews of at most 60 bytes" in page
    captions = re.findall(r"<figcaption>(\w+): (\d+)\u00a0B, (\d+\.\d\d)\u00a0dB<", page)
    assert [name for name, _, _ in captions] == 2 * ["pqmim", "BlurHash", "ThumbHash"]
    assert all(int(size) <= 60 for _, size, _ in captions)
    assert captions[1][1] == "28"
    assert 'width="384" height="192"' in page

    assert run("clear.png", "--html").exit_code == 1  # exists already
    to_stdout = run("clear.png", "--html", "-o", "-")
    assert to_stdout.stdout.startswith("<!doctype html>")
    assert "stdout  1 images" in to_stdout.stderr


def test_the_page_goes_on_without_what_fails(run: Pqmim) -> None:
    photo("a.png", (48, 48))
    Path("b.png").write_bytes(b"no image")
    result = run("b.png", "a.png", "--html", "-o", "page.html")
    assert result.exit_code == 1
    assert ONE_LINE_ERROR.fullmatch(result.stderr)
    assert Path("page.html").read_text("utf-8").count("<section>") == 1


def test_alpha_without_room_is_a_warning(run: Pqmim) -> None:
    picture = Image.radial_gradient("L").convert("RGB")
    picture.putalpha(Image.radial_gradient("L"))
    picture.save("a.png")
    result = run("a.png", "--bytes", "30")
    assert result.exit_code == 0
    assert "a.png: warning: 30 bytes have no room for alpha" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("a.png", "--bytes", "0"),
        ("a.png", "--data-url", "--html"),
        ("a.png", "--data-url", "-o", "a.png.pqm"),
        ("a.png", "-o", "b.png"),
        ("a.png", "--html", "-o", "b.pqm"),
        ("a.png", "--html", "-j", "2"),
        ("a.png", "--max-side", "0"),
    ],
)
def test_wrong_usage(run: Pqmim, arguments: tuple[str, ...]) -> None:
    photo("a.png")
    result = run(*arguments)
    assert result.exit_code == 2
    assert files_below(".") == ["a.png"]


def test_errors(run: Pqmim) -> None:
    photo("a.png")
    for arguments, message in (
        (("missing.png",), "missing.png: No such file or directory"),
        (("a.png", "--bytes", "5"), "a.png: no file of 5 bytes is possible; the smallest has 9"),
        (("a.png", "--model", "no-such-model"), "no such model"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1, arguments
        assert ONE_LINE_ERROR.fullmatch(result.stderr), result.stderr
        assert message in result.stderr
