"""Damaged files: whatever happened to it, a file is refused with an error of the tree and one line.

Damage of two kinds is made: to the bytes as they are, which the checksum of the file shows; and beneath a
checksum that is right again, as a faulty or hostile writer would leave it, which the payload and the token
check show. The mini form has no token check, so a payload made up with care may decode to some picture there; nothing
worse comes of it. What can be salvaged of visible damage is.
"""

import binascii
import random
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from pqmim.bitstream import MAX_DIMENSION, MAX_LEVEL, Container, pack, parse
from pqmim.cli import app
from pqmim.errors import (
    BitstreamError,
    DamagedFileError,
    LimitError,
    ModelMismatchError,
    NotAPqmFileError,
    TokenCheckError,
)

if TYPE_CHECKING:
    from pqmim.codec import Codec

SIZES = [(1, 1), (40, 24), (33, 50)]

TINY_LEVELS = 6
"""Of the tiny model."""


@pytest.fixture(scope="module")
def codec(tiny_model: Path) -> "Codec":
    from pqmim.codec import load_codec

    return load_codec(tiny_model, device="cpu")


@pytest.fixture(scope="module")
def good_files(codec: "Codec") -> list[bytes]:
    """Files of several sizes in the mini form, and one with an alpha section in the full form."""
    pictures = []
    for width, height in SIZES:
        y, x = np.mgrid[0:height, 0:width]
        rgb = np.stack([5 * x, 5 * y, 3 * x + 2 * y], axis=-1) % 256
        pictures.append(Image.fromarray(rgb.astype(np.uint8)))
    with_alpha = pictures[1].convert("RGBA")
    with_alpha.putalpha(Image.linear_gradient("L").resize(with_alpha.size))
    return [codec.encode(picture, quality=70) for picture in [*pictures, with_alpha]]


def with_checksum(body: bytes) -> bytes:
    return body + zlib.crc32(body).to_bytes(4, "big")


def with_mini_checksum(body: bytes) -> bytes:
    return body + (binascii.crc_hqx(body, 0xFFFF) ^ 0xFFFF).to_bytes(2, "big")


