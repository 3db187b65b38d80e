"""Train analysis, codebooks and a first synthesis for rate and distortion together, in two stages (docs/training.md).

1. *transform*: no codebooks. The latent is rounded with a step drawn per sample, a factorized density gives its rate.
2. *codebooks*: channels are ordered by rate, a lattice is fitted to each at each level (`codebook_fitting`).

From then on tokens stay as they are: entropy model and decoders are trained for them, each by itself.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pqmim.config import STRIDE
from pqmim.errors import ConfigError
from pqmim.training.autoencoder import grow
from pqmim.training.checkpoints import load_tokenizer, save_tokenizer
from pqmim.training.codebook_fitting import fit_quantizer
from pqmim.training.data import STAGE_STEPS, Sampler
from pqmim.training.losses import mean_psnr, mean_squared_error, straight_through
from pqmim.training.recipes import TokenizerTraining
from pqmim.training.tokenizer import Tokenizer
from pqmim.training.tokenizer_validation import validate_tokenizer
from pqmim.training.trainable_quantizer import LOG2, FactorizedDensity, TrainableQuantizer
from pqmim.training.training_run import Draws, TrainingRun, fit, open_photos

DEAD_ZONE = 0.1
"""Rounding offset of the first stage, in steps: values up to 0.6 steps become zero, as a rate-aware choice would do."""
DENSITY_STEPS, DENSITY_BATCHES, DENSITY_RATE = 300, 12, 0.03
"""How the density is fitted to transforms that were taken over: steps, batches of eight crops, learning rate."""
TRANSFORMS = "transforms.safetensors"
"""File in the run folder: the tokenizer after the first stage, its codebooks zero."""
NOT_IN_FACTS: dict[str, Any] = {"run": True, "start_from": True, "data": {"path", "cache"}}
"""Settings that say more of the maker's machine than of the model."""
VALIDATION_STEPS = (2.0, 4.0, 8.0)
"""Quantization steps (latent units) at which the first stage is validated."""


def w_of_lambda(lam: Tensor | float, latent_unit: float) -> Tensor | float:
    """Squared latent units per bit that belong to lambda (on the scale lambda * 255^2 * MSE + bpp).

    A squared latent error e at one position adds e * unit^2 / (3 * 256) to the MSE (grey levels squared) of its 256
    pixels, so lambda * MSE + bpp = const * (e + w * bits) with this w.
    """
    return 3.0 / (latent_unit**2 * lam)


def step_of_lambda(lam: float, latent_unit: float) -> float:
    """Quantization step (latent units) whose slope at high resolution is lambda's: uniform noise of step^2 / 12 halves
    by half a bit, so w = (ln 2 / 6) step^2."""
    return math.sqrt(6 / LOG2 * float(w_of_lambda(lam, latent_unit)))


