"""Train the analysis on for the tokens that there are, under the rate that files have (docs/training.md).

The first analysis of a token model is trained before there are codebooks, under a factorized density and together with
a small synthesis. Here it learns what codebooks, masked model and a decoder make of its latents: the cost is
lambda * 255^2 * MSE of the decoder's picture + bits of the soft assignment under the masked model (`soft_rate`).
Codebooks and entropy model stay as they are, and with them the model id and all files. The decoder may learn, too.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pqmim.decoder_files import load_decoder
from pqmim.errors import ConfigError
from pqmim.model_files import MODEL_FILE, SUFFIX, find_model, load_model
from pqmim.training.autoencoder import Analysis, Synthesis, grow
from pqmim.training.checkpoints import load_tokenizer
from pqmim.training.data import STAGE_STEPS
from pqmim.training.entropy_model import EntropyModel
from pqmim.training.export import save_analysis, save_decoder
from pqmim.training.losses import mean_psnr, mean_squared_error
from pqmim.training.recipes import AnalysisTraining
from pqmim.training.soft_rate import soft_rate
from pqmim.training.token_source import TokenSource
from pqmim.training.tokenizer import Tokenizer
from pqmim.training.train_entropy_model import take_over_weights
from pqmim.training.train_tokenizer import NOT_IN_FACTS
from pqmim.training.training_run import Draws, Photos, TrainingRun, fit, open_photos

STAGE = "analysis"
FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Trade-offs of the validation: places in the range of those that the codebooks serve, in logarithms."""


class AnalysisModule(nn.Module):
    """What is trained."""

    def __init__(self, analysis: Analysis, synthesis: Synthesis) -> None:
        super().__init__()
        self.analysis = analysis
        self.synthesis = synthesis


def train(config: AnalysisTraining, *, resume: str | Path | None = None) -> Path:
    """Run the stage; returns the path of the token model with the new analysis in the run folder.

    Args:
        config: recipe.
        resume: None, "auto" or a checkpoint path (`TrainingRun.open`).

    Raises:
        ConfigError, ModelError, OutputError: unusable data, model, folder or checkpoint.
        TimeIsUp: `run.max_minutes` is over before the end.
    """
    run = TrainingRun.open(config.run, resume)
    photos = open_photos(run, config.data)
    torch.manual_seed(config.run.seed)
    file = find_model(config.token_model)
    model = load_model(file)
    tokenizer, _ = load_tokenizer(file, str(config.decoder))
    entropy_model = frozen_entropy_model(file, tokenizer).to(run.device) if config.bits == "masked" else None
    module = AnalysisModule(grown(tokenizer.analysis, config), tokenizer.synthesis)
    module = module.to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if run.is_done(STAGE):
        assert run.resumed is not None
        module.load_state_dict(run.resumed["module"])
    else:
        source = TokenSource(tokenizer.to(run.device), config, run)
        train_stage(run, config, module, source, entropy_model, photos)
    path = config.run.output / MODEL_FILE
    if run.workers.is_main:
        facts = {"recipe": config.model_dump(mode="json", exclude=NOT_IN_FACTS), **photos.facts}
        save_analysis(model, module.analysis, path, facts)
        if config.decoder_learns:
            before = load_decoder(config.decoder)
            facts = {"description": before.facts.get("description", "")} | facts
            save_decoder(path.with_name(before.name + SUFFIX), before.name, module.synthesis, model.model_id, facts)
    return path


def frozen_entropy_model(file: Path, tokenizer: Tokenizer) -> EntropyModel:
    """The entropy model of a token model's file, as floats."""
    model = EntropyModel.for_quantizer(load_model(file).config.entropy, tokenizer.quantizer)
    take_over_weights(model, file)
    return model.eval().requires_grad_(False)


def grown(analysis: Analysis, config: AnalysisTraining) -> Analysis:
    """The analysis to start from, in the recipe's sizes.

    Raises:
        ConfigError: it is larger.
    """
    before = analysis.config
    sizes = replace(before, channels=config.channels or before.channels, blocks=config.blocks or before.blocks)
    new = Analysis(sizes)
    try:
        grow(new, analysis)
    except ValueError as error:
        raise ConfigError(f"{config.token_model}: token_model: the recipe has {error} than its analysis") from error
    return new


def train_stage(
    run: TrainingRun,
    config: AnalysisTraining,
    module: AnalysisModule,
    source: TokenSource,
    entropy_model: EntropyModel | None,
    photos: Photos,
) -> None:
    """Train; leaves the averaged weights in `module`."""
    stage, quantizer = config.stage, source.tokenizer.quantizer
    unit = module.analysis.config.latent_unit
    module.synthesis.requires_grad_(config.decoder_learns)

    def losses(step: int, x: Tensor, draws: Draws) -> dict[str, Tensor]:
        with run.autocast():
            z = module.analysis(x)
        sent, whole = source.draw_of(z.detach(), draws)
        with run.autocast():
            soft = soft_rate(quantizer, entropy_model, z, sent.tokens, sent.w, sent.level)
            # A sample that is cut short teaches the decoder alone.
            x_hat = module.synthesis(sent.z_q + whole[:, None, None, None] * soft.passed)
        mse, bpp = mean_squared_error(x_hat, x), soft.bits / (x.shape[2] * x.shape[3])
        mse = mse + whole * soft.curvature * (unit**2 / x[0].numel())  # about as of an orthonormal basis
        # Costs fall about as sqrt(lambda): this weight gives every rate a like say.
        cost = (config.rate.lambda_max / sent.lam).sqrt() * (sent.lam * mse + whole * bpp)
        terms = {"loss": cost, "mse": mse, "bpp": bpp}
        return {name: term.sum() / stage.batch_size for name, term in terms.items()}

    def validate(averaged: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(averaged, AnalysisModule)
        return validate_analysis(averaged, source, entropy_model, photos.held_out)

    linear = [module.analysis.linear, module.synthesis.linear]
    learned = [p for p in module.parameters() if p.requires_grad and all(p is not q for q in linear)]
    groups: list[dict[str, Any]] = [
        {"params": learned},
        {"params": [p for p in linear if p.requires_grad], "lr": 0.1},  # as in `train_tokenizer`
    ]
    fit(
        run,
        STAGE,
        stage,
        module,
        groups,
        crops=lambda step, part: photos.sampler.batch(4 * STAGE_STEPS + step, stage.batch_size, part),
        losses=losses,
        validate=validate,
        compiled=[module.analysis, module.synthesis],
    )


@torch.no_grad()
def validate_analysis(
    module: AnalysisModule, source: TokenSource, entropy_model: EntropyModel | None, held_out: Tensor
) -> dict[str, float]:
    """PSNR and bpp of held-out crops at a few trade-offs, tokens chosen under static priors, bits by the masked model
    if there is one."""
    row: dict[str, float] = {}
    for fraction in FRACTIONS:
        w = source.trade_off(fraction)
        errors, bits = [], 0.0
        for x in held_out.split(8):
            with source.run.autocast():
                sent = source.quantize(module.analysis(x), w.expand(len(x)))
                errors.append(mean_squared_error(module.synthesis(sent.z_q).clamp(0, 1), x))
                if entropy_model is None:
                    bits += float(source.tokenizer.quantizer.static_bits(sent.tokens, sent.level).sum())
                else:
                    bits += float(entropy_model.schedule_bits(sent.tokens, sent.level).sum())
        row[f"bpp@{float(w):.3g}"] = bits / held_out[:, 0].numel()
        row[f"psnr@{float(w):.3g}"] = mean_psnr(torch.cat(errors))
    return row
