"""Networks that share what they see at several sizes: trained together, calibrated, in bytes, with exits inside."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import close
from torch import Tensor, nn

import dynamize as dz
from dynamize.conversion import apply
from dynamize.data import DataSpec, load_data
from dynamize.errors import DynamizeError
from dynamize.graph.macs import count_macs
from dynamize.measure.costs import exit_costs
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting
from dynamize.nn.reuse import Fuse
from dynamize.transform import Context

SHAPE = (1, 16, 16)
REUSE = dz.Cascade(first=[{"resolution": 8}], reuse=True)
TRAIN: dict[str, Any] = {"epochs": 1, "batch_size": 32, "precision": "float32"}


@pytest.fixture(scope="module")
def context() -> Context:
    spec = DataSpec(source="digits", image_size=16, train_limit=128, test_limit=60, normalize=((0.305,), (0.376,)))
    return Context(data=load_data(spec, SHAPE, 10), backend="eager")


def net() -> nn.Module:
    return dz.source("dynamize:digits_resnet", pretrained=True)


def changed(network: DynamicNetwork, before: dict[str, Tensor]) -> set[str]:
    """Names of what is not as it was, but for counts of batches."""
    after = network.state_dict()
    return {name for name, one in before.items() if not torch.equal(one, after[name]) and "num_batches" not in name}


def state(network: DynamicNetwork) -> dict[str, Tensor]:
    return {name: one.clone() for name, one in network.state_dict().items()}


def test_they_learn_together_and_are_calibrated(context: Context, tmp_path: Path) -> None:
    context = replace(context, teacher=net())
    network = dz.convert(net(), [REUSE], SHAPE, context)
    before = state(network)
    network, _ = apply(network, dz.Distill(**TRAIN), context)
    assert network.history[-1]["joined"] == 0
    moved = changed(network, before)
    assert {name.split(".")[1] for name in moved} == {"main-8", "main", "fuse__1", "fuse__2"}
    assert {f"nets.{name}.conv1.weight" for name in ("main-8", "main")} <= moved
    network = apply(network, dz.Calibrate(macs_ratio=1.2, points=4), context)[0].eval()
    for point in network.operating_points:
        assert point.thresholds["main-8"] is not None  # it runs in any case
        assert point.macs_ratio >= 0.25
    dz.save(network, tmp_path)
    images = next(context.data.test.batches(40))[0]
    assert torch.equal(dz.load(tmp_path)(images), network(images))


def test_one_alone_is_not_trained(context: Context) -> None:
    for step in (dz.Distill(**TRAIN, member="main"), dz.Recalibrate(images=32, member="main")):
        with pytest.raises(DynamizeError, match="leave out member, so that they learn together"):
            dz.convert(net(), [REUSE, step], SHAPE, context)


def test_projections_alone_are_trained(context: Context) -> None:
    network = dz.convert(net(), [REUSE], SHAPE, context)
    before = state(network)
    network = apply(network, dz.Distill(**TRAIN, train="heads"), replace(context, teacher=net()))[0]
    assert changed(network, before) == {f"pieces.fuse__{number}.sum.project.weight" for number in (1, 2)}


def test_the_last_layer_alone_is_trained(context: Context) -> None:
    network = dz.convert(net(), [dz.Cascade(first=[{"resolution": 8}])], SHAPE, context)
    before = state(network)
    network = apply(network, dz.Distill(**TRAIN, train="last", member="main-8"), replace(context, teacher=net()))[0]
    norm = {f"layer3.2.bn2.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
    assert changed(network, before) == {f"nets.main-8.{name}" for name in {*norm, "linear.weight", "linear.bias"}}


def test_statistics_of_another_resolution(context: Context) -> None:
    """Those of the network that sees smaller images, and of no other, where calibration images are answered better."""
    network = dz.convert(net(), [dz.Cascade(first=[{"resolution": 8}])], SHAPE, context)
    before = state(network)
    network, notes = apply(network, dz.Recalibrate(images=128), context)
    (step,) = (step for step in network.history if step["pass"] == "recalibrate")
    assert step["member"] == "main-8"
    assert notes[0].startswith("main-8: calibration accuracy with batch-norm statistics from 128 train images")
    moved = changed(network, before)
    assert bool(moved) == (step["statistics"] == "recalibrated")
    assert all(name.startswith("nets.main-8.") and "running" in name for name in moved)
    seen = dz.convert(net(), [dz.GlanceFocus(glance=8), dz.Recalibrate(images=64)], SHAPE, context)
    assert seen.history[-1].get("member") is None  # the looks go together


def test_a_network_alone_is_recalibrated(context: Context) -> None:
    network = dz.convert(net(), [dz.Recalibrate(images=64, statistics="recalibrated")], SHAPE, context)
    assert network.history[-1]["statistics"] == "recalibrated"


@pytest.mark.slow
def test_in_bytes_and_with_exits_inside(context: Context, tmp_path: Path) -> None:
    context = replace(context, teacher=net())
    exits: dict[str, Any] = {"at": ["layer2"], "size": [8], "share": 1.0}
    steps: list[Any] = [
        REUSE,
        dz.Exits(**exits, member="main-8"),
        dz.Exits(**exits, member="main"),
        dz.Distill(**TRAIN),
        dz.Calibrate(macs_ratio=1.0, points=3),
        dz.Quantize(images=32, max_drop=None),
    ]
    network = dz.convert(net(), steps, SHAPE, context).eval()
    images = next(context.data.test.batches(40))[0]
    names = network.decision_names[0]
    assert names == ("main-8/exit.1", "main-8", "exit.1")
    dz.save(network, tmp_path / "saved")
    loaded = dz.load(tmp_path / "saved")
    for each in (dict.fromkeys(names, 1.0), dict.fromkeys(names, None), {**dict.fromkeys(names), "exit.1": 3.0}):
        setting = Setting(each)
        wanted = network.run(images, setting)
        found = loaded.run(images, setting)
        assert torch.equal(found.logits, wanted.logits)
        assert all(torch.equal(found.taken[name], taken) for name, taken in wanted.taken.items())
    network.set_operating_point(None)
    compiled = dz.compile_network(network, "onnxruntime")
    assert not compiled.notes
    assert float((compiled(images).argmax(1) == network(images).argmax(1)).double().mean()) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    "source",
    ["torchvision:resnet18", "torchvision:mobilenet_v2", "timm:mobilenetv3_small_100", "timm:efficientnet_lite0"],
)
def test_known_networks(source: str, tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="a network of timm's") if source.startswith("timm") else None
    torch.manual_seed(0)
    plain, images = dz.source(f"{source},num_classes=10").train(), torch.randn(6, 3, 96, 80)
    for layer in plain.modules():
        if isinstance(layer, nn.BatchNorm2d):  # statistics that fit its random weights, or all images look alike to it
            layer.reset_running_stats()
            layer.momentum = None
    with torch.no_grad():
        plain(images)
    plain.eval()
    network = dz.convert(plain, [dz.Cascade(first=[{"resolution": 64}], reuse=True)], (3, 96, 80)).eval()
    with torch.no_grad():
        wanted = plain(images)
        assert torch.equal(network(images), wanted)
        for piece in network.row:
            for parameter in piece.parameters() if isinstance(piece, Fuse) else ():
                parameter.normal_(0, 0.1)
        assert not torch.equal(network(images), wanted)
        scores = network.run(images, everyone=True).seen[0][2].sort().values
        setting = Setting({"main-64": float(scores[2] + scores[3]) / 2})
        routed = network.run(images, setting)
        assert int((routed.exits == 0).sum()) == 3
        network.setting = setting
        expected = exit_costs(network).executed(routed.taken, len(images)).sum()
        assert count_macs(network, images) == pytest.approx(float(expected))
        dz.save(network, tmp_path / "saved")
        assert torch.equal(dz.load(tmp_path / "saved").run(images, setting).logits, routed.logits)
        compiled = dz.compile_network(network, "onnxruntime").run(images, setting)
        assert torch.equal(compiled.exits, routed.exits)
        assert close(compiled.logits, routed.logits, 1e-3)


BEHIND: dict[str, Any] = {
    "channel_gates": dz.ChannelGates(blocks=["layer3.1"], multiple=4, member="main"),
    "exits": dz.Exits(at=["layer2"], size=[8], share=1.0, member="main"),
    "expand_branches": dz.ExpandBranches(layers=["layer3.0.conv1"], member="main"),
    "factorize": dz.Factorize(layers={"layer3.1.conv1": [8, 8]}, timed=False, member="main"),
    "fold_batchnorm": dz.FoldBatchnorm(),
    "skip_gates": dz.SkipGates(blocks=[["layer2.1"]], member="main-8"),
    "spatial_sampling": dz.SpatialSampling(blocks=[["layer2.1"]], member="main"),
}


@pytest.mark.parametrize("step", BEHIND.values(), ids=BEHIND)
@pytest.mark.fast("exits", "skip_gates")
def test_steps_behind(step: Any, tmp_path: Path) -> None:
    """What comes of it executes what it says that it costs, and is saved and loaded."""
    network = dz.convert(net(), [REUSE, step], SHAPE).eval()
    generator = torch.Generator().manual_seed(0)
    for piece in network.row:
        for parameter in piece.parameters() if isinstance(piece, Fuse) else ():
            nn.init.normal_(parameter, std=0.2, generator=generator)
    images = 2 * torch.randn(20, *SHAPE, generator=generator)
    network.setting = setting = Setting(dict.fromkeys(network.decision_names[0], 2.0))
    routed = network.run(images)
    assert len(set(routed.exits.tolist())) > 1
    expected = exit_costs(network).executed(routed.taken, len(images)).sum()
    assert count_macs(network, images) == pytest.approx(float(expected))
    dz.save(network, tmp_path)
    assert torch.equal(dz.load(tmp_path).run(images, setting).logits, routed.logits)
    found = dz.compile_network(network, "onnxruntime").run(images, setting)
    assert torch.equal(found.exits, routed.exits)
    assert close(found.logits, routed.logits, 1e-3)
