"""Confidence scores against their textbook formulas, and where float32 probabilities give up."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynamize.nn.confidence import CONFIDENCES, entropy, margin, top_probability

logits_rows = st.lists(st.lists(st.floats(-20, 20), min_size=4, max_size=4), min_size=1, max_size=6).map(
    lambda rows: torch.tensor(rows, dtype=torch.float64)
)


@given(logits_rows)
def test_entropy_is_minus_sum_p_log_p_negated(logits: torch.Tensor) -> None:
    p = logits.softmax(1)
    assert torch.allclose(entropy(logits), (p * p.log()).sum(1), atol=1e-9)


@given(logits_rows)
def test_margin_is_the_log_ratio_of_the_two_largest(logits: torch.Tensor) -> None:
    best = logits.softmax(1).log().sort(1, descending=True).values
    assert torch.allclose(margin(logits), best[:, 0] - best[:, 1], atol=1e-9)


@given(logits_rows)
def test_top_probability_is_its_log_odds(logits: torch.Tensor) -> None:
    rest = logits.softmax(1).sort(1).values[:, :-1].sum(1)  # 1 - p, without its rounding
    p = logits.softmax(1).amax(1)
    assert torch.allclose(top_probability(logits), p.log() - rest.log(), atol=1e-6)


@given(logits_rows)
def test_top_probability_orders_images_as_the_softmax_does(logits: torch.Tensor) -> None:
    p, score = logits.softmax(1).amax(1), top_probability(logits)
    for i in range(len(p)):
        for j in range(len(p)):
            if p[i] > p[j] + 1e-12:
                assert score[i] > score[j]


def test_probabilities_that_tie_at_one_in_float32_are_told_apart() -> None:
    logits = torch.zeros(3, 10)
    for row, beyond in enumerate((1e-9, 1e-12, 1e-15)):
        logits[row, 4] = math.log(9 / beyond)
    assert logits.softmax(1).amax(1).tolist() == [1.0, 1.0, 1.0]
    score = top_probability(logits)
    assert score.tolist() == pytest.approx([-math.log(1e-9), -math.log(1e-12), -math.log(1e-15)], rel=1e-5)


def test_by_hand_for_two_classes() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)]])  # p = 1/4, 3/4
    assert float(top_probability(logits)) == pytest.approx(math.log(3))
    assert float(margin(logits)) == pytest.approx(math.log(3))
    assert float(entropy(logits)) == pytest.approx(0.25 * math.log(0.25) + 0.75 * math.log(0.75))


@pytest.mark.parametrize("name", sorted(CONFIDENCES))
def test_two_equal_best_classes_are_less_sure_than_one(name: str) -> None:
    tie, clear = torch.tensor([[5.0, 5.0, 0.0]]), torch.tensor([[5.0, 0.0, 0.0]])
    assert torch.isfinite(CONFIDENCES[name](tie)).all()
    assert float(CONFIDENCES[name](tie)) < float(CONFIDENCES[name](clear))
    assert margin(tie).tolist() == [0.0]


@pytest.mark.parametrize("name", sorted(CONFIDENCES))
def test_scores_do_not_depend_on_a_shift_or_on_the_other_images(name: str) -> None:
    score, logits = CONFIDENCES[name], torch.randn(6, 5)
    assert torch.allclose(score(logits + 3), score(logits), atol=1e-5)
    assert torch.equal(score(logits)[2:3], score(logits[2:3]))
    assert score(logits[:0]).shape == (0,)


@pytest.mark.parametrize("name", sorted(CONFIDENCES))
def test_extreme_logits_stay_finite(name: str) -> None:
    assert torch.isfinite(CONFIDENCES[name](torch.tensor([[300.0, -300.0, 0.0], [-1e4, 1e4, 1e4]]))).all()
