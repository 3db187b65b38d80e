"""Golden files: what a release decodes, every later version and every machine decodes to the same tokens."""

import hashlib
from functools import partial
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pqmim import transforms
from pqmim.codec import Codec, load_codec
from pqmim.decoder_files import decoders_beside, load_decoder
from pqmim.entropy_kernels import exact_kernels
from pqmim.model_files import find_model, load_model
from pqmim.runtime import Session
from pqmim.selftest import GOLDEN, picture_hash, read_golden, run


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, Any]]:
    return read_golden()


@pytest.fixture(scope="module")
def codecs(golden: dict[str, dict[str, Any]]) -> dict[str, Codec]:
    return {name: load_codec("photo", name, device="cpu") for name in {facts["decoder"] for facts in golden.values()}}


def test_every_golden_file_is_described(golden: dict[str, dict[str, Any]]) -> None:
    assert {path.name for path in GOLDEN.glob("*.pqm")} == set(golden)
    assert len(golden) >= 8


def test_tokens_with_every_kernel_and_pictures(golden: dict[str, dict[str, Any]]) -> None:
    kernels = {"photo": exact_kernels(load_model(find_model("photo")))}
    checks = list(run("cpu"))
    assert [check for check in checks if check.error] == []
    assert len(checks) == sum(len(kernels[facts["model"]]) + len(facts["pictures"]) for facts in golden.values())


def test_pictures_of_every_shipped_decoder_are_known(golden: dict[str, dict[str, Any]]) -> None:
    decoders = [load_decoder(entry.path) for entry in decoders_beside(find_model("photo"))]
    names = {decoder.name for decoder in decoders if decoder.is_exact}
    assert names == {"fast", "fine", "vivid"}
    assert all(facts["pictures"].keys() == names for facts in golden.values())


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_tokens_with_any_number_of_threads(golden: dict[str, dict[str, Any]], threads: int) -> None:
    codec = load_codec("photo", "fast", device="cpu", threads=threads)
    for name in ("fast-photo.pqm", "fast-cut.pqm", "fine-odd.pqm"):
        assert codec.token_hash((GOLDEN / name).read_bytes()) == golden[name]["tokens"], name


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("level", ["extended", "all"])
@pytest.mark.parametrize("decoder", ["fast", "fine", "vivid"])
def test_pictures_do_not_depend_on_the_order_of_sums(
    golden: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, threads: int, level: str, decoder: str
) -> None:
    monkeypatch.setattr(transforms, "Session", partial(session_at, level))
    codec = load_codec("photo", decoder, device="cpu", threads=threads)
    for name in ("fast-crop-q60.pqm", "fast-crop-q100.pqm", "fine-crop-q25.pqm"):
        assert picture_hash(codec, (GOLDEN / name).read_bytes()) == golden[name]["pictures"][decoder], name


def session_at(own_level: str, *arguments: Any, level: str, **options: Any) -> Session:
    """A session, rewritten as far as wanted here: other operators add in another order."""
    return Session(*arguments, level=own_level, **options)


def test_pixels(golden: dict[str, dict[str, Any]], codecs: dict[str, Codec]) -> None:
    for name, facts in golden.items():
        image = codecs[facts["decoder"]].decode((GOLDEN / name).read_bytes())
        assert image.size == (facts["width"], facts["height"]), name
        assert image.mode == ("RGB" if facts["alpha"] is None else "RGBA"), name
        if facts["alpha"] is not None:
            assert hashlib.sha256(image.getchannel("A").tobytes()).hexdigest() == facts["alpha"], name
        thumbnail = np.asarray(image.convert("RGB").resize((8, 8), Image.Resampling.BOX), dtype=float)
        assert np.abs(thumbnail.flatten() - facts["thumbnail"]).mean() <= 1, name  # pixels are float: coarse
