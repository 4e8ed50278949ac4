"""Where a graph computes in bytes."""

import pytest
import torch
from networks import SmallResNet, close, small_resnet, torchvision_network
from random_blocks import SamePadding
from torch import Tensor, fx, nn
from torch.nn import functional

from dynamize.graph.integers import Places, find_places, note_shapes, prepared, whys


def places(network: nn.Module, *shape: int, keep: tuple[str, ...] = (), **ends: bool) -> tuple[fx.GraphModule, Places]:
    graph = prepared(network, torch.randn(1, *shape))
    note_shapes(graph, torch.randn(1, *shape))
    given = {"rounded_input": True, "rounded_output": False} | ends
    return graph, find_places(graph, keep_float=keep, **given)


def names(found: Places) -> set[str]:
    return {node.name for node, source in found.rounded.items() if node is source}


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "googlenet"])
def test_prepared_networks_answer_the_same(name: str) -> None:
    network, batch = torchvision_network(name), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert close(prepared(network, batch[:1])(batch), network(batch), 1e-5)


class Mixed(nn.Module):
    """A little of everything, with the in-place forms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.register_buffer("kernel", torch.randn(4, 4, 1, 1))
        self.dropout, self.linear = nn.Dropout(0.5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = functional.relu(self.conv1(x), inplace=True)
        b = self.conv2(a)
        b += functional.conv2d(x, self.kernel)
        c = functional.max_pool2d(torch.relu(b), 2)
        gate = torch.sigmoid(self.conv3(c).mean((2, 3), keepdim=True))
        d = torch.cat([c * gate, torch.exp(-c)], 1)
        return self.linear(self.dropout(d.mean((2, 3))))


def test_what_is_rounded() -> None:
    torch.manual_seed(0)
    network = Mixed().eval()
    graph, found = places(network, 4, 8, 8)
    batch = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        assert close(graph(batch), network(batch))
    called = {str(node.target): end.name for node, end in found.layers.items()}
    assert called == {
        "conv1": "relu",  # the clamp is computed by the convolution
        "conv2": "conv2",
        "kernel_layer": "kernel_layer",  # a function's convolution is a layer too
        "conv3": "conv3",
        "linear": "linear",
    }
    pooled = {node.name: source.name for node, source in found.rounded.items() if node is not source}
    assert pooled == {"max_pool2d": "relu_1"}  # a pool of the largest has the steps of what it reads
    rounded = names(found)
    assert {"x", "relu", "conv2", "kernel_layer", "relu_1", "conv3", "sigmoid", "mul"} <= rounded
    assert not {"conv1", "iadd", "exp", "cat", "linear"} & rounded  # fused, after a float operator, and the logits
    assert sum(name.startswith(("adaptive", "flatten")) for name in rounded) == 2  # before the sigmoid, before linear


def test_layers_kept_in_float_leave_their_outputs_alone() -> None:
    graph, found = places(Mixed().eval(), 4, 8, 8, keep=("conv2",))
    assert "conv2" not in {str(node.target) for node in found.layers}
    assert not {"conv2", "iadd", "relu_1"} & names(found)
    assert "relu" in names(found)  # the convolution before still gives bytes
    _, none = places(
        Mixed().eval(), 4, 8, 8, keep=("conv1", "conv2", "conv3", "kernel_layer", "linear"), rounded_input=False
    )
    assert none == Places({}, {})


def test_ends() -> None:
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Softplus())
    assert names(places(body, 3, 8, 8)[1]) == {"input_1", "_1"}
    assert names(places(body, 3, 8, 8, rounded_output=True)[1]) == {"input_1", "_1", "_2"}
    identity, found = places(nn.Sequential(nn.Identity()), 3, 8, 8)
    assert found.layers == {}
    assert identity(torch.ones(1)) == 1


def test_layers_that_are_called_twice_or_pad_otherwise_stay() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.mirrored = nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")

        def forward(self, x: Tensor) -> Tensor:
            return self.mirrored(self.conv(self.conv(x)))

    assert places(Twice().eval(), 3, 8, 8)[1].layers == {}


def test_residual_network() -> None:
    _, found = places(small_resnet(), *SmallResNet.shape, rounded_input=False)
    assert len(found.layers) == 16  # 15 convolutions and the classifier
    assert all(node.all_input_nodes[0] in found.rounded for node in found.layers)


@pytest.mark.parametrize(
    ("pool", "in_bytes"),
    [
        (nn.AvgPool2d(2), True),
        (nn.AdaptiveAvgPool2d(3), True),
        (nn.AvgPool2d(3, 2, padding=1), False),
        (nn.AvgPool2d(3, 2, ceil_mode=True), False),
        (nn.AvgPool2d(3, 2, padding=(0, 1), count_include_pad=False), False),
        (nn.AvgPool2d(2, divisor_override=3), False),
    ],
)
def test_means_over_borders_are_taken_in_float(pool: nn.Module, in_bytes: bool) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), pool).eval()
    assert ("_1" in names(places(network, 3, 9, 9)[1])) is in_bytes


def test_so_are_those_that_a_function_takes() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return functional.avg_pool2d(functional.avg_pool2d(self.conv(x), 2), 2, 1, 1)

    assert names(places(Net().eval(), 3, 9, 9)[1]) == {"x", "conv", "avg_pool2d"}


class Bordered(nn.Module):
    """A layer, and zeros put around what it gives by hand for a second one and a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.zeros, self.second = SamePadding(3, 4, 3, 2), nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(4, 4, 3, 2)
        self.last = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.zeros(self.first(x)))
        return self.last(functional.max_pool2d(functional.pad(x, (1, 1, 1, 1)), 2))


@pytest.mark.parametrize("rounded_input", [True, False])
def test_zeros_around_a_map_have_its_steps(rounded_input: bool) -> None:
    torch.manual_seed(0)
    network, batch = Bordered().eval(), torch.randn(2, 3, 32, 32)
    graph, found = places(network, 3, 32, 32, rounded_input=rounded_input)
    with torch.no_grad():
        assert close(graph(batch), network(batch))
    assert len(found.layers) == 3
    assert names(found) == {"x", "first", "second", "last"}  # and no steps of their own for zeros and the pool


class Squared(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) ** 2


class FewBytes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain, self.twice = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.edge, self.up = nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), nn.ConvTranspose2d(3, 3, 1)
        self.last = Squared(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.edge(self.twice(functional.relu(self.twice(self.plain(x))))))
        return self.last(functional.conv2d(x, x.mean((0, 2, 3)).expand(3, 3)[..., None, None]).mean((2, 3)))


def test_what_has_no_form_in_bytes_is_told_with_a_reason() -> None:
    module = prepared(FewBytes(), torch.zeros(1, 3, 8, 8))
    told = {
        "twice": "called more than once",
        "edge": "pads otherwise than with zeros",
        "conv2d": "called as a function",
    }
    assert whys(module) == told | {"up": "of the class ConvTranspose2d", "last": "of the class Squared"}
