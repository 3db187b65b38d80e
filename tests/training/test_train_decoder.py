"""Training of decoders: stages, what each term is for, interruptions that leave no trace."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from training.test_training import logged, until_done
from training.tiny_networks import TINY_TOKENIZER, make_tiny_tokenizer

from pqmim.decoder_files import DecoderFile, load_decoder
from pqmim.errors import ConfigError, ModelError
from pqmim.training import train_decoder
from pqmim.training.checkpoints import load_tokenizer, save_tokenizer
from pqmim.training.discriminator import (
    Discriminator,
    SentValues,
    View,
    Window,
    fit_features,
    fit_labels,
    leading_values,
    local_spectra,
)
from pqmim.training.export import export_decoder
from pqmim.training.integer_layers import FIRST_STEP
from pqmim.training.losses import chroma_error, excess_detail, grid_pattern, mean_squared_error, repeated_error
from pqmim.training.recipes import DecoderTraining
from pqmim.training.token_source import TokenSource
from pqmim.training.train_tokenizer import w_of_lambda
from pqmim.training.training_run import Draws, TrainingRun


class TinyFeatures(nn.Module):
    """Stands in for a network trained on photographs: random filters at two depths."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 3, stride=2)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        first = self.first(x)
        return [first, self.second(first.relu())]


@pytest.fixture(autouse=True)
def _tiny_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_decoder, "load_efficientnet_lite0", TinyFeatures)


def decoder_config(photos: Path, tokens_file: Path, output: Path, **changes: Any) -> DecoderTraining:
    stage = {"steps": 4, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 1, "log_every": 1}
    stage |= {"validate_every": 4, "ema_decay": 0.5}
    terms = {"adversary": "labels", "labels": 5, "label_subquantizers": 2, "label_crops": 16, "adversary_delay": 2}
    settings: dict[str, Any] = {
        "token_model": tokens_file,
        "start_from": tokens_file,
        "data": {"path": photos, "crop": 64, "validation_photos": 3},
        "run": {"output": output, "device": "cpu", "bf16": False, **changes.pop("run", {})},
        "perceptual": stage,
        "adversarial": stage,
        "terms": terms | changes.pop("terms", {}),
    }
    return DecoderTraining.model_validate(settings | changes)


@pytest.fixture(scope="module")
def decoder_file(photos: Path, tokens_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_decoder, "load_efficientnet_lite0", TinyFeatures)
        return train_decoder.train(decoder_config(photos, tokens_file, tmp_path_factory.mktemp("runs") / "vivid"))


def test_tokens_stay_and_the_decoder_changes(tokens_file: Path, decoder_file: Path) -> None:
    before, after = load_file(tokens_file), load_file(decoder_file)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("synthesis.") for name in changed)


def test_what_reads_the_latent_stays_where_pictures_are_to_look_real(tokens_file: Path, decoder_file: Path) -> None:
    before, after = load_file(tokens_file), load_file(decoder_file)
    kept = {name for name in before if name.startswith("synthesis.") and torch.equal(before[name], after[name])}
    first = {name for name in before if name.startswith(("synthesis.convolutional.0.", "synthesis.convolutional.1."))}
    assert first
    assert kept == {"synthesis.linear", *first}


def test_a_decoder_for_a_token_model(photos: Path, tiny_model: Path, tmp_path: Path) -> None:
    """What it is fine-tuned from is its faithful decoder; a decoder that grows has none."""
    fine = load_decoder(tiny_model / "fine.safetensors")
    config = decoder_config(photos, tiny_model, tmp_path / "a", name="mine")
    path = train_decoder.train(config)
    assert path == tmp_path / "a" / "mine.safetensors"
    decoder = load_decoder(path)
    assert (decoder.name, decoder.token_model, decoder.config) == ("mine", fine.token_model, fine.config)
    assert decoder.faithful == fine.decoder_id != decoder.decoder_id
    on = train_decoder.train(decoder_config(photos, tiny_model, tmp_path / "c", start_from=path))
    assert load_decoder(on).faithful == fine.decoder_id
    changes = {"start_from": tiny_model / "fast.safetensors", "channels": (12, 8, 16)}
    larger = load_decoder(train_decoder.train(decoder_config(photos, tiny_model, tmp_path / "b", **changes)))
    assert larger.faithful is None
    assert larger.config.channels == (12, 8, 16)


