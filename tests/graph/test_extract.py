"""Cutting a network in two changes nothing: bit-equal at every cut point of many networks."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import SmallResNet, randomise_norms, small_resnet, torchvision_network
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dynamize.graph.cuts import cut_points
from dynamize.graph.extract import extract
from dynamize.graph.trace import trace


def assert_cuts_change_nothing(network: nn.Module, shape: tuple[int, ...], every: int = 1) -> int:
    """Both halves at every cut point; returns how many there were."""
    traced = trace(network, shape)
    images = torch.randn(2, *shape)
    cuts = cut_points(traced)
    with torch.no_grad():
        wanted = network(images)
        for cut in cuts[::every]:
            first, second = extract(traced, None, cut.name), extract(traced, cut.name, None)
            features = first(images)
            assert tuple(features.shape) == (2, *cut.shape)
            assert torch.equal(second(features), wanted), cut
    return len(cuts)


@pytest.mark.parametrize(
    ("name", "side", "cuts"),
    [
        ("resnet18", 64, 9),
        ("shufflenet_v2_x0_5", 64, 18),
        ("mobilenet_v3_small", 64, 26),
        ("squeezenet1_1", 64, 18),
        ("mnasnet0_5", 64, 32),
    ],
)
@pytest.mark.fast("resnet18-64-9", "squeezenet1_1-64-18")
def test_torchvision_networks(name: str, side: int, cuts: int) -> None:
    assert assert_cuts_change_nothing(torchvision_network(name), (3, side, side), every=3) == cuts


def test_small_resnet() -> None:
    assert assert_cuts_change_nothing(small_resnet(), SmallResNet.shape) == 7


def test_three_pieces_share_parameters_and_hold_only_their_own() -> None:
    network = small_resnet()
    traced = trace(network, SmallResNet.shape)
    a, b = (cut.name for cut in cut_points(traced)[2:5:2])
    pieces = [extract(traced, None, a), extract(traced, a, b), extract(traced, b, None)]
    names = [set(dict(piece.named_parameters())) for piece in pieces]
    assert names[0] | names[1] | names[2] == set(dict(network.named_parameters()))
    assert sum(map(len, names)) == len(names[0] | names[1] | names[2])
    original = dict(traced.named_parameters())
    assert all(value is original[name] for piece in pieces for name, value in piece.named_parameters())
    images = torch.randn(2, *SmallResNet.shape)
    assert torch.equal(pieces[2](pieces[1](pieces[0](images))), network(images))


def test_a_piece_keeps_the_training_flag_and_its_own_macs() -> None:
    traced = trace(small_resnet(), SmallResNet.shape)
    cuts = cut_points(traced)
    second = extract(traced, cuts[1].name, cuts[2].name)
    assert not second.training
    assert sum(node.meta["macs"] for node in second.graph.nodes if node.op != "output") == cuts[2].macs - cuts[1].macs
    assert extract(traced.train(), None, cuts[0].name).training


class RandomNet(nn.Module):
    """A directed acyclic graph: node i joins some earlier nodes and applies one operator."""

    def __init__(self, plan: list[tuple[str, list[int], int]]) -> None:
        super().__init__()
        self.plan = plan
        widths = [3]
        for i, (kind, sources, width) in enumerate(plan):
            inputs = sum(widths[s] for s in sources)
            if kind == "conv":
                self.add_module(f"op{i}", nn.Conv2d(inputs, width, 3, padding=1))
            elif kind == "block":
                conv = nn.Conv2d(inputs, width, 3, padding=1)
                self.add_module(f"op{i}", nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)))
            else:
                width = inputs
                if kind == "norm":
                    self.add_module(f"op{i}", nn.BatchNorm2d(inputs))
            widths.append(width)
        self.linear = nn.Linear(widths[-1], 4)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for i, (kind, sources, _) in enumerate(self.plan):
            joined = values[sources[0]] if len(sources) == 1 else torch.cat([values[s] for s in sources], 1)
            if kind in ("conv", "block", "norm"):
                joined = getattr(self, f"op{i}")(joined)
            elif kind == "shuffle":
                joined = joined.view(joined.size(0), joined.shape[1], -1).flip(1).view(joined.size())
            elif kind == "gate":
                joined = joined * F.adaptive_avg_pool2d(joined, 1).sigmoid()
            elif kind == "inplace":
                joined = joined - 0.1  # a value of its own, overwritten without using the result
                F.relu(joined, inplace=True)
            values.append(joined)
        return self.linear(values[-1].mean((2, 3)))


@st.composite
def plans(draw: st.DrawFn) -> list[tuple[str, list[int], int]]:
    plan: list[tuple[str, list[int], int]] = []
    for i in range(draw(st.integers(2, 9))):
        kind = draw(st.sampled_from(["conv", "block", "norm", "shuffle", "gate", "inplace"]))
        sources = [i]  # mostly straight on, with skips and branches
        if draw(st.integers(0, 2)) == 0:
            sources = draw(st.lists(st.integers(max(0, i - 3), i), min_size=1, max_size=3, unique=True))
        plan.append((kind, sources, draw(st.integers(1, 4))))
    return plan


def separators(traced: fx.GraphModule) -> set[str]:
    """Nodes without which the output does not depend on the image any more: cut points by brute force."""
    nodes = list(traced.graph.nodes)
    start, end = nodes[0], nodes[-1]

    def reaches_end(removed: fx.Node) -> bool:
        seen, stack = {start}, [start]
        while stack:
            for user in stack.pop().users:
                if user is not removed and user not in seen:
                    seen.add(user)
                    stack.append(user)
        return end in seen

    return {node.name for node in nodes[1:-1] if not reaches_end(node)}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plans(), st.integers(0, 2**16))
@pytest.mark.slow
def test_random_networks(plan: list[tuple[str, list[int], int]], seed: int) -> None:
    torch.manual_seed(seed)
    network = randomise_norms(RandomNet(plan), seed).eval()
    assert_cuts_change_nothing(network, (3, 5, 5))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plans())
def test_cut_points_of_random_networks_are_the_separating_nodes(plan: list[tuple[str, list[int], int]]) -> None:
    traced = trace(RandomNet(plan), (3, 5, 5))
    found = {cut.name for cut in cut_points(traced)}
    separating = separators(traced)
    assert found <= separating
    macs, listed = 0.0, set()
    for node in traced.graph.nodes:  # of the separating maps between the same MACs one is listed, the last
        macs += node.meta["macs"]
        shape = node.meta["shape"]
        if node.name in separating and macs and shape is not None and len(shape) == 4 and shape[2] > 1:
            listed.add(macs)
    assert {cut.macs for cut in cut_points(traced)} == listed
