"""Training photos: folders and shards, the split, crops that depend on (seed, step) alone."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import synthetic_photo
from PIL import Image

from pqmim.errors import ConfigError
from pqmim.training.data import (
    CropSampler,
    PhotoStore,
    is_excluded,
    iterate_files,
    load_photos,
    shrink,
    split_photos,
    validation_crops,
    without,
)

CPU = torch.device("cpu")


def png(height: int, width: int, seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(synthetic_photo(height, width, seed)).save(file, "PNG")
    return file.getvalue()


def add_to_shard(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    shard.addfile(member, io.BytesIO(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five photos: two in a sub-folder, two in a shard; beside them one too small, one broken, one text."""
    root = tmp_path / "photos"
    (root / "sub").mkdir(parents=True)
    (root / "a.png").write_bytes(png(70, 90, 0))
    (root / "sub" / "b.PNG").write_bytes(png(64, 64, 1))
    (root / "sub" / "c.png").write_bytes(png(64, 200, 2))
    (root / "small.png").write_bytes(png(63, 300, 3))
    (root / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    (root / "notes.txt").write_text("no image")
    with tarfile.open(root / "shard.tar", "w") as shard:
        add_to_shard(shard, "d.png", png(80, 80, 4))
        add_to_shard(shard, "d.json", b"{}")
        add_to_shard(shard, "e.png", png(100, 64, 5))
    return root


def store_of(sizes: list[tuple[int, int]]) -> PhotoStore:
    """Photos whose samples count up, so that a crop tells where it was cut."""
    arrays = [np.arange(h * w * 3, dtype=np.int64).astype(np.uint8) for h, w in sizes]
    lengths = [len(a) for a in arrays]
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    names = tuple(f"{i}.png" for i in range(len(sizes)))
    return PhotoStore(torch.from_numpy(np.concatenate(arrays)), np.array(sizes), offsets, names)


def test_folders_and_shards(folder: Path) -> None:
    photos = load_photos(folder, min_side=64)
    assert sorted(photos.names) == ["a.png", "d.png", "e.png", "sub/b.PNG", "sub/c.png"]
    index = photos.names.index("sub/c.png")
    assert (photos.photo(index).numpy() == synthetic_photo(64, 200, 2)).all()
    assert (photos.photo(photos.names.index("d.png")).numpy() == synthetic_photo(80, 80, 4)).all()


def test_one_shard_or_one_file(folder: Path) -> None:
    assert load_photos(folder / "shard.tar", min_side=64).names == ("d.png", "e.png")
    assert [name for name, _ in iterate_files(folder / "a.png")] == ["a.png"]


def test_cache_is_the_same_and_needs_no_photos(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = load_photos(folder, min_side=64, cache=cache)
    for path in folder.rglob("*.*"):
        path.unlink()
    again = load_photos(folder, min_side=64, cache=cache)
    assert again.names == first.names
    assert again.manifest_hash == first.manifest_hash
    assert torch.equal(again.pixels, first.pixels)


def test_nothing_usable(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1000 pixels"):
        load_photos(folder, min_side=1000)
    with pytest.raises(ConfigError, match=r"data\.path"):
        load_photos(tmp_path / "none", min_side=1)


def test_manifest_hash_tells_data_sets_apart() -> None:
    hashes = {store_of(sizes).manifest_hash for sizes in ([(4, 5)], [(5, 4)], [(4, 5), (4, 5)])}
    assert len(hashes) == 3


@pytest.mark.parametrize(("total", "held_out"), [(2, 1), (12, 5), (50, 49)])
def test_split_is_a_partition(total: int, held_out: int) -> None:
    training, validation = split_photos(store_of([(4, 4)] * total), held_out)
    assert len(validation) == held_out
    assert sorted(training.names + validation.names) == sorted(f"{i}.png" for i in range(total))


@pytest.mark.parametrize("held_out", [0, 3, 4])
def test_split_that_leaves_nothing(held_out: int) -> None:
    with pytest.raises(ConfigError, match="validation_photos"):
        split_photos(store_of([(4, 4)] * 3), held_out)


def test_photos_are_left_out_by_their_names() -> None:
    photos = store_of([(4, 4)] * 12)
    assert without(photos, []).names == photos.names
    assert without(photos, ["1*.png"]).names == tuple(f"{i}.png" for i in (0, *range(2, 10)))
    with pytest.raises(ConfigError, match=r"data\.exclude"):
        without(photos, ["*"])


@pytest.mark.parametrize(
    ("name", "is_out"), [("a/imagenet_1.jpg", True), ("imagenet/a.jpg", False), ("IMAGENET.jpg", False)]
)
def test_patterns_are_of_file_names_without_folders(name: str, is_out: bool) -> None:
    assert is_excluded(name, ["other*", "imagenet*"]) == is_out


def test_crops_depend_on_seed_and_step_alone() -> None:
    photos = store_of([(70, 90), (64, 64), (200, 80)])

    def sampler(seed: int) -> CropSampler:
        return CropSampler(photos, crop=32, min_scale=0.5, seed=seed, device=CPU)

    one = sampler(0)
    first, second = one.batch(7, 4), one.batch(8, 4)
    assert torch.equal(sampler(0).batch(8, 4), second)
    assert torch.equal(one.batch(7, 4), first)
    assert not torch.equal(first, second)
    assert not torch.equal(sampler(1).batch(7, 4), first)
    assert first.shape == (4, 3, 32, 32)
    assert first.min() >= 0
    assert first.max() <= 1


def test_crops_at_full_scale_are_pixels_of_the_photo() -> None:
    photo = synthetic_photo(50, 60)
    photos = PhotoStore(torch.from_numpy(photo.reshape(-1)), np.array([[50, 60]]), np.array([0]), ("p",))
    sampler = CropSampler(photos, crop=48, min_scale=1.0, seed=0, device=CPU)
    places = {
        candidate.tobytes()
        for flipped in (photo, photo[:, ::-1])
        for top in range(3)
        for left in range(13)
        for candidate in [np.ascontiguousarray(flipped[top : top + 48, left : left + 48])]
    }
    for step in range(5):
        (crop,) = sampler.batch(step, 1)
        pixels = np.ascontiguousarray((crop.permute(1, 2, 0) * 255).round().byte().numpy())
        assert pixels.tobytes() in places


def test_smaller_scales_keep_the_mean() -> None:
    pixels = torch.full((128 * 128 * 3,), 51, dtype=torch.uint8)
    photos = PhotoStore(pixels, np.array([[128, 128]]), np.array([0]), ("p",))
    crops = CropSampler(photos, crop=32, min_scale=0.25, seed=0, device=CPU).batch(0, 6)
    assert torch.allclose(crops, torch.tensor(0.2), atol=1e-6)


@pytest.mark.parametrize("sides", [(32,), (64, 32), (96, 80, 37, 32)])
def test_windows_are_shrunk_by_an_area_filter(sides: tuple[int, ...]) -> None:
    windows = [torch.from_numpy(synthetic_photo(side, side, side)) for side in sides]
    mirror = np.arange(len(sides)) % 2 == 1
    crops = shrink(windows, mirror, 32, CPU)
    assert crops.is_contiguous(memory_format=torch.channels_last)
    for crop, window, mirrored in zip(crops, windows, mirror, strict=True):
        # Each sample of the crop is the mean of its area: repeat the samples until both grids fit into one.
        fine = window.double().repeat_interleave(32, 0).repeat_interleave(32, 1)
        side = len(window)
        expected = fine.view(32, side, 32, side, 3).mean((1, 3)).permute(2, 0, 1) / 255
        assert torch.allclose(crop.flip(2) if mirrored else crop, expected.float(), atol=1e-6)


def test_parts_of_a_batch_are_the_batch() -> None:
    sampler = CropSampler(store_of([(70, 90), (64, 64)]), crop=32, min_scale=0.5, seed=0, device=CPU)
    whole = sampler.batch(3, 6)
    for count in (1, 2, 3):
        for first in range(count):
            part = slice(first, None, count)
            assert torch.equal(sampler.batch(3, 6, part), whole[part])


def test_photos_go_to_a_gpu_if_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    photos = store_of([(10, 10)])
    assert photos.on(CPU) is photos
    moved = []
    monkeypatch.setattr(torch.Tensor, "to", lambda pixels, device: moved.append(device) or pixels)
    for free, fits in ((599, False), (600, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**9))
        photos.on(torch.device("cuda"))
        assert bool(moved) == fits


def test_validation_crops_are_the_middles() -> None:
    photo = synthetic_photo(50, 61)
    photos = PhotoStore(torch.from_numpy(photo.reshape(-1)), np.array([[50, 61]]), np.array([0]), ("p",))
    (crop,) = validation_crops(photos, 32, CPU)
    assert ((crop * 255).round().byte().permute(1, 2, 0).numpy() == photo[9:41, 14:46]).all()
