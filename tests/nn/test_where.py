"""Where evidence lies in a feature map, and where crops are therefore."""

import pytest
import torch
from torch import nn

from dynamize.conversion import wrap
from dynamize.graph.evidence import last_map
from dynamize.nn.where import ClassMap, Evidence, Occlusion, Peaks


def settled(evidence: Evidence, net: nn.Module, images: tuple[int, ...]) -> Evidence:
    plain = wrap(net, images, check=False).plain
    found = last_map(plain)
    assert found is not None
    evidence.settle(plain, found.node)
    return evidence


class Means(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(2, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(self.conv(images).mean((2, 3)))


def test_of_means_it_is_what_occlusion_changes() -> None:
    torch.manual_seed(0)
    net = Means().eval()
    by_weights = settled(ClassMap((3, 5)), net, (2, 3, 5))
    by_trying = settled(Occlusion((6, 3, 5), (0.1, 0.1)), net, (2, 3, 5))
    features = torch.randn(7, 6, 3, 5)
    assert torch.allclose(by_trying(features), by_weights(features) / 15, atol=1e-6)
    by_weights.hold()
    by_trying.hold()
    with torch.no_grad():
        net.linear.weight.zero_()
    assert torch.allclose(by_trying(features), by_weights(features) / 15, atol=1e-6)


def test_cells_are_as_large_as_a_crop_at_most() -> None:
    occlusion = Occlusion((3, 7, 2), (0.3, 0.3))
    assert occlusion.grid == (4, 2)
    assert occlusion.keeps.shape == (9, 1, 7, 2)
    assert torch.equal((1 - occlusion.keeps).sum(0)[0], torch.ones(7, 2))


def test_trying_changes_nothing_while_training() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.BatchNorm1d(24), nn.Linear(24, 3))
    occlusion = settled(Occlusion((6, 2, 2), (0.5, 0.5)), net, (2, 6, 6))
    net[3].train()
    before = net[3].running_mean.clone()
    occlusion(torch.randn(4, 6, 2, 2))
    assert torch.equal(net[3].running_mean, before)
    assert net[3].training


def test_a_crop_is_where_the_evidence_is() -> None:
    evidence = torch.zeros(2, 4, 4)
    evidence[0, 0, 3], evidence[0, 3, 0] = 5, 4
    evidence[1, 2, 2] = 5
    places = Peaks((4, 4), 2, (0.5, 0.5))(evidence.flatten(1))
    assert places.shape == (2, 4)
    assert places[0].tolist() == pytest.approx([0, 1, 1, 0])
    assert places[1, :2].tolist() == pytest.approx([0.75, 0.75])
    assert places[1, 2:].tolist() != pytest.approx([0.75, 0.75])
