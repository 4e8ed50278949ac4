"""Stated intervals hold what they promise: coverage on fresh sets by simulation."""

import numpy as np
import pytest

from calibration.tables import synthetic
from dynamize.calibration.intervals import cross_fit, guessed, prediction_interval, wilson
from dynamize.calibration.solver import solve_budget
from dynamize.errors import DynamizeError


@pytest.fixture(scope="module")
def simulated():
    """Per figure, the stated intervals and the values realised on fresh sets of the same size."""
    stated, realised = {}, {}
    for seed in range(120):
        table, fresh = synthetic(500, 4, seed), synthetic(500, 4, seed + 10_000)
        fit = cross_fit(table, lambda part: solve_budget(part, 0.6e8), folds=5)
        thresholds = solve_budget(table, 0.6e8)
        result = fresh.evaluate(thresholds)
        found = {
            "accuracy": (fit.accuracy(), result.accuracy),
            "drop": (fit.accuracy_drop(), fresh.reference_accuracy - result.accuracy),
            "macs": (fit.cost("macs"), result.cost),
            "ms": (fit.cost("ms"), fresh.evaluate(thresholds, "ms").cost),
        }
        for name, (interval, value) in found.items():
            stated.setdefault(name, []).append(interval)
            realised.setdefault(name, []).append(value)
    return stated, realised


@pytest.mark.parametrize("name", ["accuracy", "drop", "macs", "ms"])
def test_coverage(simulated, name):
    stated, realised = (np.array(part[name]) for part in simulated)
    expected, low, high = stated.T
    assert 0.90 <= np.mean((low <= realised) & (realised <= high)) <= 1.0
    error = np.std(realised - expected)
    assert np.mean(high - low) < 6 * error  # 3.9 would be ideal
    assert abs(np.mean(realised - expected)) < 0.5 * error


@pytest.mark.slow
def test_the_fitted_accuracy_is_optimistic_and_the_cross_fitted_one_is_not():
    fitted, crossed, fresh = [], [], []
    for seed in range(24):
        table, other = synthetic(60, 4, seed), synthetic(4000, 4, seed + 5000)
        thresholds = solve_budget(table, 0.6e8)
        fitted.append(table.evaluate(thresholds).accuracy)
        crossed.append(cross_fit(table, lambda part: solve_budget(part, 0.6e8)).accuracy().expected)
        fresh.append(other.evaluate(thresholds).accuracy)
    assert np.mean(fitted) > np.mean(fresh) + 0.02
    assert np.mean(crossed) == pytest.approx(np.mean(fresh), abs=0.02)


def test_each_image_meets_thresholds_fitted_without_it():
    table = synthetic(100, 2, seed=0)
    seen = []

    def solve(part):
        seen.append(part.images)
        return [float(part.scores[0].mean())]

    fit = cross_fit(table, solve, folds=4, seed=3)
    assert sorted(seen) == [75, 75, 75, 75, 100]
    assert fit.shares.sum() == pytest.approx(1)
    assert (fit.costs["macs"] == table.costs["macs"][fit.exits]).all()
    assert fit.accuracy().expected - fit.correct.mean() == 0
    again = cross_fit(table, solve, folds=4, seed=3)
    assert (again.exits == fit.exits).all()


def test_interval_formula_by_hand():
    values = np.tile([0.0, 1.0, 2.0, 3.0], 250)
    interval = prediction_interval(values, fit_variance=0.001, fresh=4000)
    half = 1.962341 * np.sqrt(values.var(ddof=1) * (1 / 1000 + 1 / 4000) + 0.001)
    assert interval.expected == 1.5
    assert interval.high - 1.5 == pytest.approx(half, rel=1e-5)
    assert 1.5 - interval.low == pytest.approx(half, rel=1e-5)


def test_perfect_accuracy_is_not_certain():
    interval = prediction_interval(np.ones(100), bounds=(0.0, 1.0))
    assert 0.9 < interval.low < 1.0
    assert interval.high == 1.0


def test_folds_must_fit():
    with pytest.raises(DynamizeError, match="cross-fitted"):
        cross_fit(synthetic(21, 2, seed=0), lambda part: [None])
    with pytest.raises(DynamizeError, match="cross-fitted"):
        cross_fit(synthetic(100, 2, seed=0), lambda part: [None], folds=1)


def test_guessing_is_what_the_commonest_class_gives():
    labels = np.repeat([0, 1], [150, 50])
    assert guessed(labels == 0, labels) == 0.75  # always the commonest
    assert guessed(np.arange(200) < 190, labels) is None
    assert guessed(np.arange(4) < 3, labels[::50]) == 0.75  # of four images nothing can be told


def test_wilson_against_published_values():
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)
    for successes, n in ((5, 4), (-1, 4), (0, 0)):
        with pytest.raises(DynamizeError, match="no proportion"):
            wilson(successes, n)
