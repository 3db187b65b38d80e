"""Where outputs go: names, folders, streams; what is never overwritten; what is there or not there after a failure."""

import json
import os
import re
from pathlib import Path

import pytest
from cli_tools import ONE_LINE_ERROR, RESULT_LINE, Pqmim, files_below, photo

from pqmim import files
from pqmim.bitstream import parse

pytest_plugins = ["cli_fixtures"]


def test_folders_are_recreated(pqmim: Pqmim) -> None:
    photo("in/a.png")
    photo("in/deep/er/b.webp")
    photo("in/.hidden.png")
    Path("in/notes.txt").write_text("not a picture")
    result = pqmim("encode", "in", "-o", "coded")
    assert (result.exit_code, result.stderr) == (0, "")
    assert files_below("coded") == ["a.pqm", "deep/er/b.pqm"]
    assert pqmim("decode", "coded", "-o", "out").exit_code == 0
    assert files_below("out") == ["a.png", "deep/er/b.png"]


def test_several_inputs_keep_the_names_of_their_folders(pqmim: Pqmim) -> None:
    photo("x/a.png")
    photo("y/a.png")
    photo("b.png")
    assert pqmim("encode", "x", "y", "b.png", "-o", "coded").exit_code == 0
    assert files_below("coded") == ["b.pqm", "x/a.pqm", "y/a.pqm"]


def test_outputs_lie_beside_their_inputs_by_default(pqmim: Pqmim) -> None:
    photo("in/a.png")
    photo("in/deep/b.png")
    assert pqmim("encode", "in").exit_code == 0
    assert files_below("in") == ["a.png", "a.pqm", "deep/b.png", "deep/b.pqm"]


def test_old_extension_is_kept_where_names_would_be_equal(pqmim: Pqmim) -> None:
    for name in ("photo.jpg", "photo.png", "other.png"):
        photo(f"in/{name}")
    assert pqmim("encode", "in", "-o", "coded").exit_code == 0
    assert files_below("coded") == ["other.pqm", "photo.jpg.pqm", "photo.png.pqm"]
    assert pqmim("decode", "coded", "-o", "out").exit_code == 0
    assert files_below("out") == ["other.png", "photo.jpg.png", "photo.png.png"]


def test_equal_names_in_one_output_folder_are_an_error(pqmim: Pqmim) -> None:
    photo("x/a.png")
    photo("y/a.png")
    result = pqmim("encode", "x/a.png", "y/a.png", "-o", "coded")
    assert result.exit_code == 1
    assert files_below("coded") == ["a.png.pqm"]
    assert result.stderr.startswith("pqmim: y/a.png: its output ".replace("/", os.sep))


def test_unknown_extension_is_kept(pqmim: Pqmim) -> None:
    photo("a.png").rename("holiday.2024")
    assert pqmim("encode", "holiday.2024").exit_code == 0
    assert Path("holiday.2024.pqm").exists()


@pytest.mark.parametrize("name", ["new/", "existing"])
def test_output_folder_for_one_file(pqmim: Pqmim, name: str) -> None:
    photo("a.png")
    Path("existing").mkdir()
    assert pqmim("encode", "a.png", "-o", name).exit_code == 0
    assert files_below(name) == ["a.pqm"]


def test_streams(pqmim: Pqmim) -> None:
    original = photo("a.png").read_bytes()
    coded = pqmim("encode", "-", stdin=original)
    assert coded.exit_code == 0
    container = parse(coded.stdout_bytes)
    assert (container.width, container.height) == (40, 24)
    assert re.fullmatch(r"stdout  [\d,]+ B  \S+ bpp  \S+ s\n", coded.stderr)

    decoded = pqmim("decode", "-", "-o", "-", stdin=coded.stdout_bytes)
    assert decoded.exit_code == 0
    assert decoded.stdout_bytes.startswith(b"\x89PNG")

    to_file = pqmim("encode", "-", "-o", "b.pqm", stdin=original)
    assert RESULT_LINE.fullmatch(to_file.stdout.strip())
    assert Path("b.pqm").read_bytes() == coded.stdout_bytes
    assert pqmim("encode", "a.png", "-o", "-").stdout_bytes == coded.stdout_bytes


