"""Multiplications with additions that coding takes, thousands per pixel (kMAC); needs `pqmim[train]`.

    python benchmarks/work.py [--image examples/photo.png] [-m MODEL] [--qualities 0 25 50 75 100]

Transforms are counted by torch's counter over a picture of 512 x 512. The entropy model is counted while the picture is
decoded by the kernel `numpy`: every product of matrices, with the positions that fill up windows, which the other
kernels compute as well. Its work depends on the level: groups of sub-quantizers that say nothing are not computed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from example import PHOTO
from measurements import table
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pqmim
from pqmim import exact_numpy
from pqmim.config import STRIDE
from pqmim.decoder_files import decoders_beside
from pqmim.exact_numpy import NumpyParts
from pqmim.model_files import find_model
from pqmim.training.checkpoints import load_any_synthesis, load_tokenizer

SIDE = 512


def transform_work(transform: nn.Module, x: Tensor) -> float:
    """kMAC per pixel of a picture of SIDE x SIDE."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        transform(x)
    return counter.get_total_flops() / 2 / SIDE**2 / 1000


@contextmanager
def counted_products() -> Iterator[dict[str, int]]:
    """What the entropy model multiplies meanwhile: layers, attention, and logits of tokens."""
    counts = {"layers": 0, "attention": 0, "logits": 0}
    linear, attend, frequencies = exact_numpy._Linear.__call__, NumpyParts.attend, NumpyParts.frequencies

    def count_linear(self: Any, x: Any) -> Any:
        y = linear(self, x)
        counts["layers"] += x.size * y.shape[-1]
        return y

    def count_attend(self: Any, layer: int, x: Any, kv: Any, bias: Any, mask: Any) -> Any:
        counts["attention"] += x.size * kv.shape[1] * 2  # scores, and the mean that they weigh
        return attend(self, layer, x, kv, bias, mask)

    def count_frequencies(self: Any, head: Any, level: int, first: int, **options: Any) -> Any:
        found = frequencies(self, head, level, first, **options)
        counts["logits"] += found.size * head.shape[-1]
        return found

    with (
        mock.patch.object(exact_numpy._Linear, "__call__", count_linear),
        mock.patch.object(NumpyParts, "attend", count_attend),
        mock.patch.object(NumpyParts, "frequencies", count_frequencies),
    ):
        yield counts


def main(arguments: Sequence[str] | None = None) -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, default=PHOTO)
    parser.add_argument("-m", "--model", default="photo")
    parser.add_argument("--qualities", type=float, nargs="+", default=[0, 25, 50, 75, 100])
    options = parser.parse_args(arguments)
    path = find_model(options.model)
    tokenizer, _ = load_tokenizer(path)
    latent = torch.zeros(1, tokenizer.config.autoencoder.latent_channels, SIDE // STRIDE, SIDE // STRIDE)
    rows = [("analysis", f"{transform_work(tokenizer.analysis, torch.zeros(1, 3, SIDE, SIDE)):.1f}")]
    for decoder in decoders_beside(path):
        rows.append(
            (f"synthesis, {decoder.name}", f"{transform_work(load_any_synthesis(decoder.path)[0], latent):.1f}")
        )
    print(table(["transform", "kMAC per pixel"], rows))
    codec = pqmim.load_codec(options.model, kernel="numpy")
    image = Image.open(options.image).convert("RGB")
    lines = []
    for quality in options.qualities:
        data = codec.encode(image, quality=quality)
        with counted_products() as counts:
            codec.decode(data)
        pixels = image.width * image.height
        each = {name: count / pixels / 1000 for name, count in counts.items()}
        cells = (f"{value:.1f}" for value in (*each.values(), sum(each.values())))
        lines.append((f"{quality:g}", f"{8 * len(data) / pixels:.3f}", *cells))
    print(table(["quality", "bpp", "layers", "attention", "logits", "kMAC per pixel"], lines))


if __name__ == "__main__":
    main()
