"""The arithmetic of :mod:`dynamize.nn.scoring` for one image, on the list of its logits.

Between two networks a single image waits for every microsecond, and behind a network that has filled the caches each
operator of numpy or torch takes several; for a few classes plain Python takes fewer than one operator does.
"""

from collections.abc import Callable
from math import exp, log, log1p

import numpy as np
import torch
from torch import Tensor

from dynamize.nn.joining import Joining

_FEW = 128  # classes up to which plain Python is faster than numpy


def is_single(logits_NC: Tensor) -> bool:
    """Whether these are the answers (N, C) for one image with few classes."""
    return len(logits_NC) == 1 and logits_NC.shape[1] <= _FEW


def weigh(how: Joining, logits: list[float], temperature: float) -> list[float]:
    """What one network says, as it is joined."""
    warm = [value / temperature for value in logits]
    if how != "mean":
        return warm
    top = max(warm)
    total = top + log(sum([exp(value - top) for value in warm]))
    return [value - total for value in warm]


def join(how: Joining, before: list[float], added: list[float]) -> list[float]:
    """Answers so far and those of one network more, both weighed, as logits of one answer."""
    if how == "last":
        return added
    if how == "product":
        return [one + other for one, other in zip(before, added, strict=True)]
    return [max(one, other) + log1p(exp(-abs(one - other))) for one, other in zip(before, added, strict=True)]


def top_probability(logits: list[float]) -> float:
    """Log-odds of the top class."""
    top = max(logits)
    others = logits.copy()
    others.remove(top)
    second = max(others)
    return top - second - log(sum([exp(value - second) for value in others]))


def margin(logits: list[float]) -> float:
    """Log-ratio of the two largest probabilities."""
    *_, second, top = sorted(logits)
    return top - second


def entropy(logits: list[float]) -> float:
    """Negative entropy of the softmax in nats."""
    return sum([exp(one) * one if one > -700 else 0.0 for one in weigh("mean", logits, 1.0)])


SCORES: dict[str, Callable[[list[float]], float]] = {
    "top_probability": top_probability,
    "margin": margin,
    "entropy": entropy,
}
"""By name as in :data:`dynamize.nn.scoring.SCORES`."""


def as_logits(answer: list[float], device: torch.device) -> Tensor:
    """(1, C) in float32."""
    return torch.from_numpy(np.array([answer], np.float32)).to(device)
