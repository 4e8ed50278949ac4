"""Blocks written out in a lambda, and networks by name, for the tests that read residual blocks."""

from collections.abc import Callable

import pytest
import torch
from networks import conv_block, randomise_norms, torchvision_network
from torch import Tensor, fx, nn

from dynamize.graph.residual import ResidualBlock, bypass, residual_blocks
from dynamize.graph.trace import trace
from dynamize.models import create

CONV = 8 * 8 * 8 * 8 * 9  # MACs of a 3x3 convolution of 8 channels on 8x8 pixels
POINTWISE = 8 * 8 * 8 * 8


class Pieces(nn.Module):
    """Layers for a block of 8 channels that each test puts together in a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU())
        self.g = nn.Conv2d(8, 8, 3, padding=1)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.narrow = nn.Conv2d(8, 1, 1)
        self.norm = nn.BatchNorm2d(8)
        self.scale = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.nothing, self.relu, self.silu = nn.Identity(), nn.ReLU(inplace=True), nn.SiLU(inplace=True)


Forward = Callable[[Pieces, Tensor], Tensor]


def net_of(forward: Forward, first: nn.Module | None = None) -> nn.Module:
    """Stem (conv, norm, ReLU or ``first``), one block, and a classifier; (3, 8, 8) -> 5 classes."""

    class Block(Pieces):
        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = conv_block(3, 8)
            self.stem[2] = first or nn.ReLU()
            self.block = Block()
            self.end, self.linear = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.end(self.block(self.stem(x))).mean((2, 3)))

    return randomise_norms(Net()).eval()


def traced_net(forward: Forward, first: nn.Module | None = None) -> fx.GraphModule:
    return trace(net_of(forward, first), (3, 8, 8))


def only_block(traced: fx.GraphModule) -> ResidualBlock:
    (block,) = [block for block in residual_blocks(traced) if block.after == "stem_2"]
    return block


def skipped(traced: fx.GraphModule, block: ResidualBlock, x: Tensor) -> Tensor:
    path = bypass(traced, block)
    with torch.no_grad():
        return x if path is None else path(x)


def network_of(name: str) -> nn.Module:
    library, model = name.split(":")
    if library == "timm":
        return pytest.importorskip("timm").create_model(model, num_classes=10).eval()
    return torchvision_network(model) if library == "torchvision" else create(model).eval()


def silence(module: nn.Module) -> None:
    """Weights and bias of a branch's last layer to zero: the branch adds nothing."""
    with torch.no_grad():
        for parameter in module.parameters(recurse=False):
            parameter.zero_()
