"""How a decoder's pictures differ from the originals, for a network and by numbers."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from pqmim.perceptual.features import feature_distance
from pqmim.training.autoencoder import Synthesis
from pqmim.training.discriminator import View, Window
from pqmim.training.losses import chroma_error, excess_detail, grid_pattern, mean_psnr, mean_squared_error
from pqmim.training.token_source import TokenSource
from pqmim.training.training_run import TrainingRun

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

    def look(self, pictures: Tensor, window: Window) -> View:
        """Look at a window of pictures (B, 3, H, W)."""
        pixels = pictures[..., window.top : window.top + window.side, window.left : window.left + window.side]
        if window.seen_side != window.side:
            pixels = F.interpolate(pixels, size=(window.seen_side,) * 2, mode="bilinear", antialias=True)
        with self.run.autocast():
            return View(pixels, self.network(pixels))

    def channels(self) -> list[int]:
        """Of the features at each depth, finest first."""
        return [f.shape[1] for f in self.network(torch.zeros(1, 3, 64, 64, device=self.run.device))]


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
        At each trade-off PSNR, errors of color, strength of a repeating pattern, excess of detail and, if possible,
        distance of features.
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
                views = [eyes.look(pictures, Window.middle(x.shape[-1])) for pictures in (parts[-1], x)]
                distances.append(feature_distance(views[0].features, views[1].features))
        x_hat = torch.cat(parts)
        numbers = {
            "psnr": mean_psnr(mean_squared_error(x_hat, held_out)),
            "chroma": float(chroma_error(x_hat, held_out).mean()),
            "pattern": float(grid_pattern(x_hat, held_out)),
            "excess": float(excess_detail(x_hat, held_out).mean()),
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
