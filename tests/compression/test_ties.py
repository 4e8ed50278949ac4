"""Channels that only go together: through grouped layers, chunks, shuffles and shared tensors; and who keeps his."""

import copy
from collections.abc import Callable

import pytest
import torch
from networks import close, randomise_norms, torchvision_network
from torch import Tensor, nn
from torch.nn import functional as F

from dynamize.compression.coupling import channel_groups
from dynamize.compression.layers import layers, resize, sizes
from dynamize.compression.removal import remove, silenced
from dynamize.compression.ties import Coupled, Item, joined
from dynamize.conversion import wrap
from dynamize.rewrite.exchange import count_again

SHAPE = (3, 8, 8)


class Net(nn.Module):
    """conv `a` (16 channels), what lies between, conv `b`, classifier."""

    def __init__(self, forward: Callable, inputs: int = 16, **between: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(inputs, 8, 1), nn.Linear(8, 5)
        self.between = forward
        for name, module in between.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.b(self.between(self, F.relu(self.a(x))))).mean((2, 3)))


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.kernel = nn.Parameter(torch.rand(16, 1, 1) + 0.5), nn.Parameter(torch.randn(16, 16, 1, 1))
        self.register_buffer("shift", torch.rand(1, 16, 1, 1))


def spatial(n: Net, x: Tensor) -> Tensor:
    x = n.c(x)
    seen = torch.cat([x.mean(1, keepdim=True), x.max(dim=1, keepdim=True)[0]], 1)
    return x * torch.sigmoid(n.where(seen))


