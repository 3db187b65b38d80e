"""Are tokens the same, and pictures, and bytes, whatever computes them? One table row for each setting.

    python benchmarks/same_everywhere.py [PICTURES...] [--threads 1 2 4] [--kernels NAMES] [--levels off basic ...]
        [--onnxruntime VERSION]... [--cpu NAME]... [--python NAME=COMMAND]... [--device cuda]

The first row is the reference: one thread, the kernel and the level of optimization that the codec chooses. It encodes
the pictures (the example photo unless others are named); every other setting encodes them again, and decodes both the
reference's files and the golden files of the package, whose token hashes were recorded when they were made. Pictures
are those of golden files by the decoder `--decoder`, against the reference's.

Settings: numbers of threads; every kernel at every level to which ONNX Runtime may rewrite graphs, and NumPy alone;
versions of ONNX Runtime, in environments that are made for it (`--venvs` keeps them); processors that QEMU imitates
(`qemu-x86_64` of Debian's package qemu-user; names such as Haswell, SandyBridge and Nehalem, see `qemu-x86_64 -cpu
help`), with the smallest golden files alone, since that is slow; any other Python that has the packages, such as that
of another architecture, which QEMU imitates too; a GPU.

A kernel that the known-answer check does not let through on a machine is "refused", which is as it should be. Exit code
1 if a process fails or a token hash differs: that must never happen. Bytes may differ where the float analysis
transform chose another token, which is no fault of a file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from example import PHOTO, ROOT

from pqmim.entropy_kernels import GRAPH_KERNELS, KERNELS
from pqmim.evaluation.dataset import find_images
from pqmim.selftest import GOLDEN, read_golden

LEVELS = ("off", "basic", "extended", "all")
PACKAGES = ("constriction", "numpy", "pillow", "rich", "safetensors", "typer")
"""What the codec needs beside ONNX Runtime."""
REFERENCE = "reference: 1 thread"
SMALLEST_BYTES = 260
"""Golden files of more bytes are not decoded on imitated processors."""


@dataclass(frozen=True)
class Setting:
    """What computes.

    Attributes:
        name: for the table.
        kernel, threads, device: as `load_codec` takes them.
        level: to which ONNX Runtime may rewrite graphs; None = as the codec has it.
        command: that runs Python.
    """

    name: str
    kernel: str | None = None
    threads: int = 1
    device: str = "cpu"
    level: str | None = None
    command: tuple[str, ...] = (sys.executable,)


@dataclass
class Outcome:
    """What a setting computed.

    Attributes:
        kernel: that was used.
        golden: golden file -> token hash.
        shown: golden file -> SHA-256 of its picture.
        sent: reference's file -> token hash.
        coded: picture -> SHA-256 of the file that was made of it.
        refusal: why nothing was computed.
        has_failed: whether that is a fault.
    """

    kernel: str = ""
    golden: dict[str, str] = field(default_factory=dict)
    shown: dict[str, str] = field(default_factory=dict)
    sent: dict[str, str] = field(default_factory=dict)
    coded: dict[str, str] = field(default_factory=dict)
    refusal: str = ""
    has_failed: bool = False


def compute(task: dict[str, Any]) -> Outcome:
    """Do a setting's work, in this process."""
    from pqmim.codec import load_codec
    from pqmim.errors import ConfigError
    from pqmim.runtime import Session

    setting = Setting(**task["setting"])
    if setting.level is not None:
        assert Session.__init__.__kwdefaults__ is not None
        Session.__init__.__kwdefaults__["level"] = setting.level
    try:
        options = {"device": setting.device, "kernel": setting.kernel, "threads": setting.threads}
        codec = load_codec(task["model"], task["decoder"], **options)
    except ConfigError as error:
        return Outcome(refusal=str(error))
    outcome = Outcome(codec.kernel)
    for name in task["golden"]:
        data = (GOLDEN / name).read_bytes()
        outcome.golden[name] = codec.token_hash(data)
        outcome.shown[name] = hashlib.sha256(codec.decode(data).tobytes()).hexdigest()
    for name, picture in task["pictures"].items():
        file = Path(task["files"], f"{name}.pqm")
        data = codec.encode(picture, quality=task["quality"])
        if not file.exists():  # this is the reference
            file.write_bytes(data)
        outcome.coded[name] = hashlib.sha256(data).hexdigest()
        outcome.sent[name] = codec.token_hash(file.read_bytes())
    return outcome


