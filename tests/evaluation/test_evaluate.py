"""Evaluation: real files, means, resuming."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stand_in_codec import StandInCodec, write_photos

from pqmim.errors import ConfigError, ImageError, ModelError
from pqmim.evaluation.ablation import AblationOptions, run_ablation, variants_of
from pqmim.evaluation.benchmark import BenchmarkOptions, pqmim_factory, run_benchmark
from pqmim.evaluation.evaluate import EvaluationOptions, parse_qualities, run_evaluation
from pqmim.evaluation.measurement import Measurement
from pqmim.evaluation.pixel_metrics import psnr_rgb
from pqmim.evaluation.pqmim_codec import PqmimCodec, parse_decoder
from pqmim.evaluation.reference_codecs import reference_codecs
from pqmim.evaluation.report import ReportOptions, write_report
from pqmim.evaluation.results import bd_rates, load_evaluations, without_timings


@pytest.fixture
def options(tmp_path: Path) -> EvaluationOptions:
    write_photos(tmp_path / "photos")
    return EvaluationOptions(
        dataset=tmp_path / "photos",
        output=tmp_path / "out",
        codecs=(StandInCodec(),),
        metrics=("psnr", "psnr-y", "ms-ssim"),
        is_quiet=True,
    )


def results_of(folder: Path, codec: str = "stand-in") -> dict:
    return json.loads((folder / "results" / f"{codec}.json").read_text())


def test_results_are_those_of_the_files_on_disk(options: EvaluationOptions):
    run_evaluation(options)
    content = results_of(options.output)
    assert list(content) == ["name", "description", "results"]
    assert content["description"] == "stand-in 1"
    results = content["results"]
    assert results["quality"] == [1, 3, 5]
    for point, quality in enumerate(("1", "3", "5")):
        rates, psnrs = [], []
        for source in sorted(options.dataset.iterdir()):
            file = options.output / "files" / "stand-in" / quality / f"{source.name}.bits"
            original = np.asarray(Image.open(source))
            rates.append(8 * file.stat().st_size / (176 * 168))
            psnrs.append(psnr_rgb(original, np.asarray(StandInCodec().decode(file.read_bytes()))))
        assert results["bpp"][point] == pytest.approx(np.mean(rates))
        assert results["psnr-rgb"][point] == pytest.approx(np.mean(psnrs))
    assert results["ms-ssim-rgb"] == sorted(results["ms-ssim-rgb"])
    assert all(seconds > 0 for seconds in results["encoding_time"] + results["decoding_time"])

    with (options.output / "per_image.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    assert rows[0]["image"] == "photo0.png"
    assert float(rows[0]["bpp"]) == pytest.approx(8 * int(rows[0]["bytes"]) / (176 * 168))


def test_interrupted_run_resumes_to_the_same_results(options: EvaluationOptions, monkeypatch: pytest.MonkeyPatch):
    """Interrupted after every possible number of measurements: the rest is made, nothing twice."""
    run_evaluation(options)
    expected = without_timings(results_of(options.output))
    rows = json.loads((options.output / "per_image.json").read_text())
    run_task = Measurement.run
    for survivors in (0, 1, 4, 8):
        codec = StandInCodec()
        again = replace(options, output=options.output.with_name(f"out{survivors}"), codecs=(codec,))
        left = iter(range(survivors))

        def run(task: Measurement, left: object = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            run_task(task)

        monkeypatch.setattr(Measurement, "run", run)
        with pytest.raises(KeyboardInterrupt):
            run_evaluation(again)
        monkeypatch.undo()
        codec.log.clear()
        run_evaluation(again)
        assert sum("176x168" in call for call in codec.log) == 9 - survivors
        assert without_timings(results_of(again.output)) == expected
        keep = [{k: v for k, v in row.items() if not k.endswith("_time")} for row in rows]
        new = json.loads((again.output / "per_image.json").read_text())
        assert [{k: v for k, v in row.items() if not k.endswith("_time")} for row in new] == keep


def test_half_written_measurements_do_not_exist(options: EvaluationOptions, monkeypatch: pytest.MonkeyPatch):
    """A measurement appears by renaming a complete file."""
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(options)
    assert not list(options.output.rglob("photo*.json"))


def test_changes_are_measured_again(options: EvaluationOptions):
    """Another version of the codec, another image or a lost file; not a repetition."""
    run_evaluation(options)

    codec = StandInCodec()
    run_evaluation(replace(options, codecs=(codec,)))
    assert codec.log == []

    (options.output / "files" / "stand-in" / "3" / "photo1.png.bits").unlink()
    run_evaluation(replace(options, codecs=(codec,)))
    assert codec.log[-1] == "encode 176x168 3"

    codec = StandInCodec(version=2)
    run_evaluation(replace(options, codecs=(codec,)))
    assert sum("176x168" in call for call in codec.log) == 9
    assert results_of(options.output)["description"] == "stand-in 2"

    write_photos(options.dataset, number=4)
    with pytest.raises(ConfigError, match="other images"):
        run_evaluation(options)


def test_metrics_and_codecs_can_be_added(options: EvaluationOptions):
    run_evaluation(replace(options, metrics=("psnr",)))
    assert "psnr-y" not in results_of(options.output)["results"]
    codec = StandInCodec()
    run_evaluation(replace(options, codecs=(codec,)))
    assert codec.log == []
    assert "psnr-y" in results_of(options.output)["results"]
    evaluation = run_evaluation(replace(options, codecs=(StandInCodec(name="other"),)))
    assert [curve.name for curve in evaluation.curves] == ["stand-in", "other"]
    assert len(evaluation.rows) == 18


def test_worker_processes_give_the_same(options: EvaluationOptions):
    run_evaluation(options)
    parallel = replace(options, output=options.output.with_name("parallel"), jobs=2)
    run_evaluation(parallel)
    assert without_timings(results_of(parallel.output)) == without_timings(results_of(options.output))


def test_missing_codecs_and_metrics_are_reported(options: EvaluationOptions, monkeypatch: pytest.MonkeyPatch):
    for module in ("pillow_heif", "ssimulacra2"):
        monkeypatch.setitem(sys.modules, module, None)
    evaluation = run_evaluation(
        replace(
            options,
            codecs=(StandInCodec(), *reference_codecs(["heic"])),
            metrics=("psnr", "ssimulacra2"),
        )
    )
    assert evaluation.missing == {
        "ssimulacra2": "the package ssimulacra2 is not installed",
        "heic": "the package pillow-heif is not installed",
    }
    assert [curve.name for curve in evaluation.curves] == ["stand-in"]
    monkeypatch.undo()
    assert load_evaluations([options.output]).missing == evaluation.missing


def test_metric_undefined_for_an_image_has_no_mean(options: EvaluationOptions):
    write_photos(options.dataset / "small", number=1, size=(40, 30))
    evaluation = run_evaluation(options)
    assert set(evaluation.curves[0].metrics) == {"psnr-rgb", "psnr-y"}
    assert [row["ms-ssim-rgb"] for row in evaluation.rows if row["image"] == "small/photo0.png"] == [None] * 3


def test_quality_grids(options: EvaluationOptions):
    assert parse_qualities(["50,10,30", "jpeg:5,10"]) == {"": (10, 30, 50), "jpeg": (5, 10)}
    with pytest.raises(ConfigError, match="a quality grid is"):
        parse_qualities(["high"])
    run_evaluation(replace(options, qualities={"": (7,), "stand-in": (2,)}))
    assert results_of(options.output)["results"]["quality"] == [2]


def test_failing_codec_names_the_image(options: EvaluationOptions, monkeypatch: pytest.MonkeyPatch):
    def fail(codec: StandInCodec, data: bytes) -> Image.Image:
        raise ImageError("no luck")

    monkeypatch.setattr(StandInCodec, "decode", fail)
    with pytest.raises(ImageError, match=r"photo0.png, stand-in at 1: no luck"):
        run_evaluation(options)


def test_image_of_another_size_is_an_error(options: EvaluationOptions, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(StandInCodec, "decode", lambda codec, data: Image.new("RGB", (3, 4)))
    with pytest.raises(ImageError, match="came back as 3x4"):
        run_evaluation(options)


def test_two_codecs_of_one_name(options: EvaluationOptions):
    with pytest.raises(ConfigError, match="one name"):
        run_evaluation(replace(options, codecs=(StandInCodec(), StandInCodec(version=2))))


def test_empty_data_set(options: EvaluationOptions, tmp_path: Path):
    with pytest.raises(ConfigError, match="no images there"):
        run_evaluation(replace(options, dataset=tmp_path / "nothing"))


def test_bd_rates_between_codecs(options: EvaluationOptions):
    evaluation = run_evaluation(
        replace(options, codecs=(StandInCodec(), StandInCodec(name="twin"), *reference_codecs(["webp"])))
    )
    anchor = evaluation.curves[0]
    for key in ("psnr-rgb", "ms-ssim-rgb"):
        rates = bd_rates(evaluation.curves, anchor, key)
        assert rates["twin"].percent == pytest.approx(0, abs=1e-9)
        assert rates["webp"].percent < -50


def test_several_folders_are_read_as_one(options: EvaluationOptions):
    run_evaluation(options)
    second = replace(options, output=options.output.with_name("second"), codecs=(StandInCodec(name="b"),))
    run_evaluation(second)
    evaluation = load_evaluations([options.output, second.output])
    assert [curve.name for curve in evaluation.curves] == ["stand-in", "b"]
    assert {row["folder"] for row in evaluation.rows} == {str(options.output), str(second.output)}
    with pytest.raises(ConfigError, match="no finished evaluation"):
        load_evaluations([options.dataset])


def test_a_model_from_files_to_page(options: EvaluationOptions, tiny_model: Path):
    """pqmim itself: evaluated, taken apart, timed and shown."""
    codec = PqmimCodec(str(tiny_model), "cpu", qualities=(10, 90))
    evaluation = run_evaluation(replace(options, codecs=(codec, *reference_codecs(["webp"]))))
    curve = evaluation.curves[0]
    assert curve.name == f"pqmim-{tiny_model.name}"
    assert curve.description.endswith("device cpu")
    assert curve.bpp[0] < curve.bpp[1]
    file = options.output / "files" / curve.name / "10" / "photo0.png.pqm"
    assert codec.loaded().decode(file.read_bytes()).size == (176, 168)

    page = ReportOptions(options.output / "report.html", dataset=options.dataset, codecs=(codec,), images=1)
    assert write_report(evaluation, page) > 20_000

    variants = variants_of(str(tiny_model), "cpu")
    rows = run_ablation(AblationOptions(options.dataset, options.output, variants, (50,), is_quiet=True))
    assert [row.variant for row in rows] == [
        "tiny",
        *(f"tiny, {n} steps" for n in (2, 4, 10)),
        "tiny, nearest codeword",
    ]
    for row in rows:
        assert row.bpp > row.bpp_parts["payload"] > 0
        assert row.bpp_parts["masked-exact"] == pytest.approx(row.bpp_parts["payload"], rel=0.05)
    assert rows[-1].psnr_rgb >= rows[0].psnr_rgb

    bench = BenchmarkOptions(
        options.output, (pqmim_factory(str(tiny_model), device="cpu"),), (64,), (1,), repeats=1, is_quiet=True
    )
    (timing,) = run_benchmark(bench).timings
    assert timing.problem is None


def test_names_of_models():
    assert PqmimCodec().name == "pqmim-fine"
    assert PqmimCodec(decoder="fast").name == "pqmim-fast"
    half = PqmimCodec(decoder="vivid", realism=0.5)
    assert (half.name, half.decoder_name) == ("pqmim-vivid@0.5", "pqmim-vivid")
    assert PqmimCodec("runs/wide/model.safetensors").name == "pqmim-wide"
    assert PqmimCodec("runs/wide", decoder="runs/wide/fast.safetensors").name == "pqmim-wide-fast"
    assert PqmimCodec("runs/wide/model.safetensors", label="ours").name == "ours"


def test_decoders_as_they_are_named():
    assert parse_decoder("fine") == ("fine", None)
    assert parse_decoder("vivid@0.5") == ("vivid", 0.5)
    assert parse_decoder("runs/a@b/vivid.safetensors@1") == ("runs/a@b/vivid.safetensors", 1.0)
    assert parse_decoder("runs/a@b/vivid.safetensors") == ("runs/a@b/vivid.safetensors", None)


def test_one_file_for_several_decoders(tiny_model: Path, options: EvaluationOptions):
    """Files made for one decoder are the same whoever decodes them; the pictures are not."""
    image = Image.open(next(options.dataset.iterdir())).convert("RGB")
    fine = PqmimCodec(str(tiny_model), "cpu", decoder="fine")
    data = fine.encode(image, 90)
    assert PqmimCodec(str(tiny_model), "cpu", decoder="fast").encode(image, 90) != data
    pictures = {np.asarray(fine.decode(data)).tobytes()}
    for decoder, realism in (("fast", None), ("vivid", 0.5), ("vivid", 1.0)):
        codec = PqmimCodec(str(tiny_model), "cpu", decoder=decoder, realism=realism, made_for="fine")
        assert codec.takes_files_of(fine)
        assert codec.encode(image, 90) == data
        assert codec.strength == realism
        assert "files made for fine" in codec.description()
        pictures.add(np.asarray(codec.decode(data)).tobytes())
    assert len(pictures) == 4
    assert not fine.takes_files_of(StandInCodec())
    assert PqmimCodec(str(tiny_model), decoder="vivid").strength == 1


def test_model_that_is_not_there(options: EvaluationOptions):
    with pytest.raises(ModelError):
        run_evaluation(replace(options, codecs=(PqmimCodec("nothing.safetensors"),)))


def test_published_curves_come_with_kodak_only(tmp_path: Path):
    write_photos(tmp_path / "kodak", number=1, size=(16, 16))
    for number in range(1, 25):
        (tmp_path / "kodak" / f"kodim{number:02d}.png").write_bytes((tmp_path / "kodak" / "photo0.png").read_bytes())
    (tmp_path / "kodak" / "photo0.png").unlink()
    options = EvaluationOptions(
        tmp_path / "kodak", tmp_path / "out", (StandInCodec(),), metrics=("psnr",), is_quiet=True
    )
    kinds = [curve.kind for curve in run_evaluation(options).curves]
    assert kinds[0] == "measured"
    assert set(kinds[1:]) == {"published"}


def test_importing_brings_no_torch():
    """Nor does what is made on demand, as long as no metric needs it."""
    code = """
