"""What is read: folders and what is left out of them, odd paths, files that claim too much."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_tools import ONE_LINE_ERROR, Pqmim, files_below, no_rights, photo
from PIL import Image

from pqmim import codec
from pqmim.bitstream import MAX_DIMENSION, Container, pack
from pqmim.cli import kinds
from pqmim.errors import ImageError

pytest_plugins = ["cli_fixtures"]

POSIX_ONLY = pytest.mark.skipif(os.name != "posix", reason="links, pipes and rights of POSIX")
LONG_NAME = 300 * "x"


@pytest.fixture
def no_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no optional package is installed."""
    monkeypatch.setattr(kinds, "find_spec", lambda package: None)


@POSIX_ONLY
def test_what_a_folder_holds_and_is_left_out_is_counted(pqmim: Pqmim, no_plugins: None) -> None:
    photo("in/a.png")
    for name in ("b.heic", "c.HEIC", "d.jxl", "e.dng", "f.nef", "README", "notes.txt", ".hidden"):
        Path("in", name).write_bytes(b"something")
    os.mkfifo("in/pipe.png")  # would block for good
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("in/socket.png")
    os.symlink(".", "in/again")
    result = pqmim("encode", "in", "-o", "out")
    assert (result.exit_code, files_below("out")) == (0, ["a.pqm"])
    assert result.stderr == (
        "pqmim: in: warning: left out: 1 x .dng (raw photo; run: pip install 'pqmim[raw]'), "
        "2 x .heic (run: pip install 'pqmim[heif]'), 1 x .jxl (run: pip install pillow-jxl-plugin), "
        "1 x .nef (raw photo; run: pip install 'pqmim[raw]'), 1 x file without an extension, 1 x link to a folder, "
        "2 x pipe or device\n"
    )
    told = pqmim("encode", "in", "-o", "out", "-f", "-v").stderr
    assert "pqmim: in: files of other kinds: 1 x .txt\n" in told
    assert pqmim("encode", "in", "-o", "out", "-f", "--quiet").stderr == ""


@POSIX_ONLY
def test_linked_files_are_taken_and_lost_ones_reported(pqmim: Pqmim) -> None:
    photo("a.png")
    Path("in").mkdir()
    os.symlink("../a.png", "in/b.png")
    os.symlink("../missing.png", "in/c.png")
    result = pqmim("encode", "in", "-o", "out")
    assert (result.exit_code, files_below("out")) == (1, ["b.pqm"])
    assert result.stderr == f"pqmim: {Path('in/c.png')}: No such file or directory\n"


def test_optional_formats_are_taken_where_their_package_is(pqmim: Pqmim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "find_spec", lambda package: package == "pillow_heif" or None)
    assert {".heic", ".hif"} <= kinds.image_suffixes()
    assert not {".jxl", ".dng"} & kinds.image_suffixes()


@pytest.mark.usefixtures("no_plugins")
@pytest.mark.parametrize("command", ["encode", "tokens"])
def test_stills_with_a_preview_are_pictures(pqmim: Pqmim, command: str) -> None:
    frames = [Image.new("RGB", size, "red") for size in ((64, 48), (32, 24))]
    Path("in").mkdir()
    frames[0].save("in/camera.mpo", format="MPO", save_all=True, append_images=frames[1:])
    result = pqmim(command, "in", "-o", "out")
    assert (result.exit_code, result.stderr) == (0, "")
    assert files_below("out") == [f"camera.{'pqm' if command == 'encode' else 'npy'}"]
    assert pqmim("encode", "in/camera.mpo").exit_code == 0
    assert Path("in/camera.pqm").exists()


@POSIX_ONLY
def test_names_that_no_system_takes(pqmim: Pqmim) -> None:
    photo("a.png")
    os.symlink("loop", "loop")
    result = pqmim("encode", LONG_NAME, "loop", "a.png")
    assert (result.exit_code, Path("a.pqm").exists()) == (1, True)
    assert [line.rsplit(": ")[-1] for line in result.stderr.splitlines()] == [
        "File name too long",
        "Too many levels of symbolic links",
    ]
    commands: tuple[tuple[str, ...], ...] = (
        ("info", LONG_NAME),
        ("encode", "a.png", "-o", f"{LONG_NAME}.pqm"),
        ("encode", "a.png", "-o", f"{LONG_NAME}/"),
        ("encode", "a.png", "-o", "loop"),
        ("encode", "a.png", "-o", "loop", "-f"),
        ("encode", "a.png", "-f", "-m", LONG_NAME),
        ("encode", "a.png", "-f", "-m", "loop"),
        ("decode", "a.pqm", "-o", f"{LONG_NAME}.png"),
        ("decode", "a.pqm", "-o", "b.png", "--progress-dir", LONG_NAME),
        ("truncate", "a.pqm", "-o", f"{LONG_NAME}.pqm", "--bytes", "20"),
        ("tokens", "a.png", "-o", f"{LONG_NAME}.npy"),
        ("generate", "-o", LONG_NAME, "--size", "16x16"),
        ("inpaint", "a.png", "--mask", LONG_NAME, "-o", "b.png"),
        ("inpaint", "a.png", "--mask", "a.png", "-o", f"{LONG_NAME}.png"),
        ("gallery", "a.png", "-o", f"{LONG_NAME}.html"),
        ("gallery", LONG_NAME, "-o", "a.html"),
    )
    for command in commands:
        result = pqmim(*command, has_model="-m" not in command)
        assert result.exit_code == 1, command
        assert ONE_LINE_ERROR.fullmatch(result.stderr), command
        assert LONG_NAME[:200] in result.stderr or "loop" in result.stderr, command


