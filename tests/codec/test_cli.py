"""The command line, from the outside: files, streams, reports and exit codes."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner, Result

from pqmim import files
from pqmim._version import __version__
from pqmim.bitstream import parse, smallest_size
from pqmim.cli import app, main
from pqmim.errors import OutputError

RESULT_LINE = re.compile(r"\S+\.pqm  [\d,]+ B  \d+\.\d{3} bpp  \d+\.\d{2} s")
NEED_MODEL = ("encode", "decode", "tokens", "generate", "inpaint", "gallery")
ONE_LINE_ERROR = re.compile(r"pqmim: [^\n]+\n")

Pqmim = Callable[..., Result]


@pytest.fixture
def pqmim(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pqmim:
    """Runs a command in an empty folder; commands that code use the tiny model unless they say otherwise."""
    monkeypatch.chdir(tmp_path)

    def run(command: str, *arguments: str, stdin: bytes | None = None, has_model: bool = True) -> Result:
        model = ["--model", str(tiny_model)] if command in NEED_MODEL and has_model else []
        return CliRunner().invoke(app, [command, *model, *arguments], input=stdin)

    return run


def photo(path: str, size: tuple[int, int] = (40, 24), mode: str = "RGB") -> Path:
    """Write a small smooth picture and return its path."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([4 * x, 6 * y, 255 - 2 * x - 2 * y], axis=-1).clip(0, 255).astype(np.uint8)
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rgb).convert(mode).save(file)
    return file


def opened(path: str | Path) -> Image.Image:
    """Read a picture and close its file."""
    with Image.open(path) as image:
        image.load()
        return image


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(opened(path))


def files_below(folder: str) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


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


def test_encode_and_decode_a_file(pqmim: Pqmim) -> None:
    photo("kodim01.jpg")
    result = pqmim("encode", "kodim01.jpg", "-q", "62.5")
    assert (result.exit_code, result.stderr) == (0, "")
    assert RESULT_LINE.fullmatch(result.stdout.strip())
    size = Path("kodim01.pqm").stat().st_size
    assert result.stdout.startswith(f"kodim01.pqm  {size:,} B  {8 * size / (40 * 24):.3f} bpp  ")

    result = pqmim("decode", "kodim01.pqm")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(f"kodim01.png  40 x 24  {size:,} B  ")
    with Image.open("kodim01.png") as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (40, 24))


def test_alpha_comes_back(pqmim: Pqmim) -> None:
    photo("a.png", mode="RGBA")
    assert pqmim("encode", "a.png", "-o", "b.pqm").exit_code == 0
    assert pqmim("decode", "b.pqm").exit_code == 0
    with Image.open("b.png") as image:
        assert image.mode == "RGBA"


def test_quality_changes_the_file(pqmim: Pqmim) -> None:
    photo("a.png", (96, 96))
    for quality in ("0", "100"):
        assert pqmim("encode", "a.png", "-q", quality, "-o", f"{quality}.pqm").exit_code == 0
    assert Path("0.pqm").read_bytes() != Path("100.pqm").read_bytes()


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
        (("train", "tokenizer", "-c", "missing.yaml"), "pqmim: missing.yaml: No such file or directory\n"),
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
        "version": 2,
        "is_mini": True,
        "model_id": container.model_id.hex(),
        "model": None,
        "level": container.level,
        "payload_bytes": len(container.payload),
        "alpha_bytes": 0,
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


def test_tokens_of_an_image_are_those_of_its_file(pqmim: Pqmim) -> None:
    photo("a.png")
    assert pqmim("encode", "a.png", "-q", "30").exit_code == 0
    result = pqmim("tokens", "a.png", "a.pqm", "-q", "30")
    assert (result.exit_code, result.stderr) == (0, "")
    of_image, of_file = np.load("a.png.npy"), np.load("a.pqm.npy")
    assert (of_image.dtype, of_image.shape) == (np.uint16, (3, 2, 3))
    np.testing.assert_array_equal(of_image, of_file)
    assert result.stdout.startswith("a.png.npy  3 x 2 x 3 tokens  ")


def test_targets_are_met(pqmim: Pqmim) -> None:
    photo("a.png", (96, 96))
    for option, value, limit in (("--target-bytes", "30", 30), ("--target-bpp", "0.03", 34)):
        result = pqmim("encode", "a.png", option, value, "-f")
        assert (result.exit_code, result.stderr) == (0, "")
        assert 20 <= Path("a.pqm").stat().st_size <= limit


