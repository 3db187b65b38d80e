"""Where a decoder's channels pay: two probes of every layer's output. Needs `pqmim[train]`.

    python benchmarks/decoder_probes.py --data PHOTOS [--decoder fast] [--cache FOLDER] [--w 1.5] [--crops 16]

1. How few principal components of the output keep PSNR within 0.045 dB, which is 1 % of the squared error.
2. How much PSNR gains when the output is optimized for one picture, with all that follows as it is: what the layers
   before leave undone. Part of it nobody could know from what was sent.

Crops of the photos held out of training, tokens under the static priors.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from measurements import table
from torch import Tensor, nn
from torch.nn import functional as F

from pqmim.model_files import find_model
from pqmim.training.autoencoder import Synthesis
from pqmim.training.checkpoints import load_tokenizer
from pqmim.training.data import load_photos, split_photos, validation_crops
from pqmim.training.losses import mean_psnr, mean_squared_error

CROP, LOSS = 192, 0.045
LEARNING_RATE = 0.02
"""Of Adam, in standard deviations of the output."""


def finish(synthesis: Synthesis, z_q: Tensor, h: Tensor, first: int) -> Tensor:
    """The picture, from the output of the modules before `first` of the convolutional path on."""
    learned = F.pixel_shuffle(synthesis.head(synthesis.convolutional[first:](h)), 4)
    linear = F.pixel_shuffle(F.conv2d(z_q, (synthesis.linear_gain * synthesis.linear)[:, :, None, None]), 16)
    return linear + learned + 0.5


def components_kept(synthesis: Synthesis, z_q: Tensor, h: Tensor, first: int, x: Tensor) -> int:
    """Fewest principal components of an output (n, C, h, w) with which PSNR falls by at most LOSS."""
    rows = h.permute(0, 2, 3, 1).flatten(0, 2)
    mean = rows.mean(0)
    vectors = torch.linalg.eigh((rows - mean).t() @ (rows - mean)).eigenvectors.flip(1)

    def psnr(count: int) -> float:
        basis = vectors[:, :count]
        kept = ((rows - mean) @ basis) @ basis.t() + mean
        kept = kept.view(len(h), *h.shape[2:], -1).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        return mean_psnr(mean_squared_error(finish(synthesis, z_q, kept, first).clamp(0, 1), x))

    low, high = 0, h.shape[1]
    whole = psnr(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if psnr(middle) >= whole - LOSS else (middle, high)
    return high


def gain_of_optimizing(synthesis: Synthesis, z_q: Tensor, h: Tensor, first: int, x: Tensor, steps: int) -> float:
    """Mean gain in dB of outputs (n, C, h, w) that are optimized for their pictures."""
    best = h.detach().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([best], lr=LEARNING_RATE * float(h.std()))
    before = mean_psnr(mean_squared_error(finish(synthesis, z_q, h, first), x))
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.enable_grad():
            mean_squared_error(finish(synthesis, z_q, best, first), x).sum().backward()
        optimizer.step()
    return mean_psnr(mean_squared_error(finish(synthesis, z_q, best, first), x)) - before


def main(arguments: Sequence[str] | None = None) -> None:
    """Probe and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="PHOTOS")
    parser.add_argument("--cache", type=Path, help="decoded pixels, as data.cache")
    parser.add_argument("--decoder", default="fast")
    parser.add_argument("--w", type=float, default=1.5, help="squared latent units per bit")
    parser.add_argument("--crops", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args(arguments)
    tokenizer, _ = load_tokenizer(find_model("photo"), options.decoder)
    photos = load_photos(options.data, min_side=CROP, cache=options.cache)
    x = validation_crops(split_photos(photos, 64)[1], CROP, torch.device("cpu"))[: options.crops]
    synthesis = copy.deepcopy(tokenizer.synthesis).requires_grad_(False)
    with torch.no_grad():
        level = torch.full((len(x),), tokenizer.quantizer.levels.level(options.w))
        z_q = tokenizer.quantizer.dequantize(tokenizer.encode(x, options.w), level)
        h, rows = 0.1 * z_q, []
        for index, module in enumerate([nn.Identity(), *synthesis.convolutional]):
            h = module(h)
            if isinstance(module, nn.PixelShuffle):
                continue  # the same numbers elsewhere
            kept = components_kept(synthesis, z_q, h, index, x)
            gain = gain_of_optimizing(synthesis, z_q, h, index, x, options.steps)
            name = "latent" if index == 0 else type(module).__name__
            rows.append([name, f"{CROP // h.shape[2]}", f"{h.shape[1]}", f"{kept}", f"{gain:+.2f}"])
            print(rows[-1], flush=True)
    print(table(["output of", "stride", "channels", "components", "optimized, dB"], rows))


if __name__ == "__main__":
    main()
