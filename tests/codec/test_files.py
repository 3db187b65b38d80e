"""Writing: whole files or none, links, modes, names of temporary files, standard streams."""

import io
import os
import stat
import sys
import threading
from pathlib import Path

import pytest

from pqmim import files
from pqmim.errors import OutputError

POSIX_ONLY = pytest.mark.skipif(os.name != "posix", reason="links, modes and pipes of POSIX")


def no_temporary_files(folder: Path) -> bool:
    return not list(folder.glob(".pqmim-*"))


@POSIX_ONLY
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_a_link_is_followed_and_the_mode_is_kept(tmp_path: Path, mode: int) -> None:
    (tmp_path / "elsewhere").mkdir()
    real = tmp_path / "elsewhere" / "real"
    real.write_bytes(b"old")
    real.chmod(mode)
    between, link = tmp_path / "between", tmp_path / "link"
    between.symlink_to("elsewhere/real")
    link.symlink_to(between)
    with pytest.raises(OutputError, match=r"link exists already as a link to .*real; -f overwrites it"):
        files.check_target(link, force=False)
    files.check_target(link, force=True)
    files.write_file(link, b"new")
    assert (link.is_symlink(), between.is_symlink()) == (True, True)
    assert (real.read_bytes(), stat.S_IMODE(real.stat().st_mode)) == (b"new", mode)
    assert no_temporary_files(tmp_path)
    assert no_temporary_files(real.parent)


@POSIX_ONLY
def test_a_dangling_link_is_written_through_with_force_only(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("nowhere")
    with pytest.raises(OutputError, match=r"link is a link to a file that is not there; -f writes that file"):
        files.check_target(link, force=False)
    files.check_target(link, force=True)
    files.write_file(link, b"new")
    assert link.is_symlink()
    assert (tmp_path / "nowhere").read_bytes() == b"new"


@POSIX_ONLY
def test_links_that_lead_nowhere_are_errors(tmp_path: Path) -> None:
    loop, lost = tmp_path / "loop", tmp_path / "lost"
    loop.symlink_to("loop")
    lost.symlink_to("no/such/folder")
    with pytest.raises(OutputError, match="loop: "):
        files.check_target(loop, force=True)
    for link in (loop, lost):
        with pytest.raises(OutputError, match=link.name):
            files.write_file(link, b"new")
        assert link.is_symlink()


@POSIX_ONLY
def test_new_files_have_the_usual_mode(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write_file(tmp_path / "new", b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


def test_a_temporary_file_of_another_process_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "same")
    theirs = tmp_path / ".pqmim-same.tmp"
    theirs.write_bytes(b"theirs")
    with pytest.raises(OutputError, match=r"a\.pqm: File exists"):
        files.write_file(tmp_path / "a.pqm", b"ours")
    assert theirs.read_bytes() == b"theirs"
    assert not (tmp_path / "a.pqm").exists()


def test_temporary_names_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def replace(source: Path, target: Path) -> None:
        seen.append(source)
        source.unlink()

    monkeypatch.setattr(files.os, "replace", replace)
    for _ in range(50):
        files.write_file(tmp_path / "a.pqm", b"")
    assert len(set(seen)) == 50


def test_failed_writing_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full_disk)
    with pytest.raises(OutputError, match=r"a\.pqm: No space left on device"):
        files.write_file(tmp_path / "a.pqm", b"new")
    assert list(tmp_path.iterdir()) == []


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


@POSIX_ONLY
def test_writing_to_a_named_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    files.write_file(pipe, b"x" * 100_000)
    reader.join()
    assert (got, stat.S_ISFIFO(pipe.stat().st_mode)) == ([b"x" * 100_000], True)


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="needs /dev/fd")
def test_what_only_a_descriptor_leads_to_is_written_in_place(tmp_path: Path) -> None:
    with (tmp_path / "gone").open("w+b") as file:
        (tmp_path / "gone").unlink()
        files.write_file(Path(f"/dev/fd/{file.fileno()}"), b"new")
        file.seek(0)
        assert file.read() == b"new"
    assert list(tmp_path.iterdir()) == []


def test_writing_into_a_file_as_if_it_were_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="Not a directory"):
        files.check_target(tmp_path / "file" / "x.pqm", force=False)
    with pytest.raises(OutputError):
        files.write_file(tmp_path / "file" / "x.pqm", b"")


def test_places() -> None:
    assert files.place_of("-") is files.STANDARD_STREAM
    assert files.place_of("./-") == Path("-")


class Stingy(io.RawIOBase):
    """A raw stream that takes a few bytes at a time, and sometimes none."""

    def __init__(self, *answers: int | None) -> None:
        self.answers = list(answers)
        self.taken = b""

    def write(self, data: memoryview) -> int | None:  # type: ignore[override]
        count = self.answers.pop(0) if self.answers else 3
        self.taken += bytes(data[: count or 0])
        return None if count is None else min(count, len(data))

    def writable(self) -> bool:
        return True


class Stream:
    """As much of a text stream as there is of stdout with PYTHONUNBUFFERED."""

    def __init__(self, raw: Stingy) -> None:
        self.buffer = raw

    def flush(self) -> None:
        pass


def test_streams_get_all_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[object] = []
    monkeypatch.setattr(files.select, "select", lambda *args: waits.append(args))
    raw = Stingy(1, None, 2, None)
    files.write_stream(Stream(raw), b"0123456789", "stdout")  # type: ignore[arg-type]
    assert (raw.taken, len(waits)) == (b"0123456789", 2)


def test_a_stream_that_takes_nothing_is_an_error() -> None:
    with pytest.raises(OutputError, match=r"stdout: Input/output error"):
        files.write_stream(Stream(Stingy(1, 0)), b"0123456789", "stdout")  # type: ignore[arg-type]
    with pytest.raises(OutputError, match="stdout is closed"):
        files.write_stream(None, b"", "stdout")


def test_stdout_under_another_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    same = os.stat(tmp_path / "out")
    monkeypatch.setattr(files.os, "fstat", lambda descriptor: same)
    assert files.output_of(str(tmp_path / "out")) is files.STANDARD_STREAM
    assert files.output_of(str(tmp_path / "missing")) == tmp_path / "missing"
    monkeypatch.setattr(sys, "stdout", None)
    assert files.output_of(str(tmp_path / "out")) == tmp_path / "out"
