"""Training: from a folder of photos to a codec, interruptions that leave no trace, and nothing overwritten."""

import copy
import csv
import math
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import synthetic_photo
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from training.tiny_networks import TINY_ENTROPY, TINY_TOKENIZER, make_tiny_tokenizer

from pqmim import load_codec
from pqmim.config import QuantizerConfig
from pqmim.errors import ConfigError, MissingExtraError, ModelError, OutputError
from pqmim.model_files import load_model
from pqmim.training import train_entropy_model, train_tokenizer
from pqmim.training.checkpoints import load_tokenizer
from pqmim.training.codebook_fitting import END, START
from pqmim.training.data import ALL
from pqmim.training.distributed import Workers
from pqmim.training.entropy_model import EntropyModel
from pqmim.training.orders import Orders
from pqmim.training.recipes import EntropyTraining, RunConfig, StageConfig, TokenizerTraining
from pqmim.training.tokenizer import Tokenizer
from pqmim.training.training_run import Draws, TimeIsUp, TrainingRun, learning_rate_factor, micro_batches, open_photos


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for index in range(12):
        Image.fromarray(synthetic_photo(72 + index, 80, index)).save(folder / f"{index:02}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return folder


def tokenizer_config(photos: Path, output: Path, **run: Any) -> TokenizerTraining:
    stage = {"batch_size": 4, "warmup_steps": 2, "log_every": 1, "validate_every": 4, "ema_decay": 0.8}
    return TokenizerTraining.model_validate(
        {
            "model": TINY_TOKENIZER.as_dict(),
            "data": {"path": photos, "crop": 64, "validation_photos": 3},
            "run": {"output": output, "device": "cpu", "bf16": False, **run},
            "transform": {"steps": 6, "learning_rate": 1e-3, **stage},
            "codebooks": {"crops": 16},
        }
    )


def entropy_config(photos: Path, tokenizer: Path, output: Path, **run: Any) -> EntropyTraining:
    return EntropyTraining.model_validate(
        {
            "name": "trained",
            "description": "a test",
            "tokenizer": tokenizer,
            "model": TINY_ENTROPY.as_dict(),
            "data": {"path": photos, "crop": 64, "validation_photos": 3},
            "run": {"output": output, "device": "cpu", "bf16": False, **run},
            "stage": {"steps": 8, "batch_size": 4, "warmup_steps": 2, "log_every": 1, "validate_every": 4},
            "quantize_after": 0.5,
        }
    )


def until_done(train: Any, config: Any) -> int:
    """Train with a time limit that ends every call after a step; returns how often it was resumed."""
    for calls in range(100):
        try:
            train(config, resume="auto")
        except TimeIsUp:
            continue
        return calls
    raise AssertionError("the training does not end")


def logged(run: Path) -> list[tuple[str, ...]]:
    """Rows of the log without what the clock says."""
    with (run / "log.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["stage", "step", "seconds", "name", "value"]
    clocked = {"crops_per_second", "peak_share"}
    return sorted((stage, step, name, value) for stage, step, _, name, value in rows[1:] if name not in clocked)


@pytest.fixture(scope="module")
def tokenizer_file(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer.train(tokenizer_config(photos, tmp_path_factory.mktemp("runs") / "tokenizer"))


@pytest.fixture(scope="module")
def model_file(photos: Path, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_entropy_model.train(
        entropy_config(photos, tokenizer_file, tmp_path_factory.mktemp("runs") / "entropy")
    )


def test_from_photos_to_a_codec(model_file: Path) -> None:
    codec = load_codec(model_file.parent, device="cpu")
    photo = synthetic_photo(80, 100, 3)
    decoded = np.asarray(codec.decode(codec.encode(photo, quality=100)), dtype=float)
    assert np.square(decoded - photo).mean() < 0.5 * photo.astype(float).var()
    assert codec.name == "trained"


def test_what_a_model_says_of_its_making(model_file: Path) -> None:
    facts = load_model(model_file).facts
    assert facts["description"] == "a test"
    assert facts["photos"] == facts["tokenizer"]["photos"] == 12  # the unreadable one is left out
    assert facts["data_hash"] == facts["tokenizer"]["data_hash"]
    assert facts["recipe"]["stage"]["steps"] == 8
    assert any(name.startswith("bpp_estimate") for name in facts["validation"])
    assert str(model_file.parent) not in str(facts)  # no paths of the maker's machine


def test_logs(tokenizer_file: Path, model_file: Path) -> None:
    for run, stage, names in (
        (tokenizer_file.parent, "transform", {"loss", "bpp", "mse", "gradient_norm", "validation/psnr@4"}),
        (model_file.parent, "entropy", {"loss", "gradient_norm"}),
    ):
        assert names <= {name for found, _, name, _ in logged(run) if found == stage}, stage


def test_what_each_stage_makes(tokenizer_file: Path) -> None:
    """The first one trains the transforms, which stay as they are while codebooks are fitted to their latents."""
    before, after = load_file(tokenizer_file.with_name(train_tokenizer.TRANSFORMS)), load_file(tokenizer_file)
    start = Tokenizer(TINY_TOKENIZER).state_dict()
    transforms = {name for name in before if name.startswith(("analysis.", "synthesis."))}
    assert all(torch.equal(before[name], after[name]) for name in transforms)
    assert sum(not torch.equal(before[name], start[name].half()) for name in transforms) > len(transforms) / 2
    assert (before["quantizer.sizes"] == 1).all()
    tokenizer, facts = load_tokenizer(tokenizer_file)
    quantizer = tokenizer.quantizer
    assert quantizer.sizes[0, 0] > quantizer.sizes[-1, 0] > 1
    coarsest = train_tokenizer.w_of_lambda(0.0004, TINY_TOKENIZER.autoencoder.latent_unit)
    gap = math.log(coarsest / 0.2) / (quantizer.num_levels - 1)
    expected = [math.log(0.2) - START * gap, math.log(coarsest) + END * gap]
    assert [*quantizer.level_range[0, :1], *quantizer.level_range[-1, 1:]] == pytest.approx(expected, rel=2e-3)
    assert {name.partition("@")[0] for name in facts["validation"]} == {"bpp", "psnr"}


def test_coarse_steps_can_be_drawn_more_often(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: dict[float, list[Tensor]] = {1.0: [], 4.0: []}
    forward = train_tokenizer.TransformStage.forward
    for emphasis, drawn in steps.items():

        def listen(stage: Any, x: Tensor, step: Tensor, *rest: Any, drawn: list[Tensor] = drawn) -> Any:
            if rest[0] is not None:  # in training
                drawn.append(step.flatten())
            return forward(stage, x, step, *rest)

        monkeypatch.setattr(train_tokenizer.TransformStage, "forward", listen)
        config = tokenizer_config(photos, tmp_path / str(emphasis))
        config = with_stages(config.model_copy(update={"rate_emphasis": emphasis}), batch_size=32)
        train_tokenizer.train(config)
    evenly, coarsely = (torch.cat(drawn).log() for drawn in steps.values())
    assert len(evenly) == len(coarsely) == 6 * 32
    unit = TINY_TOKENIZER.autoencoder.latent_unit
    finest, coarsest = (math.log(train_tokenizer.step_of_lambda(lam, unit)) for lam in (0.018, 0.0004))
    for drawn, mean in ((evenly, 1 / 2), (coarsely, 4 / 5)):
        places = (drawn - finest) / (coarsest - finest)
        assert places.min() >= 0
        assert places.max() <= 1.0001
        assert float(places.mean()) == pytest.approx(mean, abs=0.06)


def without_steps(config: Any) -> Any:
    return with_stages(config, steps=0)


def test_training_on_from_an_earlier_run(photos: Path, tokenizer_file: Path, model_file: Path, tmp_path: Path) -> None:
    config = without_steps(tokenizer_config(photos, tmp_path / "tokenizer"))
    trained_on = train_tokenizer.train(config.model_copy(update={"start_from": tokenizer_file}))
    (earlier, _), (later, facts) = load_tokenizer(tokenizer_file), load_tokenizer(trained_on)
    for network in ("analysis", "synthesis"):
        before, after = getattr(earlier, network).state_dict(), getattr(later, network).state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
    # Its codebooks are fitted anew, to the latents of the transforms as they were stored.
    assert torch.equal(later.quantizer.order, earlier.quantizer.order)
    assert torch.equal(later.quantizer.sizes, earlier.quantizer.sizes)
    moved = (later.quantizer.codebook - earlier.quantizer.codebook).square().mean()
    assert 0 < moved < 1e-3 * earlier.quantizer.codebook.square().mean()
    assert str(tokenizer_file.parent) not in str(facts)

    config = without_steps(entropy_config(photos, trained_on, tmp_path / "entropy"))
    earlier_weights = model_file.with_name(train_entropy_model.FLOAT_MODEL)
    model = EntropyModel.for_quantizer(config.model, later.quantizer)
    constants = {name: model.state_dict()[name].clone() for name in ("token_values", "prior", "level_bits")}
    train_entropy_model.take_over_weights(model, earlier_weights)
    learned = torch.load(earlier_weights, weights_only=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, constants[name] if name in constants else learned[name]), name
    assert not torch.equal(constants["prior"], learned["prior"])
    assert train_entropy_model.train(config.model_copy(update={"start_from": earlier_weights})).exists()

    for alike in (False, True):  # other codewords: theirs stay, be they as many or not
        strange = copy.deepcopy(later.quantizer) if alike else make_tiny_tokenizer(seed=9).quantizer
        if alike:
            strange.codebook.data.neg_()
        model = EntropyModel.for_quantizer(config.model, strange)
        assert (model.token_bias.shape == learned["token_bias"].shape) == alike
        factors = model.token_factors.clone()
        train_entropy_model.take_over_weights(model, earlier_weights)
        assert torch.equal(model.token_factors, factors)
        assert torch.equal(model.head.bias, learned["head.bias"])


def test_density_is_fitted_to_transforms_that_were_taken_over(photos: Path, tmp_path: Path) -> None:
    config = tokenizer_config(photos, tmp_path / "run")
    run = TrainingRun.open(config.run, None)
    sampler = open_photos(run, config.data).sampler
    transform = train_tokenizer.TransformStage(Tokenizer(config.model))
    before = {name: tensor.clone() for name, tensor in transform.state_dict().items()}
    x, step = sampler.batch(0, 8), torch.full((8, 1, 1, 1), 4.0)
    fresh = transform(x, step, None, False)[0].mean()
    train_tokenizer.fit_density(config, transform, sampler, run)
    assert transform(x, step, None, False)[0].mean() < 0.8 * fresh
    changed = {name for name, tensor in transform.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"density.weight", "density.mean", "density.log_scale"}


def test_a_larger_model_begins_as_the_same_function(
    photos: Path, tokenizer_file: Path, model_file: Path, tmp_path: Path
) -> None:
    config = tokenizer_config(photos, tmp_path / "tokenizer")
    larger = replace(config.model.autoencoder, synthesis_channels=(12, 24, 20), synthesis_blocks=(2, 1, 3))
    config = config.model_copy(
        update={"model": replace(config.model, autoencoder=larger), "start_from": tokenizer_file}
    )
    grown_file = train_tokenizer.train(without_steps(config))
    (earlier, _), (grown, _) = load_tokenizer(tokenizer_file), load_tokenizer(grown_file)
    x = torch.rand(1, 3, 64, 80)
    z = earlier.analysis(x)
    assert torch.allclose(grown.analysis(x), z, atol=1e-4)
    assert torch.allclose(grown.synthesis(z), earlier.synthesis(z), atol=1e-5)

    config = config.model_copy(update={"run": config.run.model_copy(update={"output": tmp_path / "trained"})})
    trained, _ = load_tokenizer(train_tokenizer.train(config))
    before, after = grown.synthesis.state_dict(), trained.synthesis.state_dict()
    for name, tensor in before.items():
        still = (tensor == 0) & (after[name] == 0)
        assert still.float().mean() < 0.5 or tensor.ndim < 4, name  # gradients reach the zeros

    config = entropy_config(photos, grown_file, tmp_path / "entropy")
    float_weights = model_file.with_name(train_entropy_model.FLOAT_MODEL)
    small = EntropyModel.for_quantizer(config.model, earlier.quantizer)
    train_entropy_model.take_over_weights(small, float_weights)
    deeper = replace(config.model, num_layers=config.model.num_layers + 2 * config.model.attention_every)
    model = EntropyModel.for_quantizer(deeper, earlier.quantizer)
    train_entropy_model.take_over_weights(model, float_weights)
    tokens, level = earlier.encode(x, 1.0), torch.tensor([earlier.quantizer.levels.level(1.0)])
    orders = Orders.of_known(model.schedule, torch.rand(tokens.shape) < 0.5)
    for larger_one, smaller_one in zip(*(m.hidden(tokens, level, orders) for m in (model, small)), strict=True):
        assert torch.equal(larger_one, smaller_one)


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ({"blocks": (1, 1, 0)}, "fewer blocks"),
        ({"synthesis_blocks": (0, 2, 3)}, "fewer blocks"),
        ({"channels": (4, 16, 16)}, "fewer channels"),
        ({"latent_channels": 8}, "fewer latent channels"),
        ({"latent_unit": 10.0}, "another latent"),
    ],
)
def test_training_on_needs_sizes_that_fit(
    sizes: dict[str, Any], complaint: str, photos: Path, tokenizer_file: Path, tmp_path: Path
) -> None:
    config = tokenizer_config(photos, tmp_path / "run")
    other = replace(config.model, autoencoder=replace(config.model.autoencoder, **sizes))
    with pytest.raises(ConfigError, match=f"{tokenizer_file}: start_from: .* {complaint} than this tokenizer"):
        train_tokenizer.train(config.model_copy(update={"start_from": tokenizer_file, "model": other}))


def test_a_larger_latent_gets_codebooks_of_its_own(photos: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    config = without_steps(tokenizer_config(photos, tmp_path / "run"))
    autoencoder = replace(config.model.autoencoder, latent_channels=16)
    larger = replace(config.model, autoencoder=autoencoder, quantizer=QuantizerConfig(num_subquantizers=14))
    config = config.model_copy(update={"start_from": tokenizer_file, "model": larger})
    grown, _ = load_tokenizer(train_tokenizer.train(config))
    (earlier, _), x = load_tokenizer(tokenizer_file), torch.rand(1, 3, 64, 80)
    assert grown.quantizer.num_channels == 16
    coded = grown.quantizer.order[: grown.quantizer.alphabets.num_coded(0)]
    assert (coded >= 12).any()  # new channels are coded
    assert torch.allclose(grown.analysis(x)[:, :12], earlier.analysis(x), atol=1e-3)


def test_the_first_stage_alone_can_be_trained_on(photos: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    transforms = tokenizer_file.with_name(train_tokenizer.TRANSFORMS)
    first, _ = load_tokenizer(transforms)
    assert not first.quantizer.codebook.any()
    config = without_steps(tokenizer_config(photos, tmp_path / "on"))
    quantizer = replace(config.model.quantizer, num_subquantizers=4)  # any: there are no codebooks yet
    update = {"start_from": transforms, "model": replace(config.model, quantizer=quantizer)}
    trained, _ = load_tokenizer(train_tokenizer.train(config.model_copy(update=update)))
    assert torch.equal(trained.analysis.linear, first.analysis.linear)
    assert trained.quantizer.codebook.any()


def test_interrupted_tokenizer_training_leaves_no_trace(photos: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    config = tokenizer_config(photos, tmp_path / "run", max_minutes=1e-9)
    assert until_done(train_tokenizer.train, config) >= 6
    whole, resumed = load_file(tokenizer_file), load_file(tmp_path / "run" / "tokenizer.safetensors")
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    assert logged(tmp_path / "run") == logged(tokenizer_file.parent)


def test_interrupted_entropy_training_leaves_no_trace(
    photos: Path, tokenizer_file: Path, model_file: Path, tmp_path: Path
) -> None:
    config = entropy_config(photos, tokenizer_file, tmp_path / "run", max_minutes=1e-9)
    assert until_done(train_entropy_model.train, config) == 8
    assert load_model(tmp_path / "run" / model_file.name).model_id == load_model(model_file).model_id
    assert logged(tmp_path / "run") == logged(model_file.parent)


def test_a_finished_run_can_be_resumed_to_nothing_new(photos: Path, tokenizer_file: Path) -> None:
    before = load_file(tokenizer_file)
    train_tokenizer.train(tokenizer_config(photos, tokenizer_file.parent), resume="auto")
    after = load_file(tokenizer_file)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_runs_are_not_overwritten(photos: Path, tokenizer_file: Path) -> None:
    with pytest.raises(OutputError, match="--resume auto"):
        train_tokenizer.train(tokenizer_config(photos, tokenizer_file.parent))


def test_resuming_from_nothing(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such checkpoint"):
        train_tokenizer.train(tokenizer_config(photos, tmp_path / "run"), resume=tmp_path / "none.pt")
    run = TrainingRun.open(RunConfig(output=tmp_path / "new", device="cpu"), "auto")
    assert run.resumed is None  # auto starts where there is nothing to resume


def test_tokenizer_must_be_there(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        train_entropy_model.train(entropy_config(photos, tmp_path / "none.safetensors", tmp_path / "run"))


def test_folder_that_cannot_be_made(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError):
        train_tokenizer.train(tokenizer_config(photos, tmp_path / "file" / "run"))


def with_stages(config: Any, **changes: Any) -> Any:
    """The same training with other settings in each of its stages."""
    names = [name for name, value in config if isinstance(value, StageConfig)]
    return config.model_copy(update={name: getattr(config, name).model_copy(update=changes) for name in names})


def assert_same_curve(run: Path, other: Path) -> None:
    """Two logs have the same rows, and but for rounding the same numbers."""
    rows, other_rows = logged(run), logged(other)
    assert [row[:3] for row in rows] == [row[:3] for row in other_rows]
    numbers, other_numbers = ([float(row[3]) for row in found] for found in (rows, other_rows))
    assert numbers == pytest.approx(other_numbers, rel=1e-3, abs=1e-4)


def test_micro_batches_add_up(photos: Path, tokenizer_file: Path, model_file: Path, tmp_path: Path) -> None:
    config = with_stages(tokenizer_config(photos, tmp_path / "tokenizer"), accumulate=2)
    assert config.transform.accumulate == 2
    train_tokenizer.train(config)
    assert_same_curve(tmp_path / "tokenizer", tokenizer_file.parent)
    config = with_stages(entropy_config(photos, tokenizer_file, tmp_path / "entropy"), accumulate=4)
    train_entropy_model.train(config)
    assert_same_curve(tmp_path / "entropy", model_file.parent)


def test_micro_batches_of_a_process() -> None:
    samples = [list(range(12)[part]) for part in micro_batches(12, 3, slice(1, None, 2))]
    assert samples == [[1, 7], [3, 9], [5, 11]]
    with pytest.raises(ConfigError, match="multiple of accumulate x processes, 3 x 2"):
        micro_batches(8, 3, slice(1, None, 2))


def test_two_processes_follow_the_curve_of_one(
    photos: Path, tokenizer_file: Path, model_file: Path, tmp_path: Path
) -> None:
    """Through the launcher and the command line, as on a cluster; both only add up gradients in another order."""
    for kind, config, alone in (
        ("tokenizer", tokenizer_config(photos, tmp_path / "tokenizer"), tokenizer_file),
        ("entropy", entropy_config(photos, tokenizer_file, tmp_path / "entropy"), model_file),
    ):
        recipe = tmp_path / f"{kind}.json"  # JSON is YAML
        recipe.write_text(config.model_dump_json(), encoding="utf-8")
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run(
            [*launch, "-m", "pqmim", "train", kind, "-c", str(recipe)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [str(tmp_path / kind / alone.name)]  # one process speaks for both
        assert_same_curve(tmp_path / kind, alone.parent)
        assert (tmp_path / kind / alone.name).exists()


def test_one_process_needs_no_extra(
    photos: Path, tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("accelerate", "tensorboard", "torch.utils.tensorboard", "webdataset"):
        monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    train_tokenizer.train(tokenizer_config(photos, tmp_path / "run"))
    assert logged(tmp_path / "run") == logged(tokenizer_file.parent)


def test_networks_are_compiled_if_asked_for(
    photos: Path, tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network: compiled.append(type(network).__name__))
    train_tokenizer.train(tokenizer_config(photos, tmp_path / "tokenizer", compile=True))
    train_entropy_model.train(entropy_config(photos, tokenizer_file, tmp_path / "entropy", compile=True))
    assert compiled == ["TransformStage", *["TransformerLayer"] * 4]


def test_a_launcher_needs_accelerate(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtraError, match="accelerate"):
        train_tokenizer.train(tokenizer_config(photos, tmp_path / "run"))


def test_batches_that_cannot_be_dealt() -> None:
    with pytest.raises(ConfigError, match="multiple of the 3 processes"):
        Workers(torch.device("cpu"), rank=1, count=3).part(4)


def test_training_on_a_stream_can_be_interrupted(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for index in range(4):
        with tarfile.open(shards / f"{index}.tar", "w") as shard:
            for number in range(4):
                path = tmp_path / f"{index}{number}.png"
                Image.fromarray(synthetic_photo(70, 80, 4 * index + number)).save(path)
                shard.add(path, path.name)
    runs = {}
    for name, limit in (("whole", None), ("resumed", 1e-9)):
        config = tokenizer_config(shards, tmp_path / name, max_minutes=limit)
        stream = {"stream": True, "stream_lanes": 2, "stream_readers": 0, "shuffle_buffer": 2}
        config = config.model_copy(update={"data": config.data.model_copy(update=stream)})
        assert until_done(train_tokenizer.train, config) == (0 if limit is None else 6)
        runs[name] = logged(tmp_path / name)
    assert runs["whole"] == runs["resumed"]


def test_throughput_is_logged(tokenizer_file: Path) -> None:
    with (tokenizer_file.parent / "log.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row[3] in ("crops_per_second", "peak_share")]
    assert {row[3] for row in rows} == {"crops_per_second", "peak_share"}
    assert all(float(row[4]) > 0 for row in rows)
    assert all(float(row[4]) < 1 for row in rows if row[3] == "peak_share")


def test_draws_do_not_depend_on_who_draws() -> None:
    def draws(part: slice = ALL, step: int = 5) -> Draws:
        return Draws(1, step, 6, part, torch.device("cpu"))

    whole = draws()
    uniform, noise = whole.uniform(2), whole.noise(3, 4)
    assert uniform.shape == (6, 2)
    assert noise.shape == (6, 3, 4)
    assert len(noise.unique()) == noise.numel()
    for first in range(3):
        part = slice(first, None, 3)
        mine = draws(part)
        assert torch.equal(mine.uniform(2), uniform[part])
        assert torch.equal(mine.noise(3, 4), noise[part])
    assert not torch.equal(draws(step=6).uniform(2), uniform)
    assert not torch.equal(draws(step=6).noise(3, 4), noise)


def test_trade_offs_are_drawn_over_all_that_the_levels_serve() -> None:
    quantizer = make_tiny_tokenizer().quantizer
    low, high = quantizer.levels.w_range()
    w = train_tokenizer.draw_w(quantizer, Draws(1, 0, 4000, ALL, torch.device("cpu")))
    quantiles = w.log().quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    assert torch.allclose(quantiles, torch.linspace(math.log(low), math.log(high), 5), atol=0.15)
    assert low <= float(w.min())
    assert float(w.max()) <= high
    assert len(quantizer.level(w).unique()) == quantizer.num_levels


def test_learning_rate_warms_up_and_falls() -> None:
    stage = StageConfig(steps=100, warmup_steps=10, final_learning_rate=0.1)
    factors = [learning_rate_factor(stage, step, step / 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == max(factors) == 1
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == pytest.approx(0.1, abs=0.01)
