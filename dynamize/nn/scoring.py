"""How the answers of several networks become one, and how sure it is: arithmetic in numpy on a few rows of logits, that
runs between two networks. For one image alone, see :mod:`dynamize.nn.single`."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamize.nn.joining import Joining

Floats = NDArray[np.floating[Any]]


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
    found = logits_NC - logits_NC.max(axis=1, keepdims=True)
    found -= np.log(np.exp(found).sum(axis=1, keepdims=True))
    return found


def top_probability(logits_NC: Floats) -> Floats:
    """Log-odds of the top class, (N, C) -> (N,), as :func:`dynamize.nn.confidence.top_probability`."""
    rows, tops = np.arange(len(logits_NC)), logits_NC.argmax(axis=1)
    others = logits_NC - logits_NC[rows, tops][:, None]
    others[rows, tops] = -np.inf
    second: Floats = others.max(axis=1)
    found: Floats = -second - np.log(np.exp(others - second[:, None]).sum(axis=1))
    return found


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
