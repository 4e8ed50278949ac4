"""Channel gates on networks whose channels go in groups: nothing changes at first, and what is left out is not run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gated_networks import scatter
from networks import close, randomise_norms
from random_networks import random_network
from torch import Tensor, nn
from torch.nn import functional as F

import dynamize as dz
from dynamize.conversion import convert
from dynamize.errors import DynamizeError
from dynamize.graph.macs import counting_macs
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting
from dynamize.transforms import ChannelGates

SHAPE = (3, 16, 16)
WIDE = 32
Norm = Callable[[int], nn.Module]


class Bottleneck(nn.Module):
    def __init__(self, groups: int, norm: Norm, squeezes: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(16, WIDE, 1, bias=False), norm(WIDE), nn.ReLU()),
            *(nn.Conv2d(WIDE, 2 * WIDE, 3, padding=1, groups=groups, bias=False), norm(2 * WIDE), nn.ReLU()),
        )
        self.squeeze, self.excite = nn.Conv2d(2 * WIDE, 4, 1), nn.Conv2d(4, 2 * WIDE, 1)
        self.last, self.squeezes = nn.Conv2d(2 * WIDE, 16, 1, bias=False), squeezes

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        if self.squeezes:
            out = out * self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(out, 1)))).sigmoid()
        return F.relu(x + self.last(out))


def bottlenecks(groups: int, norm: Norm = nn.BatchNorm2d, squeezes: bool = False) -> nn.Module:
    torch.manual_seed(0)
    blocks = [Bottleneck(groups, norm, squeezes) for _ in range(3)]
    network = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), *blocks),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)),
    )
    return randomise_norms(network).eval()


def images(count: int) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(count))


GROUPED = [
    pytest.param(lambda: bottlenecks(2), id="two groups"),
    pytest.param(lambda: bottlenecks(8), id="eight groups"),
    pytest.param(lambda: bottlenecks(8, squeezes=True), id="squeeze and excitation"),
    pytest.param(lambda: bottlenecks(32), id="one input each"),
    pytest.param(lambda: bottlenecks(8, lambda c: nn.GroupNorm(4, c)), id="group norm"),
    pytest.param(lambda: bottlenecks(1, lambda c: nn.InstanceNorm2d(c, affine=True)), id="instance norm"),
]


def gated(make: Callable[[], nn.Module]) -> DynamicNetwork:
    return convert(make(), [ChannelGates(groups=2, keep_first=False)], SHAPE)


@pytest.mark.parametrize("make", GROUPED)
@pytest.mark.fast("eight groups", "squeeze and excitation", "instance norm")
def test_nothing_changes_until_channels_are_left_out(make: Callable[[], nn.Module]) -> None:
    network = gated(make)
    assert len(network.changing) == 3
    with torch.no_grad():
        assert close(network(images(4)), make()(images(4)), 1e-5)


@pytest.mark.parametrize("make", GROUPED)
@pytest.mark.fast("two groups", "squeeze and excitation", "group norm")
def test_left_out_means_not_executed_and_answers_like_masks(make: Callable[[], nn.Module]) -> None:
    network = scatter(gated(make), images(64))
    units = network.changing
    narrow = Setting(forced={unit.label: torch.zeros(4, dtype=torch.long) for unit in units})
    with torch.no_grad():
        for unit in units:
            features = torch.randn(4, 16, 16, 16)
            for path, way in enumerate(unit.paths()):
                shares = F.one_hot(torch.full((4,), path), len(unit.path_macs)).float()
                assert way is not None
                assert close(way(features.clone()), unit.blend(features.clone(), shares), 1e-5)
        with counting_macs() as whole:
            network.run(images(4), Setting(offset=1e6))
        with counting_macs() as less:
            network.run(images(4), narrow)
    saved = sum(unit.path_macs[-1] - unit.path_macs[0] for unit in units)
    assert saved > 0.3 * sum(unit.path_macs[-1] for unit in units)
    assert whole() - less() == 4 * saved


def test_each_image_of_a_batch_goes_its_own_way() -> None:
    network = scatter(gated(lambda: bottlenecks(8, squeezes=True)), images(64))
    with torch.no_grad():
        together = network.run(images(16), Setting())
        alone = torch.cat([network(image[None]) for image in images(16)])
    assert close(alone, together.logits, 1e-5)
    assert len(torch.stack(list(together.taken.values()), 1).unique(dim=0)) > 1


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (lambda: bottlenecks(1, lambda c: nn.GroupNorm(1, c)), "groups that have no common border \\(GroupNorm"),
        (lambda: bottlenecks(1, lambda c: nn.Softmax2d()), "\\(Softmax2d\\) sees them"),
    ],
)
def test_a_refusal_says_who_stands_in_the_way(network: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(DynamizeError, match=reason):
        gated(network)


def test_a_refusal_says_that_channels_are_too_few() -> None:
    with pytest.raises(DynamizeError, match="too few: 32 at .* of which a multiple of 64 has to be left out"):
        convert(bottlenecks(8), [ChannelGates(multiple=64)], SHAPE)


@pytest.mark.parametrize("seed", [0, 1, 17, 29])  # norms called as functions, weight norm old and new, standardised
@pytest.mark.fast("29")
def test_channels_behind_computed_weights_are_split(seed: int, tmp_path: Path) -> None:
    drawn = random_network(seed)
    images = torch.randn(2, *drawn.input_shape)
    wanted = drawn.network(images).detach()
    network = convert(drawn.network, [ChannelGates(groups=2, keep_first=False)], drawn.input_shape).eval()
    assert close(network(images), wanted)
    dz.save(network, tmp_path / "out")
    again = dz.load(tmp_path / "out", network=random_network(seed).network).eval()
    closed = Setting(forced={unit.name: torch.zeros(2, dtype=torch.int64) for unit in network.changing})
    with torch.no_grad():
        assert torch.equal(again.run(images, closed).logits, network.run(images, closed).logits)