@POSIX_ONLY
def test_paths_that_the_user_may_not_enter(pqmim: Pqmim, tiny_model: Path) -> None:
    photo("a.png")
    photo("locked/b.png")
    model = Path("model.safetensors")
    model.write_bytes((tiny_model / "model.safetensors").read_bytes())
    for command in (("encode", "a.png"), ("decode", "a.pqm", "-f"), ("gallery", "a.png", "-o", "a.html")):
        assert pqmim(*command).exit_code == 0  # imports all that is needed while that is allowed
    Path("locked").chmod(0)
    model.chmod(0)
    Path().chmod(0o777)
    cases: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("locked/b.pqm", ("encode", "locked/b.png")),
        ("locked/b.png", ("encode", "locked/b.png", "-o", "b.pqm")),
        ("locked", ("info", "locked")),
        ("locked/a.pqm", ("encode", "a.png", "-o", "locked/a.pqm")),
        ("locked/a.pqm", ("encode", "a.png", "-o", "locked/")),
        ("locked/x/00.png", ("generate", "-o", "locked/x", "--size", "16x16")),
        ("locked/a.html", ("gallery", "a.png", "-o", "locked/a.html")),
        ("locked/b.png", ("inpaint", "a.png", "--mask", "locked/b.png", "-o", "c.png")),
        ("locked/c.png", ("inpaint", "a.png", "--mask", "a.png", "-o", "locked/c.png")),
        ("locked/a.step01.png", ("decode", "a.pqm", "-f", "--progress-dir", "locked")),
        ("locked/m", ("encode", "a.png", "-f", "-m", "locked/m")),
        ("model.safetensors", ("encode", "a.png", "-f", "-m", "model.safetensors")),
    )
    try:
        with no_rights():
            for name, command in cases:
                result = pqmim(*command, has_model="-m" not in command)
                assert result.exit_code == 1, command
                first = result.stderr.splitlines()[0]
                assert first.startswith("pqmim: "), command
                assert first.endswith(f"{name}: Permission denied"), command
            others = pqmim("encode", "locked/b.png", "a.png", "-o", "new")
            assert (others.stderr, files_below("new")) == ("pqmim: locked/b.png: Permission denied\n", ["a.pqm"])
    finally:
        Path("locked").chmod(0o700)


@POSIX_ONLY
@pytest.mark.parametrize(
    "command",
    [
        "encode a.png",
        "info a.pqm",
        "generate -o out --size 16x16",
        "gallery a.png -o a.html",
        "inpaint a.png --mask b.png -o c.png",
        "eval . -o out",
        "truncate a.pqm -o b.pqm --bytes 12",
    ],
)
def test_a_current_folder_that_was_deleted(pqmim: Pqmim, command: str) -> None:
    Path("gone").mkdir()
    os.chdir("gone")
    Path("../gone").rmdir()
    result = pqmim(*command.split())
    assert (result.exit_code, result.stderr) == (1, "pqmim: No such file or directory\n")


def test_a_file_may_be_named_as_the_streams_are(pqmim: Pqmim) -> None:
    photo("a.png").rename("-")
    assert pqmim("encode", "./-").exit_code == 0
    assert pqmim("decode", "./-.pqm", "-o", "./b.png").exit_code == 0
    assert {"-", "-.pqm", "b.png"} == set(files_below("."))
    assert pqmim("info", "-", stdin=Path("-.pqm").read_bytes()).stdout.startswith("stdin  40 x 24  ")


def claim(width: int, height: int, payload: bytes, model_id: bytes = b"\x97\x26", scale: int = 1) -> bytes:
    return pack(Container(width, height, model_id.ljust(4, b"\0"), 2, scale, payload, is_partial=True))


