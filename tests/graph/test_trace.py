"""Reading a network: MACs by hand, what stays whole, what is refused, and that nothing is changed."""

import copy
import re

import pytest
import torch
from networks import SmallResNet, ThreeLayer, conv_block, small_resnet
from torch import Tensor, nn
from torch.nn import functional as F

from dynamize.errors import DynamizeError
from dynamize.graph.trace import trace


def test_macs_of_the_three_layer_net_are_those_computed_by_hand() -> None:
    traced = trace(ThreeLayer(), ThreeLayer.shape)
    macs = {node.name: node.meta["macs"] for node in traced.graph.nodes if node.meta["macs"]}
    assert macs == {"conv1": 6912, "conv2": 4608, "linear": 40}


def test_shapes_are_those_of_one_image() -> None:
    traced = trace(ThreeLayer(), ThreeLayer.shape)
    shapes = {node.name: node.meta["shape"] for node in traced.graph.nodes if node.op != "output"}
    assert shapes == {
        "x": (1, 3, 8, 8),
        "conv1": (1, 4, 8, 8),
        "relu": (1, 4, 8, 8),
        "conv2": (1, 8, 4, 4),
        "relu_1": (1, 8, 4, 4),
        "mean": (1, 8),
        "linear": (1, 5),
    }


def test_groups_and_batched_products_are_counted() -> None:
    class Grouped(ThreeLayer):
        def __init__(self) -> None:
            super().__init__()
            self.conv2 = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv2(self.conv1(x)).flatten(2)
            return self.linear((x @ x.transpose(1, 2)).mean(2))

    traced = trace(Grouped(), ThreeLayer.shape)
    macs = {node.name: node.meta["macs"] for node in traced.graph.nodes if node.meta["macs"]}
    assert macs == {"conv1": 6912, "conv2": 4608 / 4, "matmul": 8 * 16 * 8, "linear": 40}


@pytest.mark.parametrize("training", [True, False])
def test_the_original_network_is_left_alone(training: bool) -> None:
    network = small_resnet().train(training)
    network.layer1.eval()
    before, modes = copy.deepcopy(network.state_dict()), [module.training for module in network.modules()]
    trace(network, SmallResNet.shape)
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_parameter_names_are_kept() -> None:
    network = small_resnet()
    traced = trace(network, SmallResNet.shape)
    assert dict(traced.state_dict()).keys() == network.state_dict().keys()
    assert not traced.training


def test_tracing_draws_nothing_from_the_random_generator() -> None:
    network, before = small_resnet(), torch.get_rng_state()
    trace(network, SmallResNet.shape)
    assert torch.equal(torch.get_rng_state(), before)


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line that cannot be traced
            return x
        return -x


def test_untraceable_network_is_refused_with_module_path_source_line_and_repair() -> None:
    network = ThreeLayer()
    network.conv2 = nn.Sequential(network.conv2, nn.Sequential(DataDependent()))
    with pytest.raises(DynamizeError) as refused:
        trace(network, ThreeLayer.shape)
    message = str(refused.value)
    assert "module 'conv2.1.0'" in message
    assert re.search(r"test_trace\.py:\d+: if x\.sum\(\) > 0:", message)
    assert "torch.fx.wrap" in message
    assert "\n" not in message


def test_untraceable_top_module_is_named() -> None:
    class Top(ThreeLayer):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if bool((x > 0).all()) else x

    with pytest.raises(DynamizeError, match=r"^Top cannot be traced: the top module, .*test_trace\.py:\d+"):
        trace(Top(), ThreeLayer.shape)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 0, 0), (8, 8)])
def test_wrong_input_shape_is_refused_with_the_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(DynamizeError, match=re.escape(str(shape)) + ".*--input"):
        trace(ThreeLayer(), shape)


def test_networks_that_do_not_return_class_scores_are_refused() -> None:
    class Two(ThreeLayer):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x), x

    class Map(ThreeLayer):
        def forward(self, x: Tensor) -> Tensor:
            return self.conv1(x)

    with pytest.raises(DynamizeError, match="returns tuple, but a classifier returns one tensor"):
        trace(Two(), ThreeLayer.shape)
    with pytest.raises(DynamizeError, match=r"returns a tensor of shape \(1, 4, 8, 8\)"):
        trace(Map(), ThreeLayer.shape)


def test_a_batch_size_written_into_the_network_is_refused() -> None:
    class OneOnly(ThreeLayer):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.conv2(self.conv1(x)).mean((2, 3)).view(1, 8))

    with pytest.raises(DynamizeError, match="runs on one image but not on several"):
        trace(OneOnly(), ThreeLayer.shape)