def test_target_that_cannot_be_met(pqmim: Pqmim) -> None:
    photo("a.png")
    result = pqmim("encode", "a.png", "--target-bytes", "3")
    assert result.exit_code == 0
    size = Path("a.pqm").stat().st_size
    assert size == smallest_size(Path("a.pqm").read_bytes()) > 3
    assert result.stderr == "pqmim: a.png: warning: no file of 3 bytes is possible, this is the smallest\n"
    assert "  partial  " in result.stdout
    result = pqmim("encode", "a.png", "--target-bytes", "3", "--strict", "-f")
    assert result.exit_code == 1
    assert result.stderr == f"pqmim: a.png: no file of 3 bytes is possible; the smallest has {size}\n"


def test_scale_and_keep_are_told(pqmim: Pqmim) -> None:
    photo("a.png", (96, 96))
    result = pqmim("encode", "a.png", "--scale", "2", "--keep", "0.5")
    assert "  scale 2  partial  " in result.stdout
    record = json.loads(pqmim("encode", "a.png", "-f", "--scale", "2", "--keep", "0.5", "--json").stdout)
    assert (record["scale"], record["is_partial"]) == (2, True)


def test_options_that_choose_tokens(pqmim: Pqmim) -> None:
    photo("a.png", (96, 96))
    made = set()
    variants = ([], ["--effort", "1"], ["--tune", "ms-ssim"], ["--roi", "0,0,50,50", "--roi", "64,64,32,32,0.1"])
    for options in variants:
        result = pqmim("encode", "a.png", "-f", "-q", "80", *options)
        assert (result.exit_code, result.stderr) == (0, ""), options
        made.add(Path("a.pqm").read_bytes())
    assert len(made) > 1
    outside = pqmim("encode", "a.png", "-f", "--roi", "96,0,10,10")
    assert (outside.exit_code, outside.stderr) == (0, "pqmim: a.png: warning: region 96,0 lies outside the image\n")


@pytest.fixture
def partial_files(pqmim: Pqmim) -> Path:
    """Folder with two files that hold a part of their tokens, one of them a level deeper."""
    photo("in/a.png", (96, 96))
    photo("in/deep/a.png", (64, 96))
    assert pqmim("encode", "in", "-o", "partial", "--keep", "0.4").exit_code == 0
    return Path("partial")


def test_provenance_of_filled_pictures(pqmim: Pqmim, partial_files: Path) -> None:
    source = str(partial_files / "a.pqm")
    result = pqmim("decode", source, "-o", "likely.png")
    share = re.findall(r"  (\d+\.\d %) invented  ", result.stdout)[0]
    record = json.loads(pqmim("decode", source, "-o", "none.png", "--fill", "none", "--json").stdout)
    assert record["invented_share"] == pytest.approx(float(share.rstrip(" %")) / 100, abs=0.001)
    assert 0.5 < record["invented_share"] < 0.7
    options = ("--fill", "sample", "--seed", "3", "--temperature", "0.5", "--steps", "4")
    for name in ("sample.png", "again.png"):
        assert pqmim("decode", source, "-o", name, *options).exit_code == 0
    assert pqmim("decode", source, "-o", "other.png", *options, "--seed", "4").exit_code == 0

    def comment(name: str) -> Any:
        return opened(name).info.get("Comment")

    begin = f"pqmim: {share} of the tokens were not in the file and were filled"
    assert comment("likely.png") == f"{begin} (likely)"
    assert comment("none.png") == f"{begin} (none)"
    assert comment("sample.png") == f"{begin} (sample, seed 3, temperature 0.5, 4 steps)"
    assert Path("sample.png").read_bytes() == Path("again.png").read_bytes()
    assert len({pixels(f"{name}.png").tobytes() for name in ("likely", "none", "sample", "other")}) == 4

    assert pqmim("encode", "in/a.png", "-o", "whole.pqm").exit_code == 0
    whole = pqmim("decode", "whole.pqm", "--json")
    assert json.loads(whole.stdout)["invented_share"] == 0
    assert comment("whole.png") is None
    assert "invented" not in pqmim("decode", "whole.pqm", "-f").stdout


