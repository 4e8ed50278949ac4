"""How sure an exit is of its answer, as one score per sample; larger means surer."""

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

ConfidenceName = Literal["top_probability", "entropy", "margin"]


_LOG_ZERO = -1e4


def top_probability(logits: Tensor) -> Tensor:
    """Log-odds of the top class, log(p / (1 - p)): (N, classes) -> (N,).

    Ordered like the softmax probability p that the literature thresholds (MSDNet, sec. 3), but it does not
    saturate: at p = 1 - 1e-9 float32 probabilities all tie at 1.0, which makes small exit shares unreachable.
    """
    top = logits.topk(1, dim=1)
    others = logits.scatter(1, top.indices, -torch.inf)
    return (top.values - others.logsumexp(dim=1, keepdim=True)).squeeze(1)


def entropy(logits: Tensor) -> Tensor:
    """Negative entropy of the softmax in nats (BranchyNet, sec. 3.2): (N, classes) -> (N,)."""
    log_probabilities = logits.log_softmax(dim=1).clamp_min(_LOG_ZERO)  # 0 log 0 is 0
    return (log_probabilities.exp() * log_probabilities).sum(dim=1)


def margin(logits: Tensor) -> Tensor:
    """Log-ratio of the two largest probabilities: (N, classes) -> (N,)."""
    best = logits.topk(2, dim=1).values
    return best[:, 0] - best[:, 1]


CONFIDENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "top_probability": top_probability,
    "entropy": entropy,
    "margin": margin,
}
assert set(CONFIDENCES) == set(get_args(ConfidenceName))


def sure_words(confidence: str, score: float) -> str:
    """A score from which images leave, as a person would say it."""
    return _WORDS[confidence](score)


def _sure(log_odds: float) -> str:
    unsure = 1 / (1 + math.exp(min(log_odds, 700.0)))
    if unsure < 1e-6:
        return "more than 99.9999 % sure"
    decimals = max(0, math.ceil(-math.log10(unsure) - 2 + 1e-9)) if unsure < 0.05 else 0
    return f"at least {100 * (1 - unsure):.{decimals}f} % sure"


def _ahead(log_ratio: float) -> str:
    if log_ratio > math.log(1e6):
        return "its best class more than a million times as likely as the second"
    return f"its best class at least {math.exp(log_ratio):.3g} times as likely as the second"


def _undecided(score: float) -> str:
    return f"an entropy of at most {max(0.0, -score):.2g} nats"


_WORDS: dict[str, Callable[[float], str]] = {"top_probability": _sure, "margin": _ahead, "entropy": _undecided}
assert set(_WORDS) == set(CONFIDENCES)
