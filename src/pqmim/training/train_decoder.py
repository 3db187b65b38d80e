"""Train a decoder: a synthesis transform for tokens that stay as they are (docs/training.md).

Up to three stages, each skipped if it has no steps:

1. *distortion*: by squared error alone. A faithful decoder ends here.
2. *perceptual*: squared error, mean colors, and a heavy distance of the features of a network trained on photographs.
3. *adversarial*: less of that weight, and an adversary that tells decoded pictures from photographs.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pqmim.config import AutoencoderConfig
from pqmim.decoder_files import load_decoder
from pqmim.errors import ConfigError
from pqmim.model_files import SUFFIX
from pqmim.perceptual.efficientnet import load_efficientnet_lite0
from pqmim.perceptual.features import feature_distance, texture_distance
from pqmim.training.autoencoder import Synthesis, grow
from pqmim.training.checkpoints import load_any_synthesis, load_tokenizer, save_tokenizer, token_model_id
from pqmim.training.data import STAGE_STEPS, Sampler
from pqmim.training.decoder_validation import FeatureNetwork, validate_decoder
from pqmim.training.discriminator import Discriminator, SentValues, Window, fit_features, fit_labels, leading_values
from pqmim.training.export import save_decoder
from pqmim.training.integer_layers import calibrate
from pqmim.training.losses import chroma_error, excess_detail, mean_squared_error, repeated_error
from pqmim.training.recipes import DecoderTraining, StageConfig
from pqmim.training.token_source import TokenSource
from pqmim.training.train_tokenizer import NOT_IN_FACTS
from pqmim.training.training_run import Draws, TrainingRun, fit, open_photos

STAGES = ("distortion", "perceptual", "adversarial")
KMEANS_ITERATIONS = 12
CALIBRATION_BATCHES = 16
"""Of eight crops, on which the steps of integers are found."""


class DecoderModule(nn.Module):
    """What is trained: the decoder, and its adversary if it has one."""

    def __init__(self, synthesis: Synthesis, discriminator: Discriminator | None) -> None:
        super().__init__()
        self.synthesis = synthesis
        self.discriminator = discriminator


def train(config: DecoderTraining, *, resume: str | Path | None = None) -> Path:
    """Run all stages; returns the path of the decoder's file in the run folder.

    Args:
        config: recipe.
        resume: None, "auto" or a checkpoint path (`TrainingRun.open`).

    Raises:
        ConfigError, ModelError, OutputError: unusable data, model, folder or checkpoint.
        MissingExtraError: the network of features is not installed.
        TimeIsUp: `run.max_minutes` is over before the end.
    """
    run = TrainingRun.open(config.run, resume)
    photos = open_photos(run, config.data)
    torch.manual_seed(config.run.seed)
    tokenizer, _ = load_tokenizer(config.token_model)
    start, faithful, is_newly_rounded = starting_synthesis(config)
    source = TokenSource(tokenizer.to(run.device), config, run)
    if is_newly_rounded and run.resumed is None:
        calibrate(start, [z_q for z_q, _ in some_sent(config, source, photos.sampler, CALIBRATION_BATCHES)])
    eyes = None
    if config.perceptual.steps or config.adversarial.steps:
        eyes = FeatureNetwork(load_efficientnet_lite0(), run)
    discriminator = None
    if config.adversarial.steps:
        assert eyes is not None
        discriminator = make_discriminator(config, source, eyes)
        if run.resumed is None:
            fit_discriminator(discriminator, config, source, eyes, photos.sampler)
    start = start.to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    module = DecoderModule(copy.deepcopy(start), discriminator)
    module = module.to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if run.resumed is not None:
        module.load_state_dict(run.resumed["module"])
    for stage in STAGES:
        if getattr(config, stage).steps and not run.is_done(stage):
            train_stage(run, config, stage, module, source, eyes, photos.sampler, photos.held_out, start)
    facts = {
        "description": config.description,
        "recipe": config.model_dump(mode="json", exclude=NOT_IN_FACTS),
        **photos.facts,
    }
    model_id = token_model_id(config.token_model)
    if model_id is None:  # the entropy model is still to be trained
        path = config.run.output / "tokenizer.safetensors"
        tokenizer.synthesis = module.synthesis
        sizes = AutoencoderConfig.of(tokenizer.config.autoencoder.analysis, module.synthesis.config)
        tokenizer.config = replace(tokenizer.config, autoencoder=sizes)
        save_tokenizer(path, tokenizer, facts)
        return path
    path = config.run.output / f"{config.name}{SUFFIX}"
    start_file = None if faithful is None else load_decoder(faithful)
    save_decoder(path, config.name, module.synthesis, model_id, facts, faithful=start_file)
    if faithful is not None and faithful.parent.resolve() != path.parent.resolve():
        shutil.copyfile(faithful, path.parent / faithful.name)  # it must lie beside
    return path


def starting_synthesis(config: DecoderTraining) -> tuple[Synthesis, Path | None, bool]:
    """The decoder to start from, grown to the recipe's sizes.

    Returns:
        The synthesis; the file of the faithful decoder, if this one is fine-tuned from it for realism; whether it
        multiplies integers that the earlier one does not, so that their steps are still to be found.

    Raises:
        ConfigError: it is larger.
    """
    earlier, faithful = load_any_synthesis(config.start_from)
    before = earlier.config
    sizes = replace(before, channels=config.channels or before.channels, blocks=config.blocks or before.blocks)
    if config.integer_blocks is not None:
        sizes = replace(sizes, integer_blocks=config.integer_blocks or None)
    synthesis = Synthesis(sizes)
    try:
        grow(synthesis, earlier)
    except ValueError as error:
        raise ConfigError(f"{config.start_from}: start_from: the recipe has {error} than this decoder") from error
    is_fine_tuned = not config.distortion.steps and sizes == before
    is_newly_rounded = bool(sizes.integer_blocks and not before.integer_blocks)
    return synthesis, faithful if is_fine_tuned else None, is_newly_rounded


def some_sent(
    config: DecoderTraining, source: TokenSource, sampler: Sampler, batches: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Quantized latents, and the crops that they are of, which no stage draws."""
    for batch in range(batches):
        x = sampler.batch(len(STAGES) * STAGE_STEPS + batch, 8)
        yield source.draw(x, Draws(config.run.seed, batch, 8, slice(None), x.device)).z_q, x


