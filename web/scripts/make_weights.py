"""Make the weights that the page loads from token models and decoders of pqmim.

    python web/scripts/make_weights.py [MODEL...] [--kernels KERNEL...]

A model is the name of a shipped token model or a path; without any, all shipped ones. Its decoders are those that lie
beside it. What decoding does not need is left out, what is needed is written to web/dist/weights, MODEL.pqmw and
MODEL-DECODER.pqmw: safetensors, compressed with gzip, with the answers of NumPy to known questions, by which the page
sees that its arithmetic is exact. web/src/models.ts then names them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import safetensors.numpy
from numpy.typing import NDArray

from pqmim.alphabets import Alphabets
from pqmim.decoder_files import DecoderFile, decoders_beside, load_decoder
from pqmim.entropy_kernels import ZERO
from pqmim.entropy_weights import check_entropy_weights
from pqmim.exact_numpy import NumpyParts
from pqmim.fixed_point import RESIDUAL_MAX
from pqmim.grid_plan import OUTSIDE
from pqmim.model_files import QUANTIZER_PREFIX, Graph, ModelFile, find_model, load_model, shipped_models
from pqmim.quantizer import check_quantizer_weights

WEB = Path(__file__).resolve().parent.parent
FORMAT = "pqmim web model 3"
KERNELS = ("qgemm", "float32")
"""In the order in which the page tries them."""
NOT_NEEDED = (
    "tokenizer.analysis.",
    *(f"{QUANTIZER_PREFIX}{name}" for name in ("prior_logits", "level_range")),
)
NUM_ROWS = 5
"""Rows of the known question, where a part has no windows."""

Arrays = dict[str, NDArray[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="name of a shipped model, or a path")
    parser.add_argument("--kernels", nargs="+", default=KERNELS, metavar="KERNEL", help="that the page tries, in order")
    options = parser.parse_args()
    names = options.models or [model.name for model in shipped_models()]
    folder = WEB / "dist" / "weights"
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for name in names:
        path = find_model(name)
        model = load_model(path)
        entry = write_weights(folder, model.name, model.name, model.model_id, web_model(model, options.kernels))
        decoders = []
        for found in decoders_beside(path):
            if found.faithful is not None:  # such a file is no use without another one
                continue
            decoder = load_decoder(found.path)
            file = f"{model.name}-{decoder.name}"
            decoders.append(write_weights(folder, file, decoder.name, decoder.decoder_id, web_decoder(decoder)))
        entries.append(
            f"  {{ {entry}, decoders: [\n" + "".join(f"    {{ {text} }},\n" for text in decoders) + "  ] },\n"
        )
    (WEB / "src" / "models.ts").write_text(
        "/** Written by scripts/make_weights.py. */\n\n"
        'import type { ModelSource } from "./weights.js";\n\n'
        f"export const SHIPPED_MODELS: readonly ModelSource[] = [\n{''.join(entries)}];\n"
    )


def write_weights(folder: Path, file: str, name: str, identity: bytes, content: bytes) -> str:
    """Write a file; returns what models.ts says of it."""
    compressed = gzip.compress(content, 9, mtime=0)
    (folder / f"{file}.pqmw").write_bytes(compressed)
    print(f"{file}.pqmw  {len(content):,} B, {len(compressed):,} B with gzip")
    url = f'new URL("./weights/{file}.pqmw", import.meta.url).href'
    facts = {"name": f'"{name}"', "id": f'"{identity.hex()}"', "url": url, "bytes": len(compressed)}
    return ", ".join(f"{key}: {value}" for key, value in (facts | {"crc32": zlib.crc32(compressed)}).items())


def web_decoder(decoder: DecoderFile) -> bytes:
    """What the page needs of a decoder, as safetensors."""
    graphs = {"synthesis": decoder.graphs["synthesis"]}
    metadata = {
        "format": FORMAT,
        "name": decoder.name,
        "model_id": decoder.token_model.hex(),
        "config": {"margin": decoder.config.margin},
        "graphs": placed(graphs),
    }
    return saved(dict(decoder.tensors), graphs, metadata)


def saved(tensors: Arrays, graphs: dict[str, Graph], metadata: dict[str, Any]) -> bytes:
    tensors = tensors | {f"graph.{name}": np.frombuffer(graph.model, np.uint8) for name, graph in graphs.items()}
    return safetensors.numpy.save(tensors, {"pqmim": json.dumps(metadata, separators=(",", ":"))})


def placed(graphs: dict[str, Graph]) -> dict[str, list[tuple[str, int]]]:
    """Tensors of each graph, and where it expects them in its external data, bytes."""
    return {
        name: [(graph.weights[weight], offset) for weight, offset in offsets(graph.model).items()]
        for name, graph in graphs.items()
    }


def web_model(model: ModelFile, kernels: Sequence[str]) -> bytes:
    """What the page needs of a token model, as safetensors.

    Raises:
        ModelError: a weight is missing or out of bounds.
    """
    config = model.config
    check_quantizer_weights(model.tensors, config.tokenizer)
    check_entropy_weights(model.tensors, config.entropy, Alphabets.of(model.tensors))
    needed = {"embed", "frequencies", *kernels}
    graphs = {name: graph for name, graph in model.graphs.items() if name.partition("/")[0] in needed}
    tensors: Arrays = {name: tensor for name, tensor in model.tensors.items() if not name.startswith(NOT_NEEDED)}
    question = known_question(model)
    tensors |= {f"question.{name}": tensor for name, tensor in question.items()}
    metadata = {
        "format": FORMAT,
        "name": model.name,
        "model_id": model.model_id.hex(),
        "config": config.entropy.as_dict(),
        "kernels": kernels,
        "graphs": placed(graphs),
        "answers": dict(known_answers(model, question)),
    }
    return saved(tensors, graphs, metadata)


def offsets(graph: bytes) -> dict[str, int]:
    """Where a graph expects its weights in its external data, bytes."""
    external = (
        (tensor.name, {entry.key: entry.value for entry in tensor.external_data})
        for tensor in onnx.load_from_string(graph).graph.initializer
    )
    return {name: int(where["offset"]) for name, where in external if where}


def known_question(model: ModelFile) -> Arrays:
    """Inputs for the parts of the network, with extreme operands among them."""
    rng = np.random.default_rng(0)
    config = model.config.entropy
    num_keys = config.window**2
    x = rng.integers(ZERO - 127, ZERO + 128, (num_keys, config.width)).astype(np.uint8)
    x[::3] = np.where(x[::3] < ZERO, ZERO - 127, ZERO + 127)
    x[0], x[1] = ZERO + 127, ZERO - 127
    h = rng.integers(-2000, 2000, (NUM_ROWS, config.width)).astype(np.float32)
    h[0] = rng.integers(-RESIDUAL_MAX, RESIDUAL_MAX, config.width)
    kv = rng.integers(ZERO - 127, ZERO + 128, (2, num_keys, 2 * config.width)).astype(np.uint8)
    kv[0, :2], kv[0, 2:4] = ZERO + 127, ZERO - 127
    mask = np.zeros((2, 1, 1, num_keys), np.float32)
    mask[0, ..., :3] = mask[1] = OUTSIDE
    bias = rng.integers(-300, 300, (config.width // config.head_width, NUM_ROWS, num_keys)).astype(np.float32)
    embedded = rng.integers(-(1 << 22), 1 << 22, (NUM_ROWS, config.width)).astype(np.float32)
    return {"x": x, "h": h, "kv": kv, "bias": bias, "mask": mask, "embedded": embedded}


def known_answers(model: ModelFile, question: Arrays) -> Iterator[tuple[str, int]]:
    """CRC-32 of what NumPy answers, by part of the network."""
    config = model.config.entropy
    parts = NumpyParts(config, model.config.tokenizer.quantizer.num_subquantizers, model.tensors)
    x, h, few = question["x"], question["h"], question["x"][:NUM_ROWS]
    queries = x[: 2 * NUM_ROWS].reshape(2, NUM_ROWS, config.width)
    for group in range(len(config.group_steps)):
        yield f"embed.{group}", checksum(*parts.embed(group, h, question["embedded"]))
    for layer in range(config.total_layers):
        if config.has_attention(layer):
            yield f"keys_values.{layer}", checksum(parts.keys_values(layer, few))
            attended = parts.attend(layer, queries, question["kv"], question["bias"], question["mask"])
            yield f"attend.{layer}", checksum(attended)
            yield f"project.{layer}", checksum(*parts.project(layer, h, few))
        yield f"feed.{layer}", checksum(*parts.feed(layer, h, few))
    for group in range(len(config.group_steps)):
        yield f"head.{group}", checksum(parts.head(group, few))
    head = parts.head(0, few)
    blocks = Alphabets.of(model.tensors).blocks(0, 0, len(head))
    yield "frequencies", checksum(*(parts.frequencies(head[b.first : b.last], 0, b.first) for b in blocks))


def checksum(*answers: NDArray[Any]) -> int:
    """CRC-32 over answers; integers that are carried by float32 as int32, which has but one zero."""
    crc = 0
    for answer in answers:
        crc = zlib.crc32((answer.astype("<i4") if answer.dtype == np.float32 else answer).tobytes(), crc)
    return crc


if __name__ == "__main__":
    main()
