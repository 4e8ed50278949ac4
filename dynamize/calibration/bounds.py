"""Limits on a mean that hold with a stated confidence over draws of the images, whatever their distribution.

Losses are bets: whoever bets against "the mean is above the limit" grows rich only if it is not (Waudby-Smith and
Ramdas 2024, Estimating means of bounded random variables by betting, sec. 4; as an upper limit, Bates et al. 2021). The
losses may be negative, so that images which a dynamic network answers better count for it.
"""

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

TOO_MANY = 10_000_000
_STEPS = 40
_OFTEN, _CHANCE = 0.8, 0.8416  # four of five, and the standard normal quantile of that
_TRIED, _DRAWS, _STEP = 20_000, 40, 1.2


def p_value(losses: ArrayLike, limit: float, delta: float) -> float:
    """How well the losses (n,), each at most 1 and in random order, go with a mean above ``limit`` (0 to 1).

    Rejecting that where it is at most ``delta`` is wrong in at most that share of draws; ``delta`` tunes the bets.
    """
    sample = np.asarray(losses, dtype=np.float64)
    return math.exp(-_log_wealth(sample, _stakes(sample, delta), limit))


def upper_limit(losses: ArrayLike, delta: float) -> float:
    """The least limit, from 0 to 1, that the losses (n,) certify at level ``delta``."""
    sample = np.asarray(losses, dtype=np.float64)
    stakes, wanted = _stakes(sample, delta), -math.log(delta)
    low, high = 0.0, 1.0
    if _log_wealth(sample, stakes, low) >= wanted:
        return low
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if _log_wealth(sample, stakes, middle) >= wanted else (middle, high)
    return high


def fixed_sequence(p_values: Iterable[float], delta: float) -> int:
    """How many hypotheses, tested in an order fixed beforehand until the first fails, are rejected.

    All of them together are wrong in at most ``delta`` of draws (Angelopoulos et al. 2021, Learn then Test, sec. 2.3).
    The values are drawn one by one, and none after the first that fails.
    """
    passed = 0
    for value in p_values:
        if value > delta:
            break
        passed += 1
    return passed


def images_needed(losses: ArrayLike, limit: float, delta: float) -> int | None:
    """About how many images like these certify ``limit`` in four of five draws; None where their mean is not below it,
    or more than ten million are needed."""
    sample = np.asarray(losses, dtype=np.float64)
    slack, level = limit - float(sample.mean()), -math.log(delta)
    if slack <= 0:
        return None
    spread = float(np.append(sample, (0.0, 1.0)).var())
    wanted = max(level / math.log1p(slack), spread / slack**2 * (math.sqrt(2 * level) + _CHANCE) ** 2)
    random = np.random.default_rng(0)
    while wanted <= _TRIED:  # of few images the first, cautious stakes are a large part: try it out
        draws = random.choice(sample, (_DRAWS, math.ceil(wanted)))
        if np.mean([p_value(draw, limit, delta) <= delta for draw in draws]) >= _OFTEN:
            break
        wanted *= _STEP
    return math.ceil(wanted) if wanted <= TOO_MANY else None


def _stakes(losses: Floats, delta: float) -> Floats:
    """How much is bet on each image (n,): known before it is seen."""
    n = len(losses)
    seen = np.arange(2, n + 2)
    mean = (0.5 + np.cumsum(losses)) / seen
    variance = (0.25 + np.cumsum((losses - mean) ** 2)) / seen
    before = np.concatenate(([0.25], variance[:-1]))
    stakes: Floats = np.minimum(1.0, np.sqrt(-2 * math.log(delta) / (n * before)))
    return stakes


def _log_wealth(losses: Floats, stakes: Floats, limit: float) -> float:
    """The most that was ever owned, in logs, starting with 1: one running maximum over all images."""
    with np.errstate(divide="ignore"):  # at a limit of 0 everything can be lost
        gained = np.log1p(-stakes * (losses - limit))
    return max(0.0, float(np.cumsum(gained).max()))
