"""A glance, crops where it says, and the whole image: who answers, what is looked at, and what is not executed."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from backends import FLOAT32
from networks import close
from torch import Tensor, nn

import dynamize as dz
from dynamize.graph.macs import count_macs
from dynamize.measure.costs import exit_costs
from dynamize.nn.looking import corners, cut, sampled, windows
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Dense, Setting

SHAPE = (1, 16, 16)
SETTINGS = [
    {"glance": 2.5, "focus-1": 3.0, "focus-2": 4.0},
    {"glance": 2.5, "focus-1": None, "focus-2": 3.0},
    {"glance": None, "focus-1": 2.0, "focus-2": None},
    {"glance": 2.5, "focus-1": None, "focus-2": None},
    {},
]


def net() -> nn.Module:
    return dz.source("dynamize:digits_resnet", pretrained=True)


def made(policy: Any = "activation", **fields: Any) -> DynamicNetwork:
    step = dz.GlanceFocus(**{"glance": 10, "crops": 2, "crop": 0.5, "size": 8, "policy": policy} | fields)
    return dz.convert(net(), [step], SHAPE).eval()


@pytest.fixture(scope="module", params=["activation", "learned", "centre", "random"])
def network(request: pytest.FixtureRequest) -> DynamicNetwork:
    return made(request.param)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return 2 * torch.randn(40, *SHAPE, generator=torch.Generator().manual_seed(0))


def test_nothing_changes_until_asked(network: DynamicNetwork, images: Tensor) -> None:
    plain = net().eval()
    with torch.no_grad():
        assert torch.equal(network(images), plain(images))
        assert count_macs(network, images[:1]) == count_macs(plain, images[:1])


def test_a_glance_in_full_without_crops_is_the_network(images: Tensor) -> None:
    network = made(glance=16, crops=0)
    with torch.no_grad():
        routed = network.run(images, Setting({"glance": float("-inf")}))
        assert torch.equal(routed.logits, net().eval()(images))
    assert routed.exits.tolist() == [0] * 40


@pytest.mark.parametrize("thresholds", SETTINGS)
def test_what_is_skipped_is_not_executed(
    network: DynamicNetwork, images: Tensor, thresholds: dict[str, float | None]
) -> None:
    before, network.setting = network.setting, Setting(thresholds)
    try:
        executed = count_macs(network, images)
    finally:
        network.setting = before
    expected = exit_costs(network).executed(network.run(images, Setting(thresholds)).taken, len(images))
    assert executed == pytest.approx(expected.sum())


def test_images_are_answered_as_if_alone(network: DynamicNetwork, images: Tensor) -> None:
    setting = Setting(SETTINGS[0], combine="product")
    whole = network.run(images, setting)
    assert len(set(whole.exits.tolist())) > 2
    for i in range(12):
        one = network.run(images[i : i + 1], setting)
        assert one.exits.item() == whole.exits[i]
        assert close(one.logits[0], whole.logits[i])


@pytest.mark.slow
@pytest.mark.parametrize("backend", FLOAT32)
def test_backends_look_alike(network: DynamicNetwork, images: Tensor, backend: str) -> None:
    compiled = dz.compile_network(network, backend)
    assert not compiled.notes
    for thresholds, some in product(SETTINGS, (slice(0, 40), slice(3, 4), slice(0, 0))):
        setting = Setting(thresholds, combine="mean")
        wanted, found = network.run(images[some], setting), compiled.run(images[some], setting)
        assert torch.equal(found.exits, wanted.exits)
        assert close(found.logits, wanted.logits)


def test_training_gives_the_answers_of_all(network: DynamicNetwork, images: Tensor) -> None:
    with torch.no_grad():
        wanted = network.all_exits(images)
        dense = network.train()(images)
        network.eval()
    assert isinstance(dense, Dense)
    assert len(dense.logits) == len(wanted) == 4
    before = images.clone()
    network.run(images, Setting(SETTINGS[0]))
    assert torch.equal(images, before)


def test_what_was_looked_at_is_recorded(network: DynamicNetwork, images: Tensor) -> None:
    routed = network.run(images, Setting(SETTINGS[0]))
    for name, boxes in routed.crops.items():
        reached = routed.taken[name] >= 0
        assert torch.equal(boxes[:, 0] >= 0, reached)
        sides = (boxes[:, 2:] - boxes[:, :2])[reached]
        assert torch.equal(sides, torch.full_like(sides, 8))
        assert int(boxes.max()) <= 16
    assert list(routed.crops) == ["focus-1", "focus-2"]
    assert not network.run(images, Setting()).crops


def test_crops_of_a_batch_are_those_of_each_image(images: Tensor) -> None:
    places = torch.rand(40, 4, generator=torch.Generator().manual_seed(1))
    for number, where in ((0, places), (1, places), (0, None)):
        at_once = windows(images, where, number, (7, 10))
        found = corners(None if where is None else where.numpy(), number, 40, (9, 6))
        assert torch.equal(at_once, cut(images, np.arange(40), found, (7, 10)))
        if where is not None:
            at_pixels = torch.from_numpy(found / np.array([9, 6], np.float32)).repeat(1, 2).float()
            assert torch.allclose(sampled(images, at_pixels, number, (7, 10)), at_once, atol=1e-4)


def test_gradients_of_crops_reach_places() -> None:
    ramp = torch.arange(16.0).expand(1, 1, 16, 16)  # larger to the right
    places = torch.tensor([[0.3, 0.55]], requires_grad=True)
    sampled(ramp, places, 0, (8, 8)).mean().backward()
    assert places.grad is not None
    assert places.grad[0].tolist() == pytest.approx([0, 8], abs=1e-4)  # a place of 1 is 8 pixels away from one of 0


def test_it_is_saved_and_loaded(images: Tensor, tmp_path) -> None:
    network = made()
    network.setting = Setting(SETTINGS[0])
    dz.save(network, tmp_path / "out")
    loaded = dz.load(tmp_path / "out")
    wanted = network.run(images, Setting(SETTINGS[0]))
    assert torch.equal(loaded.run(images, Setting(SETTINGS[0])).logits, wanted.logits)


@pytest.mark.parametrize("policy", ["activation", "learned", "centre", "random"])
@pytest.mark.fast("activation", "learned")
def test_the_driver_of_an_export_looks_alike(images: Tensor, tmp_path, policy: str, monkeypatch) -> None:
    import importlib.util

    from dynamize.runtime.export import export

    network = made(policy)
    network.setting = Setting(SETTINGS[0], combine="mean")
    export(network, tmp_path / "out")
    spec = importlib.util.spec_from_file_location("run", tmp_path / "out" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    driver = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "run", driver)
    spec.loader.exec_module(driver)
    found, wanted = driver.Network().run(images.numpy()), network.run(images)
    assert close(torch.from_numpy(found.logits), wanted.logits)
    for name, options in wanted.taken.items():
        assert found.taken[name].tolist() == options.tolist()