def test_a_decoder_that_was_there_before_the_entropy_model(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer, _ = load_tokenizer(tiny_model, "fast")
    save_tokenizer(tmp_path / "t.safetensors", tokenizer, {"photos": 6})
    decoder_id = export_decoder(tmp_path / "t.safetensors", tmp_path / "d.safetensors", tiny_model, "later")
    decoder, fast = load_decoder(tmp_path / "d.safetensors"), load_decoder(tiny_model / "fast.safetensors")
    assert decoder.decoder_id == decoder_id == fast.decoder_id
    assert (decoder.name, decoder.token_model, decoder.facts) == ("later", fast.token_model, {"photos": 6})
    with torch.no_grad():
        tokenizer.quantizer.codebook += 1
    save_tokenizer(tmp_path / "other.safetensors", tokenizer, {})
    with pytest.raises(ModelError, match="other codebooks than those of the token model tiny"):
        export_decoder(tmp_path / "other.safetensors", tmp_path / "d.safetensors", tiny_model, "other")


def test_what_is_logged(decoder_file: Path) -> None:
    names = {(stage, name) for stage, _, name, _ in logged(decoder_file.parent)}
    both = {"loss", "mse", "chroma", "pattern", "excess", "features", "gradient_norm"}
    assert {(stage, name) for stage in ("perceptual", "adversarial") for name in both} <= names
    assert {("adversarial", "adversary"), ("adversarial", "taken_for_real")} <= names
    assert ("perceptual", "adversary") not in names
    assert not any(stage == "distortion" for stage, _ in names)
    validated = {name.partition("@")[0] for stage, name in names if name.startswith("validation/")}
    assert validated == {f"validation/{name}" for name in ("psnr", "chroma", "pattern", "excess", "features")}
    with Image.open(decoder_file.parent / "samples" / "adversarial000004.png") as sheet:
        assert sheet.size == (3 * 64, 3 * 64)


@pytest.mark.parametrize("adversary", ["labels", "hinge"])
def test_interrupted_training_leaves_no_trace(
    adversary: str, photos: Path, tokens_file: Path, decoder_file: Path, tmp_path: Path
) -> None:
    whole = decoder_file
    if adversary == "hinge":
        terms = {"adversary": "hinge"}
        whole = train_decoder.train(decoder_config(photos, tokens_file, tmp_path / "whole", terms=terms))
        assert not torch.equal(*(load_file(f)["synthesis.head.weight"] for f in (whole, decoder_file)))
    run = {"max_minutes": 1e-9}
    config = decoder_config(photos, tokens_file, tmp_path / "run", run=run, terms={"adversary": adversary})
    assert until_done(train_decoder.train, config) >= 6
    expected, resumed = load_file(whole), load_file(tmp_path / "run" / whole.name)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in expected.items())
    assert logged(tmp_path / "run") == logged(whole.parent)