def test_progress_pictures(pqmim: Pqmim, partial_files: Path) -> None:
    decode = ("decode", str(partial_files), "-o", "out", "--progress-dir", "steps/new")
    assert pqmim(*decode).exit_code == 0
    made = files_below("steps/new")
    assert {"a.step01.png", "a.step02.png", "a-2.step01.png"} <= set(made)
    sizes = {name: opened(Path("steps/new", name)).size for name in made}
    assert {sizes["a.step01.png"], sizes["a-2.step01.png"]} == {(96, 96), (64, 96)}
    last = max(name for name in made if name.startswith("a.step"))
    np.testing.assert_array_equal(pixels(Path("steps/new", last)), pixels("out/a.png"))

    decode = ("decode", str(partial_files / "a.pqm"), "-o", "b.png", "--progress-dir", "steps")
    assert pqmim(*decode).exit_code == 0
    assert "b.step01.png" in files_below("steps")
    Path("b.png").unlink()
    refused = pqmim(*decode)
    assert (refused.exit_code, Path("b.png").exists()) == (1, False)
    assert "b.step01.png exists already" in refused.stderr
    assert pqmim(*decode, "-f").exit_code == 0


def test_salvage(pqmim: Pqmim) -> None:
    photo("a.png", (96, 96))
    assert pqmim("encode", "a.png", "-q", "100").exit_code == 0
    Path("b.pqm").write_bytes(Path("a.pqm").read_bytes()[:-10])
    refused = pqmim("decode", "b.pqm")
    assert (refused.exit_code, files_below(".")) == (1, ["a.png", "a.pqm", "b.pqm"])
    result = pqmim("decode", "b.pqm", "--salvage")
    assert result.exit_code == 0
    assert result.stderr == "pqmim: b.pqm: warning: checksum mismatch: cut or damaged\n"
    assert " % invented  " in result.stdout
    image = opened("b.png")
    assert image.size == (96, 96)
    assert image.info["Comment"].endswith("; salvaged: checksum mismatch: cut or damaged")
    record = json.loads(pqmim("decode", "b.pqm", "--salvage", "-f", "--json").stdout)
    assert record["problem"] == "checksum mismatch: cut or damaged"
    assert 0 < record["invented_share"] < 1

    whole = pqmim("decode", "a.pqm", "--salvage", "-o", "whole.png", "--json")
    assert (whole.stderr, json.loads(whole.stdout)["problem"]) == ("", None)
    Path("c.pqm").write_bytes(b"something else")
    assert pqmim("decode", "c.pqm", "--salvage").exit_code == 1


def test_truncate(pqmim: Pqmim) -> None:
    photo("in/a.png", (96, 96))
    photo("in/deep/b.png", (96, 64))
    assert pqmim("encode", "in", "-o", "full", "-q", "100").exit_code == 0
    result = pqmim("truncate", "full", "-o", "cut", "--bytes", "25")
    assert (result.exit_code, result.stderr) == (0, "")
    assert files_below("cut") == ["a.pqm", "deep/b.pqm"]
    assert [Path("cut", name).stat().st_size for name in files_below("cut")] == [25, 25]
    assert "  partial  " in result.stdout.splitlines()[0]
    assert pqmim("decode", "cut", "-o", "out").exit_code == 0

    assert pqmim("truncate", "full/a.pqm", "-o", "a.pqm", "--bpp", "0.02").exit_code == 0
    assert Path("a.pqm").stat().st_size == int(0.02 * 96 * 96 / 8)
    piped = pqmim("truncate", "-", "--bytes", "25", stdin=Path("full/a.pqm").read_bytes())
    assert piped.stdout_bytes == Path("cut/a.pqm").read_bytes()
    unchanged = pqmim("truncate", "full/a.pqm", "-o", "same.pqm", "--bytes", "100000")
    assert "partial" not in unchanged.stdout
    assert Path("same.pqm").read_bytes() == Path("full/a.pqm").read_bytes()

    too_small = pqmim("truncate", "full/a.pqm", "-o", "b.pqm", "--bytes", "5")
    smallest = smallest_size(Path("full/a.pqm").read_bytes())
    assert too_small.exit_code == 1
    assert too_small.stderr.endswith(f"no file of 5 bytes is possible; the smallest has {smallest}\n")
    itself = pqmim("truncate", "a.pqm", "-o", "a.pqm", "--bytes", "20", "-f")
    assert (itself.exit_code, itself.stderr) == (1, "pqmim: a.pqm: a.pqm is an input and is not overwritten\n")