def test_existing_outputs_are_refused_without_force(pqmim: Pqmim) -> None:
    photo("a.png")
    Path("a.pqm").write_bytes(b"precious")
    result = pqmim("encode", "a.png")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "pqmim: a.png: a.pqm exists already; -f overwrites it\n"
    assert Path("a.pqm").read_bytes() == b"precious"
    assert pqmim("encode", "a.png", "-f").exit_code == 0
    assert parse(Path("a.pqm").read_bytes()).width == 40


def test_inputs_are_never_overwritten(pqmim: Pqmim) -> None:
    photo("a.png")
    assert pqmim("encode", "a.png", "-o", "a").exit_code == 0
    coded = Path("a").read_bytes()
    for arguments in (("a", "-o", "a"), ("a", "-o", "./a")):
        result = pqmim("decode", "-f", *arguments)
        assert (result.exit_code, result.stderr) == (1, "pqmim: a: a is an input and is not overwritten\n")
    assert Path("a").read_bytes() == coded


def test_failed_writing_leaves_nothing_behind(pqmim: Pqmim, monkeypatch: pytest.MonkeyPatch) -> None:
    photo("a.png")

    def full_disk(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full_disk)
    result = pqmim("encode", "a.png")
    assert (result.exit_code, result.stderr) == (1, "pqmim: a.png: a.pqm: No space left on device\n")
    assert files_below(".") == ["a.png"]


