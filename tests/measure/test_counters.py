"""Three counters on networks whose MACs are counted by hand, and the reasons why they differ."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dynamize.measure.counters import Counts, count_three_ways, kind_of

SHAPE = (3, 8, 8)


class OwnConv(nn.Conv2d):
    """A subclass, of which thop knows nothing."""


class Mixed(nn.Module):
    """One layer for each known reason."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 4, 3, padding=1, bias=False)  # 64 * 4 * 27 = 6912
        self.norm = nn.BatchNorm2d(4)  # 256 values
        self.same = nn.Conv2d(4, 4, 3, padding="same", bias=False)  # 64 * 4 * 36 = 9216
        self.own = OwnConv(4, 4, 1, groups=2)  # 64 * 4 * 2 = 512
        self.weight = nn.Parameter(torch.randn(4, 4, 1, 1))  # 64 * 4 * 4 = 1024, in code
        self.linear = nn.Linear(4, 10)  # 40

    def forward(self, images: Tensor) -> Tensor:
        features = functional.relu(self.norm(self.plain(images)))
        features = functional.conv2d(self.own(self.same(features)), self.weight)
        answer: Tensor = self.linear(features.mean((2, 3)))
        return answer


@pytest.fixture(scope="module")
def mixed() -> Counts:
    return count_three_ways(Mixed().eval(), SHAPE)


def test_counts_by_hand(mixed: Counts) -> None:
    fvcore, thop = mixed.others
    assert dict(mixed.ours.kinds) == {"convolution": 6912 + 9216 + 512 + 1024, "matrix product": 40}
    assert dict(fvcore.kinds) == {"convolution": 6912 + 512 + 1024, "normalisation": 2 * 256, "matrix product": 40}
    assert dict(thop.kinds) == {"convolution": 6912 + 9216, "normalisation": 4 * 256, "matrix product": 40}
    assert mixed.ours.own()[""] == 1024
    assert sum(mixed.ours.own().values()) == mixed.ours.total
    assert mixed.ours.modules["own"] == {"convolution": 512}
    assert fvcore.unsupported["_convolution_mode"] == 1
    assert thop.unsupported == {"test_counters.OwnConv": 1}


def test_reasons(mixed: Counts) -> None:
    fvcore, thop = mixed.disagreements()
    assert fvcore.startswith("fvcore counts -49.2 %: it adds normalisation (2.9 %)")
    assert fvcore.endswith("it leaves out Conv2d (52.1 %): it has no rule for _convolution_mode")
    assert thop.startswith("thop counts -2.9 %: it adds normalisation (5.8 %)")
    assert "leaves out test_counters.Mixed (5.8 %), test_counters.OwnConv (2.9 %)" in thop


def test_another_formula_is_named() -> None:
    """A transposed convolution multiplies once for each of its inputs; thop takes its outputs."""
    network = nn.Sequential(nn.ConvTranspose2d(3, 4, 2, stride=2), nn.Flatten(), nn.Linear(4 * 256, 2)).eval()
    (said,) = count_three_ways(network, SHAPE).disagreements()
    assert "thop" in said
    assert "it counts ConvTranspose2d (+" in said


def test_a_shared_module_is_named_as_a_reason() -> None:
    shared = nn.Conv2d(3, 3, 1)
    network = nn.Sequential(nn.Sequential(shared), nn.Sequential(shared)).eval()
    counts = count_three_ways(network, SHAPE)
    ours, fvcore, thop = counts.every
    assert ours.total == fvcore.total == 2 * 64 * 9
    assert thop.total == 4 * ours.total  # a hook for each name, each of them summed up for each name
    assert "Conv2d (+300.0 %) by another formula, or once for each name" in counts.disagreements()[0]


def test_the_network_stays_as_it_was() -> None:
    network = Mixed().train()
    before = copy.deepcopy(network.state_dict())
    count_three_ways(network, SHAPE)
    assert network.training
    assert before.keys() == network.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_agreeing_counters_say_nothing() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)).eval()
    counts = count_three_ways(network, SHAPE)
    assert [one.total for one in counts.every] == [36 * 8 * 27 + 2880] * 3
    assert counts.disagreements() == []


class NeedsRealNumbers(nn.Module):
    """torch's tracer does not bear this, which has nothing to do with what is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        if torch.jit.is_tracing():
            raise RuntimeError("not while tracing\nmore lines")
        answer: Tensor = self.conv(images)
        return answer


def test_a_counter_that_fails_is_named() -> None:
    counts = count_three_ways(NeedsRealNumbers().eval(), SHAPE)
    assert counts.disagreements() == ["fvcore cannot count this network: not while tracing"]
    assert counts.ours.total == 64 * 6 == counts.others[1].total


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::upsample_bilinear2d", "resizing"),
        ("aten.addmm", "matrix product"),
        ("aten.convolution", "convolution"),
        ("BatchNorm2d", "normalisation"),
        ("AdaptiveAvgPool2d", "pooling"),
        ("PReLU", "other"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind
