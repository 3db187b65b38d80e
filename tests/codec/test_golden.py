"""Golden files: what a release decodes, every later version and every machine decodes to the same tokens."""

import hashlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pqmim.codec import Codec, load_codec
from pqmim.entropy_kernels import exact_kernels
from pqmim.model_files import find_model, load_model
from pqmim.selftest import GOLDEN, read_golden, run


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, Any]]:
    return read_golden()


@pytest.fixture(scope="module")
def codecs(golden: dict[str, dict[str, Any]]) -> dict[str, Codec]:
    return {name: load_codec("photo", name, device="cpu") for name in {facts["decoder"] for facts in golden.values()}}


def test_every_golden_file_is_described(golden: dict[str, dict[str, Any]]) -> None:
    assert {path.name for path in GOLDEN.glob("*.pqm")} == set(golden)
    assert len(golden) >= 8


def test_tokens_with_every_kernel(golden: dict[str, dict[str, Any]]) -> None:
    kernels = {"photo": exact_kernels(load_model(find_model("photo")))}
    checks = list(run("cpu"))
    assert [check for check in checks if check.error] == []
    assert len(checks) == sum(len(kernels[facts["model"]]) for facts in golden.values())


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_tokens_with_any_number_of_threads(golden: dict[str, dict[str, Any]], threads: int) -> None:
    codec = load_codec("photo", "fast", device="cpu", threads=threads)
    for name in ("fast-photo.pqm", "fast-cut.pqm", "fine-odd.pqm"):
        assert codec.token_hash((GOLDEN / name).read_bytes()) == golden[name]["tokens"], name


def test_pixels(golden: dict[str, dict[str, Any]], codecs: dict[str, Codec]) -> None:
    for name, facts in golden.items():
        image = codecs[facts["decoder"]].decode((GOLDEN / name).read_bytes())
        assert image.size == (facts["width"], facts["height"]), name
        assert image.mode == ("RGB" if facts["alpha"] is None else "RGBA"), name
        if facts["alpha"] is not None:
            assert hashlib.sha256(image.getchannel("A").tobytes()).hexdigest() == facts["alpha"], name
        thumbnail = np.asarray(image.convert("RGB").resize((8, 8), Image.Resampling.BOX), dtype=float)
        assert np.abs(thumbnail.flatten() - facts["thumbnail"]).mean() <= 1, name  # pixels are float: coarse