def test_info_of_partial_files(pqmim: Pqmim, partial_files: Path, tiny_model: Path) -> None:
    source = str(partial_files / "a.pqm")
    unknown = pqmim("info", source, "-v")
    assert unknown.exit_code == 0
    assert "  partial  mini form  " in unknown.stdout
    assert "  holds an unknown share of the tokens" in unknown.stdout
    assert "which is not a shipped one" in unknown.stderr
    assert json.loads(pqmim("info", source, "--json").stdout)["known_share"] is None

    known = pqmim("info", source, "-m", str(tiny_model))
    assert (known.exit_code, known.stderr) == (0, "")
    assert re.search(r"  holds (39|40|41)\.\d % of the tokens", known.stdout)
    record = json.loads(pqmim("info", source, "-m", str(tiny_model), "--json").stdout)
    assert (record["known_share"], record["is_mini"]) == (pytest.approx(0.4, abs=0.01), True)
    missing = pqmim("info", source, "-m", "no-such-model")
    assert missing.exit_code == 1
    assert ONE_LINE_ERROR.fullmatch(missing.stderr)


def test_mini_files_find_their_shipped_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from pqmim import checkpoints

    shipped = checkpoints.ShippedModel("tiny", bytes.fromhex("12345678"), Path("tiny"), "")
    monkeypatch.setattr(checkpoints, "shipped_models", lambda: [shipped])
    assert checkpoints.shipped_model_of(bytes.fromhex("1234")) == shipped


def test_generate(pqmim: Pqmim) -> None:
    command = ("generate", "-o", "out", "--size", "40x24")
    result = pqmim(*command, "-n", "3", "--seed", "5", "--temperature", "0.8", "--steps", "3")
    assert (result.exit_code, result.stderr) == (0, "")
    assert files_below("out") == ["00.png", "01.png", "02.png"]
    assert re.fullmatch(r"out.00\.png  40 x 24  seed 5  \d+\.\d\d s", result.stdout.splitlines()[0])
    image = opened("out/01.png")
    assert image.size == (40, 24)
    assert image.info["Comment"] == (
        "pqmim: nothing was sent, all tokens were drawn (sample, seed 6, temperature 0.8, 3 steps)"
    )
    refused = pqmim(*command)
    assert refused.exit_code == 1
    assert "00.png exists already" in refused.stderr
    same = pqmim(*command, "-f", "--seed", "6", "--temperature", "0.8", "--steps", "3", "--json")
    assert json.loads(same.stdout)["seed"] == 6
    np.testing.assert_array_equal(pixels("out/00.png"), pixels("out/01.png"))


def test_inpaint_changes_what_is_masked_only(pqmim: Pqmim) -> None:
    photo("a.png", (96, 64))
    mask = np.zeros((64, 96), np.uint8)
    mask[20:40, 30:60] = 255
    Image.fromarray(mask).save("mask.png")
    result = pqmim("inpaint", "a.png", "--mask", "mask.png", "-o", "b.png")
    assert (result.exit_code, result.stderr) == (0, "")
    before, after = pixels("a.png"), pixels("b.png")
    np.testing.assert_array_equal(after[mask == 0], before[mask == 0])
    assert (after[mask == 255] != before[mask == 255]).any()
    assert opened("b.png").info["Comment"].endswith("(sample, seed 0, temperature 1)")
    assert pqmim("inpaint", "a.png", "--mask", "mask.png", "-o", "c.png", "--fill", "likely").exit_code == 0

    photo("small.png", (10, 10))
    wrong = pqmim("inpaint", "a.png", "--mask", "small.png", "-o", "d.png")
    assert (wrong.exit_code, wrong.stderr.count("\n")) == (1, 1)
    missing = pqmim("inpaint", "a.png", "--mask", "missing.png", "-o", "d.png")
    assert (missing.exit_code, missing.stderr) == (1, "pqmim: missing.png: No such file or directory\n")


