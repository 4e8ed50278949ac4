"""Networks one behind the other: who answers, what is joined, and what is really not executed."""

from itertools import product

import pytest
import torch
from backends import FLOAT32
from networks import close
from torch import Tensor

import dynamize as dz
from dynamize.graph.macs import count_macs
from dynamize.measure.costs import exit_costs
from dynamize.member import Member
from dynamize.nn.joining import Joining
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Dense, Setting
from dynamize.transform import Context

SHAPE = (1, 8, 8)
NAMES = ("small", "middle")


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    small = dz.source("dynamize:digits_resnet_small", pretrained=True)
    middle = dz.source("dynamize:digits_resnet", pretrained=True)
    for parameter in middle.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    middle.layer1 = torch.nn.Identity()
    return {"small": small, "middle": middle, "main": dz.source("dynamize:digits_resnet", pretrained=True)}


@pytest.fixture(scope="module")
def network(alone: dict[str, torch.nn.Module]) -> DynamicNetwork:
    first = [Member(name=name) for name in NAMES]
    context = Context(members={name: alone[name] for name in NAMES})
    return dz.convert(alone["main"], [dz.Cascade(first=first)], SHAPE, context).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return 2 * torch.randn(40, *SHAPE, generator=torch.Generator().manual_seed(0))


def by_hand(alone: dict[str, torch.nn.Module], images: Tensor, setting: Setting) -> tuple[Tensor, Tensor]:
    """Answers and who gave them, image by image."""
    answers, places = [], []
    asked = [k for k, name in enumerate((*NAMES, "main")) if name == "main" or setting.thresholds.get(name) is not None]
    with torch.no_grad():
        for image in images:
            logits = [alone[(*NAMES, "main")[k]](image[None])[0] for k in asked]
            for last, place in enumerate(asked):
                seen = torch.stack(logits[: last + 1]).log_softmax(1)
                joined = {"last": logits[last], "mean": seen.logsumexp(0), "product": seen.sum(0)}[setting.combine]
                odds = joined.softmax(0).max().logit()
                if place == len(NAMES) or odds >= setting.thresholds[NAMES[place]]:
                    break
            answers.append(joined)
            places.append(place)
    return torch.stack(answers), torch.tensor(places)


def test_nothing_changes_until_asked(
    alone: dict[str, torch.nn.Module], network: DynamicNetwork, images: Tensor
) -> None:
    with torch.no_grad():
        assert torch.equal(network(images), alone["main"](images))
        assert count_macs(network, images[:1]) == count_macs(alone["main"], images[:1])


@pytest.mark.parametrize(
    ("combine", "first", "second"), product(("last", "mean", "product"), (None, 2.0, 4.0), (None, 1.0, 5.0))
)
@pytest.mark.fast(
    "last-2.0-1.0", "mean-None-5.0", "product-4.0-None", "product-2.0-5.0", "last-4.0-5.0", "mean-2.0-1.0"
)
def test_each_image_gets_the_answer_of_whom_it_needs(
    alone: dict[str, torch.nn.Module],
    network: DynamicNetwork,
    images: Tensor,
    combine: Joining,
    first: float | None,
    second: float | None,
) -> None:
    setting = Setting({"small": first, "middle": second}, combine=combine)
    wanted, places = by_hand(alone, images, setting)
    routed = network.run(images, setting)
    assert torch.equal(routed.exits, places)
    assert close(routed.logits.softmax(1), wanted.softmax(1))
    assert torch.equal(routed.logits.argmax(1), wanted.argmax(1))


@pytest.mark.parametrize("backend", FLOAT32)
@pytest.mark.parametrize("combine", ["last", "mean", "product"])
@pytest.mark.fast("last-eager", "mean-onnxruntime", "product-eager")
def test_backends_send_images_the_same_way(
    network: DynamicNetwork, images: Tensor, backend: str, combine: Joining
) -> None:
    compiled = dz.compile_network(network, backend)
    for thresholds, some in product(
        ({"small": 2.5, "middle": 3.0}, {"small": None, "middle": 3.0}, {}), (slice(0, 40), slice(3, 4), slice(0, 0))
    ):
        setting = Setting(thresholds, combine=combine)
        wanted, found = network.run(images[some], setting), compiled.run(images[some], setting)
        assert torch.equal(found.exits, wanted.exits)
        assert close(found.logits, wanted.logits)


