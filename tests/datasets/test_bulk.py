"""Bulk coding: what is written where, runs that are ended, workers that die. Ray runs in child processes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from pqmim.bulk import RECORDS, BatchStep, Bulk, BulkFormat, BulkOptions, ManifestFormat
from pqmim.cli import app
from pqmim.codec import Codec, load_codec
from pqmim.errors import OutputError, PqmimError

pytest.importorskip("fsspec")
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray")

NAMES = ["cat/a.png", "cat/b.v2.png", "dog/deep/a.png", "loose.png"]
SUFFIXES = {".png", ".jpg"}
TIMEOUT = 180

DRIVER = """
import os, sys, time
from pathlib import Path
from pqmim import bulk

class Step(bulk.BatchStep):
    def _row(self, path, name, part, files):
        log = Path({folder!r}, "log")
        with log.open("a") as file:
            file.write(path + chr(10))
        if {how!r} == "die once" and log.read_text().count(path) == 1 and path == "cat/b.v2.png":
            os.kill(os.getpid(), 9)
        if {how!r} == "always die" and path == "cat/b.v2.png":
            os._exit(3)
        if {how!r} == "hang" and path == "loose.png":
            time.sleep(600)
        return super()._row(path, name, part, files)

bulk.BatchStep = Step
options = bulk.BulkOptions(to=bulk.BulkFormat({to!r}), model={model!r}, batch_size=2)
work = bulk.Bulk({source!r}, {output!r}, options, suffixes={{".png"}})
print(*(f"{{row.path}}: {{row.error}}" for row in work.run(2)), sep=chr(10))
work.write_manifest(bulk.ManifestFormat.CSV)
"""
"""A run whose workers do `how`; cloudpickle hands the class over by value, since it is not in a module."""


@pytest.fixture(scope="module")
def codec(tiny_model: Path) -> Codec:
    return load_codec(tiny_model, device="cpu")


def options_of(tiny_model: Path, to: BulkFormat = BulkFormat.FILES) -> BulkOptions:
    return BulkOptions(to, str(tiny_model), batch_size=2)


def do_all(work: Bulk, photos: Path, output: Path, options: BulkOptions) -> None:
    """What workers do, in this process."""
    work.start()
    names = {path: work._names[path] for path in work.todo}
    for row in BatchStep(str(photos), str(output), options).rows_of(names):
        work.done[row.path] = row


def driver(how: str, to: str, tiny_model: Path, photos: Path, output: Path) -> list[str]:
    script = DRIVER.format(
        folder=str(photos.parent), how=how, to=to, model=str(tiny_model), source=str(photos), output=str(output)
    )
    return [sys.executable, "-c", script]


def run_pqmim(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pqmim", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)


def manifest_of(output: Path) -> dict[str, dict[str, str]]:
    with (output / "manifest.csv").open(newline="") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def tar_contents(output: Path) -> dict[str, bytes]:
    """Path of each picture in the shards -> its file; fails if one is there twice."""
    found: dict[str, bytes] = {}
    for path in output.glob("*.tar"):
        with tarfile.open(path) as archive:
            members = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
        for name, content in members.items():
            if name.endswith(".json"):
                picture = json.loads(content)["name"]
                assert picture not in found
                found[picture] = members[name.removesuffix("json") + "pqm"]
    return found


def test_files_lie_as_their_pictures_do(tiny_model: Path, photos: Path, tmp_path: Path, codec: Codec) -> None:
    out, options = tmp_path / "out", options_of(tiny_model)
    do_all(Bulk(str(photos), str(out), options, suffixes=SUFFIXES), photos, out, options)
    for name in NAMES:
        assert (out / name).with_suffix(".pqm").read_bytes() == codec.encode(photos / name)


def test_pictures_that_differ_in_their_suffix_get_files_of_their_own(tiny_model: Path, photos: Path) -> None:
    (photos / "loose.jpg").write_bytes(b"")
    work = Bulk(str(photos), str(photos.parent / "out"), options_of(tiny_model), suffixes=SUFFIXES)
    assert work._names["loose.jpg"] == "loose.jpg.pqm"
    assert work._names["loose.png"] == "loose.png.pqm"
    assert work._names["cat/a.png"] == "cat/a.pqm"


def test_a_parquet_file_has_a_row_for_each_picture(
    tiny_model: Path, photos: Path, tmp_path: Path, codec: Codec
) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    out, options = tmp_path / "out", options_of(tiny_model, BulkFormat.PARQUET)
    work = Bulk(str(photos), str(out), options, suffixes=SUFFIXES)
    do_all(work, photos, out, options)
    (part,) = out.glob("part-*.parquet")
    rows = pq.read_table(part).to_pylist()
    assert {row["name"]: row["pqm"] for row in rows} == {name: codec.encode(photos / name) for name in NAMES}
    assert rows[0]["width"] == 40
    assert [row["label"] for row in rows] == ["cat", "cat", "dog", None]
    assert work.write_manifest(ManifestFormat.PARQUET) == "manifest.parquet"
    manifest = pq.read_table(out / "manifest.parquet").to_pylist()
    assert [row["path"] for row in manifest] == NAMES
    assert {row["output"] for row in manifest} == {part.name}


def test_resuming_does_what_is_left_and_what_failed(tiny_model: Path, photos: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "out", options_of(tiny_model)
    good = (photos / "loose.png").read_bytes()
    (photos / "loose.png").write_bytes(b"no picture")
    first = Bulk(str(photos), str(out), options, suffixes=SUFFIXES)
    first.todo.remove("cat/a.png")
    do_all(first, photos, out, options)
    assert first.done["loose.png"].error == "not an image that Pillow can read"
    (photos / "loose.png").write_bytes(good)
    second = Bulk(str(photos), str(out), options, suffixes=SUFFIXES, resume=True)
    assert second.todo == ["cat/a.png", "loose.png"]
    do_all(second, photos, out, options)
    third = Bulk(str(photos), str(out), options, suffixes=SUFFIXES, resume=True)
    assert third.todo == []
    assert sorted(third.done) == NAMES


def test_shards_without_a_record_are_removed_before_their_pictures_are_done_again(
    tiny_model: Path, photos: Path, tmp_path: Path
) -> None:
    out, options = tmp_path / "out", options_of(tiny_model, BulkFormat.WEBDATASET)
    do_all(Bulk(str(photos), str(out), options, suffixes=SUFFIXES), photos, out, options)
    (record,) = (out / RECORDS).glob("part-*.json")
    record.unlink()
    work = Bulk(str(photos), str(out), options, suffixes=SUFFIXES, resume=True)
    assert len(work.todo) == 4
    work._remove_orphans()
    assert list(out.glob("*.tar")) == []


def test_an_output_that_cannot_be_written_is_the_error_of_its_pictures(
    tiny_model: Path, photos: Path, tmp_path: Path
) -> None:
    out, options = tmp_path / "out", options_of(tiny_model)
    work = Bulk(str(photos), str(out), options, suffixes=SUFFIXES)
    out.mkdir()
    (out / "dog").write_bytes(b"")
    do_all(work, photos, out, options)
    assert "dog" in work.done["dog/deep/a.png"].error
    assert [path for path, row in work.done.items() if row.error] == ["dog/deep/a.png"]


def test_outputs_and_sources_that_do_not_fit_are_refused(tiny_model: Path, photos: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "out", options_of(tiny_model)
    with pytest.raises(PqmimError, match="is not a folder"):
        Bulk(str(tmp_path / "none"), str(out), options, suffixes=SUFFIXES)
    with pytest.raises(PqmimError, match="no pictures in this folder"):
        Bulk(str(photos), str(out), options, suffixes={".tif"})
    with pytest.raises(PqmimError, match="nosuch://x: "):
        Bulk("nosuch://x", str(out), options, suffixes=SUFFIXES)
    with pytest.raises(OutputError, match="has files already; name an empty folder"):
        Bulk(str(photos), str(photos), options, suffixes=SUFFIXES)
    Bulk(str(photos), str(out), options, suffixes=SUFFIXES).start()
    with pytest.raises(OutputError, match="has files already; --resume goes on with them"):
        Bulk(str(photos), str(out), options, suffixes=SUFFIXES)
    other = BulkOptions(model=str(tiny_model), quality=10)
    with pytest.raises(OutputError, match=r"was written with quality 50\.0, not 10; name another folder"):
        Bulk(str(photos), str(out), other, suffixes=SUFFIXES, resume=True)


def test_a_model_that_is_not_there_is_one_line(photos: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bulk", str(photos), str(tmp_path / "out"), "-m", "no such model"])
    assert result.exit_code == 1
    assert result.output.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", [BulkFormat.PARQUET, BulkFormat.WEBDATASET])
def test_shards_are_a_data_set(tiny_model: Path, photos: Path, tmp_path: Path, codec: Codec, to: BulkFormat) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("pyarrow")
    from pqmim.datasets import TokenDataset

    out, options = tmp_path / "out", options_of(tiny_model, to)
    do_all(Bulk(str(photos), str(out), options, suffixes=SUFFIXES), photos, out, options)
    dataset = TokenDataset(out, model=tiny_model)
    assert dataset.classes == ("cat", "dog")
    assert [dataset[index]["name"] for index in range(4)] == NAMES
    for index, name in enumerate(NAMES):
        assert np.array_equal(dataset[index]["tokens"].numpy(), codec.encode_tokens(photos / name))
        assert dataset[index]["height"] == 24 + 8 * index


@needs_ray
def test_the_command_writes_files_and_a_manifest_to_urls(
    tiny_model: Path, photos: Path, tmp_path: Path, codec: Codec
) -> None:
    (photos / "bad.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    command = ("bulk", photos.as_uri(), out.as_uri(), "-m", tiny_model, "--concurrency", "2", "--batch-size", "2")
    result = run_pqmim(*command)
    assert result.returncode == 1
    assert "pqmim: bad.png: not an image that Pillow can read" in result.stderr.splitlines()
    manifest = manifest_of(out)
    assert sorted(manifest) == sorted([*NAMES, "bad.png"])
    for name in NAMES:
        data = (out / manifest[name]["output"]).read_bytes()
        assert data == codec.encode(photos / name)
        assert int(manifest[name]["bytes"]) == len(data)
        assert manifest[name]["error"] == ""
    assert manifest["bad.png"]["error"] == "not an image that Pillow can read"
    (photos / "bad.png").write_bytes((photos / "loose.png").read_bytes())
    again = run_pqmim(*command, "--resume")
    assert again.returncode == 0
    assert "pqmim: 4 of 5 pictures are done already" in again.stderr.splitlines()
    assert manifest_of(out)["bad.png"]["error"] == ""


@needs_ray
def test_a_worker_that_is_killed_loses_nothing(tiny_model: Path, photos: Path, tmp_path: Path, codec: Codec) -> None:
    out = tmp_path / "out"
    command = driver("die once", "webdataset", tiny_model, photos, out)
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True)
    assert sorted(result.stdout.splitlines()) == [f"{name}: " for name in NAMES]
    assert (tmp_path / "log").read_text().split().count("cat/b.v2.png") == 2
    assert tar_contents(out) == {name: codec.encode(photos / name) for name in NAMES}
    assert {path: row["error"] for path, row in manifest_of(out).items()} == dict.fromkeys(NAMES, "")


@needs_ray
def test_a_picture_that_kills_every_worker_costs_itself_alone(tiny_model: Path, photos: Path, tmp_path: Path) -> None:
    command = driver("always die", "webdataset", tiny_model, photos, tmp_path / "out")
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True)
    errors = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert sorted(errors) == NAMES
    assert [name for name, error in errors.items() if error] == ["cat/b.v2.png"]
    assert errors["cat/b.v2.png"].startswith("its worker process died")
    assert sorted(tar_contents(tmp_path / "out")) == [name for name in NAMES if name != "cat/b.v2.png"]


@needs_ray
def test_a_driver_that_is_killed_loses_nothing(tiny_model: Path, photos: Path, tmp_path: Path, codec: Codec) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        driver("hang", "files", tiny_model, photos, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + TIMEOUT
    while not list((out / RECORDS).glob("part-*.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    result = run_pqmim("bulk", photos, out, "-m", tiny_model, "--concurrency", "1", "--resume")
    assert result.returncode == 0
    assert "pqmim: 2 of 4 pictures are done already" in result.stderr.splitlines()
    for name in NAMES:
        assert (out / name).with_suffix(".pqm").read_bytes() == codec.encode(photos / name)
    assert sorted(manifest_of(out)) == NAMES
