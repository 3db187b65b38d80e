"""Decoders: which one is taken, what is refused, and how realism weighs two of them."""

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import synthetic_photo

from pqmim.bitstream import parse
from pqmim.codec import Codec, load_codec
from pqmim.config import SynthesisConfig
from pqmim.decoder_files import compute_decoder_id, decoders_beside, find_decoder, load_decoder
from pqmim.errors import ModelError
from pqmim.model_files import (
    DECODER_FORMAT,
    MODEL_FILE,
    content_hash,
    find_model,
    load_model,
    parse_tensors,
    read_metadata,
    shipped_models,
)
from pqmim.networks import Networks


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that may be changed."""
    return Path(shutil.copytree(tiny_model, tmp_path / "tiny"))


def with_metadata(path: Path, **changes: object) -> None:
    """Change entries of the metadata, and the hash with them unless it is one of these."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata: dict[str, Any] = json.loads(header["__metadata__"]["pqmim"]) | changes
    metadata = {key: value for key, value in metadata.items() if value is not None}
    if "content_hash" not in changes:
        metadata["content_hash"] = content_hash(metadata, parse_tensors(data, ""))
    header["__metadata__"]["pqmim"] = json.dumps(metadata)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])


# -- files ----------------------------------------------------------------------------------------------------------


def test_content(tiny_model: Path) -> None:
    decoder, model = load_decoder(tiny_model / "fine.safetensors"), load_model(tiny_model / MODEL_FILE)
    assert decoder.name == "fine"
    assert len(decoder.decoder_id) == 4
    assert decoder.token_model == model.model_id
    assert decoder.config == SynthesisConfig(12, (8, 8, 16), (2, 0, 1), 20.0)
    assert decoder.facts == {"description": "a finer one"}
    assert (decoder.faithful, decoder.realism) == (None, None)
    assert decoder.graphs.keys() == {"synthesis", "synthesis_forward", "synthesis_vjp"}
    assert {tensor.dtype for tensor in decoder.tensors.values()} == {np.dtype(np.float16)}
    for graph in decoder.graphs.values():  # each weight is there once, for all graphs
        assert set(graph.weights.values()) <= decoder.tensors.keys()
    stored = sum(tensor.nbytes for tensor in decoder.tensors.values())
    graphs = sum(len(graph.model) for graph in decoder.graphs.values())
    assert (tiny_model / "fine.safetensors").stat().st_size < stored + graphs + 20_000
    with pytest.raises(ValueError, match="read-only"):
        decoder.tensors["synthesis.linear"][0] = 0


def test_damage_anywhere_is_found(tiny_model: Path) -> None:
    whole = (tiny_model / "fine.safetensors").read_bytes()
    decoder = load_decoder(whole)
    for position in range(8, len(whole), len(whole) // 150):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        try:
            found = load_decoder(bytes(damaged))
        except ModelError:
            continue
        # Between the tensors, where nothing is.
        assert (found.graphs, found.faithful, found.token_model) == (
            decoder.graphs,
            decoder.faithful,
            decoder.token_model,
        )
        assert all(np.array_equal(tensor, decoder.tensors[name]) for name, tensor in found.tensors.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"content_hash": "0" * 64}, "does not match its hash"),
        ({"decoder_id": None}, "damaged"),
        ({"token_model": "no"}, "damaged"),
        ({"token_model": None}, "damaged"),
        ({"faithful": 5}, "damaged"),
        ({"config": {"color": 1}}, "configuration of another version of pqmim: color is not a known setting"),
        ({"format": "pqmim model 4"}, "this is a token model, not a decoder"),
        ({"format": "pqmim decoder 2"}, "not a model file of this version"),
    ],
)
def test_wrong_metadata(folder: Path, changes: dict[str, Any], message: str) -> None:
    path = folder / "fine.safetensors"
    with_metadata(path, **changes)
    with pytest.raises(ModelError, match=rf"fine\.safetensors: .*{message}") as caught:
        load_decoder(path)
    assert "\n" not in str(caught.value)


