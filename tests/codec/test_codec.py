"""The codec: pictures of all sizes and kinds there and back, whole or in part, and files of others refused."""

import hashlib
import json
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import synthetic_photo
from PIL import Image

from pqmim.bitstream import MAX_LEVEL, pack, parse, smallest_size, truncate
from pqmim.codec import Codec, load_codec
from pqmim.decoder_files import load_decoder
from pqmim.encoder import EncodedTokens, PictureEncoder
from pqmim.entropy_kernels import exact_kernels
from pqmim.errors import (
    ConfigError,
    DamagedFileError,
    ImageError,
    LimitError,
    ModelError,
    ModelMismatchError,
    TargetError,
    TokenCheckError,
)
from pqmim.model_files import MODEL_FILE, compute_model_id, content_hash, load_model, parse_tensors
from pqmim.options import EncodeOptions, Fill, FillOptions, Region, Tune
from pqmim.rate_control import MAX_ENCODINGS
from pqmim.runtime import default_threads

TINY_LEVELS = 6
"""Of the tiny model."""


@pytest.fixture(scope="module")
def codec(tiny_model: Path) -> Codec:
    return load_codec(tiny_model, device="cpu")


def mean_squared_error(a: Image.Image, b: Image.Image) -> float:
    return float(np.square(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean())


# -- there and back ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([0, 37.5, 100]), st.integers(0, 99))
def test_any_size(codec: Codec, width: int, height: int, quality: float, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    data = codec.encode(pixels, quality=quality)
    image = codec.decode(data)
    assert image.mode == "RGB"
    assert image.size == (width, height)
    tokens = codec.decode_tokens(data)
    scale = parse(data).scale
    assert scale == 1 or quality == 0  # low qualities may be coded smaller
    assert tokens.shape == (8, -(-height // (16 * scale)), -(-width // (16 * scale)))
    assert tokens.dtype == np.int64
    assert (tokens == codec.encode_tokens(pixels, quality=quality)).all()
    assert codec.model_id.startswith(parse(data).model_id)


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
    kernels = exact_kernels(load_model(tiny_model / MODEL_FILE))
    codecs = [load_codec(tiny_model, device="cpu", kernel=kernel) for kernel in kernels]
    assert [codec.kernel for codec in codecs] == list(kernels)
    files = {codec.encode(photo, quality=70) for codec in codecs}
    assert len(files) == 1
    assert len({codec.token_hash(*files) for codec in codecs}) == 1


def test_any_number_of_threads_writes_and_reads_the_same_files(tiny_model: Path) -> None:
    photo = synthetic_photo(200, 170)
    codecs = [load_codec(tiny_model, device="cpu", threads=threads) for threads in (1, 2, 3, 8)]
    for arguments in ({"quality": 90}, {"target_bytes": 200}, {"quality": 90, "options": EncodeOptions(effort=3)}):
        files = {codec.encode(photo, **arguments) for codec in codecs}
        assert len(files) == 1
        assert len({codec.token_hash(*files) for codec in codecs}) == 1
    part = truncate(*files, len(*files) // 2)
    for options in (FillOptions(), FillOptions(Fill.SAMPLE, seed=3)):
        pictures = [np.asarray(codec.decode(part, options=options), int) for codec in codecs]
        assert all(np.abs(picture - pictures[0]).max() <= 1 for picture in pictures)  # pixels are float


@pytest.mark.parametrize("threads", [1, 2])
def test_one_codec_serves_several_threads_at_once(tiny_model: Path, threads: int) -> None:
    codec = load_codec(tiny_model, device="cpu", threads=threads)
    photos = [synthetic_photo(40 + 7 * i, 90 - 5 * i, i) for i in range(8)]

    def there_and_back(photo: np.ndarray) -> tuple[bytes, bytes]:
        data = codec.encode(photo, quality=80)
        part = truncate(data, (smallest_size(data) + len(data)) // 2)
        return data, codec.decode(part, options=FillOptions(Fill.SAMPLE)).tobytes()

    alone = load_codec(tiny_model, device="cpu", threads=1)
    expected = [alone.encode(photo, quality=80) for photo in photos]
    with ThreadPoolExecutor(4) as executor:
        first, second = (list(executor.map(there_and_back, photos)) for _ in range(2))
    assert [data for data, _ in first] == expected
    assert first == second


def test_threads_are_checked(tiny_model: Path) -> None:
    for threads in (0, -1):
        with pytest.raises(ValueError, match=f"threads must be at least 1, not {threads}"):
            load_codec(tiny_model, threads=threads)
    assert load_codec(tiny_model)._networks.transforms._threads == default_threads()


def test_quality_buys_fidelity_with_bytes(codec: Codec) -> None:
    photos = [Image.fromarray(synthetic_photo(96, 112, seed)) for seed in range(4)]
    sizes, errors = [], []
    for quality in (0, 25, 50, 75, 100):
        files = [codec.encode(photo, quality=quality) for photo in photos]
        sizes.append(sum(map(len, files)))
        errors.append(np.mean([mean_squared_error(codec.decode(f), p) for f, p in zip(files, photos, strict=True)]))
    assert all(b > 0.98 * a for a, b in pairwise(sizes))  # from one level's codebooks to the next there may be a step
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
    sizes = codec._networks.quantizer.alphabets.sizes[parse(data).level]
    assert rates.uniform == pytest.approx(64 * np.log2(sizes).sum())  # of 64 positions
    assert abs(rates.payload - rates.exact) < 0.01 * rates.exact + 64
    assert 0 < rates.static < rates.uniform


def test_token_hash_is_of_the_tokens(codec: Codec, photo: Image.Image) -> None:
    data = codec.encode(photo)
    tokens = codec.decode_tokens(data).astype("<u2").tobytes()
    assert codec.token_hash(data) == hashlib.sha256(tokens).hexdigest()


def test_a_file_names_the_level_of_its_quality(codec: Codec) -> None:
    photo = synthetic_photo(40, 40)
    whole = EncodeOptions(scale=1)
    levels = [parse(codec.encode(photo, quality=quality, options=whole)).level for quality in (0, 50, 100)]
    assert levels == [5, 3, 0]  # w is 60, 3.9 and 0.25; the levels take turns at 0.53, 1.4, 3.6, 9.4 and 24


# -- sizes that are asked for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [11, 20, 60, 200, 500, 2000])
def test_target_bytes(codec: Codec, monkeypatch: pytest.MonkeyPatch, target: int) -> None:
    """Never above, few encodings, and near where the model has a size near by."""
    calls = 0
    original = PictureEncoder.encode

    def counted(self: PictureEncoder, *args: float) -> EncodedTokens:
        nonlocal calls
        calls += 1
        return original(self, *args)

    monkeypatch.setattr(PictureEncoder, "encode", counted)
    photo = synthetic_photo(320, 336, 1)
    data = codec.encode(photo, target_bytes=target)
    assert len(data) <= target
    assert 1 <= calls <= MAX_ENCODINGS
    assert codec.decode(data).size == (336, 320)
    largest = len(codec.encode(photo, quality=100))
    assert len(data) >= min(0.8 * target, 0.97 * largest)


def test_larger_targets_give_better_pictures(codec: Codec) -> None:
    photo = Image.fromarray(synthetic_photo(160, 160, 1))
    errors = [
        mean_squared_error(codec.decode(codec.encode(photo, target_bytes=target)), photo) for target in (12, 80, 400)
    ]
    assert errors == sorted(errors, reverse=True)


def test_target_bpp_is_a_target_in_bytes(codec: Codec) -> None:
    photo = synthetic_photo(96, 112)
    options = EncodeOptions(effort=1)
    for bpp in (0.02, 0.1, 5.0):
        data = codec.encode(photo, target_bpp=bpp, options=options)
        target = max(1, int(bpp * 96 * 112 / 8))
        assert data == codec.encode(photo, target_bytes=target, options=options)
        assert len(data) <= target


def test_targets_below_what_is_possible(codec: Codec) -> None:
    """The smallest file there is, or an error that says how small it is."""
    photo = synthetic_photo(64, 64)
    data = codec.encode(photo, target_bytes=1)
    assert parse(data).payload == b""
    assert codec.decode_with_report(data).invented_share == 1
    for target in (1, len(data) - 1):
        with pytest.raises(TargetError, match=rf"no file of {target} bytes .* has {len(data)}"):
            codec.encode(photo, target_bytes=target, options=EncodeOptions(strict=True))
    assert len(codec.encode(photo, target_bytes=len(data), options=EncodeOptions(strict=True))) == len(data)


@pytest.mark.parametrize("size", [(1, 1), (17, 1)])
def test_targets_for_the_smallest_pictures(codec: Codec, size: tuple[int, int]) -> None:
    photo = synthetic_photo(*size)
    for target in (1, 9, 10, 12, 1000):
        data = codec.encode(photo, target_bytes=target)
        assert len(data) <= max(target, 9)
        assert codec.decode(data).size == size[::-1]


def test_targets_count_alpha(codec: Codec) -> None:
    picture = Image.fromarray(synthetic_photo(96, 96))
    picture.putalpha(Image.radial_gradient("L").resize(picture.size))
    smallest = len(codec.encode(picture, target_bytes=1))
    alpha = parse(codec.encode(picture)).alpha or b""
    assert len(alpha) < smallest < len(alpha) + 40
    for target in (smallest, smallest + 30, smallest + 150):
        data = codec.encode(picture, target_bytes=target)
        assert len(data) <= target
        assert (np.asarray(codec.decode(data))[..., 3] == np.asarray(picture)[..., 3]).all()
    with pytest.raises(TargetError):
        codec.encode(picture, target_bytes=smallest - 1, options=EncodeOptions(strict=True))


@pytest.mark.parametrize(
    "arguments",
    [
        {"target_bytes": 0},
        {"target_bytes": -5},
        {"target_bytes": float("nan")},
        {"target_bpp": 0.0},
        {"target_bpp": -1.0},
        {"target_bpp": float("nan")},
        {"target_bpp": float("inf")},
        {"target_bpp": 1.0, "target_bytes": 100},
    ],
)
def test_targets_are_checked(codec: Codec, photo: Image.Image, arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"target_bytes|target_bpp"):
        codec.encode(photo, **arguments)


# -- how to encode --------------------------------------------------------------------------------------------------


def test_a_kept_share_and_a_target(codec: Codec) -> None:
    photo = synthetic_photo(200, 200)
    largest = len(codec.encode(photo, quality=100, options=EncodeOptions(keep=0.3)))
    for target in (20, 40, 2000):
        data = codec.encode(photo, target_bytes=target, options=EncodeOptions(keep=0.3))
        assert min(0.6 * target, 0.9 * largest) <= len(data) <= target


def test_names_of_options_are_as_good_as_the_options(codec: Codec, photo: Image.Image) -> None:
    data = codec.encode(photo, options=EncodeOptions(tune="ms-ssim", keep=0.3))
    assert data == codec.encode(photo, options=EncodeOptions(tune=Tune.MS_SSIM, keep=0.3))
    for fill in Fill:
        named, plain = (codec.decode(data, options=FillOptions(f)) for f in (str(fill), fill))
        assert named.tobytes() == plain.tobytes()


@pytest.mark.parametrize("size", [(1, 1), (45, 70), (130, 33), (8, 8), (9, 127)])
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_pictures_coded_smaller_come_back_at_their_size(codec: Codec, size: tuple[int, int], scale: int) -> None:
    data = codec.encode(synthetic_photo(*size), options=EncodeOptions(scale=scale, effort=1))
    assert parse(data).scale == scale
    assert codec.decode_tokens(data).shape == (8, -(-size[0] // (16 * scale)), -(-size[1] // (16 * scale)))
    assert codec.decode(data).size == size[::-1]


def test_scale_with_alpha_and_regions(codec: Codec) -> None:
    picture = Image.fromarray(synthetic_photo(75, 101))
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    regions = (Region(100, 74, 1, 1), Region(-50, -50, 10, 10), Region(90, 0, 500, 500, 3.0))
    for scale in (1, 2, 8):
        options = EncodeOptions(scale=scale, regions=regions)
        decoded = codec.decode(codec.encode(picture, options=options))
        assert decoded.size == picture.size
        assert (np.asarray(decoded)[..., 3] == np.asarray(picture)[..., 3]).all()
        assert len(codec.encode(picture, target_bytes=4000, options=options)) <= 4000


def test_smaller_pictures_for_the_smallest_targets(codec: Codec) -> None:
    photo = synthetic_photo(400, 400)
    scales = [parse(codec.encode(photo, target_bytes=target)).scale for target in (20, 2000)]
    assert scales[0] > scales[1]
    fixed = codec.encode(photo, target_bytes=20, options=EncodeOptions(scale=1))
    assert parse(fixed).scale == 1
    assert len(fixed) <= 20


# -- parts of a picture ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mini", "full"])
def test_any_truncation_decodes(codec: Codec, kind: str) -> None:
    """Of fewer bytes no more tokens, and no wrong ones; in the mini form and the full one, which alpha takes."""
    picture = Image.fromarray(synthetic_photo(80, 70))
    if kind == "full":
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    data = codec.encode(picture, quality=90)
    assert parse(data).is_mini == (kind == "mini")
    tokens = codec.decode_tokens(data)
    numbers = []
    for num_bytes in range(smallest_size(data), len(data)):
        part = truncate(data, num_bytes)
        assert len(part) <= num_bytes
        found = codec.decode_tokens(part)
        is_known = found >= 0
        assert (found[is_known] == tokens[is_known]).all()
        numbers.append(int(is_known.sum()))
    assert numbers[0] == 0
    assert numbers == sorted(numbers)
    assert numbers[-1] > 0.9 * tokens.size
    for num_bytes in (smallest_size(data), (smallest_size(data) + len(data)) // 2):
        report = codec.decode_with_report(truncate(data, num_bytes))
        assert report.image.size == picture.size
        assert report.image.mode == picture.mode
        assert report.problem == ""
        known = (codec.decode_tokens(truncate(data, num_bytes)) >= 0).mean()
        assert report.invented_share == pytest.approx(1 - known)
    assert codec.decode_with_report(data).invented_share == 0


def test_a_partial_file_again_cut_is_the_file_cut_at_once(codec: Codec) -> None:
    data = codec.encode(synthetic_photo(80, 70), quality=90)
    assert truncate(truncate(data, 60), 40) == truncate(data, 40)
    for keep in (0.1, 0.5, 0.9):
        kept = codec.encode(synthetic_photo(80, 70), quality=90, options=EncodeOptions(keep=keep))
        assert kept == truncate(data, len(kept))
        assert codec.decode_with_report(kept).invented_share <= 1 - keep


def test_the_fills(codec: Codec) -> None:
    photo = Image.fromarray(synthetic_photo(96, 96, 4))
    data = codec.encode(photo, quality=90, options=EncodeOptions(keep=0.4))
    likely = codec.decode(data)
    none = codec.decode(data, options=FillOptions(Fill.NONE))
    drawn = [codec.decode(data, options=FillOptions(Fill.SAMPLE, seed=seed)) for seed in (0, 0, 1, 2**100)]
    assert drawn[0].tobytes() == drawn[1].tobytes()
    assert len({picture.tobytes() for picture in [likely, none, *drawn]}) == 5
    assert codec.decode(data, options=FillOptions(Fill.LIKELY, seed=5)).tobytes() == likely.tobytes()
    whole = codec.encode(photo, quality=90)
    assert len({codec.decode(whole, options=FillOptions(fill)).tobytes() for fill in Fill}) == 1


def test_pictures_after_each_step(codec: Codec) -> None:
    photo = Image.fromarray(synthetic_photo(90, 75, 1))
    data = codec.encode(photo, quality=100)
    shown: list[Image.Image] = []
    report = codec.decode_with_report(data, after_step=shown.append)
    assert len(shown) == 7
    assert all(picture.size == photo.size for picture in shown)
    assert np.abs(np.asarray(shown[-1], int) - np.asarray(report.image, int)).max() <= 1
    assert mean_squared_error(shown[-1], photo) < mean_squared_error(shown[0], photo)
    assert report.image.tobytes() == codec.decode(data).tobytes()

    shown.clear()
    part = truncate(data, (len(data) + smallest_size(data)) // 2)
    report = codec.decode_with_report(part, after_step=shown.append)
    assert 1 < len(shown) <= 7
    assert np.abs(np.asarray(shown[-1], int) - np.asarray(report.image, int)).max() <= 1


# -- what the model believes ----------------------------------------------------------------------------------------


def test_generate(codec: Codec) -> None:
    for size in ((1, 1), (50, 33)):
        pictures = [codec.generate(*size, options=FillOptions(seed=seed)) for seed in (0, 0, 1)]
        assert all(picture.size == size and picture.mode == "RGB" for picture in pictures)
        assert pictures[0].tobytes() == pictures[1].tobytes()
    assert pictures[0].tobytes() != pictures[2].tobytes()
    assert codec.generate(50, 33).tobytes() == pictures[0].tobytes()
    assert codec.generate(50, 33, options=FillOptions(temperature=0.5)).tobytes() != pictures[0].tobytes()
    assert codec.generate(50, 33, quality=0).tobytes() != codec.generate(50, 33, quality=100).tobytes()
    for bad in ((0, 5), (5, -1)):
        with pytest.raises(ValueError, match="at least 1 x 1"):
            codec.generate(*bad)
    with pytest.raises(LimitError):
        codec.generate(20_000, 20_000)


def test_inpaint_changes_what_is_masked_only(codec: Codec) -> None:
    picture = Image.fromarray(synthetic_photo(70, 90))
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    mask = np.zeros((70, 90), np.uint8)
    mask[20:50, 33:41] = 255
    mask[69, 89] = 200
    before = np.asarray(picture)
    results = []
    for options in (None, FillOptions(Fill.SAMPLE, seed=1), FillOptions(Fill.LIKELY), None):
        painted = codec.inpaint(picture, mask, options=options)
        after = np.asarray(painted)
        assert (after[mask == 0] == before[mask == 0]).all()
        assert (after[..., 3] == before[..., 3]).all()
        assert (after[mask > 0] != before[mask > 0]).any()
        results.append(painted.tobytes())
    assert results[0] == results[3]
    assert len(set(results)) == 3
    nothing = codec.inpaint(picture, np.zeros_like(mask))
    assert (np.asarray(nothing) == before).all()
    assert codec.inpaint(picture, np.full_like(mask, 255)).size == picture.size
    with pytest.raises(ImageError, match="mask is 90 x 69"):
        codec.inpaint(picture, mask[:-1])


def test_inpainting_does_not_peek(codec: Codec) -> None:
    """What is under the mask has no influence on what is drawn, but for the margin of the transform around it."""
    photo = synthetic_photo(16 * 9, 16 * 9, 6)
    other = photo.copy()
    other[64:80, 64:80] = 255 - other[64:80, 64:80]
    mask = np.zeros(photo.shape[:2], np.uint8)
    mask[16:128, 16:128] = 255  # farther than the transforms see
    drawn = [np.asarray(codec.inpaint(picture, mask)) for picture in (photo, other)]
    assert (drawn[0] == drawn[1]).all()


# -- what is refused -----------------------------------------------------------------------------------------------


def with_other_weights(path: Path) -> bytes:
    """A model file, whole, whose entropy model prefers other tokens a little."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = json.loads(header["__metadata__"]["pqmim"])
    tensors = dict(load_model(path).tensors)
    name = "entropy.token_bias"
    tensors[name] = tensors[name] + np.arange(tensors[name].shape[-1], dtype=np.int32)
    metadata |= {"name": "other", "model_id": compute_model_id(metadata["config"], tensors).hex()}
    metadata["content_hash"] = content_hash(metadata, parse_tensors(data, "") | {name: tensors[name]})
    header["__metadata__"]["pqmim"] = json.dumps(metadata)
    start, stop = (8 + length + offset for offset in header[name]["data_offsets"])
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data[8 + length : start] + tensors[name].tobytes() + data[stop:]


def test_files_of_another_model_are_refused_by_name(
    codec: Codec, tiny_model: Path, photo: Image.Image, tmp_path: Path
) -> None:
    (tmp_path / MODEL_FILE).write_bytes(with_other_weights(tiny_model / MODEL_FILE))
    with pytest.raises(ModelError, match=r"the decoder fine is for the token model \w{8}, not for \w{8} \(other\)"):
        load_codec(tmp_path, tiny_model / "fine.safetensors", device="cpu")
    model = load_model(tmp_path / MODEL_FILE)
    other = Codec(model, replace(load_decoder(tiny_model / "fine.safetensors"), token_model=model.model_id), "cpu")
    assert other.name == "other"
    assert other.model_id != codec.model_id
    data = other.encode(photo)
    with pytest.raises(ModelMismatchError) as caught:
        codec.decode(data)
    for part in (other.model_id.hex()[:4], codec.model_id.hex(), "tiny"):
        assert part in str(caught.value)
    assert other.decode(data).size == photo.size


def test_levels_that_the_model_does_not_have_are_refused(codec: Codec, photo: Image.Image) -> None:
    container = replace(parse(codec.encode(photo)), model_id=codec.model_id, token_check=0)
    for level in (TINY_LEVELS, MAX_LEVEL):
        with pytest.raises(DamagedFileError, match=f"level {level} "):
            codec.decode(pack(replace(container, level=level)))


def test_another_level_does_not_decode(codec: Codec) -> None:
    picture = Image.fromarray(synthetic_photo(160, 160))
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))  # the full form has a token check
    container = parse(codec.encode(picture, quality=100))
    for level in range(1, TINY_LEVELS):
        with pytest.raises((DamagedFileError, TokenCheckError)):
            codec.decode(pack(replace(container, level=level)))


def test_pixel_limits(codec: Codec, photo: Image.Image) -> None:
    data = codec.encode(photo)
    pixels = photo.width * photo.height
    assert codec.decode(data, max_pixels=pixels).size == photo.size
    with pytest.raises(LimitError):
        codec.decode(data, max_pixels=pixels - 1)
    with pytest.raises(LimitError):
        codec.encode(photo, options=EncodeOptions(max_pixels=pixels - 1))


def test_devices(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="auto, cpu or cuda"):
        load_codec(tiny_model, device="tpu")
    monkeypatch.setattr("pqmim.runtime.has_cuda", lambda: False)
    with pytest.raises(ConfigError, match="cannot use CUDA"):
        load_codec(tiny_model, device="cuda")
    assert load_codec(tiny_model, device="auto").name == "tiny"


def test_missing_models(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model"):
        load_codec(tmp_path / "nothing")


def test_models_that_cannot_be_used_are_named(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(tiny_model / MODEL_FILE)
    for name in ("tokenizer.quantizer.order", "entropy.embed.1.scale"):
        tensors = {key: tensor for key, tensor in model.tensors.items() if key != name}
        monkeypatch.setattr("pqmim.codec.load_model", lambda path, tensors=tensors: replace(model, tensors=tensors))
        with pytest.raises(ModelError, match=rf"^{tiny_model / MODEL_FILE}: weights lack .*{name[-5:]} as") as caught:
            load_codec(tiny_model)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["renamed", "read-only", "bytes"])
def test_model_files_from_anywhere(codec: Codec, tiny_model: Path, tmp_path: Path, source: str) -> None:
    data = (tiny_model / MODEL_FILE).read_bytes()
    path = tmp_path / ("my model.bin" if source == "renamed" else MODEL_FILE)
    path.write_bytes(data)
    path.chmod(0o400 if source == "read-only" else 0o600)
    decoder = tiny_model / "fine.safetensors"
    if source == "bytes":
        other = Codec(load_model(data), load_decoder(decoder.read_bytes()), "cpu")
    else:
        other = load_codec(path, decoder, device="cpu")
    photo = synthetic_photo(64, 80)
    file = codec.encode(photo)
    assert other.encode(photo) == file
    assert other.decode(file).tobytes() == codec.decode(file).tobytes()
