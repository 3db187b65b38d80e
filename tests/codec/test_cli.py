"""The command line, from the outside: reports, errors and exit codes, start-up."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from cli_tools import ONE_LINE_ERROR, Pqmim, files_below, photo, run_child
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from pqmim._version import __version__
from pqmim.bitstream import parse
from pqmim.cli import app, main

pytest_plugins = ["cli_fixtures"]


@pytest.mark.parametrize("chosen", [None, "active"])
def test_threads_do_not_spin_unless_the_user_says_so(chosen: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pqmim", "--version"])
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, chosen or "")
        if chosen is None:
            monkeypatch.delenv(name)
    with pytest.raises(SystemExit):
        main()
    assert os.environ["OMP_WAIT_POLICY"] == (chosen or "passive")
    assert os.environ["GOMP_SPINCOUNT"] == (chosen or "0")


@pytest.mark.parametrize(
    ("chosen", "command", "expected"),
    [
        (None, ["models"], "1"),
        ("7", ["models"], "7"),
        (None, ["train", "tokenizer", "-c", "missing.yaml"], None),
    ],
)
def test_products_of_numpy_have_no_threads_of_their_own_but_in_training(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None, command: list[str], expected: str | None
) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", chosen or "")
    if chosen is None:
        monkeypatch.delenv("OPENBLAS_NUM_THREADS")
    CliRunner().invoke(app, command)
    assert os.environ.get("OPENBLAS_NUM_THREADS") == expected


def test_other_files_are_done_after_one_has_failed(pqmim: Pqmim) -> None:
    photo("a.png")
    Path("b.png").write_bytes(b"")
    photo("c.png")
    Path("d").mkdir()
    result = pqmim("encode", "a.png", "b.png", "missing.png", "c.png", "d")
    assert result.exit_code == 1
    assert sorted(Path().glob("*.pqm")) == [Path("a.pqm"), Path("c.pqm")]
    failed = [line.split(": ")[1] for line in result.stderr.splitlines()]
    assert failed == ["d", "b.png", "missing.png"]


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (("encode", "missing.jpg"), "pqmim: missing.jpg: No such file or directory\n"),
        (("encode", "text.png"), "pqmim: text.png: not an image that Pillow can read\n"),
        (("decode", "text.png"), "pqmim: text.png: not a .pqm file\n"),
        (("info", "text.png"), "pqmim: text.png: not a .pqm file\n"),
        (("info", "empty.pqm"), "pqmim: empty.pqm: the file is empty\n"),
        (("encode", "good.png", "-o", "text.png/a.pqm"), "pqmim: good.png: "),
        (("encode", "good.png", "--model", "no-such-model"), "pqmim: "),
        (("eval", ".", "-o", "out", "-m", "no-such-model"), "pqmim: no-such-model: no such model"),
        (("bench", "-o", "out", "-m", "no-such-model"), "pqmim: no-such-model: no such model"),
    ],
)
def test_errors_are_one_line(pqmim: Pqmim, arguments: tuple[str, ...], cause: str) -> None:
    photo("good.png")
    Path("text.png").write_text("not a picture")
    Path("empty.pqm").touch()
    result = pqmim(*arguments, has_model="--model" not in arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert ONE_LINE_ERROR.fullmatch(result.stderr)
    assert result.stderr.startswith(cause)
    assert files_below(".") == ["empty.pqm", "good.png", "text.png"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("encode",),
        ("encode", "a.png", "-q", "101"),
        ("encode", "a.png", "-q", "-0.5"),
        ("encode", "a.png", "-q", "nan"),
        ("encode", "a.png", "--device", "abacus"),
        ("encode", "a.png", "--target-bytes", "0"),
        ("encode", "a.png", "--target-bpp", "nan"),
        ("encode", "a.png", "--target-bpp", "0"),
        ("encode", "a.png", "--target-bpp", "0.1", "--target-bytes", "100"),
        ("encode", "a.png", "--target-bytes", "100", "-q", "50"),
        ("encode", "a.png", "--effort", "0"),
        ("encode", "a.png", "--effort", "99"),
        ("encode", "a.png", "--tune", "taste"),
        ("encode", "a.png", "--keep", "0"),
        ("encode", "a.png", "--keep", "1.5"),
        ("encode", "a.png", "--scale", "3"),
        ("encode", "a.png", "--roi", "1,2,3"),
        ("encode", "a.png", "--roi", "1,2,3,x"),
        ("encode", "a.png", "--roi", "1,2,0,4"),
        ("encode", "a.png", "--roi", "1,2,3,4,-1"),
        ("decode", "a.pqm", "--fill", "magic"),
        ("decode", "a.pqm", "--seed", "-1"),
        ("decode", "a.pqm", "--temperature", "0"),
        ("decode", "a.pqm", "--steps", "0"),
        ("truncate", "a.pqm", "-o", "b.pqm"),
        ("truncate", "a.pqm", "-o", "b.pqm", "--bytes", "100", "--bpp", "1"),
        ("truncate", "a.pqm", "-o", "b.pqm", "--bpp", "-1"),
        ("truncate", "a.pqm", "--bytes", "100"),
        ("truncate", ".", "--bytes", "100"),
        ("generate", "-o", "out", "--size", "768"),
        ("generate", "-o", "out", "--size", "0x16"),
        ("inpaint", "a.png", "-o", "out.png"),
        ("inpaint", "a.png", "-o", "b.png", "--mask", "b.png"),
        ("gallery", "a.png", "-o", "a.html", "--keeps", "1,2"),
        ("gallery", "a.png", "-o", "a.html", "--keeps", "all"),
        ("eval", ".", "-o", "./"),
        ("encode", "a.png", "--threads", "0"),
        ("encode", "a.png", "-j", "0"),
        ("decode", "a.pqm", "-j", "2", "--progress-dir", "steps"),
        ("encode", "a.png", "--no-such-option"),
        ("encode", "a.png", "b.png", "-o", "-"),
        ("encode", "a.png", "b.png", "-o", "a.png"),
        ("encode", "a.png", "-o", "b.png"),
        ("encode", "-", "a.png"),
        ("encode", "-", "-o", "folder/"),
        ("decode", "a.pqm", "-o", "a.heic"),
        ("decode", "a.pqm", "-o", "a.png", "--quality", "90"),
        ("train", "entropy"),
        ("no-such-command",),
    ],
)
def test_wrong_usage_is_exit_code_2(pqmim: Pqmim, arguments: tuple[str, ...]) -> None:
    photo("a.png")
    photo("b.png")
    result = pqmim(*arguments, has_model=False)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Error: " in result.stderr
    assert files_below(".") == ["a.png", "b.png"]


def test_json(pqmim: Pqmim) -> None:
    photo("a.png")
    Path("b.png").touch()
    result = pqmim("encode", "a.png", "b.png", "--json")
    coded, failed = map(json.loads, result.stdout.splitlines())
    size = Path("a.pqm").stat().st_size
    seconds = coded.pop("seconds")
    assert 0 <= seconds < 60
    bpp = round(8 * size / (40 * 24), 6)
    assert coded == {
        "input": "a.png",
        "output": "a.pqm",
        "width": 40,
        "height": 24,
        "bytes": size,
        "bpp": bpp,
        "scale": 1,
        "is_partial": False,
        "warnings": [],
    }
    assert failed["input"] == "b.png"
    assert failed["error"] in result.stderr

    container = parse(Path("a.pqm").read_bytes())
    assert json.loads(pqmim("info", "a.pqm", "--json").stdout) == {
        "input": "a.pqm",
        "width": 40,
        "height": 24,
        "bytes": size,
        "bpp": bpp,
        "scale": 1,
        "is_partial": False,
        "version": 3,
        "is_mini": True,
        "model_id": container.model_id.hex(),
        "model": None,
        "decoders": [],
        "level": container.level,
        "payload_bytes": len(container.payload),
        "alpha_bytes": 0,
        "metadata_bytes": 0,
        "metadata": {},
        "known_share": 1.0,
        "token_check": None,
        "warnings": [],
    }


def test_quiet_and_verbose(pqmim: Pqmim) -> None:
    frames = [Image.new("L", (20, 20), color) for color in (0, 255)]
    frames[0].save("a.gif", save_all=True, append_images=frames[1:])
    loud = pqmim("encode", "a.gif", "-v")
    assert loud.stderr.splitlines()[0].startswith("pqmim: model ")
    assert loud.stderr.splitlines()[1].startswith("pqmim: a.gif: warning: the image has several frames")
    quiet = pqmim("encode", "a.gif", "-f", "--quiet")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")
    failed = pqmim("encode", "a.gif", "--quiet")
    assert failed.exit_code == 1
    assert ONE_LINE_ERROR.fullmatch(failed.stderr)


def test_traceback_only_with_vv(pqmim: Pqmim) -> None:
    assert "Traceback" not in pqmim("decode", "missing.pqm", "-v").stderr
    assert "Traceback" in pqmim("decode", "missing.pqm", "-vv").stderr


def test_odd_file_names_stay_on_one_line(pqmim: Pqmim) -> None:
    try:
        photo("a\nb.png")
    except OSError:
        pytest.skip("this file system does not allow such names")
    result = pqmim("encode", "a\nb.png")
    assert result.exit_code == 0
    assert result.stdout.startswith("a?b.pqm  ")
    assert Path("a\nb.pqm").exists()


def test_unexpected_errors_are_one_line_too(pqmim: Pqmim, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(data: bytes) -> None:
        raise RuntimeError("a\nbug")

    photo("a.png")
    assert pqmim("encode", "a.png").exit_code == 0
    monkeypatch.setattr("pqmim.cli.inspecting.parse", broken)
    result = pqmim("info", "a.pqm")
    assert result.exit_code == 1
    assert result.stderr == "pqmim: a.pqm: internal error: RuntimeError: a bug (-vv shows where)\n"


def test_every_option_is_in_the_manual() -> None:
    manual = (Path(__file__).parents[2] / "docs" / "usage.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^##+ ([^\n]+)\n(.*?)(?=^##|\Z)", manual, re.MULTILINE | re.DOTALL))
    shared = sections["Options that several commands share"]
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        for part in getattr(command, "commands", {"": command}).values():
            for option in (text for parameter in part.params for text in parameter.opts if text[0] == "-"):
                assert option in sections[name] or option in shared, (name, option)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["encode", "--help"],
        ["models"],
        ["info", "a.pqm"],
        ["truncate", "a.pqm", "-o", "b.pqm", "--bytes", "12"],
    ],
)
def test_quick_commands_import_nothing_heavy(pqmim: Pqmim, arguments: list[str]) -> None:
    photo("a.png")
    assert pqmim("encode", "a.png").exit_code == 0
    code = (
        "import sys, pqmim.cli\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "try: pqmim.cli.main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'onnxruntime'} & sys.modules.keys()\n"
    )
    child = run_child("-c", code)
    assert child.returncode == 0, child.stderr


def test_as_a_module(tmp_path: Path) -> None:
    child = run_child("-m", "pqmim", "--version")
    assert (child.returncode, child.stdout) == (0, f"pqmim {__version__}\n")
    child = run_child("-m", "pqmim", "decode", "missing.pqm", cwd=tmp_path)
    assert (child.returncode, child.stdout) == (1, "")
    assert child.stderr == "pqmim: missing.pqm: No such file or directory\n"
