"""Networks in wrappers, and networks that keep what they computed."""

import pytest
import torch
from networks import SmallResNet, small_resnet
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dynamize.conversion import wrap
from dynamize.graph.given import own_copy, unwrapped


@pytest.mark.parametrize("wrapper", [nn.DataParallel, AveragedModel, lambda net: torch.compile(net, backend="eager")])
def test_wrappers_come_off_one_after_the_other(wrapper: object) -> None:
    network, images = small_resnet(), torch.randn(2, *SmallResNet.shape)
    outer = nn.DataParallel(wrapper(network))  # type: ignore[operator]
    assert type(unwrapped(outer)) is SmallResNet
    assert torch.equal(wrap(outer.eval(), SmallResNet.shape)(images), network(images))


def test_a_weight_that_is_a_product_and_kept_features_can_be_copied() -> None:
    network = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
    images = torch.randn(2, 3, 8, 8)
    network.kept = {"last": [network(images)]}
    copied = own_copy(network)
    assert torch.equal(copied(images), network(images))
    assert copied.kept["last"][0].grad_fn is None
