"""What the Python package says of inputs that modules of web/ are given too."""

from __future__ import annotations

import binascii
import hashlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pqmim import bitstream
from pqmim.alphabets import Alphabets
from pqmim.bitstream import Container
from pqmim.errors import PqmimError
from pqmim.grid_plan import gather, grid_plan
from pqmim.image_io import resize_picture
from pqmim.range_coding import PrefixReader, TokenReader, TokenWriter
from pqmim.schedule import Schedule, positions_of
from pqmim.selftest import GOLDEN
from pqmim.token_coding import token_bytes

Case = dict[str, Any]


def all_cases() -> dict[str, list[Case]]:
    """Cases by kind, as JSON holds them."""
    rng = np.random.default_rng(0)
    return {
        "checksums": list(checksums(rng)),
        "containers": [container_case(data) for data in containers(rng)],
        "payloads": list(payloads(rng)),
        "prefixes": list(prefixes(rng)),
        "schedules": [
            schedule(80, (5, 2, 1), 9, 7),
            schedule(7, (3, 1), 1, 1),
            schedule(5, (4,), 2, 30),
            schedule(12, (5, 2, 1), 6, 5, group_sizes=(2, 7)),
            schedule(3, (1, 5), 3, 3, group_sizes=(1,)),
        ],
        "alphabets": [
            alphabets_case([[9, 9, 9, 4, 1, 1, 7], [5, 1, 1, 1, 1, 2, 1], [1] * 7], [1, 1, 3, 3, 1, 2, 1]),
            alphabets_case([[511], [2]], [4]),
        ],
        "plans": [plan(5, 9, 4), plan(1, 1, 8), plan(17, 3, 8)],
        "scalings": list(scalings(rng)),
        "hashes": [hash_case(rng.integers(0, 1 << 16, count)) for count in (0, 1, 500)],
    }


def outcome_of(compute: Callable[[], Any]) -> Any:
    """What a function returns, or "name: message" of the error of ours that it raises."""
    try:
        return compute()
    except PqmimError as error:
        return f"{type(error).__name__}: {error}"


def checksums(rng: np.random.Generator) -> Iterator[Case]:
    for count in (2, 3, 9, 300):
        data = rng.bytes(count)
        crcs = {"crc16": binascii.crc_hqx(data, 0), "crc16FromOnes": binascii.crc_hqx(data, 0xFFFF)}
        yield {"data": data.hex(), **crcs, "crc32": zlib.crc32(data)}


def containers(rng: np.random.Generator) -> Iterator[bytes]:
    """Files of all forms, whole and damaged, and damaged ones whose checksum fits."""
    base = Container(60, 19, bytes.fromhex("c0ffee01"), 40, 2, bytes.fromhex("effedf"), token_check=0x23AD)
    mini = replace(base, level=2, scale=1)
    long = mini.__class__(70_000, 1, base.model_id, 31, 8, rng.bytes(1025), token_check=1)
    several = [base, mini, long, replace(base, alpha=rng.bytes(150)), replace(mini, is_partial=True, token_check=None)]
    several += [replace(mini, metadata=b"facts"), replace(base, alpha=b"\0", metadata=rng.bytes(200))]
    several.append(replace(base, is_partial=True, token_check=None, payload=b"", width=1 << 21, height=1 << 21))
    packed = [bitstream.pack(container) for container in several]
    yield from packed
    yield from (path.read_bytes() for path in sorted(GOLDEN.glob("*.pqm")))
    yield from (
        b"",
        b"\x8d",
        b"\x8dm",
        b"\x8dp",
        b"\x8dp\x10" + bytes(9),
        b"\x8dPQ\n\x20" + bytes(20),
        b"\x8dPQ\n",
        b"\x8dPQ",
        b"PNG",
        b"\x8dPQX1234567890123",
        b"\x8dm\x40" + bytes(9),
    )
    for data in packed:
        yield data + b"\0"
        for count in range(0, min(len(data), 24)):
            yield data[:count]
            for value in (0, 0x80, 0xFF, data[count] ^ 1 << int(rng.integers(8))):
                damaged = data[:count] + bytes([value]) + data[count + 1 :]
                yield damaged
                yield with_checksum(damaged)


def with_checksum(data: bytes) -> bytes:
    """A file with its checksum made to fit."""
    is_mini = data[:2] == b"\x8dm"
    body = data[: -2 if is_mini else -4]
    if is_mini:
        return body + (binascii.crc_hqx(body, 0xFFFF) ^ 0xFFFF).to_bytes(2, "big")
    return body + zlib.crc32(body).to_bytes(4, "big")


def container_case(data: bytes) -> Case:
    def fields() -> Case:
        container = bitstream.parse(data)
        return {
            "width": container.width,
            "height": container.height,
            "modelId": container.model_id.hex(),
            "level": container.level,
            "scale": container.scale,
            "isMini": container.is_mini,
            "isPartial": container.is_partial,
            "payload": container.payload.hex(),
            "tokenCheck": container.token_check,
            "alpha": None if container.alpha is None else container.alpha.hex(),
            "metadata": None if container.metadata is None else container.metadata.hex(),
        }

    return {"data": data.hex(), "outcome": outcome_of(fields)}