def run(setting: Setting, task: dict[str, Any]) -> Outcome:
    """Do a setting's work in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OPENBLAS_NUM_THREADS": str(setting.threads)}
    environment.pop("OPENBLAS_CORETYPE", None)  # may name what an imitated processor does not have
    done = subprocess.run(
        [*setting.command, __file__, "--child"],
        input=json.dumps({**task, "setting": asdict(setting)}),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last_words = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Outcome(refusal=f"code {done.returncode}: {last_words}", has_failed=True)
    return Outcome(**json.loads(done.stdout))


def python_with(version: str, venvs: Path) -> str:
    """Python of an environment with a version of ONNX Runtime, made unless it is there."""
    folder = venvs / f"onnxruntime-{version}"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
            lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
            constraints.write("\n".join(line for line in lines if not line.startswith("onnxruntime=")))
            constraints.flush()
            subprocess.run([*pip, "-c", constraints.name, f"onnxruntime=={version}", *PACKAGES], check=True)
        (folder / "ready").touch()
    return str(python)


def settings_of(options: argparse.Namespace, venvs: Path) -> Iterator[Setting]:
    """All settings, the reference first."""
    yield Setting(REFERENCE)
    for threads in options.threads:
        if threads != 1:
            yield Setting(f"{threads} threads", threads=threads)
    for kernel in options.kernels:
        if kernel in GRAPH_KERNELS:
            yield from (Setting(f"optimization {level}", kernel, level=level) for level in options.levels)
        else:
            yield Setting("NumPy alone", kernel)
    for version in options.onnxruntime:
        command = (python_with(version, venvs),)
        for kernel in options.kernels:
            yield Setting(f"ONNX Runtime {version}", kernel, command=command)
        yield Setting(f"ONNX Runtime {version}, optimization all", level="all", command=command)
    for name, _, command in (each.partition("=") for each in options.python):
        yield from (Setting(name, kernel, command=tuple(shlex.split(command))) for kernel in (None, *options.kernels))
    for name in options.cpu:
        command = (shutil.which("qemu-x86_64") or "qemu-x86_64", "-cpu", name, sys.executable)
        yield from (Setting(f"processor {name}", kernel, command=command) for kernel in (None, *options.kernels))
    if options.device != "cpu":
        yield Setting(f"device {options.device}", device=options.device)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, a row at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", type=Path, default=[PHOTO], help="files, or folders of them")
    parser.add_argument("-m", "--model", default="photo", help="shipped token model")
    parser.add_argument("--decoder", default="fast", help="that makes pictures")
    parser.add_argument("-q", "--quality", type=float, default=40.0)
    parser.add_argument("--images", type=int, metavar="N", help="only the first N pictures")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--kernels", nargs="*", choices=KERNELS, default=KERNELS)
    parser.add_argument("--levels", nargs="*", choices=LEVELS, default=LEVELS)
    parser.add_argument("--onnxruntime", action="append", default=[], metavar="VERSION", help="repeatable")
    parser.add_argument("--cpu", action="append", default=[], metavar="NAME", help="repeatable")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=COMMAND", help="repeatable")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--venvs", type=Path, metavar="FOLDER", help="keep the environments here")
    options = parser.parse_args(arguments)

    found = [file for place in options.pictures for file in find_images(place).values()][: options.images]
    pictures = {f"{index:03}-{file.stem}": str(file.resolve()) for index, file in enumerate(found)}
    golden = {name: facts["tokens"] for name, facts in read_golden().items() if facts["model"] == options.model}
    smallest = {name: tokens for name, tokens in golden.items() if (GOLDEN / name).stat().st_size <= SMALLEST_BYTES}
    print(
        "| setting | kernel | golden files: same tokens | same pictures "
        "| pictures: same bytes | their files: same tokens |"
    )
    print("|---|---|---|---|---|---|", flush=True)
    reference, is_same = Outcome(), True
    with tempfile.TemporaryDirectory() as folder:
        for setting in settings_of(options, options.venvs or Path(folder)):
            is_imitated = Path(setting.command[0]).name.startswith("qemu")
            expected = smallest if is_imitated else golden
            task = {
                "model": options.model,
                "quality": options.quality,
                "files": folder,
                "golden": list(expected),
                "decoder": options.decoder,
            }
            outcome = run(setting, {**task, "pictures": {} if is_imitated else pictures})
            if setting.name == REFERENCE:
                if outcome.refusal:
                    sys.exit(outcome.refusal)
                reference = outcome
            print(f"| {setting.name} | {outcome.kernel or setting.kernel or ''} | ", end="")
            if outcome.refusal:
                print(f"{'failed' if outcome.has_failed else 'refused'}: {outcome.refusal} | | | |", flush=True)
                is_same &= not outcome.has_failed
                continue
            columns = (
                (outcome.golden, expected),
                (outcome.shown, reference.shown),
                (outcome.coded, reference.coded),
                (outcome.sent, reference.sent),
            )
            counts = [(sum(got[key] == wanted[key] for key in got), len(got)) for got, wanted in columns]
            print(" | ".join(f"{same} of {total}" if total else "" for same, total in counts) + " |", flush=True)
            is_same &= all(same == total for same, total in (counts[0], counts[3]))
    return int(not is_same)


if __name__ == "__main__":
    if sys.argv[1:] == ["--child"]:
        print(json.dumps(asdict(compute(json.load(sys.stdin)))))
    else:
        sys.exit(main())
