"""Distillation of feature maps: which are compared, and how far apart they are."""

import copy

import pytest
import torch
from digits import SHAPE, DigitNet, digit_splits
from gated_digits import gated_digits
from torch import nn

from dynamize.conversion import apply, convert
from dynamize.errors import DynamizeError
from dynamize.models import create
from dynamize.training.hints import HintLoss, relative_distance
from dynamize.transform import Context
from dynamize.transforms import Distill, Exits, Prune

IMAGES = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6)


def nothing(logits: object, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.zeros(())


def test_the_distance_is_a_share_of_the_teachers_mean_square() -> None:
    wanted = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)  # mean square 5
    assert float(relative_distance(wanted + 2, wanted)) == pytest.approx(4 / 5)
    assert float(relative_distance(torch.zeros_like(wanted), wanted)) == pytest.approx(1)


def test_maps_at_exits_and_at_the_end_of_each_resolution_are_compared() -> None:
    teacher = create("digits_resnet").eval()
    student = convert(teacher, [Exits(at=["layer2.0"], size=[8], share=1.0)], SHAPE)
    loss = HintLoss(nothing, 2.0, student, teacher)
    paths = {path for path, module in teacher.named_modules() for _, theirs in loss.pairs.values() if module is theirs}
    assert paths == {"layer2.0.conv1", "layer2.1.conv1", "layer3.0.conv1", "avgpool"}
    with loss.watching():
        assert float(loss(student.all_exits(IMAGES), IMAGES, LABELS).detach()) == 0
        with torch.no_grad():
            student.plain.get_submodule("conv1").weight.mul_(1.5)
        far = loss(student.all_exits(IMAGES), IMAGES, LABELS)
    assert float(far.detach()) > 0
    far.backward()
    assert float(student.plain.get_submodule("conv1").weight.grad.abs().sum()) > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(module._forward_pre_hooks for network in (teacher, student) for module in network.modules())


def test_training_with_features_comes_closer_to_the_teachers_maps() -> None:
    teacher = DigitNet().eval()
    splits, found = digit_splits(), []
    for weight in (0.0, 5.0):
        student = copy.deepcopy(teacher)
        torch.manual_seed(1)
        nn.init.kaiming_normal_(student.b[0].weight)
        step = Distill(epochs=2, batch_size=64, precision="float32", alpha=1.0, features=weight)
        network, _ = apply(convert(student, [], SHAPE), step, Context(data=splits, teacher=teacher))
        loss = HintLoss(nothing, 1.0, network, teacher)
        images = next(iter(splits.test.batches(100)))[0]
        with loss.watching(), torch.no_grad():
            found.append(float(loss(network(images), images, images)))
    assert found[1] < 0.8 * found[0]


def test_networks_with_gates() -> None:
    network = gated_digits()
    teacher = copy.deepcopy(network.plain).eval()
    step = Distill(epochs=1, batch_size=64, precision="float32", features=1.0, gate_budget=0.8)
    assert apply(network, step, Context(data=digit_splits(), teacher=teacher))[0].history[-1]["features"] == 1.0


def test_narrowed_networks_have_nothing_to_compare() -> None:
    teacher = create("digits_resnet").eval()
    student = convert(teacher, [Prune(ratio=0.5, round_to=8)], SHAPE)
    with pytest.raises(DynamizeError, match="`prune` narrows them"):
        HintLoss(nothing, 1.0, student, teacher)
