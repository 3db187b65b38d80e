"""The scripts that measure encoder, rate control, truncation and regions run, and run on after an interruption."""

import importlib
import json
import math
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from pictures import synthetic_photo
from PIL import Image

from pqmim.distortion import StructuralDissimilarity
from pqmim.range_coding import TokenReader
from pqmim.token_coding import RateDistortionChoice

SCRIPTS = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.skipif(not SCRIPTS.is_dir(), reason="not part of the source distribution")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photos, just large enough for MS-SSIM."""
    folder = tmp_path_factory.mktemp("photos")
    for seed, (height, width) in enumerate(((161, 176), (165, 163))):
        photo = synthetic_photo(height, width, seed)
        photo[:, : width // 2] = photo[:, : width // 2].mean((0, 1))  # a quiet part, for the tuning to tell from others
        Image.fromarray(photo).save(folder / f"{seed}.png")
    return folder


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module(name)


def content(output: Path, name: str) -> Any:
    return json.loads((output / f"{name}.json").read_text())


def lines(output: Path, name: str) -> list[str]:
    return (output / f"{name}.md").read_text().splitlines()


def test_encoder_choices(photos: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = load("encoder_choices", monkeypatch)
    photo = tmp_path / "photo" / "1.png"  # one in which some choices are close, so that all variants differ
    photo.parent.mkdir()
    shutil.copyfile(photos / photo.name, photo)
    script.main([str(photo.parent), "-m", str(tiny_model), "-o", str(tmp_path), "--qualities", "40", "100"])
    rows = content(tmp_path, "encoder_choices")
    assert {row["variant"] for row in rows} == {variant.name for variant in script.DEFAULT_VARIANTS}
    by_point = {(row["variant"], row["quality"]): row for row in rows}
    # Each changes what is sent, but for the map of trade-offs, for which the photo is too flat.
    map_of_trade_offs = (script.TUNED.name, "effort 2")
    compared = [pair for pair in script.COMPARISONS if pair[0] not in {variant.name for variant in script.VIVID}]
    for name, anchor in set(compared[1:]) - {map_of_trade_offs}:
        points = [[by_point[of, quality]["psnr-rgb"] for quality in (40.0, 100.0)] for of in (name, anchor)]
        assert points[0] != points[1]
    nearest = [row for row in rows if row["variant"] == "nearest codeword"]
    assert nearest[-1]["bpp"] > by_point["effort 1", 40.0]["bpp"]
    table = lines(tmp_path, "encoder_choices")
    assert table[2].startswith("| effort 1 | nearest codeword |")
    assert all(line.count("|") == 8 for line in table[: 2 + len(compared)])


def test_encoder_choices_of_variants(
    photos: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load("encoder_choices", monkeypatch)
    monkeypatch.setattr(script, "vivid_judge", lambda: StructuralDissimilarity)
    variants = ["effort 1", "tune vivid, effort 2"]
    choice = [
        "--images",
        "1",
        "--qualities",
        "40",
        "100",
        "--variants",
        *variants,
        "--metrics",
        "psnr",
        "--threads",
        "1",
    ]
    script.main(
        [str(photos), "-m", str(tiny_model), "--decoder", "vivid", "--for", "fine", "-o", str(tmp_path), *choice]
    )
    rows = content(tmp_path, "encoder_choices")
    assert [row["variant"] for row in rows] == [name for name in variants for _ in range(2)]
    assert "ms-ssim-rgb" not in rows[0]
    table = lines(tmp_path, "encoder_choices")
    assert table[0] == "| tokens | against | BD-rate PSNR | over | encode time, ratio |"
    assert table[2].startswith("| tune vivid, effort 2 | effort 1 |")
    assert table[-4:-2] == ["| tokens | encode (s), 1 thread |", "| --- | --- |"]
    assert [line.split(" | ")[0] for line in table[-2:]] == [f"| {name}" for name in variants]


def test_token_choices(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    """Nearest codewords depend on the level alone, and the encoder is itself again afterwards."""
    script = load("encoder_choices", monkeypatch)
    codec = importlib.import_module("pqmim").load_codec(tiny_model)
    photo = synthetic_photo(64, 80)
    before = codec.encode(photo, quality=45)
    middles = script.level_qualities(codec)
    assert middles == sorted(set(middles))
    assert len(middles) == 6
    with script.choosing(script.nearest):
        assert codec.encode(photo, quality=45) == codec.encode(photo, quality=45.5) != before
    assert codec.encode(photo, quality=45) == before


def test_target_size(photos: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = load("target_size", monkeypatch)
    arguments = [str(photos), "-m", str(tiny_model), "-o", str(tmp_path), "--bpp", "0.1", "--bytes", "60", "100000"]
    assert script.main(arguments) == 0
    targets = content(tmp_path, "target_size")["targets"]
    assert list(targets) == ["0.1 bpp", "60 B", "100,000 B"]
    assert [row["limit"] for row in targets["0.1 bpp"]] == [161 * 176 // 80, 165 * 163 // 80]
    for rows in targets.values():
        assert all(1 <= row["encodings"] <= 3 and row["bytes"] <= row["limit"] for row in rows)
    before = (tmp_path / "measurements.jsonl").read_bytes()
    assert before.count(b"\n") == 2 * (1 + 3)

    # Half of a line is what an interruption leaves: that row alone is made again.
    (tmp_path / "measurements.jsonl").write_bytes(before[:-20])
    table = lines(tmp_path, "target_size")
    assert script.main(arguments) == 0
    after = (tmp_path / "measurements.jsonl").read_bytes()
    assert after.splitlines()[:-1] == before.splitlines()[:-1]
    assert json.loads(after.splitlines()[-1])["bytes"] == json.loads(before.splitlines()[-1])["bytes"]
    assert lines(tmp_path, "target_size")[:2] == table[:2]


def test_a_file_above_its_target_is_told(
    photos: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    script = load("target_size", monkeypatch)
    arguments = [str(photos), "-m", str(tiny_model), "-o", str(tmp_path), "--images", "1", "--bpp", "--bytes", "5"]
    assert script.main(arguments) == 1
    assert lines(tmp_path, "target_size")[2].split(" | ")[4] == "1"


def test_truncation(photos: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = load("truncation", monkeypatch)
    strip = tmp_path / "images" / "strip.png"
    arguments = [str(photos), "-m", str(tiny_model), "-o", str(tmp_path), "--qualities", "80"]
    arguments += ["--shares", "20", "60", "100", "--strip", str(strip), "--strip-image", str(photos / "0.png")]
    script.main(arguments)
    for row in content(tmp_path, "truncation"):
        known = [point["truncated"]["known_share"] for point in row["points"]]
        assert known == sorted(known)
        assert known[-1] == 1
        for point in row["points"]:
            assert point["truncated"]["bytes"] <= -(-row["bytes"] * point["share"] // 100)
            assert point["fresh"]["bytes"] <= point["truncated"]["bytes"]
    assert len(lines(tmp_path, "truncation")) == 2 + 2 + 1 + 2 + 3
    with Image.open(strip) as picture:
        assert picture.size == (5 * 176 + 4 * script.GAP, 161 + script.CAPTION)


def test_strip_is_kept_small(photos: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = load("truncation", monkeypatch)
    monkeypatch.setattr(script, "MAX_STRIP_BYTES", 40_000)
    bench = importlib.import_module("measurements").Bench(str(tiny_model), tmp_path, "cpu")
    script.write_strip(bench, photos / "0.png", 80.0, tmp_path / "strip.png")
    assert (tmp_path / "strip.png").stat().st_size < 40_000


def test_region(photos: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = load("region", monkeypatch)
    script.main([str(photos), "-m", str(tiny_model), "-o", str(tmp_path), "--qualities", "50"])
    rows = content(tmp_path, "region")
    assert len(rows) == 2
    for row in rows:
        assert row["ratio"] <= 1
        assert row["plain bytes"] * row["ratio"] == pytest.approx(row["region bytes"])
        for part in ("inside", "outside"):
            assert row[f"{part} gain"] == row[f"region {part}"] - row[f"plain {part}"]
    assert len(lines(tmp_path, "region")) == 3


def test_inside_and_outside(monkeypatch: pytest.MonkeyPatch):
    script = load("region", monkeypatch)
    original = np.zeros((40, 60, 3), np.uint8)
    region = script.central_region(original, 8.0)
    assert (region.x, region.y, region.width, region.height) == (15, 10, 30, 20)
    decoded = original + np.uint8(10)
    decoded[10:30, 15:45] = 1
    inside, outside = script.psnr_inside_and_outside(original, decoded, region)
    assert inside == pytest.approx(20 * math.log10(255))
    assert outside == pytest.approx(inside - 20)


def test_performance(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Every part that the tables name is found and timed."""
    script = load("performance", monkeypatch)
    for owner, name in ((TokenReader, "code"), (RateDistortionChoice, "__call__")):  # the script wraps them for good
        monkeypatch.setattr(owner, name, getattr(owner, name))
    script.main(["--model", str(tiny_model), "--megapixels", "0.02", "--threads", "1", "--repeats", "1"])
    parts, kernels = capsys.readouterr().out.split("\n\n")
    header, _, encode, decode = [[cell.strip() for cell in line.split("|")[1:-1]] for line in parts.splitlines()]
    empty = {name for name, cell in zip(header, encode, strict=True) if cell == "-"}
    assert empty == {"range coder", "synthesis"}
    assert {name for name, cell in zip(header, decode, strict=True) if cell == "-"} == {
        "analysis",
        "correction",
        "choice",
    }
    names, _, seconds = kernels.splitlines()
    assert "numpy, s" in names
    assert seconds.count("|") == names.count("|")