def test_a_faithful_decoder_needs_no_network_of_features(
    photos: Path, tokens_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(train_decoder, "load_efficientnet_lite0")
    none = {"steps": 0}
    stage = {"steps": 30, "batch_size": 4, "learning_rate": 2e-3, "warmup_steps": 2, "validate_every": 15}
    changes = {"distortion": stage, "perceptual": none, "adversarial": none, "channels": (12, 8, 16)}
    config = decoder_config(photos, tokens_file, tmp_path, **changes)
    larger, _ = load_tokenizer(train_decoder.train(config))
    assert larger.config.autoencoder.synthesis_channels == (12, 8, 16)
    psnr = {(step, name): float(value) for _, step, name, value in logged(tmp_path) if name.startswith("validation/ps")}
    assert len(psnr) == 6
    assert sum(v for (step, _), v in psnr.items() if step == "30") > sum(
        v for (step, _), v in psnr.items() if step == "15"
    )


def test_a_decoder_becomes_one_of_integers(photos: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Its steps are found before the first step of training, and stay; interruptions leave no trace."""
    stage = {"steps": 4, "batch_size": 4, "learning_rate": 1e-4, "warmup_steps": 1, "validate_every": 4}
    changes = {"distortion": stage, "perceptual": {"steps": 0}, "adversarial": {"steps": 0}}
    changes |= {"start_from": tiny_model / "fast.safetensors", "integer_blocks": True, "name": "fast"}
    path = train_decoder.train(decoder_config(photos, tiny_model, tmp_path / "a", **changes))
    decoder = load_decoder(path)
    assert decoder.config == replace(load_decoder(tiny_model / "fast.safetensors").config, integer_blocks=True)

    def steps_of(file: DecoderFile) -> dict[str, float]:
        return {name: float(tensor) for name, tensor in file.tensors.items() if name.endswith(".step")}

    steps = steps_of(decoder)
    assert len(steps) == 3 * sum(decoder.config.blocks)
    assert all(0 < step < 1 for step in steps.values())
    assert FIRST_STEP not in [step for name, step in steps.items() if ".add." not in name]

    on = changes | {"start_from": path, "integer_blocks": None}
    again = load_decoder(train_decoder.train(decoder_config(photos, tiny_model, tmp_path / "b", **on)))
    assert again.config == decoder.config
    assert steps_of(again) == steps
    back = changes | {"start_from": path, "integer_blocks": False}
    exact = load_decoder(train_decoder.train(decoder_config(photos, tiny_model, tmp_path / "c", **back)))
    assert exact.config == load_decoder(tiny_model / "fast.safetensors").config

    config = decoder_config(photos, tiny_model, tmp_path / "d", run={"max_minutes": 1e-9}, **changes)
    assert until_done(train_decoder.train, config) >= 3
    assert load_decoder(tmp_path / "d" / "fast.safetensors").decoder_id == decoder.decoder_id


def test_decoders_that_do_not_fit_are_refused(photos: Path, tokens_file: Path, tmp_path: Path) -> None:
    m = TINY_TOKENIZER.quantizer.num_subquantizers
    for changes, complaint in (
        ({"channels": (4, 8, 16)}, f"{tokens_file}: start_from: the recipe has fewer channels than this decoder"),
        (
            {"terms": {"label_subquantizers": m + 1}},
            f"terms.label_subquantizers: {m + 1}, but the model has {m} sub-quantizers",
        ),
    ):
        with pytest.raises(ConfigError, match=complaint):
            train_decoder.train(decoder_config(photos, tokens_file, tmp_path, **changes), resume="auto")


def test_trade_offs_lean_to_the_coarse(
    photos: Path, tokens_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tiny_tokenizer()
    config = decoder_config(photos, tokens_file, tmp_path, rate_emphasis=2.0, nested_share=0.0)
    source = TokenSource(tokenizer, config, TrainingRun.open(config.run, None))
    x = torch.rand(64, 3, 32, 32)
    asked: list[Tensor] = []
    quantize = source.quantize

    def listen(z: Tensor, w: Tensor, kept: Tensor | None = None) -> Any:
        asked.append(w)
        return quantize(z, w, kept)

    monkeypatch.setattr(source, "quantize", listen)
    sent = source.draw(x, Draws(0, 0, 64, slice(None), x.device))
    low, high = tokenizer.quantizer.levels.w_range()
    assert low <= float(asked[0].min()) < float(asked[0].max()) <= high
    coarse = (asked[0] > (low * high) ** 0.5).float().mean()
    assert 0.65 < coarse < 0.85  # 3/4 of the square roots of uniform numbers are above 1/2
    assert torch.equal(sent.lam, source.send(x, asked[0]).lam)
    cut = decoder_config(photos, tokens_file, tmp_path, nested_share=1.0)
    sent = TokenSource(tokenizer, cut, source.run).draw(x, Draws(0, 0, 64, slice(None), x.device))
    assert (sent.lam == cut.rate.lambda_min).float().mean() > 0.5


def test_of_samples_cut_short_the_leading_tokens_are_sent(photos: Path, tokens_file: Path, tmp_path: Path) -> None:
    """A share of those that are coded at their level: the rest says nothing anyway."""
    tokenizer, config = make_tiny_tokenizer(), decoder_config(photos, tokens_file, tmp_path)
    source, quantizer = TokenSource(tokenizer, config, TrainingRun.open(config.run, None)), tokenizer.quantizer
    low, high = quantizer.levels.w_range()
    x, w = torch.rand(5, 3, 32, 32), torch.tensor([low, high, high, low, high])
    sent = source.send(x, w, torch.tensor([0.5, 0.5, 1.0, 0.01, 0.0]))
    level = quantizer.level(w)
    assert level.tolist() == [0, 5, 5, 0, 5]
    fine, coarse = (quantizer.alphabets.num_coded(each) for each in (0, 5))
    assert fine > coarse > 2
    for sample, count in enumerate((math.ceil(fine / 2), math.ceil(coarse / 2), coarse, 1, 0)):
        one = slice(sample, sample + 1)
        tokens = quantizer.assign(tokenizer.analysis(x[one]), quantizer.applied_w(w[one], level[one]), level[one])
        expected = quantizer.default[None, :, None, None].expand(1, -1, 2, 2).clone()
        channels = quantizer.order[:count]
        expected[:, channels] = quantizer.dequantize(tokens, level[one])[:, channels]
        assert torch.allclose(sent.z_q[one], expected, atol=1e-5)
    whole = source.send(x, w)
    assert torch.equal(whole.z_q[2], sent.z_q[2])
    assert not torch.equal(whole.z_q[1], sent.z_q[1])
    assert torch.equal(whole.lam, sent.lam)


def test_lambda_is_that_of_the_trade_off_as_applied(photos: Path, tokens_file: Path, tmp_path: Path) -> None:
    tokenizer, config = make_tiny_tokenizer(), decoder_config(photos, tokens_file, tmp_path)
    source, levels = TokenSource(tokenizer, config, TrainingRun.open(config.run, None)), tokenizer.quantizer.levels
    w = torch.stack([source.trade_off(fraction) for fraction in (0.0, 0.6, 1.0)])
    assert w[[0, 2]].tolist() == pytest.approx(list(levels.w_range()), rel=1e-5)
    applied = [levels.applied_w(each, levels.level(each)) for each in w.tolist()]
    expected = [float(w_of_lambda(each, tokenizer.config.autoencoder.latent_unit)) for each in applied]  # and back
    assert expected[0] > config.rate.lambda_max > expected[1]  # the finest is beyond what training reaches
    lam = source.send(torch.rand(3, 3, 32, 32), w).lam
    assert lam.tolist() == pytest.approx([config.rate.lambda_max, *expected[1:]], rel=1e-4)


def test_terms_see_what_they_are_for() -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 3, 32, 32)
    assert float(chroma_error(x + 0.1, x).max()) < 1e-6  # grey
    red = x + torch.tensor([0.1, 0.0, 0.0])[:, None, None]
    assert torch.allclose(chroma_error(red, x), torch.full((2,), 25.5**2 * (0.5**2 + 0.168736**2) / 2), rtol=1e-4)
    assert torch.allclose(mean_squared_error(red, x), torch.full((2,), 25.5**2 / 3), rtol=1e-4)
    steps = torch.zeros(4, 4)
    steps[0, 0] = 16 / 255
    pattern = x + steps.repeat(8, 8)
    assert float(grid_pattern(pattern, x)) == pytest.approx(16 * (15 / 256) ** 0.5 * 16**0.5 / 4, rel=1e-3)
    assert float(repeated_error(pattern, x)[0]) == pytest.approx(float(grid_pattern(pattern, x)) ** 2, rel=1e-3)
    for term in (grid_pattern, repeated_error, excess_detail):
        assert float(term(x + 0.1, x).max()) < 1e-3


def test_detail_counts_where_it_is_stronger_than_in_the_original() -> None:
    grey = torch.full((2, 3, 32, 32), 0.5)
    dots, columns = torch.zeros(2, 2, 32, 32)
    dots[:] = (torch.arange(32)[:, None] + torch.arange(32)) % 2 * 2.0 - 1
    columns[:] = (torch.arange(32) % 4 < 2) * 2.0 - 1  # a wavelength of 4, in step with squares of 2 x 2
    for pattern in (dots, columns):
        strong, weak = (grey + amplitude / 255 * pattern[:, None] for amplitude in (12, 3))
        gain = 2 if pattern is dots else 4  # both are in step with the transform, at its first and second level
        strongest, weakest = ((1 + (gain * amplitude) ** 2) ** 0.5 for amplitude in (12, 3))
        assert excess_detail(strong, weak).tolist() == pytest.approx([(strongest - weakest) ** 2 / 6] * 2, rel=1e-3)
        assert float(excess_detail(weak, strong).max()) < 1e-6  # a smooth picture is no fault of this kind
        local = grey.clone()
        local[..., :16, :16] = strong[..., :16, :16]
        expected = (strongest - 1) ** 2 / 6 / 4  # texture elsewhere is no licence
        assert excess_detail(local, grey).tolist() == pytest.approx([expected] * 2, rel=1e-3)


def test_local_spectra_tell_waves_from_noise() -> None:
    """At equal power: a wave is a peak where its frequency says, in all squares; nothing shows where nothing is."""
    x = torch.full((3, 3, 48, 40), 0.5)
    wave = torch.sin(2 * math.pi * torch.arange(40) * 3 / 16)
    x[0] += 0.1 * wave
    x[1] += 0.1 / 2**0.5 * torch.randn(1, 48, 40, generator=torch.Generator().manual_seed(0))
    spectra = local_spectra(x).unflatten(1, (16, 9))
    assert spectra.shape == (3, 16, 9, 5, 4)
    assert torch.equal(
        spectra[0].mean((2, 3)) == spectra[0].mean((2, 3)).max(), torch.eye(16)[0][:, None] * torch.eye(9)[3] > 0
    )
    peaks = (spectra.amax((1, 2)) - spectra.mean((1, 2))).mean((1, 2))
    assert float(peaks[0]) > float(peaks[1]) + 1
    assert float(peaks[2]) == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("kind", ["labels", "hinge"])
def test_what_a_discriminator_is_rewarded_for(kind: Any) -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(kind, [8, 8], 3, 7)
    sent = SentValues(torch.randn(2, 3, 4, 4), Window(3, 5, 56, 64))
    fit_labels(discriminator, torch.randn(500, 3), 4, torch.Generator().manual_seed(0))
    x = torch.rand(2, 3, 64, 64)
    view = View(x, TinyFeatures()(x))
    fit_features(discriminator, view)
    logits = discriminator(view, sent)
    assert [tuple(head.shape) for head in logits] == [
        (2, 8 if kind == "labels" else 1, side, side) for side in (16, 15, 15, 7)
    ]
    if kind == "labels":
        labels = discriminator.labels(sent.values)
        distances = (sent.values[0, :, 1, 2] / discriminator.scale - discriminator.centers).square().sum(1)
        assert labels[0, 1, 2] == distances.argmin()
        right = [20 * torch.eye(8)[sent.on_grid(head, labels)].permute(0, 3, 1, 2) for head in logits]
        decoded = [torch.zeros_like(head) for head in logits]
        for head in decoded:
            head[:, -1] = 20
    else:
        right, decoded = (
            [torch.full_like(head, 2.0) for head in logits],
            [torch.full_like(head, -2.0) for head in logits],
        )
    assert float(discriminator.own_loss(right, decoded, sent).max()) < 1e-4
    assert float(discriminator.own_loss(decoded, right, sent).min()) > 3
    assert (discriminator.decoder_loss(right, sent) < discriminator.decoder_loss(decoded, sent)).all()


def test_sent_values_lie_where_they_were_sent() -> None:
    values = torch.arange(25.0).view(1, 1, 5, 5)
    window = Window(top=5, left=8, side=60, seen_side=90)
    beside = SentValues(values, window).on_grid(torch.zeros(1, 1, 15, 15), values)  # the middle of every fourth pixel
    expected = [[5.0 * ((5 + 4 * y + 2) // 16) + (8 + 4 * x + 2) // 16 for x in range(15)] for y in range(15)]
    assert beside[0, 0].tolist() == expected


def test_leading_values_are_those_of_the_leading_runs() -> None:
    quantizer = make_tiny_tokenizer().quantizer
    z_q = torch.randn(1, TINY_TOKENIZER.autoencoder.latent_channels, 2, 2)
    values = leading_values(quantizer, z_q, 2)
    assert values.shape[1] == quantizer.boundaries[2]
    assert torch.equal(values, z_q[:, quantizer.order[: quantizer.boundaries[2]]])
