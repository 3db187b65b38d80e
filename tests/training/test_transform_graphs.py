"""Graphs of the transforms give what their PyTorch modules give, whatever these are made of."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training.graph_tools import run_graph, tensors_of

from pqmim.config import AutoencoderConfig, QuantizerConfig, TokenizerConfig
from pqmim.decoder_files import SYNTHESIS_PREFIX
from pqmim.model_files import ANALYSIS_PREFIX, Graph
from pqmim.training.autoencoder import full_precision_linear
from pqmim.training.checkpoints import stored
from pqmim.training.tokenizer import Tokenizer
from pqmim.training.transform_graphs import TransformTracer, analysis_graph, synthesis_graphs


def random_tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    sizes = {"synthesis_channels": (12, 8, 16), "synthesis_blocks": (0, 2, 1)}
    autoencoder = AutoencoderConfig(latent_channels=12, channels=(8, 8, 16), blocks=(1, 0, 1), **sizes)
    tokenizer = Tokenizer(TokenizerConfig(autoencoder, QuantizerConfig(3, 16))).requires_grad_(False)
    for parameter in tokenizer.parameters():
        parameter.copy_((torch.randn_like(parameter) * 0.1).half())  # as a file holds them
    return tokenizer


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5)])
def test_transforms(rows: int, columns: int) -> None:
    tokenizer = random_tokenizer()
    graphs = {"analysis": analysis_graph(tokenizer.analysis), **synthesis_graphs(tokenizer.synthesis)}
    tensors = stored(tokenizer.analysis, ANALYSIS_PREFIX) | stored(tokenizer.synthesis, SYNTHESIS_PREFIX)
    rgb = np.random.default_rng(1).integers(0, 256, (16 * rows, 16 * columns, 3), dtype=np.uint8)
    x = torch.from_numpy(rgb).permute(2, 0, 1)[None].float() / 255
    z = tokenizer.analysis(x)
    (found,) = run_graph(graphs["analysis"], tensors, rgb=rgb)
    assert found.shape == (1, 12, rows, columns)
    assert np.allclose(found, z, atol=1e-4 * float(z.abs().max()))

    z = torch.randn(1, 12, rows, columns)
    y = tokenizer.synthesis(z).requires_grad_(False)
    (found,) = run_graph(graphs["synthesis"], tensors, z=z.numpy())
    assert found.dtype == np.uint8
    expected = (y.clamp(0, 1) * 255).round()[0].permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() <= 1
    assert (found != expected).mean() < 1e-2
    assert 0 < expected.mean() < 255

    picture, *saved = run_graph(graphs["synthesis_forward"], tensors, z=z.numpy())
    assert np.allclose(picture, y, atol=1e-5)
    variable = z.clone().requires_grad_(True)
    gradient = torch.randn_like(y)
    (expected,) = torch.autograd.grad(tokenizer.synthesis(variable), variable, gradient)
    values = {f"saved.{index}": value for index, value in enumerate(saved)}
    (found,) = run_graph(graphs["synthesis_vjp"], tensors, gradient=gradient.numpy(), **values)
    assert found.shape == z.shape
    assert np.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))


def test_what_is_saved_for_the_backward_pass_is_small() -> None:
    """Signs, a byte each, and not the values."""
    graph = onnx.load_from_string(synthesis_graphs(random_tokenizer().synthesis)["synthesis_forward"].model).graph
    assert len(graph.output) == 1 + 3  # one for each residual block
    assert all(output.type.tensor_type.elem_type == onnx.TensorProto.BOOL for output in graph.output[1:])


class Applied(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Modulation(nn.Module):
    """Scale and shift, made from the input itself, and a gain for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.modulate = nn.Conv2d(8, 16, 1)
        self.gain = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = torch.chunk(self.modulate(x), 2, dim=1)
        return torch.cat([self.gain * (x * torch.sigmoid(scale) + shift), x], dim=1)


def graph_of(module: nn.Module, channels: int = 8) -> tuple[Graph, dict[str, Any]]:
    for parameter in module.parameters():
        parameter.requires_grad_(False).copy_(parameter.half())
    tracer = TransformTracer("net.")
    tracer.trace(module, "x", (channels, 4, 6), output="y")
    sizes = [("x", np.float32, (1, channels, "h", "w"))], [("y", np.float32, (1, "c", "H", "W"))]
    return tracer.build(*sizes), tensors_of(module, "net.")


MODULES: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Conv2d(8, 6, 3, padding=1),
    "point-wise, no bias": lambda: nn.Conv2d(8, 6, 1, bias=False),
    "groups": lambda: nn.Conv2d(8, 12, 5, padding="same", groups=4),
    "depth-wise": lambda: nn.Conv2d(8, 8, (1, 3), padding=(0, 1), groups=8),
    "shuffle": lambda: nn.Sequential(nn.PixelShuffle(2), nn.PixelUnshuffle(2), nn.Identity(), nn.PixelUnshuffle(2)),
    "activations": lambda: nn.Sequential(
        nn.LeakyReLU(0.2), nn.Tanh(), nn.SiLU(), nn.Softplus(), nn.Sigmoid(), nn.ReLU()
    ),
    "functions": lambda: Applied(lambda x: F.silu(F.softplus(F.leaky_relu(x)) - F.relu(torch.tanh(x)) / 3) + -x),
    "modulation": Modulation,
}


@pytest.mark.parametrize("name", MODULES)
def test_parts(name: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(MODULES[name]())
    graph, tensors = graph_of(module)
    x = torch.randn(1, 8, 6, 10)
    (y,) = run_graph(graph, tensors, x=x.numpy())
    assert np.allclose(y, module(x), atol=1e-5)


def test_linear_path() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 8))

        def forward(self, x: Tensor) -> Tensor:
            return full_precision_linear(x, 0.5 * self.weight)

    module = Linear()
    graph, tensors = graph_of(module)
    x = torch.randn(1, 8, 3, 4)
    assert np.allclose(run_graph(graph, tensors, x=x.numpy())[0], module(x), atol=1e-5)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(8, 8, 3, padding=1, stride=2),
        nn.Conv2d(8, 8, 3),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.Softplus(beta=2),
        nn.BatchNorm2d(8),
        Applied(torch.erf),
        Applied(lambda x: x + F.avg_pool2d(x, 2).mean()),
        Applied(lambda x: x * x[:, :, :1]),
    ],
)
def test_what_has_no_rule_is_refused_by_name(module: nn.Module) -> None:
    with pytest.raises(NotImplementedError, match="no rule to write"):
        graph_of(nn.Sequential(module))
