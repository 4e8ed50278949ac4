"""Finding operating points: along the whole curve, or for one explicit budget, with what to expect on fresh images."""

import math
from collections.abc import Sequence
from typing import Literal

from dynamize.calibration.intervals import CrossFit, Interval, Solve, apply_folds, cross_fit, folds_of
from dynamize.calibration.operating import OperatingPoint, OperatingPoints, Pair
from dynamize.calibration.solver import frontier_budgets, solve_budget
from dynamize.calibration.table import ConfidenceTable, Thresholds
from dynamize.errors import DynamizeError, InfeasibleError

FOLDS = 10
DROP_STEPS = 12  # bisections of the budget: the curve's width / 4096
DROP_SCAN = 22  # budgets looked at where the curve's dearer end does not keep the drop
TIGHTENINGS = 4
SLACK = 1 + 1e-9


def operating_points(table: ConfidenceTable, count: int = 20, measure: str = "macs", seed: int = 0) -> OperatingPoints:
    """Up to `count` points along the whole curve, costs evenly spread, the cheapest first.

    "cheapest" lets every image leave at the cheapest exit, "full" has all exits off, and the others are
    named after the budget they keep in expectation, as a ratio to the static network: "macs-0.50".
    """
    budgets = frontier_budgets(table, measure, count)
    static = table.static_cost[measure]
    ratios = _distinct_ratios([budget / static for budget in budgets[1:]])
    points = [point_for(table, "cheapest", _budget_solver(budgets[0], measure), seed=seed)]
    for label, ratio in ratios.items():
        if ratio * static > budgets[0]:
            points.append(point_for_budget(table, ratio * static, measure, f"{measure}-{label}", seed))
    full = point_for(table, "full", lambda part: [None] * (part.exits - 1), seed=seed)
    if points[0].thresholds == full.thresholds:
        points = points[1:]
    inner = [point for i, point in enumerate(points) if point.thresholds not in [p.thresholds for p in points[:i]]]
    return OperatingPoints((*(point for point in inner if point.thresholds != full.thresholds), full))


def point_for(table: ConfidenceTable, name: str, solve: Solve, folds: int = FOLDS, seed: int = 0) -> OperatingPoint:
    """The point at the thresholds that `solve` finds on the whole table; expectations by `folds`-fold
    cross-fit."""
    return _point(table, name, solve(table), cross_fit(table, solve, folds, seed))


def point_for_budget(
    table: ConfidenceTable, budget: float, measure: str = "macs", name: str | None = None, seed: int = 0
) -> OperatingPoint:
    """The most accurate point whose cross-fitted mean cost per image does not exceed the budget.

    Thresholds are fitted to a slightly smaller budget where fresh images would exceed it. DynamizeError
    where the budget is below the cheapest possible cost.
    """
    cheapest = float(table.cost(measure).min())
    fitted = budget
    for tightening in range(TIGHTENINGS + 1):
        thresholds, fit = _fit(table, fitted, measure, seed)
        excess = float(fit.costs[measure].mean()) - budget
        if excess <= budget * (SLACK - 1):
            break
        fitted = cheapest if tightening == TIGHTENINGS - 1 else max(cheapest, fitted - excess * 1.1 * 2**tightening)
    label = name or f"{measure}-{budget / table.static_cost[measure]:.2f}"
    return _point(table, label, thresholds, fit)


