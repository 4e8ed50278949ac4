"""Widths in multiples, what channels are worth, what layers can spare, and the search for the least knob."""

import math

import numpy as np
import pytest
import torch
from networks import ThreeLayer
from pruned_networks import made
from torch import nn

from dynamize.compression.bisection import bracket, least
from dynamize.compression.importance import add_gradients, importance
from dynamize.compression.removal import ChannelGroup, Member
from dynamize.compression.sensitivity import Sensitivity, scan
from dynamize.compression.widths import (
    between,
    by_harm,
    kept_width,
    least_worth,
    partly,
    removed_share,
    spared,
    uniform,
)
from dynamize.conversion import wrap
from dynamize.errors import InfeasibleError
from dynamize.nn.network import DynamicNetwork
from dynamize.runtime.engine import engine_class


def plain_group(name: str, channels: int) -> ChannelGroup:
    return ChannelGroup(name, channels, ())


class NormedPair(nn.Module):
    """conv a (2 channels), batch norm, ReLU, conv b."""

    shape = (1, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2)
        self.b = nn.Conv2d(2, 3, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.norm(self.a(x)))).mean((2, 3))


def pair() -> tuple[DynamicNetwork, ChannelGroup]:
    module = NormedPair()
    with torch.no_grad():
        module.a.weight.copy_(torch.tensor([3.0, 1.0])[:, None, None, None])
        module.norm.weight.copy_(torch.tensor([0.1, -0.7]))
        module.b.weight.copy_(torch.tensor([[2.0, 6.0], [1.0, 0.0], [2.0, 8.0]])[:, :, None, None])
    index = torch.arange(2)[:, None]
    parts = (Member("a", "out", index), Member("norm", "each", index), Member("b", "in", index))
    return wrap(module.eval(), NormedPair.shape), ChannelGroup("a", 2, parts)


@pytest.mark.parametrize(
    ("channels", "share", "multiple", "kept"),
    [
        (64, 0.5, 16, 32),
        (64, 0.6, 16, 32),
        (64, 0.7, 16, 48),
        (64, 0.01, 16, 16),
        (64, 1.0, 16, 64),
        (24, 0.9, 16, 16),
        (24, 1.0, 16, 24),
        (12, 0.1, 16, 12),
        (40, 0.5, 16, 16),
        (10, 0.55, 1, 6),
    ],
)
def test_widths_are_multiples(channels: int, share: float, multiple: int, kept: int) -> None:
    assert kept_width(channels, share, multiple) == kept


def test_liked_multiples() -> None:
    assert (engine_class("onnxruntime").liked_multiple, engine_class("eager").liked_multiple) == (16, 8)


def test_rounds_take_equal_shares_of_what_is_left() -> None:
    # 64 -> 16 in two rounds halves twice; 32 -> 32 stays; never below the final width
    assert between([plain_group("a", 64), plain_group("b", 32)], (16, 32), 0.5, 8) == (32, 32)
    assert between([plain_group("a", 64), plain_group("b", 32)], (16, 32), 1.0, 8) == (16, 32)
    assert between([plain_group("a", 20), plain_group("b", 9)], (19, 7), 0.5, 8) == (19, 8)


def test_uniform_and_shares() -> None:
    groups = [plain_group("a", 64), plain_group("b", 32)]
    assert uniform(groups, 0.5, 8) == (32, 16)
    assert removed_share(groups, (32, 16)) == 0.5
    worth = {"a": torch.arange(64.0), "b": -torch.arange(32.0)}
    gone = least_worth(groups, worth, (62, 31))
    assert gone == {"a": [0, 1], "b": [31]}


def test_groups_that_lose_least_go_first() -> None:
    groups = [plain_group("a", 4), plain_group("b", 4), plain_group("c", 4)]
    worth = {"a": torch.tensor([9.0, 1, 2, 8]), "b": torch.tensor([0.5, 1, 1, 9]), "c": torch.ones(4)}
    wide, narrow = (4, 3, 2), (2, 2, 2)  # a would lose 1 + 2, b 1 more, c is decided
    order = by_harm(groups, worth, wide, narrow)
    assert order == [1, 0]
    assert [partly(wide, narrow, order, share) for share in (0, 0.5, 1)] == [wide, (4, 2, 2), narrow]


def test_the_bracket_of_a_target() -> None:
    def plan_at(knob: float) -> int:
        return round(4 * knob)

    assert bracket("x", "figure", 1.5, plan_at, lambda plan: 4 - plan, 16) == (2, 3)
    assert bracket("x", "figure", 4, plan_at, lambda plan: 4 - plan, 16) == (0, 0)


def test_magnitude_by_hand() -> None:
    network, group = pair()
    # makes: 3, 1 -> mean 2 -> 1.5, 0.5; reads: sqrt(4+1+4) = 3, sqrt(36+64) = 10 -> mean 6.5
    wanted = [(1.5 + 3 / 6.5) / 2, (0.5 + 10 / 6.5) / 2]
    assert importance(network, group, "magnitude").tolist() == pytest.approx(wanted)


