"""Convolutions of somebody's own classes become torch's where they compute the same."""

import torch
from random_blocks import Named, SamePadding, Standardised
from torch import nn

from dynamize.graph.trace import trace


def test_those_that_compute_the_same_are_plain_under_the_same_names() -> None:
    layers = [SamePadding(3, 8, 3), Named(8, 8, 3, 2), SamePadding(8, 8, 3, 2), Standardised(8, 8, 3)]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    images = torch.randn(2, 3, 16, 16)
    traced = trace(network, (3, 16, 16))
    kinds = [type(traced.get_submodule(str(i))) for i in range(4)]
    assert kinds == [nn.Conv2d, nn.Conv2d, SamePadding, Standardised]
    assert torch.allclose(traced(images), network(images), atol=1e-6)
    assert traced.state_dict().keys() == network.state_dict().keys()