def test_shipped_decoders_are_whole() -> None:
    largest = {"fast": 4_530_000, "fine": 11_500_000, "vivid": 4_300_000}
    for model in shipped_models():
        entries = decoders_beside(model.path)
        assert [entry.name for entry in entries] == sorted(largest)
        for entry in entries:
            decoder = load_decoder(entry.path)
            if entry.faithful is None:
                assert compute_decoder_id(decoder.config.as_dict(), decoder.tensors) == entry.decoder_id
            assert entry.token_model == model.model_id
            assert entry.path.stat().st_size <= largest[entry.name]
            assert entry.description


# -- which one ------------------------------------------------------------------------------------------------------


def test_decoders_are_found_by_name_and_path(folder: Path) -> None:
    model = folder / MODEL_FILE
    (folder / "notes.safetensors").write_bytes(b"no decoder")
    assert [entry.name for entry in decoders_beside(model)] == ["fast", "fine", "vivid"]
    assert find_decoder(None, model) == find_decoder("fine", model) == folder / "fine.safetensors"
    assert find_decoder(folder / "fast.safetensors", model) == folder / "fast.safetensors"
    with pytest.raises(ModelError, match=r"^slow: no such decoder \(tiny has fast, fine, vivid; or a path"):
        find_decoder("slow", model)


def test_the_only_decoder_is_the_default_one(folder: Path) -> None:
    (folder / "fine.safetensors").unlink()
    with pytest.raises(ModelError, match="name one of its decoders: fast, vivid"):
        find_decoder(None, folder / MODEL_FILE)
    (folder / "vivid.safetensors").unlink()
    assert load_codec(folder, device="cpu").decoder_name == "fast"
    (folder / "fast.safetensors").unlink()
    with pytest.raises(ModelError, match="no decoder lies beside this token model"):
        load_codec(folder)
    with pytest.raises(ModelError, match=r"^fine: no such decoder \(tiny has none"):
        load_codec(folder, "fine")


def test_a_decoder_of_another_token_model_is_refused_by_name(tiny_model: Path) -> None:
    shipped = find_model("photo")
    with pytest.raises(ModelError, match=r"the decoder fast is for the token model \w{8} \(photo\), not for .*tiny"):
        load_codec(tiny_model, find_decoder("fast", shipped))
    with pytest.raises(ModelError, match=r"model\.safetensors: this is a token model, not a decoder"):
        load_codec(tiny_model, shipped)
    with pytest.raises(ModelError, match=r"fast\.safetensors: this is a decoder, not a token model"):
        load_codec(tiny_model / "fast.safetensors")
    model, decoder = load_model(tiny_model / MODEL_FILE), load_decoder(tiny_model / "fine.safetensors")
    other = replace(decoder, config=replace(decoder.config, latent_channels=13))
    with pytest.raises(ModelError, match="the decoder fine is for another latent"):
        Networks(model, other, "cpu", kernel=None, threads=1)


# -- one file, several decoders -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def codecs(tiny_model: Path) -> dict[str, Codec]:
    return {name: load_codec(tiny_model, name, device="cpu") for name in ("fast", "fine", "vivid")}


def test_any_decoder_takes_what_was_made_for_another(codecs: dict[str, Codec]) -> None:
    photo = synthetic_photo(64, 96)
    files = {name: codec.encode(photo, quality=70) for name, codec in codecs.items()}
    assert len(set(files.values())) > 1  # the corrections saw other pictures
    for file in files.values():
        assert len({codec.token_hash(file) for codec in codecs.values()}) == 1
        pictures = {name: np.asarray(codec.decode(file), float) for name, codec in codecs.items()}
        assert not np.array_equal(pictures["fast"], pictures["fine"])
        assert np.abs(pictures["fast"] - pictures["fine"]).mean() < 8
    assert parse(files["fast"]).model_id == parse(files["fine"]).model_id


