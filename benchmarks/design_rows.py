"""Short training runs that decide the design: one row for each alternative, all with the same steps and crops.

    python benchmarks/design_rows.py transforms --data PHOTOS -o OUT [--steps 600]
    python benchmarks/design_rows.py stages     --data PHOTOS -o OUT --before tokenizer.safetensors \
        --tokenizer finetuned.safetensors --entropy entropy_model_float.pt

`transforms` trains the first stage from its start with other blocks or another scale of the latent. `stages` trains
nothing: it says what each stage of a finished model gave, from its tokenizer as `pqmim train tokenizer` left it
(`--before`), and with its synthesis trained on (`--tokenizer`, which `pqmim train decoder` leaves). Numbers are from
the photos held out of training. A finished row is not made again after an interruption.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training_throughput import last_values

from pqmim.evaluation.bd_rate import bd_rate
from pqmim.training import train_tokenizer
from pqmim.training.autoencoder import ResidualBlock
from pqmim.training.checkpoints import load_tokenizer
from pqmim.training.entropy_model import EntropyModel
from pqmim.training.layers import WindowPartition
from pqmim.training.losses import mean_psnr, mean_squared_error
from pqmim.training.recipes import EntropyTraining, TokenizerTraining, load_config
from pqmim.training.tokenizer import Tokenizer
from pqmim.training.trainable_quantizer import TrainableQuantizer
from pqmim.training.training_run import Photos, TrainingRun, open_photos

ROOT = Path(__file__).resolve().parent.parent
UNIT = 20.0
"""Latent unit of the recipes, grey levels."""
GREY_STEPS = (30.0, 50.0, 80.0, 120.0, 180.0)
"""Quantization steps at which transforms are validated, grey levels of an orthonormal basis function."""
Row = dict[str, Any]


# Transforms


class GeneralizedDivisiveNormalization(nn.Module):
    """x_i / sqrt(beta_i + sum over j of gamma_ij x_j^2); Balle, Laparra and Simoncelli 2016, arXiv:1511.06281."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(channels))
        self.gamma = nn.Parameter(0.1 * torch.eye(channels)[:, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return x * F.conv2d(x.square(), self.gamma.abs(), self.beta.abs() + 1e-3).rsqrt()


class BlockWithNormalization(nn.Module):
    """A residual block of the codec with divisive normalization for its rectifier."""

    def __init__(self, block: ResidualBlock, channels: int) -> None:
        super().__init__()
        self.block, self.normalization = block, GeneralizedDivisiveNormalization(channels)

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.block.project(self.normalization(self.block.expand(x)))
        return x + change


class PreNormalizedBlock(nn.Module):
    """A residual block that sees its input scaled to a mean square of one at every position."""

    def __init__(self, block: ResidualBlock, channels: int) -> None:
        super().__init__()
        self.block, self.gain = block, nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        normalized = x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt() * self.gain
        change: Tensor = self.block.project(F.leaky_relu(self.block.expand(normalized), 0.1))
        return x + change


class AttentionBlock(nn.Module):
    """Attention in 8 x 8 windows and a feed-forward part: about the multiplications of two 3 x 3 convolutions."""

    WINDOW, HEAD_WIDTH, HIDDEN = 8, 32, 6

    def __init__(self, channels: int, shifted: bool) -> None:
        super().__init__()
        self.shifted = shifted
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
        self.query_key_value, self.join = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        hidden = self.HIDDEN * channels
        self.expand, self.project = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.bias = nn.Parameter(torch.zeros(channels // self.HEAD_WIDTH, self.WINDOW**2, self.WINDOW**2))
        for layer in (self.join, self.project):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = x.permute(0, 2, 3, 1)
        partition = WindowPartition(h.shape[1], h.shape[2], self.WINDOW, self.shifted, x.device)
        windows = partition.split(self.query_key_value(self.norms[0](h)))
        n, t, _ = windows.shape
        q, k, v = windows.view(n, t, 3, -1, self.HEAD_WIDTH).permute(2, 0, 3, 1, 4)
        outside = (~partition.is_inside[:, None, None]).repeat(len(h), 1, 1, 1)
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=self.bias.to(q.dtype).masked_fill(outside, -torch.inf)
        )
        h = h + self.join(partition.join(mixed.transpose(1, 2).reshape(n, t, -1)))
        output: Tensor = (h + self.project(F.gelu(self.expand(self.norms[1](h))))).permute(0, 3, 1, 2)
        return output


def replace_blocks(tokenizer: Tokenizer, make: Callable[[ResidualBlock, int, int], nn.Module | None]) -> None:
    """Replace residual blocks by what `make` (block, channels, index at its stride) returns, unless that is None."""
    for network in (tokenizer.analysis, tokenizer.synthesis):
        counts: dict[int, int] = {}
        for index, module in enumerate(network.convolutional):
            if isinstance(module, ResidualBlock):
                channels = module.expand.in_channels
                counts[channels] = counts.get(channels, -1) + 1
                network.convolutional[index] = make(module, channels, counts[channels]) or module


TRANSFORMS: dict[str, tuple[list[str], Callable[[Tokenizer], None]]] = {
    "residual blocks of 3 x 3 convolutions": ([], lambda _: None),
    "windowed attention at stride 16": (
        [],
        lambda t: replace_blocks(
            t, lambda _, c, i: AttentionBlock(c, i % 2 == 1) if c == t.config.autoencoder.channels[2] else None
        ),
    ),
    "GDN for the rectifier": ([], lambda t: replace_blocks(t, lambda b, c, _: BlockWithNormalization(b, c))),
    "normalization before every block": ([], lambda t: replace_blocks(t, lambda b, c, _: PreNormalizedBlock(b, c))),
    "latent unit 10 grey levels": (["model.autoencoder.latent_unit=10"], lambda _: None),
    "latent unit 40 grey levels": (["model.autoencoder.latent_unit=40"], lambda _: None),
}
"""Name -> settings, and what is done to the fresh tokenizer. The first is the codec's."""


def transform_row(options: argparse.Namespace, name: str, folder: Path) -> Row:
    """Train the first stage; its curve on the held-out photos."""
    settings, change = TRANSFORMS[name]
    config = tokenizer_config(options, folder, [f"transform.steps={options.steps or 600}", *settings])
    run = TrainingRun.open(config.run, None)
    photos = open_photos(run, config.data)
    torch.manual_seed(config.run.seed)
    tokenizer = Tokenizer(config.model)
    change(tokenizer)
    transform = train_tokenizer.TransformStage(tokenizer.to(memory_format=torch.channels_last))  # type: ignore[call-overload]
    steps = tuple(step / config.model.autoencoder.latent_unit for step in GREY_STEPS)
    with mock.patch.object(train_tokenizer, "VALIDATION_STEPS", steps):
        train_tokenizer.train_transform(run, config, transform, photos.sampler, photos.held_out)
    values = last_values(folder / "log.csv")["transform"]
    return {
        "bpp": [values[f"validation/bpp@{step:g}"] for step in steps],
        "psnr": [values[f"validation/psnr@{step:g}"] for step in steps],
        "crops_per_second": values["crops_per_second"],
    }


# Stages


def trade_offs(quantizer: TrainableQuantizer) -> list[float]:
    """As many as there are levels, over all that they serve; squared latent units per bit."""
    return np.geomspace(*quantizer.levels.w_range(), quantizer.num_levels).tolist()


@torch.no_grad()
def tokenizer_row(tokenizer: Tokenizer, held_out: Tensor) -> Row:
    """bpp under the static priors and PSNR, at trade-offs over the range of the levels."""
    quantizer, row = tokenizer.quantizer, Row(bpp=[], psnr=[])
    for w in trade_offs(quantizer):
        bits, errors = 0.0, []
        for x in held_out.split(8):
            level = torch.full((len(x),), quantizer.levels.level(w))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                tokens = tokenizer.encode(x, w)
                x_hat = tokenizer.decode(tokens, level)
            bits += float(quantizer.static_bits(tokens, level).sum())
            errors.append(mean_squared_error(x_hat.clamp(0, 1), x))
        row["bpp"].append(bits / (held_out.shape[0] * held_out.shape[2] * held_out.shape[3]))
        row["psnr"].append(mean_psnr(torch.cat(errors)))
    return row


STAGES = (
    "transforms: rounding, factorized density",
    "+ codebooks, static priors",
    "+ fine-tuned synthesis",
    "+ masked model",
)


def stage_row(options: argparse.Namespace, name: str, folder: Path) -> Row:
    """A model at the end of one of its stages, on the held-out photos."""
    config = tokenizer_config(options, folder, [])
    run = TrainingRun.open(config.run, None)
    photos = open_photos(run, config.data)
    tokenizer, _ = load_tokenizer(options.before if name in STAGES[:2] else options.tokenizer)
    if name == STAGES[0]:
        return scalar_row(config, run, tokenizer, photos)
    row = tokenizer_row(tokenizer, photos.held_out)
    if name == STAGES[3]:
        settings = [f"data.path={options.data}", f"run.output={folder}", f"tokenizer={options.tokenizer}"]
        recipe = load_config(EntropyTraining, options.recipes / "entropy.yaml", [*settings, *options.set])
        model = EntropyModel.for_quantizer(recipe.model, tokenizer.quantizer).eval()
        model.load_state_dict(torch.load(options.entropy, weights_only=True))
        for index, w in enumerate(trade_offs(tokenizer.quantizer)):
            bits = 0.0
            for x in photos.held_out.split(8):
                level = torch.full((len(x),), tokenizer.quantizer.levels.level(w))
                with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                    tokens = tokenizer.encode(x, w)
                    bits += float(model.schedule_bits(tokens, level, simulate=True).sum())
            row["bpp"][index] = bits / (photos.held_out[:, 0].numel())
    return row


def scalar_row(config: TokenizerTraining, run: TrainingRun, tokenizer: Tokenizer, photos: Photos) -> Row:
    """Rounded latents under a factorized density that is fitted to them."""
    transform = train_tokenizer.TransformStage(tokenizer).eval()
    density = train_tokenizer.fit_density(config, transform, photos.sampler, run)
    transform.density.load_state_dict(density.state_dict())
    row = Row(bpp=[], psnr=[])
    for step in GREY_STEPS:
        rates, errors = [], []
        for x in photos.held_out.split(8):
            with torch.no_grad():
                bpp, mse = transform(x, torch.full((len(x), 1, 1, 1), step / UNIT), None, True)
            rates.append(bpp)
            errors.append(mse)
        row["bpp"].append(float(torch.cat(rates).mean()))
        row["psnr"].append(mean_psnr(torch.cat(errors)))
    return row


# All of them


def tokenizer_config(options: argparse.Namespace, folder: Path, settings: list[str]) -> TokenizerTraining:
    """The recipe with a short stage."""
    short = [f"data.path={options.data}", f"run.output={folder}"]
    short += ["transform.warmup_steps=50", "transform.ema_decay=0.98"]
    if options.cache is not None:
        short.append(f"data.cache={options.cache}")
    return load_config(TokenizerTraining, options.recipes / "tokenizer.yaml", [*short, *settings, *options.set])


def table(rows: dict[str, Row]) -> list[str]:
    """The rows as a Markdown table; rates against the first row."""
    lines = ["| variant | bpp | PSNR, dB | rate at equal PSNR |", "|---|---|---|---|"]
    anchor = next(iter(rows.values()))
    for name, row in rows.items():
        percent = bd_rate(anchor["bpp"], anchor["psnr"], row["bpp"], row["psnr"]).percent
        numbers = [" / ".join(f"{value:.{digits}f}" for value in row[key]) for key, digits in (("bpp", 3), ("psnr", 2))]
        change = "" if row is anchor or percent is None else f"{percent:+.1f} %"
        lines.append(f"| {name} | {numbers[0]} | {numbers[1]} | {change} |")
    return lines


FAMILIES: dict[str, tuple[Sequence[str], Callable[[argparse.Namespace, str, Path], Row]]] = {
    "transforms": (tuple(TRANSFORMS), transform_row),
    "stages": (STAGES, stage_row),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the missing rows of a family and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--data", type=Path, required=True, metavar="PHOTOS")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="folder for the results")
    parser.add_argument("--cache", type=Path, help="decoded pixels, as data.cache")
    parser.add_argument("--recipes", type=Path, default=ROOT / "recipes" / "photo", help="folder with the two recipes")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer with its synthesis trained on, for stages")
    parser.add_argument("--entropy", type=Path, help="float weights of its entropy model, for stages")
    parser.add_argument("--before", type=Path, help="the tokenizer before that, for stages")
    parser.add_argument("--steps", type=int, help="of a training run, for transforms [default: 600]")
    parser.add_argument("--rows", nargs="+", type=int, metavar="N", help="only these rows of the family, from 0")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="of the recipe; repeatable")
    options = parser.parse_args(arguments)
    names, make_row = FAMILIES[options.family]
    options.output.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Row] = {}
    for index, name in enumerate(names):
        if options.rows is not None and index not in options.rows:
            continue
        path = options.output / f"{options.family}-{index}.json"
        if not path.exists():
            folder = options.output / f"{options.family}-{index}"
            shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run
            row = {"name": name, **make_row(options, name, folder)}
            path.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
        rows[name] = json.loads(path.read_text(encoding="utf-8"))
    lines = table(rows)
    (options.output / f"{options.family}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
