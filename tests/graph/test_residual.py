"""Residual blocks of networks whose blocks are known, and what an image goes through whose branch is skipped."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import SmallResNet, ThreeLayer, close, conv_block, randomise_norms, small_resnet, torchvision_network
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dynamize.errors import DynamizeError
from dynamize.graph.extract import extract
from dynamize.graph.residual import ResidualBlock, bypass, residual_blocks, runs, why_not
from dynamize.graph.trace import trace
from dynamize.models import create

CONV = 8 * 8 * 8 * 8 * 9  # MACs of a 3x3 convolution of 8 channels on 8x8 pixels
POINTWISE = 8 * 8 * 8 * 8
NO_SUM = "no sum of a shortcut and a branch"
SCALED = "its sum is scaled by alpha or written into another tensor"
UNCLEAR = "it is unclear which of its summands is the shortcut"
FREE = "what is added to the shortcut has no multiply-accumulates to save"
CONCATENATED = "parallel branches meet in a concatenation"


class Pieces(nn.Module):
    """Layers for a block of 8 channels that each test puts together in a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
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


class TestIdentity:
    def test_of_a_small_resnet(self) -> None:
        traced = trace(small_resnet(), SmallResNet.shape)
        blocks = residual_blocks(traced)
        assert [block.module for block in blocks] == [f"layer{stage}.{i}" for stage in (1, 2, 3) for i in (0, 1)]
        assert [block.identity for block in blocks] == [True, True, False, True, False, True]
        assert [block.shape for block in blocks] == [(8, 16, 16)] * 3 + [(16, 8, 8)] * 2 + [(24, 4, 4)]
        assert all(a.upto == b.after for a, b in zip(blocks, blocks[1:], strict=False))
        assert blocks[0].macs == 2 * 16 * 16 * 8 * 8 * 9
        assert blocks[2].macs == 8 * 8 * (8 * 16 * 9 + 16 * 16 * 9 + 8 * 16)
        assert [block.bypass_macs for block in blocks] == [0, 0, 8 * 8 * 8 * 16, 0, 4 * 4 * 16 * 24, 0]
        assert [len(run) for run in runs(blocks)] == [2, 1, 1]
        assert why_not(traced) == {}

    @pytest.mark.parametrize(
        "forward",
        [
            lambda m, x: m.relu(m.f(x) + x),
            lambda m, x: F.relu(x + m.f(x)),
            lambda m, x: torch.add(m.f(x), x).relu(),
            lambda m, x: torch.relu(m.f(x).add_(m.nothing(x))),
            lambda m, x: m.f(x).add(other=x),
            lambda m, x: m.nothing(m.f(x) + x.contiguous()),
            lambda m, x: torch.add(x, m.f(x), alpha=1),
            lambda m, x: x + m.f(x) * m.scale,
            lambda m, x: x + m.f(x) + m.g(x),
            lambda m, x: m.f(x) + (m.g(x) + m.nothing(x)),
            lambda m, x: x + m.g(m.pointwise(x) + m.f(m.pointwise(x))),
            lambda m, x: x + m.f(m.norm(x).relu()),
            lambda m, x: x + m.f(x) * F.adaptive_avg_pool2d(m.pointwise(x), 1).sigmoid(),
        ],
    )
    def test_however_it_is_written(self, forward: Forward) -> None:
        traced = traced_net(forward)
        block = only_block(traced)
        assert (block.identity, block.bypass_macs, block.shape) == (True, 0, (8, 8, 8))
        assert block.module == "block"
        assert block.macs >= CONV
        assert bypass(traced, block) is None

    @pytest.mark.parametrize(
        ("before", "after", "identity"),
        [
            (nn.ReLU(), nn.ReLU(), True),
            (nn.ReLU6(), nn.ReLU(), True),
            (nn.ReLU(), nn.ReLU6(), False),
            (nn.ReLU6(), nn.ReLU6(), True),
            (nn.ReLU6(), nn.Hardtanh(0, 6), True),
            (nn.Hardtanh(-1, 2), nn.Hardtanh(-1, 2), True),
            (nn.Hardtanh(-1, 2), nn.ReLU(), False),
            (nn.Identity(), nn.ReLU(), False),
            (nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 1, 1)), nn.ReLU(), True),
            (nn.Sequential(nn.ReLU(), nn.AvgPool2d(3, 1, 1)), nn.ReLU6(), False),
            (nn.SiLU(), nn.SiLU(), False),
            (nn.ReLU(), nn.Dropout(0.0), True),
            (nn.ReLU(), nn.Dropout(0.5), False),
        ],
    )
    def test_behind_an_activation_that_changes_nothing_more(
        self, before: nn.Module, after: nn.Module, identity: bool
    ) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), before)
                self.f, self.after = nn.Conv2d(8, 8, 3, padding=1), after
                self.end, self.linear = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

            def forward(self, x: Tensor) -> Tensor:
                x = self.stem(x)
                return self.linear(self.end(self.after(x + self.f(x))).mean((2, 3)))

        traced = trace(Net(), (3, 8, 8))
        (block,) = residual_blocks(traced)
        assert block.identity == identity
        x = extract(traced, None, block.after)(torch.randn(2, 3, 8, 8)).detach()
        if identity:
            assert torch.equal(after.eval()(x), x)
        assert torch.equal(skipped(traced, block, x), after.eval()(x.clone()))

    def test_behind_a_functional_max_pool(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stem, self.f = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
                self.end, self.linear = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

            def forward(self, x: Tensor) -> Tensor:
                x = F.max_pool2d(F.relu6(self.stem(x)), 2)
                return self.linear(self.end(F.relu6(x + self.f(x))).mean((2, 3)))

        assert [block.identity for block in residual_blocks(trace(Net(), (3, 8, 8)))] == [True]


class TestBypass:
    @pytest.mark.parametrize(
        ("forward", "wanted", "macs"),
        [
            (lambda m, x: m.relu(m.f(x) + m.pointwise(x)), lambda m, x: F.relu(m.pointwise(x)), POINTWISE),
            (lambda m, x: m.relu(m.pointwise(x) + m.f(x)), lambda m, x: F.relu(m.pointwise(x)), POINTWISE),
            (lambda m, x: (m.pointwise(x) + m.f(x)).add_(m.g(m.f(x))), lambda m, x: m.pointwise(x), POINTWISE),
            (lambda m, x: m.silu(m.f(x) + x), lambda m, x: F.silu(x), 0),
            (lambda m, x: m.silu(m.nothing(m.f(x).add_(x.clone()))), lambda m, x: F.silu(x), 0),
            (lambda m, x: m.norm(m.f(x) + x), lambda m, x: m.norm(x), 0),
            (lambda m, x: F.max_pool2d(m.f(x) + x, 2), lambda m, x: F.max_pool2d(x, 2), 0),
            (lambda m, x: m.norm(x) + m.f(x), lambda m, x: m.norm(x), 0),
            (lambda m, x: m.f(x)[:, :, 1:] + x[:, :, 1:], lambda m, x: x[:, :, 1:], 0),
            (lambda m, x: m.silu(m.f(x)[:, :, 1:] + x[:, :, 1:]), lambda m, x: F.silu(x[:, :, 1:]), 0),
            (lambda m, x: m.f(x) + x + m.scale, lambda m, x: x + m.scale, 0),
            (lambda m, x: x * m.scale + m.f(x), lambda m, x: x * m.scale, 0),
        ],
    )  # fmt: skip
    def test_is_the_shortcut_and_what_follows_the_sum(self, forward: Forward, wanted: Forward, macs: float) -> None:
        network = net_of(forward)
        traced = trace(network, (3, 8, 8))
        block = only_block(traced)
        assert (block.identity, block.bypass_macs) == (False, macs)
        path = bypass(traced, block)
        assert path is not None
        assert sum(node.meta["macs"] for node in path.graph.nodes if node.op != "output") == macs
        x = torch.randn(2, 8, 8, 8)
        held = x.clone()
        with torch.no_grad():
            assert torch.equal(path(x), wanted(network.get_submodule("block"), held.clone()))
        assert torch.equal(x, held)

    def test_an_activation_written_out_may_follow_the_sum(self) -> None:
        def forward(m: Pieces, x: Tensor) -> Tensor:
            y = m.f(x) + x
            return y * F.relu6(y + 3) / 6

        traced = traced_net(forward)
        x = torch.randn(2, 8, 8, 8)
        assert close(skipped(traced, only_block(traced), x), F.hardswish(x))

    def test_shares_only_its_own_modules_and_leaves_the_network_as_it_was(self) -> None:
        network = net_of(lambda m, x: m.silu(m.norm(m.f(x) * m.scale + m.pointwise(x))))
        traced = trace(network, (3, 8, 8))
        before = str(traced.graph)
        path = bypass(traced, only_block(traced))
        assert path is not None
        assert str(traced.graph) == before
        assert not any(module.training for module in path.modules())
        assert {name.rsplit(".", 1)[0] for name in path.state_dict()} == {"block.pointwise", "block.norm"}
        original = dict(traced.named_parameters())
        assert all(value is original[name] for name, value in path.named_parameters())
        images = torch.randn(2, 3, 8, 8)
        assert torch.equal(traced(images), network(images))

    def test_trains(self) -> None:
        traced = traced_net(lambda m, x: m.silu(m.f(x) + m.norm(x))).train()
        path = bypass(traced, only_block(traced))
        assert path is not None
        assert path.training
        x = torch.randn(2, 8, 8, 8, requires_grad=True)
        norm = nn.BatchNorm2d(8)
        norm.load_state_dict(traced.get_submodule("block.norm").state_dict())
        assert close(path(x), F.silu(norm(x)))
        path(x).sum().backward()
        assert x.grad is not None
        assert traced.get_submodule("block.norm").weight.grad is not None

    def test_of_another_network_is_refused(self) -> None:
        block = only_block(traced_net(lambda m, x: m.silu(m.f(x) + x)))
        other = traced_net(lambda m, x: m.f(x) + x)
        with pytest.raises(DynamizeError, match="'block' from `stem_2` to `block_silu` is no residual block of this"):
            bypass(other, block)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: m.f(x), NO_SUM),
        (lambda m, x: x * m.f(x), NO_SUM),
        (lambda m, x: x - m.f(x), NO_SUM),
        (lambda m, x: m.f(x) + m.scale, NO_SUM),
        (lambda m, x: m.f(x) + 1, NO_SUM),
        (lambda m, x: (m.f(x) + x) * x, NO_SUM),
        (lambda m, x: F.interpolate(m.g((y := F.adaptive_avg_pool2d(x, 1)) + m.pointwise(y)), size=8), NO_SUM),
        (lambda m, x: m.f(x) + x.mean((2, 3), keepdim=True), FREE),
        (lambda m, x: torch.cat([x, m.f(x)], 1)[:, 4:12], CONCATENATED),
        (lambda m, x: torch.add(x, m.f(x), alpha=2), SCALED),
        (lambda m, x: m.relu(x.add(m.f(x), alpha=0.5)), SCALED),
        (lambda m, x: torch.add(x, m.f(x), out=x * 1), SCALED),
        pytest.param(
            lambda m, x: torch.add(x, 2, m.f(x)),
            SCALED,
            marks=pytest.mark.filterwarnings("ignore:This overload of add"),
        ),
        (lambda m, x: x + x + m.f(x), UNCLEAR),
        (lambda m, x: m.f(x) + m.g(x), UNCLEAR),
        (lambda m, x: (y := m.pointwise(x)) + m.g(y * x), UNCLEAR),
        (
            lambda m, x: m.narrow(x) + F.adaptive_avg_pool2d(m.f(x), 1),
            "a shortcut would have to be broadcast to the shape of the sum",
        ),
        (lambda m, x: F.avg_pool2d(m.f(x) * x, 3, 1, 1) + m.norm(m.f(x) * x), UNCLEAR),
    ],
)
def test_what_is_no_residual_block(forward: Forward, reason: str) -> None:
    traced = traced_net(forward)
    assert [block.after for block in residual_blocks(traced)] == []
    assert reason in why_not(traced).values()


