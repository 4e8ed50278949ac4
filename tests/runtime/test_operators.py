"""All of torch.nn's layers with unusual arguments on all backends: the same answers, or computed by torch and said."""

import operators
import pytest
import torch
from backends import FLOAT32
from torch import nn

from dynamize.conversion import wrap
from dynamize.runtime.compiled import compile_network

IN_TORCH = {"unpool", "cross map norm", "bilinear layer"}  # what no exporter knows


def network(layer: nn.Module) -> nn.Module:
    layer.eval()
    with torch.no_grad():
        width = layer(torch.zeros(1, operators.CHANNELS, operators.HEIGHT, operators.WIDTH)).flatten(1).shape[1]
    return nn.Sequential(
        nn.Conv2d(3, operators.CHANNELS, 3, padding=1), layer, nn.Flatten(), nn.Linear(width, 5)
    ).eval()


ONNX = [param for param in FLOAT32 if param.values != ("eager",)]
HARD = {
    "activations": ["softplus threshold", "threshold"],
    "convolutions": ["conv same dilated even kernel"],
    "norms": ["instance running norm", "rms norm"],
    "pools": ["adaptive avg 5", "adaptive max 5", "avg divisor padding", "avg 2 ceil include", "unpool"],
    "resampling": ["bicubic smooth", "nearest-exact size"],
    "shuffles": ["channel shuffle", "pixel unshuffle, pool"],
}


def differs(name: str, layer: nn.Module, backend: str) -> str | None:
    """What is wrong with a layer on a backend."""
    net, shape = network(layer), (3, operators.HEIGHT, operators.WIDTH)
    images = 2 * torch.randn(5, *shape)
    compiled = compile_network(wrap(net, shape), backend)
    if bool(compiled.notes) != (name in IN_TORCH):
        return f"{name}: {compiled.notes}"
    assert all(f"backend {backend}" in note and "eager PyTorch" in note for note in compiled.notes)
    with torch.no_grad():
        wanted = net(images)
    apart = max(float((compiled(images[:count]) - wanted[:count]).abs().max()) for count in (5, 1))
    return None if apart < 1e-4 * wanted.std() else f"{name}: {apart}"


@pytest.mark.parametrize("backend", ONNX)
@pytest.mark.parametrize("kind", HARD)
def test_what_exporters_drop_or_refuse_is_written_otherwise(kind: str, backend: str) -> None:
    torch.manual_seed(0)
    layers = operators.KINDS[kind]()
    assert [fault for name in HARD[kind] if (fault := differs(name, layers[name], backend))] == []


@pytest.mark.slow
@pytest.mark.parametrize("backend", ONNX)
@pytest.mark.parametrize("kind", operators.KINDS)
def test_answers_are_torch_s_or_come_from_torch(kind: str, backend: str) -> None:
    torch.manual_seed(0)
    layers = operators.KINDS[kind]()
    assert [fault for name, layer in layers.items() if (fault := differs(name, layer, backend))] == []


def test_few_layers_are_left_to_torch() -> None:
    assert len(IN_TORCH) < 0.03 * sum(len(make()) for make in operators.KINDS.values())