def test_batch_norm_scale_by_hand() -> None:
    network, group = pair()
    assert importance(network, group, "bn_scale").tolist() == pytest.approx([0.25, 1.75])
    without = ChannelGroup("a", 2, (group.members[0], group.members[2]))
    assert torch.equal(importance(network, without, "bn_scale"), importance(network, without, "magnitude"))


def test_taylor_is_the_first_order_change() -> None:
    network, group = pair()
    images, labels = torch.rand(16, *NormedPair.shape), torch.arange(16) % 3
    add_gradients(network, [(images[:8], labels[:8]), (images[8:], labels[8:])])
    a, norm = network.plain.a, network.plain.norm
    by_hand = (a.weight * a.weight.grad).flatten(1).sum(1).abs()
    by_hand += (norm.weight * norm.weight.grad + norm.bias * norm.bias.grad).abs()
    assert importance(network, group, "taylor").tolist() == pytest.approx(by_hand.tolist(), rel=1e-5)
    assert not network.training

    def loss() -> float:
        with torch.no_grad():
            halves = ((images[:8], labels[:8]), (images[8:], labels[8:]))
            return float(sum(nn.functional.cross_entropy(network(x), y) for x, y in halves))

    # what its batch norm gives, made smaller by a little, changes the loss as the gradients say
    step = 1e-2
    before = loss()
    with torch.no_grad():
        norm.weight[1] *= 1 - step
        norm.bias[1] *= 1 - step
    slope = float((norm.weight * norm.weight.grad + norm.bias * norm.bias.grad)[1].detach()) / (1 - step)
    assert before - loss() == pytest.approx(step * slope, rel=0.1)


def test_what_a_layer_can_spare() -> None:
    found = Sensitivity({"a": (0.0, 0.1, 0.3), "b": (0.2, 0.15, 0.5), "c": (-0.01, 0.0, 0.0)})
    assert found.ratio_at("a", 0.0) == 0.25
    assert found.ratio_at("a", 0.05) == pytest.approx(0.375)
    assert found.ratio_at("a", 0.3) == 0.75
    assert found.ratio_at("a", 0.65) == pytest.approx(0.875)
    assert found.ratio_at("a", 1.0) == 1.0
    assert found.ratio_at("b", 0.1) == pytest.approx(0.125)
    assert found.ratio_at("b", 0.2) == 0.5  # that half loses less than a quarter is noise
    assert found.ratio_at("c", 0.0) == 0.75
    groups = [plain_group(name, 64) for name in "abc"]
    assert spared(groups, found, 0.0, 8) == (48, 64, 16)


def test_scan_finds_the_layer_that_matters() -> None:
    """Of conv2's channels none is read but the first; of conv1's all are alike."""
    module = made(ThreeLayer)
    with torch.no_grad():
        module.linear.weight[:, 1:] = 0
    network = wrap(module, ThreeLayer.shape)
    index = {"conv1": torch.arange(4)[:, None], "conv2": torch.arange(8)[:, None]}
    groups = [
        ChannelGroup("conv1", 4, (Member("conv1", "out", index["conv1"]), Member("conv2", "in", index["conv1"]))),
        ChannelGroup("conv2", 8, (Member("conv2", "out", index["conv2"]), Member("linear", "in", index["conv2"]))),
    ]
    images = torch.randn(200, *ThreeLayer.shape)
    with torch.no_grad():
        labels = network(images).argmax(1)
    worth = {"conv1": torch.ones(4), "conv2": torch.arange(8, 0, -1.0)}
    drops = scan(network, groups, worth, [(images[:100], labels[:100]), (images[100:], labels[100:])]).drops
    assert drops["conv2"] == (0, 0, 0)
    assert drops["conv1"][2] > 0.02
    assert network.plain.conv1.out_channels == 4


def test_search_finds_the_least_knob() -> None:
    asked: list[int] = []

    def measure(plan: int) -> float:
        asked.append(plan)
        return 1 - plan / 100

    plan = least("prune", "macs_ratio", 0.63, lambda knob: math.floor(100 * knob), measure, 16)
    assert plan == 37
    assert len(set(asked)) == len(asked)
    assert least("prune", "macs_ratio", 1.0, lambda knob: math.floor(100 * knob), measure, 16) == 0


def test_search_says_what_is_possible() -> None:
    with pytest.raises(
        InfeasibleError, match=r"macs_ratio 0.1 cannot be reached: the least possible is 0.250"
    ) as refused:
        least("prune", "macs_ratio", 0.1, lambda knob: knob, lambda knob: float(np.float64(1 - 0.75 * knob)), 8)
    assert refused.value.nearest == 0.25
