"""`spatial_sampling`: which blocks it takes, and that nothing changes until gates decide so."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gated_networks import masked, scatter
from networks import close, randomise_norms, torchvision_network
from torch import nn

import dynamize as dz
from dynamize.data import DataSpec, load_data
from dynamize.graph.macs import count_macs
from dynamize.measure.costs import exit_costs
from dynamize.models import create
from dynamize.nn.gates import ALL_OPEN
from dynamize.nn.network import DynamicNetwork, record_routing
from dynamize.nn.piece import Setting
from dynamize.training.objectives import exit_logits

SHAPE = (3, 32, 32)


def converted(**fields: Any) -> DynamicNetwork:
    network = randomise_norms(create("cifar_resnet20")).eval()
    return dz.convert(network, [dz.SpatialSampling.model_validate(fields)], SHAPE).eval()


@pytest.mark.parametrize(
    ("name", "shape"),
    [("resnet18", (3, 64, 64)), ("mobilenet_v3_small", (3, 96, 96)), ("convnext_tiny", (3, 64, 64))],
)
@pytest.mark.fast("resnet18-shape0")
def test_answers_as_before(name: str, shape: tuple[int, int, int]) -> None:
    network = torchvision_network(name)
    dynamic = dz.convert(network, [dz.SpatialSampling(group=2, keep_first=False)], shape).eval()
    images = torch.randn(3, *shape)
    with torch.no_grad():
        assert torch.equal(dynamic(images), network(images))


def test_takes_blocks_that_hand_their_input_on() -> None:
    """Not those with a shortcut of their own, at the start of a stage."""
    assert [one.name for one in converted(group=2).decisions()] == [
        "layer1.1 to layer1.2",
        "layer2.1 to layer2.2",
        "layer3.1 to layer3.2",
    ]
    for decision in converted(group=1, keep_first=False).decisions():
        assert decision.options == ("coarse", "whole")
        assert decision.macs[0] == decision.macs[1] / 4


@pytest.mark.parametrize("gate", ["linear", "conv", "recurrent"])
@pytest.mark.fast("recurrent")
def test_each_image_computes_what_it_chose(gate: str, tmp_path: Path) -> None:
    images = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(1))
    network = scatter(converted(group=1, gate=gate), images)
    wanted = masked(network, images)
    assert {0, 1} <= set(wanted.choices_NU.flatten().tolist())
    dz.save(network, tmp_path)
    loaded = dz.load(tmp_path, network=create("cifar_resnet20"))
    for one in (network, loaded, dz.compile_network(network, "onnxruntime")):
        found = one.run(images, network.setting)
        assert torch.equal(found.choices[wanted.clear], wanted.choices_NU[wanted.clear])
        assert close(found.logits[wanted.clear], wanted.answers_NC[wanted.clear], 2e-5)
    with torch.no_grad(), record_routing(network) as routing:
        executed = count_macs(network, images)
    assert executed == exit_costs(network).executed(routing.taken, routing.images).sum()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "inductor"])
@pytest.mark.fast("onnxruntime")
def test_maps_of_odd_sizes(backend: str) -> None:
    network = dz.convert(torchvision_network("resnet18"), [dz.SpatialSampling(group=1)], (3, 72, 72)).eval()
    images, rough = torch.randn(3, 3, 72, 72), Setting(offset=-ALL_OPEN)
    found, wanted = dz.compile_network(network, backend).run(images, rough), network.run(images, rough)
    assert found.choices.sum() == 0
    assert close(found.logits, wanted.logits, 1e-4)


def test_training_leaves_the_whole_way_its_statistics() -> None:
    """Whatever the coarse way sees, batch norms move as they would without it."""
    network = randomise_norms(create("cifar_resnet20")).eval()
    images, labels = torch.randn(8, *SHAPE), torch.arange(8)
    found = []
    for steps in ([dz.SpatialSampling(group=1)], []):
        dynamic = dz.convert(network, steps, SHAPE)
        dynamic.choose.noise = 0.0
        (logits,) = exit_logits(dynamic.train()(images))
        nn.functional.cross_entropy(logits, labels).backward()
        found.append({name: one for name, one in dynamic.nets.state_dict().items() if "running" in name})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.slow
def test_gates_learn_what_may_be_coarse() -> None:
    network = dz.source("dynamize:digits_resnet", pretrained=True)
    data = load_data(DataSpec(source="digits", calibration=300, test_limit=300), (1, 8, 8), 10)
    steps = [dz.SpatialSampling(group=1, keep_first=False), dz.Distill(epochs=6, gate_budget=0.8)]
    dynamic = dz.convert(network, [*steps, dz.Calibrate(max_drop=2)], (1, 8, 8), dz.Context(data=data, teacher=network))
    assert dynamic.operating_point is not None
    assert dynamic.operating_point.macs_ratio < 1
    assert dynamic.operating_point.accuracy > 0.9


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"blocks": [["layer2.0"]]}, "'layer2.0' is no residual block of this network"),
        ({"blocks": [["layer1.1", "layer2.1"]]}, "spatial_sampling: the blocks .* cannot share a gate"),
        ({"keep": ["layer1.1", "layer1.2", "layer2.1", "layer2.2", "layer3.1", "layer3.2"]}, "are kept open"),
    ],
)
def test_refusals(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(dz.DynamizeError, match=told):
        converted(**fields)


def test_a_network_without_such_blocks_is_refused() -> None:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    with pytest.raises(dz.DynamizeError, match="no residual block that hands its input on.*`skip_gates` takes"):
        dz.convert(nn.Sequential(*layers).eval(), [dz.SpatialSampling()], SHAPE)
