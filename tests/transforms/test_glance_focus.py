"""`glance_focus`: calibrated, quantised and loaded again; and what is refused."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dynamize as dz
from dynamize.data import DataSpec, load_data
from dynamize.errors import DynamizeError
from dynamize.nn.looking import Look
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting
from dynamize.nn.where import ClassMap
from dynamize.transform import Context

SHAPE = (1, 16, 16)


@pytest.fixture(scope="module")
def context() -> Context:
    spec = DataSpec(source="digits", image_size=16, train_limit=64, test_limit=60, normalize=((0.305,), (0.376,)))
    return Context(data=load_data(spec, SHAPE, 10), backend="eager")


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def net() -> nn.Module:
    return dz.source("dynamize:digits_resnet", pretrained=True)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["activation", "learned"])
def test_calibrated_in_bytes_and_loaded_again(context: Context, tmp_path: Path, policy: Any) -> None:
    look = dz.GlanceFocus(glance=8, crops=1, crop=0.75, policy=policy)
    steps: list[Any] = [look, dz.Calibrate(max_drop=5, points=4), dz.Quantize(images=64, max_drop=None)]
    network = dz.convert(net(), steps, SHAPE, replace(context, teacher=net())).eval()
    for point in network.operating_points:
        assert point.thresholds["focus-1"] is None or point.thresholds["glance"] is not None
    assert network.operating_point.macs_ratio < 0.6
    dz.save(network, tmp_path)
    loaded = dz.load(tmp_path)
    images = next(context.data.test.batches(40))[0]
    setting = Setting({"glance": 4.0, "focus-1": 4.0})
    found, wanted = loaded.run(images, setting), network.run(images, setting)
    assert torch.equal(found.logits, wanted.logits)
    assert torch.equal(found.exits, wanted.exits)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"glance": 17}, "larger than the 16 pixels"),
        ({"size": 30}, "larger than the 16 pixels"),
        ({"glance": 1}, "the glance may be too small"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(DynamizeError, match=said):
        dz.convert(net(), [dz.GlanceFocus(**fields)], SHAPE)


def test_crops_are_not_trained_on_whole_images(context: Context) -> None:
    steps = [dz.GlanceFocus(glance=8), dz.Distill(epochs=1, member="focus-1")]
    with pytest.raises(DynamizeError, match="sees crops of 11 x 11 pixels"):
        dz.convert(net(), steps, SHAPE, context)


def test_looks_learn_together_and_the_network_stays(context: Context, tmp_path: Path) -> None:
    look = dz.GlanceFocus(glance=8, crops=1, crop=0.75)
    network = dz.convert(net(), [look, dz.Distill(epochs=1)], SHAPE, replace(context, work=tmp_path)).eval()
    assert network.history[-1]["joined"] == 1
    assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == ["distill"]
    before, after = net().state_dict(), network.state_dict()
    for name, values in before.items():
        assert torch.equal(after[f"nets.main.{name}"], values)
        if name.endswith("conv1.weight"):
            assert not torch.equal(after[f"nets.glance.{name}"], values)
            assert not torch.equal(after[f"nets.focus-1.{name}"], values)
    images = next(context.data.test.batches(20))[0]
    assert len(network.all_exits(images)) == 3
    assert torch.equal(network.all_exits(images)[-1], net().eval()(images))
    trained = dz.convert(net(), [look, dz.Distill(epochs=1, member="main")], SHAPE, context).state_dict()
    assert not torch.equal(trained["nets.main.conv1.weight"], before["conv1.weight"])
    assert torch.equal(trained["nets.glance.conv1.weight"], before["conv1.weight"])


@pytest.mark.parametrize(
    ("fields", "said"), [({"train": "heads"}, "no exit heads"), ({"features": 1}, "no feature maps of the original")]
)
def test_what_looks_cannot_learn(context: Context, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(DynamizeError, match=said):
        dz.convert(net(), [dz.GlanceFocus(glance=8), dz.Distill(**fields)], SHAPE, context)


def test_it_stands_alone_in_front(context: Context) -> None:
    small: dict[str, Any] = {"source": "dynamize:digits_resnet_small", "kwargs": {"pretrained": True}}
    with pytest.raises(DynamizeError, match="use one of `cascade` and `glance_focus`"):
        dz.convert(net(), [dz.Cascade(first=[small]), dz.GlanceFocus(glance=8)], SHAPE)


def looking(network: DynamicNetwork) -> Look:
    """The piece that says where crops are."""
    (found,) = (piece for piece in network.row if isinstance(piece, Look))
    return found


@pytest.mark.slow
def test_crops_follow_what_the_glance_became(tmp_path: Path) -> None:
    steps: list[Any] = [
        dz.GlanceFocus(glance=10, crops=1, crop=0.5),
        dz.Prune(ratio=0.5, statistics_images=0, member="glance"),
        dz.Factorize(layers={"linear": [4]}, member="glance"),
    ]
    network = dz.convert(net(), steps, SHAPE).eval()
    evidence = looking(network).where
    features = torch.rand(3, 16, *evidence.grid)
    with torch.no_grad():
        wanted = evidence(features)
        held = copy.deepcopy(evidence)
        held.hold()
        assert torch.allclose(held(features), wanted, atol=1e-5)
        network.graphs["glance/"].get_submodule("linear")[0].weight.mul_(2)
        assert not torch.allclose(evidence(features), wanted, atol=1e-5)
        network.graphs["glance/"].get_submodule("linear")[0].weight.div_(2)
    images = torch.randn(20, *SHAPE, generator=torch.Generator().manual_seed(0))
    setting = Setting({"glance": 0.5, "focus-1": 0.5})
    dz.save(network, tmp_path)
    for other in (dz.load(tmp_path).eval(), dz.compile_network(network, "onnxruntime")):
        found, wanted = other.run(images, setting), network.run(images, setting)
        assert torch.equal(found.exits, wanted.exits)
        assert torch.allclose(found.logits, wanted.logits, atol=1e-4)


def test_a_network_that_reads_its_batch_size_is_looked_into() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.linear = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()), nn.Linear(8, 5)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            count = images.size(0)
            pooled = nn.functional.adaptive_avg_pool2d(self.features(images), 1)
            return self.linear(pooled.view(count, -1))

    network = dz.convert(Sized().eval(), [dz.GlanceFocus(glance=8)], SHAPE)
    assert isinstance(looking(network).where, ClassMap)


class Ending(nn.Module):
    """A network whose answer is no mean over its last map."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.pool, self.norm = nn.AdaptiveAvgPool2d(4), nn.BatchNorm1d(128)
        self.first, self.last = nn.Linear(128, 16), nn.Linear(16, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pooled = self.norm(self.pool(self.features(images)).flatten(1))
        return self.last(nn.functional.dropout(self.first(pooled), training=self.training))


def test_any_network_is_looked_into(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = Ending().eval()
    network = dz.convert(plain, [dz.GlanceFocus(glance=8, crop=0.5, crops=2)], SHAPE).eval()
    images = torch.randn(30, *SHAPE)
    assert torch.equal(network(images), plain(images))
    assert looking(network).macs == 5 * (128 * 16 + 16 * 5) + 4 * 3  # all and each of four cells; weighed over classes
    setting = Setting({"glance": 0.3, "focus-1": 0.4, "focus-2": 0.5})
    dz.save(network, tmp_path)
    wanted = network.run(images, setting)
    for other in (dz.load(tmp_path, network=Ending()).eval(), dz.compile_network(network, "onnxruntime")):
        found = other.run(images, setting)
        assert all(torch.equal(found.crops[name], boxes) for name, boxes in wanted.crops.items())
        assert torch.allclose(found.logits, wanted.logits, atol=1e-4)
