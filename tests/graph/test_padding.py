"""Convolutions that pad by themselves, as zeros around the map and torch's convolution."""

import pytest
import torch
from random_blocks import SamePadding, Standardised
from torch import Tensor, fx, nn
from torch.nn import functional

from dynamize.graph.integers import note_shapes
from dynamize.graph.padding import explicit_padding, pads_zeros
from dynamize.graph.tracer import NetworkTracer


class Before(nn.Conv2d):
    """Pads by hand, before the map only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.pad(x, (1, 0, 1, 0)))


class Mirrored(nn.Conv2d):
    """Pads with what is no zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.pad(x, (1, 1, 1, 1), mode="reflect"))


def apart(layer: nn.Module, *size: int) -> fx.GraphModule:
    network = nn.Sequential(layer).eval()
    traced = fx.GraphModule(network, NetworkTracer().trace(network))
    note_shapes(traced, torch.randn(1, 4, *size))
    explicit_padding(traced)
    return traced


@pytest.mark.parametrize(
    ("layer", "ends"),
    [
        (SamePadding(4, 6, 3, 2), [0, 1, 0, 1]),
        (SamePadding(4, 8, 5, 2, groups=4, bias=False), [1, 2, 1, 2]),
        (SamePadding(4, 6, (3, 5), (2, 1)), [2, 2, 0, 1]),
        (Before(4, 6, 3, 2), None),  # zeros behind would not be read
        (nn.Conv2d(4, 6, 4, padding="same"), [1, 2, 1, 2]),
        (nn.Conv2d(4, 6, 2, padding="same", dilation=3), [1, 2, 1, 2]),
        (nn.Conv2d(4, 6, 3, padding="same", dilation=2), None),  # even: the layer's own
        (nn.Conv2d(4, 6, 3, padding="valid"), None),
        (SamePadding(4, 6, 1, 2), None),
    ],
)
def test_zeros_are_numbers(layer: nn.Module, ends: list[int] | None) -> None:
    traced, batch = apart(layer, 16, 12), torch.randn(2, 4, 16, 12)
    pads = [node for node in traced.graph.nodes if pads_zeros(traced, node)]
    assert [node.args[1] for node in pads] == ([] if ends is None else [ends])
    found = traced.get_submodule("0")
    assert type(found) is nn.Conv2d
    assert found.weight is layer.weight
    assert torch.allclose(traced(batch), layer(batch), atol=1e-5)


def test_what_computes_otherwise_stays() -> None:
    for layer in (Standardised(4, 6, 3, 2), Mirrored(4, 6, 3, 2)):
        assert apart(layer, 16, 16).get_submodule("0") is layer
