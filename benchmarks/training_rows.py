"""What choices of the training cost or give: rows of the same minutes each, trained on from the shipped model.

    python benchmarks/training_rows.py FAMILY --data PHOTOS -o OUT [--cache FOLDER] [--minutes 8] [--rows N ...]

- `analysis`: trained on under static bits, or under those of the masked model, pictures by `fast`, which stays.
- `rates`: transforms for all rates, or for one of three quantization steps alone.
- `orders`: the entropy model with random orders in a share of the batches, or with none.
- `licence`: transforms from scratch on all photos, or on those alone whose sources state a permissive licence.
- `decoders`: syntheses from scratch, up step by step, with a point-wise renderer, or with Haar unfolding.

Numbers are from the photos held out of training, the same ones for all rows. A finished row is not made again after an
interruption. All need `pqmim[train]`.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar
from unittest import mock

import numpy as np
import torch
from measurements import table
from torch import Tensor, nn
from torch.nn import functional as F
from training_throughput import last_values
from work import SIDE, transform_work

from pqmim.config import STRIDE
from pqmim.evaluation.bd_rate import bd_rate
from pqmim.model_files import find_model
from pqmim.training import train_analysis, train_decoder, train_entropy_model, train_tokenizer
from pqmim.training.autoencoder import ResidualBlock, Synthesis
from pqmim.training.checkpoints import load_tokenizer
from pqmim.training.recipes import (
    AnalysisTraining,
    Config,
    DecoderTraining,
    EntropyTraining,
    TokenizerTraining,
    load_config,
)
from pqmim.training.token_source import TokenSource
from pqmim.training.tokenizer import Tokenizer
from pqmim.training.training_run import TrainingRun, open_photos

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "photo"
SHIPPED = find_model("photo").parent
NO_STATEMENT = "[imagenet*, bsds*, sunhays*, houses*, nips17*, tinycoco*, rknncoco*, froala*]"
"""Names of the photos whose sources state no permissive licence for the pictures (docs/model-photo.md)."""
Values = dict[str, float]
AnyConfig = TypeVar("AnyConfig", bound=Config)


class Row:
    """One training: where it goes, and the settings that all have.

    Args:
        options: of the command.
        folder: of the run.
    """

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.minutes, self.folder = options.minutes, folder
        self._common = [f"data.path={options.data}", f"run.output={folder}", *options.set]
        if options.cache is not None:
            self._common.append(f"data.cache={options.cache}")

    def config(self, kind: type[AnyConfig], recipe: str, stage: str, *changes: str) -> AnyConfig:
        """A recipe of `photo` with a stage of so many minutes."""
        short = [f"{stage}.minutes={self.minutes}", f"{stage}.steps=1000000", f"{stage}.warmup_steps=50"]
        short += [f"{stage}.ema_decay=0.99"]
        return load_config(kind, RECIPES / f"{recipe}.yaml", [*short, *self._common, *changes])

    def values(self, stage: str) -> Values:
        """What was logged last."""
        return last_values(self.folder / "log.csv")[stage]


# Analysis, entropy model


def analysis_row(bits: str | None) -> Callable[[Row], Values]:
    """The analysis trained on; None = as it is."""

    def run(row: Row) -> Values:
        changes = [f"decoder={SHIPPED / 'fast.safetensors'}", "decoder_learns=false", "channels=null", "blocks=null"]
        config = row.config(AnalysisTraining, "analysis", "stage", *changes, f"bits={bits or 'masked'}")
        opened = TrainingRun.open(config.run, None)
        photos = open_photos(opened, config.data)
        tokenizer, _ = load_tokenizer(SHIPPED, "fast")
        model = train_analysis.frozen_entropy_model(find_model("photo"), tokenizer)
        module = train_analysis.AnalysisModule(copy.deepcopy(tokenizer.analysis), tokenizer.synthesis)
        source = TokenSource(tokenizer, config, opened)
        if bits is not None:
            by = model if bits == "masked" else None
            train_analysis.train_stage(opened, config, module, source, by, photos)
        found = train_analysis.validate_analysis(module, source, model, photos.held_out)
        return {f"validation/{name}": value for name, value in found.items()}

    return run


def orders_row(share: float) -> Callable[[Row], Values]:
    """The entropy model trained on, a share of the batches with random orders."""

    def run(row: Row) -> Values:
        config = row.config(EntropyTraining, "entropy", "stage", f"tokenizer={SHIPPED}", f"start_from={SHIPPED}")
        with mock.patch.object(train_entropy_model, "RANDOM_SHARE", share):
            train_entropy_model.train(config)
        return row.values("entropy")

    return run


# Transforms


def transform_row(*changes: str) -> Callable[[Row], Values]:
    """The first stage of a tokenizer."""

    def run(row: Row) -> Values:
        config = row.config(TokenizerTraining, "tokenizer", "transform", *changes)
        opened = TrainingRun.open(config.run, None)
        photos = open_photos(opened, config.data)
        torch.manual_seed(config.run.seed)
        tokenizer = Tokenizer(config.model)
        if config.start_from is not None:
            train_tokenizer.take_over_transforms(tokenizer, config.start_from)
        transform = train_tokenizer.TransformStage(tokenizer.to(memory_format=torch.channels_last))  # type: ignore[call-overload]
        if config.start_from is not None:
            density = train_tokenizer.fit_density(config, transform, photos.sampler, opened)
            transform.density.load_state_dict(density.state_dict())
        train_tokenizer.train_transform(opened, config, transform, photos.sampler, photos.held_out)
        return row.values("transform")

    return run


def at_step(step: float) -> tuple[str, str]:
    """Settings of a training at one quantization step, latent units."""
    lam = 3.0 / (20.0**2 * np.log(2) / 6 * step**2)
    return f"rate.lambda_min={lam}", f"rate.lambda_max={lam * 1.0001}"


# Decoders


class HaarUnfolding(nn.Module):
    """Four channels -> the four pixels of which they are the orthonormal Haar transform: (B, 4 C, h, w) ->
    (B, C, 2 h, 2 w)."""

    def __init__(self) -> None:
        super().__init__()
        signs = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]])
        self.register_buffer("basis", signs.t() / 2)

    def forward(self, x: Tensor) -> Tensor:
        pixels = torch.einsum("kj,bcjhw->bckhw", self.get_buffer("basis"), x.unflatten(1, (-1, 4)))
        return F.pixel_shuffle(pixels.flatten(1, 2), 2)


class Renderer(nn.Module):
    """Features at stride 16 -> features at stride 4, all of it point-wise.

    They are unfolded once; then come layers that are modulated by what the features at stride 16 say, the same for the
    4 x 4 places of a position.

    Args:
        width: channels at stride 16.
        narrow: at stride 4.
        depth: layers.
    """

    def __init__(self, width: int, narrow: int, depth: int) -> None:
        super().__init__()
        self.unfold = nn.Conv2d(width, 16 * narrow, 1)
        self.modulate = nn.Conv2d(width, 2 * narrow * depth, 1)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)  # type: ignore[arg-type]
        self.expand = nn.ModuleList(nn.Conv2d(narrow, 2 * narrow, 1) for _ in range(depth))
        self.project = nn.ModuleList(nn.Conv2d(2 * narrow, narrow, 1) for _ in range(depth))

    def forward(self, h: Tensor) -> Tensor:
        x = F.pixel_shuffle(self.unfold(h), 4)
        settings = F.interpolate(self.modulate(h), scale_factor=4.0, mode="nearest").chunk(2 * len(self.expand), dim=1)
        for index, (expand, project) in enumerate(zip(self.expand, self.project, strict=True)):
            scaled = x * (1 + settings[2 * index]) + settings[2 * index + 1]
            x = x + project(F.leaky_relu(expand(scaled), 0.1))
        return x


def rendered(synthesis: Synthesis, width: int, blocks: int, narrow: int, depth: int, *, edges: bool = False) -> None:
    """Replace the convolutional path by blocks at stride 16 and a renderer; `edges` keeps the head's 3 x 3."""
    latent = synthesis.config.latent_channels
    synthesis.convolutional = nn.Sequential(
        nn.Conv2d(latent, width, 1),
        *[ResidualBlock(width) for _ in range(blocks)],
        Renderer(width, narrow, depth),
    )
    synthesis.head = nn.Conv2d(narrow, 48, 3, padding=1) if edges else nn.Conv2d(narrow, 48, 1)
    nn.init.zeros_(synthesis.head.weight)
    nn.init.zeros_(synthesis.head.bias)  # type: ignore[arg-type]