def test_the_shipped_decoders_take_each_others_files() -> None:
    fast, fine = (load_codec("photo", name, device="cpu", threads=1) for name in ("fast", "fine"))
    photo = synthetic_photo(96, 128)
    for_fast, for_fine = fast.encode(photo), fine.encode(photo)

    def error(codec: Codec, file: bytes) -> float:
        return float(np.square(np.asarray(codec.decode(file), float) - photo).mean())

    assert error(fine, for_fine) < 1.2 * error(fine, for_fast)
    assert error(fine, for_fast) < 1.3 * error(fine, for_fine)
    assert error(fast, for_fine) < 1.3 * error(fast, for_fast)


# -- realism --------------------------------------------------------------------------------------------------------


def test_realism_weighs_two_decoders(tiny_model: Path) -> None:
    fine, vivid = (load_decoder(tiny_model / f"{name}.safetensors") for name in ("fine", "vivid"))
    assert vivid.faithful == fine.decoder_id
    assert vivid.realism == 1
    faithful, half, own = (load_decoder(tiny_model / "vivid.safetensors", realism=r) for r in (0, 0.5, 1))
    for name, tensor in fine.tensors.items():
        assert np.array_equal(faithful.tensors[name], tensor), name
        assert np.array_equal(own.tensors[name], vivid.tensors[name]), name
        mean = (tensor.astype(np.float32) + vivid.tensors[name].astype(np.float32)) / 2
        np.testing.assert_allclose(half.tensors[name], mean, rtol=1e-3, atol=1e-5)
    assert {decoder.decoder_id for decoder in (faithful, half, own)} == {vivid.decoder_id}
    assert (faithful.realism, half.realism) == (0, 0.5)


def test_realism_0_makes_the_faithful_picture(tiny_model: Path, codecs: dict[str, Codec]) -> None:
    file = codecs["fine"].encode(synthetic_photo(64, 96))
    pictures = [
        np.asarray(load_codec(tiny_model, "vivid", realism=realism, device="cpu").decode(file), float)
        for realism in (0, 0.5, 1)
    ]
    fine = np.asarray(codecs["fine"].decode(file), float)
    assert np.array_equal(pictures[0], fine)
    assert np.array_equal(pictures[2], np.asarray(codecs["vivid"].decode(file), float))
    distances = [np.abs(picture - fine).mean() for picture in pictures]
    assert distances[0] < distances[1] < distances[2]


def test_realism_that_cannot_be_had(folder: Path) -> None:
    for realism in (0.0, 0.5, 1.0):
        with pytest.raises(ModelError, match=r"fine\.safetensors: the decoder fine has no realism to choose$"):
            load_codec(folder, "fine", realism=realism)
    for realism in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="realism must be 0 to 1"):
            load_codec(folder, "vivid", realism=realism)
    with pytest.raises(ModelError, match=r"^vivid: needs the decoder \w{8}, .* does not lie beside it$"):
        load_decoder((folder / "vivid.safetensors").read_bytes())
    (folder / "fine.safetensors").unlink()
    with pytest.raises(ModelError, match=r"vivid\.safetensors: needs the decoder \w{8}, which it was made from, and"):
        load_codec(folder, "vivid", realism=0.5)


def test_a_decoder_that_says_to_be_made_from_itself(folder: Path) -> None:
    vivid = read_metadata(folder / "vivid.safetensors", DECODER_FORMAT)
    with_metadata(folder / "vivid.safetensors", faithful=vivid["decoder_id"])
    with pytest.raises(ModelError, match="does not lie beside it"):
        load_decoder(folder / "vivid.safetensors")


def test_decoders_of_two_shapes_have_nothing_between_them(folder: Path) -> None:
    fast = read_metadata(folder / "fast.safetensors", DECODER_FORMAT)
    with_metadata(folder / "vivid.safetensors", faithful=fast["decoder_id"])
    with pytest.raises(ModelError, match="the decoders vivid and fast are not of one shape"):
        load_decoder(folder / "vivid.safetensors", realism=0.5)
