"""Make the tiny model that tests of the codec read: python tests/make_tiny_model.py (needs PyTorch).

To be run when the format or the graphs of model files change; a test compares the weights and the graphs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from training.tiny_networks import TINY_QUALITY, make_tiny_entropy_model, make_tiny_tokenizer

from pqmim.training.export import save_model

TARGET = Path(__file__).parent / "data" / "tiny" / "model.safetensors"


def make_tiny_model(target: Path) -> bytes:
    """Write the model; returns its id."""
    tokenizer = make_tiny_tokenizer()
    return save_model(target, "tiny", tokenizer, make_tiny_entropy_model(tokenizer), TINY_QUALITY, {})


if __name__ == "__main__":
    torch.set_num_threads(1)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    print(make_tiny_model(TARGET).hex(), f"{TARGET.stat().st_size:,} B", file=sys.stderr)
