"""Reference codecs: those that are installed code, those that are not say so."""

import io
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pqmim.errors import ConfigError, ImageError
from pqmim.evaluation import reference_codecs
from pqmim.evaluation.pixel_metrics import psnr_rgb
from pqmim.evaluation.published import published_kodak_curves, published_perceptual_table
from pqmim.evaluation.reference_codecs import (
    reference_codec,
    reference_codec_names,
)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    y, x = np.mgrid[:72, :90]
    waves = np.stack([np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 13)], axis=2)
    return Image.fromarray((128 + 100 * waves).astype(np.uint8))


@pytest.mark.parametrize("name", reference_codec_names())
def test_round_trip(name: str, image: Image.Image):
    """More quality costs more bytes and gives a better image of the same size."""
    codec = reference_codec(name)
    if (reason := codec.missing()) is not None:
        pytest.skip(reason)
    sizes, psnrs = [], []
    for quality in (codec.qualities[0], codec.qualities[-1]):
        data = codec.encode(image, quality)
        assert data == codec.encode(image, quality)
        decoded = codec.decode(data)
        assert (decoded.mode, decoded.size) == ("RGB", image.size)
        sizes.append(len(data))
        psnrs.append(psnr_rgb(np.asarray(image), np.asarray(decoded)))
    assert sizes[0] < sizes[1]
    assert psnrs[0] < psnrs[1]
    assert psnrs[1] > 30
    assert codec.description().startswith(("JPEG", "WebP", "AVIF", "HEIC", "mozjpeg"))


@pytest.mark.parametrize("name", reference_codec_names())
def test_codecs_can_be_sent_to_workers(name: str):
    codec = reference_codec(name, threads=2)
    assert pickle.loads(pickle.dumps(codec)) == codec  # noqa: S301
    assert codec.qualities == tuple(sorted(codec.qualities))


def test_unknown_codec():
    with pytest.raises(ConfigError, match=r"no reference codec 'gif'; there are jpeg, "):
        reference_codec("gif")


def test_all_and_repeated_names():
    names = [codec.name for codec in reference_codecs.reference_codecs(["webp", "all", "jpeg"])]
    assert names[0] == "webp"
    assert sorted(names) == sorted(reference_codec_names())


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch):
    for module in ("pillow_heif", "pillow_jxl"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setenv("PATH", "")
    assert reference_codec("heic").missing() == "the package pillow-heif is not installed"
    assert reference_codec("jxl").missing() == "the program cjxl is not installed"
    assert reference_codec("mozjpeg").missing() == "the program cjpeg is not installed"


def _program(folder: Path, name: str, body: str) -> None:
    file = folder / name
    file.write_text(f"#!{sys.executable}\nimport sys\narguments = sys.argv[1:]\n{body}\n")
    file.chmod(0o755)


def test_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: Image.Image):
    """Stand-ins for mozjpeg's cjpeg and for libjxl's programs, which a machine seldom has all of."""
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    jpeg = "Image.open(arguments[-1]).save(arguments[-2], 'JPEG', quality=int(arguments[1]))"
    _program(
        tmp_path,
        "cjpeg",
        "from PIL import Image\nif arguments == ['-version']: sys.exit('mozjpeg version 4.1.1 (build 1)')\n" + jpeg,
    )
    _program(
        tmp_path,
        "cjxl",
        "import shutil\nif arguments == ['--version']: sys.exit('cjxl v0.11')\nshutil.copy(arguments[0], arguments[1])",
    )
    _program(tmp_path, "djxl", "import shutil; shutil.copy(arguments[0], arguments[1])")

    mozjpeg = reference_codec("mozjpeg")
    assert mozjpeg.missing() is None
    assert "mozjpeg version 4.1.1" in mozjpeg.description()
    data = mozjpeg.encode(image, 80)
    assert Image.open(io.BytesIO(data)).format == "JPEG"
    assert mozjpeg.decode(data).size == image.size

    jxl = reference_codec("jxl")
    assert jxl.missing() is None
    assert np.array_equal(np.asarray(jxl.decode(jxl.encode(image, 80))), np.asarray(image))


def test_another_cjpeg_is_not_mozjpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    _program(tmp_path, "cjpeg", "print('libjpeg-turbo version 3.0')")
    assert "not mozjpeg's" in (reference_codec("mozjpeg").missing() or "")


def test_failing_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: Image.Image):
    monkeypatch.setenv("PATH", str(tmp_path))
    _program(tmp_path, "cjpeg", "sys.exit('Bogus quality')")
    with pytest.raises(ImageError, match="cjpeg failed: Bogus quality"):
        reference_codec("mozjpeg").encode(image, 80)


def test_published_curves():
    curves = {curve.name: curve for curve in published_kodak_curves()}
    assert all(name.startswith("published ") for name in curves)
    for curve in curves.values():
        assert curve.source.startswith("github.com/")
        assert list(curve.bpp) == sorted(curve.bpp)
        assert all(len(values) == len(curve.bpp) for values in curve.metrics.values())
    bpg = curves["published BPG 4:4:4 (x265)"]
    assert (bpg.bpp[1], bpg.metrics["psnr-rgb"][1]) == (0.16102, 28.6815)


def test_published_perceptual_figures():
    clic = published_perceptual_table("clic2020").splitlines()
    assert clic[0] == "| published | bpp | FID | KID x 1000 | LPIPS | DISTS | PSNR (dB) |"
    assert "| HiFiC | 0.129 | 4.197 | 1.08 | 0.05395 |  | 30.87 |" in clic
    assert "| StableCodec | 0.031 | 3.34 | 0.41 | 0.138 | 0.06739 | 24.93 |" in clic
    assert "arXiv:2006.09965" in clic[-1]
    kodak = published_perceptual_table("kodak").splitlines()
    assert kodak[0] == "| published | bpp | LPIPS | DISTS | PSNR (dB) |"
    assert "| MS-ILLM | 0.044 | 0.1576 | 0.1346 | 24.73 |" in kodak
