"""Standard streams of real processes: all bytes or an error, closed ones, terminals, completion of the shell."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_tools import ONE_LINE_ERROR, Pqmim, photo

from pqmim.bitstream import parse
from pqmim.reporting import Reporter

pytest_plugins = ["cli_fixtures"]
fcntl = pytest.importorskip("fcntl")
resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="streams of POSIX")

PQMIM = [sys.executable, "-m", "pqmim"]
FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


def child(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 60, "check": False} | options
    return subprocess.run([*PQMIM, *arguments], **options)


def shell(redirections: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    command = shlex.join([*PQMIM, *arguments]) + " " + redirections
    return subprocess.run(command, shell=True, capture_output=True, timeout=60, check=False)


@pytest.fixture
def model(tiny_model: Path) -> tuple[str, str]:
    return "-m", str(tiny_model)


@pytest.fixture
def coded(pqmim: Pqmim) -> bytes:
    """Content of a.pqm, made of a.png."""
    photo("a.png", (96, 96))
    assert pqmim("encode", "a.png").exit_code == 0
    return Path("a.pqm").read_bytes()


@pytest.mark.skipif(not Path("/dev/stdout").exists(), reason="needs /dev/stdout")
@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "link"])
def test_stdout_by_its_path(coded: bytes, model: tuple[str, str], name: str) -> None:
    os.symlink("/dev/stdout", "link")
    before = os.lstat(name)
    result = shell("> out.pqm", "encode", "a.png", "-o", name, "-f", *model)
    assert (result.returncode, result.stdout) == (0, b"")
    assert Path("out.pqm").read_bytes() == coded
    assert result.stderr.startswith(b"stdout  ")
    piped = shell("| cat", "encode", "a.png", "-o", name, *model)
    assert piped.stdout == coded
    assert os.lstat(name).st_mode == before.st_mode
    assert os.path.islink("link")


def decode_to(stdout: Any, model: tuple[str, str], **options: Any) -> subprocess.CompletedProcess[bytes]:
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    return child("decode", "a.pqm", "-o", "-", *model, stdout=stdout, env=env, **options)


@FULL
def test_a_full_disk_is_an_error(coded: bytes, model: tuple[str, str]) -> None:
    with Path("/dev/full").open("wb") as full:
        result = decode_to(full, model)
    assert (result.returncode, result.stderr) == (1, b"pqmim: a.pqm: stdout: No space left on device\n")


def test_a_short_write_is_followed_by_another_or_an_error(coded: bytes, model: tuple[str, str]) -> None:
    whole = decode_to(subprocess.PIPE, model).stdout

    def limit(size: int) -> Callable[[], None]:
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    with Path("out.png").open("wb") as file:
        result = decode_to(file, model, preexec_fn=limit(len(whole) // 2))
    assert Path("out.png").read_bytes() == whole[: len(whole) // 2]
    assert (result.returncode, result.stderr) == (1, b"pqmim: a.pqm: stdout: File too large\n")
    with Path("out.png").open("wb") as file:
        assert decode_to(file, model, preexec_fn=limit(len(whole))).returncode == 0
    assert Path("out.png").read_bytes() == whole


def test_a_pipe_that_does_not_block_gets_all_bytes(pqmim: Pqmim, model: tuple[str, str]) -> None:
    photo("a.png", (400, 400))
    assert pqmim("encode", "a.png").exit_code == 0
    whole = decode_to(subprocess.PIPE, model).stdout
    reader, writer = os.pipe()
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(writer, False)
    command = [*PQMIM, "decode", "a.pqm", "-o", "-", *model]
    with subprocess.Popen(command, stdout=writer, stderr=subprocess.PIPE) as process:
        os.close(writer)
        got = b""
        while piece := os.read(reader, 3000):
            got += piece
            time.sleep(0.001)  # slower than it is written
        os.close(reader)
        assert process.wait(60) == 0
        assert process.stderr is not None
        assert process.stderr.read().startswith(b"stdout  ")
    assert len(whole) > 8192
    assert got == whole


@FULL
@pytest.mark.parametrize("command", ["--version", "--help", "encode --help", "models", "info a.pqm", "models --json"])
def test_reports_that_cannot_be_written_are_one_line(coded: bytes, command: str) -> None:
    result = shell("> /dev/full", *command.split())
    assert result.returncode == 1
    assert ONE_LINE_ERROR.fullmatch(result.stderr.decode())
    assert b"stdout: No space left on device" in result.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_failure(coded: bytes, model: tuple[str, str], closed: str) -> None:
    result = shell(closed, "encode", "a.png", "-o", "c.pqm", *model)
    assert (result.returncode, result.stderr) == (0, b"")
    assert Path("c.pqm").read_bytes() == coded
    assert shell(closed, "--version").returncode == 0
    assert shell(closed, "encode", "missing.png", *model).returncode == 1
    assert shell(closed, "encode", "--no-such-option").returncode == 2


def test_closed_streams_that_are_needed_are_a_failure(coded: bytes, model: tuple[str, str]) -> None:
    lost = shell(">&-", "encode", "a.png", "-o", "-", *model)
    assert (lost.returncode, lost.stderr) == (1, b"pqmim: a.png: stdout is closed\n")
    missing = shell("<&-", "decode", "-", *model)
    assert (missing.returncode, missing.stderr) == (1, b"pqmim: stdin: the file is empty\n")


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a pseudo-terminal: (what a person reads, what a program writes to)."""
    pty = pytest.importorskip("pty")
    reader, writer = pty.openpty()
    yield reader, writer
    os.close(reader)
    os.close(writer)