def flipped(data: bytes, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def visibly_damaged(good_files: list[bytes], rng: random.Random) -> Iterator[bytes]:
    """Yield more than 500 files whose checksum or length is wrong."""
    for data in good_files:
        num_bits = 8 * len(data)
        for bit in rng.sample(range(num_bits), min(100, num_bits)):
            yield flipped(data, bit)
        for length in rng.sample(range(len(data)), min(40, len(data))):
            yield data[:length]
        for _ in range(10):
            start = rng.randrange(len(data))
            yield data[:start] + data[start + 1 :]  # a byte is lost
            yield data[:start] + rng.randbytes(1) + data[start:]  # one is added
            yield data + rng.randbytes(rng.randrange(1, 20))
            yield data[:start] + bytes(len(data) - start + 1)  # zeros from somewhere on
    for first in good_files:
        for second in good_files:
            if first != second:
                yield first + second
                yield first[:14] + second[14:]  # the header of another file
    for length in (1, 2, 4, 5, 17, 18, 100, 1000):
        yield rng.randbytes(length)
        yield good_files[0][:9] + rng.randbytes(length)
        yield bytes(length)


def with_other_payload(data: bytes, rng: random.Random) -> Iterator[bytes]:
    """Yield files whose checksum is right and whose payload is not what a writer makes."""
    container = parse(data)
    payload = container.payload
    for bit in rng.sample(range(8 * len(payload)), min(8, 8 * len(payload))):
        yield pack(replace(container, payload=flipped(payload, bit)))
    for _ in range(4):
        yield pack(replace(container, payload=rng.randbytes(rng.randrange(2 * len(payload) + 8))))
    yield pack(replace(container, payload=payload[:-1]))
    yield pack(replace(container, payload=payload + b"\1"))
    yield pack(replace(container, width=container.width + 16))
    yield pack(replace(container, height=container.height + 16))
    yield pack(replace(container, width=3000, height=1))
    yield pack(replace(container, level=(container.level + 1) % TINY_LEVELS))


def hiddenly_damaged(good_files: list[bytes], model_id: bytes, rng: random.Random) -> Iterator[bytes]:
    """Yield files whose checksum is right and whose content cannot be."""
    for data in good_files:
        container = replace(parse(data), model_id=model_id)
        payload = container.payload
        yield pack(replace(container, payload=payload + b"\0"))
        yield pack(replace(container, payload=payload + rng.randbytes(40)))
        yield pack(replace(container, width=MAX_DIMENSION, height=MAX_DIMENSION))
        yield pack(replace(container, model_id=bytes(4)))
        yield pack(replace(container, level=TINY_LEVELS))
        yield pack(replace(container, level=MAX_LEVEL, token_check=0))
        yield pack(replace(container, alpha=b"no picture", token_check=0))
        yield pack(replace(container, metadata=rng.randbytes(30), token_check=0))
    mini, full = good_files[0], good_files[3]
    yield with_checksum(full[:4] + bytes([full[4] ^ 0x10]) + full[5:-4])  # another version
    yield with_checksum(full[:4] + bytes([full[4] | 0x08]) + full[5:-4])  # an unknown flag
    yield with_mini_checksum(mini[:2] + bytes([mini[2] | 0x40]) + mini[3:-2])
    yield from with_other_payload(full, rng)
    with_alpha, other_size = parse(full), parse(good_files[2])
    yield pack(replace(with_alpha, token_check=(with_alpha.token_check or 0) ^ 1 << rng.randrange(16)))
    yield pack(replace(other_size, model_id=model_id, alpha=with_alpha.alpha, token_check=0))


def test_good_files_are_good(codec: "Codec", good_files: list[bytes]) -> None:
    for data, (width, height) in zip(good_files, [*SIZES, SIZES[1]], strict=True):
        assert codec.decode(data).size == (width, height)


def test_500_visibly_damaged_files_are_refused(codec: "Codec", good_files: list[bytes]) -> None:
    rng = random.Random(1)
    damaged = {data for data in visibly_damaged(good_files, rng) if data not in good_files}
    assert len(damaged) >= 500
    for data in damaged:
        for use in (codec.decode, codec.decode_tokens):
            with pytest.raises(BitstreamError) as caught:
                use(data)
            assert "\n" not in str(caught.value)


def test_hiddenly_damaged_files_are_refused(codec: "Codec", good_files: list[bytes]) -> None:
    rng = random.Random(2)
    damaged = [data for data in hiddenly_damaged(good_files, codec.model_id, rng) if data not in good_files]
    assert len(damaged) >= 50
    for data in damaged:
        with pytest.raises((BitstreamError, LimitError)) as caught:
            codec.decode(data)
        assert "\n" not in str(caught.value)


def test_made_up_payloads_without_token_check_are_refused_or_decode(codec: "Codec", good_files: list[bytes]) -> None:
    rng = random.Random(4)
    num_refused = num_decoded = 0
    for good in good_files[:3]:
        for data in with_other_payload(good, rng):
            container = parse(data)
            try:
                assert codec.decode(data).size == (container.width, container.height)
                num_decoded += 1
            except DamagedFileError:
                num_refused += 1
            partial = pack(replace(container, is_partial=True))  # there everything is a payload
            assert codec.decode(partial).size == (container.width, container.height)
    assert min(num_refused, num_decoded) > 15  # which of them, is chance


def test_visibly_damaged_files_are_salvaged(codec: "Codec", good_files: list[bytes]) -> None:
    """Whatever happened to it, a file gives a picture and says what is wrong, or an error of the tree."""
    rng = random.Random(5)
    num_salvaged = 0
    for data in rng.sample(sorted(set(visibly_damaged(good_files, rng)) - set(good_files)), 120):
        try:
            decoded = codec.decode_with_report(data, salvage=True, max_pixels=20_000)
        except (BitstreamError, LimitError):
            continue
        num_salvaged += 1
        assert decoded.problem
        assert "\n" not in decoded.problem
        assert 0 <= decoded.invented_share <= 1
    assert num_salvaged > 50


@pytest.mark.parametrize("index", range(4))
def test_a_cut_file_is_salvaged_as_far_as_it_goes(codec: "Codec", good_files: list[bytes], index: int) -> None:
    data = good_files[index]
    tokens = codec.decode_tokens(data)
    container = parse(data)
    header = len(data) - len(container.payload) - (2 if container.is_mini else 6)
    shares = []
    for length in range(header, len(data)):
        report = codec.decode_with_report(data[:length], salvage=True)
        assert report.image.size == (container.width, container.height)
        assert report.image.mode == ("RGB" if container.alpha is None else "RGBA")
        assert "checksum" in report.problem
        shares.append(report.invented_share)
    assert shares[0] == 1
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.5 or tokens.size == 3
    whole = codec.decode_with_report(data, salvage=True)
    assert (whole.invented_share, whole.problem) == (0, "")
    assert np.array_equal(np.asarray(whole.image), np.asarray(codec.decode(data)))


def test_salvage_shows_what_the_checks_refuse(codec: "Codec", good_files: list[bytes]) -> None:
    container = parse(good_files[3])
    wrong = pack(replace(container, token_check=(container.token_check or 0) ^ 1))
    with pytest.raises(TokenCheckError):
        codec.decode(wrong)
    report = codec.decode_with_report(wrong, salvage=True)
    assert "selftest" in report.problem
    assert np.array_equal(np.asarray(report.image), np.asarray(codec.decode(good_files[3])))

    no_alpha = pack(replace(container, alpha=b"no picture"))
    report = codec.decode_with_report(no_alpha, salvage=True)
    assert report.image.mode == "RGB"
    assert "alpha" in report.problem
    assert report.invented_share == 0

    no_metadata = pack(replace(container, metadata=b"no zlib"))
    with pytest.raises(DamagedFileError, match="metadata section cannot be inflated"):
        codec.decode(no_metadata)
    report = codec.decode_with_report(no_metadata, salvage=True)
    assert np.array_equal(np.asarray(report.image), np.asarray(codec.decode(good_files[3])))
    assert (report.invented_share, bool(report.metadata)) == (0, False)
    assert report.problem.startswith("the metadata section cannot be inflated: ")

    start = good_files[3].index(container.alpha or b"")
    report = codec.decode_with_report(good_files[3][: start + 3], salvage=True)
    assert report.image.mode == "RGB"
    assert report.invented_share == 1
    assert "alpha" in report.problem


def test_the_cause_is_told(codec: "Codec", good_files: list[bytes]) -> None:
    container = replace(parse(good_files[1]), model_id=codec.model_id)
    with pytest.raises(ModelMismatchError, match="0000"):
        codec.decode(pack(replace(container, model_id=bytes(4))))
    with pytest.raises(DamagedFileError, match=f"level {TINY_LEVELS} does not exist"):
        codec.decode(pack(replace(container, level=TINY_LEVELS)))
    with pytest.raises(LimitError):
        codec.decode(pack(Container(MAX_DIMENSION, MAX_DIMENSION, codec.model_id, 0, 1, b"")))
    with pytest.raises(NotAPqmFileError, match="empty"):
        codec.decode(b"")


def test_damaged_files_on_the_command_line(
    codec: "Codec", good_files: list[bytes], tiny_model: Path, tmp_path: Path
) -> None:
    """One call over a folder of damaged files and a good one: a line for each, and nothing else is left."""
    rng = random.Random(3)
    damaged = [*visibly_damaged(good_files, rng), *hiddenly_damaged(good_files, codec.model_id, rng)]
    damaged = [data for data in damaged if data not in good_files]
    inputs = tmp_path / "in"
    inputs.mkdir()
    for index, data in enumerate(rng.sample(damaged, 60)):
        (inputs / f"{index:02}.pqm").write_bytes(data)
    (inputs / "good.pqm").write_bytes(good_files[1])
    for command, output in (("decode", "good.png"), ("tokens", "good.npy")):
        folder = tmp_path / command
        model = ["--model", str(tiny_model)]
        result = CliRunner().invoke(app, [command, str(inputs), "-o", str(folder), *model])
        assert result.exit_code == 1
        assert [path.name for path in folder.iterdir()] == [output]
        lines = result.stderr.splitlines()
        assert len(lines) == 60
        for index, line in enumerate(lines):
            assert line.startswith(f"pqmim: {inputs / f'{index:02}.pqm'}: ")
            assert "internal error" not in line

    result = CliRunner().invoke(app, ["info", str(inputs)])
    assert result.exit_code == 1
    assert "internal error" not in result.stderr
