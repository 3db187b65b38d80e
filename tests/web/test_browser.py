"""web/ in headless Chromium: the tokens of Python, pixels within one grey level, the errors of Python."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import struct
import subprocess
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import synthetic_photo
from PIL import Image

from pqmim import bitstream, load_codec
from pqmim.codec import Codec
from pqmim.errors import PqmimError
from pqmim.image_io import encode_alpha
from pqmim.model_files import MODEL_FORMAT, find_model, read_metadata, shipped_model_of
from pqmim.options import EncodeOptions
from pqmim.selftest import GOLDEN, read_golden

HERE = Path(__file__).parent
GOLDEN_NAMES = sorted(read_golden())
MADE_NAMES = (
    "alpha-byte.pqm",
    "alpha-png.pqm",
    "alpha-webp.pqm",
    "alpha-partial.pqm",
    "scale-2.pqm",
    "scale-8.pqm",
    "mini-partial.pqm",
    "nothing-sent.pqm",
    "all-sent.pqm",
    "two-tiles.pqm",
)
BAD_NAMES = (
    "damaged.pqm",
    "empty.pqm",
    "no-pqm.pqm",
    "version.pqm",
    "earlier.pqm",
    "earlier-mini.pqm",
    "cut-by-accident.pqm",
    "no-such-level.pqm",
    "huge.pqm",
    "other-payload.pqm",
    "longer-payload.pqm",
    "token-check.pqm",
    "alpha-noise.pqm",
    "alpha-size.pqm",
    "alpha-jpeg.pqm",
    "alpha-damaged-png.pqm",
    "alpha-damaged-webp.pqm",
)


@dataclass(frozen=True)
class Run:
    """What the browser did.

    Attributes:
        folder: of the files, and of the pixels they were decoded to.
        scenarios: see browser.mjs.
        codecs: of Python, by name.
    """

    folder: Path
    scenarios: dict[str, Any]
    codecs: dict[str, Codec]

    def outcome(self, name: str) -> Any:
        """Of a scenario."""
        outcome = self.scenarios[name]
        assert "failure" not in outcome, outcome["failure"]
        return outcome

    def pixels(self, name: str) -> np.ndarray:
        """(H, W, 4) of a file."""
        facts = self.outcome("files")[name]
        data = np.fromfile(self.folder / f"{name}.rgba", np.uint8)
        return data.reshape(facts["height"], facts["width"], 4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, node: str, built: Path, chromium: str) -> Run:
    folder = tmp_path_factory.mktemp("browser")
    codecs = {name: load_codec(decoder=name, device="cpu", threads=1) for name in ("fast", "fine")}
    for name in GOLDEN_NAMES:
        (folder / name).write_bytes((GOLDEN / name).read_bytes())
    files = made_files(codecs["fast"])
    files |= bad_files(files)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "models.json").write_text(json.dumps(other_models(built / "weights" / "photo.pqmw", folder)))
    command = [node, str(HERE / "browser.mjs"), chromium, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=550, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return Run(folder, json.loads((folder / "outcome.json").read_text()), codecs)


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


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_files(run: Run, name: str) -> None:
    facts, golden = run.outcome("files")[name], read_golden()[name]
    assert facts["tokenHash"] == golden["tokens"]
    assert (facts["model"], facts["decoder"]) == (golden["model"], "fast")
    assert (facts["width"], facts["height"]) == (golden["width"], golden["height"])
    assert_same_picture(run, name, run.codecs["fast"])
    if golden["alpha"] is not None:
        assert hashlib.sha256(run.pixels(name)[:, :, 3].tobytes()).hexdigest() == golden["alpha"]


@pytest.mark.parametrize("name", MADE_NAMES)
def test_other_files(run: Run, name: str) -> None:
    facts = run.outcome("files")[name]
    codec, data = run.codecs["fast"], (run.folder / name).read_bytes()
    assert facts["tokenHash"] == codec.token_hash(data)
    assert facts["inventedShare"] == pytest.approx(codec.decode_with_report(data).invented_share, abs=1e-12)
    assert_same_picture(run, name, codec)


def assert_same_picture(run: Run, name: str, codec: Codec) -> None:
    """Colors within one grey level, alpha the same."""
    right = np.asarray(codec.decode((run.folder / name).read_bytes()).convert("RGBA"))
    pixels = run.pixels(name)
    assert pixels.shape == right.shape
    assert np.array_equal(pixels[:, :, 3], right[:, :, 3])
    assert np.abs(pixels[:, :, :3].astype(int) - right[:, :, :3]).max() <= 1


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_files(run: Run, name: str) -> None:
    facts = run.outcome("files")[name]
    with pytest.raises(PqmimError) as raised:
        run.codecs["fast"].decode((run.folder / name).read_bytes())
    assert facts["error"] == type(raised.value).__name__
    # What follows is how Pillow says it, or advice for the command line.
    right = str(raised.value).split("decoded:")[0].split(" (run")[0]
    assert facts["message"].startswith(right)
    assert "\n" not in facts["message"]


def test_file_of_another_model(run: Run) -> None:
    """Not among the files above, since the codec of one model says another thing."""
    with pytest.raises(PqmimError) as raised:
        shipped_model_of(bytes.fromhex("c0ffee01"))
    facts = run.outcome("files")["another-model.pqm"]
    assert facts["error"] == type(raised.value).__name__
    assert facts["message"].split(";")[0] == str(raised.value).split(";")[0]


def test_progress(run: Run) -> None:
    first = run.outcome("weightsAreFetchedOnce")["first"]["stages"]
    assert [stage["stage"] for stage in first] == ["weights", "tokens", "picture"]
    assert all(stage["done"] == stage["total"] for stage in first)
    later = run.outcome("files")["fast-photo.pqm"]["stages"]
    assert [stage["stage"] for stage in later] == ["tokens", "picture"]
    assert later[0] == {"stage": "tokens", "done": 80 * 48 * 32, "total": 80 * 48 * 32}


def test_weights_are_fetched_once(run: Run) -> None:
    outcome = run.outcome("weightsAreFetchedOnce")
    assert outcome["fetched"] == ["/dist/weights/photo.pqmw", "/dist/weights/photo-fast.pqmw"]
    assert outcome["keys"] == 2
    assert outcome["second"]["tokenHash"] == outcome["first"]["tokenHash"]


def test_page_stays_responsive(run: Run) -> None:
    outcome = run.outcome("staysResponsive")
    assert outcome["sizes"] == [[256, 192], [256, 192]]
    assert outcome["ticks"] > 5


def test_threads_give_the_same_tokens(run: Run) -> None:
    outcome = run.outcome("threads")
    assert outcome["isIsolated"] is True
    assert outcome["outcome"]["tokenHash"] == read_golden()["fast-crop-q60.pqm"]["tokens"]


def test_package_on_another_origin(run: Run) -> None:
    assert run.outcome("fromAnotherOrigin")["tokenHash"] == read_golden()["fast-odd.pqm"]["tokens"]


def test_page_without_https(run: Run) -> None:
    outcome = run.outcome("withoutHttps")
    assert outcome["isSecure"] is False
    assert outcome["pixels"] == run.pixels("alpha-webp.pqm").ravel().tolist()


def test_alpha_by_way_of_a_canvas(run: Run) -> None:
    outcome = run.outcome("alphaByCanvas")
    for name, alpha in outcome.items():
        if name in BAD_NAMES:
            assert alpha.startswith("the alpha section "), name
        else:
            assert alpha == run.pixels(name)[:, :, 3].ravel().tolist(), name
    assert len(outcome) == sum(name.startswith("alpha-") for name in (*MADE_NAMES, *BAD_NAMES))


def test_kernel_that_is_not_exact_is_not_used(run: Run) -> None:
    outcome = run.outcome("otherModels")["one-kernel-is-wrong"]
    assert outcome["kernel"] == "float32"
    assert outcome["tokenHash"] == read_golden()["fast-odd.pqm"]["tokens"]
    assert run.outcome("files")["fast-odd.pqm"]["kernel"] == "qgemm"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no-kernel-is-right", "this browser does not compute exact products, so it cannot decode the file"),
        ("another-id", "the decoder fast is for another token model than another-id"),
        ("damaged", "the weights of damaged are damaged or of another version"),
        ("longer", "the weights of longer cannot be fetched: longer than it should be"),
        ("missing", "the weights of missing cannot be fetched: status 404"),
        ("foreign", "not a model file"),
    ],
)
def test_models_that_cannot_be_used(run: Run, name: str, message: str) -> None:
    assert run.outcome("otherModels")[name] == {"error": "ModelError", "message": message}


def test_another_decoder_makes_another_picture_of_the_same_tokens(run: Run) -> None:
    outcome, name = run.outcome("otherDecoders"), "fast-odd.pqm"
    assert outcome["fine"]["decoder"] == "fine"
    assert outcome["fine"]["tokenHash"] == read_golden()[name]["tokens"]
    pixels = np.fromfile(run.folder / "fine.rgba", np.uint8).reshape(run.pixels(name).shape)
    right = np.asarray(run.codecs["fine"].decode((run.folder / name).read_bytes()).convert("RGBA"))
    assert np.abs(pixels.astype(int) - right).max() <= 1
    assert not np.array_equal(pixels, run.pixels(name))
    message = "slow: no such decoder (photo has fast, fine)"
    assert outcome["slow"] == {"error": "ModelError", "message": message}


def test_limit_on_pixels(run: Run) -> None:
    outcome = run.outcome("limit")
    assert outcome["error"] == "LimitError"
    assert outcome["message"] == "131 x 97 pixels are above the limit of 1,000"
    assert outcome["fetched"] == []


def test_element(run: Run) -> None:
    outcome = run.outcome("element")
    picture = outcome["picture"]
    assert picture["heard"] == ["progress", "load"]
    assert (picture["complete"], picture["naturalWidth"], picture["naturalHeight"]) == (True, 131, 97)
    assert picture["label"] == "trees"
    assert picture["pixel"] == run.pixels("fast-odd.pqm")[5, 5].tolist()
    assert outcome["damaged"]["heard"] == ["error"]
    assert outcome["damaged"]["message"] == "checksum mismatch: the file is damaged or cut short"
    assert outcome["damaged"]["complete"] is False
    assert outcome["missing"]["message"] == "/files/nothing.pqm: status 404"
    assert outcome["lazy"] == {"before": 0, "width": 200}


def test_demo_page(run: Run) -> None:
    outcome = run.outcome("demo")
    assert outcome["hash"] == read_golden()["fast-odd.pqm"]["tokens"]
    assert outcome["picture"] == "131 x 97 pixels"
    assert outcome["error"] == "damaged.pqm: checksum mismatch: the file is damaged or cut short"


def test_nothing_outside_of_this_machine_is_asked(run: Run) -> None:
    assert run.scenarios["foreign"] == []