@pytest.mark.parametrize(
    ("width", "height", "scale", "num_bytes", "is_decoded"),
    [
        (10_000, 10_000, 1, 0, False),
        (MAX_DIMENSION, 1, 1, 0, False),
        (MAX_DIMENSION, MAX_DIMENSION, 8, 100, False),
        (10_000, 10_000, 1, 100_000, False),
        (2_000, 1_000, 1, 10, False),
        (768, 512, 1, 0, True),
        (6_144, 4_096, 8, 0, True),
        (2_000, 1_000, 1, 500, True),
    ],
)
def test_a_header_costs_no_more_than_its_bytes_deserve(
    pqmim: Pqmim,
    monkeypatch: pytest.MonkeyPatch,
    width: int,
    height: int,
    scale: int,
    num_bytes: int,
    is_decoded: bool,
) -> None:
    decoded = []

    def load_codec(model: str, decoder: None, **options: Any) -> Any:
        return SimpleNamespace(name=model, model_id=b"", decoder_name="fine", decode_tokens=decode_tokens)

    def decode_tokens(data: bytes) -> Any:
        import numpy as np

        decoded.append(data)
        return np.array([-1, 0, 1, 2])

    monkeypatch.setattr(codec, "load_codec", load_codec)
    Path("claim.pqm").write_bytes(claim(width, height, bytes(num_bytes), scale=scale))
    result = pqmim("info", "claim.pqm", "--json", "-m", "any")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["known_share"] == (0.75 if is_decoded else None)
    assert len(decoded) == is_decoded
    text = pqmim("info", "claim.pqm", "-m", "any").stdout
    assert ("holds 75.0 % of the tokens" if is_decoded else "holds an unknown share of the tokens") in text


def bad_alloc() -> None:
    raise RuntimeError("std::bad_alloc")


def out_of_memory() -> None:
    raise MemoryError


def wrapped() -> None:
    try:
        out_of_memory()
    except MemoryError as error:
        raise ImageError("damaged image: MemoryError") from error


def from_the_system() -> None:
    raise OSError(12, os.strerror(12))


@pytest.mark.parametrize("fail", [bad_alloc, out_of_memory, wrapped, from_the_system])
def test_too_little_memory_is_called_that(
    pqmim: Pqmim, monkeypatch: pytest.MonkeyPatch, fail: Callable[[], None]
) -> None:
    photo("a.png")
    assert pqmim("encode", "a.png").exit_code == 0
    for method in ("encode", "decode_with_report", "encode_tokens", "generate", "inpaint"):
        monkeypatch.setattr(codec.Codec, method, lambda *args, **options: fail())
    for command, name in (
        (("encode", "a.png", "-f"), "a.png"),
        (("decode", "a.pqm", "-f"), "a.pqm"),
        (("tokens", "a.png"), "a.png"),
        (("generate", "-o", "out", "--size", "16x16"), str(Path("out/00.png"))),
        (("inpaint", "a.png", "--mask", "a.png", "-o", "b.png"), "a.png"),
        (("gallery", "a.png", "-o", "a.html"), "a.png"),
    ):
        result = pqmim(*command)
        assert (result.exit_code, result.stderr) == (1, f"pqmim: {name}: out of memory\n"), command


def test_numbers_beyond_all_measure(pqmim: Pqmim) -> None:
    photo("a.png")
    assert pqmim("encode", "a.png", "-q", "90").exit_code == 0
    coded = Path("a.pqm").read_bytes()
    for option, value in (("--bytes", str(10**30)), ("--bpp", "1e308")):
        assert pqmim("truncate", "a.pqm", "-o", "b.pqm", option, value, "-f").exit_code == 0
        assert Path("b.pqm").read_bytes() == coded
    for size in (f"{10**9}x1", f"1{5000 * '0'}x1", "1x1e9"):
        assert pqmim("generate", "-o", "out", "--size", size).exit_code == 2
    limited = pqmim("generate", "-o", "out", "--size", "999999999x999999999")
    assert limited.exit_code == 1
    assert ONE_LINE_ERROR.fullmatch(limited.stderr)
    for option, value in (("--sizes", "0"), ("--sizes", "64,-1"), ("--threads", "-1"), ("--sizes", "")):
        result = pqmim("bench", "-o", "out", option, value)
        assert (result.exit_code, result.stdout) == (2, ""), (option, value)
    assert pqmim("bench", "-o", "out", "--image", "missing.png").stderr == (
        "pqmim: missing.png: No such file or directory\n"
    )
    assert not Path("out").exists()


@pytest.mark.parametrize("command", ["eval", "bench"])
def test_commands_that_need_a_folder_do_not_take_stdout(pqmim: Pqmim, command: str) -> None:
    Path("in").mkdir()
    result = pqmim(command, *(["in"] if command == "eval" else []), "-o", "-")
    assert (result.exit_code, files_below(".")) == (2, [])
    assert not Path("-").exists()
    assert pqmim("decode", "a.pqm", "--progress-dir", "-").exit_code == 2
