"""How a decoder's pictures differ from the originals, for a network and by numbers."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from pqmim.training.autoencoder import Synthesis
from pqmim.training.discriminator import View
from pqmim.training.losses import chroma_error, feature_distance, grid_pattern, mean_psnr, mean_squared_error
from pqmim.training.token_source import TokenSource
from pqmim.training.training_run import TrainingRun

SHIFTS = 8
"""The network of features sees crops moved by up to so many pixels: it looks at every second pixel, then at every
second of these, so a pattern that lies well for it once lies badly another time."""
FRACTIONS = (0.5, 0.75, 1.0)
"""Trade-offs that are looked at: places in the range of those that the codebooks serve, in logarithms."""
SHEET_FRACTION, SHEET_PHOTOS = 0.75, 8


class FeatureNetwork:
    """A trained network that looks at pictures.

    Args:
        network: (B, 3, H, W) in [0, 1] -> features at several depths; frozen.
        run: device and precision.
    """

    def __init__(self, network: nn.Module, run: TrainingRun) -> None:
        self.network = network.to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.run = run

    def look(self, pictures: Tensor, top: int = SHIFTS // 2, left: int = SHIFTS // 2) -> View:
        """Look at pictures (B, 3, H, W) without a border, from row `top` and column `left` on."""
        height, width = pictures.shape[2] - SHIFTS, pictures.shape[3] - SHIFTS
        pixels = pictures[..., top : top + height, left : left + width]
        with self.run.autocast():
            return View(pixels, self.network(pixels))

    def channels(self) -> list[int]:
        """Of the features at each depth, finest first."""
        return [f.shape[1] for f in self.look(torch.zeros(1, 3, 64, 64, device=self.run.device)).features]


@torch.no_grad()
def validate_decoder(
    decoder: nn.Module,
    start: Synthesis,
    source: TokenSource,
    held_out: Tensor,
    eyes: FeatureNetwork | None,
    sheet: Path,
) -> dict[str, float]:
    """Decode held-out crops at a few trade-offs.

    Args:
        decoder: latents -> pictures.
        start: the decoder that training began with.
        held_out: (n, 3, H, W) float32 in [0, 1].
        sheet: picture to write: originals, those of `start`, those of `decoder`.

    Returns:
        At each trade-off PSNR, errors of color, strength of a repeating pattern and, if possible, distance of features.
    """
    row: dict[str, float] = {}
    for fraction in FRACTIONS:
        w = source.trade_off(fraction)
        parts: list[Tensor] = []
        distances: list[Tensor] = []
        latents = [source.send(x, w.expand(len(x))).z_q for x in held_out.split(8)]
        for x, z_q in zip(held_out.split(8), latents, strict=True):
            with source.run.autocast():
                parts.append(decoder(z_q).clamp(0, 1))
            if eyes is not None:
                distances.append(feature_distance(eyes.look(parts[-1]).features, eyes.look(x).features))
        x_hat = torch.cat(parts)
        numbers = {
            "psnr": mean_psnr(mean_squared_error(x_hat, held_out)),
            "chroma": float(chroma_error(x_hat, held_out).mean()),
            "pattern": float(grid_pattern(x_hat, held_out)),
        }
        if distances:
            numbers["features"] = float(torch.cat(distances).mean())
        row.update({f"{name}@{float(w):.3g}": number for name, number in numbers.items()})
        if fraction == SHEET_FRACTION:
            with source.run.autocast():
                before = start(latents[0]).clamp(0, 1)
            save_sheet(sheet, torch.stack([held_out[: len(before)], before, parts[0]])[:, :SHEET_PHOTOS])
    return row


def save_sheet(path: Path, rows: Tensor) -> None:
    """Write pictures as a sheet: (rows, n, 3, H, W) float32 in [0, 1]."""
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray((sheet.float() * 255).round().byte().permute(1, 2, 0).cpu().numpy()).save(path)
