"""Thresholds for a budget: what a person asks for (mean cost, largest accuracy drop, a whole frontier)
turned into one number per exit, or refused with the nearest value that can be had."""

import math

import numpy as np

from dynamize.calibration.problem import AtLeastCorrect, WithinCost
from dynamize.calibration.search import Search
from dynamize.calibration.table import ConfidenceTable, Thresholds
from dynamize.errors import DynamizeError, InfeasibleError


def solve_budget(table: ConfidenceTable, budget: float, measure: str = "macs") -> Thresholds:
    """Thresholds of the highest accuracy on the table at a mean cost per image not above the budget.

    Exact for two exits, and for more while the table has at most 2**18 settings; otherwise the best found,
    which no move of one threshold improves within the budget. Costs are compared up to 1e-11 relative, the
    rounding of their sum. DynamizeError where the budget is not a positive number or below the cheapest
    possible cost.
    """
    cheapest = float(table.cost(measure).min())
    if not (isinstance(budget, (int, float, np.number)) and math.isfinite(budget) and budget > 0):
        raise DynamizeError(
            f"budget={budget!r} is not a cost: give the mean {measure} per image as a positive number, from "
            f"{_rounded_up(cheapest)} (every image leaves at the cheapest exit) upwards."
        )
    search = _search(table, measure)
    found = search.solve(WithinCost(float(budget) / search.unit * table.images))
    if found is None:
        static = table.static_cost[measure]
        raise InfeasibleError(
            f"a mean of {budget:g} {measure} per image cannot be reached: every image leaving at the "
            f"cheapest exit costs {cheapest:g} ({cheapest / static:.3f} of the static network). "
            f"Ask for budget={_rounded_up(cheapest)} or more, or insert an earlier exit.",
            cheapest,
        )
    return search.thresholds(found.positions)


def solve_drop(table: ConfidenceTable, max_drop: float, measure: str = "macs") -> Thresholds:
    """Thresholds of the lowest mean cost whose accuracy on the table is at most `max_drop` below the
    reference's.

    max_drop is a fraction: 0.002 is 0.2 points. The drop is the one on this very table, so it is
    optimistic; for an expected drop use `dynamize.calibration.points.point_for_drop`. DynamizeError where
    max_drop is not in 0..1 or no setting reaches it.
    """
    if not (isinstance(max_drop, (int, float, np.number)) and 0 <= max_drop <= 1):
        raise DynamizeError(
            f"max_drop={max_drop!r} is not a loss of accuracy: give a fraction from 0 to 1, "
            "for example 0.002 for 0.2 points."
        )
    search, images = _search(table, measure), table.images
    reference = int((table.reference == table.labels).sum())
    target = math.ceil(reference - max_drop * images - 1e-9)
    found = search.solve(AtLeastCorrect(float(target)))
    if found is None:
        best = search.solve(WithinCost(math.inf))
        assert best is not None, "the unlimited budget is always met"
        nearest = (reference - best.correct) / images
        raise InfeasibleError(
            f"an accuracy drop of at most {max_drop:g} cannot be reached: the best thresholds found still "
            f"lose {nearest:.4f} ({100 * nearest:.2f} points) against the static network. "
            f"Ask for max_drop={_rounded_up(nearest)} or more, or distil the exits further first.",
            nearest,
        )
    return search.thresholds(found.positions)


def frontier(table: ConfidenceTable, measure: str = "macs", count: int = 20) -> list[Thresholds]:
    """Up to `count` settings along the whole curve: from every image at the cheapest exit, over costs
    evenly spread up to the most accurate setting, to all exits off. Accuracy on the table never falls on
    the way up to the last.

    Fewer come back only where the table has no more distinct ones (ties, a cheap last exit).
    """
    settings: list[Thresholds] = []
    best = -1.0
    for budget in frontier_budgets(table, measure, count):
        thresholds = solve_budget(table, budget, measure)
        accuracy = table.evaluate(thresholds, measure).accuracy
        if accuracy > best:
            settings.append(thresholds)
            best = accuracy
    off: Thresholds = [None] * (table.exits - 1)
    return [*(setting for setting in settings if setting != off), off]


def frontier_budgets(table: ConfidenceTable, measure: str, count: int) -> list[float]:
    """count - 1 mean costs, evenly from the cheapest possible one to that of the most accurate setting."""
    if count < 2:
        raise DynamizeError(f"count={count} points make no curve: ask for at least 2, the cheapest and the full one.")
    peak = _search(table, measure).solve(WithinCost(math.inf))
    assert peak is not None, "the unlimited budget is always met"
    dearest = table.evaluate(_search(table, measure).thresholds(peak.positions), measure).cost
    budgets: list[float] = np.linspace(float(table.cost(measure).min()), dearest, count - 1).tolist()
    return budgets


def _search(table: ConfidenceTable, measure: str) -> Search:
    """The table's search under a measure, made once: presorted ranks and the supported settings found so
    far."""
    key = "search", measure
    if key not in table.cache:
        table.cache[key] = Search(table, measure)
    search: Search = table.cache[key]
    return search


def _rounded_up(value: float) -> str:
    """Four significant digits, never below the value, so that typing it works."""
    if value <= 0:
        return "0"
    step = 10.0 ** (math.floor(math.log10(value)) - 3)
    text = f"{math.ceil(value / step - 1e-9) * step:.6g}"
    return text if float(text) >= value else repr(value)
