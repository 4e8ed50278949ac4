"""Another region in the place of one: what it computes, and that all names stay."""

from typing import Any

import pytest
import torch
from networks import SmallResNet, close, small_resnet
from torch import Tensor, fx, nn

from dynamize.graph.chains import private_chains
from dynamize.graph.cuts import cut_points, find_cut
from dynamize.graph.extract import extract
from dynamize.graph.narrow import narrow
from dynamize.graph.splice import splice
from dynamize.graph.trace import annotate, trace

SHAPE = SmallResNet.shape


def small() -> tuple[nn.Module, fx.GraphModule]:
    network = small_resnet()
    return network, trace(network, SHAPE)


def ends(traced: fx.GraphModule, after: str, upto: str) -> tuple[str, str]:
    cuts = cut_points(traced)
    return find_cut(cuts, after).name, find_cut(cuts, upto).name


def images() -> Tensor:
    return torch.randn(4, *SHAPE)


def names(traced: fx.GraphModule) -> set[str]:
    return {cut.name for cut in cut_points(traced)}


def test_nothing_in_the_place_of_a_block() -> None:
    network, traced = small()
    batch, kept, region = images(), names(traced), ends(traced, "layer1.0", "layer1.1")
    splice(traced, *region, None)
    annotate(traced, SHAPE)
    network.layer1[1] = nn.Identity()
    with torch.no_grad():
        assert torch.equal(traced(batch), network(batch))
    assert traced.state_dict().keys() == network.state_dict().keys()
    assert kept - names(traced) == {region[0]}  # which is now the same value as the one that follows


@pytest.mark.parametrize("width", [1, 5])
def test_a_narrower_copy_in_the_place_of_a_block(width: int) -> None:
    _, traced = small()
    batch = images()
    region = ends(traced, "layer2.0", "layer2.1")
    body = extract(traced, *region)
    (chain,) = private_chains(body)
    narrowed = narrow(body, {chain.name: width})
    front, back = extract(traced, None, region[0]), extract(traced, region[1], None)
    with torch.no_grad():
        wanted = back(narrowed(front(batch)))
    kept, wide = names(traced), sum(node.meta["macs"] for node in traced.graph.nodes)
    splice(traced, *region, narrowed)
    annotate(traced, SHAPE)
    with torch.no_grad():
        assert torch.equal(traced(batch), wanted)
    assert names(traced) == kept
    assert sum(node.meta["macs"] for node in traced.graph.nodes) == wide - 2 * (16 - width) * 16 * 8 * 8 * 9
    assert traced.get_parameter(f"{chain.producers[0]}.weight").shape[0] == width
    assert traced.get_submodule("layer1.0.shortcut") is front.get_submodule("layer1.0.shortcut")
    again = extract(traced, region[0], region[1])
    with torch.no_grad():
        assert close(again(front(batch)), narrowed(front(batch)))


class Reused(nn.Module):
    """An activation and a scale that both blocks use."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(*sizes, 3, padding=1) for sizes in [(3, 8), (8, 8), (8, 8)])
        self.act = nn.PReLU()
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.linear = nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        x = x + self.scale * self.act(self.a(x))
        x = x + self.scale * self.act(self.b(x))
        return self.linear(x.mean((2, 3)))


def test_layers_and_values_in_use_elsewhere_are_left_alone() -> None:
    traced = trace(Reused().eval(), SHAPE)
    batch = images()
    cuts = [cut.name for cut in cut_points(traced)]
    assert len(cuts) == 3
    region = extract(traced, cuts[0], cuts[1])
    other: Any = narrow(region, {})  # a copy with layers of its own
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.3)
        wanted = extract(traced, cuts[1], None)(other(extract(traced, None, cuts[0])(batch)))
        splice(traced, cuts[0], cuts[1], other)
        assert torch.equal(traced(batch), wanted)
    assert traced.get_parameter("act.weight").item() == 0.25
    assert len(list(traced.parameters())) == len(list(Reused().parameters())) + 2


def test_the_same_region_again_changes_nothing() -> None:
    _, traced = small()
    batch = images()
    with torch.no_grad():
        wanted = traced(batch)
        for block in ("layer1.1", "layer2.0", "layer2.1"):
            before = {"layer1.1": "layer1.0", "layer2.0": "layer1.1", "layer2.1": "layer2.0"}[block]
            region = ends(traced, before, block)
            splice(traced, *region, extract(traced, *region))
            annotate(traced, SHAPE)
        assert torch.equal(traced(batch), wanted)
    assert traced.state_dict().keys() == small_resnet().state_dict().keys()
