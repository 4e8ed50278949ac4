"""Branches on a coarser grid: what they compute, by hand, for blocks of all forms."""

import pytest
import torch
from residual_networks import Forward, Pieces, net_of
from torch import Tensor
from torch.nn import functional as F

from dynamize.graph.coarse import coarse
from dynamize.graph.residual import residual_blocks
from dynamize.graph.trace import trace


def down(x: Tensor) -> Tensor:
    """Means of 2 x 2 positions, and of those that there are where the last row or column is alone."""
    ones = torch.ones_like(x)
    pads = (0, x.shape[3] % 2, 0, x.shape[2] % 2)
    return F.avg_pool2d(F.pad(x, pads), 2) / F.avg_pool2d(F.pad(ones, pads), 2)


def up(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear")[:, :, : like.shape[2], : like.shape[3]]


BLOCKS: dict[str, tuple[Forward, Forward]] = {
    "plain": (
        lambda m, x: m.relu(m.norm(m.g(m.f(x))) + x),
        lambda m, x: m.relu(up(m.norm(m.g(m.f(down(x)))), x) + x),
    ),
    "handed on": (
        lambda m, x: (m.g(m.f(m.nothing(x))) + m.nothing(x)).relu(),
        lambda m, x: (up(m.g(m.f(down(x))), x) + x).relu(),
    ),
    "two branches": (
        lambda m, x: (x + m.f(x) + m.g(x)).relu(),
        lambda m, x: (x + up(m.f(down(x)), x) + up(m.g(down(x)), x)).relu(),
    ),
    "weighed by its own means": (
        lambda m, x: (x + m.f(x) * m.g(m.f(x)).mean((2, 3), keepdim=True).sigmoid()).relu(),
        lambda m, x: (x + up(m.f(down(x)) * m.g(m.f(down(x))).mean((2, 3), keepdim=True).sigmoid(), x)).relu(),
    ),
}


@pytest.mark.parametrize("side", [8, 7])
@pytest.mark.parametrize("name", BLOCKS)
def test_branches_see_means_and_are_interpolated(name: str, side: int) -> None:
    forward, by_hand = BLOCKS[name]
    network = net_of(forward)
    traced, pieces = trace(network, (3, side, side)), network.get_submodule("block")
    assert isinstance(pieces, Pieces)
    (block,) = [one for one in residual_blocks(traced) if one.identity]
    features = torch.randn(3, 8, side, side).relu()
    given = features.clone()
    with torch.no_grad():
        found = coarse(traced, [block])(features)
        assert torch.equal(features, given)
        assert torch.allclose(found, by_hand(pieces, given.clone()), atol=1e-5)
        assert not torch.allclose(found, forward(pieces, given.clone()), atol=1e-2)
