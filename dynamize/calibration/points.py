"""Finding operating points: along the whole curve, or for one explicit budget, with what to expect on fresh images."""

import math

from dynamize.calibration.intervals import CrossFit, Interval, Solve, apply_folds, cross_fit, folds_of
from dynamize.calibration.operating import OperatingPoint, OperatingPoints, Pair, named_by_cost, undominated
from dynamize.calibration.solver import frontier_budgets, solve_budget
from dynamize.calibration.table import ConfidenceTable, Thresholds
from dynamize.errors import DynamizeError, InfeasibleError

FOLDS = 10
DROP_STEPS = 12  # bisections of the budget: the curve's width / 4096
DROP_SCAN = 22  # budgets looked at where the curve's dearer end does not keep the drop
TIGHTENINGS = 4
SLACK = 1 + 1e-9


def operating_points(table: ConfidenceTable, count: int = 20, measure: str = "macs", seed: int = 0) -> OperatingPoints:
    """Up to `count` points along the whole curve, costs about evenly spread, the cheapest first.

    Each is named after what it is expected to cost, as a ratio to the static network: "macs-0.50". At "cheapest-0.21"
    every image leaves at the cheapest exit, at "full-1.08" all exits are off. None is dearer than another one and no
    more accurate, so that "full" is missing where exits answer better.
    """
    budgets = frontier_budgets(table, measure, count)
    off: Thresholds = [table.never] * (table.exits - 1)
    points = [point_for(table, "full", lambda part: off, seed=seed)]
    if points[0].thresholds:
        points.append(point_for(table, "cheapest", _budget_solver(budgets[0], measure), seed=seed))
    points += [point_for_budget(table, budget, measure, measure, seed) for budget in budgets[1:]]
    return OperatingPoints(tuple(named_by_cost(undominated(points, measure), table.static_cost[measure], measure)))


def point_for(table: ConfidenceTable, name: str, solve: Solve, folds: int = FOLDS, seed: int = 0) -> OperatingPoint:
    """The point at the thresholds that `solve` finds on the whole table; expectations by `folds`-fold
    cross-fit."""
    return _point(table, name, solve(table), cross_fit(table, solve, folds, seed))


def point_for_budget(
    table: ConfidenceTable,
    budget: float,
    measure: str = "macs",
    name: str | None = None,
    seed: int = 0,
    folds: int = FOLDS,
) -> OperatingPoint:
    """The most accurate point whose cross-fitted mean cost per image does not exceed the budget.

    Thresholds are fitted to a slightly smaller budget where fresh images would exceed it. DynamizeError
    where the budget is below the cheapest possible cost.
    """
    cheapest = float(table.cost(measure).min())
    fitted = budget
    for tightening in range(TIGHTENINGS + 1):
        thresholds, fit = _fit(table, fitted, measure, folds, seed)
        excess = float(fit.costs[measure].mean()) - budget
        if excess <= budget * (SLACK - 1):
            break
        fitted = cheapest if tightening == TIGHTENINGS - 1 else max(cheapest, fitted - excess * 1.1 * 2**tightening)
    return _named(_point(table, name or measure, thresholds, fit), name, table, measure)


def point_for_drop(
    table: ConfidenceTable,
    max_drop: float,
    measure: str = "macs",
    name: str | None = None,
    seed: int = 0,
    folds: int = FOLDS,
) -> OperatingPoint:
    """The cheapest point whose cross-fitted expected accuracy drop is at most max_drop, in points.

    Found by bisection of the budget. InfeasibleError naming the least expected drop where none is small enough.
    """
    if not 0 <= max_drop <= 100:
        raise DynamizeError(
            f"max_drop={max_drop!r} is no loss of accuracy: give points from 0 to 100, for example 0.2."
        )
    limit = max_drop / 100
    off: Thresholds = [table.never] * (table.exits - 1)
    tried = [(off, apply_folds(table, off, [off] * folds, folds, seed))]
    tried += _around_drop(table, limit, measure, folds, seed)
    met = [found for found in tried if found[1].drop.mean() <= limit * SLACK + 1e-12]
    if not met:
        nearest = min(float(fit.drop.mean()) for _, fit in tried)
        raise InfeasibleError(
            f"no thresholds are expected to lose at most {max_drop:g} points of accuracy: the least expected drop is "
            f"{100 * nearest:.2f} points.",
            nearest,
            ("max_drop", f"{math.ceil(nearest * 1e4 - 1e-9) / 1e2:g}"),
            ", or distil further first",
        )
    thresholds, fit = min(met, key=lambda found: float(found[1].costs[measure].mean()))
    return _named(_point(table, name or measure, thresholds, fit), name, table, measure)


def _around_drop(
    table: ConfidenceTable, limit: float, measure: str, folds: int, seed: int
) -> list[tuple[Thresholds, CrossFit]]:
    """Settings of several budgets, among them about the least whose expected drop is at most ``limit``, a fraction.

    The most accurate setting is also the one most fitted to the table: where it is expected to lose too much, cheaper
    ones may still do.
    """
    tried: list[tuple[Thresholds, CrossFit]] = []

    def keeps(budget: float) -> bool:
        tried.append(_fit(table, budget, measure, folds, seed))
        return bool(tried[-1][1].drop.mean() <= limit)

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


def _fit(table: ConfidenceTable, budget: float, measure: str, folds: int, seed: int) -> tuple[Thresholds, CrossFit]:
    solve = _budget_solver(budget, measure)
    thresholds = solve(table)
    settings = [solve(fold.fitted_on) for fold in folds_of(table, folds, seed)]
    return thresholds, apply_folds(table, thresholds, settings, folds, seed)


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
        labels="given" if table.labelled else "none",
        images=table.images,
    )


def _named(point: OperatingPoint, name: str | None, table: ConfidenceTable, measure: str) -> OperatingPoint:
    return named_by_cost([point], table.static_cost[measure], measure)[0] if name is None else point


def _ends(interval: Interval) -> Pair:
    return interval.low, interval.high
