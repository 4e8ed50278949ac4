"""Joining answers in numpy: probabilities as defined, and scores as torch finds them."""

from typing import get_args

import numpy as np
import pytest
import torch
from scipy.special import softmax

from dynamize.nn import single
from dynamize.nn.confidence import CONFIDENCES
from dynamize.nn.joining import Joining
from dynamize.nn.scoring import SCORES, agreement, join, weigh

LOGITS = [
    3 * np.random.default_rng(0).normal(size=(7, 10)).astype(np.float32),
    np.array([[300.0, -300.0, 0.0], [5.0, 5.0, 5.0], [-1e4, 1e4, 9e3]], np.float32),
    np.zeros((0, 4), np.float32),
    np.array([[3.0, 1.0, 3.0]], np.float32),
    5 * np.random.default_rng(1).normal(size=(1, 1000)).astype(np.float32),
]


@pytest.mark.parametrize("logits", LOGITS, ids=["usual", "extreme", "none", "one", "one of many"])
@pytest.mark.parametrize("name", sorted(CONFIDENCES))
def test_scores_are_those_of_torch(name: str, logits: np.ndarray) -> None:
    assert set(SCORES) == set(CONFIDENCES)
    given = logits.copy()
    found = SCORES[name](logits)
    assert np.array_equal(given, logits)
    assert np.allclose(found, CONFIDENCES[name](torch.from_numpy(logits)).numpy(), rtol=1e-5, atol=1e-5)
    alone = [single.SCORES[name](one) for one in logits.tolist()]
    assert np.allclose(alone, found, rtol=1e-5, atol=1e-5)


def test_joined_answers_are_the_mean_and_the_product_of_probabilities() -> None:
    one, other = np.split(LOGITS[0][:6], 2)
    both = softmax(one / 2, axis=1), softmax(other / 3, axis=1)
    mean = join("mean", weigh("mean", one, 2.0), weigh("mean", other, 3.0))
    assert np.allclose(softmax(mean, axis=1), (both[0] + both[1]) / 2, atol=1e-6)
    product = join("product", weigh("product", one, 2.0), weigh("product", other, 3.0))
    wanted = both[0] * both[1] / (both[0] * both[1]).sum(1, keepdims=True)
    assert np.allclose(softmax(product, axis=1), wanted, atol=1e-6)
    assert np.array_equal(join("last", one, other), other)


@pytest.mark.parametrize("how", get_args(Joining))
@pytest.mark.parametrize("logits", LOGITS[:2], ids=["usual", "extreme"])
def test_a_single_image_is_answered_as_among_others(how: Joining, logits: np.ndarray) -> None:
    first, second = weigh(how, logits, 1.5), weigh(how, logits[::-1], 2.5)
    both = join(how, first, second)
    for k, (one, other) in enumerate(zip(logits.tolist(), logits[::-1].tolist(), strict=True)):
        weighed = single.weigh(how, one, 1.5), single.weigh(how, other, 2.5)
        assert np.allclose(weighed, [first[k], second[k]], rtol=1e-5, atol=1e-5)
        assert np.allclose(single.join(how, *weighed), both[k], rtol=1e-5, atol=1e-5)


def test_one_network_alone_does_not_agree_with_itself() -> None:
    votes = np.array([[1, 1, 1], [1, 1, 2], [2, 1, 1], [3, 3, 3]])
    assert agreement(votes).tolist() == [1, 0, 0, 1]
    assert agreement(votes[:, :2]).tolist() == [1, 1, 0, 1]
    assert agreement(votes[:, :1]).tolist() == [0, 0, 0, 0]
