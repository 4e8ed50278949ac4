"""What a user hands over in Python is taken, or refused in a sentence."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dynamize as dz
from dynamize.errors import DynamizeError

SHAPE, CLASSES = (3, 8, 8), 4


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES)).eval()


def with_exit() -> dz.DynamicNetwork:
    return dz.convert(net(), [dz.Exits(count=1, share=1.0, head="linear")], SHAPE)


def batches(labels: Tensor, images: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(len(labels), *SHAPE) if images is None else images, labels)]


def diverged() -> nn.Module:
    made = net()
    with torch.no_grad():
        made.get_parameter("6.weight")[0, 0] = float("nan")
    return made


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return net()


GOOD = torch.arange(32) % CLASSES
EXITS = [dz.Exits(count=1, share=1.0, head="linear")]
NETWORKS: dict[str, tuple[Callable[[], Any], str]] = {
    "text": (lambda: "torchvision:resnet18", r"make the network from it with dz.source\('torchvision:resnet18'\)"),
    "class": (lambda: nn.Sequential, r"given its class: write Sequential\(\.\.\.\)"),
    "state dict": (lambda: net().state_dict(), r"a state dict or a file of weights becomes one with dz.source"),
    "none": (lambda: None, r"a torch.nn.Module, and was given None"),
    "scripted": (lambda: torch.jit.script(net()), "give the module that it was scripted from"),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), "run the network once on images"),
    "meta": (on_meta, "6.weight of the network|0.weight of the network is on the meta device"),
    "diverged": (diverged, "6.weight of the network holds values that are not finite"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", NETWORKS)
def test_what_is_no_network_with_weights_is_refused(kind: str) -> None:
    make, said = NETWORKS[kind]
    with pytest.raises(DynamizeError, match=said):
        dz.convert(make(), EXITS, SHAPE)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: dz.convert(net(), EXITS[0], SHAPE), r"steps are a list: write \[Exits\(\.\.\.\)\]"),
        (lambda: dz.convert(net(), ["exits"], SHAPE), r"'exits' \(str\) is no step"),
        (lambda: dz.convert(net(), [dz.Exits], SHAPE), r"made with brackets: write Exits\(\)"),
        (lambda: dz.convert(net(), "exits", SHAPE), "steps are a list such as"),
        (lambda: dz.convert(net(), EXITS, (1, 3, 8, 8)), r"leave out the batch size, as in \(3, 8, 8\)"),
        (lambda: dz.convert(net(), EXITS, 8), r"input_shape is channels, height and width .* and 8 was given"),
        (lambda: dz.convert(net(), EXITS, "3,8,8"), "input_shape is channels"),
        (lambda: dz.convert(net(), EXITS, SHAPE, "cpu"), "context is a dz.Context, and a str was given"),
        (lambda: dz.Exits(cout=1), r"Exits: cout: no such field. Did you mean count\? Fields: pass, member, at, count"),
        (lambda: dz.Exits(2), r"takes its fields by name: Exits\(member=\.\.\., at="),
        (lambda: dz.Exits(count=0), r"Exits: count: Input should be greater than 0 \(given: 0\)"),
        (lambda: dz.Calibrate(max_drop=1, macs_ratio=0.5), "max_drop and macs_ratio are budgets both; give one"),
        (lambda: dz.save(net(), "nowhere"), "dz.save keeps a converted network"),
        (lambda: dz.calibrate(net(), batches(GOOD), net()), "takes a converted network"),
        (lambda: dz.calibrate(dz.convert(net(), [], SHAPE), batches(GOOD), net()), "neither exits nor gates"),
        (lambda: dz.MultiExitLoss(teacher="resnet18"), "MultiExitLoss takes a network and was given the text"),
    ],
)
def test_misuse_is_told_in_a_sentence(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(DynamizeError, match=said):
        call()


@pytest.mark.parametrize(
    ("loader", "said"),
    [
        ([], "the calibration loader gave no batch"),
        (batches(GOOD + 1), r"labels from 1 to 4 do not fit the network's 4 classes, 0 to 3: subtract 1"),
        (batches(GOOD - 2), "labels from -2 to 1 do not fit"),
        (batches(torch.full_like(GOOD, -1)), "32 of 32 images have no label"),
        (batches(torch.cat([GOOD[1:], torch.tensor([-1])])), "1 of 32 images have no label"),
        (batches(GOOD[:, None]), "one class number per image"),
        (batches(GOOD, torch.zeros(32, *SHAPE, dtype=torch.uint8)), "normalised floating-point images"),
        ("folder", "calibration='folder' gives no images: give a DataLoader"),
    ],
)
def test_calibration_images_that_cannot_be_judged_are_refused(loader: Any, said: str) -> None:
    with pytest.raises(DynamizeError, match=said):
        dz.calibrate(with_exit(), loader, net())


def test_calibration_images_may_be_a_loader_a_dataset_or_tensors() -> None:
    labels = torch.arange(64) % CLASSES
    pair = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(0)), labels
    given = (pair, TensorDataset(*pair), DataLoader(TensorDataset(*pair), 10))
    first, *others = ([point.macs for point in dz.calibrate(with_exit(), one, net(), count=4)] for one in given)
    assert len(first) > 1
    assert others == [pytest.approx(first)] * 2


def test_an_empty_loader_is_refused_by_every_step_that_reads_it() -> None:
    good = batches(GOOD)
    with pytest.raises(DynamizeError, match="the calibration loader gave no batch"):
        dz.splits(train=good, calibration=[], test=batches(GOOD))
    for train in ([], ()):
        data = dz.splits(train=train, calibration=good, test=batches(GOOD))
        with pytest.raises(DynamizeError, match="no train images"):
            dz.convert(with_exit(), [dz.Distill(epochs=1)], SHAPE, dz.Context(data=data, backend="eager"))


def test_labels_of_the_loss() -> None:
    loss, dyn, images = dz.MultiExitLoss(teacher=net()), with_exit().train(), torch.randn(32, *SHAPE)
    found = loss(dyn(images), images, GOOD)
    for kind in (torch.int32, torch.uint8, torch.int16):
        assert torch.equal(loss(dyn(images), images, GOOD.to(kind)), found)
    for wrong, said in (
        (GOOD[:, None], r"labels.flatten\(\)"),
        (nn.functional.one_hot(GOOD, CLASSES), r"labels.argmax\(1\)"),
        (GOOD.float(), "one whole number for each image"),
        (GOOD + 1, "subtract 1"),
        ([0, 1], r"\[0, 1\] \(list\)"),
    ):
        with pytest.raises(DynamizeError, match=said):
            loss(dyn(images), images, wrong)


def test_weights_of_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        network = net()
    with pytest.raises(DynamizeError, match="inference_mode"):
        dz.convert(network, [], SHAPE)
