"""web/ in headless Chromium: the tokens of Python, pixels within one grey level, the errors of Python."""

from __future__ import annotations

import hashlib
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser_files import OWN_NAMES, bad_files, made_files, other_models, own_files, own_model

from pqmim import bitstream, load_codec
from pqmim.alphabets import Alphabets
from pqmim.codec import Codec
from pqmim.errors import PqmimError
from pqmim.model_files import find_model, load_model, shipped_model_of
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
        facts = self.outcome("ownModel" if name in OWN_NAMES else "files")[name]
        data = np.fromfile(self.folder / f"{name}.rgba", np.uint8)
        return data.reshape(facts["height"], facts["width"], 4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, node: str, built: Path, chromium: str, tiny_model: Path) -> Run:
    folder = tmp_path_factory.mktemp("browser")
    codecs = {name: load_codec(decoder=name, device="cpu", threads=1) for name in ("fast", "fine")}
    codecs["own"] = load_codec(tiny_model, "fast", device="cpu", threads=1)
    for name in GOLDEN_NAMES:
        (folder / name).write_bytes((GOLDEN / name).read_bytes())
    files = made_files(codecs["fast"])
    files |= bad_files(files) | own_files(codecs["own"])
    for name, data in files.items():
        (folder / name).write_bytes(data)
    models = other_models(built / "weights" / "photo.pqmw", folder) | {"own": own_model(tiny_model, folder)}
    (folder / "models.json").write_text(json.dumps(models))
    command = [node, str(HERE / "browser.mjs"), chromium, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=550, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return Run(folder, json.loads((folder / "outcome.json").read_text()), codecs)


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


@pytest.mark.parametrize("name", OWN_NAMES)
def test_files_of_a_model_with_alphabets_of_any_size(run: Run, name: str) -> None:
    facts = run.outcome("ownModel")[name]
    codec, data = run.codecs["own"], (run.folder / name).read_bytes()
    assert (facts["model"], facts["decoder"]) == ("tiny", "fast")
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
    level = bitstream.parse((GOLDEN / "fast-photo.pqm").read_bytes()).level
    total = Alphabets.of(load_model(find_model("photo")).tensors).num_coded(level) * 48 * 32
    assert later[0] == {"stage": "tokens", "done": total, "total": total}


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
