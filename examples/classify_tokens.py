"""Train a small classifier on tokens alone, beside the same one on decoded pixels and on JPEG pixels of equal bytes.

    python examples/classify_tokens.py PHOTOS [--quality 30] [--epochs 20]

PHOTOS has a folder for each class with pictures in it. Every picture is cut to a square, scaled to --side pixels, and
encoded once. Then three classifiers are trained that differ only in what they see at each position of 16 x 16 pixels:

    tokens   the codeword vectors of the .pqm file (`Codec.embed`); no picture is ever made
    pixels   the pixels of the decoded .pqm file
    jpeg     the pixels of a JPEG that has as many bytes, or the smallest JPEG there is if none is that small

Printed are the share of held-out pictures that each gets right, the seconds to read all training pictures once from
bytes to tensors, and the bytes of their files. For tokens that is the decoding of .pqm files; what `pqmim tokens
--shards` writes is read without it (docs/datasets.md).
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn

from pqmim.bitstream import parse
from pqmim.codec import Codec, load_codec

STRIDE = 16
JPEG_QUALITIES = range(1, 96)
SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
HELD_OUT = 5
"""Every fifth picture of a class is held out."""


@dataclass(frozen=True)
class Photos:
    """Pictures of a set, as files of both kinds.

    Attributes:
        pqm, jpeg: content of the files.
        labels: number of each one's class.
    """

    pqm: list[bytes]
    jpeg: list[bytes]
    labels: list[int]


@dataclass(frozen=True)
class Outcome:
    """What one form of the pictures led to.

    Attributes:
        accuracy: share of the held-out pictures that are classified rightly.
        seconds: to read the training pictures once.
        num_bytes: of their files.
    """

    accuracy: float
    seconds: float
    num_bytes: int


def jpeg_of_size(image: Image.Image, num_bytes: int) -> bytes:
    """The largest JPEG that is not above a size, or the smallest one there is."""

    def encoded(quality: int) -> bytes:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality, optimize=True)
        return file.getvalue()

    best = encoded(JPEG_QUALITIES[0])
    low, high = 0, len(JPEG_QUALITIES)
    while high - low > 1:
        middle = (low + high) // 2
        data = encoded(JPEG_QUALITIES[middle])
        low, high, best = (middle, high, data) if len(data) <= num_bytes else (low, middle, best)
    return best


def read_photos(folder: Path, codec: Codec, side: int, quality: float) -> tuple[list[str], Photos, Photos]:
    """Encode the pictures of all classes: names of the classes, pictures to train on, pictures to test with."""
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    train, test = Photos([], [], []), Photos([], [], [])
    for label, name in enumerate(classes):
        paths = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in SUFFIXES)
        for number, path in enumerate(paths):
            with Image.open(path) as opened:
                image = ImageOps.fit(ImageOps.exif_transpose(opened).convert("RGB"), (side, side))
            photos = test if number % HELD_OUT == HELD_OUT - 1 else train
            photos.pqm.append(codec.encode(image, quality=quality))
            photos.jpeg.append(jpeg_of_size(image, len(photos.pqm[-1])))
            photos.labels.append(label)
    if len(classes) < 2 or not (train.labels and test.labels):
        raise SystemExit(f"{folder} needs folders of at least two classes, with {HELD_OUT} pictures or more in each")
    return classes, train, test


def as_vectors(codec: Codec, data: bytes) -> NDArray[np.float32]:
    """A .pqm file as codeword vectors (D, h, w), whether it was coded in full size or smaller."""
    return codec.embed(codec.decode_tokens(data), parse(data).level)


def as_patches(image: Image.Image) -> NDArray[np.float32]:
    """The pixels of each position as its channels: (768, h, w), so that the classifier sees as many positions."""
    pixels = np.asarray(image.convert("RGB"), np.float32) / 127.5 - 1
    h, w = pixels.shape[0] // STRIDE, pixels.shape[1] // STRIDE
    patches = pixels[: h * STRIDE, : w * STRIDE].reshape(h, STRIDE, w, STRIDE, 3)
    return patches.transpose(1, 3, 4, 0, 2).reshape(-1, h, w)


def classifier(num_channels: int, num_classes: int, width: int = 64) -> nn.Module:
    """One and the same network for all forms but for the number of channels that it starts from."""
    return nn.Sequential(
        nn.BatchNorm2d(num_channels),
        nn.Conv2d(num_channels, width, 1),
        nn.GELU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, num_classes),
    )


def accuracy_of(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], num_classes: int, epochs: int) -> float:
    """Train a classifier and test it.

    Args:
        train, test: (N, channels, h, w) float32 and (N,) int64.
    """
    torch.manual_seed(0)
    model = classifier(train[0].shape[1], num_classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(train[0])).split(32):
            if len(batch) > 1:  # one picture has no variance
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(train[0][batch]), train[1][batch]).backward()
                optimizer.step()
    model.eval()
    with torch.no_grad():
        return float((model(test[0]).argmax(1) == test[1]).float().mean())


def compare(folder: Path, codec: Codec, *, side: int, quality: float, epochs: int) -> dict[str, Outcome]:
    """Train and test with each form of the pictures."""
    classes, train, test = read_photos(folder, codec, side, quality)

    def of_jpeg(data: bytes) -> NDArray[np.float32]:
        with Image.open(io.BytesIO(data)) as image:
            return as_patches(image)

    forms: dict[str, tuple[str, Callable[[bytes], NDArray[np.float32]]]] = {
        "tokens": ("pqm", lambda data: as_vectors(codec, data)),
        "pixels": ("pqm", lambda data: as_patches(codec.decode(data))),
        "jpeg": ("jpeg", of_jpeg),
    }
    outcomes = {}
    for name, (kind, read) in forms.items():
        files: dict[str, list[bytes]] = {"train": getattr(train, kind), "test": getattr(test, kind)}
        start = time.perf_counter()
        seen = torch.from_numpy(np.stack([read(data) for data in files["train"]]))
        seconds = time.perf_counter() - start
        held_out = torch.from_numpy(np.stack([read(data) for data in files["test"]]))
        accuracy = accuracy_of(
            (seen, torch.tensor(train.labels)), (held_out, torch.tensor(test.labels)), len(classes), epochs
        )
        outcomes[name] = Outcome(accuracy, seconds, sum(map(len, files["train"])))
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder with a folder for each class")
    parser.add_argument("--model", default="photo")
    parser.add_argument("--side", type=int, default=128, help="of the squares, a multiple of 16")
    parser.add_argument("--quality", type=float, default=30.0)
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    if arguments.side < STRIDE or arguments.side % STRIDE:
        parser.error(f"--side must be a multiple of {STRIDE}")
    outcomes = compare(
        arguments.photos,
        load_codec(arguments.model),
        side=arguments.side,
        quality=arguments.quality,
        epochs=arguments.epochs,
    )
    print(f"{'form':8}{'accuracy':>10}{'seconds to read':>18}{'bytes':>12}")
    for name, outcome in outcomes.items():
        print(f"{name:8}{outcome.accuracy:>10.3f}{outcome.seconds:>18.2f}{outcome.num_bytes:>12,}")


if __name__ == "__main__":
    main()
