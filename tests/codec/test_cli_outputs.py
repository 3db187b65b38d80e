"""Where outputs go: names, folders, streams; what is never overwritten; what is there or not there after a failure."""

import os
import re
from pathlib import Path

import pytest
from cli_tools import RESULT_LINE, Pqmim, files_below, photo

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