def test_equal_bytes(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A row of panels for each rate, none of the others above pqmim's bytes unless it cannot be smaller."""
    script = load("equal_bytes", monkeypatch)
    photo = tmp_path / "photo.png"
    Image.fromarray(synthetic_photo(96, 80)).save(photo)
    output = tmp_path / "sheet.png"
    crop = ["--crop", "0", "0", "80", "64"]
    script.main(["--image", str(photo), "-m", str(tiny_model), "--bpp", "0.2", "9", *crop, "-o", str(output)])
    with Image.open(output) as sheet:
        assert sheet.size == (5 * 80 + 4 * script.GAP, 2 * (64 + script.CAPTION) + script.GAP)
    strips = [word for top in ("0", "30", "50") for word in ("--strip", str(photo), "0", top, "64", "16")]
    choice = ["--decoders", "fine", "vivid@0.5", "--bpp", "0.5", "--codecs", "WebP"]
    script.main(["-m", str(tiny_model), *strips, *choice, "-o", str(output)])
    with Image.open(output) as sheet:
        assert sheet.size == (4 * 64 + 3 * script.GAP, 3 * (16 + script.CAPTION) + 2 * script.GAP)
    sizes = {quality: 10 * quality for quality in range(1, 96)}
    assert len(script.largest_within(lambda quality: bytes(sizes[quality]), 305)) == 300
    assert len(script.largest_within(lambda quality: bytes(sizes[quality]), 5)) == 10


def test_quality_steps(
    photos: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    script = load("quality_steps", monkeypatch)
    script.main([str(photos), "-m", str(tiny_model), "--images", "1"])
    first, total = capsys.readouterr().out.splitlines()
    assert first.startswith("0.png: ")
    largest, least, mean = (float(part.rstrip("%")) for part in re.findall(r"[+-]\d+\.\d%", total))
    assert least < mean < largest
    assert f"{largest:+.1f}%" in first
    assert mean > 0


def test_work(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("torch")
    script = load("work", monkeypatch)
    Image.fromarray(synthetic_photo(64, 96)).save(tmp_path / "photo.png")
    script.main(["--image", str(tmp_path / "photo.png"), "-m", str(tiny_model), "--qualities", "10", "90"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row[0] for row in rows[2:6]] == ["analysis", *(f"synthesis, {name}" for name in ("fast", "fine", "vivid"))]
    assert float(rows[4][1]) == float(rows[5][1]) > 0  # those of one shape
    for row in rows[-2:]:
        *parts, total = map(float, row[2:])
        assert total == pytest.approx(sum(parts), abs=0.2)
        assert total > 0


def test_bd_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A codec of 0.8 times the bytes below 0.8 bpp and of 1.1 times above, beside one that ends at 0.35."""
    script = load("bd_ranges", monkeypatch)
    rates = np.geomspace(0.03, 3, 20)
    curves = {"webp": rates, "pqmim-fine": rates * np.where(rates < 0.8, 0.8, 1.1), "short": 0.5 * rates[:14]}
    (tmp_path / "results").mkdir()
    for name, bpp in curves.items():
        results = {"bpp": list(bpp), "psnr-rgb": [30 + 5 * math.log10(rate) for rate in rates[: len(bpp)]]}
        content = json.dumps({"name": name, "results": results})
        (tmp_path / "results" / f"{name}.json").write_text(content, encoding="utf-8")
    script.main([str(tmp_path)])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.split("\n") if line.startswith("|")]
    header, _, short, webp = rows
    assert [text.strip() for text in header] == [
        "against",
        *(f"pqmim-fine, {r} bpp" for r in ("0.05 to 0.8", "0.8 to 2")),
    ]
    low, high = (float(text.split()[0]) for text in webp[1:])
    assert low == pytest.approx(-20, abs=0.5)
    assert 8 < high < 10.5  # the step itself is in this part
    assert float(short[1].split()[0]) == pytest.approx(60, abs=1)
    assert not short[2].strip()  # it has nothing there
    script.main([str(tmp_path), "--published", "--rates", "0.1", "1"])
    assert "published" in capsys.readouterr().out


def test_design_rows(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("torch")
    script = load("design_rows", monkeypatch)
    small = [
        "data.crop=64",
        "data.validation_photos=1",
        "transform.batch_size=2",
        "transform.warmup_steps=1",
        "transform.learning_rate=3e-3",
        "start_from=null",
        "model.autoencoder.latent_channels=16",
        "model.quantizer.num_subquantizers=16",
        "model.autoencoder.channels=[8,16,32]",
    ]
    changes = [argument for setting in small for argument in ("--set", setting)]
    arguments = ["transforms", "--data", str(photos), "-o", str(tmp_path), "--steps", "6", *changes]
    script.main([*arguments, "--rows", "0", "1", "4"])
    rows = [json.loads((tmp_path / f"transforms-{index}.json").read_text()) for index in (0, 1, 4)]
    assert rows[0]["bpp"] == sorted(rows[0]["bpp"], reverse=True)
    assert rows[0]["bpp"] != rows[1]["bpp"]  # other blocks take part
    assert rows[0]["psnr"][0] == pytest.approx(rows[2]["psnr"][0], abs=0.3)  # the same steps, in grey levels
    assert len(lines(tmp_path, "transforms")) == 2 + len(rows)
    assert "windowed attention" in capsys.readouterr().out


def test_realism(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Without pqmim, which takes long: two pictures of two patches, and one that is too small for a patch."""
    from pqmim.perceptual.packages import DISTS, EFFICIENTNET_LITE0, LPIPS, is_installed

    if not all(map(is_installed, (DISTS, EFFICIENTNET_LITE0, LPIPS))):
        pytest.skip("the weights are not installed")
    script = load("realism", monkeypatch)
    (tmp_path / "photos").mkdir()
    for seed, height in enumerate((256, 257, 100)):
        Image.fromarray(synthetic_photo(height, 512, seed)).save(tmp_path / "photos" / f"{seed}.png")
    rates = ("--bpp", "0.5", "1.5")
    arguments = [str(tmp_path / "photos"), "-o", str(tmp_path / "out"), "--decoders", "--references", "webp", *rates]
    script.main(arguments)
    rows = content(tmp_path / "out", "realism")
    assert [(row["codec"], row["rate"], row["pictures"], row["patches"]) for row in rows] == [
        ("webp", 0.5, 2, 4),
        ("webp", 1.5, 2, 4),
    ]
    for row in rows:
        assert row["bpp"] == pytest.approx(row["rate"], rel=0.05)
    for key in ("lite0", "alex", "lpips", "dists"):
        assert rows[0][key][0] > rows[1][key][0]
        assert rows[0][key][1] <= rows[0][key][0] <= rows[0][key][2]
    assert rows[0]["psnr"][0] < rows[1]["psnr"][0]

    monkeypatch.setattr(script, "Networks", None)  # nothing is measured, nor coded, again
    monkeypatch.setattr(script.SizeMatcher, "match", None)
    script.main(arguments)
    assert content(tmp_path / "out", "realism") == rows
    assert "At 1.5 bits per pixel:" in lines(tmp_path / "out", "realism")
    assert script.parse_decoder("vivid@0.5") == ("vivid", 0.5)
    assert script.parse_decoder("fine") == ("fine", None)


def test_another_decoder_costs_little(photos: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = load("other_decoder", monkeypatch)
    arguments = [str(photos), "-m", str(tiny_model), "-o", str(tmp_path), "--images", "1"]
    script.main([*arguments, "--qualities", "5", "35", "65", "95"])
    tables = [table.splitlines() for table in (tmp_path / "other_decoder.md").read_text().strip().split("\n\n")]
    assert [line.split(" | ")[:2] for line in tables[0][2:]] == [
        [f"| {made_for}", decoded_by] for made_for in ("fast", "fine") for decoded_by in ("fast", "fine")
    ]
    assert [line.split(" | ")[:2] for line in tables[1][2:]] == [["| fine", "fast"], ["| fast", "fine"]]
    for line in tables[1][2:]:
        assert -5 < float(line.split(" | ")[2].removesuffix(" %")) < 60
