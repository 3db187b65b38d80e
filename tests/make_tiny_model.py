"""Make the tiny token model that tests of the codec read, and its decoders: python tests/make_tiny_model.py

It needs PyTorch. To be run when the format or the graphs of model files change; a test compares the weights and the
graphs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from training.tiny_networks import TINY_QUALITY, make_tiny_entropy_model, make_tiny_synthesis, make_tiny_tokenizer

from pqmim.decoder_files import load_decoder
from pqmim.training.export import save_decoder, save_model

TARGET = Path(__file__).parent / "data" / "tiny"


def make_tiny_model(folder: Path) -> bytes:
    """Write the model with the decoders `fast`, `fine` and `vivid`, the last with realism; returns the model's id."""
    tokenizer = make_tiny_tokenizer()
    model_id = save_model(folder, "tiny", tokenizer, make_tiny_entropy_model(tokenizer), TINY_QUALITY, {})
    fine, vivid = make_tiny_synthesis(tokenizer, noise=0.0), make_tiny_synthesis(tokenizer, noise=0.02)
    path = folder / "fine.safetensors"
    save_decoder(path, "fine", fine, model_id, {"description": "a finer one"})
    save_decoder(folder / "vivid.safetensors", "vivid", vivid, model_id, {}, faithful=load_decoder(path))
    return model_id


if __name__ == "__main__":
    torch.set_num_threads(1)
    TARGET.mkdir(parents=True, exist_ok=True)
    print(make_tiny_model(TARGET).hex(), file=sys.stderr)
    for path in sorted(TARGET.iterdir()):
        print(f"{path.name}  {path.stat().st_size:,} B", file=sys.stderr)
