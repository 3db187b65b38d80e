"""Metrics by trained networks: distances of a pair of pictures, and of whole sets, cut into patches.

LPIPS, DISTS and KID by small networks take their weights from installed packages, see `pqmim.perceptual`. FID and KID
by Inception v3, as published, take a file that the user names. Nothing is downloaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pqmim.evaluation.kid import Estimate, kernel_distance
from pqmim.evaluation.pixel_metrics import Pixels, to_batch

if TYPE_CHECKING:
    from torch import Tensor, nn

HIFIC_PATCH = 256  # pixels per side
INCEPTION_FILE = "checkpoints/weights-inception-2015-12-05-6726825d.pth"
"""Where in the user's folder of weights: as torch-fidelity lays it into torch's hub folder."""
_PATCHES_AT_ONCE = 8
Network = TypeVar("Network", bound="nn.Module")


def perceptual_distance(network: Callable[[Tensor, Tensor], Tensor], original: Pixels, decoded: Pixels) -> float:
    """Run a two-image network.

    Args:
        network: (1, 3, H, W) float32 in [0, 1], twice -> one number.
    """
    import torch

    with torch.no_grad():
        return float(network(*(_unit_batch([pixels]) for pixels in (original, decoded))))


@lru_cache(maxsize=4)
def load_distance(key: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Load the network of `lpips-alex`, `lpips-vgg` or `dists`.

    Raises:
        MissingExtraError: the package of its weights is not installed.
    """
    from pqmim.perceptual.dists import load_dists
    from pqmim.perceptual.lpips import load_lpips

    network: nn.Module = load_dists() if key == "dists" else load_lpips(key.removeprefix("lpips-"))
    return _for_pictures(network)


@lru_cache(maxsize=4)
def load_pooled(key: str) -> Callable[[Tensor], Tensor]:
    """Load the features of `kid-lite0`, `kid-alex` or `kid-vgg`: (n, 3, H, W) float32 in [0, 1] -> (n, d).

    Raises:
        MissingExtraError: the package of the network's weights is not installed.
    """
    from pqmim.perceptual.backbones import load_backbone
    from pqmim.perceptual.efficientnet import load_efficientnet_lite0

    name = key.removeprefix("kid-")
    if name == "lite0":
        return _for_pictures(load_efficientnet_lite0()).pooled
    return _for_pictures(load_backbone(name)).pooled


def hific_patches(pixels: Pixels, size: int = HIFIC_PATCH) -> Iterator[Pixels]:
    """Cut an image into patches as HiFiC does for FID and KID.

    All whole patches of the grid at the origin, then those of the grid shifted by half a patch both ways.
    Source: Mentzer et al. 2020, arXiv:2006.09965, appendix A.7. An image smaller than a patch gives none.
    """
    for start in (0, size // 2):
        for top in range(start, pixels.shape[0] - size + 1, size):
            for left in range(start, pixels.shape[1] - size + 1, size):
                yield pixels[top : top + size, left : left + size]


def pooled_features(pooled: Callable[[Tensor], Tensor], patches: Sequence[Pixels]) -> NDArray[np.float32]:
    """Run a network of `load_pooled` over patches of one size -> (number, d)."""
    import torch

    rows = []
    with torch.no_grad():
        for start in range(0, len(patches), _PATCHES_AT_ONCE):
            rows.append(pooled(_unit_batch(patches[start : start + _PATCHES_AT_ONCE])).numpy())
    return np.concatenate(rows)


def kernel_distances(
    pairs: Iterable[tuple[Pixels, Pixels]], networks: Mapping[str, Callable[[Tensor], Tensor]]
) -> tuple[dict[str, Estimate | None], int]:
    """Compute KID of reconstructions against originals over HiFiC's patches.

    Args:
        pairs: originals and their reconstructions.
        networks: metric key -> see `load_pooled`.

    Returns:
        A distance per key, None if fewer than two pictures hold a patch; the number of patches.
    """
    features: dict[str, tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]]]
    features = {key: ([], []) for key in networks}
    pictures: list[int] = []
    for index, pair in enumerate(pairs):
        originals, others = (list(hific_patches(pixels)) for pixels in pair)
        pictures += [index] * len(originals)
        if originals:
            for key, network in networks.items():
                features[key][0].append(pooled_features(network, originals))
                features[key][1].append(pooled_features(network, others))
    return {
        key: kernel_distance(np.concatenate(x), np.concatenate(y), pictures) if x else None
        for key, (x, y) in features.items()
    }, len(pictures)


@lru_cache(maxsize=1)
def load_inception(weights: Path) -> nn.Module:
    """Load torch-fidelity's Inception v3 (the network of the original FID) from the user's file.

    Returns:
        (n, 3, H, W) uint8 -> (n, 2048) float32.
    """
    from torchmetrics.image.fid import NoTrainInceptionV3

    return NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights / INCEPTION_FILE))


def inception_distances(
    pairs: Iterable[tuple[Pixels, Pixels]], keys: Sequence[str], features: nn.Module
) -> dict[str, float | None]:
    """Compute FID/256 and KID/256 of reconstructions against originals.

    Args:
        pairs: originals and their reconstructions.
        keys: of the metrics wanted.
        features: (n, 3, 256, 256) uint8 -> (n, d) float32, see `load_inception`.

    Returns:
        A value per key; None if there are fewer than two patches. FID of a few hundred patches is biased
        upwards: compare codecs by it on the same images only.
    """
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    patch_pairs = [
        patch_pair
        for original, decoded in pairs
        for patch_pair in zip(hific_patches(original), hific_patches(decoded), strict=True)
    ]
    if len(patch_pairs) < 2:
        return dict.fromkeys(keys)
    distances: dict[str, float | None] = {}
    for key in keys:
        if key == "fid256":
            metric: Any = FrechetInceptionDistance(feature=features)
        else:
            # HiFiC's subsets of 1000 do not exist in a small data set: then all patches are the one subset.
            subset = min(1000, len(patch_pairs))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save")
                metric = KernelInceptionDistance(feature=features, subset_size=subset)
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            torch.manual_seed(0)  # KID draws its subsets
            for original, decoded in patch_pairs:
                metric.update(to_batch(original), real=True)
                metric.update(to_batch(decoded), real=False)
            value = metric.compute()
        distances[key] = float(value if key == "fid256" else value[0])
    return distances


def _unit_batch(pictures: Sequence[Pixels]) -> Tensor:
    """Pictures of one size -> (n, 3, H, W) float32 in [0, 1], in the layout that convolutions are fastest in."""
    import torch

    batch = torch.cat([to_batch(pixels) for pixels in pictures]).float() / 255
    return batch.contiguous(memory_format=torch.channels_last)


def _for_pictures(network: Network) -> Network:
    """The network in the layout of `_unit_batch`."""
    import torch

    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's own stub lacks it
    return network
