"""Budgeted batch classification, the protocol of the early-exit literature (Huang et al. 2018, MSDNet, sec. 5), so that
a network can be compared with published curves."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dynamize.calibration.table import EVERYONE, ConfidenceTable, Thresholds
from dynamize.errors import DynamizeError

STEEPEST = 60.0  # |ln q|: exp(-60) of the images at the next exit is none of them


class BatchPoint(NamedTuple):
    """One setting of the sweep: geometric ratio q, then what it does on the images it is judged on."""

    q: float
    thresholds: Thresholds
    cost: float
    accuracy: float
    shares: NDArray[np.float64]


def budgeted_batch(
    scores_KN: NDArray[np.float64], judged: ConfidenceTable, measure: str = "macs", count: int = 20
) -> list[BatchPoint]:
    """MSDNet's sweep: a share proportional to q**k leaves at exit k, the surest first.

    Differences from the published code, which sweeps p/20: q is bisected so that the mean costs are evenly
    spread between the first and the last exit; the shares are cumulative, so that rounding and equal scores
    at one exit are made up for at the next; an exit whose share rounds to no image is off and swallows
    nobody else's share.

    Args:
        scores_KN: of calibration images, which the thresholds are set on; the last exit's decide nothing.
        judged: other images.
        measure: of cost.
        count: how many points.
    """
    if count < 1:
        raise DynamizeError(f"count={count} is no sweep: ask for at least one point.")
    cost = judged.cost(measure)
    points = []
    for budget in np.linspace(cost[0], cost[-1], count + 2)[1:-1]:
        q = _ratio(cost, float(budget))
        thresholds = share_thresholds(scores_KN, _geometric(q, judged.exits))
        found = judged.evaluate(thresholds, measure)
        points.append(BatchPoint(q, thresholds, found.cost, found.accuracy, found.shares))
    return points


def share_thresholds(scores_KN: NDArray[np.float64], shares: NDArray[np.float64]) -> Thresholds:
    """Thresholds at which about these shares (K,) of the images leave; equal scores leave together, and go
    where the cumulative share comes nearest."""
    images = scores_KN.shape[1]
    waiting = np.arange(images)
    thresholds: Thresholds = []
    for scores, wanted in zip(scores_KN[:-1], np.cumsum(shares), strict=False):
        here = np.sort(scores[waiting])[::-1]
        ends = np.concatenate(([0], np.flatnonzero(here[1:] < here[:-1]) + 1, [len(here)]))
        leaving = round(float(wanted) * images) - (images - len(waiting))
        taken = int(ends[np.abs(ends - leaving).argmin()])
        if taken == 0:
            thresholds.append(None)
        else:
            thresholds.append(EVERYONE if taken == len(here) else float(here[taken - 1]))
            waiting = waiting[scores[waiting] < here[taken - 1]]
    return thresholds


def _geometric(q: float, exits: int) -> NDArray[np.float64]:
    power = np.arange(exits) * math.log(q)
    weight = np.exp(power - power.max())
    return np.asarray(weight / weight.sum())


def _ratio(cost: NDArray[np.float64], budget: float) -> float:
    """The q whose geometric shares cost the budget on average."""
    low, high = -STEEPEST, STEEPEST
    rising = cost[-1] >= cost[0]
    for _ in range(60):
        middle = (low + high) / 2
        if (float(_geometric(math.exp(middle), len(cost)) @ cost) < budget) == rising:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)
