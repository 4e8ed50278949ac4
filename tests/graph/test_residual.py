"""Residual blocks of networks whose blocks are known."""

from dataclasses import dataclass, replace

import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import SmallResNet, ThreeLayer, close, conv_block, randomise_norms, small_resnet
from quick import only
from residual_networks import CONV, Forward, Pieces, network_of, only_block, silence, skipped, traced_net
from torch import Tensor, nn
from torch.nn import functional as F

from dynamize.graph.extract import extract
from dynamize.graph.residual import bypass, residual_blocks, why_not
from dynamize.graph.trace import trace

NO_SUM = "no sum of a shortcut and a branch"
SCALED = "its sum is scaled by alpha or written into another tensor"
UNCLEAR = "it is unclear which of its summands is the shortcut"
FREE = "what is added to the shortcut has no multiply-accumulates to save"
CONCATENATED = "parallel branches meet in a concatenation"
IN_PART = "its shortcut is added to some of its channels only"
LINEAR = "its parallel branches are linear, without an activation between: they can be fused to one convolution"


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
                self.f, self.after = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Tanh()), after
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
                self.stem, self.f = nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Tanh())
                self.end, self.linear = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

            def forward(self, x: Tensor) -> Tensor:
                x = F.max_pool2d(F.relu6(self.stem(x)), 2)
                return self.linear(self.end(F.relu6(x + self.f(x))).mean((2, 3)))

        assert [block.identity for block in residual_blocks(trace(Net(), (3, 8, 8)))] == [True]


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
        (lambda m, x: torch.cat([m.f(x)[:, :4] + x[:, :4], m.g(x)[:, 4:]], 1), IN_PART),
        (lambda m, x: torch.cat([m.f(m.g(x)) + m.g(x), x], 1)[:, 4:12], CONCATENATED),
        (lambda m, x: x + m.g(x), LINEAR),
        (lambda m, x: m.relu(m.g(x) + m.norm(x) + m.pointwise(x)), LINEAR),
        (lambda m, x: m.g(x) + (m.pointwise(x) + 0), LINEAR),
        (lambda m, x: m.silu(m.nothing(m.norm(m.g(m.pointwise(x)))).add_(x)), LINEAR),
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


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: x + m.relu(m.g(x)),
        lambda m, x: m.pointwise(x) + m.g(F.relu(m.norm(x))),
        lambda m, x: F.max_pool2d(x, 3, 1, 1) + m.g(x),
        lambda m, x: x + m.g(x) * m.pointwise(x),
        lambda m, x: x + (m.g(x) + m.scale),
        lambda m, x: x + m.g(x).abs(),
    ],
)
def test_a_sum_with_anything_more_than_linear_is_a_residual_block(forward: Forward) -> None:
    assert only_block(traced_net(forward)).macs >= CONV


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
    "timm:nf_resnet50": (16, 8, 4),  # as resnetv2_50, where the next one begins with an activation
    "timm:nf_regnet_b0": (16, 10, 4),  # 1, 3, 6, 6, the one of the first stage projects
}


FAST = ["torchvision:resnet18", "torchvision:mobilenet_v3_small", "timm:resnetv2_50", "dynamize:cifar_resnet20"]


@pytest.mark.parametrize("name", only(FAST, NETWORKS))
@pytest.mark.fast("torchvision:mobilenet_v3_small", "dynamize:cifar_resnet20")
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
@pytest.mark.fast("alexnet-reasons0", "squeezenet1_1-reasons2")
def test_architectures_without_residuals(name: str, reasons: set[str]) -> None:
    with torch.device("meta"):  # without the classifier, whose random weights would take most of the time
        features = torchvision.models.get_model(name, weights=None).features
    network = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten()).to_empty(device="cpu").eval()
    for value in network.state_dict().values():
        value.zero_()
    traced = trace(network, (3, 64, 64))
    assert residual_blocks(traced) == []
    assert set(why_not(traced).values()) == reasons


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("repvgg_a0", {LINEAR}),
        ("mobileone_s0", {LINEAR}),
        ("rexnet_100", {NO_SUM, IN_PART}),
    ],
)
@pytest.mark.fast("repvgg_a0-reasons0")
def test_timm_networks_without_residuals(name: str, reasons: set[str]) -> None:
    traced = trace(network_of(f"timm:{name}"), (3, 64, 64))
    assert residual_blocks(traced) == []
    assert set(why_not(traced).values()) == reasons


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


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
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
    sums = {f"{i + 2}": plan for i, plan in enumerate(plans) if not plan.plain}
    wanted = {name: plan for name, plan in sums.items() if plan.depth > 1}
    assert list(found) == list(wanted)
    assert {name for name, reason in why_not(traced).items() if reason == LINEAR} == sums.keys() - wanted.keys()
    for i, (name, plan) in enumerate(wanted.items()):
        block, before = found[name], nn.ReLU if name == "2" else plans[int(name) - 3].activation
        assert block.macs == 5 * 5 * 4 * 4 * (9 * plan.depth + plan.projection), i
        assert block.bypass_macs == 5 * 5 * 4 * 4 * plan.projection
        assert block.identity == is_identity(plan, before)
        with torch.no_grad():
            x = extract(traced, None, block.after)(torch.randn(2, 3, 5, 5))
            assert close(skipped(traced, block, x.clone()), extract(traced, block.after, block.upto)(x))
