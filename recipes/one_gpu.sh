#!/usr/bin/env bash
# Train a whole model, decoders included, in the minutes that one GPU is at hand:
#   recipes/one_gpu.sh DATA MINUTES OUT [--max-file-mb N] [--call-minutes N] [--set A.B=C]
# Cut short, by --call-minutes or otherwise, the same command goes on. Docs: docs/training.md, "One GPU for some minutes".
set -euo pipefail
recipes=$(cd "$(dirname "$0")" && pwd)
exec "${PYTHON:-python3}" -m pqmim.training.one_gpu "$@" --recipes "$recipes/one_gpu"
