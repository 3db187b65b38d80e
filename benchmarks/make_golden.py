"""Make the golden files that `pqmim selftest` and the tests decode.

    python benchmarks/make_golden.py [--decoder fine] [--force]

Encodes the photo of the repository, and crops, odd sizes, a grey and a transparent picture made from it, at
several qualities, a file cut short and one made to a size, and writes them with `golden.json` to
`src/pqmim/golden`. To be run once for each decoder, whose files it replaces: those that would change mean that the
format, the model or the encoder did, and are only overwritten with `--force`. `--pictures` leaves files as they are and
records anew how decoders show them.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pqmim import load_codec
from pqmim.bitstream import truncate
from pqmim.codec import Codec
from pqmim.decoder_files import decoders_beside, load_decoder
from pqmim.model_files import find_model, load_model
from pqmim.options import Device
from pqmim.selftest import GOLDEN, picture_hash, read_golden

ROOT = Path(__file__).resolve().parent.parent


def pictures(photo: Image.Image) -> dict[str, tuple[Image.Image, float]]:
    """File name -> picture and quality."""
    middle = photo.width // 2, photo.height // 2

    def crop(width: int, height: int) -> Image.Image:
        left, top = middle[0] - width // 2, middle[1] - height // 2
        return photo.crop((left, top, left + width, top + height))

    transparent = crop(96, 80).convert("RGBA")
    transparent.putalpha(Image.radial_gradient("L").resize(transparent.size))
    return {
        "photo.pqm": (photo, 30),
        "crop-q0.pqm": (crop(256, 192), 0),
        "crop-q25.pqm": (crop(256, 192), 25),
        "crop-q60.pqm": (crop(256, 192), 60),
        "crop-q100.pqm": (crop(256, 192), 100),
        "odd.pqm": (crop(131, 97), 50),
        "pixel.pqm": (crop(1, 1), 50),
        "row.pqm": (crop(200, 1), 50),
        "column.pqm": (crop(7, 150), 75),
        "grey.pqm": (crop(112, 144).convert("L"), 50),
        "transparent.pqm": (transparent, 50),
    }


def facts_of(data: bytes, decoder: str) -> dict[str, Any]:
    """What `golden.json` says of a file (`pqmim.selftest.read_golden`)."""
    codec = by_numpy(decoder)
    image = codec.decode(data)
    alpha = image.getchannel("A").tobytes() if image.mode == "RGBA" else None
    thumbnail = image.convert("RGB").resize((8, 8), Image.Resampling.BOX)
    return {
        "model": codec.name,
        "decoder": decoder,
        "tokens": codec.token_hash(data),
        "width": image.width,
        "height": image.height,
        "alpha": None if alpha is None else hashlib.sha256(alpha).hexdigest(),
        "thumbnail": np.asarray(thumbnail).flatten().tolist(),
        "pictures": {codec.decoder_name: picture_hash(codec, data) for codec in by_exact_decoders()},
    }


@cache
def by_numpy(decoder: str) -> Codec:
    """A codec whose tokens NumPy alone reads."""
    return load_codec(decoder=decoder, device="cpu", kernel="numpy")


@cache
def by_exact_decoders() -> tuple[Codec, ...]:
    """Codecs whose pictures are the same on every CPU."""
    path = find_model("photo")
    decoders = (load_decoder(entry.path) for entry in decoders_beside(path))
    return tuple(Codec(load_model(path), decoder, Device.CPU) for decoder in decoders if decoder.is_exact)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--decoder", default="fine", help="that the files are made for")
    parser.add_argument("--pictures", action="store_true", help="record anew what decoders make of the files")
    parser.add_argument("--force", action="store_true", help="overwrite files that differ")
    options = parser.parse_args()
    if options.pictures:
        record_pictures()
        return

    codec = load_codec(decoder=options.decoder, device="cpu")
    with Image.open(ROOT / "examples" / "photo.png") as opened:
        photo = opened.convert("RGB")
    files: dict[str, bytes] = {}
    for name, (picture, quality) in pictures(photo).items():
        png = io.BytesIO()
        picture.save(png, "PNG")
        files[name] = codec.encode(png.getvalue(), quality=quality)
    files["cut.pqm"] = truncate(files["photo.pqm"], 1500)
    files["tiny.pqm"] = codec.encode(photo, target_bytes=200)

    contents = {f"{options.decoder}-{name}": content for name, content in files.items()}
    golden = read_golden()
    for path, content in contents.items():
        golden[path] = facts_of(content, options.decoder)
        print(f"{path}  {golden[path]['width']} x {golden[path]['height']}  {len(content):,} B")
    changed = [
        path
        for path, content in contents.items()
        if (GOLDEN / path).exists() and (GOLDEN / path).read_bytes() != content
    ]
    if changed and not options.force:
        sys.exit(f"{', '.join(changed)} would change; --force overwrites")
    for path, content in contents.items():
        (GOLDEN / path).write_bytes(content)
    describe(golden)


def describe(golden: dict[str, dict[str, Any]]) -> None:
    """Write what is known of the files (`pqmim.selftest.read_golden`)."""
    lines = [f"{json.dumps(path)}: {json.dumps(facts)}" for path, facts in sorted(golden.items())]
    (GOLDEN / "golden.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def record_pictures() -> None:
    """Describe the files that are there as decoders show them now."""
    golden = read_golden()
    for path, facts in golden.items():
        golden[path] = facts_of((GOLDEN / path).read_bytes(), facts["decoder"])
        if golden[path]["tokens"] != facts["tokens"]:
            sys.exit(f"{path}: decoded to other tokens")
    describe(golden)


if __name__ == "__main__":
    main()