def test_gallery(pqmim: Pqmim) -> None:
    photo("in/a.png", (64, 48))
    Path("in/broken.png").write_bytes(b"")
    result = pqmim("gallery", "in", "-o", "out/page.html", "--keeps", "1,0.5,0", "--seed", "2")
    assert result.exit_code == 1  # of the broken one
    assert re.fullmatch(r"in.a\.png  \d+ \d+ \d+ B", result.stdout.splitlines()[0])
    page = Path("out/page.html").read_text("utf-8")
    assert result.stdout.splitlines()[1].endswith(f"page.html  1 images  {len(page.encode()):,} B")
    assert "sampled with seed 2" in page
    assert pqmim("gallery", "in/a.png", "-o", "out/page.html").exit_code == 1
    assert pqmim("gallery", "in/a.png", "-o", "out/page.html", "-f", "--keeps", "1").exit_code == 0


def test_info_of_another_models_file(pqmim: Pqmim, tiny_model: Path) -> None:
    photo("a.png", mode="RGBA")
    assert pqmim("encode", "a.png").exit_code == 0
    result = pqmim("info", "a.pqm")
    assert result.exit_code == 0
    model_id = parse(Path("a.pqm").read_bytes()).model_id.hex()
    assert f"model unknown ({model_id})" in result.stdout
    assert "  full form  " in result.stdout
    assert "  level " in result.stdout
    assert "alpha 1 B" in result.stdout

    # Without --model the file has to name a shipped model.
    result = pqmim("decode", "a.pqm", "-o", "b.png", has_model=False)
    assert result.exit_code == 1
    assert ONE_LINE_ERROR.fullmatch(result.stderr)
    assert model_id in result.stderr


def test_pixel_limit(pqmim: Pqmim) -> None:
    photo("a.png")
    assert pqmim("encode", "a.png", "--max-pixels", "959").exit_code == 1
    assert pqmim("encode", "a.png", "--max-pixels", "960").exit_code == 0
    assert pqmim("decode", "a.pqm", "-o", "b.png", "--max-pixels", "959").exit_code == 1
    assert pqmim("decode", "a.pqm", "-o", "b.png", "--max-pixels", "960").exit_code == 0


def test_failed_writing_leaves_nothing_behind(pqmim: Pqmim, monkeypatch: pytest.MonkeyPatch) -> None:
    photo("a.png")

    def full_disk(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full_disk)
    result = pqmim("encode", "a.png")
    assert (result.exit_code, result.stderr) == (1, "pqmim: a.png: a.pqm: No space left on device\n")
    assert files_below(".") == ["a.png"]


