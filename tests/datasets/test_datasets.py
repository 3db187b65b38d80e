"""Tokens for PyTorch: shards, Parquet and .pqm files give the same samples, through loaders too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_token_files import NAMES, record, write_shards
from typer.testing import CliRunner

torch = pytest.importorskip("torch")

from pqmim.bitstream import parse  # noqa: E402
from pqmim.cli import app  # noqa: E402
from pqmim.codec import Codec, load_codec  # noqa: E402
from pqmim.datasets import NO_LABEL, Sample, TokenDataset  # noqa: E402
from pqmim.errors import BitstreamError, ConfigError  # noqa: E402
from pqmim.options import EncodeOptions  # noqa: E402
from pqmim.token_files import ROW_GROUP, ShardKind, ShardWriter  # noqa: E402


@pytest.fixture(scope="module")
def codec(tiny_model: Path) -> Codec:
    return load_codec(tiny_model, device="cpu")


@pytest.fixture(params=["webdataset", "parquet", "files"])
def dataset(request: pytest.FixtureRequest, tiny_model: Path, photos: Path) -> TokenDataset:
    """The data set of `photos`, from each kind of source."""
    out = photos.parent / "out"
    if request.param == "files":
        arguments = ["encode", "-m", str(tiny_model), str(photos), "-o", str(out)]
        assert CliRunner().invoke(app, arguments).exit_code == 0
        return TokenDataset(out, model=tiny_model)
    if request.param == "parquet":
        pytest.importorskip("pyarrow")
    assert write_shards(tiny_model, photos, "--shards", out, "--to", request.param, "--per-shard", "3").exit_code == 0
    return TokenDataset(out)


def test_samples_are_those_of_the_pictures(dataset: TokenDataset, photos: Path, codec: Codec) -> None:
    assert len(dataset) == 4
    assert dataset.classes == ("cat", "dog")
    assert dataset.labels == [0, 0, 1, NO_LABEL]
    for index, name in enumerate(NAMES):
        sample, data = dataset[index], codec.encode(photos / name)
        assert sample["tokens"].dtype == torch.int64
        assert np.array_equal(sample["tokens"].numpy(), codec.decode_tokens(data))
        assert (sample["width"], sample["height"], sample["scale"]) == (40, 24 + 8 * index, 1)
        assert sample["level"] == parse(data).level
        assert sample["label"] == dataset.labels[index]
        assert Path(sample["name"]).with_suffix("") == Path(name).with_suffix("")


def test_loaders_read_every_sample_once(dataset: TokenDataset) -> None:
    def collate(samples: list[Sample]) -> tuple[torch.Tensor, list[str]]:
        return torch.stack([sample["tokens"][:, :1, :1] for sample in samples]), [sample["name"] for sample in samples]

    loader = torch.utils.data.DataLoader(dataset, batch_size=2, shuffle=True, collate_fn=collate)
    names = [name for _, batch in loader for name in batch]
    assert sorted(names) == sorted(dataset[index]["name"] for index in range(4))


def test_worker_processes_read_the_same(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, ShardKind.WEBDATASET, [], per_shard=3)
    for number in range(5):
        writer.add(record(number))
    writer.finish()
    dataset = TokenDataset(tmp_path)
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=1, multiprocessing_context="spawn")
    tokens = torch.cat([batch["tokens"] for batch in loader])
    assert torch.equal(tokens, torch.stack([dataset[index]["tokens"] for index in range(5)]))
    assert int(tokens[4, 0, 0, 0]) == 4


def test_rows_of_all_groups_of_a_parquet_file_are_found(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    writer = ShardWriter(tmp_path, ShardKind.PARQUET, [])
    for number in range(ROW_GROUP + 3):
        writer.add(record(number))
    writer.finish()
    dataset = TokenDataset(tmp_path)
    assert len(dataset) == ROW_GROUP + 3
    for index in (0, ROW_GROUP - 1, ROW_GROUP, ROW_GROUP + 2):
        assert dataset[index]["name"] == f"{index}.png"
        assert int(dataset[index]["tokens"][0, 0, 0]) == index


def test_tokens_that_a_partial_file_lacks_are_minus_one(tiny_model: Path, photos: Path, codec: Codec) -> None:
    data = codec.encode(photos / NAMES[3], options=EncodeOptions(keep=0.5))
    coded = photos.parent / "coded"
    coded.mkdir()
    (coded / "a.pqm").write_bytes(data)
    expected = codec.decode_tokens(data)
    assert expected.min() == -1
    assert np.array_equal(TokenDataset(coded, model=tiny_model)[0]["tokens"].numpy(), expected)
    assert write_shards(tiny_model, coded, "--shards", photos.parent / "out").exit_code == 0
    assert np.array_equal(TokenDataset(photos.parent / "out")[0]["tokens"].numpy(), expected)


def test_the_order_of_the_classes_can_be_given(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, ShardKind.WEBDATASET, ["a", "b"])
    writer.add(record(0, "a"))
    writer.finish()
    assert TokenDataset(tmp_path, classes=["b", "a"])[0]["label"] == 1
    with pytest.raises(ConfigError, match="class a, which is not in the list"):
        TokenDataset(tmp_path, classes=["b"])


def test_what_cannot_be_read_is_named(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"no \.tar, \.parquet or \.pqm file"):
        TokenDataset(tmp_path)
    (tmp_path / "a.pqm").write_bytes(b"nothing")
    dataset = TokenDataset(tmp_path / "a.pqm", model=tiny_model)
    with pytest.raises(BitstreamError):
        dataset[0]
    with pytest.raises(IndexError, match="picture 1 of 1"):
        dataset[1]
    (tmp_path / "a.tar").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="several kinds"):
        TokenDataset(tmp_path)
    with pytest.raises(ConfigError, match="not a shard of tokens"):
        TokenDataset(tmp_path / "a.tar")


def test_vectors_of_tokens_are_those_that_the_picture_is_made_of(codec: Codec, photos: Path) -> None:
    data, tokens = codec.encode_with_tokens(photos / NAMES[0])
    level = parse(data).level
    vectors = codec.embed(tokens, level)
    quantizer = codec._networks.quantizer
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(quantizer.default), *tokens.shape[1:])
    assert np.array_equal(vectors, quantizer.dequantize(tokens, level)[0])
    assert np.array_equal(codec.embed(tokens), vectors)  # quality 50, which is the default of both
    missing = tokens.copy()
    missing[:, 0, 0] = -1
    for grid in (missing, missing.astype(np.uint16)):
        assert np.array_equal(codec.embed(grid, level)[:, 0, 0], quantizer.default)
        assert np.array_equal(codec.embed(grid, level)[:, 1:], vectors[:, 1:])


def test_tokens_of_another_model_have_no_vectors(codec: Codec) -> None:
    sizes = codec._networks.quantizer.alphabets.sizes
    grid, one = np.zeros((sizes.shape[1], 1, 2), np.int64), np.zeros((sizes.shape[1], 1, 2), np.int64)
    one[-1] = 1
    for tokens, level in (
        (grid + sizes.max(), 0),
        (grid + sizes[0, :, None, None], 0),
        (one, len(sizes) - 1),  # of a silent sub-quantizer
        (grid - 2, 0),
        (grid[1:], 0),
        (grid[0], 0),
        (grid.astype(float), 0),
        (grid, 99),
    ):
        with pytest.raises(ValueError, match=r"token|level"):
            codec.embed(tokens, level)
    assert codec.embed(one, 0).shape == (12, 1, 2)