@pytest.mark.parametrize(
    "thresholds", [{"small": 2.5, "middle": 3.0}, {"small": None, "middle": 3.0}, {"small": 2.5, "middle": None}, {}]
)
def test_what_is_skipped_is_not_executed(
    network: DynamicNetwork, images: Tensor, thresholds: dict[str, float | None]
) -> None:
    setting = Setting(thresholds)
    routed = network.run(images, setting)
    expected = exit_costs(network).executed(routed.taken, len(images))
    executed = 0.0
    before, network.setting = network.setting, setting
    try:
        executed = count_macs(network, images)
    finally:
        network.setting = before
    assert executed == pytest.approx(expected.sum())
    dearest = exit_costs(network).cumulative(setting)
    assert expected.max() <= dearest.max()
    off = [name for name, threshold in thresholds.items() if threshold is None]
    assert all((routed.taken[name] == -1).all() for name in off)


def test_training_gives_the_answers_of_all(
    alone: dict[str, torch.nn.Module], network: DynamicNetwork, images: Tensor
) -> None:
    with torch.no_grad():
        wanted = [alone[name](images) for name in (*NAMES, "main")]
        assert all(map(close, network.all_exits(images), wanted))
        dense = network.train()(images)
        network.eval()
    assert isinstance(dense, Dense)
    assert len(dense.logits) == 3


@pytest.mark.parametrize("backend", FLOAT32)
def test_the_users_images_are_left_as_they_are(network: DynamicNetwork, images: Tensor, backend: str) -> None:
    before = images.clone()
    dz.compile_network(network, backend).run(images, Setting({"small": 9.0, "middle": 9.0}))
    assert torch.equal(images, before)


def test_agreement_needs_no_threshold(alone: dict[str, torch.nn.Module], images: Tensor) -> None:
    context = Context(members={name: alone[name] for name in NAMES})
    step = dz.Cascade(first=[Member(name=name) for name in NAMES], confidence="agreement")
    network = dz.convert(alone["main"], [step], SHAPE, context).eval()
    routed = network.run(images, Setting({"small": 1.0, "middle": 1.0}))
    with torch.no_grad():
        small, middle, main = (alone[name](images) for name in (*NAMES, "main"))
    agree = small.argmax(1) == middle.argmax(1)
    assert 0 < int(agree.sum()) < len(images)
    assert torch.equal(routed.exits, torch.where(agree, 1, 2))
    assert close(routed.logits, torch.where(agree[:, None], middle, main))


def test_one_network_is_taken_out_changed_and_put_back(
    alone: dict[str, torch.nn.Module], images: Tensor, tmp_path
) -> None:
    context = Context(members={name: alone[name] for name in NAMES})
    first = [Member(name=name) for name in NAMES]
    steps = [dz.Cascade(first=first), dz.Exits(count=1, member="middle"), dz.Exits(at=["layer2.0"])]
    network = dz.convert(alone["main"], steps, SHAPE, context).eval()
    names = [decision.name for decision in network.decisions()]
    assert names == ["small", "middle/exit.1", "middle", "exit.1"]
    setting = Setting({"small": 2.5, "middle/exit.1": 0.5, "middle": 3.0, "exit.1": 0.5}, combine="product")
    routed = network.run(images, setting)
    assert len(set(routed.exits.tolist())) > 2
    found = dz.compile_network(network, "onnxruntime").run(images, setting)
    assert torch.equal(found.exits, routed.exits)
    assert close(found.logits, routed.logits)
    dz.save(network, tmp_path)
    loaded = dz.load(tmp_path, network=alone["main"], members=context.members)
    assert torch.equal(loaded.run(images, setting).logits, routed.logits)
    assert [step.get("member") for step in loaded.history] == [None, "middle", "main"]


@pytest.mark.parametrize("combine", ["last", "product", "mean"])
def test_whoever_is_held_up_gets_the_answers_joined_so_far(
    network: DynamicNetwork, images: Tensor, combine: Joining
) -> None:
    asked: list[tuple[str, int]] = []

    def ends(place: str, going_on: object) -> bool:
        asked.append((place, len(going_on)))
        return place == "middle"

    on = dict.fromkeys(NAMES, float("inf"))
    with torch.no_grad():
        found = network.run(images, Setting(on, combine=combine, ends=ends))
        wanted = network.run(images, Setting(on | {"middle": float("-inf")}, combine=combine))
    assert asked == [("small", 40), ("middle", 40)]
    assert torch.equal(found.logits, wanted.logits)
    assert found.exits.tolist() == [1] * 40