def test_interrupted_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(source: object, target: object) -> None:
        raise KeyboardInterrupt

    old = tmp_path / "old.pqm"
    old.write_bytes(b"old")
    monkeypatch.setattr(files.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_file(old, b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_writing_to_a_device_does_not_replace_it() -> None:
    files.write_file(Path(os.devnull), b"gone")
    assert not Path(os.devnull).is_file()


def test_writing_into_a_file_as_if_it_were_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        files.write_file(tmp_path / "file" / "x.pqm", b"")


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


def test_models_lists_what_is_shipped(pqmim: Pqmim) -> None:
    from pqmim.checkpoints import shipped_models

    shipped = shipped_models()
    result = pqmim("models")
    assert result.exit_code == 0
    assert [line.split()[:2] for line in result.stdout.splitlines()] == [
        [model.name, model.model_id.hex()] for model in shipped
    ]
    records = [json.loads(line) for line in pqmim("models", "--json").stdout.splitlines()]
    assert [record["bytes"] for record in records] == [model.path.stat().st_size for model in shipped]


def test_training_that_stops_at_its_time_limit_is_no_failure(pqmim: Pqmim, monkeypatch: pytest.MonkeyPatch) -> None:
    from pqmim.training.training_run import TimeIsUp

    seen: list[Any] = []

    def train(config: Any, *, resume: str | None) -> Path:
        seen.append((config.run.seed, resume))
        if resume is None:
            raise TimeIsUp("60 minutes are over")
        return config.run.output / "tokenizer.safetensors"  # type: ignore[no-any-return]

    monkeypatch.setattr("pqmim.training.train_tokenizer.train", train)
    Path("recipe.yaml").write_text("data: {path: photos}\nrun: {output: runs, seed: 3}\n")
    command = ("train", "tokenizer", "-c", "recipe.yaml", "--set", "run.seed=4", "--set", "run.bf16=false")
    stopped = pqmim(*command)
    assert (stopped.exit_code, stopped.stdout) == (0, "60 minutes are over\n")
    done = pqmim(*command, "--resume", "auto")
    assert (done.exit_code, done.stdout) == (0, f"{Path('runs/tokenizer.safetensors')}\n")
    assert seen == [(4, None), (4, "auto")]
    wrong = pqmim(*command, "--set", "run.sed=4")
    assert wrong.exit_code == 1
    assert ONE_LINE_ERROR.fullmatch(wrong.stderr)
    assert "run.sed" in wrong.stderr


def test_eval_compares_with_a_reference(pqmim: Pqmim, tiny_model: Path) -> None:
    photo("photos/a.png", (64, 48))
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
    assert ONE_LINE_ERROR.fullmatch(wrong.stderr)


def test_ablation_prints_its_table(pqmim: Pqmim, tiny_model: Path) -> None:
    photo("photos/a.png", (64, 48))
    result = pqmim("eval", "photos", "-o", "out", "-m", str(tiny_model), "--ablation")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("| variant | quality |")
    assert "ablation.csv" in files_below("out")


def test_bench_times_each_size(pqmim: Pqmim) -> None:
    result = pqmim("bench", "-o", "out", "--reference", "jpeg", "--sizes", "256,1024", "--threads", "1")
    assert result.exit_code == 0
    assert [line.split("  ")[1] for line in result.stdout.splitlines()] == ["256 x 256", "1024 x 1024"]
    assert {"bench.csv", "bench.json", "bench_seconds.svg"} <= set(files_below("out"))
    assert pqmim("bench", "-o", "out", "--sizes", "big").exit_code == 2


def test_selftest_prints_a_line_for_each_check(pqmim: Pqmim, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [SimpleNamespace(name="golden.pqm, kernel float32", error=None)]
    module = SimpleNamespace(run=lambda *, device: iter(checks))
    monkeypatch.setitem(sys.modules, "pqmim.selftest", module)
    result = pqmim("selftest")
    assert (result.exit_code, result.stdout) == (0, "ok  golden.pqm, kernel float32\n")
    checks.append(SimpleNamespace(name="golden.pqm, kernel int8", error="other tokens"))
    result = pqmim("selftest")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[1] == "FAILED  golden.pqm, kernel int8: other tokens"


def test_every_option_is_in_the_manual() -> None:
    manual = (Path(__file__).parents[2] / "docs" / "usage.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^##+ ([^\n]+)\n(.*?)(?=^##|\Z)", manual, re.MULTILINE | re.DOTALL))
    shared = sections["Options that several commands share"]
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        for part in getattr(command, "commands", {"": command}).values():
            for option in (text for parameter in part.params for text in parameter.opts if text[0] == "-"):
                assert option in sections[name] or option in shared, (name, option)


def run_child(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False, **options
    )


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
def test_quick_commands_do_not_import_torch(pqmim: Pqmim, arguments: list[str]) -> None:
    photo("a.png")
    assert pqmim("encode", "a.png").exit_code == 0
    code = (
        "import sys, pqmim.cli\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "try: pqmim.cli.main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    child = run_child("-c", code)
    assert child.returncode == 0, child.stderr


def test_as_a_module(tmp_path: Path) -> None:
    child = run_child("-m", "pqmim", "--version")
    assert (child.returncode, child.stdout) == (0, f"pqmim {__version__}\n")
    child = run_child("-m", "pqmim", "decode", "missing.pqm", cwd=tmp_path)
    assert (child.returncode, child.stdout) == (1, "")
    assert child.stderr == "pqmim: missing.pqm: No such file or directory\n"


def test_closed_pipe_is_silent(pqmim: Pqmim) -> None:
    photo("a.png")
    assert pqmim("encode", "a.png").exit_code == 0
    command = [sys.executable, "-m", "pqmim", "info", "a.pqm"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 1


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a pseudo-terminal: (what a person reads, what a program writes to)."""
    pty = pytest.importorskip("pty")
    reader, writer = pty.openpty()
    yield reader, writer
    os.close(reader)


def test_progress_bar_on_a_terminal_only(pqmim: Pqmim, terminal: tuple[int, int]) -> None:
    for name in ("a.png", "b.png"):
        photo(name)
    assert pqmim("encode", "a.png", "b.png").exit_code == 0
    reader, writer = terminal
    command = [sys.executable, "-m", "pqmim", "info", "a.pqm", "b.pqm"]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=writer, timeout=60, check=True)
    os.close(writer)
    assert len(result.stdout.splitlines()) == 2
    assert b"files" in os.read(reader, 1 << 16)
