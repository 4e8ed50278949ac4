"""Clocks that compare before and after: on both backends, with room for a busy machine."""

import copy

import pytest
import torch
from networks import SmallResNet, small_resnet
from torch import nn

from dynamize.compression.comparison import Stopwatch, layer_ratio, whole_macs
from dynamize.compression.factors import factorized
from dynamize.conversion import convert
from dynamize.nn.piece import Setting
from dynamize.transforms import Exits, SkipGates

CPU = torch.device("cpu")


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
def test_a_layer_a_hundred_times_cheaper_is_faster(backend: str) -> None:
    layer = nn.Conv2d(256, 256, 3, padding=1)
    layer.train()
    cheap = factorized(layer, (8, 8))
    ratio = layer_ratio(layer, cheap, (1, 256, 14, 14), backend, CPU, seconds=0.2)
    assert ratio < 0.9
    assert layer.training
    assert layer_ratio(nn.Linear(2048, 2048), nn.Linear(2048, 16), (1, 2048), backend, CPU, seconds=0.2) < 0.9


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
@pytest.mark.fast("onnxruntime")
def test_stopwatch_opens_gates_and_leaves_the_network_alone(backend: str) -> None:
    steps = [Exits(at=["layer1"], share=1.0, size=[16]), SkipGates(group=1)]
    network = convert(small_resnet(), steps, SmallResNet.shape).eval()
    network.setting = stands = Setting({"exit.1": 0.0}, -1.0)
    watch = Stopwatch(network, backend, CPU, seconds=0.3)
    assert 0.3 < watch.ratio(copy.deepcopy(network)) < 3
    assert network.setting is stands
    assert stands == Setting({"exit.1": 0.0}, -1.0)


def test_whole_macs_count_heads_and_gates() -> None:
    plain = convert(small_resnet(), [], SmallResNet.shape)
    steps = [Exits(at=["layer1"], head="linear", share=1.0), SkipGates(blocks=[["layer2.1"]])]
    network = convert(small_resnet(), steps, SmallResNet.shape)
    # a linear head: 8 channels * 7 classes; a gate: 16 channels * 2 paths
    assert whole_macs(network) == whole_macs(plain) + 8 * 7 + 16 * 2
