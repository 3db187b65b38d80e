"""A token model and a decoder, ready to compute on this machine: quantizer, transforms and entropy model."""

from __future__ import annotations

import copy
from functools import cached_property

from pqmim.decoder_files import DecoderFile, check_fits
from pqmim.exact_entropy import ExactEntropyModel
from pqmim.model_files import ModelFile
from pqmim.quantizer import ProductQuantizer, check_quantizer_weights
from pqmim.runtime import Workers, default_threads, resolve_device
from pqmim.transforms import Transforms


class Networks:
    """What the two directions share.

    Args:
        model: from `model_files.load_model`.
        decoder: from `decoder_files.load_decoder`.
        device: "auto", "cpu" or "cuda", where the networks run.
        kernel: how the entropy model multiplies, one of `entropy_kernels.KERNELS`; None = the fastest that is exact.
        threads: to work with, at least 1; None = `runtime.default_threads`.

    Raises:
        ConfigError: the device or the kernel is not there.
        ModelError: the decoder is for another token model; a weight is missing or out of bounds, or the graphs of a
            file cannot be used.
    """

    def __init__(
        self, model: ModelFile, decoder: DecoderFile, device: str, *, kernel: str | None, threads: int | None
    ) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        check_fits(decoder, model)
        self.name = model.name
        self.model_id = model.model_id
        self.device = resolve_device(device)
        self._model, self._decoder = model, decoder
        workers = Workers(threads or default_threads())
        self._quality = model.config.quality
        check_quantizer_weights(model.tensors, model.config.tokenizer)
        self.quantizer = ProductQuantizer(model.tensors, workers)
        self._threads = workers.threads
        self.transforms = Transforms(model, decoder, threads=self._threads, device=self.device)
        self.entropy_model = ExactEntropyModel(model, workers, kernel=kernel, device=self.device)

    def w(self, quality: float) -> float:
        """Trade-off to ask for at a quality, squared latent units per bit."""
        return self._quality.w(quality)

    @cached_property
    def faithful(self) -> Networks:
        """The same with the faithful decoder that this one was made from; these ones, if it was made from none."""
        decoder = self._decoder.faithful_decoder
        if decoder is None:
            return self
        other = copy.copy(self)
        other._decoder = decoder
        other.transforms = Transforms(self._model, decoder, threads=self._threads, device=self.device)
        return other
