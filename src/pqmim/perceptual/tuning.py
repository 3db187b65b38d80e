"""What `Tune.VIVID` needs, found and loaded: the decoder `vivid` and a judge of its pictures. No PyTorch until then."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import TYPE_CHECKING

from pqmim.decoder_files import find_decoder
from pqmim.errors import ConfigError, MissingExtraError, ModelError
from pqmim.model_files import find_model
from pqmim.perceptual.packages import EFFICIENTNET_LITE0, require

if TYPE_CHECKING:
    from pqmim.distortion import DistortionOf

VIVID = "vivid"
"""The decoder that pictures are encoded for unless another one is named."""


def require_vivid(model: str | os.PathLike[str], decoder: str | os.PathLike[str] | None = None) -> None:
    """Find out whether pictures can be encoded with `Tune.VIVID`.

    Args:
        model, decoder: as `codec.load_codec` takes them, but that None is the decoder `vivid`.

    Raises:
        ConfigError: the decoder or a package is not there; says all that is missing.
        ModelError: no such model.
    """
    missing = []
    path = find_model(model)
    try:
        find_decoder(VIVID if decoder is None else decoder, path)
    except ModelError as error:
        missing.append(f"the decoder {error}")
    try:
        if importlib.util.find_spec("torch") is None:
            raise MissingExtraError("torch", "perceptual")
        require(EFFICIENTNET_LITE0)
    except MissingExtraError as error:
        missing.append(str(error))
    if missing:
        wants = f"tune vivid needs the decoder {VIVID} and the packages of pqmim[perceptual]"
        raise ConfigError(f"{wants}: {'; '.join(missing)}")


@cache
def vivid_judge(threads: int | None = None) -> DistortionOf:
    """Load, at the first call, what a search with `Tune.VIVID` judges decoded pictures by.

    Args:
        threads: of PyTorch in this process; None leaves them alone.

    Raises:
        MissingExtraError: PyTorch or the package with the network's weights is not installed.
    """
    if importlib.util.find_spec("torch") is None:
        raise MissingExtraError("torch", "perceptual")
    import torch

    from pqmim.perceptual.features import FeatureErrors

    if threads is not None:
        torch.set_num_threads(threads)
    return FeatureErrors()
