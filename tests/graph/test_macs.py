"""Executed and annotated MACs."""

import torch
from networks import SmallResNet, ThreeLayer, small_resnet
from torch import nn

from dynamize.graph.macs import annotated_macs, count_macs, counting_macs
from dynamize.graph.trace import trace


def test_the_three_layer_net_by_hand() -> None:
    assert count_macs(ThreeLayer(), torch.zeros(1, 3, 8, 8)) == 11560
    assert count_macs(ThreeLayer(), torch.zeros(5, 3, 8, 8)) == 5 * 11560


def test_only_what_runs_is_counted() -> None:
    network, image = ThreeLayer(), torch.zeros(2, 3, 8, 8)
    with torch.no_grad(), counting_macs() as counted:
        assert counted() == 0
        network.conv1(image)
        assert counted() == 2 * 6912
        network.conv2(network.conv1(image[:1]))
    network(image)
    assert counted() == 2 * 6912 + 6912 + 4608


def test_norms_and_activations_are_free() -> None:
    free = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    assert count_macs(free.eval(), torch.zeros(4, 3, 8, 8)) == 0


def test_annotated_macs_are_those_of_one_image() -> None:
    assert annotated_macs(trace(ThreeLayer(), ThreeLayer.shape)) == 11560
    traced = trace(small_resnet(), SmallResNet.shape)
    assert annotated_macs(traced) == count_macs(traced, torch.zeros(1, *SmallResNet.shape))