@pytest.mark.parametrize(
    ("command", "precious"),
    [
        (("gallery", "img/page.html", "-o", "img/page.html", "--keeps", "1", "-f"), "img/page.html"),
        (("gallery", "img/p.png", "-o", "other", "--keeps", "1", "-f"), "img/p.png"),
        (("inpaint", "img/p.png", "--mask", "mask/p.png", "-o", "mask/", "-f"), "mask/p.png"),
        (("inpaint", "img/p.png", "--mask", "mask/p.png", "-o", "mask", "-f"), "mask/p.png"),
        (("inpaint", "img/p.png", "--mask", "mask/p.png", "-o", "hard.png", "-f"), "mask/p.png"),
        (("inpaint", "img/p.png", "--mask", "mask/p.png", "-o", "img/", "-f"), "img/p.png"),
        (("encode", "img/p.png", "-o", "other", "-f"), "img/p.png"),
        (("encode", "mask/p.png", "-f"), "mask/p.png"),
        (("encode", "img/p.png", "-m", "run", "-o", "run/model", "-f"), "run/model.safetensors"),
        (("generate", "--size", "16x16", "-m", "run", "-o", "out", "-f"), "run/model.safetensors"),
        (("decode", "a.pqm", "--progress-dir", "steps", "-o", "b.png", "-f"), "a.pqm"),
    ],
)
def test_no_command_overwrites_what_it_reads(
    pqmim: Pqmim, tiny_model: Path, command: tuple[str, ...], precious: str
) -> None:
    photo("img/p.png", (96, 64))
    photo("mask/p.png", (96, 64))
    assert pqmim("encode", "img/p.png", "-o", "a.pqm").exit_code == 0
    Path("img/page.html").write_bytes(Path("img/p.png").read_bytes())
    Path("run").mkdir()
    Path("run/model.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes())
    try:
        os.link("mask/p.png", "hard.png")
        for link, target in (
            ("other", "img/p.png"),
            ("run/model", "model.safetensors"),
            ("out", "drawn"),
            ("drawn/00.png", "../run/model.safetensors"),
            ("mask/p.pqm", "p.png"),
            ("steps/b.step01.png", "../a.pqm"),
        ):
            Path(link).parent.mkdir(exist_ok=True)
            os.symlink(target, link)
    except OSError:
        pytest.skip("this system makes no links")
    before = Path(precious).read_bytes()
    result = pqmim(*command, has_model="-m" not in command)
    assert Path(precious).read_bytes() == before
    assert result.exit_code == 1
    assert result.stderr.endswith(" is an input and is not overwritten\n")
    assert ONE_LINE_ERROR.fullmatch(result.stderr)


def test_skip_existing(pqmim: Pqmim) -> None:
    for name in ("a.png", "b.png", "c.png"):
        photo(f"in/{name}")
    assert pqmim("encode", "in/b.png", "-o", "out/").exit_code == 0
    Path("out/a.pqm").write_bytes(b"of another day")
    result = pqmim("encode", "in", "-o", "out", "--skip-existing")
    assert (result.exit_code, result.stdout.split()[0]) == (0, str(Path("out/c.pqm")))
    assert result.stderr == "pqmim: 2 of 3 outputs exist already and are left as they are\n"
    assert Path("out/a.pqm").read_bytes() == b"of another day"
    again = pqmim("encode", "in", "-o", "out", "--skip-existing", "--json")
    assert again.exit_code == 0
    assert [json.loads(line) for line in again.stdout.splitlines()] == [
        {"input": str(Path("in", f"{name}.png")), "output": str(Path("out", f"{name}.pqm")), "skipped": True}
        for name in "abc"
    ]
    quiet = pqmim("encode", "in", "-o", "out", "--skip-existing", "--quiet")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")
    for command in (("tokens", "in"), ("generate", "--size", "16x16", "-n", "3")):
        assert pqmim(*command, "-o", "more").exit_code == 0
        assert pqmim(*command, "-o", "more").exit_code == 1
        assert pqmim(*command, "-o", "more", "--skip-existing").stderr.startswith("pqmim: 3 of 3 outputs exist ")
    assert pqmim("encode", "in", "-o", "out", "--skip-existing", "-f").exit_code == 2


@pytest.mark.parametrize("inputs", [("a.png", "b.png"), ("in",), ("in", "a.png")])
@pytest.mark.parametrize("output", ["out.pqm", "OUT.PQM", "out.jpg"])
def test_several_outputs_are_not_named_as_one_file(pqmim: Pqmim, inputs: tuple[str, ...], output: str) -> None:
    for name in ("a.png", "b.png", "in/c.png"):
        photo(name)
    result = pqmim("encode", *inputs, "-o", output)
    assert (result.exit_code, files_below(".")) == (2, ["a.png", "b.png", "in/c.png"])
    assert f"{output} is the name of one file; for several, name a folder: {output}{os.sep}" in result.stderr
    assert pqmim("encode", *inputs, "-o", f"{output}/").exit_code == 0
    assert Path(output).is_dir()
    assert pqmim("encode", *inputs, "-o", output, "-f").exit_code == 0


def test_drawings_and_pages_go_to_stdout(pqmim: Pqmim) -> None:
    photo("a.png", (64, 48))
    drawn = pqmim("generate", "-o", "-", "--size", "40x24", "--seed", "3")
    assert (drawn.exit_code, drawn.stderr.split("  ")[:2]) == (0, ["stdout", "40 x 24"])
    assert pqmim("generate", "-o", "out", "--size", "40x24", "--seed", "3").exit_code == 0
    assert drawn.stdout_bytes == Path("out/00.png").read_bytes()
    several = pqmim("generate", "-o", "-", "--size", "40x24", "-n", "2")
    assert (several.exit_code, several.stdout_bytes) == (2, b"")
    page = pqmim("gallery", "a.png", "-o", "-", "--keeps", "1")
    assert (page.exit_code, page.stdout_bytes[:15].lower()) == (0, b"<!doctype html>")
    assert [line.split("  ")[0] for line in page.stderr.splitlines()] == ["a.png", "stdout"]
    patched = pqmim("inpaint", "a.png", "--mask", "-", "-o", "-", stdin=Path("a.png").read_bytes())
    assert patched.stdout_bytes.startswith(b"\x89PNG")
    assert pqmim("inpaint", "-", "--mask", "-", "-o", "b.png", stdin=b"").exit_code == 2
    assert not Path("-").exists()
