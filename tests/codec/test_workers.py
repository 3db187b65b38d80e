"""Several files at a time: the same results in the same order, crashes that cost one file, interrupts, threads."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_tools import ONE_LINE_ERROR, Pqmim, files_below, photo

from pqmim import codec
from pqmim.batch import Handling, Note, Result, run_jobs
from pqmim.bitstream import parse
from pqmim.cli import running
from pqmim.cli.running import Codecs
from pqmim.errors import ImageError, ModelError
from pqmim.jobs import Job
from pqmim.reporting import Reporter

pytest_plugins = ["cli_fixtures"]


class Reverse:
    """What a test has done to each input: what its content says."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, data: bytes, job: Job, note: Note) -> Callable[[], Result]:
        self.number += 1
        note(f"{job.name} is number {self.number} of its process")

        def make_result() -> Result:
            if data == b"die":
                os._exit(3)
            if data == b"kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if data == b"memory":
                raise MemoryError
            if data == b"image":
                raise ImageError("no image")
            if data == b"model":
                raise ModelError("no model")
            if data == b"bug":
                raise UnpicklableError(Path)
            if data == b"slow":
                time.sleep(0.5)
            warnings.warn(f"about {data.decode()}", stacklevel=1)
            return Result({"size": len(data)}, f"{len(data)} B", data[::-1])

        return make_result


class UnpicklableError(Exception):
    """One that cannot travel between processes as it is."""

    def __init__(self, cause: Any) -> None:
        super().__init__("a", lambda: cause)


def jobs_of(*contents: str) -> list[Job]:
    jobs = []
    for index, content in enumerate(contents):
        source = Path(f"{index}.in")
        source.write_text(content)
        jobs.append(Job(source, Path(f"{index}.out")))
    return jobs


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_results_come_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    contents = ["slow", *(f"file {index}" for index in range(12))]
    reporter = Reporter(as_json=True)
    run_jobs(jobs_of(*contents), Reverse(), Handling(workers=2), reporter)
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["output"] for record in records] == [f"{index}.out" for index in range(13)]
    assert [record["warnings"] for record in records] == [[f"about {content}"] for content in contents]
    assert [Path(f"{index}.out").read_text() for index in range(13)] == [content[::-1] for content in contents]
    assert reporter.num_failed == 0


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_failure_costs_one_file(capsys: pytest.CaptureFixture[str]) -> None:
    jobs = jobs_of("a", "die", "b", "kill", "memory", "image", "bug", "c", "d")
    Path("7.out").write_text("old")
    reporter = Reporter()
    run_jobs([*jobs, Job(Path("missing"), Path("9.out"))], Reverse(), Handling(workers=2), reporter)
    errors = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
    assert errors[:4] == [
        "pqmim: 1.in: its worker process died (exit code 3)",
        "pqmim: 3.in: its worker process died (SIGKILL, for which too little memory is the usual reason)",
        "pqmim: 4.in: out of memory",
        "pqmim: 5.in: no image",
    ]
    assert errors[4].startswith("pqmim: 6.in: internal error: UnpicklableError: ")
    assert errors[5:] == [
        "pqmim: 7.in: 7.out exists already; -f overwrites it",
        "pqmim: missing: No such file or directory",
    ]
    assert {path.name: path.read_text() for path in Path().glob("*.out")} == {
        "0.out": "a",
        "2.out": "b",
        "7.out": "old",
        "8.out": "d",
    }
    assert reporter.num_failed == 7


@pytest.mark.parametrize("workers", [1, 2])
def test_without_a_model_nothing_goes_on(capsys: pytest.CaptureFixture[str], workers: int) -> None:
    reporter = Reporter()
    run_jobs(jobs_of("a", "model", "b", "c"), Reverse(), Handling(workers=workers), reporter)
    assert capsys.readouterr().err.splitlines()[-1] == "pqmim: no model"
    assert (sorted(Path().glob("*.out")), reporter.num_failed) == ([Path("0.out")], 1)


