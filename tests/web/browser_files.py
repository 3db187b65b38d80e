"""Files and models that are decoded in the browser."""

from __future__ import annotations

import gzip
import io
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from network_cases import weights_script
from pictures import synthetic_photo
from PIL import Image

from pqmim import bitstream
from pqmim.codec import Codec
from pqmim.decoder_files import load_decoder
from pqmim.image_io import encode_alpha
from pqmim.model_files import MODEL_FILE, MODEL_FORMAT, find_model, load_model, read_metadata
from pqmim.options import EncodeOptions
from pqmim.selftest import GOLDEN

OWN_NAMES = ("own-fine.pqm", "own-coarse.pqm", "own-partial.pqm")


def made_files(codec: Codec) -> dict[str, bytes]:
    """Good files of the kinds that are not among the golden ones, and those among which they are looked for."""
    photo = synthetic_photo(45, 70)
    rng = np.random.default_rng(1)
    constant = np.full((45, 70), 77, np.uint8)
    noise = rng.integers(0, 256, (45, 70), np.uint8)  # every value, 0 included
    smooth = np.tile(np.linspace(0, 255, 70).astype(np.uint8), (45, 1))
    png, webp = picture_file(noise, "PNG"), picture_file(smooth, "WEBP")
    assert encode_alpha(noise)[:4] in (b"\x89PNG", b"RIFF")

    def encoded(pixels: np.ndarray, quality: float = 40, **options: Any) -> bytes:
        return codec.encode(pixels, quality=quality, options=EncodeOptions(effort=1, **options))

    with_alpha = encoded(np.dstack((photo, noise)), 80)
    fine = encoded(photo, 100)
    complete = bitstream.parse(fine)
    return {
        "alpha-byte.pqm": encoded(np.dstack((photo, constant))),
        "alpha-png.pqm": with_other_alpha(with_alpha, png),
        "alpha-webp.pqm": with_other_alpha(with_alpha, webp),
        "alpha-partial.pqm": bitstream.truncate(with_other_alpha(with_alpha, webp), 60 + len(webp)),
        "scale-2.pqm": encoded(photo, scale=2),
        "scale-8.pqm": encoded(photo, scale=8),
        "mini-partial.pqm": bitstream.truncate(encoded(photo, 60), 90),
        "nothing-sent.pqm": bitstream.truncate(encoded(photo, 60), bitstream.smallest_size(encoded(photo, 60))),
        "all-sent.pqm": bitstream.pack(replace(complete, is_partial=True, token_check=None)),
        "two-tiles.pqm": encoded(np.tile(photo, (1, 12, 1))),
    }


def bad_files(made: dict[str, bytes]) -> dict[str, bytes]:
    """Files that are refused, by name."""
    good = (GOLDEN / "fast-photo.pqm").read_bytes()
    photo, alpha = bitstream.parse(good), made["alpha-png.pqm"]
    assert photo.token_check is not None
    png, webp = bitstream.parse(alpha).alpha, bitstream.parse(made["alpha-webp.pqm"]).alpha
    assert png is not None
    assert webp is not None
    jpeg = picture_file(np.zeros((45, 70), np.uint8), "JPEG")
    small = picture_file(np.zeros((4, 7), np.uint8), "PNG")
    changed = bytearray(photo.payload)
    changed[1000] ^= 4
    return {
        "damaged.pqm": good[:1000] + bytes([good[1000] ^ 1]) + good[1001:],
        "another-model.pqm": bitstream.pack(replace(photo, model_id=bytes.fromhex("c0ffee01"))),
        "empty.pqm": b"",
        "no-pqm.pqm": b"GIF89a",
        "version.pqm": good[:4] + b"\x40" + good[5:],
        "earlier.pqm": good[:4] + b"\x20" + good[5:],
        "earlier-mini.pqm": b"\x8dp\x10" + bytes(20),
        "cut-by-accident.pqm": good[:-7],
        "no-such-level.pqm": bitstream.pack(replace(photo, level=63)),
        "huge.pqm": bitstream.pack(replace(photo, width=1 << 21, height=1 << 21)),
        "other-payload.pqm": bitstream.pack(replace(photo, payload=bytes(changed))),
        "longer-payload.pqm": bitstream.pack(replace(photo, payload=photo.payload + b"\x01")),
        "token-check.pqm": bitstream.pack(replace(photo, token_check=photo.token_check ^ 1)),
        "alpha-noise.pqm": with_other_alpha(alpha, b"not a picture"),
        "alpha-size.pqm": with_other_alpha(alpha, small),
        "alpha-jpeg.pqm": with_other_alpha(alpha, jpeg),
        "alpha-damaged-png.pqm": with_other_alpha(alpha, png[:60] + bytes(40) + png[100:]),
        "alpha-damaged-webp.pqm": with_other_alpha(alpha, webp[:25] + b"\xff" * 20 + webp[45:]),
    }