def make_discriminator(config: DecoderTraining, source: TokenSource, eyes: FeatureNetwork) -> Discriminator:
    """An untrained discriminator.

    Raises:
        ConfigError: the model has too few sub-quantizers.
    """
    quantizer, wanted = source.tokenizer.quantizer, config.terms.label_subquantizers
    if wanted > quantizer.num_subquantizers:
        available = quantizer.num_subquantizers
        raise ConfigError(f"terms.label_subquantizers: {wanted}, but the model has {available} sub-quantizers")
    return Discriminator(config.terms.adversary, eyes.channels(), quantizer.boundaries[wanted], config.terms.labels)


def fit_discriminator(
    discriminator: Discriminator, config: DecoderTraining, source: TokenSource, eyes: FeatureNetwork, sampler: Sampler
) -> None:
    """Set the scales of what a discriminator sees, and the kinds of content, from many training crops."""
    quantizer = source.tokenizer.quantizer
    parts: list[Tensor] = []
    for z_q, x in some_sent(config, source, sampler, -(-config.terms.label_crops // 8)):
        if not parts:
            fit_features(discriminator, eyes.look(x, Window.middle(x.shape[-1])))
        values = leading_values(quantizer, z_q, config.terms.label_subquantizers)
        parts.append(values.permute(0, 2, 3, 1).flatten(0, 2).cpu())
    fit_labels(discriminator, torch.cat(parts), KMEANS_ITERATIONS, torch.Generator().manual_seed(config.run.seed))


def train_stage(
    run: TrainingRun,
    config: DecoderTraining,
    name: str,
    module: DecoderModule,
    source: TokenSource,
    eyes: FeatureNetwork | None,
    sampler: Sampler,
    held_out: Tensor,
    start: Synthesis,
) -> None:
    """One stage; leaves the averaged weights in `module`.

    Args:
        name: one of `STAGES`.
        start: the decoder at the beginning, for comparison.
    """
    stage: StageConfig = getattr(config, name)
    terms, quantizer, discriminator = config.terms, source.tokenizer.quantizer, module.discriminator
    is_perceptual, is_adversarial = name != "distortion", name == "adversarial"
    weight = terms.weight_with_adversary if is_adversarial else terms.weight

    def losses(step: int, x: Tensor, draws: Draws) -> dict[str, Tensor]:
        window = Window.draw(x.shape[-1], draws.generator)
        sent = source.draw(x, draws)
        with run.autocast():
            x_hat = module.synthesis(sent.z_q)
        found = {"mse": mean_squared_error(x_hat, x)}
        # Errors fall about as 1 / sqrt(lambda): this weight gives every rate a like say.
        fidelity = (config.rate.lambda_max * sent.lam).sqrt()
        cost = fidelity * found["mse"]
        if is_perceptual:
            assert eyes is not None
            decoded = eyes.look(x_hat, window)
            with torch.no_grad():
                original = eyes.look(x, window)
            found["chroma"] = chroma_error(x_hat, x)
            found["features"] = feature_distance(decoded.features, original.features)
            if terms.texture_weight:
                found["texture"] = texture_distance(decoded.features, original.features)
                cost = cost + terms.texture_weight * found["texture"]
            found["pattern"] = repeated_error(x_hat, x)
            found["excess"] = excess_detail(x_hat, x)
            cost = cost + fidelity * terms.chroma_weight * found["chroma"] + weight * found["features"]
            cost = cost + fidelity * terms.pattern_weight * found["pattern"]
            cost = cost + fidelity * terms.excess_weight * found["excess"]
        if is_adversarial:
            assert discriminator is not None
            sent_values = SentValues(leading_values(quantizer, sent.z_q, terms.label_subquantizers), window)
            with run.autocast():
                discriminator.requires_grad_(False)
                logits = discriminator(decoded, sent_values)
                discriminator.requires_grad_(True)
                judged = discriminator(original, sent_values), discriminator(decoded.detached(), sent_values)
            found["taken_for_real"] = discriminator.decoder_loss(logits, sent_values)
            found["adversary"] = discriminator.own_loss(*judged, sent_values)
            rise = min(1.0, (step + 1) / terms.adversary_delay)
            cost = cost + terms.adversary_weight * rise * found["taken_for_real"] + found["adversary"]
        found["loss"] = cost
        return {key: term.sum() / stage.batch_size for key, term in found.items()}

    def validate(averaged: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(averaged, DecoderModule)
        sheet = run.config.output / "samples" / f"{name}{step:06d}.png"
        return validate_decoder(averaged.synthesis, start, source, held_out, eyes if is_perceptual else None, sheet)

    synthesis = module.synthesis
    if is_perceptual:
        synthesis.linear.requires_grad_(False)
        synthesis.convolutional[: terms.kept_layers].requires_grad_(False)
    learned = [p for n, p in synthesis.named_parameters() if n != "linear" and p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": learned}]
    if not is_perceptual:
        groups.append({"params": [synthesis.linear], "lr": 0.1})
    if is_adversarial:
        assert discriminator is not None
        groups.append({"params": list(discriminator.parameters()), "lr": terms.adversary_rate})
    first = STAGES.index(name)
    fit(
        run,
        name,
        stage,
        module,
        groups,
        crops=lambda step, part: sampler.batch(first * STAGE_STEPS + step, stage.batch_size, part),
        losses=losses,
        validate=validate,
        done=STAGES[:first],
        compiled=[
            module.synthesis,
            *([eyes.network] if eyes else []),
            *([discriminator] if discriminator else []),
        ],
    )