def test_workers_keep_what_they_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    run_jobs(jobs_of(*"abcdefgh"), Reverse(), Handling(workers=2), Reporter(verbosity=1))
    numbers = [int(line.split()[4]) for line in capsys.readouterr().err.splitlines() if "number" in line]
    assert len(numbers) == 8
    assert max(numbers) > 1
    assert numbers.count(1) <= 2


@pytest.mark.parametrize("command", ["encode", "decode", "tokens"])
def test_the_same_files_as_one_after_another(pqmim: Pqmim, command: str) -> None:
    for index in range(5):
        photo(f"in/{index}.png", (40 + 8 * index, 64))
    Path("in/broken.png").write_bytes(b"")
    source = "in"
    if command == "decode":
        assert pqmim("encode", "in", "-o", "coded").exit_code == 1
        Path("coded/broken.pqm").write_bytes(b"")
        source = "coded"

    def reports(output: str, *options: str) -> list[dict[str, Any]]:
        result = pqmim(command, source, "-o", output, "--json", *options)
        assert result.exit_code == 1
        assert ONE_LINE_ERROR.fullmatch(result.stderr)
        lines = [json.loads(line.replace(output, "out")) for line in result.stdout.splitlines()]
        return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]

    assert reports("many", "-j", "3") == reports("one")
    names = files_below("one")
    assert (len(names), files_below("many")) == (5, names)
    for name in names:
        assert Path("many", name).read_bytes() == Path("one", name).read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_an_interrupt_leaves_whole_files_only(tiny_model: Path, jobs: str) -> None:
    for index in range(300):
        photo(f"in/{index:03}.png", (96, 96))
    command = [sys.executable, "-m", "pqmim", "encode", "in", "-o", "out", "-j", jobs, "-m", str(tiny_model)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that runs the tests in the background has interrupts ignored, which processes inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("out")
        os.killpg(process.pid, signal.SIGINT)
        process.stdout.read()
        assert process.stderr.read() == ""
    assert process.returncode in (1, 130)
    done = files_below("out")
    assert 0 < len(done) < 300
    for name in done:
        assert parse(Path("out", name).read_bytes()).width == 96
    with contextlib.suppress(ProcessLookupError):
        for _ in range(100):  # helpers of the standard library take a moment to see that all is over
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        pytest.fail("a process was left behind")


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []

    def load_codec(model: str, decoder: None, *, threads: int | None, **others: Any) -> Any:
        asked.append(threads)
        return SimpleNamespace(name=model, model_id=b"", decoder_name="fine")

    monkeypatch.setattr(codec, "load_codec", load_codec)
    monkeypatch.setattr(running, "num_usable_cores", lambda: 12)
    for codecs in (
        Codecs("a"),
        Codecs("a", threads=3),
        Codecs("a", workers=4),
        Codecs("a", workers=100),
        Codecs("a", threads=5, workers=4),
    ):
        codecs.named("a", asked.append)  # type: ignore[arg-type]
    assert [threads for threads in asked if not isinstance(threads, str)] == [None, 3, 3, 1, 5]


@pytest.mark.parametrize("command", ["encode", "decode", "tokens", "generate", "inpaint", "gallery"])
def test_commands_that_run_networks_take_threads(pqmim: Pqmim, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    photo("a.png", (64, 64))
    assert pqmim("encode", "a.png").exit_code == 0
    arguments = {
        "decode": ("a.pqm", "-o", "b.png"),
        "generate": ("-o", "out", "--size", "16x16"),
        "inpaint": ("a.png", "--mask", "a.png", "-o", "b.png"),
        "gallery": ("a.png", "-o", "a.html", "--keeps", "1"),
    }.get(command, ("a.png", "-o", "b"))
    asked = []
    original = codec.load_codec

    def load_codec(model: str, decoder: None, **options: Any) -> Any:
        asked.append(options["threads"])
        return original(model, decoder, **options)

    monkeypatch.setattr(codec, "load_codec", load_codec)
    result = pqmim(command, *arguments, "--threads", "2")
    assert (result.exit_code, asked) == (0, [2])