def unfolded(synthesis: Synthesis) -> None:
    """Haar unfolding in place of the pixel shuffles."""
    for index, module in enumerate(synthesis.convolutional):
        if isinstance(module, nn.PixelShuffle):
            synthesis.convolutional[index] = HaarUnfolding()


def decoder_row(change: Callable[[Synthesis], None]) -> Callable[[Row], Values]:
    """A synthesis of the size of `fast`, changed, from its start."""

    def run(row: Row) -> Values:
        fast = f"start_from={SHIPPED / 'fast.safetensors'}"
        config = row.config(DecoderTraining, "fast", "distortion", f"token_model={SHIPPED}", fast)
        opened = TrainingRun.open(config.run, None)
        photos = open_photos(opened, config.data)
        tokenizer, _ = load_tokenizer(config.token_model, "fast")
        torch.manual_seed(config.run.seed)
        synthesis = Synthesis(tokenizer.synthesis.config)
        synthesis.linear.data.copy_(tokenizer.synthesis.linear)  # what differs is the path beside it
        change(synthesis)
        synthesis = synthesis.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        source = TokenSource(tokenizer, config, opened)
        module = train_decoder.DecoderModule(synthesis, None)
        stage = ("distortion", module, source, None, photos.sampler, photos.held_out, tokenizer.synthesis)
        train_decoder.train_stage(opened, config, *stage)
        latent = torch.zeros(1, synthesis.config.latent_channels, SIDE // STRIDE, SIDE // STRIDE)
        return {"kMAC per pixel": transform_work(synthesis, latent), **row.values("distortion")}

    return run


FAMILIES: dict[str, dict[str, Callable[[Row], Values]]] = {
    "analysis": {
        "as shipped": analysis_row(None),
        "static bits": analysis_row("static"),
        "bits of the masked model": analysis_row("masked"),
    },
    "rates": {"all": transform_row(), **{f"step {step}": transform_row(*at_step(step)) for step in (2, 4, 8)}},
    "orders": {"15 % of the batches": orders_row(0.15), "none": orders_row(0.0)},
    "licence": {
        "all photos": transform_row("start_from=null"),
        "those with a statement": transform_row("start_from=null", f"data.exclude={NO_STATEMENT}"),
    },
    "decoders": {
        "up step by step": decoder_row(lambda _: None),
        "the same, Haar unfolding": decoder_row(unfolded),
        "renderer, 3 blocks of 256": decoder_row(lambda s: rendered(s, 256, 3, 64, 3)),
        "renderer, 2 blocks of 256": decoder_row(lambda s: rendered(s, 256, 2, 64, 2)),
        "renderer, head of 3 x 3": decoder_row(lambda s: rendered(s, 256, 2, 64, 3, edges=True)),
    },
}
"""What each row trains. The first of a family is what the others are compared with."""


def curve(values: Values, kind: str) -> list[float]:
    """Values of one kind at all trade-offs."""
    return [value for name, value in values.items() if name.startswith(f"validation/{kind}@")]


def report(rows: dict[str, Values]) -> str:
    """What all rows of a family logged of their validation, and rates at equal PSNR against the first."""
    anchor = next(iter(rows.values()))
    shown = (
        "kMAC",
        "crops_per",
        *(f"validation/{kind}@" for kind in ("bpp", "psnr", "bpp_estimate", "saved_vs_static")),
    )
    names = [name for name in anchor if name.startswith(shown)]
    lines = []
    for label, values in rows.items():
        cells = [f"{values[name]:.4g}" for name in names]
        curves = [curve(row, kind) for row in (anchor, values) for kind in ("bpp", "psnr")]
        change = None if values is anchor or not curves[0] else bd_rate(*curves).percent
        lines.append([label, *cells, "" if change is None else f"{change:+.2f} %"])
    return table(["row", *(name.removeprefix("validation/") for name in names), "rate"], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the missing rows of a family and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--data", type=Path, required=True, metavar="PHOTOS")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="folder for the results")
    parser.add_argument("--cache", type=Path, help="decoded pixels, as data.cache")
    parser.add_argument("--minutes", type=float, default=8.0, help="of each row")
    parser.add_argument("--rows", nargs="+", type=int, metavar="N", help="only these rows of the family, from 0")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="of all recipes; repeatable")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Values] = {}
    for index, (name, train) in enumerate(FAMILIES[options.family].items()):
        if options.rows is not None and index not in options.rows:
            continue
        path = options.output / f"{options.family}-{index}.json"
        if not path.exists():
            folder = options.output / f"{options.family}-{index}"
            shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run
            path.write_text(json.dumps(train(Row(options, folder)), indent=2) + "\n", encoding="utf-8")
        rows[name] = json.loads(path.read_text(encoding="utf-8"))
    print(report(rows))


if __name__ == "__main__":
    main()
