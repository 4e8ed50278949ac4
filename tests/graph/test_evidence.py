"""The last feature map of a network, and what makes logits of it."""

import pytest
import torchvision
from torch import nn

from dynamize.conversion import wrap
from dynamize.graph.evidence import classifier, last_map


def small(*ending: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), *ending).eval()


@pytest.mark.parametrize(
    ("net", "shape", "means"),
    [
        (small(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)), (6, 8, 8), True),
        (small(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(6, 4), nn.Identity()), (6, 8, 8), True),
        (small(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(6, 4)), (6, 8, 8), False),
        (small(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)), (6, 8, 8), False),
        (small(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(96, 4)), (6, 4, 4), False),
        (small(nn.Conv2d(6, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), (4, 8, 8), False),
    ],
)
def test_the_last_map_and_whether_a_mean_and_a_layer_follow(
    net: nn.Module, shape: tuple[int, ...], means: bool
) -> None:
    plain = wrap(net, (3, 8, 8), check=False).plain
    found = last_map(plain)
    assert found is not None
    assert (found.shape, found.means) == (shape, means)
    assert not means or isinstance(classifier(plain), nn.Linear)


def test_where_the_map_is_one_pixel_it_is_an_earlier_one() -> None:
    plain = wrap(torchvision.models.resnet18().eval(), (3, 32, 32), check=False).plain
    found = last_map(plain)
    assert found is not None
    assert found.shape == (256, 2, 2)
    assert not found.means


def test_there_may_be_none() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(27, 4)).eval()
    assert last_map(wrap(net, (3, 3, 3), check=False).plain) is None
