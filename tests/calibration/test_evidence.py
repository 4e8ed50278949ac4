"""Evidence of several networks is what softmax arithmetic says it is, and what exits score."""

import numpy as np
import pytest
import torch
from scipy.special import softmax

from dynamize.calibration.evidence import Evidence, Reading
from dynamize.calibration.given import from_logits
from dynamize.calibration.temperature import fit_temperature
from dynamize.nn.confidence import CONFIDENCES

IMAGES, CLASSES, WARMTH = 300, 7, (0.7, 1.0, 1.9)
random = np.random.default_rng(0)
LOGITS = [random.normal(size=(IMAGES, CLASSES)) * spread for spread in (3.0, 4.0, 5.0)]


def evidence(kept: int = CLASSES, scale: float = 1.0) -> Evidence:
    given = [from_logits("one", scale * logits) for logits in LOGITS]
    return Evidence([g.classes[:, :kept] for g in given], [g.log_probabilities[:, :kept] for g in given], CLASSES)


@pytest.mark.parametrize("score", sorted(CONFIDENCES))
def test_scores_are_those_of_exits(score):
    found, answers = evidence().read(Reading(score, "last", WARMTH))
    for row, own, logits, warmth in zip(found, answers, LOGITS, WARMTH, strict=True):
        expected = CONFIDENCES[score](torch.from_numpy(logits) / warmth)
        assert np.allclose(row, expected.numpy(), rtol=1e-9, atol=1e-9)
        assert (own == logits.argmax(1)).all()


@pytest.mark.parametrize("combine", ["mean", "product"])
@pytest.mark.parametrize("score", sorted(CONFIDENCES))
def test_answers_so_far_are_mean_or_product(combine, score):
    each = [softmax(logits / warmth, axis=1) for logits, warmth in zip(LOGITS, WARMTH, strict=True)]
    found, answers = evidence().read(Reading(score, combine, WARMTH))
    for m in range(3):
        so_far = np.mean(each[: m + 1], axis=0) if combine == "mean" else np.prod(each[: m + 1], axis=0)
        assert (answers[m] == so_far.argmax(1)).all()
        expected = CONFIDENCES[score](torch.from_numpy(np.log(so_far / so_far.sum(1, keepdims=True))))
        assert np.allclose(found[m], expected.numpy(), rtol=1e-7, atol=1e-7)


def test_what_is_not_named_is_shared_evenly():
    """Three of seven classes are kept, so the four others have a fourth of what is left each."""
    logs = np.log(softmax(LOGITS[0], axis=1))
    order = np.argsort(-logs, axis=1)
    filled = np.sort(np.exp(logs), axis=1)[:, ::-1].copy()
    filled[:, 3:] = (1 - filled[:, :3].sum(1, keepdims=True)) / 4
    single = Evidence([order[:, :3]], [np.take_along_axis(logs, order[:, :3], axis=1)], CLASSES)
    for score, confidence in CONFIDENCES.items():
        found, _ = single.read(Reading(score, "last", (1.4,)))
        expected = confidence(torch.from_numpy(np.log(filled)) / 1.4)
        assert np.allclose(found[0], expected.numpy())


def test_classes_that_several_name_count_once():
    few, whole = evidence(6, 0.3), evidence(scale=0.3)
    for combine in ("mean", "product"):
        reading = Reading("entropy", combine, WARMTH)
        (found, answers), (expected, right) = few.read(reading), whole.read(reading)
        assert (answers == right).all()
        assert np.allclose(found, expected)  # one class of seven is left, so that nothing is lost


def test_agreement_is_that_of_all_so_far_and_never_of_one():
    found, _ = evidence().read(Reading("agreement", "last", WARMTH))
    own = [logits.argmax(1) for logits in LOGITS]
    assert (found[0] == 0).all()
    assert (found[1] == (own[0] == own[1])).all()
    assert (found[2] == ((own[0] == own[1]) & (own[1] == own[2]))).all()
    assert 0 < found[2].mean() < found[1].mean() < 1


def test_temperatures_are_those_of_exits():
    labels = LOGITS[0].argmax(1)
    labels[::3] = 2
    expected = [fit_temperature(logits, labels) for logits in LOGITS]
    assert np.allclose(evidence().temperatures(labels), expected, rtol=1e-3)
    assert evidence(3).temperatures(labels)[0] > 1
