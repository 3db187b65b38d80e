"""Training throughput: crops/s of each stage of a pair of recipes, and the share of this device's peak.

    python benchmarks/training_throughput.py [--recipes recipes/photo] [--data PHOTOS] [--steps 20] [--set A.B=C] \
        [--json FILE]

Trains every stage for a few steps from nothing, through the same loop as `pqmim train`, in a folder that is removed at
the end, and reads the speed of the second half of the steps from its log. Without --data the photos are noise. On a CPU
the peak is that of a large matrix product in the type that training uses, measured at the start with the same number of
threads.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pqmim.config import TokenizerConfig
from pqmim.training import train_entropy_model, train_tokenizer
from pqmim.training.checkpoints import load_tokenizer
from pqmim.training.distributed import resolve_device
from pqmim.training.entropy_model import EntropyModel
from pqmim.training.recipes import EntropyTraining, TokenizerTraining, load_config
from pqmim.training.throughput import is_bf16_faster, matmul_rate, peak_rate
from pqmim.training.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent


def write_noise(folder: Path, count: int) -> Path:
    """Photos of the usual size without content."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        pixels = rng.integers(0, 256, (512, 768, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03}.png")
    return folder


def kilo_macs_per_pixel(config: TokenizerConfig) -> float:
    """Multiplications of analysis and synthesis together, for a pixel, in thousands."""
    tokenizer, side = Tokenizer(config), 256
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        z = tokenizer.analysis(torch.zeros(1, 3, side, side))
        tokenizer.synthesis(z)
    return float(counter.get_total_flops()) / 2 / side**2 / 1000


def parameters(module: nn.Module) -> int:
    """Number of trained numbers."""
    return sum(parameter.numel() for parameter in module.parameters())


def last_values(log: Path) -> dict[str, dict[str, float]]:
    """Stage -> the last value of everything it logged."""
    values: dict[str, dict[str, float]] = {}
    with log.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            values.setdefault(row["stage"], {})[row["name"]] = float(row["value"])
    return values


def main() -> None:
    """Print a line for each stage, and write the figures as JSON if asked to."""
    parser = argparse.ArgumentParser(description="Training throughput of a pair of recipes.")
    parser.add_argument("--recipes", type=Path, default=ROOT / "recipes" / "photo", help="folder with the two recipes")
    parser.add_argument("--data", type=Path, help="photos [default: noise]")
    parser.add_argument("--cache", type=Path, help="their decoded pixels, as data.cache")
    parser.add_argument("--steps", type=int, default=20, help="of each stage; the second half is timed")
    parser.add_argument("--batch-size", type=int, help="instead of the recipe's")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="of both recipes; repeatable")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file too")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = options.data or write_noise(folder / "photos", 40)
        both = [f"data.path={data}", "data.validation_photos=8", *options.set]
        if options.cache is not None:
            both.append(f"data.cache={options.cache}")

        def stage(name: str) -> list[str]:
            size = [] if options.batch_size is None else [f"{name}.batch_size={options.batch_size}"]
            log_every = max(1, options.steps // 2)
            return [f"{name}.steps={2 * log_every}", f"{name}.log_every={log_every}", *size]

        changes = [*both, f"run.output={folder / 'tokenizer'}", "start_from=null", "codebooks.crops=32"]
        changes += stage("transform")
        tokenizer = load_config(TokenizerTraining, options.recipes / "tokenizer.yaml", changes)
        trained = train_tokenizer.train(tokenizer)
        changes = [*both, f"run.output={folder / 'entropy'}", f"tokenizer={trained}", *stage("stage")]
        entropy = load_config(EntropyTraining, options.recipes / "entropy.yaml", changes)
        train_entropy_model.train(entropy)
        values = {**last_values(folder / "tokenizer" / "log.csv"), **last_values(folder / "entropy" / "log.csv")}
        model, _ = load_tokenizer(trained)

    device = resolve_device(tokenizer.run.device)
    bf16 = tokenizer.run.bf16
    dtype = torch.bfloat16 if (is_bf16_faster(device) if bf16 == "auto" else bf16) else torch.float32
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peak": peak_rate(device, dtype),
        "dtype": str(dtype).removeprefix("torch."),
        "matmul_rate": matmul_rate(device, dtype),
        "kilo_macs_per_pixel": kilo_macs_per_pixel(tokenizer.model),
        "transform_parameters": parameters(model.analysis) + parameters(model.synthesis),
        "entropy_parameters": parameters(EntropyModel.for_quantizer(entropy.model, model.quantizer)),
        "stages": {},
    }
    print(f"{report['device']}, {report['threads']} threads, {report['dtype']} peak", end=" ")
    print(f"{report['peak'] / 1e12:.3f} TFLOP/s", end=", ")
    print(f"matrix product at {report['matmul_rate'] / 1e12:.3f} TFLOP/s")
    print(f"transforms {report['kilo_macs_per_pixel']:.1f} kMAC per pixel", end=", ")
    print(f"{report['transform_parameters']:,} parameters; entropy model {report['entropy_parameters']:,} parameters")
    for name, config in (
        ("transform", tokenizer.transform),
        ("entropy", entropy.stage),
    ):
        figures = {
            "batch_size": config.batch_size,
            "crops_per_second": values[name]["crops_per_second"],
            "seconds_per_step": config.batch_size / values[name]["crops_per_second"],
            "peak_share": values[name]["peak_share"],
        }
        report["stages"][name] = figures
        print(
            f"{name:9}  batch {config.batch_size}  {figures['crops_per_second']:8.2f} crops/s"
            f"  {figures['seconds_per_step']:.3f} s per step  {figures['peak_share']:.1%} of peak"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
