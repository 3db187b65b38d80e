"""Ablation: what each part of a model is worth, as one table.

A row is a variant of a model at one quality: PSNR, the measured rate, and the bits that the same tokens would
take under other models of their probabilities.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image
from rich.progress import track

from pqmim.bitstream import parse
from pqmim.codec import Codec
from pqmim.config import QualityRange
from pqmim.decoder_files import find_decoder, load_decoder
from pqmim.errors import MissingExtraError
from pqmim.evaluation.dataset import find_images
from pqmim.evaluation.pixel_metrics import psnr_rgb
from pqmim.image_io import load_picture
from pqmim.model_files import FLOAT_MODEL, ModelFile, find_model, load_model
from pqmim.quantizer import Tokens
from pqmim.schedule import NUM_QUINCUNX_STEPS

if TYPE_CHECKING:
    from pqmim.training.entropy_model import EntropyModel

FILE, PSNR = "file", "psnr-rgb"
UNIFORM, STATIC, FLOAT, EXACT, PAYLOAD = "uniform", "static", "masked-float", "masked-exact", "payload"
COMPARISONS = ((STATIC, UNIFORM), (EXACT, STATIC), (EXACT, FLOAT), (PAYLOAD, EXACT))
"""Which rate is told against which, where a variant has both."""
NEAREST_W = 1e-6
"""Squared latent units per bit so small that only the distance counts."""


class AblationCodec(Protocol):
    """A variant of a model that can say where its bits go: as shipped, nearest codewords, other steps."""

    @property
    def name(self) -> str:
        """First column of its rows."""

    @property
    def qualities(self) -> tuple[float, ...] | None:
        """Qualities that make a difference to this variant; None = those of the options."""

    def price(self, image: Image.Image, quality: float) -> Mapping[str, float]:
        """Code one RGB image and price its tokens.

        Returns:
            "psnr-rgb": of the reconstruction, dB.
            "file": bits of the whole file.
            Every other key is a way to code the tokens, with its bits: "uniform" (log2 K each), "static"
            (frequencies per sub-quantizer), "masked-float" (the trained network), "masked-exact" (the
            integers that are coded with), "payload" (what the range coder wrote), or any other name.
        """


class FloatNetwork:
    """The masked model as it was trained, in float32: what the integers are compared with.

    Args:
        network: in eval mode.
    """

    def __init__(self, network: EntropyModel) -> None:
        self._network = network

    @classmethod
    def load(cls, model: ModelFile, path: Path, weights: Path) -> FloatNetwork:
        """Read the weights that lie beside a model file.

        Args:
            path: of the model file.

        Raises:
            MissingExtraError: PyTorch is not installed.
        """
        try:
            import torch
        except ImportError as error:
            raise MissingExtraError("torch", "train") from error
        from pqmim.training.checkpoints import load_tokenizer
        from pqmim.training.entropy_model import EntropyModel

        tokenizer, _ = load_tokenizer(path)
        network = EntropyModel.for_quantizer(model.config.entropy, tokenizer.quantizer)
        network.load_state_dict(torch.load(weights, weights_only=True))
        return cls(network.eval())

    def bits(self, tokens: Tokens, level: int) -> float:
        """Ideal code length of a token grid (M, h, w), bits."""
        import torch

        return float(self._network.schedule_bits(torch.from_numpy(tokens)[None], torch.tensor([level])).sum())


@dataclass(frozen=True)
class ModelVariant:
    """A pqmim model, as it is or changed in one thing.

    Attributes:
        float_network: the trained network before it became integers, if there.
    """

    name: str
    codec: Codec
    float_network: FloatNetwork | None = None
    qualities: tuple[float, ...] | None = None

    def price(self, image: Image.Image, quality: float) -> Mapping[str, float]:
        data, bits = self.codec.encode_with_rates(image, quality=quality)
        prices = {
            PSNR: psnr_rgb(np.asarray(image), np.asarray(self.codec.decode(data))),
            FILE: bits.file,
            UNIFORM: bits.uniform,
            STATIC: bits.static,
            EXACT: bits.exact,
            PAYLOAD: bits.payload,
        }
        if self.float_network is not None:
            prices[FLOAT] = self.float_network.bits(self.codec.decode_tokens(data), parse(data).level)
        return prices


def variants_of(model: str, device: str) -> tuple[ModelVariant, ...]:
    """A model as it is, with nearest codewords instead of entropy-constrained choice, and with other schedules.

    The float network is compared where its weights lie beside the model file, that is in a run folder.

    Args:
        model: name of a shipped model, model file or run folder.

    Raises:
        ModelError: no such model.
        MissingExtraError: there are weights of the float network, and PyTorch is not installed.
    """
    path = find_model(model)
    loaded = load_model(path)
    config, entropy = loaded.config, loaded.config.entropy
    num_groups = len(entropy.group_steps)
    float_weights = path.parent / FLOAT_MODEL
    float_network = FloatNetwork.load(loaded, path, float_weights) if float_weights.exists() else None
    decoder = load_decoder(find_decoder(None, path))
    variants = [ModelVariant(loaded.name, Codec(loaded, decoder, device), float_network)]
    for count in (1, 2, NUM_QUINCUNX_STEPS):
        other_steps = replace(entropy, group_steps=(count,) * num_groups)
        codec = Codec(replace(loaded, config=replace(config, entropy=other_steps)), decoder, device)
        variants.append(ModelVariant(f"{loaded.name}, {count * num_groups} steps", codec))
    distance_alone = replace(config, quality=QualityRange(w_at_0=NEAREST_W, w_at_100=NEAREST_W))
    nearest = Codec(replace(loaded, config=distance_alone), decoder, device)
    variants.append(ModelVariant(f"{loaded.name}, nearest codeword", nearest, qualities=(100.0,)))
    return tuple(variants)


@dataclass(frozen=True)
class AblationOptions:
    """What to take apart.

    Attributes:
        dataset: folder of images, or one image.
        output: folder for `ablation.json`, `ablation.csv` and `ablation.md`.
        codecs: variants, see `variants_of`.
        is_quiet: no progress bar.
    """

    dataset: Path
    output: Path
    codecs: tuple[AblationCodec, ...]
    qualities: tuple[float, ...] = (25.0, 50.0, 75.0)
    is_quiet: bool = False


@dataclass(frozen=True)
class AblationRow:
    """Means over the images.

    Attributes:
        psnr_rgb: dB.
        bpp: measured, of whole files.
        bpp_parts: way to code the tokens -> bits per pixel; estimates, but for "payload".
    """

    variant: str
    quality: float
    psnr_rgb: float
    bpp: float
    bpp_parts: Mapping[str, float]

    def change(self, way: str, baseline: str) -> float | None:
        """Difference between two ways to code the tokens, percent; negative is a saving, None is unknown."""
        if way not in self.bpp_parts or baseline not in self.bpp_parts:
            return None
        return 100 * (self.bpp_parts[way] / self.bpp_parts[baseline] - 1)


def run_ablation(options: AblationOptions) -> tuple[AblationRow, ...]:
    """Fill the table and write it.

    Raises:
        ConfigError: no images.
        ImageError: an image cannot be read.
    """
    images = [Image.fromarray(load_picture(file).rgb) for file in find_images(options.dataset).values()]
    settings = [(codec, quality) for codec in options.codecs for quality in codec.qualities or options.qualities]
    rows = []
    for codec, quality in track(settings, "ablation", disable=options.is_quiet):
        prices = [codec.price(image, quality) for image in images]
        bpp = {
            key: _mean([price[key] / (i.width * i.height) for price, i in zip(prices, images, strict=True)])
            for key in prices[0]
            if key != PSNR
        }
        file_bpp = bpp.pop(FILE)
        psnr = _mean([price[PSNR] for price in prices])
        rows.append(AblationRow(codec.name, quality, psnr, file_bpp, bpp))
    _write(options.output, rows)
    return tuple(rows)


def ablation_table(rows: Sequence[AblationRow]) -> str:
    """Return the table as Markdown."""
    ways = list(dict.fromkeys(way for row in rows for way in row.bpp_parts))
    comparisons = [pair for pair in COMPARISONS if any(row.change(*pair) is not None for row in rows)]
    header = ["variant", "quality", "PSNR (dB)", "bpp of files"]
    header += [f"{way} (bpp)" if way == PAYLOAD else f"{way} (est. bpp)" for way in ways]
    header += [f"{way} vs {baseline}" for way, baseline in comparisons]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        cells = [row.variant, f"{row.quality:g}", f"{row.psnr_rgb:.2f}", f"{row.bpp:.4f}"]
        cells += [f"{row.bpp_parts[way]:.4f}" if way in row.bpp_parts else "" for way in ways]
        changes = [row.change(*pair) for pair in comparisons]
        cells += ["" if change is None else f"{change:+.2f} %" for change in changes]
        lines.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _write(folder: Path, rows: Sequence[AblationRow]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content: list[dict[str, Any]] = [
        {
            "variant": row.variant,
            "quality": row.quality,
            "psnr-rgb": row.psnr_rgb,
            "bpp": row.bpp,
            **{f"bpp {way}": value for way, value in row.bpp_parts.items()},
        }
        for row in rows
    ]
    (folder / "ablation.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    (folder / "ablation.md").write_text(ablation_table(rows), "utf-8")
    with (folder / "ablation.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in content for key in row)))
        writer.writeheader()
        writer.writerows(content)
