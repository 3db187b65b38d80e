"""Train the masked transformer on the tokens of a frozen tokenizer; write the finished model.

Tokens are made on the fly from random crops at random trade-offs. Most batches predict every token in the step of the
schedule that codes it, in one pass; the others any tokens given any others, so that the network can also fill arbitrary
gaps. The loss is the code length of what is predicted, in shares of what its level costs under static priors.
"""

from __future__ import annotations

import math
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from pqmim.errors import ConfigError
from pqmim.model_files import FLOAT_MODEL, MODEL_FILE, SUFFIX, load_model
from pqmim.schedule import quincunx_steps
from pqmim.training.checkpoints import load_tokenizer
from pqmim.training.data import STAGE_STEPS
from pqmim.training.entropy_model import EntropyModel
from pqmim.training.export import save_model
from pqmim.training.import_entropy import import_entropy
from pqmim.training.orders import Orders
from pqmim.training.recipes import EntropyTraining
from pqmim.training.tokenizer import Tokenizer
from pqmim.training.train_tokenizer import NOT_IN_FACTS, draw_w
from pqmim.training.training_run import Draws, TrainingRun, fit, open_photos

RANDOM_SHARE = 0.15
"""Share of the batches in which random tokens are known, not those of the schedule."""
MAX_RANDOM_STEPS = 8
"""Most steps of a random order."""
PATCHES = 4
"""Random sets of known positions vary by position, or by patches, this many in each direction."""
SAME_CODEWORDS = 0.2
"""Codewords that moved by less than this (mean square, in mean squares of their size) are taken to be the same ones."""


def draw_orders(model: EntropyModel, count: int, quincunx: Tensor, generator: torch.Generator) -> Orders:
    """Draw what a batch knows when each of its tokens is predicted: the schedule, or anything.

    Args:
        count: B.
        quincunx: (h, w) int64, step of each position, on the CPU.
        generator: on the CPU.
    """
    schedule, (height, width) = model.schedule, quincunx.shape

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    if uniform() >= RANDOM_SHARE:
        return Orders.of_schedule(schedule, quincunx)

    def field() -> Tensor:  # (B, h, w), uniform in [0, 1); by patches in half of the samples
        patches = uniform(count, 1, PATCHES, PATCHES)
        coarse = nn.functional.interpolate(patches, size=(height, width), mode="nearest")[:, 0]
        return torch.where(uniform(count, 1, 1) < 0.5, coarse, uniform(count, height, width))

    known = []
    for group in range(schedule.num_groups):
        first, last = schedule.group_bounds(group)
        chance = uniform(count, 1, 1)
        whole = field() < chance
        # Elsewhere leading tokens may be known, as in a file that ends early; or any.
        index = torch.arange(last - first)[:, None, None]
        leading = index < uniform(count, 1, 1, 1) * (last - first)
        any_of_them = uniform(count, last - first, height, width) < uniform(count, 1, 1, 1)
        some = torch.where(uniform(count, 1, 1, 1) < 0.5, leading, any_of_them)
        in_part = (field() < uniform(count, 1, 1)) & (uniform(count, 1, 1) < 0.5)
        known.append(whole[:, None] | (some & in_part[:, None]))
    orders = Orders.of_known(schedule, torch.cat(known, dim=1))
    if uniform() < 0.5:
        return orders
    # Random steps of whole positions, each with a share of its own.
    num_steps = 2 + int(uniform() * (MAX_RANDOM_STEPS - 1))
    ends = uniform(count, 1, 1, num_steps).sort(dim=-1).values
    label = (field()[..., None] > ends).sum(-1)
    everything = torch.ones_like(label, dtype=torch.bool)
    return Orders(label, label, everything[:, None], everything, orders.passes, is_whole=False)


def earlier_weights(path: Path) -> dict[str, Tensor]:
    """Float weights that a run left, or those of a token model's integers.

    Raises:
        ConfigError, ModelError: neither of these, or damaged.
    """
    if path.is_dir() or path.suffix == SUFFIX:
        return import_entropy(load_model(path / MODEL_FILE if path.is_dir() else path))
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError) as error:
        raise ConfigError(f"{path}: cannot be read as weights of an earlier run") from error
    return state


def take_over_weights(model: EntropyModel, path: Path) -> None:
    """Start from the weights of an earlier run, or of a token model: all that have the same name and shape.

    If the earlier model has fewer layers in the first group, the additional ones go before their last and add nothing.

    What belongs to the codewords (biases and factors of the tokens) is taken over only if these are about the same, as
    after a tokenizer run that started from that of the earlier run.

    Raises:
        ConfigError: no such file, or nothing in it fits.
        ModelError: a damaged token model.
    """
    earlier = earlier_weights(path)
    own = model.state_dict()
    num_layers = 1 + max((int(name.split(".")[1]) for name in earlier if name.startswith("layers.")), default=-1)
    more = len(model.layers) - num_layers
    if 0 < more < model.config.num_layers and num_layers > 0:
        first_new = model.config.num_layers - 1 - more
        earlier = {_moved(name, first_new, more): tensor for name, tensor in earlier.items()}
        for name in own:
            layer = int(name.split(".")[1]) if name.startswith("layers.") else -1
            if first_new <= layer < first_new + more and ".project." in name:
                own[name].zero_()
    same_shape = {name for name, tensor in earlier.items() if name in own and own[name].shape == tensor.shape}
    same_codewords = False
    if "token_values" in same_shape:
        values = own["token_values"]
        moved = (earlier["token_values"] - values).square().sum()
        same_codewords = bool(moved < SAME_CODEWORDS * values.square().sum())
    constants = {"token_values", "prior", "level_bits"}
    fitting = {
        name: earlier[name] for name in same_shape - constants if same_codewords or not name.startswith("token_")
    }
    if not fitting:
        raise ConfigError(f"{path}: no weights that fit this model")
    model.load_state_dict({**own, **fitting})


