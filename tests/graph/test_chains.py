"""Private channel chains: exact expectations for small networks, counts for architectures worked out by hand."""

from collections.abc import Callable

import pytest
import torch
from networks import randomise_norms, torchvision_network
from quick import only
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import vgg
from torchvision.ops import FrozenBatchNorm2d

from dynamize.graph.chains import Chain, private_chains, why_whole
from dynamize.graph.cuts import cut_points
from dynamize.graph.extract import extract
from dynamize.graph.trace import trace
from dynamize.models import create

SHAPE = (3, 8, 8)


class Net(nn.Module):
    """Named layers and a forward written beside them; ends in a linear layer on ``width`` values, pooled or as is."""

    def __init__(self, forward: Callable, width: int, pooled: bool = True, **layers: nn.Module) -> None:
        super().__init__()
        self.body, self.pooled = forward, pooled
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.last = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self, x)
        return self.last(x.mean((2, 3)) if self.pooled else x)


class Affine(nn.Module):
    """A scale and a shift of each channel by itself, as parameters that no layer holds."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(shape) + 0.5), nn.Parameter(torch.rand(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


def conv(inputs: int, outputs: int, size: int = 1, **more: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **more)


def chains(network: nn.Module) -> list[Chain]:
    return private_chains(trace(randomise_norms(network), SHAPE))


def layers(found: list[Chain]) -> list[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]]:
    return [(chain.producers, chain.per_channel, chain.consumers) for chain in found]


def test_convolution_norm_activation_convolution() -> None:
    net = Net(lambda n, x: n.b(F.relu(n.norm(n.a(x)))), 5, a=conv(3, 6, 3), norm=nn.BatchNorm2d(6), b=conv(6, 5))
    first, second = chains(net)
    # a: 8 * 8 pixels * 6 * 3 * 3*3 = 10368, b: 64 * 5 * 6 = 1920, last: 5 * 3 = 15
    assert first == Chain("a", 6, ("a",), ("norm",), ("b",), 10368.0 + 1920)
    assert second == Chain("b", 5, ("b",), (), ("last",), 1920.0 + 15)


def test_bottleneck_has_two_and_its_trunk_none() -> None:
    def forward(n: Net, x: Tensor) -> Tensor:
        x = n.stem(x)
        return F.relu(x + n.c(F.relu(n.b(F.relu(n.a(x))))))

    net = Net(forward, 8, stem=conv(3, 8), a=conv(8, 4), b=conv(4, 6, 3), c=conv(6, 8))
    assert layers(chains(net)) == [(("a",), (), ("b",)), (("b",), (), ("c",))]


def test_depthwise_convolution_belongs_to_the_chain() -> None:
    def forward(n: Net, x: Tensor) -> Tensor:
        x = n.stem(x)
        return x + n.project(n.norm2(n.depthwise(F.relu6(n.norm1(n.expand(x))))))

    net = Net(
        forward,
        4,
        stem=conv(3, 4),
        expand=conv(4, 8),
        norm1=nn.BatchNorm2d(8),
        depthwise=conv(8, 8, 3, groups=8),
        norm2=nn.BatchNorm2d(8),
        project=conv(8, 4),
    )
    assert layers(chains(net)) == [(("expand",), ("norm1", "depthwise", "norm2"), ("project",))]


def squeeze_convs(n: Net, x: Tensor) -> Tensor:
    x = F.relu(n.a(x))
    return n.b(F.hardsigmoid(n.fc2(F.relu(n.fc1(F.adaptive_avg_pool2d(x, 1))))) * x)


def squeeze_linear(n: Net, x: Tensor) -> Tensor:
    x = F.relu(n.a(x))
    batch, channels, _, _ = x.size()
    gates = F.adaptive_avg_pool2d(x, 1).view(batch, channels)
    gates = n.fc2(F.relu(n.fc1(gates))).sigmoid().view(batch, channels, 1, 1)
    return n.b(x * gates.expand_as(x))


def squeeze_indexed(n: Net, x: Tensor) -> Tensor:
    x = F.relu(n.a(x))
    gates = torch.sigmoid(n.fc2(F.relu(n.fc1(x.mean([2, 3])))))
    return n.b(x.mul(gates[:, :, None, None]))


SQUEEZES = [
    pytest.param(squeeze_convs, conv, id="convolutions"),
    pytest.param(squeeze_linear, nn.Linear, id="linear layers and views"),
    pytest.param(squeeze_indexed, nn.Linear, id="linear layers and indexing"),
]


@pytest.mark.parametrize(("forward", "layer"), SQUEEZES)
def test_squeeze_and_excitation_reads_and_produces(forward: Callable, layer: Callable) -> None:
    net = Net(forward, 5, a=conv(3, 8), fc1=layer(8, 2), fc2=layer(2, 8), b=conv(8, 5))
    first, _ = chains(net)  # the two squeezed channels are no chain
    assert layers([first]) == [(("a", "fc2"), (), ("fc1", "b"))]
    assert first.name == "a"


def test_a_gate_from_one_layer_is_producer_and_consumer() -> None:
    def forward(n: Net, x: Tensor) -> Tensor:
        x = n.a(x)
        return n.b(x * F.hardsigmoid(n.fc(x.mean((2, 3), keepdim=True))))

    found = chains(Net(forward, 5, a=conv(3, 8), fc=conv(8, 8), b=conv(8, 5)))
    assert layers(found[:1]) == [(("a", "fc"), (), ("fc", "b"))]


def test_a_gate_for_all_channels_at_once_leaves_them_private() -> None:
    def forward(n: Net, x: Tensor) -> Tensor:
        x = n.a(x)
        return n.b(x * torch.sigmoid(n.where(x)))

    found = chains(Net(forward, 5, a=conv(3, 8), where=conv(8, 1, 3), b=conv(8, 5)))
    assert layers(found[:1]) == [(("a",), (), ("where", "b"))]


def test_two_readers_and_sums_among_themselves() -> None:
    def forward(n: Net, x: Tensor) -> Tensor:
        x = n.a(x)
        x = x + 0.5 * n.each(F.pad(x, (1, 1, 1, 1)))
        return torch.cat([n.b(x), n.c(F.max_pool2d(x, 3, 1, 1))], 1)

    net = Net(forward, 9, a=conv(3, 6), each=nn.Conv2d(6, 6, 3, groups=6), b=conv(6, 5), c=conv(6, 4))
    assert layers(chains(net)) == [(("a",), ("each",), ("b", "c"))]


def test_per_channel_parameters_of_activations() -> None:
    net = Net(lambda n, x: n.b(n.one(n.many(n.a(x)))), 5, a=conv(3, 6), many=nn.PReLU(6), one=nn.PReLU(), b=conv(6, 5))
    assert layers(chains(net)[:1]) == [(("a",), ("many",), ("b",))]


def joined(n: Net, x: Tensor) -> Tensor:
    x = n.a(x)
    return n.b(torch.cat([x, x], 1)[:, :6])


def shuffled(n: Net, x: Tensor) -> Tensor:
    x = n.a(x)
    return n.b(x.view(x.size(0), 2, 3, 8, 8).transpose(1, 2).reshape(x.shape))


def counted(n: Net, x: Tensor) -> Tensor:
    x = n.a(x)
    return n.b(x / x.shape[1])


def constant(n: Net, x: Tensor) -> Tensor:
    return n.b(F.relu(n.a(x)).view(-1, 6, 8, 8))


def named(n: Net, x: Tensor) -> Tensor:
    return n.b(n.a(x).reshape(shape=(-1, 6, 8, 8)))


def padded(n: Net, x: Tensor) -> Tensor:
    return n.b(F.pad(n.a(x), (0, 0, 0, 0, 1, 1))[:, 1:7])


def twice(n: Net, x: Tensor) -> Tensor:
    return n.b(n.a(x)) + n.b(n.a(x).abs())


def other_gate(n: Net, x: Tensor) -> Tensor:
    return n.b(n.a(x) * torch.sigmoid(n.c(x)))


def two_tensors(n: Net, x: Tensor) -> Tensor:
    return n.b(n.a(x) + n.c(x))


@pytest.mark.parametrize(
    "forward", [joined, shuffled, counted, constant, named, padded, twice, other_gate, two_tensors]
)
def test_channels_that_something_else_sees_are_not_private(forward: Callable) -> None:
    net = Net(lambda n, x: torch.sin(forward(n, x)), 5, a=conv(3, 6), c=conv(3, 6), b=conv(6, 5))
    assert chains(net) == []


@pytest.mark.parametrize(
    "between",
    [
        nn.GroupNorm(1, 6),
        nn.Sequential(nn.GroupNorm(2, 6), nn.GroupNorm(3, 6)),
        nn.Softmax(1),
        nn.ConvTranspose2d(6, 6, 1),
        nn.LocalResponseNorm(2),
        nn.Softmax2d(),
        nn.ChannelShuffle(2),
    ],
    ids=repr,
)
def test_layers_that_mix_channels_end_a_chain(between: nn.Module) -> None:
    net = Net(lambda n, x: n.b(n.between(n.a(x))).sin(), 5, a=conv(3, 6), between=between, b=nn.LazyConv2d(5, 1))
    net(torch.zeros(1, *SHAPE))
    assert chains(net) == []


@pytest.mark.parametrize(
    ("between", "together"),
    [
        (nn.GroupNorm(2, 6), 3),
        (nn.GroupNorm(3, 6, affine=False), 2),
        (conv(6, 6, 3, groups=2), 3),
        (nn.Conv2d(6, 12, 1, groups=6), 1),
        (nn.Conv2d(6, 3, 1, groups=3), 2),
        (nn.Sequential(conv(6, 6, groups=6), nn.GroupNorm(3, 6), nn.Conv2d(6, 6, 1, groups=3)), 2),
        (nn.InstanceNorm2d(6), 1),
        (nn.InstanceNorm2d(6, affine=True, track_running_stats=True), 1),
        (Affine((6, 1, 1)), 1),
        (Affine((1, 6, 1, 1)), 1),
        (FrozenBatchNorm2d(6), 1),
    ],
    ids=repr,
)
def test_channels_go_together_where_layers_group_them(between: nn.Module, together: int) -> None:
    net = Net(lambda n, x: n.b(n.between(n.a(x))).sin(), 5, a=conv(3, 6), between=between, b=nn.LazyConv2d(5, 1))
    net(torch.zeros(1, *SHAPE))
    (chain,) = chains(net)
    assert (chain.name, chain.channels, chain.together) == ("a", 6, together)


def test_a_parameter_that_others_read_too_ends_a_chain() -> None:
    def forward(n: Net, x: Tensor) -> Tensor:
        return n.b(n.between(n.a(x))).sin() + n.between.scale.sum()

    assert chains(Net(forward, 5, a=conv(3, 6), between=Affine((6, 1, 1)), b=conv(6, 5))) == []


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (nn.Softmax2d(), "`between` (Softmax2d) sees them"),
        (nn.GroupNorm(1, 6), "no common border (GroupNorm)"),
    ],
    ids=repr,
)
def test_why_channels_are_no_chain(between: nn.Module, reason: str) -> None:
    net = Net(lambda n, x: n.b(n.between(n.a(x))).sin(), 5, a=conv(3, 6), between=between, b=conv(6, 5))
    assert reason in why_whole(trace(net, SHAPE))["a"]


def test_a_tied_weight_is_left_alone() -> None:
    net = Net(lambda n, x: n.c(n.b(n.a(x))).sin(), 6, a=conv(3, 6), b=conv(6, 6), c=conv(6, 6))
    assert [chain.name for chain in chains(net)] == ["a", "b"]
    net.c.weight = net.b.weight  # type: ignore[union-attr]
    assert chains(net) == []


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias)


class Renamed(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias)


def test_subclasses_are_tried_out() -> None:
    def names(kind: type[nn.Conv2d]) -> list[str]:
        net = Net(lambda n, x: n.c(n.b(n.a(x))).sin(), 4, a=conv(3, 6), b=kind(6, 5, 1), c=conv(5, 4))
        return [chain.name for chain in chains(net)]

    assert names(Renamed) == ["a", "b"]
    assert names(Standardised) == ["b"]  # each filter stands by itself, but its inputs share one mean


def test_a_normalised_weight_is_no_plain_parameter() -> None:
    weighted = nn.utils.parametrizations.weight_norm(conv(6, 5))
    assert chains(Net(lambda n, x: n.b(n.a(x)).sin(), 5, a=conv(3, 6), b=weighted)) == []


@pytest.mark.parametrize(
    "flatten",
    [
        lambda n, x: x.flatten(1),
        lambda n, x: x.view(x.size(0), -1),
        lambda n, x: torch.flatten(x, 1),
        lambda n, x: n.flatten(x),
    ],
    ids=["method", "view", "function", "module"],
)
@pytest.mark.parametrize("side", [1, 2])
def test_flattened_maps_feed_a_linear_layer(flatten: Callable, side: int) -> None:
    def forward(n: Net, x: Tensor) -> Tensor:
        return n.dropout(flatten(n, F.adaptive_avg_pool2d(n.a(x), side)))

    found = chains(
        Net(forward, 6 * side * side, pooled=False, a=conv(3, 6), dropout=nn.Dropout(), flatten=nn.Flatten())
    )
    assert layers(found) == [(("a",), (), ("last",))]


def test_flattened_with_something_between_is_refused() -> None:
    net = Net(lambda n, x: n.a(x).flatten(1).sigmoid(), 6 * 64, pooled=False, a=conv(3, 6))
    assert chains(net) == []


def test_a_region_between_two_cuts() -> None:
    traced = trace(create("cifar_resnet20"), (3, 32, 32))
    cuts = cut_points(traced)
    found = [
        chain
        for first, last in zip(cuts, cuts[1:], strict=False)
        for chain in private_chains(extract(traced, first.name, last.name))
    ]
    assert found == private_chains(traced)
    assert [chain.channels for chain in found] == [16] * 3 + [32] * 3 + [64] * 3


COUNTS = {
    "resnet18": 8,  # one in each block
    "resnet50": 33,  # two in each block, and the stem, which only two convolutions read
    "mobilenet_v2": 20,  # 17 blocks (the first one's begins at the stem), 3 projections without shortcut and the head
    "mobilenet_v3_small": 13,  # 11 blocks, 1 projection without shortcut, the last convolution
    "efficientnet_b0": 19,  # 16 blocks, 2 projections without shortcut, the last convolution
    "squeezenet1_1": 9,  # the stem and 8 squeezes with two readers each
    "googlenet": 21,  # 3 of the stem, 2 in each of 9 modules
    "densenet121": 58,  # the bottleneck of each layer
    "regnet_y_400mf": 17,  # one in each block, through its grouped convolution, and the stem
    "resnext50_32x4d": 17,  # likewise
    "shufflenet_v2_x0_5": 18,  # 16 units, the stem and the head
    "convnext_tiny": 0,  # layer norms see all channels
    "inception_v3": 50,  # 5 of the stem, 3 * 3 (A), 2 (B), 4 * 6 (C), 4 (D), 2 * 3 (E)
    "mnasnet0_5": 20,  # 17 blocks, 2 projections without shortcut, the last convolution
}


@pytest.mark.parametrize(
    ("name", "count"), only(["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"], COUNTS.items())
)
@pytest.mark.fast("resnet18-8", "mobilenet_v3_small-13")
def test_torchvision_networks(name: str, count: int) -> None:
    side = 75 if name == "inception_v3" else 64
    assert_chains(torchvision_network(name), side, count)


def small_vgg() -> nn.Module:
    """torchvision's vgg11_bn with only one linear layer, which reads 7 * 7 values of each channel."""
    features = vgg.make_layers(vgg.cfgs["A"], batch_norm=True)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Dropout(), nn.Linear(512 * 7 * 7, 10))


def test_vgg_has_one_for_each_convolution() -> None:
    assert_chains(small_vgg(), 64, 8)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("tf_efficientnet_b0", 19),  # Conv2dSame and BatchNormAct2d; counted as torchvision's
        ("resnetv2_50x1_bit", 0),  # group norm, standardised weights
        ("seresnet18", 8),  # its gates belong to the trunk
    ],
)
@pytest.mark.fast("seresnet18-8")
def test_timm_networks(name: str, count: int) -> None:
    timm = pytest.importorskip("timm", reason="needs timm, whose networks are read")
    assert_chains(timm.create_model(name, pretrained=False, num_classes=10), 64, count)


def assert_chains(network: nn.Module, side: int, count: int) -> None:
    traced = trace(network, (3, side, side))
    found = private_chains(traced)
    assert len(found) == count
    for side_of in ("producers", "consumers", "per_channel"):
        targets = [target for chain in found for target in getattr(chain, side_of)]
        assert len(targets) == len(set(targets))
    order = [node.name for node in traced.graph.nodes]
    assert sorted(found, key=lambda chain: order.index(chain.name)) == found