@pytest.mark.parametrize("again", [lambda m, y: y, lambda m, y: m.nothing(y)])
def test_a_sum_without_work_belongs_to_what_follows_the_block_before(again: Forward) -> None:
    def forward(m: Pieces, x: Tensor) -> Tensor:
        y = x + m.f(x)
        return again(m, y) + F.avg_pool2d(y, 3, 1, 1)

    traced = traced_net(forward)
    block = only_block(traced)
    x = torch.randn(2, 8, 8, 8)
    assert not block.identity
    assert torch.equal(skipped(traced, block, x), x + F.avg_pool2d(x, 3, 1, 1))


def test_a_block_that_the_tracer_keeps_whole_is_said_to_be_so() -> None:
    class DropPathBlock(nn.Module):  # by its name a leaf of the tracer
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.linear = conv_block(3, 8), DropPathBlock(), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.block(self.stem(x)).mean((2, 3)))

    traced = trace(Net(), (3, 8, 8))
    assert residual_blocks(traced) == []
    assert why_not(traced) == {"block": "DropPathBlock is traced as a whole, so a sum inside it cannot be seen"}


def test_one_reason_stands_for_a_module_and_a_second_one_for_its_node() -> None:
    class Straight(ThreeLayer):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(4)))
            self.join = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(self.conv1(x))
            return self.linear(self.join(torch.cat([x, self.body[0](x)], 1)).mean((2, 3)))

    found = why_not(trace(Straight(), Straight.shape))
    assert found == {"body": NO_SUM, "cat": CONCATENATED, "join": NO_SUM}


