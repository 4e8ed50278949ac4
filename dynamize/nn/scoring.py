"""How the answers of several networks become one, and how sure it is: arithmetic on a few rows of logits.

It runs between two networks, for a single image too, where each operator of torch would take longer than all of this.
"""

from collections.abc import Callable
from math import exp, log
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamize.nn.joining import Joining

Floats = NDArray[np.floating[Any]]

_FEW = 128  # numbers up to which plain Python is faster than numpy


def weigh(how: Joining, logits_NC: Floats, temperature: float) -> Floats:
    """What one network says, as it is joined: its log-probabilities; for a product, whose classes share any constant,
    its logits do."""
    warm = logits_NC / logits_NC.dtype.type(temperature)
    return log_probabilities(warm) if how == "mean" else warm


def join(how: Joining, before_NC: Floats, added_NC: Floats) -> Floats:
    """Answers so far and those of one network more, both weighed, as logits of one answer."""
    if how == "last":
        return added_NC
    found: Floats = np.logaddexp(before_NC, added_NC) if how == "mean" else before_NC + added_NC
    return found


def log_probabilities(logits_NC: Floats) -> Floats:
    """Of softmax(logits)."""
    if _is_one(logits_NC):
        values: list[float] = logits_NC[0].tolist()
        top = max(values)
        return logits_NC - logits_NC.dtype.type(top + log(sum([exp(value - top) for value in values])))
    found = logits_NC - logits_NC.max(axis=1, keepdims=True)
    found -= np.log(np.exp(found).sum(axis=1, keepdims=True))
    return found


def top_probability(logits_NC: Floats) -> Floats:
    """Log-odds of the top class, (N, C) -> (N,), as :func:`dynamize.nn.confidence.top_probability`."""
    if _is_one(logits_NC):
        return _of_one(logits_NC)
    rows, tops = np.arange(len(logits_NC)), logits_NC.argmax(axis=1)
    others = logits_NC - logits_NC[rows, tops][:, None]
    others[rows, tops] = -np.inf
    second: Floats = others.max(axis=1)
    found: Floats = -second - np.log(np.exp(others - second[:, None]).sum(axis=1))
    return found


def _is_one(logits_NC: Floats) -> bool:
    return len(logits_NC) == 1 and logits_NC.size <= _FEW


def _of_one(logits_1C: Floats) -> Floats:
    values: list[float] = logits_1C[0].tolist()
    top = max(values)
    values.remove(top)
    second = max(values)
    return np.array([top - second - log(sum([exp(value - second) for value in values]))], logits_1C.dtype)


def margin(logits_NC: Floats) -> Floats:
    """Log-ratio of the two largest probabilities, (N, C) -> (N,)."""
    best = np.partition(logits_NC, -2, axis=1)
    found: Floats = best[:, -1] - best[:, -2]
    return found


def entropy(logits_NC: Floats) -> Floats:
    """Negative entropy of the softmax in nats, (N, C) -> (N,)."""
    logs = log_probabilities(logits_NC)
    found: Floats = (np.exp(logs) * np.maximum(logs, -1e4)).sum(axis=1)  # 0 log 0 is 0
    return found


def agreement(votes_NM: NDArray[np.int64]) -> Floats:
    """1 where all of M networks answer alike, which a single one never does, and 0 elsewhere: (N,) (Kolawole et al.
    2025, Agreement-Based Cascading)."""
    alike = (votes_NM == votes_NM[:, -1:]).all(axis=1) & (votes_NM.shape[1] > 1)
    return alike.astype(np.float32)


SCORES: dict[str, Callable[[Floats], Floats]] = {
    "top_probability": top_probability,
    "margin": margin,
    "entropy": entropy,
}
"""By name as :data:`dynamize.nn.confidence.CONFIDENCES`, which are the same for torch."""
