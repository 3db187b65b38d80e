"""What the Python package reads of payloads with ragged models, and the latents it makes of them; the models as the
page has them. It needs the package onnx."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from codec.exact_model import RUNS, SIZES, model_file
from numpy.typing import NDArray

from pqmim.alphabets import Alphabets
from pqmim.exact_entropy import ExactEntropyModel
from pqmim.fill import expected_latent
from pqmim.model_files import MODEL_FILE, QUANTIZER_PREFIX, ModelFile, load_model
from pqmim.quantizer import ProductQuantizer
from pqmim.range_coding import PrefixReader, TokenWriter
from pqmim.runtime import Workers
from pqmim.token_coding import GivenTokens, TokenGrid, code_tokens

Case = dict[str, Any]
WEIGHTS_SCRIPT = Path(__file__).resolve().parents[2] / "web" / "scripts" / "make_weights.py"
GRIDS = ((13, 10), (3, 2), (1, 1))
KEPT = (0.0, 0.15, 0.5, 0.9)
"""Shares of payloads that are read as those of partial files, besides the whole."""


def weights_script() -> ModuleType:
    """web/scripts/make_weights.py."""
    spec = importlib.util.spec_from_file_location("make_weights", WEIGHTS_SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def network_cases(tiny_model: Path, folder: Path) -> list[Case]:
    """Cases by model, whose weights for the page are written to a folder."""
    script, cases = weights_script(), []
    for model in (formula_model(), load_model(tiny_model / MODEL_FILE)):
        path = folder / f"{model.name}.pqmw"
        path.write_bytes(script.web_model(model, ["qgemm"]))
        entropy_model = ExactEntropyModel(model, Workers(1))
        num_steps = [len(entropy_model.steps(level)) for level in range(entropy_model.alphabets.num_levels)]
        facts = {"name": model.name, "weights": str(path), "numSteps": num_steps}
        cases.append({**facts, "reads": list(reads(model, entropy_model))})
    return cases


def formula_model() -> ModelFile:
    """The formula model of the tests of exact arithmetic, with scales that differ, with codebooks, and with two latent
    channels that are dropped."""
    rng, model = np.random.default_rng(0), model_file()
    num_kept, num_levels = RUNS[-1].stop, len(SIZES)
    alphabets = Alphabets.of(model.tensors)
    quantizer = {
        "order": rng.permutation(num_kept + 2)[:num_kept],
        "codebook": rng.normal(size=alphabets.num_values),
        "default": rng.normal(size=num_kept + 2),
        "prior_logits": np.zeros(alphabets.num_codewords),
        "level_range": np.arange(num_levels)[:, None] + [-0.6, 0.6],
    }
    tensors = {
        QUANTIZER_PREFIX + name: tensor if name == "order" else tensor.astype(np.float16)
        for name, tensor in quantizer.items()
    }
    scale = rng.uniform(0.01, 0.05, (num_levels, len(RUNS)))
    tensors["entropy.token_factors.scale"] = scale.astype(np.float32)
    tokenizer = model.config.tokenizer
    analysis = replace(tokenizer.analysis, latent_channels=num_kept + 2)
    config = replace(model.config, tokenizer=replace(tokenizer, analysis=analysis))
    return replace(model, tensors=model.tensors | tensors, config=config)


def reads(model: ModelFile, entropy_model: ExactEntropyModel) -> Iterator[Case]:
    """Payloads at all levels, whole and cut, what is read of them, and the latent that it stands for."""
    rng, quantizer = np.random.default_rng(1), ProductQuantizer(model.tensors, Workers(1))
    for level, sizes in enumerate(entropy_model.alphabets.sizes):
        for height, width in GRIDS:
            tokens = rng.integers(0, sizes[:, None, None], (len(sizes), height, width))
            writer = TokenWriter()
            grid = code_tokens(entropy_model, writer, height, width, level, GivenTokens(tokens))
            assert grid.is_complete
            payload = writer.finish()
            facts = {"height": height, "width": width, "level": level}

            def read(payload: bytes, grid: TokenGrid, is_partial: bool, facts: Case = facts) -> Case:
                latent = expected_latent(entropy_model, quantizer, grid, facts["level"])
                found = {"tokens": flat(grid.tokens), "known": flat(grid.known.astype(int)), "latent": flat(latent)}
                return {**facts, "payload": payload.hex(), "isPartial": is_partial, **found}

            yield read(payload, grid, False)
            for share in KEPT:
                cut = payload[: int(share * len(payload))]
                known = code_tokens(entropy_model, PrefixReader(cut), height, width, level)
                yield read(cut, known, True)


def flat(array: NDArray[Any]) -> list[Any]:
    values: list[Any] = array.ravel().tolist()
    return values
