"""`spatial_sampling`: which blocks it takes, and that nothing changes until gates decide so."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gated_networks import masked, scatter
from networks import close, randomise_norms, torchvision_network
from torch import Tensor, nn

import dynamize as dz
from dynamize.conversion import apply
from dynamize.data import DataSpec, load_data
from dynamize.graph.macs import count_macs
from dynamize.measure.costs import exit_costs
from dynamize.models import create
from dynamize.nn.gates import ALL_OPEN
from dynamize.nn.network import DynamicNetwork, record_routing
from dynamize.nn.piece import Setting
from dynamize.runtime.export import export
from dynamize.training.objectives import exit_logits
from dynamize.transform import Transform

SHAPE = (3, 32, 32)


def converted(**fields: Any) -> DynamicNetwork:
    network = randomise_norms(create("cifar_resnet20")).eval()
    dynamic = dz.convert(network, [dz.SpatialSampling.model_validate(fields)], SHAPE).eval()
    for statistics in own_statistics(dynamic):
        statistics.mul_(torch.empty_like(statistics).uniform_(0.5, 1.5))
    return dynamic


def own_statistics(network: DynamicNetwork) -> list[Tensor]:
    """Means and variances that coarse ways have for themselves."""
    return [each for unit in network.changing for norm in unit.norms for each in (norm.running_mean, norm.running_var)]


def all_coarse(network: DynamicNetwork, images: Tensor) -> Tensor:
    forced = {unit.name: torch.zeros(len(images), dtype=torch.int64) for unit in network.changing}
    return network.eval().run(images, Setting(forced=forced)).logits


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


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
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


def test_the_coarse_way_has_statistics_of_its_own() -> None:
    """They move with what it sees, and scales and shifts are those of the whole way."""
    network = dz.convert(randomise_norms(create("cifar_resnet20")).eval(), [dz.SpatialSampling(group=1)], SHAPE)
    images, before = torch.randn(8, *SHAPE), [one.clone() for one in own_statistics(network)]
    with torch.no_grad():
        network.train()(images)
    assert not any(torch.equal(*pair) for pair in zip(own_statistics(network), before, strict=True))
    unit = network.changing[0]
    coarse, whole = unit.ways()
    assert coarse is not None
    assert whole is not None
    assert coarse.get_submodule("layer1.1.bn1") is unit.norms[0]
    assert coarse.get_parameter("layer1.1.bn1.weight") is whole.get_parameter("layer1.1.bn1.weight")
    assert not torch.equal(coarse.get_buffer("layer1.1.bn1.running_var"), whole.get_buffer("layer1.1.bn1.running_var"))


def test_recalibrate_estimates_what_the_coarse_way_sees() -> None:
    """From the images that take it: here all of them, so that nothing of the whole way counts."""
    data = load_data(DataSpec(source="digits", calibration=100, train_limit=100, test_limit=50), (1, 8, 8), 10)
    network = dz.source("dynamize:digits_resnet", pretrained=True)
    steps = [dz.SpatialSampling(group=1, keep_first=False), dz.Recalibrate(statistics="recalibrated", images=100)]
    dynamic = dz.convert(network, steps, (1, 8, 8), dz.Context(data=data, teacher=network))
    images, labels = next(iter(data.calibration.batches(100)))
    plain = dz.convert(network, steps[:1], (1, 8, 8))
    right = [float((all_coarse(one, images).argmax(1) == labels).float().mean()) for one in (dynamic, plain)]
    assert right[0] > right[1] + 0.2


@pytest.mark.parametrize("step", [dz.Prune(ratio=0.5, round_to=4), dz.FoldBatchnorm()])
def test_layers_change_for_both_ways(step: Transform) -> None:
    """Whether before the coarse ways are there or after."""
    images, first = torch.randn(4, *SHAPE), dz.SpatialSampling(group=1)
    plain, found = randomise_norms(create("cifar_resnet20")).eval(), []
    for steps in ([step, first], [first, step]):
        network = dz.convert(plain, steps, SHAPE)
        found.append((all_coarse(network, images), network.eval()(images)))
    assert all(close(*pair, 1e-4) for pair in zip(*found, strict=True))


def test_folding_leaves_layers_that_two_ways_share() -> None:
    images, network = torch.randn(4, *SHAPE), converted(group=1)
    wanted = all_coarse(network, images)
    folded, notes = apply(network, dz.FoldBatchnorm(), dz.Context())
    assert close(all_coarse(folded, images), wanted, 1e-5)
    assert "gated blocks keep theirs: each way through them has its own" in notes


def test_coarse_for_all_without_a_gate() -> None:
    images, network = torch.randn(4, *SHAPE), converted(group=1)
    wanted = all_coarse(network, images)
    paths = dict.fromkeys((one.name for one in network.decisions()), 0)
    fused, _ = apply(network, dz.FuseGates(paths=paths), dz.Context())
    assert not fused.decisions()
    assert close(fused.eval()(images), wanted, 1e-5)


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


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"tile": 8}, "tile and dense_from are for form: tiles"),
        ({"form": "tiles", "gate": "conv"}, "gate: conv scores whole images"),
        ({"form": "tiles", "tile": 30}, "no residual block .* large enough for tiles"),
        ({"form": "tiles", "blocks": [["layer2.1", "layer2.2"]]}, "cannot be computed in tiles"),
        ({"form": "tiles", "blocks": [["layer3.1"]]}, "'layer3.1' is no residual block"),
    ],
)
def test_refusals_of_tiles(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(dz.DynamizeError, match=told):
        dz.convert(create("cifar_resnet20").eval(), [dz.SpatialSampling(**fields)], SHAPE)


def test_blocks_that_look_at_the_whole_map_have_no_tiles() -> None:
    """Squeeze and excitation; those without have."""
    network = torchvision_network("mobilenet_v3_large")
    found = dz.convert(network, [dz.SpatialSampling(form="tiles", keep_first=False)], (3, 224, 224)).decisions()
    assert [one.name for one in found] == ["features.1", "features.3", "features.8", "features.9", "features.10"]


def test_what_tiles_do_not_go_with(tmp_path: Path) -> None:
    network = dz.convert(create("cifar_resnet20").eval(), [dz.SpatialSampling(form="tiles")], SHAPE)
    with pytest.raises(dz.DynamizeError, match="path 1 of 'layer1.1' is 1 tile, others for each image: give 0 or 8"):
        apply(network, dz.FuseGates(paths={"layer1.1": 1}), dz.Context())
    data = load_data(DataSpec(source="digits", calibration=100, train_limit=100, test_limit=50), SHAPE, 10)
    for step in (dz.HybridGates(), dz.QGates()):
        with pytest.raises(dz.DynamizeError, match="the gate of layer1.1 decides tile by tile"):
            apply(network, step, dz.Context(data=data, teacher=network))
    with pytest.raises(dz.DynamizeError, match="bind"):
        export(network, tmp_path)