class TestRuns:
    @staticmethod
    def block(after: str, upto: str, identity: bool = True) -> ResidualBlock:
        return ResidualBlock(after, upto, upto, (8, 4, 4), 10.0, 0.0, identity)

    def test_break_at_other_blocks_and_at_gaps(self) -> None:
        blocks = [self.block("a", "b"), self.block("b", "c"), self.block("c", "d", False), self.block("d", "e")]
        blocks += [self.block("f", "g"), self.block("g", "h")]
        assert runs(blocks) == [blocks[:2], blocks[3:4], blocks[4:]]

    def test_of_nothing(self) -> None:
        assert runs([]) == []
        assert runs([self.block("a", "b", False)]) == []


def network_of(name: str) -> nn.Module:
    library, model = name.split(":")
    if library == "timm":
        return pytest.importorskip("timm").create_model(model, num_classes=10).eval()
    return torchvision_network(model) if library == "torchvision" else create(model).eval()


NETWORKS: dict[str, tuple[int, int, int]] = {  # blocks, identities, blocks with a shortcut that computes
    # stages of 2, 2, 2, 2 and 3, 4, 6, 3 blocks; the first of a stage projects, but not behind resnet18's max pool
    "torchvision:resnet18": (8, 5, 3),
    "torchvision:resnet50": (16, 12, 4),
    "torchvision:resnext50_32x4d": (16, 12, 4),
    "torchvision:regnet_y_400mf": (16, 12, 4),  # 1, 3, 6, 6
    # inverted residuals skip where neither stride nor width changes: all but the first of a stage
    "torchvision:mobilenet_v2": (10, 10, 0),  # 1, 2, 3, 4, 3, 3, 1
    "torchvision:mobilenet_v3_small": (6, 6, 0),
    "torchvision:efficientnet_b0": (9, 9, 0),  # 1, 2, 2, 3, 3, 4, 1
    "torchvision:mnasnet0_5": (10, 10, 0),  # 3, 3, 3, 2, 4, 1
    "torchvision:convnext_tiny": (18, 15, 0),  # 3, 3, 9, 3; the last of three stages ends in the next one's norm
    "dynamize:cifar_resnet20": (9, 7, 2),  # 3, 3, 3
    "timm:resnet18": (8, 5, 3),
    "timm:resnetv2_50": (16, 8, 4),  # every stage's first projects and its last ends in the next one's norm
    "timm:convnext_atto": (12, 9, 0),  # 2, 2, 6, 2
    "timm:mobilenetv4_conv_small": (10, 10, 0),  # two stages of six
    "timm:regnety_002": (13, 9, 4),  # 1, 1, 4, 7
    "timm:repvgg_a0": (
        21,
        0,
        4,
    ),  # 2, 4, 14, 1; the cheapest of three parallel summands is a norm, or a 1x1 convolution
}