def point_for_drop(
    table: ConfidenceTable, max_drop: float, measure: str = "macs", name: str | None = None, seed: int = 0
) -> OperatingPoint:
    """The cheapest point whose cross-fitted expected accuracy drop is at most max_drop (a fraction).

    Found by bisection of the budget. InfeasibleError naming the least expected drop where none is small enough.
    """
    if not 0 <= max_drop <= 1:
        raise DynamizeError(
            f"max_drop={max_drop!r} is not a loss of accuracy: give a fraction from 0 to 1, "
            "for example 0.002 for 0.2 points."
        )
    label = name or f"drop-{max_drop:g}"
    off: Thresholds = [None] * (table.exits - 1)
    tried = [(off, apply_folds(table, off, [off] * FOLDS, FOLDS, seed))]
    tried += _around_drop(table, max_drop, measure, seed)
    met = [found for found in tried if found[1].drop.mean() <= max_drop * SLACK + 1e-12]
    if not met:
        nearest = min(float(fit.drop.mean()) for _, fit in tried)
        raise InfeasibleError(
            f"no thresholds are expected to lose at most {max_drop:g} of accuracy: the least expected drop "
            f"is {nearest:.4f} ({100 * nearest:.2f} points). "
            f"Ask for max_drop={math.ceil(nearest * 1e4) / 1e4:g} or more, or distil the exits further first.",
            nearest,
        )
    thresholds, fit = min(met, key=lambda found: float(found[1].costs[measure].mean()))
    return _point(table, label, thresholds, fit)


def _around_drop(table: ConfidenceTable, max_drop: float, measure: str, seed: int) -> list[tuple[Thresholds, CrossFit]]:
    """Settings of several budgets, among them about the least whose expected drop is at most ``max_drop``.

    The most accurate setting is also the one most fitted to the table: where it is expected to lose too much, cheaper
    ones may still do.
    """
    tried: list[tuple[Thresholds, CrossFit]] = []

    def keeps(budget: float) -> bool:
        tried.append(_fit(table, budget, measure, seed))
        return bool(tried[-1][1].drop.mean() <= max_drop)

    cheapest, *inner, dearest = frontier_budgets(table, measure, DROP_SCAN)
    if keeps(cheapest):
        return tried
    low, high = cheapest, dearest
    if not keeps(dearest):
        place = next((i for i, budget in enumerate(inner) if keeps(budget)), None)
        if place is None:
            return tried
        low, high = [cheapest, *inner][place], inner[place]
    for _ in range(DROP_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if keeps(middle) else (middle, high)
    return tried


def _fit(table: ConfidenceTable, budget: float, measure: str, seed: int) -> tuple[Thresholds, CrossFit]:
    solve = _budget_solver(budget, measure)
    thresholds = solve(table)
    settings = [solve(fold.fitted_on) for fold in folds_of(table, FOLDS, seed)]
    return thresholds, apply_folds(table, thresholds, settings, FOLDS, seed)


def _budget_solver(budget: float, measure: str) -> Solve:
    return lambda part: solve_budget(part, budget, measure)


def _point(table: ConfidenceTable, name: str, thresholds: Thresholds, fit: CrossFit) -> OperatingPoint:
    table.cost("macs")  # refuses a table without MACs
    accuracy, drop, macs = fit.accuracy(), fit.accuracy_drop(), fit.cost("macs")
    latency = fit.cost("ms") if "ms" in table.costs else None
    return OperatingPoint(
        name=name,
        thresholds=dict(zip(table.names, thresholds, strict=True)),
        accuracy=accuracy.expected,
        accuracy_ci=_ends(accuracy),
        accuracy_drop=drop.expected,
        accuracy_drop_ci=_ends(drop),
        macs=macs.expected,
        macs_ci=_ends(macs),
        macs_ratio=macs.expected / table.static_cost["macs"],
        latency_ms=latency.expected if latency else None,
        latency_ci=_ends(latency) if latency else None,
        exits=fit.shares.tolist(),
    )


def _ends(interval: Interval) -> Pair:
    return interval.low, interval.high


def _distinct_ratios(ratios: Sequence[float]) -> dict[str, float]:
    """Names of two digits, or three where two would not tell them apart, each with the ratio it says."""
    digits: Literal[2, 3] = 2 if len({f"{ratio:.2f}" for ratio in ratios}) == len(ratios) else 3
    return {name: float(name) for name in (f"{ratio:.{digits}f}" for ratio in ratios)}
