"""Blind comparison: a page that shows pictures of two codecs at equal bytes, and the ratings that its answers give.

The page needs no network and keeps its answers to itself until they are saved as a file. `python -m
pqmim.evaluation.pairs FILE...` turns the files of all who looked into an Elo rating of each codec.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import combinations
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pqmim.errors import ConfigError
from pqmim.evaluation.dataset import find_images
from pqmim.evaluation.image_codecs import ImageCodec
from pqmim.evaluation.matching import SizeMatcher
from pqmim.evaluation.pages import lossless_uri, page_part
from pqmim.evaluation.pixel_metrics import Pixels
from pqmim.image_io import load_picture

MAX_SIDE = 768
"""Pixels per side that are shown; of larger pictures the middle."""
MEAN_ELO = 1500.0
PRIOR = 0.5
"""Wins given to both codecs of every pair that met, so that one which never lost has a finite rating."""
RESAMPLES = 500
CHOICES = ("left", "right", "tie")


@dataclass(frozen=True)
class PairsOptions:
    """What is compared.

    Attributes:
        dataset: folder of images, or one image.
        codecs: at least two, with different names.
        bpp: rates; all codecs code each picture to the same number of bytes, as near as their qualities allow.
        images: how many, spread over the data set; None = all.
        seed: of the order of the pairs and of their sides.
    """

    dataset: Path
    codecs: tuple[ImageCodec, ...]
    bpp: tuple[float, ...] = (0.1,)
    images: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Rating:
    """Elo of a codec with its 95 % bootstrap interval over answers, and the answers that it is from."""

    codec: str
    elo: float
    low: float
    high: float
    answers: int


def write_pairs(options: PairsOptions, page: Path) -> int:
    """Write the page.

    Returns:
        How many pairs it shows.

    Raises:
        ConfigError: fewer than two codecs, or there are no images.
        ImageError: an image cannot be read, or a codec fails on it.
    """
    content = pairs_content(options)
    # "<" is escaped so that no text in the data can end the script element.
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    html = Template(page_part("pairs.html")).substitute(
        title=escape(f"Which looks more like the original? {content['dataset']}"),
        style=page_part("page.css"),
        script=page_part("pairs.js"),
        data=data,
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(html, "utf-8")
    return len(content["pairs"])


def pairs_content(options: PairsOptions) -> dict[str, Any]:
    """Code the pictures and draw the order of the pairs.

    Returns:
        "codecs": names; "pictures": for each picture and rate the original and a version per codec, with bytes;
        "pairs": [index of a picture, codec on the left, codec on the right].

    Raises: as `write_pairs`.
    """
    names = [codec.name for codec in options.codecs]
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise ConfigError("a comparison takes two codecs or more, of different names")
    files = find_images(options.dataset)
    chosen = list(files)
    if options.images is not None and options.images < len(files):
        chosen = [chosen[round(i)] for i in np.linspace(0, len(files) - 1, options.images)]
    pictures = []
    for name in chosen:
        original = load_picture(files[name]).rgb
        height, width = original.shape[:2]
        matchers = [SizeMatcher(codec, Image.fromarray(original)) for codec in options.codecs]
        for bpp in options.bpp:
            target = max(1, round(bpp * width * height / 8))
            versions = []
            for codec, matcher in zip(options.codecs, matchers, strict=True):
                _, data = matcher.match(target)
                decoded = np.asarray(codec.decode(data).convert("RGB"))
                versions.append({"bytes": len(data), "source": lossless_uri(_middle(decoded))})
            pictures.append(
                {"name": name, "bpp": bpp, "original": lossless_uri(_middle(original)), "versions": versions}
            )
    return {
        "dataset": options.dataset.resolve().name,
        "seed": options.seed,
        "codecs": names,
        "pictures": pictures,
        "pairs": draw_pairs(len(pictures), len(names), options.seed),
    }


def draw_pairs(num_pictures: int, num_codecs: int, seed: int) -> list[tuple[int, int, int]]:
    """Every pair of codecs on every picture once, in random order, each on a random side.

    Returns:
        (picture, codec on the left, codec on the right), the same for the same seed.
    """
    draw = random.Random(seed)
    pairs = []
    for picture in range(num_pictures):
        for first, second in combinations(range(num_codecs), 2):
            left, right = (first, second) if draw.random() < 0.5 else (second, first)
            pairs.append((picture, left, right))
    draw.shuffle(pairs)
    return pairs


def ratings(answers: Sequence[Mapping[str, Any]]) -> list[Rating]:
    """Rate codecs by the answers of one or more people; best first, 1500 on average.

    Args:
        answers: each with "left" and "right", names of codecs, and "choice": "left", "right" or "tie".

    Source: Bradley and Terry 1952, Biometrika 39; ties are half a win each.
    """
    names = sorted({str(answer[side]) for answer in answers for side in ("left", "right")})
    index = {name: number for number, name in enumerate(names)}
    wins = np.zeros((len(answers), len(names), len(names)))
    for number, answer in enumerate(answers):
        left, right = index[answer["left"]], index[answer["right"]]
        share = {"left": 1.0, "right": 0.0, "tie": 0.5}[answer["choice"]]
        wins[number, left, right] += share
        wins[number, right, left] += 1 - share
    elo = elo_of(wins.sum(0))
    draws = np.random.default_rng(0).integers(0, len(answers), (RESAMPLES, len(answers)))
    low, high = np.percentile([elo_of(wins[draw].sum(0)) for draw in draws], (2.5, 97.5), axis=0)
    met = (wins + wins.transpose(0, 2, 1)).sum((0, 2))
    found = [Rating(name, float(elo[i]), float(low[i]), float(high[i]), round(met[i])) for i, name in enumerate(names)]
    return sorted(found, key=lambda rating: -rating.elo)


def elo_of(wins: NDArray[np.float64]) -> NDArray[np.float64]:
    """Elo ratings under the Bradley-Terry model.

    Args:
        wins: (n, n), how often row beat column.

    Returns:
        (n,), on average `MEAN_ELO`; 400 more mean ten wins to one.

    Source: Hunter 2004, Annals of Statistics 32, equation 3 (the iteration). Differs: see `PRIOR`.
    """
    met = wins + wins.T > 0
    wins = wins + PRIOR * met
    games, won = wins + wins.T, wins.sum(1)
    strength = np.ones(len(wins))
    for _ in range(2000):
        expected = (games / (strength[:, None] + strength[None, :])).sum(1)
        new = np.where(expected > 0, won / np.where(expected > 0, expected, 1), 1)
        new /= np.exp(np.log(new).mean())
        is_settled = bool(np.abs(np.log(new / strength)).max() < 1e-9)
        strength = new
        if is_settled:
            break
    result: NDArray[np.float64] = MEAN_ELO + 400 / math.log(10) * np.log(strength)
    return result


def read_answers(files: Iterable[Path]) -> list[dict[str, Any]]:
    """Read the files that the page saved.

    Raises:
        ConfigError: a file is not one of them.
    """
    answers: list[dict[str, Any]] = []
    for file in files:
        try:
            content = json.loads(file.read_text("utf-8"))["answers"]
            good = all(
                answer["choice"] in CHOICES and answer["left"] != answer["right"] and isinstance(answer["left"], str)
                for answer in content
            )
        except (OSError, ValueError, TypeError, KeyError):
            good = False
        if not good:
            raise ConfigError(f"{file}: not a file of answers that the page saved")
        answers += content
    if not answers:
        raise ConfigError("the files hold no answers")
    return answers


def ratings_table(found: Iterable[Rating]) -> str:
    """Ratings as Markdown."""
    lines = ["| codec | Elo | 95 % interval | comparisons |", "| --- | --- | --- | --- |"]
    lines += [f"| {r.codec} | {r.elo:.0f} | {r.low:.0f} to {r.high:.0f} | {r.answers} |" for r in found]
    return "\n".join(lines) + "\n"


def _middle(pixels: Pixels) -> Pixels:
    """What is shown of a picture."""
    height, width = pixels.shape[:2]
    top, left = max(0, height - MAX_SIDE) // 2, max(0, width - MAX_SIDE) // 2
    return pixels[top : top + MAX_SIDE, left : left + MAX_SIDE]


def main(arguments: Sequence[str]) -> int:
    """Print the ratings; the exit code is 2 where there are no arguments, 1 if a file cannot be used."""
    if not arguments:
        print("python -m pqmim.evaluation.pairs FILE...: answers that the page saved", file=sys.stderr)
        return 2
    try:
        print(ratings_table(ratings(read_answers(map(Path, arguments)))), end="")
    except ConfigError as error:
        print(f"pqmim: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
