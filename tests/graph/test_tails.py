"""The short way to the end: which blocks a tail keeps, and that it starts from the network's weights."""

import pytest
import torch
from networks import SmallResNet, conv_block, small_resnet
from torch import Tensor, nn

from dynamize.graph.cuts import cut_points, find_cut
from dynamize.graph.extract import extract
from dynamize.graph.tails import tail
from dynamize.graph.trace import trace


class ThreeStages(nn.Module):
    """Stages of 1 + 3 blocks; the first block of stages 2 and 3 changes the shape."""

    def __init__(self) -> None:
        super().__init__()
        widths = [4, 4, 4, 4, 6, 6, 6, 6, 8, 8, 8, 8]
        strides = [1, 1, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1]
        inputs = [3, *widths[:-1]]
        self.blocks = nn.Sequential(*(conv_block(*args) for args in zip(inputs, widths, strides, strict=True)))
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.blocks(x).mean((2, 3)))


def kept(body: nn.Sequential) -> list[int]:
    """Numbers of the blocks in a tail."""
    return [int(next(iter(piece.state_dict())).split(".")[1]) for piece in body]


@pytest.mark.parametrize(
    ("after", "depth", "blocks"),
    [
        (0, 0, [4, 8]),
        (0, 1, [4, 7, 8, 11]),
        (0, 2, [4, 6, 7, 8, 10, 11]),
        (0, 3, [4, 5, 6, 7, 8, 9, 10, 11]),
        (0, 5, [4, 5, 6, 7, 8, 9, 10, 11]),  # deeper than there are blocks: all of them
        (5, 1, [8, 11]),
        (6, 9, [8, 9, 10, 11]),
        (9, 2, []),  # nothing changes the shape any more, and no block of its own resolution is kept
        (11, 1, []),
    ],
)
def test_which_blocks_are_kept(after: int, depth: int, blocks: list[int]) -> None:
    traced = trace(ThreeStages(), (3, 16, 16))
    body, _ = tail(traced, cut_points(traced)[after].name, depth)
    assert kept(body) == blocks


def test_a_full_tail_from_before_a_change_of_shape_is_the_rest_of_the_network() -> None:
    network = small_resnet()
    traced, images = trace(network, SmallResNet.shape), torch.randn(2, *SmallResNet.shape)
    after = find_cut(cut_points(traced), "layer1").name
    body, classifier = tail(traced, after, 9)
    features = extract(traced, None, after)(images)
    assert torch.equal(classifier(body(features)), network(images))


def test_a_tail_is_a_copy() -> None:
    traced = trace(small_resnet(), SmallResNet.shape)
    body, classifier = tail(traced, cut_points(traced)[1].name, 1)
    own = {parameter.data_ptr() for parameter in traced.parameters()}
    assert all(p.data_ptr() not in own for p in [*body.parameters(), *classifier.parameters()])
    weights = traced.state_dict()
    assert all(torch.equal(v, weights[n]) for n, v in classifier.state_dict().items())
    assert classifier.state_dict().keys() == {"linear.weight", "linear.bias"}