@pytest.mark.parametrize("name", NETWORKS)
def test_known_architectures(name: str) -> None:
    traced = trace(network_of(name), (3, 64, 64))
    blocks = residual_blocks(traced)
    costly = [block for block in blocks if block.bypass_macs]
    assert (len(blocks), sum(block.identity for block in blocks), len(costly)) == NETWORKS[name]
    assert len({block.module for block in blocks}) == len(blocks)
    assert all(block.bypass_macs < block.macs for block in blocks)
    others = [block for block in blocks if not block.identity]
    for block in (*others[:1], *others[-1:]):
        x = torch.randn(2, *block.shape)
        assert skipped(traced, block, x).shape == extract(traced, block.after, block.upto)(x).shape


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("alexnet", {NO_SUM}),
        ("vgg11", {NO_SUM}),
        ("squeezenet1_1", {NO_SUM, CONCATENATED}),
        ("densenet121", {NO_SUM, CONCATENATED}),
    ],
)
def test_architectures_without_residuals(name: str, reasons: set[str]) -> None:
    with torch.device("meta"):  # without the classifier, whose random weights would take most of the time
        features = torchvision.models.get_model(name, weights=None).features
    network = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten()).to_empty(device="cpu").eval()
    for value in network.state_dict().values():
        value.zero_()
    traced = trace(network, (3, 64, 64))
    assert residual_blocks(traced) == []
    assert set(why_not(traced).values()) == reasons


