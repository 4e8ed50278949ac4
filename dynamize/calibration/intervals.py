"""What to expect from thresholds on fresh images. Thresholds look better on the data they were fitted to, so
expectations are cross-fitted; and a fresh set is itself a sample, so the intervals are for prediction."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dynamize.calibration.table import FEWEST_IMAGES, ConfidenceTable, Thresholds
from dynamize.errors import DynamizeError

Solve = Callable[[ConfidenceTable], Thresholds]
Z95 = NormalDist().inv_cdf(0.975)


class Interval(NamedTuple):
    """An expected value and its 95 % interval."""

    expected: float
    low: float
    high: float


class Fold(NamedTuple):
    """The table of all other folds, and the indices of the images held out."""

    fitted_on: ConfidenceTable
    held_out: NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class CrossFit:
    """What each of the n images meets under thresholds fitted without it.

    correct (n,) bool, exits (n,) index, costs: measure -> (n,), drop (n,) in {-1, 0, 1}: the reference
    right minus the exit right. fit_variance: how far each mean ("accuracy", "drop" and the measures) moves
    when the thresholds are fitted without one fold instead of on all images. shares (K,): expected exit
    shares, summing to 1.
    """

    correct: NDArray[np.bool_]
    exits: NDArray[np.int64]
    costs: dict[str, NDArray[np.float64]]
    drop: NDArray[np.float64]
    fit_variance: dict[str, float]
    shares: NDArray[np.float64]

    def accuracy(self) -> Interval:
        """Of a fresh set of n images."""
        return prediction_interval(self.correct, self.fit_variance["accuracy"], bounds=(0.0, 1.0))

    def accuracy_drop(self) -> Interval:
        """Of a fresh set of n images against the reference on the same images."""
        return prediction_interval(self.drop, self.fit_variance["drop"], bounds=(-1.0, 1.0))

    def cost(self, measure: str) -> Interval:
        """Mean per image of a fresh set of n images; for "ms" without the timing noise of the machine."""
        return prediction_interval(self.costs[measure], self.fit_variance[measure])


def folds_of(table: ConfidenceTable, folds: int = 10, seed: int = 0) -> list[Fold]:
    """The table parted at random; kept with it, so that many settings share the folds' sorted ranks."""
    if folds < 2:
        raise DynamizeError(f"folds={folds}: thresholds are cross-fitted in 2 folds or more (10 is usual).")
    fewest = max(2 * folds, -(-FEWEST_IMAGES * folds // (folds - 1)))  # so that all folds but one hold enough
    if table.images < fewest:
        raise DynamizeError(
            f"{table.images} images cannot be cross-fitted in {folds} folds: that takes at least {fewest}. Give more "
            "calibration images, or other folds (10 is usual)."
        )
    key = "folds", folds, seed
    if key not in table.cache:
        order = np.random.default_rng(seed).permutation(table.images)
        parts = [np.sort(part) for part in np.array_split(order, folds)]
        every = np.arange(table.images)
        table.cache[key] = [Fold(table.subset(np.setdiff1d(every, part)), part) for part in parts]
    kept: list[Fold] = table.cache[key]
    return kept


def cross_fit(table: ConfidenceTable, solve: Solve, folds: int = 10, seed: int = 0) -> CrossFit:
    """Solves on all folds but one and applies to that one, for each fold."""
    settings = [solve(fold.fitted_on) for fold in folds_of(table, folds, seed)]
    return apply_folds(table, solve(table), settings, folds, seed)


def apply_folds(
    table: ConfidenceTable, thresholds: Thresholds, settings: Sequence[Thresholds], folds: int, seed: int
) -> CrossFit:
    """The cross-fit of thresholds fitted on the whole table and on all folds but one."""
    exits = np.empty(table.images, np.int64)
    costs = {measure: np.empty(table.images) for measure in table.costs}
    wholly = _means(table, thresholds, table.route(thresholds))
    moved = dict.fromkeys(wholly, 0.0)
    for fold, setting in zip(folds_of(table, folds, seed), settings, strict=True):
        taken = table.route(setting)
        exits[fold.held_out] = taken[fold.held_out]
        for measure, cost in costs.items():
            cost[fold.held_out] = table.spent(measure, setting, taken)[fold.held_out]
        for name, mean in _means(table, setting, taken).items():
            moved[name] += (mean - wholly[name]) ** 2 / folds
    correct = table.correct[exits, np.arange(table.images)]
    drop = (table.reference == table.labels).astype(np.float64) - correct
    shares = np.bincount(exits, minlength=table.exits) / table.images
    return CrossFit(correct, exits, costs, drop, moved, shares)


def prediction_interval(
    values: ArrayLike,
    fit_variance: float = 0.0,
    fresh: int | None = None,
    bounds: tuple[float, float] | None = None,
) -> Interval:
    """95 % interval for the mean of `fresh` new values (as many as there are, if not said), given n values.

    The variance is s**2 (1/n + 1/fresh) + fit_variance: the sample's noise, the fresh set's, and the
    thresholds'. The first term holds for costs too: fitting pins the mean cost on the sample to the budget,
    which moves its noise into the thresholds. Where the values are bounded counts (`bounds`: accuracy,
    drop), s takes in one more value at either end, as nothing observed is not nothing possible. Quantile:
    Student's t, by its first-order expansion.
    """
    sample = np.asarray(values, dtype=np.float64)
    n, expected = len(sample), float(sample.mean())
    spread = float(sample.var(ddof=1)) if bounds is None else float(np.append(sample, bounds).var(ddof=1))
    quantile = Z95 + (Z95**3 + Z95) / (4 * (n - 1))
    half = quantile * math.sqrt(spread * (1 / n + 1 / (fresh or n)) + fit_variance)
    low, high = expected - half, expected + half
    if bounds is not None:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return Interval(expected, low, high)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion (Wilson 1927): what n images say about the true accuracy."""
    if not 0 <= successes <= n or n == 0:
        raise DynamizeError(f"{successes} right out of {n} is no proportion: give 0 <= successes <= n, n > 0.")
    share, squared = successes / n, Z95**2 / n
    centre = (share + squared / 2) / (1 + squared)
    half = Z95 / (1 + squared) * math.sqrt(share * (1 - share) / n + squared / (4 * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def guessed(correct: ArrayLike, labels: ArrayLike) -> float | None:
    """What always naming the commonest class gets right, if answers are no better than that as far as so few can tell.

    Args:
        correct: (n,) bool.
        labels: (n,), class indices.
    """
    right, truth = np.asarray(correct, bool), np.asarray(labels)
    commonest = float(np.bincount(truth).max()) / len(truth)
    return commonest if wilson(int(right.sum()), len(right))[0] <= commonest else None


def _means(table: ConfidenceTable, thresholds: Thresholds, exits: NDArray[np.int64]) -> dict[str, float]:
    accuracy = float(table.correct[exits, np.arange(table.images)].mean())
    costs = {measure: float(table.spent(measure, thresholds, exits).mean()) for measure in table.costs}
    return {**costs, "accuracy": accuracy, "drop": table.reference_accuracy - accuracy}
