"""Does another thread count, kernel, torch version or device write the same bytes and read the same tokens?

    python benchmarks/same_everywhere.py IMAGES FILES [--threads N] [--kernel int8|float32|float64] [--device cpu|cuda]

The first run writes a .pqm file and the token hash of every image into FILES; later runs, under other circumstances,
encode the images again, compare bytes, decode the files of the first run, and compare token hashes. Exit code 1 if a
token hash differs: that must never happen. Bytes may differ where the float analysis transform chose another token,
which is no fault of a file.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from pqmim.codec import load_codec
from pqmim.evaluation.evaluate import find_images


def main() -> int:
    """Print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("files", type=Path)
    parser.add_argument("--model", default="small")
    parser.add_argument("--quality", type=float, default=40.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kernel", default=None)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    codec = load_codec(options.model, device=options.device, kernel=options.kernel)
    options.files.mkdir(parents=True, exist_ok=True)
    hashes_path = options.files / "hashes.json"
    hashes = json.loads(hashes_path.read_text()) if hashes_path.exists() else {}
    is_first = not hashes
    same_bytes = same_tokens = total = 0
    for name, path in find_images(options.images).items():
        file = options.files / f"{Path(name).stem}.pqm"
        data = codec.encode(path, quality=options.quality)
        if is_first:
            file.write_bytes(data)
            hashes[file.name] = codec.token_hash(data)
        total += 1
        same_bytes += file.read_bytes() == data
        same_tokens += codec.token_hash(file.read_bytes()) == hashes[file.name]
    if is_first:
        hashes_path.write_text(json.dumps(hashes, indent=1))
    kernel = options.kernel or codec.kernel
    where = f"torch {torch.__version__}, {options.device}, {options.threads} threads, {kernel}"
    print(f"| {where} | {same_bytes} of {total} | {same_tokens} of {total} |", flush=True)
    return int(same_tokens != total)


if __name__ == "__main__":
    sys.exit(main())