class TransformStage(nn.Module):
    """What the first stage trains: the transforms and the density of the latent."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.analysis = tokenizer.analysis
        self.synthesis = tokenizer.synthesis
        self.density = FactorizedDensity(tokenizer.config.autoencoder.latent_channels)

    def forward(self, x: Tensor, step: Tensor, noise: Tensor | None, bf16: bool) -> tuple[Tensor, Tensor]:
        """Code a batch of images.

        Args:
            x: (B, 3, H, W) float32 in [0, 1].
            step: (B, 1, 1, 1) float32, quantization steps.
            noise: (B, D, H / 16, W / 16) float32, uniform in [0, 1); None = the rate of the rounded latent.

        Returns:
            bpp (B,), MSE in grey levels squared (B,).
        """
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=bf16):
            z = self.analysis(x)
        rounded = z.sign() * torch.floor((z / step).abs() + 0.5 - DEAD_ZONE) * step
        # Rate from additive noise, distortion from rounding (Minnen and Singh 2020, arXiv:2007.08739, section 3.4).
        rate_latent = rounded if noise is None else z + (noise - 0.5) * step
        bpp = self.density.bits(rate_latent, step).sum((1, 2, 3)) / (x.shape[2] * x.shape[3])
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=bf16):
            x_hat = self.synthesis(straight_through(rounded, z))
        return bpp, mean_squared_error(x_hat, x)


def train(config: TokenizerTraining, *, resume: str | Path | None = None) -> Path:
    """Run all stages; returns the path of `tokenizer.safetensors` in the run folder.

    Args:
        config: recipe.
        resume: None, "auto" or a checkpoint path (`TrainingRun.open`).

    Raises:
        ConfigError, OutputError: unusable data, folder or checkpoint.
        TimeIsUp: `run.max_minutes` is over before the end.
    """
    run = TrainingRun.open(config.run, resume)
    photos = open_photos(run, config.data)
    sampler, held_out = photos.sampler, photos.held_out
    torch.manual_seed(config.run.seed)
    tokenizer = Tokenizer(config.model)
    if config.start_from is not None:
        take_over_transforms(tokenizer, config.start_from)
    tokenizer = tokenizer.to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    facts = {"recipe": config.model_dump(mode="json", exclude=NOT_IN_FACTS), **photos.facts}
    transform = TransformStage(tokenizer).to(run.device)
    if config.start_from is not None and run.resumed is None:
        density = run.workers.from_main(lambda: fit_density(config, transform, sampler, run).cpu())
        transform.density.load_state_dict(density.state_dict())
    if not run.is_done("transform"):
        train_transform(run, config, transform, sampler, held_out)
        if run.workers.is_main:  # no codebooks yet, but what another range of rates starts from
            save_tokenizer(config.run.output / TRANSFORMS, tokenizer, facts)
    elif "codebooks" not in run.resumed["done"]:  # type: ignore[index]
        transform.load_state_dict(run.resumed["module"])  # type: ignore[index]

    path = config.run.output / "tokenizer.safetensors"
    if not run.is_done("codebooks"):
        quantizer = run.workers.from_main(lambda: fit_codebooks(config, transform, sampler, run).cpu())
        tokenizer.quantizer = quantizer.to(run.device)
        if run.workers.is_main:
            numbers = validate_tokenizer(tokenizer, held_out, run)
            facts |= {"validation": {name: round(number, 4) for name, number in numbers.items()}}
            save_tokenizer(path, tokenizer, facts)
        run.save("codebooks", ["transform", "codebooks"], 0, module={})
    return path


def fit_density(
    config: TokenizerTraining, transform: TransformStage, sampler: Sampler, run: TrainingRun
) -> FactorizedDensity:
    """Fit the density to the latent of transforms that were taken over: a wrong one would spoil them."""
    density = transform.density
    optimizer = torch.optim.Adam(density.parameters(), lr=DENSITY_RATE)
    latents = []
    for batch in range(DENSITY_BATCHES):
        with torch.no_grad(), run.autocast():
            latents.append(transform.analysis(sampler.batch(4 * STAGE_STEPS + batch, 8)))
    finest = step_of_lambda(config.rate.lambda_max, config.model.autoencoder.latent_unit)
    coarsest = step_of_lambda(config.rate.lambda_min, config.model.autoencoder.latent_unit)
    generator = torch.Generator().manual_seed(config.run.seed)
    for index in range(DENSITY_STEPS):
        z = latents[index % DENSITY_BATCHES]
        step = finest * (coarsest / finest) ** torch.rand((len(z), 1, 1, 1), generator=generator).to(z.device)
        noise = torch.rand(z.shape, generator=generator).to(z.device)
        optimizer.zero_grad()
        density.bits(z + (noise - 0.5) * step, step).mean().backward()
        optimizer.step()
    return density


def train_transform(
    run: TrainingRun, config: TokenizerTraining, transform: TransformStage, sampler: Sampler, held_out: Tensor
) -> None:
    """First stage: transforms and density, quantization step drawn per sample over the range of rates."""
    stage, rate, unit = config.transform, config.rate, config.model.autoencoder.latent_unit
    log_range = math.log(rate.lambda_max / rate.lambda_min)
    finest = step_of_lambda(rate.lambda_max, unit)

    def losses(step: int, x: Tensor, draws: Draws) -> dict[str, Tensor]:
        fraction = draws.uniform() ** (1 / config.rate_emphasis)
        coarseness = torch.exp(0.5 * log_range * fraction)  # step / finest step
        noise = draws.noise(config.model.autoencoder.latent_channels, x.shape[2] // STRIDE, x.shape[3] // STRIDE)
        bpp, mse = transform(x, finest * coarseness[:, None, None, None], noise, run.bf16)
        cost = rate.lambda_max / coarseness**2 * mse + bpp
        # Costs fall about as 1 / step: this weight gives every rate a like say.
        terms = {"loss": cost * coarseness, "bpp": bpp, "mse": mse}
        return {name: term.sum() / stage.batch_size for name, term in terms.items()}

    def validate(averaged: nn.Module, step: int) -> dict[str, float]:
        row: dict[str, float] = {}
        for quantization_step in VALIDATION_STEPS:
            rates, errors = [], []
            for x in held_out.split(8):
                bpp, mse = averaged(
                    x, torch.full((len(x), 1, 1, 1), quantization_step, device=x.device), None, run.bf16
                )
                rates.append(bpp)
                errors.append(mse)
            row[f"bpp@{quantization_step:g}"] = float(torch.cat(rates).mean())
            row[f"psnr@{quantization_step:g}"] = mean_psnr(torch.cat(errors))
        return row

    linear = [transform.analysis.linear, transform.synthesis.linear]
    density = list(transform.density.parameters())
    rest = [p for p in transform.parameters() if all(p is not q for q in (*linear, *density))]
    groups: list[dict[str, Any]] = [
        {"params": rest},
        {"params": linear, "lr": 0.1},  # entries of 1/16 that start right must not be shaken
        {"params": density, "lr": 20.0},  # few parameters that have to follow the latent's scale
    ]
    fit(
        run,
        "transform",
        stage,
        transform,
        groups,
        crops=lambda step, part: sampler.batch(step, stage.batch_size, part),
        losses=losses,
        validate=validate,
        compiled=[transform],
    )


@torch.no_grad()
def fit_codebooks(
    config: TokenizerTraining, transform: TransformStage, sampler: Sampler, run: TrainingRun
) -> TrainableQuantizer:
    """Second stage: codebooks for the latents of crops that the first stage did not draw."""
    settings, sizes = config.codebooks, config.model.quantizer
    transform.eval()
    latents = []
    for batch in range(-(-settings.crops // 8)):
        with run.autocast():
            z = transform.analysis(sampler.batch(STAGE_STEPS + batch, 8))
        latents.append(z.permute(0, 2, 3, 1).flatten(0, 2).float().cpu())
    coarsest = float(w_of_lambda(config.rate.lambda_min, config.model.autoencoder.latent_unit))
    log_w = torch.linspace(math.log(settings.w), math.log(coarsest), sizes.num_levels)
    return fit_quantizer(torch.cat(latents), log_w, sizes).to(run.device)


def take_over_transforms(tokenizer: Tokenizer, path: Path) -> None:
    """Start from the transforms of an earlier run, grown to the sizes of this one.

    Raises:
        ConfigError: larger transforms.
        ModelError: missing or damaged file.
    """
    earlier, _ = load_tokenizer(path)
    try:
        grow(tokenizer.analysis, earlier.analysis)
        grow(tokenizer.synthesis, earlier.synthesis)
    except ValueError as error:
        raise ConfigError(f"{path}: start_from: the recipe's transforms have {error} than this tokenizer") from error


def draw_w(quantizer: TrainableQuantizer, draws: Draws) -> Tensor:
    """Trade-offs to ask for (B,), squared latent units per bit, log-uniform over all that the levels serve."""
    low, high = quantizer.levels.w_range()
    return torch.exp(math.log(low) + math.log(high / low) * draws.uniform())