def test_binary_does_not_go_to_a_terminal(coded: bytes, model: tuple[str, str], terminal: tuple[int, int]) -> None:
    reader, writer = terminal
    for arguments in (("decode", "a.pqm", "-o", "-"), ("encode", "-"), ("encode", "a.png", "-o", "/dev/stdout")):
        with Path("a.png").open("rb") as file:
            result = child(*arguments, *model, stdin=file, stdout=writer)
        assert result.returncode == 1
        cause = "stdout is a terminal; -o FILE writes a file, -f writes to the terminal"
        assert result.stderr.decode().endswith(f": {cause}\n")
    forced = child("encode", "a.png", "-o", "-", "-f", *model, stdout=writer)
    assert forced.returncode == 0
    assert os.read(reader, 1 << 16).replace(b"\r\n", b"\n") == coded


def test_progress_bar_on_a_terminal_only(coded: bytes, model: tuple[str, str], terminal: tuple[int, int]) -> None:
    Path("b.pqm").write_bytes(coded)
    reader, writer = terminal
    result = child("info", "a.pqm", "b.pqm", stderr=writer)
    assert (result.returncode, len(result.stdout.splitlines())) == (0, 2)
    assert b"files" in os.read(reader, 1 << 16)


def test_bar_of_one_file_that_takes_long(monkeypatch: pytest.MonkeyPatch, terminal: tuple[int, int]) -> None:
    reader, writer = terminal
    with os.fdopen(os.dup(writer), "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        reporter = Reporter()
        reporter.part("search", 1, 4)  # no bar, nothing to show
        with reporter.progress(1) as advance:
            reporter.part("search", 1, 4)  # it may be done at once
            monkeypatch.setattr("pqmim.reporting.LONG_SECONDS", 0.0)
            reporter.part("search", 2, 4)
            reporter.part("tokens", 1, 3)
            advance()
        with Reporter(quiet=True).progress(1):
            reporter.part("search", 3, 4)
    shown = os.read(reader, 1 << 16)
    assert b"search" in shown
    assert b"2/4" in shown
    assert b"1/4" not in shown
    assert b"files" not in shown


def test_no_bar_in_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("pqmim.reporting.LONG_SECONDS", 0.0)
    for total in (1, 2):
        with (reporter := Reporter()).progress(total) as advance:
            reporter.part("search", 2, 4)
            advance()
    assert capsys.readouterr().err == ""


def test_closed_pipe_is_silent(coded: bytes) -> None:
    with subprocess.Popen([*PQMIM, "info", "a.pqm"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_json_that_cannot_be_written_does_not_hide_the_others(coded: bytes, model: tuple[str, str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    photo("b.png")
    result = shell("> /dev/full", "encode", "missing.png", "a.png", "b.png", "-f", "--json", *model)
    lines = result.stderr.decode().splitlines()
    assert (result.returncode, len(lines)) == (1, 3)
    assert lines[0] == "pqmim: missing.png: No such file or directory"
    assert parse(Path("b.pqm").read_bytes()).width == 40


@pytest.mark.parametrize("which", ["bash", "zsh", "fish"])
def test_shells_complete_commands_options_and_models(tmp_path: Path, which: str) -> None:
    def completions(line: str) -> str:
        words = {"bash": {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}}
        others = {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        env = os.environ | {"_PQMIM_COMPLETE": f"complete_{which}"} | words.get(which, others)
        return child(env=env).stdout.decode()

    assert "truncate" in completions("pqmim tr")
    assert "--target-bytes" in completions("pqmim encode --target")
    assert "photo" in completions("pqmim encode --model ph")
    assert "fine" in completions("pqmim encode --for fi")
    assert "fast" in completions("pqmim decode --decoder fa")


def test_warnings_are_in_the_json_records(pqmim: Pqmim) -> None:
    photo("a.png")
    result = pqmim("encode", "a.png", "--target-bytes", "3", "--roi", "99,99,5,5", "--json")
    record = json.loads(result.stdout)
    assert record["warnings"] == [
        "no file of 3 bytes is possible, this is the smallest",
        "region 99,99 lies outside the image",
    ]
    assert [line.split(": warning: ")[1] for line in result.stderr.splitlines()] == record["warnings"]
    quiet = pqmim("encode", "a.png", "--target-bytes", "3", "--json", "--quiet", "-f")
    assert (len(json.loads(quiet.stdout)["warnings"]), quiet.stderr) == (1, "")
