"""Training a model, in PyTorch, and its export to a model file; needs the extra `train`."""

from importlib.util import find_spec

from pqmim.errors import MissingExtraError

for _package in ("torch", "onnx", "pydantic", "omegaconf"):
    if find_spec(_package) is None:
        raise MissingExtraError(_package, "train")
