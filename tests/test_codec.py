"""The codec: pictures of all sizes and kinds there and back, in tiles or whole, and files of others refused."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tiny_entropy_model, make_tiny_tokenizer, synthetic_photo
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import pqmim.codec
from pqmim.bitstream import pack, parse
from pqmim.checkpoints import MODEL_FILE, save_model
from pqmim.codec import Codec, assemble_tiles, load_codec, resolve_device
from pqmim.config import NUM_LEVELS, QualityRange
from pqmim.errors import (
    ConfigError,
    DamagedFileError,
    LimitError,
    ModelError,
    ModelMismatchError,
    TokenCheckError,
)
from pqmim.exact_inference import exact_kernels


@pytest.fixture(scope="module")
def codec(tiny_model: Path) -> Codec:
    return load_codec(tiny_model, device="cpu")


def mean_squared_error(a: Image.Image, b: Image.Image) -> float:
    return float(np.square(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean())


# -- there and back ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([0, 37.5, 100]), st.integers(0, 99))
def test_any_size(codec: Codec, width: int, height: int, quality: float, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    data = codec.encode(pixels, quality=quality)
    image = codec.decode(data)
    assert image.mode == "RGB"
    assert image.size == (width, height)
    tokens = codec.decode_tokens(data)
    assert tokens.shape == (3, -(-height // 16), -(-width // 16))
    assert tokens.dtype == np.int64
    assert (tokens == codec.encode_tokens(pixels, quality=quality)).all()
    assert parse(data).model_id == codec.model_id


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (16, 16), (17, 15), (200, 3)])
def test_odd_sizes_look_like_the_original(codec: Codec, size: tuple[int, int]) -> None:
    photo = Image.fromarray(synthetic_photo(size[1] + 20, size[0] + 20)[:-20, :-20])
    decoded = codec.decode(codec.encode(photo, quality=100))
    assert mean_squared_error(decoded, photo) < 400  # a tiny model that never was trained


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "YCbCr"])
def test_modes(codec: Codec, photo: Image.Image, mode: str) -> None:
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
        expected = photo.convert("L").convert("RGB")
    elif mode == "LA":
        picture = photo.convert("L").convert("LA")
        expected = photo.convert("L").convert("RGBA")
    else:
        picture = photo.convert(mode)
        expected = picture.convert("RGBA" if mode == "RGBA" else "RGB")
    decoded = codec.decode(codec.encode(picture, quality=100))
    assert decoded.mode == expected.mode
    assert decoded.size == photo.size
    if mode not in ("1", "P"):  # dithered noise has no place in a tiny model
        assert mean_squared_error(decoded.convert("RGB"), expected.convert("RGB")) < 500


def test_alpha_is_lossless(codec: Codec, photo: Image.Image) -> None:
    picture = photo.convert("RGBA")
    picture.putalpha(Image.radial_gradient("L").resize(photo.size))
    decoded = codec.decode(codec.encode(picture))
    assert decoded.mode == "RGBA"
    assert (np.asarray(decoded)[..., 3] == np.asarray(picture)[..., 3]).all()


def test_a_flat_picture_stays_flat(codec: Codec) -> None:
    decoded = np.asarray(codec.decode(codec.encode(np.full((80, 80, 3), 127, np.uint8), quality=100)), dtype=int)
    assert np.ptp(decoded[32:48, 32:48], axis=(0, 1)).max() <= 40  # of codebooks fitted to waves


# -- encoding ------------------------------------------------------------------------------------------------------


def test_encoding_is_deterministic(tiny_model: Path, codec: Codec) -> None:
    photos = [synthetic_photo(50 + i, 60, i) for i in range(4)]
    together = [codec.encode(p) for p in photos]
    alone = [load_codec(tiny_model, device="cpu").encode(p) for p in reversed(photos)][::-1]
    assert together == alone


def test_kernels_write_and_read_the_same_files(tiny_model: Path) -> None:
    photo = synthetic_photo(90, 70)
    codecs = [load_codec(tiny_model, device="cpu", kernel=k) for k in exact_kernels(torch.device("cpu"))]
    files = {codec.encode(photo, quality=70) for codec in codecs}
    assert len(files) == 1
    assert len({codec.token_hash(*files) for codec in codecs}) == 1


def test_quality_buys_fidelity_with_bytes(codec: Codec) -> None:
    photos = [Image.fromarray(synthetic_photo(96, 112, seed)) for seed in range(4)]
    sizes, errors = [], []
    for quality in (0, 25, 50, 75, 100):
        files = [codec.encode(photo, quality=quality) for photo in photos]
        sizes.append(sum(map(len, files)))
        errors.append(np.mean([mean_squared_error(codec.decode(f), p) for f, p in zip(files, photos, strict=True)]))
    assert sizes == sorted(sizes)
    assert sizes[-1] > sizes[0]
    assert errors[-1] < errors[2] < errors[0]


def test_quality_is_checked(codec: Codec, photo: Image.Image) -> None:
    for quality in (-1, 100.5, float("nan")):
        with pytest.raises(ValueError, match="0 to 100"):
            codec.encode(photo, quality=quality)


def test_rate_breakdown_adds_up(codec: Codec) -> None:
    photo = synthetic_photo(128, 128, 3)
    data, rates = codec.encode_with_rates(photo, quality=60)
    assert data == codec.encode(photo, quality=60)
    assert rates.file == 8 * len(codec.encode(photo, quality=60))
    assert rates.payload < rates.file
    assert rates.uniform == 3 * 64 * 4  # 3 sub-quantizers of 16 codewords at 64 positions
    assert abs(rates.payload - rates.exact) < 0.01 * rates.exact + 64
    assert 0 < rates.static < rates.uniform


def test_token_hash_is_of_the_tokens(codec: Codec, photo: Image.Image) -> None:
    data = codec.encode(photo)
    tokens = codec.decode_tokens(data).astype("<u2").tobytes()
    assert codec.token_hash(data) == hashlib.sha256(tokens).hexdigest()


def test_a_file_names_the_level_of_its_quality(codec: Codec) -> None:
    photo = synthetic_photo(40, 40)
    levels = [parse(codec.encode(photo, quality=quality)).level for quality in (0, 50, 100)]
    assert levels == [4, 2, 0]  # w is 60, 5.5 and 0.5; the priors lie at 1, e, e^2, ...


# -- tiles ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 14), st.integers(1, 14), st.integers(1, 6), st.integers(1, 3))
def test_tiles_are_put_together_as_the_whole(height: int, width: int, tile: int, scale: int) -> None:
    whole = torch.arange(2 * height * width * scale**2).view(2, height * scale, width * scale)
    margin = 2
    calls = []

    def transform(top: int, bottom: int, left: int, right: int) -> torch.Tensor:
        assert bottom - top <= tile + 2 * margin
        assert right - left <= tile + 2 * margin
        calls.append((top, left))
        return whole[:, scale * top : scale * bottom, scale * left : scale * right]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pqmim.codec, "TILE_POSITIONS", tile)
        assert torch.equal(assemble_tiles(transform, height, width, scale, margin), whole)
    assert len(calls) == -(-height // tile) * -(-width // tile)


@pytest.mark.parametrize("tile", [1, 4])
def test_tiles_leave_no_seams(codec: Codec, monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    pixels = synthetic_photo(16 * 11 + 3, 16 * 9, 5)
    tokens = torch.from_numpy(codec.encode_tokens(pixels, quality=100))
    with torch.inference_mode():
        whole_latent, whole_picture = codec._analyze(pixels), codec._synthesize(tokens)
        monkeypatch.setattr(pqmim.codec, "TILE_POSITIONS", tile)
        latent, picture = codec._analyze(pixels), codec._synthesize(tokens)
    assert torch.allclose(latent, whole_latent, atol=1e-3)
    difference = np.abs(picture.astype(int) - whole_picture.astype(int))
    assert difference.max() <= 1  # where a float falls on the other side of a half
    assert (difference > 0).mean() < 0.001
    assert (codec.encode_tokens(pixels, quality=100) == tokens.numpy()).mean() > 0.999


# -- what is refused -----------------------------------------------------------------------------------------------


def test_files_of_another_model_are_refused_by_name(codec: Codec, photo: Image.Image, tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer(seed=1)
    save_model(tmp_path / MODEL_FILE, "other", tokenizer, make_tiny_entropy_model(tokenizer), QualityRange(), {})
    other = load_codec(tmp_path, device="cpu")
    assert other.model_id != codec.model_id
    data = other.encode(photo)
    with pytest.raises(ModelMismatchError) as caught:
        codec.decode(data)
    for part in (other.model_id.hex(), codec.model_id.hex(), "tiny"):
        assert part in str(caught.value)


def test_levels_that_the_model_does_not_have_are_refused(codec: Codec, photo: Image.Image) -> None:
    container = parse(codec.encode(photo))
    for level in (NUM_LEVELS, 255):
        with pytest.raises(DamagedFileError, match=f"level {level} "):
            codec.decode(pack(replace(container, level=level)))


def test_another_level_does_not_decode(codec: Codec) -> None:
    container = parse(codec.encode(synthetic_photo(160, 160), quality=100))
    for level in range(1, NUM_LEVELS):
        with pytest.raises((DamagedFileError, TokenCheckError)):
            codec.decode(pack(replace(container, level=level)))


def test_pixel_limits(codec: Codec, photo: Image.Image) -> None:
    data = codec.encode(photo)
    pixels = photo.width * photo.height
    assert codec.decode(data, max_pixels=pixels).size == photo.size
    with pytest.raises(LimitError):
        codec.decode(data, max_pixels=pixels - 1)
    with pytest.raises(LimitError):
        codec.encode(photo, max_pixels=pixels - 1)


def test_devices(tiny_model: Path) -> None:
    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="auto, cpu or cuda"):
        resolve_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA"):
            load_codec(tiny_model, device="cuda")


def test_missing_models(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model"):
        load_codec(tmp_path / "nothing")


def test_encoding_inside_autocast_is_still_readable(codec: Codec) -> None:
    photo = synthetic_photo(64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        data = codec.encode(photo)
    assert codec.decode(data).size == (64, 64)