def payloads(rng: np.random.Generator) -> Iterator[Case]:
    """Payloads that a writer made, changed ones, and noise."""
    for _ in range(60):
        frequencies, tokens, payload = message(rng)
        changed = bytearray(payload or b"\0")
        changed[rng.integers(len(changed))] ^= 1 << int(rng.integers(8))
        for data in (payload, payload + b"\0", payload[:-1], bytes(changed), rng.bytes(12)):
            steps = steps_of(len(tokens), rng)

            def read(data: bytes = data, frequencies: NDArray[np.int64] = frequencies) -> list[int]:
                reader = TokenReader(data)
                read_tokens = reader.code(frequencies)
                reader.finish()
                return read_tokens.tolist()

            yield coded(frequencies, steps, data) | {"outcome": outcome_of(read)}


def prefixes(rng: np.random.Generator) -> Iterator[Case]:
    """Payloads that were cut."""
    for _ in range(60):
        frequencies, tokens, payload = message(rng)
        for count in {0, len(payload) // 3, max(0, len(payload) - 1), len(payload)}:
            steps = steps_of(len(tokens), rng)
            read = PrefixReader(payload[:count]).code(frequencies)
            yield coded(frequencies, steps, payload[:count]) | {"outcome": read.tolist()}


def message(rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64], bytes]:
    """Frequencies (n, K), tokens (n,) and their payload."""
    count, alphabet_size = int(rng.integers(0, 60)), int(rng.choice([2, 3, 17, 96]))
    weights = rng.random((count, alphabet_size)) ** rng.choice([0.2, 2, 40])
    room = (1 << 16) - alphabet_size
    frequencies = 1 + np.floor(weights / weights.sum(1, keepdims=True) * room).astype(np.int64)
    frequencies[:, 0] += (1 << 16) - frequencies.sum(1)
    tokens = np.array([rng.choice(alphabet_size, p=row / (1 << 16)) for row in frequencies], np.int64)
    writer = TokenWriter()
    writer.code(frequencies, tokens)
    return frequencies, tokens, writer.finish()


def steps_of(count: int, rng: np.random.Generator) -> list[int]:
    """Cut a number of tokens in two at random."""
    first = int(rng.integers(count + 1))
    return [first, count - first]


def coded(frequencies: NDArray[np.int64], steps: list[int], payload: bytes) -> Case:
    rows = {"frequencies": frequencies.ravel().tolist(), "numCodewords": frequencies.shape[1]}
    return {**rows, "steps": steps, "payload": payload.hex()}


def schedule(
    num_subquantizers: int,
    group_steps: tuple[int, ...],
    height: int,
    width: int,
    group_sizes: tuple[int, ...] | None = None,
) -> Case:
    steps = [
        {
            **{key: getattr(step, key) for key in ("group", "first", "last", "begin", "end")},
            "positions": positions_of(step, height, width).tolist(),
        }
        for step in Schedule(num_subquantizers, group_steps, group_sizes).steps
    ]
    groups = {"numSubquantizers": num_subquantizers, "groupSteps": group_steps, "groupSizes": group_sizes}
    return {**groups, "height": height, "width": width, "steps": steps}


def alphabets_case(sizes: list[list[int]], channels: list[int]) -> Case:
    made = Alphabets(np.array(sizes), np.array(channels))
    levels = [
        {
            "starts": made.starts[level].tolist(),
            "valueStarts": made.value_starts[level].tolist(),
            "numCoded": made.num_coded(level),
            "end": made.end(level),
            "runs": [[size, len(list(run))] for size, run in groupby(row)],
        }
        for level, row in enumerate(sizes)
    ]
    return {"sizes": np.ravel(sizes).tolist(), "channels": channels, "levels": levels}


def plan(height: int, width: int, window: int) -> Case:
    made, count = grid_plan(height, width, window), height * width
    own = np.arange(count * 32).astype(np.uint8).reshape(-1, 32)
    seen = np.arange(7, (count + 1) * 16 + 7).astype(np.uint8).reshape(-1, 16)
    return {
        "height": height,
        "width": width,
        "window": window,
        "neighbors": (made.neighbors // 8).ravel().tolist(),
        "windows": [
            {
                "count": len(windows.positions),
                "positions": windows.positions.ravel().tolist(),
                "placeOf": windows.place_of.tolist(),
                "order": windows.order.tolist(),
                "ends": windows.ends.tolist(),
            }
            for windows in made.windows
        ],
        "own": own.ravel().tolist(),
        "seen": seen.ravel().tolist(),
        "gathered": gather(own, seen, made.neighbors[:-1]).ravel().tolist(),
    }


def scalings(rng: np.random.Generator) -> Iterator[Case]:
    for width, height, to_width, to_height in (
        (9, 7, 18, 14),
        (5, 5, 37, 8),
        (13, 1, 26, 2),
        (20, 16, 7, 5),
        (6, 4, 6, 8),
    ):
        rgb = rng.integers(0, 256, (height, width, 3), np.uint8)
        rgb[: height // 2] = np.where(rgb[: height // 2] < 128, 0, 255)  # overshoot is clipped
        scaled = resize_picture(rgb, to_width, to_height)
        assert Image.fromarray(scaled).size == (to_width, to_height)
        yield {
            "rgb": rgb.ravel().tolist(),
            "width": width,
            "height": height,
            "toWidth": to_width,
            "toHeight": to_height,
            "scaled": scaled.ravel().tolist(),
        }


def hash_case(tokens: NDArray[np.int64]) -> Case:
    return {"tokens": tokens.tolist(), "hash": hashlib.sha256(token_bytes(tokens)).hexdigest()}
