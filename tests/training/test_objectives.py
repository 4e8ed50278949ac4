"""The multi-exit loss against its formulas, written out per image."""

import math

import pytest
import torch
from torch import Tensor, nn

from dynamize.errors import DynamizeError
from dynamize.training.objectives import UNLABELLED, MultiExitLoss

LABELS = torch.tensor([0, 2, 1, 1])
IMAGES = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Teacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout, self.calls = nn.Linear(48, 3), nn.Dropout(0.5), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(self.dropout(x.flatten(1)))


def exits(count: int = 3) -> list[Tensor]:
    return [torch.randn(4, 3, generator=torch.Generator().manual_seed(k)) for k in range(count)]


def cross_entropy(logits: Tensor) -> float:
    return -sum(math.log(float(row.softmax(0)[label])) for row, label in zip(logits, LABELS, strict=True)) / len(logits)


def distance(logits: Tensor, target: Tensor, t: float) -> float:
    total = 0.0
    for row, wanted in zip(logits, target, strict=True):
        p, q = (wanted / t).softmax(0), (row / t).softmax(0)
        total += sum(float(p[i]) * math.log(float(p[i] / q[i])) for i in range(3))
    return t * t * total / len(logits)


def test_joined_answers_are_judged_as_products() -> None:
    first, second, third = (one.log_softmax(1) for one in exits())
    wanted = sum(cross_entropy(one) for one in exits())
    wanted += 0.5 * (cross_entropy(first + second) + cross_entropy(first + second + third))
    assert float(MultiExitLoss(joined=0.5)(exits(), IMAGES, LABELS)) == pytest.approx(wanted, rel=1e-5)
    assert float(MultiExitLoss(joined=0.5)(exits(1), IMAGES, LABELS)) == pytest.approx(cross_entropy(exits(1)[0]))


def test_labels_only_is_the_sum_of_cross_entropies() -> None:
    found = MultiExitLoss()(exits(), IMAGES, LABELS)
    assert float(found) == pytest.approx(sum(cross_entropy(one) for one in exits()), rel=1e-5)


def test_a_single_tensor_is_a_network_without_exits() -> None:
    assert float(MultiExitLoss()(exits()[0], IMAGES, LABELS)) == pytest.approx(cross_entropy(exits()[0]), rel=1e-5)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_shares_the_loss_with_the_labels(alpha: float, temperature: float) -> None:
    teacher = Teacher()
    found = MultiExitLoss(teacher, alpha=alpha, temperature=temperature)(exits(), IMAGES, LABELS)
    taught = teacher(IMAGES).detach()
    wanted = sum((1 - alpha) * cross_entropy(one) + alpha * distance(one, taught, temperature) for one in exits())
    assert float(found) == pytest.approx(wanted, rel=1e-5)
    assert not teacher.training


def test_from_last_pulls_the_early_exits_only_and_not_the_last_one() -> None:
    logits = [one.requires_grad_() for one in exits()]
    loss = MultiExitLoss(from_last=0.7, temperature=3.0)
    found = loss(logits, IMAGES, LABELS)
    last = logits[2].detach()
    wanted = sum(cross_entropy(one) for one in exits()) + 0.7 * sum(distance(one, last, 3.0) for one in exits()[:2])
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-5)
    found.backward()
    plain = exits()[2].requires_grad_()
    MultiExitLoss()(plain, IMAGES, LABELS).backward()
    assert torch.allclose(logits[2].grad, plain.grad)


def test_weights_are_normalised_to_a_sum_of_k() -> None:
    found = MultiExitLoss(weights=[1, 1, 4])(exits(), IMAGES, LABELS)
    wanted = sum(w * cross_entropy(one) for w, one in zip((0.5, 0.5, 2), exits(), strict=True))
    assert float(found) == pytest.approx(wanted, rel=1e-5)
    assert float(MultiExitLoss(weights=[5, 5, 5])(exits(), IMAGES, LABELS)) == pytest.approx(
        float(MultiExitLoss()(exits(), IMAGES, LABELS))
    )


def test_the_teacher_is_asked_only_where_it_counts_and_gets_no_gradient() -> None:
    teacher = Teacher()
    MultiExitLoss(teacher, alpha=0.0)(exits(), IMAGES, LABELS)
    assert teacher.calls == 0
    logits = [one.requires_grad_() for one in exits()]
    MultiExitLoss(teacher, alpha=0.5)(logits, IMAGES, LABELS).backward()
    assert teacher.calls == 1
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(bool(one.grad.abs().sum() > 0) for one in logits)


def test_without_a_teacher_alpha_takes_nothing_from_the_labels() -> None:
    assert float(MultiExitLoss(None, alpha=0.9)(exits(), IMAGES, LABELS)) == pytest.approx(
        float(MultiExitLoss()(exits(), IMAGES, LABELS))
    )


def test_half_precision_logits_give_a_float32_loss() -> None:
    found = MultiExitLoss()([one.bfloat16() for one in exits()], IMAGES, LABELS)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(MultiExitLoss()(exits(), IMAGES, LABELS)), rel=0.02)


def test_images_without_labels_are_learnt_from_the_teacher_alone() -> None:
    teacher, logits = Teacher(), exits()[0]
    labels = torch.tensor([0, UNLABELLED, 1, UNLABELLED])
    loss = MultiExitLoss(teacher, alpha=0.3, temperature=2.0)
    taught = teacher(IMAGES).detach()
    total = 0.0
    for row, wanted, label in zip(logits, taught, labels.tolist(), strict=True):
        apart = float(loss.distance(row[None], wanted[None]))
        total += apart if label < 0 else 0.3 * apart - 0.7 * math.log(float(row.softmax(0)[label]))
    assert float(loss(logits, IMAGES, labels)) == pytest.approx(total / 4, rel=1e-5)
    nothing = torch.full((4,), UNLABELLED)
    for alpha in (0.3, 1.0):
        found = MultiExitLoss(teacher, alpha=alpha, temperature=2.0)(logits, IMAGES, nothing)
        assert float(found) == pytest.approx(float(loss.distance(logits, taught)), rel=1e-5)
    with pytest.raises(DynamizeError, match="no original network to learn them from"):
        MultiExitLoss(None)(logits, IMAGES, labels)
