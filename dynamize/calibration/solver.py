"""Thresholds for a budget: a mean cost turned into one number per exit, or refused with the nearest value that can be
had."""

import math

import numpy as np

from dynamize.calibration.problem import WithinCost
from dynamize.calibration.search import Search
from dynamize.calibration.table import ConfidenceTable, Thresholds
from dynamize.errors import DynamizeError, InfeasibleError, rounded_up


def solve_budget(table: ConfidenceTable, budget: float, measure: str = "macs") -> Thresholds:
    """Thresholds of the highest accuracy on the table at a mean cost per image not above the budget.

    Exact for two exits, and for more while the table has at most 2**18 settings; otherwise the best found,
    which no move of one threshold improves within the budget. Costs are compared up to 1e-11 relative, the
    rounding of their sum. DynamizeError where the budget is not a positive number or below the cheapest
    possible cost.
    """
    cheapest, static = float(table.cost(measure).min()), table.static_cost[measure]
    if not (isinstance(budget, (int, float, np.number)) and math.isfinite(budget) and budget > 0):
        raise DynamizeError(
            f"{budget!r} is no budget: give the mean {measure} per image as a positive number, from "
            f"{rounded_up(cheapest)} (every image leaves at the cheapest exit) upwards."
        )
    search = _search(table, measure)
    found = search.solve(WithinCost(float(budget) / search.unit * table.images))
    if found is None:
        raise unreachable(budget, cheapest, static, measure)
    return search.thresholds(found.positions)


def unreachable(budget: float, cheapest: float, static: float, measure: str) -> InfeasibleError:
    """The refusal of a budget below what the cheapest path costs; all three under ``measure``, "macs" or "ms"."""
    ratio = "macs_ratio", rounded_up(cheapest / static)
    return InfeasibleError(
        f"a mean of {budget:g} {measure} per image ({budget / static:.3g} of the original network's) cannot be "
        f"reached: with every image on the cheapest path it is {cheapest:g} ({cheapest / static:.3g}).",
        cheapest,
        ratio if measure == "macs" else ("latency_ms", rounded_up(cheapest)),
        ", or put an exit earlier",
    )


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
