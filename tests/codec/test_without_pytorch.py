"""All that is not training or evaluation works where only the package's own dependencies are installed.

What else is installed here is refused in a child process, as if it were not there.
"""

import importlib.metadata
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name
from test_packaging import PROJECT, all_requirements

ROOT = Path(__file__).parents[2]
WINGS = ("training", "evaluation", "perceptual", "datasets", "ray")


def refused_modules() -> list[str]:
    """Top-level modules of all installed packages that the codec does not depend on."""
    allowed = all_requirements(PROJECT["dependencies"]) | {"pqmim"}
    found = {"torch", "torchvision", "omegaconf", "onnx"}  # also where they are not installed
    for module, packages in importlib.metadata.packages_distributions().items():
        if not {canonicalize_name(package) for package in packages} & allowed:
            found.add(module)
    return sorted(found)


REFUSE = """
    import sys

    class Refusing:
        def __init__(self, finder):
            self.finder = finder

        def find_spec(self, name, path=None, target=None):
            return None if name.partition(".")[0] in REFUSED else self.finder.find_spec(name, path, target)

        def __getattr__(self, name):
            return getattr(self.finder, name)

    REFUSED -= sys.modules.keys()  # what the interpreter starts with
    sys.meta_path[:] = [Refusing(finder) for finder in sys.meta_path]
"""


def run(program: str, folder: Path, *arguments: str) -> str:
    """Run a program in a child process where all other packages are refused."""
    code = f"REFUSED = set({refused_modules()!r})\n" + textwrap.dedent(REFUSE) + textwrap.dedent(program)
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": "", "HOME": str(folder), "COLUMNS": "200"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def codec_modules() -> list[str]:
    """Modules of the package but for its wings."""
    package = ROOT / "src" / "pqmim"
    files = [path.relative_to(package.parent).with_suffix("") for path in package.rglob("*.py")]
    return sorted(
        ".".join(file.parts).removesuffix(".__init__") for file in files if file.parts[1] not in (*WINGS, "__main__")
    )


def test_what_is_refused() -> None:
    assert {"torch", "omegaconf", "onnx"} <= set(refused_modules())
    assert not {"numpy", "onnxruntime", "PIL", "typer", "rich", "pqmim"} & set(refused_modules())


def test_every_module_of_the_codec_can_be_imported(tmp_path: Path) -> None:
    modules = codec_modules()
    assert {"pqmim", "pqmim.cli", "pqmim.cli.coding", "pqmim.codec", "pqmim.selftest"} <= set(modules)
    program = "import importlib\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\nprint('imported')"
    assert run(program, tmp_path, *modules) == "imported\n"


@pytest.mark.parametrize("module", ["codec", "selftest", "batch", "image_io"])
def test_the_codec_itself_needs_no_pydantic_and_no_command_line(module: str, tmp_path: Path) -> None:
    """What the command line's library brings along is not for the codec."""
    program = f"import pqmim.{module}\nprint(sorted({{'pydantic', 'typer', 'rich'}} & sys.modules.keys()))"
    assert run(program, tmp_path) == "[]\n"


def test_commands_and_functions(tiny_model: Path, tmp_path: Path) -> None:
    """Each command of the README but training and evaluation; the self test on two of its files."""
    program = """
        import numpy as np
        from PIL import Image
        from typer.testing import CliRunner

        import pqmim
        import pqmim.selftest
        from pqmim.cli import app

        y, x = np.mgrid[0:60, 0:90]
        Image.fromarray(np.stack([2 * x, 3 * y, x + y], axis=2).astype(np.uint8)).save("a.png")
        mask = np.zeros((60, 90), np.uint8)
        mask[20:40, 20:40] = 255
        Image.fromarray(mask).save("mask.png")
        model = sys.argv[1]

        def call(command, *arguments):
            options = ["-m", model] if command in ("encode decode tokens generate inpaint gallery".split()) else []
            result = CliRunner().invoke(app, [command, *options, *arguments])
            assert result.exit_code == 0, (command, result.output, result.stderr, result.exception)
            return result.output

        call("encode", "a.png", "-o", "a.pqm", "-q", "80")
        call("encode", "a.png", "-o", "small.pqm", "--target-bytes", "60")
        call("truncate", "a.pqm", "-o", "cut.pqm", "--bytes", "50")
        call("decode", "a.pqm", "-o", "b.png")
        call("decode", "cut.pqm", "-o", "c.png", "--fill", "sample")
        assert Image.open("b.png").size == Image.open("c.png").size == (90, 60)
        call("info", "a.pqm")
        call("tokens", "a.pqm", "-o", "a.npy")
        assert np.load("a.npy").shape == (8, 4, 6)
        call("generate", "-o", "drawn", "--size", "32x32")
        call("inpaint", "a.png", "--mask", "mask.png", "-o", "d.png")
        call("gallery", "a.png", "-o", "page/page.html", "--keeps", "1,0.5")
        call("models")

        golden = pqmim.selftest.read_golden()
        few = {name: golden[name] for name in ("fast-odd.pqm", "fine-pixel.pqm")}
        pqmim.selftest.read_golden = lambda: few
        assert "fast-odd.pqm" in call("selftest")

        data = pqmim.encode("a.png", model=model, target_bytes=80)
        assert len(data) <= 80
        assert pqmim.decode(data, model=model).size == (90, 60)
        assert not REFUSED & sys.modules.keys()
        print("done")
    """
    assert run(program, tmp_path, str(tiny_model)).endswith("done\n")


def test_what_needs_an_extra_says_so(tmp_path: Path) -> None:
    """In one line, with the name of the extra."""
    program = """
        from typer.testing import CliRunner

        from pqmim.cli import app

        open("recipe.yaml", "w").close()
        result = CliRunner().invoke(app, ["train", "tokenizer", "-c", "recipe.yaml"])
        assert result.exit_code == 1, result
        print(result.stderr, end="")
    """
    message = run(program, tmp_path)
    assert message.startswith("pqmim: ")
    assert "pip install 'pqmim[train]'" in message
    assert message.count("\n") == 1


def test_a_machine_without_constriction_reads_and_writes_the_same(tmp_path: Path) -> None:
    program = """
        REFUSED.add("constriction")
        import pqmim
        import pqmim.selftest
        from pqmim.bitstream import truncate
        from pqmim.codec import load_codec

        golden = pqmim.selftest.read_golden()
        codec = load_codec("photo", "fast", device="cpu")
        for name in ("fast-odd.pqm", "fine-crop-q60.pqm", "fast-cut.pqm", "fine-transparent.pqm"):
            data = (pqmim.selftest.GOLDEN / name).read_bytes()
            assert codec.token_hash(data) == golden[name]["tokens"], name
        data = (pqmim.selftest.GOLDEN / "fine-crop-q60.pqm").read_bytes()
        assert codec.decode(truncate(data, 500)).size == (256, 192)
        assert "constriction" not in sys.modules
        print("done")
    """
    assert run(program, tmp_path) == "done\n"
