"""Streamed photos: batches that depend on seed, step, batch size and lanes alone, epochs that leave nothing out."""

import io
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from pqmim.errors import ConfigError, MissingExtraError
from pqmim.training.data import STAGE_STEPS
from pqmim.training.streaming import ShardSampler, ShardSet, StreamSettings

CPU = torch.device("cpu")
CROP = 16


def write_shards(folder: Path, shards: list[list[tuple[str, bytes]]]) -> Path:
    folder.mkdir()
    for index, files in enumerate(shards):
        with tarfile.open(folder / f"{index:03}.tar", "w") as shard:
            for name, content in files:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    return folder


def flat_png(value: int, side: int = 24) -> bytes:
    """A photo of one shade, by which its crops are known."""
    file = io.BytesIO()
    Image.new("RGB", (side, side + value % 5), (value, value, value)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four shards of five photos, shades 0 to 19, with other files between them."""
    shards = [[(f"{i:03}.png", flat_png(i)) for i in range(5 * s, 5 * s + 5)] for s in range(4)]
    shards[0].insert(2, ("000.json", b"{}"))
    shards[3].append(("__note__", b"left out"))
    return write_shards(tmp_path / "shards", shards)


def settings(lanes: int = 4, readers: int = 0, seed: int = 0) -> StreamSettings:
    return StreamSettings(lanes=lanes, readers=readers, shuffle_buffer=3, crop=CROP, min_scale=0.7, seed=seed)


def sampler(shards: ShardSet, **changes: int) -> ShardSampler:
    return ShardSampler(shards, settings(**changes), CPU)


def shades(batch: Tensor) -> list[int]:
    return [round(float(crop.mean()) * 255) for crop in batch]


def test_an_epoch_has_every_photo_once_in_another_order(folder: Path) -> None:
    stream = sampler(ShardSet.scan(folder))
    drawn = [shade for step in range(15) for shade in shades(stream.batch(step, 4))]
    for epoch in range(3):
        assert sorted(drawn[20 * epoch : 20 * epoch + 20]) == list(range(20))
    assert drawn[:20] != drawn[20:40]


@pytest.mark.parametrize("step", [1, 4, 5, 13])
def test_any_step_can_be_resumed_from(folder: Path, step: int) -> None:
    shards = ShardSet.scan(folder)
    stream = sampler(shards, lanes=2)
    whole = [stream.batch(s, 6) for s in range(step + 2)]
    resumed = sampler(shards, lanes=2)
    assert torch.equal(resumed.batch(step, 6), whole[step])
    assert torch.equal(resumed.batch(step + 1, 6), whole[step + 1])
    assert torch.equal(resumed.batch(0, 6), whole[0])  # going back works too


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more readers than cores: for the order, no matter
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork in a process with threads
@pytest.mark.parametrize(("processes", "readers"), [(1, 2), (2, 0), (4, 0), (2, 3)])
def test_processes_and_readers_only_share_the_work(folder: Path, processes: int, readers: int) -> None:
    shards = ShardSet.scan(folder)
    alone = sampler(shards)
    for step in range(3):
        whole = alone.batch(step, 8)
        for rank in range(processes):
            if step == 0 or readers == 0:  # starting readers takes time
                part = slice(rank, None, processes)
                assert torch.equal(sampler(shards, readers=readers).batch(step, 8, part), whole[part])


def test_seeds_and_stages_differ(folder: Path) -> None:
    shards = ShardSet.scan(folder)
    drawn = [shades(sampler(shards, seed=seed).batch(step, 8)) for seed, step in ((0, 0), (1, 0), (0, STAGE_STEPS))]
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]


def test_held_out_photos_are_never_drawn(folder: Path) -> None:
    shards, photos = ShardSet.scan(folder).hold_out(4, CROP)
    held_out = {int(photos.photo(index)[0, 0, 0]) for index in range(len(photos))}
    assert len(held_out) == len(photos) == 4
    assert len(shards) == 16
    stream = sampler(shards)
    drawn = Counter(shade for step in range(8) for shade in shades(stream.batch(step, 4)))
    assert set(drawn) == set(range(20)) - held_out


def test_excluded_photos_are_never_drawn(folder: Path) -> None:
    shards = ShardSet.scan(folder)
    out = shards.names[0][:2]
    left = shards.without([name.rpartition("/")[2] for name in out])
    assert len(left) == len(shards) - 2
    assert set(shards.names[0]) - set(left.names[0]) == set(out)
    stream = sampler(left)
    drawn = {shade for step in range(8) for shade in shades(stream.batch(step, 4))}
    assert len(drawn) == len(left)
    assert len(shards.without([])) == len(shards)
    with pytest.raises(ConfigError, match=r"data\.exclude"):
        shards.without(["*"])


def test_the_next_photo_stands_in_for_an_unusable_one(tmp_path: Path) -> None:
    files = [("0.png", flat_png(0)), ("1.png", b"broken"), ("2.png", flat_png(2, side=15)), ("3.png", flat_png(3))]
    shards = ShardSet.scan(write_shards(tmp_path / "shards", [files]))
    stream = sampler(shards, lanes=1)
    drawn = [shade for step in range(6) for shade in shades(stream.batch(step, 2))]
    assert set(drawn) == {0, 3}
    assert [shade for step in (3, 4) for shade in shades(sampler(shards, lanes=1).batch(step, 2))] == drawn[6:10]
    nothing = ShardSet.scan(write_shards(tmp_path / "none", [[("1.png", b"broken")]]))
    with pytest.raises(ConfigError, match="16 pixels"):
        sampler(nothing, lanes=1).batch(0, 1)


def test_settings_that_cannot_be(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = ShardSet.scan(folder)
    with pytest.raises(ConfigError, match="stream_lanes must be at most"):
        sampler(shards, lanes=5)
    with pytest.raises(ConfigError, match="multiple of the 3 processes"):
        sampler(shards).batch(0, 6, slice(0, None, 3))
    for count in (0, 20):
        with pytest.raises(ConfigError, match="validation_photos"):
            shards.hold_out(count, CROP)
    with pytest.raises(ConfigError, match="16 pixels"):
        ShardSet.scan(write_shards(tmp_path / "none", [[("1.png", b"broken"), ("2.png", b"")]])).hold_out(1, CROP)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="tar shards"):
        ShardSet.scan(tmp_path / "empty")
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(MissingExtraError, match=r"pqmim\[train\]"):
        sampler(shards)


def test_manifest_hash_tells_sets_apart(folder: Path, tmp_path: Path) -> None:
    other = write_shards(tmp_path / "other", [[("0.png", flat_png(0))]])
    assert ShardSet.scan(folder).manifest_hash == ShardSet.scan(folder).manifest_hash
    assert ShardSet.scan(other).manifest_hash != ShardSet.scan(folder).manifest_hash
    assert len(ShardSet.scan(folder / "000.tar")) == 5
    assert ShardSet.scan(other).names == (("0.png",),)