def test_a_layer_that_bears_contiguous_memory_only_is_refused() -> None:
    class Viewing(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.view(len(x), -1).view(x.shape))

    network = ThreeLayer()
    network.conv2 = nn.Sequential(network.conv2, Viewing(8))
    with pytest.raises(DynamizeError, match=r"channels last in memory: view size .*write `reshape` there"):
        trace(network, ThreeLayer.shape)


def test_writing_through_a_view_is_refused_where_the_viewed_is_used_again() -> None:
    class Through(ThreeLayer):
        def forward(self, x: Tensor) -> Tensor:
            x = self.conv2(self.conv1(x))
            x.view(x.size(0), -1).relu_()
            return self.linear(x.mean((2, 3)))

    with pytest.raises(DynamizeError, match="writes in place into a part of `conv2`"):
        trace(Through(), ThreeLayer.shape)


class Scaled(nn.Module):
    """Shared by the in-place networks: values of both signs, so that a lost ReLU shows."""

    shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.linear = conv_block(3, 8), conv_block(8, 8), nn.Linear(8, 5)
        self.relu, self.identity = nn.ReLU(inplace=True), nn.Identity()


class ResultUnused(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) - 0.5
        F.relu(x, inplace=True)
        x = self.b(x) - 0.5
        x.relu_()
        x = x - 0.1
        self.relu(x)
        return self.linear(x.mean((2, 3)))


class OldNameUsed(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) - 0.5
        y = self.relu(x)
        return self.linear((x + self.b(y)).mean((2, 3)))


class OtherNameForTheSame(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) - 0.5
        y = self.identity(x)
        y.relu_()
        y.mul_(2)
        return self.linear((x + self.b(x)).mean((2, 3)))


@pytest.mark.parametrize("network", [ResultUnused(), OldNameUsed(), OtherNameForTheSame()])
def test_what_operators_overwrite_in_place_is_kept(network: nn.Module) -> None:
    images = torch.randn(4, 3, 8, 8)
    network.eval()
    assert torch.equal(trace(network, Scaled.shape)(images), network(images))


def test_writing_into_a_part_that_is_used_again_is_refused() -> None:
    class Part(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x) - 0.5
            x[:, :4].relu_()
            return self.linear(self.b(x).mean((2, 3)))

    with pytest.raises(DynamizeError, match="`relu_` writes in place into a part of `sub`"):
        trace(Part(), Scaled.shape)


def test_a_network_that_the_tracer_misreads_is_refused() -> None:
    class Alias(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            y = x
            x += 1  # traced as x = x + 1, which leaves y as it was
            return self.linear((self.b(x) + y).mean((2, 3)))

    with pytest.raises(DynamizeError, match="Alias answers differently once it is traced"):
        trace(Alias(), Scaled.shape)


def test_optional_arguments_take_their_defaults() -> None:
    class Optional(ThreeLayer):
        def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0, raw: bool = False) -> Tensor:
            if mask is not None:
                x = x * mask
            return x.mean((2, 3)) if raw else super().forward(x) * scale

    network, images = Optional().eval(), torch.randn(2, 3, 8, 8)
    traced = trace(network, ThreeLayer.shape)
    assert torch.equal(traced(images), network(images))
    assert [node.name for node in traced.graph.nodes if node.op == "placeholder"] == ["x"]


def test_double_precision_and_inference_mode() -> None:
    network, images = small_resnet().double(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.inference_mode():
        assert torch.equal(trace(network, SmallResNet.shape)(images), network(images))


def test_dropout_and_stochastic_depth_still_follow_the_training_flag() -> None:
    from torchvision.ops import StochasticDepth

    depth = StochasticDepth(0.5, "row")
    network = nn.Sequential(nn.Conv2d(3, 4, 3), depth, nn.Flatten(), nn.Dropout(), nn.Linear(144, 5))
    traced = trace(network, (3, 8, 8))
    kept = {type(module).__name__ for module in traced.modules()}
    assert {"StochasticDepth", "Dropout"} <= kept
    images = torch.randn(8, 3, 8, 8)
    assert torch.equal(traced(images), traced(images))
    traced.train()
    assert not torch.equal(traced(images), traced(images))


def test_subclasses_of_norm_and_convolution_stay_modules() -> None:
    timm_layers = pytest.importorskip("timm.layers", reason="needs timm: its norms are subclasses of torch's")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = timm_layers.create_conv2d(3, 8, 3, stride=2, padding="same")
            self.norm, self.path = timm_layers.BatchNormAct2d(8), timm_layers.DropPath(0.5)
            self.linear = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.path(self.norm(self.conv(x))).mean((2, 3)))

    network = Net().eval()
    traced = trace(network, (3, 9, 9))
    leaves = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    assert leaves == ["conv", "norm", "path", "linear"]
    traced.train()
    traced(torch.randn(8, 3, 9, 9))
    assert int(traced.norm.num_batches_tracked) == 1
    assert int(network.norm.num_batches_tracked) == 0
