"""Tokens as a data set: what `tokens --shards` writes, and what reads it."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from pqmim.cli import app
from pqmim.codec import Codec, load_codec
from pqmim.errors import OutputError
from pqmim.token_files import ShardKind, ShardWriter, TokenRecord, label_of

NAMES = ["cat/a.png", "cat/b.v2.png", "dog/deep/a.png", "loose.png"]
LABELS = ["cat", "cat", "dog", None]


@pytest.fixture(scope="module")
def codec(tiny_model: Path) -> Codec:
    return load_codec(tiny_model, device="cpu")


def write_shards(tiny_model: Path, *arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["tokens", "-m", str(tiny_model), *map(str, arguments)])


def record(number: int, label: str | None = None) -> TokenRecord:
    tokens = np.arange(24, dtype=np.uint16).reshape(2, 3, 4) + number
    return TokenRecord(f"{number}.png", tokens, "0123abcd", 2, 64, 48, 1, label)


def test_a_shard_has_the_tokens_that_encode_sends(tiny_model: Path, photos: Path, codec: Codec) -> None:
    assert write_shards(tiny_model, photos, "--shards", photos.parent / "out", "--with-files").exit_code == 0
    with tarfile.open(photos.parent / "out" / "shard-000000.tar") as archive:
        members = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    infos = [json.loads(members[f"{number:09}.json"]) for number in range(4)]
    assert [info["name"] for info in infos] == NAMES
    assert [info["label"] for info in infos] == LABELS
    assert [(info["width"], info["height"]) for info in infos] == [(40, 24), (40, 32), (40, 40), (40, 48)]
    assert {info["model_id"] for info in infos} == {codec.model_id.hex()}
    for number, name in enumerate(NAMES):
        data = codec.encode(photos / name)
        assert members[f"{number:09}.pqm"] == data
        with (photos.parent / "grid.npy").open("wb") as file:
            file.write(members[f"{number:09}.npy"])
        grid = np.load(photos.parent / "grid.npy")
        assert grid.dtype == np.uint16
        assert np.array_equal(grid, codec.decode_tokens(data))
    assert [members.get(f"{number:09}.cls") for number in range(4)] == [b"0", b"0", b"1", None]


def test_shards_of_pqm_files_and_of_pictures_are_the_same(tiny_model: Path, photos: Path) -> None:
    coded, out = photos.parent / "coded", photos.parent / "out"
    arguments = ["encode", "-m", str(tiny_model), str(photos), "-o", str(coded)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert write_shards(tiny_model, photos, "--shards", out / "1").exit_code == 0
    assert write_shards(tiny_model, coded, "--shards", out / "2", "-j", "2").exit_code == 0
    first, second = ((out / name / "shard-000000.tar").read_bytes() for name in "12")
    assert len(first) == len(second)
    assert first.replace(b".png", b".pqm") == second


def test_shards_hold_as_many_pictures_as_asked_for(tiny_model: Path, photos: Path) -> None:
    out = photos.parent / "out"
    result = write_shards(tiny_model, photos, "--shards", out, "--per-shard", "3")
    assert result.output.splitlines()[-1].endswith("out  2 shards  4 pictures")
    assert sorted(path.name for path in out.iterdir()) == ["shard-000000.tar", "shard-000001.tar"]


def test_a_picture_that_cannot_be_read_is_reported_and_left_out(tiny_model: Path, photos: Path) -> None:
    (photos / "bad.png").write_bytes(b"no picture")
    result = write_shards(tiny_model, photos, "--shards", photos.parent / "out")
    assert result.exit_code == 1
    assert "bad.png: " in result.output
    assert result.output.splitlines()[-1].endswith("1 shards  4 pictures")


def test_shards_are_replaced_only_if_asked_for(tiny_model: Path, photos: Path) -> None:
    out = photos.parent / "out"
    assert write_shards(tiny_model, photos, "--shards", out, "--per-shard", "1").exit_code == 0
    again = write_shards(tiny_model, photos, "--shards", out)
    assert again.exit_code == 1
    assert again.output == f"pqmim: {out} has shards already; -f replaces them\n"
    assert write_shards(tiny_model, photos, "--shards", out, "-f").exit_code == 0
    assert [path.name for path in out.iterdir()] == ["shard-000000.tar"]


@pytest.mark.parametrize("others", [["-o", "x.npy"], ["--skip-existing"]])
def test_contradictions_are_refused(tiny_model: Path, photos: Path, others: list[str]) -> None:
    result = write_shards(tiny_model, photos, "--shards", photos.parent / "out", *others)
    assert result.exit_code == 2
    assert not (photos.parent / "out").exists()


def test_stdin_has_no_place_in_a_data_set(tiny_model: Path) -> None:
    assert write_shards(tiny_model, "-", "--shards", "out").exit_code == 2


def test_the_label_is_the_first_folder() -> None:
    assert label_of(Path("cat/deep/a.png")) == "cat"
    assert label_of(Path("a.png")) is None


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        writer = ShardWriter(tmp_path / name, ShardKind.WEBDATASET, ["x", "y"])
        writer.add(record(0, "y"))
        writer.finish()
        writer.finish()
        assert writer.num_records == 1
    first, second = ((tmp_path / name / "shard-000000.tar").read_bytes() for name in "ab")
    assert first == second


def test_a_folder_with_shards_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "shard-000000.tar").touch()
    with pytest.raises(OutputError, match="has shards already"):
        ShardWriter(tmp_path, ShardKind.PARQUET, [])


def test_parquet_is_what_pyarrow_reads(tiny_model: Path, photos: Path, codec: Codec) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    out = photos.parent / "out"
    assert write_shards(tiny_model, photos, "--shards", out, "--to", "parquet", "--with-files").exit_code == 0
    rows = pq.read_table(out / "shard-000000.parquet").to_pylist()
    assert [row["name"] for row in rows] == NAMES
    assert [row["label"] for row in rows] == LABELS
    for row in rows:
        assert row["pqm"] == codec.encode(photos / row["name"])
        grid = np.array(row["tokens"], np.uint16).reshape(row["shape"])
        assert np.array_equal(grid, codec.decode_tokens(row["pqm"]))


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_shards(tiny_model: Path, photos: Path, codec: Codec) -> None:
    webdataset = pytest.importorskip("webdataset")
    out = photos.parent / "out"
    assert write_shards(tiny_model, photos, "--shards", out).exit_code == 0
    shards = webdataset.WebDataset(str(out / "shard-000000.tar"), shardshuffle=False).decode()
    samples = list(shards)
    assert [sample["json"]["name"] for sample in samples] == NAMES
    assert [sample.get("cls") for sample in samples] == [0, 0, 1, None]
    assert np.array_equal(samples[2]["npy"], codec.encode_tokens(photos / NAMES[2]))
