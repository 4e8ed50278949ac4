"""Networks that go on with what one before them has seen: nothing changes at first, who has left carries nothing on."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import FLOAT32
from networks import close
from torch import Tensor, nn
from torch.nn.functional import interpolate

import dynamize as dz
from dynamize.errors import DynamizeError
from dynamize.graph.macs import count_macs
from dynamize.measure.costs import exit_costs
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Dense, Setting
from dynamize.nn.reuse import Fuse
from dynamize.runtime.export import export

SHAPE = (1, 16, 16)
NAMES = ("main-8", "main-12")
SETTINGS: list[dict[str, float | None]] = [
    {"main-8": 3.0, "main-12": 0.5},
    {"main-8": None, "main-12": 0.5},
    {"main-8": 3.0, "main-12": None},
    {},
]


def net() -> nn.Module:
    return dz.source("dynamize:digits_resnet", pretrained=True)


def scattered(network: DynamicNetwork) -> DynamicNetwork:
    """With projections that are no longer zero."""
    generator = torch.Generator().manual_seed(0)
    for piece in network.row:
        for parameter in piece.parameters() if isinstance(piece, Fuse) else ():
            nn.init.normal_(parameter, std=0.2, generator=generator)
    return network


def made(reuse: Any = True) -> DynamicNetwork:
    first = [{"resolution": 8}, {"resolution": 12}]
    return dz.convert(net(), [dz.Cascade(first=first, reuse=reuse)], SHAPE).eval()


@pytest.fixture(scope="module")
def network() -> DynamicNetwork:
    return scattered(made())


@pytest.fixture(scope="module")
def images() -> Tensor:
    return 2 * torch.randn(40, *SHAPE, generator=torch.Generator().manual_seed(0))


def executed(network: DynamicNetwork, images: Tensor, setting: Setting) -> float:
    before, network.setting = network.setting, setting
    try:
        return count_macs(network, images)
    finally:
        network.setting = before


def test_nothing_changes_at_first(images: Tensor) -> None:
    network, plain = made(), net().eval()
    with torch.no_grad():
        assert torch.equal(network(images), plain(images))
    assert network.history[0]["reuse"] == ["layer2_2_relu2", "layer3_2_relu2"]
    assert network.made == ((*NAMES, "main"),)


def test_maps_are_added_where_they_lie(images: Tensor) -> None:
    """Against the network with a hook that does it."""
    first = [{"resolution": 8}]
    network = scattered(dz.convert(net(), [dz.Cascade(first=first, reuse=["layer3"])], SHAPE).eval())
    small, plain = network.graphs["main-8/"].preprocess, net().eval()
    project = network.pieces["fuse__1"].sum.project
    maps: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        maps.append(output)

    def add(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output + project(interpolate(maps[0], output.shape[2:], mode="bilinear", align_corners=False))

    with torch.no_grad():
        hook = plain.layer3.register_forward_hook(keep)
        before = plain(small(images))
        hook.remove()
        plain.layer3.register_forward_hook(add)
        answers = network.all_exits(images)
        assert close(answers[0], before)
        assert close(answers[1], plain(images))
    assert not close(answers[1], net().eval()(images))


@pytest.mark.parametrize("thresholds", SETTINGS)
def test_what_is_skipped_is_not_executed(
    network: DynamicNetwork, images: Tensor, thresholds: dict[str, float | None]
) -> None:
    setting = Setting(thresholds)
    routed = network.run(images, setting)
    assert executed(network, images, setting) == pytest.approx(exit_costs(network).executed(routed.taken, 40).sum())
    assert bool((routed.taken["main-8"] >= 0).all())  # it runs, whether images may leave there or not


def test_images_are_answered_as_if_alone(network: DynamicNetwork, images: Tensor) -> None:
    setting = Setting(SETTINGS[0], combine="mean")
    whole = network.run(images, setting)
    assert len(set(whole.exits.tolist())) == 3
    for i in range(12):
        one = network.run(images[i : i + 1], setting)
        assert one.exits.item() == whole.exits[i]
        assert close(one.logits[0], whole.logits[i])


@pytest.mark.parametrize("backend", FLOAT32)
@pytest.mark.fast("onnxruntime")
def test_backends_answer_alike(network: DynamicNetwork, images: Tensor, backend: str) -> None:
    compiled = dz.compile_network(network, backend)
    assert not compiled.notes
    for thresholds in SETTINGS:
        for some in (slice(0, 40), slice(3, 4), slice(0, 0)):
            setting = Setting(thresholds)
            wanted, found = network.run(images[some], setting), compiled.run(images[some], setting)
            assert torch.equal(found.exits, wanted.exits)
            assert close(found.logits, wanted.logits)


def test_training_gives_the_answers_of_all(network: DynamicNetwork, images: Tensor) -> None:
    with torch.no_grad():
        wanted = network.all_exits(images)
    alone = made().train()
    dense = alone(images)
    assert isinstance(dense, Dense)
    assert len(dense.logits) == len(wanted) == 3
    dense.logits[-1].sum().backward()
    gradients = {name: one.grad for name, one in alone.named_parameters()}
    assert float(gradients["pieces.fuse__1.sum.project.weight"].abs().max()) > 0


def test_it_is_saved_and_loaded(network: DynamicNetwork, images: Tensor, tmp_path: Path) -> None:
    dz.save(network, tmp_path / "out")
    setting = Setting(SETTINGS[0])
    assert torch.equal(dz.load(tmp_path / "out").run(images, setting).logits, network.run(images, setting).logits)


def test_the_driver_of_an_export_answers_alike(images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = scattered(made())
    network.setting = Setting(SETTINGS[0], combine="product")
    export(network, tmp_path / "out")
    spec = importlib.util.spec_from_file_location("run", tmp_path / "out" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    driver = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "run", driver)
    spec.loader.exec_module(driver)
    found, wanted = driver.Network().run(images.numpy()), network.run(images)
    assert close(torch.from_numpy(found.logits), wanted.logits)
    for name, options in wanted.taken.items():
        assert found.taken[name].tolist() == options.tolist()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"first": [{"source": "dynamize:digits_resnet_small,pretrained=true"}]}, "on smaller images"),
        ({"first": [{"resolution": 8, "crop": 0.8}]}, "lie elsewhere"),
        ({"first": [{"resolution": 8}], "reuse": ["layer9"]}, "'layer9' is no cut point"),
        ({"first": [{"resolution": 2}], "reuse": ["layer3"]}, "main-2 has no feature map at layer3"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(DynamizeError, match=said):
        dz.convert(net(), [dz.Cascade(**{"reuse": True} | fields)], SHAPE)


def test_maps_of_another_width_are_refused() -> None:
    steps: list[Any] = [dz.Cascade(first=[{"resolution": 8}], reuse=True)]
    steps.append(dz.Prune(ratio=0.5, statistics_images=0, member="main-8"))
    with pytest.raises(DynamizeError, match="do that before the networks are put in a row"):
        dz.convert(net(), steps, SHAPE)