import importlib, pkgutil, sys
import pqmim.evaluation
for module in pkgutil.iter_modules(pqmim.evaluation.__path__):
    importlib.import_module(f"pqmim.evaluation.{module.name}")
sys.exit(", ".join({"torch", "pydantic", "omegaconf"} & set(sys.modules)) or 0)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_metrics_of_sets_have_intervals_and_are_computed_once(
    options: EvaluationOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    torch = pytest.importorskip("torch")
    patches: list[int] = []

    def load(key: str):
        def means_and_spreads(images: torch.Tensor) -> torch.Tensor:
            patches.append(len(images))
            return torch.cat([images.mean((2, 3)), 4 * images.std((2, 3))], dim=1)

        return means_and_spreads

    monkeypatch.setattr("pqmim.evaluation.evaluate.check_weights", lambda keys, weights: None)
    monkeypatch.setattr("pqmim.evaluation.measurement.load_pooled", load)
    write_photos(tmp_path / "large", number=4, size=(400, 390))
    options = replace(options, dataset=tmp_path / "large", metrics=("psnr", "kid-alex"))
    evaluation = run_evaluation(options)
    results = results_of(options.output)["results"]
    assert results["num-patches"] == [8, 8, 8]  # one at the origin, one shifted
    assert len(set(results["kid-alex"])) == 3
    for value, (low, high) in zip(results["kid-alex"], results["kid-alex-interval"], strict=True):
        assert low <= value <= high
    curve = evaluation.curves[0]
    assert curve.num_patches == 8
    assert curve.intervals["kid-alex"] == tuple(map(tuple, results["kid-alex-interval"]))
    assert sum(patches) == 2 * 8 * 3
    run_evaluation(options)
    assert sum(patches) == 2 * 8 * 3

    page = ReportOptions(options.output / "report.html")
    write_report(evaluation, page)
    text = page.output.read_text("utf-8")
    assert "KID over 8 patches of 256 pixels, whiskers 95 % bootstrap over images" in text
    assert '"KID (AlexNet, 256)"' in text