def with_other_alpha(data: bytes, alpha: bytes) -> bytes:
    return bitstream.pack(replace(bitstream.parse(data), alpha=alpha))


def picture_file(grey: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(grey)
    image = image.convert("RGB") if kind == "WEBP" else image
    image.save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()


def own_files(codec: Codec) -> dict[str, bytes]:
    """Files of a model whose alphabets differ, at its finest level and at its coarsest."""
    photo = synthetic_photo(45, 70)
    fine, coarse = (codec.encode(photo, quality=quality, options=EncodeOptions(scale=1)) for quality in (100, 0))
    levels = [bitstream.parse(data).level for data in (fine, coarse)]
    assert levels == [0, 5]
    return dict(zip(OWN_NAMES, (fine, coarse, bitstream.truncate(fine, len(fine) // 2)), strict=True))


def own_model(folder: Path, target: Path) -> dict[str, Any]:
    """A model of one's own, as `configure` of web/ wants it; its weights are written to a folder."""
    script = weights_script()
    model, decoder = load_model(folder / MODEL_FILE), load_decoder(folder / "fast.safetensors")

    def source(name: str, identity: bytes, content: bytes) -> dict[str, Any]:
        data = gzip.compress(content, 1)
        (target / f"own-{name}.pqmw").write_bytes(data)
        facts = {"bytes": len(data), "crc32": zlib.crc32(data)}
        return {"name": name, "id": identity.hex(), "url": f"/files/own-{name}.pqmw", **facts}

    decoders = [source("fast", decoder.decoder_id, script.web_decoder(decoder))]
    return {**source(model.name, model.model_id, script.web_model(model, ["qgemm"])), "decoders": decoders}


def other_models(weights: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Changed forms of the token model by name, as `configure` of web/ wants them."""
    path = find_model("photo")
    model_id = read_metadata(path, MODEL_FORMAT)["model_id"]

    def decoder(name: str) -> dict[str, Any]:
        data = (weights.parent / f"photo-{name}.pqmw").read_bytes()
        facts = {"bytes": len(data), "crc32": zlib.crc32(data)}
        return {"name": "fast", "id": name, "url": f"/dist/weights/photo-{name}.pqmw", **facts}

    def source(name: str, data: bytes) -> dict[str, Any]:
        (folder / f"{name}.pqmw").write_bytes(data)
        facts = {"bytes": len(data), "crc32": zlib.crc32(data)}
        source = {"name": name, "id": model_id, "url": f"/files/{name}.pqmw", **facts}
        return {**source, "decoders": [decoder("fast")]}

    def changed(change: Callable[[dict[str, Any]], None]) -> bytes:
        content = gzip.decompress(weights.read_bytes())
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        metadata = json.loads(header["__metadata__"]["pqmim"])
        change(metadata)
        header["__metadata__"]["pqmim"] = json.dumps(metadata)
        text = json.dumps(header).encode()
        return gzip.compress(struct.pack("<Q", len(text)) + text + content[8 + length :], 1)

    def spoil_one_kernel(metadata: dict[str, Any]) -> None:
        table = metadata["graphs"]["qgemm/project"]
        for entry in table:
            entry[0] = entry[0].replace("{layer}", "0")  # every layer gets the weights of the first

    def spoil_answers(metadata: dict[str, Any]) -> None:
        metadata["answers"]["feed.3"] ^= 1

    def change_id(metadata: dict[str, Any]) -> None:
        metadata["model_id"] = "00000000"

    whole = weights.read_bytes()
    return {
        "one-kernel-is-wrong": source("one-kernel-is-wrong", changed(spoil_one_kernel)),
        "no-kernel-is-right": source("no-kernel-is-right", changed(spoil_answers)),
        "another-id": source("another-id", changed(change_id)),
        "damaged": {**source("damaged", whole), "crc32": 1},
        "longer": {**source("longer", whole), "bytes": 1000},
        "missing": {**source("missing", whole), "url": "/files/missing"},
        "foreign": source("foreign", gzip.compress(b"something else")),
    }
