"""How evenly sizes grow with quality: bytes of every picture at every whole quality.

    python benchmarks/quality_steps.py DATASET [-m MODEL] [--decoder fine] [--effort 1] [--images N]

Prints for each picture the largest growth and the largest fall of the file from one whole quality to the next, and at
which quality; then those of all pictures, and the mean growth.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pqmim.codec import load_codec
from pqmim.evaluation.dataset import find_images
from pqmim.image_io import load_picture
from pqmim.options import EncodeOptions


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="folder of images")
    parser.add_argument("-m", "--model", default="photo")
    parser.add_argument("--decoder", default="fine")
    parser.add_argument("--effort", type=int, default=1)
    parser.add_argument("--images", type=int, metavar="N", help="only the first N")
    options = parser.parse_args(arguments)
    codec, choice = load_codec(options.model, options.decoder), EncodeOptions(effort=options.effort)
    steps = []
    for name, file in list(find_images(options.dataset).items())[: options.images]:
        pixels = load_picture(file).rgb
        sizes = [len(codec.encode(pixels, quality=quality, options=choice)) for quality in range(101)]
        steps.append(np.diff(sizes) / sizes[:-1])
        rise, fall = int(steps[-1].argmax()), int(steps[-1].argmin())
        print(
            f"{name}: {sizes[0]:,} to {sizes[-1]:,} B; at most {steps[-1][rise]:+.1%} ({rise} to {rise + 1}), "
            f"at least {steps[-1][fall]:+.1%} ({fall} to {fall + 1})",
            flush=True,
        )
    print(f"all: at most {np.max(steps):+.1%}, at least {np.min(steps):+.1%}, on average {np.mean(steps):+.1%}")


if __name__ == "__main__":
    main()
