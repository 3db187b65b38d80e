"""Metrics by trained networks, through torchmetrics: LPIPS and DISTS of a pair of images, FID and KID of whole sets.

Weights are files that the user names; nothing is downloaded. Everything here needs the extra `perceptual`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pqmim.evaluation.pixel_metrics import Pixels, to_batch

if TYPE_CHECKING:
    from torch import Tensor, nn

HIFIC_PATCH = 256  # pixels per side
# What torchmetrics and torch-fidelity look for in torch's hub folder.
WEIGHT_FILES = {
    "lpips": "checkpoints/alexnet-owt-7be5be79.pth",
    "dists": "checkpoints/vgg16-397923af.pth",
    "fid256": "checkpoints/weights-inception-2015-12-05-6726825d.pth",
    "kid256": "checkpoints/weights-inception-2015-12-05-6726825d.pth",
}


def perceptual_distance(network: Callable[[Tensor, Tensor], Tensor], original: Pixels, decoded: Pixels) -> float:
    """Run a two-image network.

    Args:
        network: (1, 3, H, W) float32 in [0, 1], twice -> one number.
    """
    import torch

    with torch.no_grad():
        return float(network(to_batch(original).float() / 255, to_batch(decoded).float() / 255))


@lru_cache(maxsize=4)
def load_perceptual_network(key: str, weights: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """Load LPIPS or DISTS as torchmetrics builds them, with the user's weights and no download.

    Args:
        weights: see `check_weights`, which has passed.
    """
    metric: Callable[[Tensor, Tensor], Tensor]
    with _hub_folder(weights):
        if key == "lpips":
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
        else:
            from torchmetrics.image.dists import DeepImageStructureAndTextureSimilarity

            metric = DeepImageStructureAndTextureSimilarity()
    return metric  # called with two images, it returns the distance of these two


@lru_cache(maxsize=1)
def load_inception(weights: Path) -> nn.Module:
    """Load torch-fidelity's Inception v3 (the network of the original FID) from the user's file.

    Returns:
        (n, 3, H, W) uint8 -> (n, 2048) float32.
    """
    from torchmetrics.image.fid import NoTrainInceptionV3

    return NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights / WEIGHT_FILES["fid256"]))


def hific_patches(pixels: Pixels, size: int = HIFIC_PATCH) -> Iterator[Pixels]:
    """Cut an image into patches as HiFiC does for FID and KID.

    All whole patches of the grid at the origin, then those of the grid shifted by half a patch both ways.
    Source: Mentzer et al. 2020, arXiv:2006.09965, appendix A.7. An image smaller than a patch gives none.
    """
    for start in (0, size // 2):
        for top in range(start, pixels.shape[0] - size + 1, size):
            for left in range(start, pixels.shape[1] - size + 1, size):
                yield pixels[top : top + size, left : left + size]


def set_distances(
    pairs: Iterable[tuple[Pixels, Pixels]], keys: Sequence[str], features: nn.Module
) -> Mapping[str, float | None]:
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


@contextmanager
def _hub_folder(folder: Path) -> Iterator[None]:
    """Let torch find weights in the user's folder for a while."""
    import torch

    before = torch.hub.get_dir()
    torch.hub.set_dir(str(folder))
    try:
        yield
    finally:
        torch.hub.set_dir(before)
