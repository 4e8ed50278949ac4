"""Where exits gain most: from what a probe would answer at each place, the curves that exits there would give."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dynamize.calibration.problem import Floats, Positions, Problem

PRICES = tuple(0.03 * 2.0**k for k in range(9))  # of the whole network's MACs, in accuracy: slopes of the curve
_BINS = 64  # images that leave together
_IMAGES = 2000
_ENOUGH = 0.5
_CHEAPER = 1e-3  # what the whole curve counts beside the wanted budgets, so that of equals the cheaper one is taken


def best_places(
    right: NDArray[np.bool_],
    scores: Floats,
    own: NDArray[np.bool_],
    costs: Floats,
    heads: Floats,
    *,
    classes: int,
    budgets: Sequence[float],
    count: int,
) -> list[int]:
    """The ``count`` places whose exits make the network most accurate at the wanted budgets.

    Coordinate ascent: each exit in turn moves to its best place until none moves. Places that know less than half of
    what the network knows are left out: few images leave there once the exits are trained, and all of them pay for it.

    Args:
        right: (P, n), whether an exit at each place would answer right.
        scores: (P, n), how sure it would be.
        own: (n,), whether the network itself answers right.
        costs: (P,), rising, of the network up to each place, as a share of the whole.
        heads: (P,), of a head there, in the same unit.
        classes: how many are told apart: what guessing gives, for nothing.
        budgets: mean costs at which accuracy counts, in the same unit.
    """
    some = np.unique(np.linspace(0, len(own) - 1, min(_IMAGES, len(own))).round().astype(int))
    groups, correct = _grouped(scores[:, some]), right[:, some].astype(np.float64)
    last = own[some].astype(np.float64)
    known: dict[tuple[int, ...], float] = {}

    def gain(places: Sequence[int]) -> float:
        order = tuple(sorted(places))
        if order not in known:
            chosen = list(order)
            spent = np.append(costs[chosen], 1.0) + np.append(np.cumsum(heads[chosen]), heads[chosen].sum())
            problem = Problem(groups[chosen], [_BINS] * len(chosen), np.vstack([correct[chosen], last]), spent)
            known[order] = _height(problem, classes, budgets)
        return known[order]

    able = _able(right, own, classes, count)
    picked, moved = [able[(k + 1) * len(able) // (count + 1)] for k in range(count)], True
    while moved:
        moved = False
        for k in range(len(picked)):
            others = picked[:k] + picked[k + 1 :]
            best = max((i for i in able if i not in others), key=lambda i: gain([*others, i]))
            if gain([*others, best]) > gain(picked) + 1e-9:
                picked, moved = [*picked[:k], best, *picked[k + 1 :]], True
    return sorted(picked)


def _able(right: NDArray[np.bool_], own: NDArray[np.bool_], classes: int, count: int) -> list[int]:
    """Places that know enough beyond guessing, in order; of too few, those that know most."""
    known, whole = right.mean(axis=1) - 1 / classes, own.mean() - 1 / classes
    able = [i for i, share in enumerate(known) if share >= _ENOUGH * whole]
    return able if len(able) >= count else sorted(np.argsort(-known, kind="stable")[:count].tolist())


def _grouped(scores: Floats) -> NDArray[np.intp]:
    """The group of each image at each place, the surest ones first, as many groups of equal size as there are bins."""
    ranks = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1, kind="stable")
    return (ranks * _BINS // scores.shape[1]).astype(np.intp)


def _height(problem: Problem, classes: int, budgets: Sequence[float]) -> float:
    """Mean accuracy at the budgets along the upper hull of the settings, and a little of the whole curve."""
    count = problem.images
    positions: Positions = np.zeros(problem.decisions, np.int64)
    costs, accuracies = [0.0], [1 / classes]
    for price in PRICES:
        found = problem.ascend(positions, price)
        positions = found.positions
        costs.append(found.cost / count)
        accuracies.append(found.correct / count)
    wanted = np.array(budgets)
    whole = np.linspace(0, 1, 11)
    return float(_hull(costs, accuracies, wanted).mean() + _CHEAPER * _hull(costs, accuracies, whole).mean())


def _hull(costs: Sequence[float], accuracies: Sequence[float], at: Floats) -> Floats:
    """The highest accuracy that a mixture of settings has at these costs."""
    x, y = np.array(costs), np.array(accuracies)
    left, right = (ends.ravel() for ends in np.meshgrid(np.arange(len(x)), np.arange(len(x)), indexing="ij"))
    best = np.zeros(len(at))
    for place, cost in enumerate(at):
        between = (x[left] <= cost) & (x[right] >= cost)
        width = np.maximum(x[right] - x[left], 1e-12)
        share = np.clip((cost - x[left]) / width, 0, 1)
        mixed = np.where(between, y[left] + share * (y[right] - y[left]), 0.0)
        best[place] = max(mixed.max(), y[x <= cost].max())
    return best