def silence(module: nn.Module) -> None:
    """Weights and bias of a branch's last layer to zero: the branch adds nothing."""
    with torch.no_grad():
        for parameter in module.parameters(recurse=False):
            parameter.zero_()


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("torchvision:resnet18", "layer2.0.bn2 layer2.1.bn2 layer4.0.bn2"),
        ("torchvision:mobilenet_v2", "features.3.conv.3 features.15.conv.3"),
        ("torchvision:convnext_tiny", "features.1.0 features.1.2"),
        ("dynamize:cifar_resnet20", "layer1.0.bn2 layer3.0.bn2"),
        ("timm:resnetv2_50", "stages.0.blocks.0.conv3 stages.0.blocks.1.conv3 stages.1.blocks.3.conv3"),
    ],
)
def test_a_block_with_a_silent_branch_is_its_bypass(name: str, last: str) -> None:
    network = network_of(name)
    for path in last.split():
        silence(network.get_submodule(path))
    traced = trace(network, (3, 64, 64))
    wanted = {path.split(".conv")[0].split(".bn")[0] for path in last.split()}
    blocks = [block for block in residual_blocks(traced) if block.module in wanted]
    assert len(blocks) == len(wanted)
    for block in blocks:
        with torch.no_grad():
            x = extract(traced, None, block.after)(torch.randn(2, 3, 64, 64))
            assert close(skipped(traced, block, x.clone()), extract(traced, block.after, block.upto)(x))


@dataclass(frozen=True)
class Plan:
    """One random block and what it has to be found as; an activation of None is none."""

    depth: int
    projection: bool
    swapped: bool
    summed_in_place: bool
    activation: type[nn.Module] | None
    plain: bool  # without any shortcut


class Planned(nn.Module):
    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(plan.depth))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(plan.depth))
        self.projection = nn.Conv2d(4, 4, 1) if plan.projection else None
        self.activation = plan.activation() if plan.activation else None

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in range(self.plan.depth):
            y = self.norms[i](self.convs[i](F.relu(y) if i else y))
        if not self.plan.plain:
            shortcut = self.projection(x) if self.projection is not None else x
            if self.plan.summed_in_place:
                y.add_(shortcut)
            else:
                y = shortcut + y if self.plan.swapped else y + shortcut
        return self.activation(y) if self.activation is not None else y


PLANS = st.builds(
    Plan,
    depth=st.integers(1, 3),
    projection=st.booleans(),
    swapped=st.booleans(),
    summed_in_place=st.booleans(),
    activation=st.sampled_from([None, nn.ReLU, nn.ReLU6, nn.SiLU]),
    plain=st.booleans(),
)
CLAMPS: dict[type[nn.Module] | None, tuple[float, float]] = {nn.ReLU: (0, float("inf")), nn.ReLU6: (0, 6)}


def is_identity(plan: Plan, before: type[nn.Module] | None) -> bool:
    if plan.projection or plan.activation is None:
        return not plan.projection
    if before not in CLAMPS or plan.activation not in CLAMPS:
        return False
    return CLAMPS[before][1] <= CLAMPS[plan.activation][1]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(PLANS, min_size=1, max_size=4), st.integers(0, 2**16))
def test_random_networks(plans: list[Plan], seed: int) -> None:
    torch.manual_seed(seed)
    plans = [replace(plan, projection=plan.projection and not plan.plain) for plan in plans]
    body = [Planned(plan) for plan in plans]
    stem = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()]
    network = nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    randomise_norms(network, seed).eval()
    for block in body:
        silence(block.norms[-1])
    traced = trace(network, (3, 5, 5))
    found = {block.module: block for block in residual_blocks(traced)}
    wanted = {f"{i + 2}": plan for i, plan in enumerate(plans) if not plan.plain}
    assert list(found) == list(wanted)
    for i, (name, plan) in enumerate(wanted.items()):
        block, before = found[name], nn.ReLU if name == "2" else plans[int(name) - 3].activation
        assert block.macs == 5 * 5 * 4 * 4 * (9 * plan.depth + plan.projection), i
        assert block.bypass_macs == 5 * 5 * 4 * 4 * plan.projection
        assert block.identity == is_identity(plan, before)
        with torch.no_grad():
            x = extract(traced, None, block.after)(torch.randn(2, 3, 5, 5))
            assert close(skipped(traced, block, x.clone()), extract(traced, block.after, block.upto)(x))