def _moved(name: str, first: int, distance: int) -> str:
    """Name of a weight after the layers from `first` on have moved up."""
    parts = name.split(".")
    if parts[0] == "layers" and int(parts[1]) >= first:
        parts[1] = str(int(parts[1]) + distance)
    return ".".join(parts)


@torch.no_grad()
def validate_entropy_model(
    model: EntropyModel, tokenizer: Tokenizer, token_sets: dict[float, Tensor], pixels: int, *, simulate: bool
) -> dict[str, float]:
    """Estimated bpp over the whole schedule, and the bits saved against static frequencies.

    Args:
        token_sets: w -> tokens (n, M, h, w) of the validation crops.
        pixels: number of pixels of a crop.
    """
    row: dict[str, float] = {}
    for w, tokens in token_sets.items():
        level = torch.full((len(tokens),), tokenizer.quantizer.levels.level(w), device=tokens.device)
        bits = sum(
            float(model.schedule_bits(part, level[: len(part)], simulate=simulate).sum()) for part in tokens.split(16)
        )
        static = float(tokenizer.quantizer.static_bits(tokens, level).sum())
        row[f"bpp_estimate@{w:.3g}"] = bits / (len(tokens) * pixels)
        row[f"saved_vs_static@{w:.3g}"] = 1 - bits / static
    return row


def train(config: EntropyTraining, *, resume: str | Path | None = None) -> Path:
    """Train and export; returns the path of `model.safetensors` in the run folder.

    Args:
        config: recipe.
        resume: None, "auto" or a checkpoint path (`TrainingRun.open`).

    Raises:
        ConfigError, OutputError, ModelError: unusable data, folder, checkpoint or tokenizer.
        TimeIsUp: `run.max_minutes` is over before the end.
    """
    run = TrainingRun.open(config.run, resume)
    tokenizer, tokenizer_facts = load_tokenizer(config.tokenizer)
    tokenizer = tokenizer.to(run.device)
    photos = open_photos(run, config.data)
    w_range = tokenizer.quantizer.levels.w_range()

    @torch.no_grad()
    def tokens_of(x: Tensor, w: Tensor | float) -> Tensor:
        with run.autocast():
            return tokenizer.encode(x, w)

    validation_ws = (w_range[0], math.sqrt(w_range[0] * w_range[1]), w_range[1])
    token_sets = {w: torch.cat([tokens_of(x, w) for x in photos.held_out.split(8)]) for w in validation_ws}
    torch.manual_seed(config.run.seed)
    model = EntropyModel.for_quantizer(config.model, tokenizer.quantizer).to(run.device)
    if config.start_from is not None:
        take_over_weights(model, config.start_from)
    stage = config.stage
    quincunx = torch.from_numpy(quincunx_steps(*token_sets[w_range[0]].shape[2:]))
    is_simulated = False

    def losses(step: int, x: Tensor, draws: Draws) -> dict[str, Tensor]:
        nonlocal is_simulated
        is_simulated = draws.progress >= config.quantize_after
        w = draw_w(tokenizer.quantizer, draws)
        tokens = tokens_of(x, w)
        orders = draw_orders(model, stage.batch_size, quincunx, draws.generator)
        orders = orders.of_samples(draws.mine)
        with run.autocast():
            level = tokenizer.quantizer.level(w)
            bits = model.code_length(tokens, level, orders, simulate=is_simulated)
        # In shares of what the level costs anyway: else the finest ones, of fifty times the bits, would rule.
        shares = bits / (model.level_bits[level] * quincunx.numel())
        return {"loss": shares.sum() / stage.batch_size}

    def validate(averaged: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(averaged, EntropyModel)
        with run.autocast():
            return validate_entropy_model(averaged, tokenizer, token_sets, config.data.crop**2, simulate=is_simulated)

    if not run.is_done("entropy"):
        # One step of Adam moves a head output by about learning rate x width, and the logits by several times that: the
        # head must learn slower than the layers, or the noise of its steps costs more than the context brings.
        slow = ("head.", "token_")
        groups: list[dict[str, Any]] = [
            {"params": [p for n, p in model.named_parameters() if not n.startswith(slow)]},
            {"params": [p for n, p in model.named_parameters() if n.startswith(slow)], "lr": 0.1},
        ]
        fit(
            run,
            "entropy",
            stage,
            model,
            groups,
            crops=lambda step, part: photos.sampler.batch(3 * STAGE_STEPS + step, stage.batch_size, part),
            losses=losses,
            validate=validate,
            compiled=list(model.layers),
        )
    else:
        assert run.resumed is not None
        model.load_state_dict(run.resumed["module"])
    path = config.run.output / MODEL_FILE
    if not run.workers.is_main:
        return path
    numbers = validate_entropy_model(model, tokenizer, token_sets, config.data.crop**2, simulate=True)
    facts = {
        "description": config.description,
        "tokenizer": tokenizer_facts,
        "recipe": config.model_dump(mode="json", exclude={**NOT_IN_FACTS, "tokenizer": True}),
        **photos.facts,
        "validation": {k: round(v, 4) for k, v in numbers.items()},
    }
    torch.save(model.state_dict(), config.run.output / FLOAT_MODEL)
    save_model(config.run.output, config.name, tokenizer, model, config.quality, facts)
    return path