def shuffled(n: Net, x: Tensor) -> Tensor:
    batch, channels, height, width = x.size()
    return x.view(batch, 4, channels // 4, height, width).transpose(1, 2).contiguous().view(batch, -1, height, width)


def chunked(n: Net, x: Tensor) -> Tensor:
    parts = x.chunk(2, 1)
    return torch.cat([parts[0], n.c(parts[1])], 1)


def scaled(n: Net, x: Tensor) -> Tensor:
    return F.conv2d(x, n.affine.kernel) * n.affine.scale + n.affine.shift


def modulated(n: Net, x: Tensor) -> Tensor:
    """Maps of one channel, cut out of a map, weigh others (FocalNet)."""
    query, context, gates = torch.split(n.c(x), (16, 16, 2), 1)
    total = n.d(context) * gates[:, :1] + context.mean((2, 3), keepdim=True) * gates[:, 1:]
    return query * n.e(total)


def masked(n: Net, x: Tensor) -> Tensor:
    one, other = n.c(x)[:, :1], n.d(x.mean((2, 3), keepdim=True))
    return torch.where(one > 0, x - one, x) * torch.sigmoid(one * other)


def entangled(n: Net, x: Tensor) -> Tensor:
    for _ in range(8):
        x = torch.cat([x[:, 1:] * x[:, :-1], x[:, :1]], 1)
    return x


def conv(inputs: int, outputs: int, size: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups)


def tied() -> Net:
    net = Net(lambda n, x: n.d(F.relu(n.c(x))), c=conv(16, 16), d=conv(16, 16))
    net.d.weight = net.c.weight  # type: ignore[union-attr]
    return net


# name: the network, and for each group its name, blocks and channels in a block of the first layer
NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[tuple[str, int, int]]]] = {
    "grouped": (lambda: Net(lambda n, x: n.c(x), c=conv(16, 16, 3, 4)), [("a", 4, 4), ("b", 8, 1)]),
    "more outputs": (lambda: Net(lambda n, x: n.c(x), 32, c=conv(16, 32, 3, 16)), [("a", 16, 1), ("b", 8, 1)]),
    "two groupings": (
        lambda: Net(lambda n, x: n.d(n.c(x)), c=conv(16, 16, 1, 8), d=nn.GroupNorm(4, 16)),
        [("a", 4, 4), ("b", 8, 1)],
    ),
    "bare group norm": (
        lambda: Net(lambda n, x: n.c(x), c=nn.GroupNorm(2, 16, affine=False)),
        [("a", 2, 8), ("b", 8, 1)],
    ),
    "instance norms": (
        lambda: Net(
            lambda n, x: F.relu(n.d(n.c(x)), inplace=True),
            c=nn.InstanceNorm2d(16),
            d=nn.InstanceNorm2d(16, affine=True, track_running_stats=True),
        ),
        [("a", 16, 1), ("b", 8, 1)],
    ),
    "one PReLU": (lambda: Net(lambda n, x: n.c(x), c=nn.PReLU()), [("a", 16, 1), ("b", 8, 1)]),
    "pixel shuffle": (lambda: Net(lambda n, x: n.c(x), 4, c=nn.PixelShuffle(2)), [("a", 4, 4), ("b", 8, 1)]),
    "pixel unshuffle": (
        lambda: Net(lambda n, x: F.pixel_unshuffle(x, 2), 64),
        [("a", 16, 1), ("b", 8, 1)],
    ),
    "shuffle": (lambda: Net(shuffled), [("a", 4, 4), ("b", 8, 1)]),
    "chunks": (lambda: Net(chunked, c=conv(8, 8, 3)), [("a", 8, 2), ("c", 8, 1), ("b", 8, 1)]),
    "spatial attention": (
        lambda: Net(spatial, c=conv(16, 16), where=conv(2, 1, 3)),
        [("a", 16, 1), ("b", 8, 1)],
    ),
    "focal modulation": (
        lambda: Net(
            lambda n, x: n.f(modulated(n, x)), c=conv(16, 34), d=conv(16, 16, 3, 16), e=conv(16, 16), f=conv(16, 16)
        ),
        [("a", 16, 1), ("f", 16, 1), ("b", 8, 1)],
    ),
    "one channel for all": (lambda: Net(masked, c=conv(16, 2), d=conv(16, 16)), [("a", 16, 1), ("b", 8, 1)]),
    "coupled without end": (lambda: Net(entangled), [("b", 8, 1)]),
    "parameters": (lambda: Net(scaled, affine=Affine()), [("a", 16, 1), ("affine.kernel", 16, 1), ("b", 8, 1)]),
    "tied": (tied, [("a", 16, 1), ("b", 8, 1)]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_goes_together_goes_unnoticed(name: str) -> None:
    torch.manual_seed(0)
    make, wanted = NETWORKS[name]
    network = wrap(randomise_norms(make()).eval(), SHAPE)
    fresh = copy.deepcopy(network)
    groups, lost = channel_groups(network)
    assert [(group.name, group.channels, group.together) for group in groups] == wanted
    assert lost == []
    gone = {group.name: range(0, group.channels, 2) for group in groups}
    images = torch.randn(3, *SHAPE)
    with torch.no_grad():
        before = network(images)
        with silenced(network, groups, gone):
            masked = network(images)
        remove(network, groups, gone)
        count_again(network)
        assert close(network(images), masked, 1e-5)
        assert not close(masked, before, 1e-3)
        resize(fresh, sizes(network))
        fresh.load_state_dict(network.state_dict())
        assert torch.equal(fresh(images), network(images))


def test_groups_that_go_leave_a_layer_with_fewer_of_one_size() -> None:
    network = wrap(NETWORKS["two groupings"][0]().eval(), SHAPE)
    groups, _ = channel_groups(network)
    remove(network, groups, {"a": [1, 2, 3]})
    known = layers(network)
    assert repr(known["c"]) == repr(conv(4, 4, 1, 2))
    assert repr(known["d"]) == repr(nn.GroupNorm(1, 4))
    assert sizes(network)["c"] == [4, 4]


@pytest.mark.parametrize(
    ("name", "together"),
    [("resnext50_32x4d", {4, 8, 16, 32}), ("regnet_y_400mf", {8}), ("shufflenet_v2_x0_5", {8})],
)
@pytest.mark.fast("shufflenet_v2_x0_5-together2")
def test_torchvision_networks(name: str, together: set[int]) -> None:
    network = wrap(torchvision_network(name), (3, 32, 32))
    groups, lost = channel_groups(network)
    assert lost == []
    assert {group.together for group in groups} - {1} == together


def test_a_tie_with_channels_that_nobody_follows_leaves_all_whole() -> None:
    index = torch.arange(2)[:, None]
    one = Coupled(2, (Item(("a", "out"), index), Item(("g", "in"), index)))
    tie = {("g", "in"): [0, 0], ("g", "out"): [0, 0]}
    (found,) = joined([one], [tie])
    assert found.whole
    other = Coupled(2, (Item(("g", "out"), index),))
    (found,) = joined([one, other], [tie])
    assert (found.channels, found.whole) == (1, False)
    assert {item.place: item.index.tolist() for item in found.items}[("g", "out")] == [[0, 1]]


def test_groups_without_ties_stay_as_they_are() -> None:
    index = torch.arange(3)[:, None]
    groups = [Coupled(3, (Item((name, "out"), index),)) for name in "ab"]
    found = joined(groups, [])
    assert [(one.channels, one.items[0].place, one.items[0].index.tolist()) for one in found] == [
        (3, (name, "out"), index.tolist()) for name in "ab"
    ]
