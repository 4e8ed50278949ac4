"""Budgets are met, optimal where brute force can tell, refused where they cannot be met, and solved fast."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.tables import brute_force, synthetic
from dynamize.calibration import search
from dynamize.calibration.solver import frontier_budgets, solve_budget
from dynamize.calibration.table import EVERYONE, ConfidenceTable
from dynamize.errors import DynamizeError

ABOVE = 1 + 1e-9


def best_within(every: np.ndarray, budget: float) -> float:
    return every[every[:, 1] <= budget * ABOVE, 0].max()


@pytest.fixture
def no_enumeration(monkeypatch):
    """The search that large tables get, on tables small enough for brute force."""
    monkeypatch.setattr(search, "EXACT_CELLS", 0)


@pytest.mark.parametrize(("exits", "ties"), [(2, None), (2, 3), (3, None), (3, 5)])
@pytest.mark.parametrize("enumerated", [True, False])
def test_two_and_three_exits_are_optimal(exits, ties, enumerated, monkeypatch):
    if not enumerated:
        monkeypatch.setattr(search, "EXACT_CELLS", 0)
    for seed in range(3):
        table = synthetic(24, exits, seed, ties)
        every = brute_force(table)
        for budget in np.linspace(table.costs["macs"][0], table.costs["macs"][-1], 7):
            result = table.evaluate(solve_budget(table, budget), "macs")
            assert result.cost <= budget * ABOVE
            assert result.accuracy == pytest.approx(best_within(every, budget))


@pytest.mark.usefixtures("no_enumeration")
def test_two_exits_are_optimal_on_a_large_table():
    table = synthetic(3000, 2, seed=4)
    order = np.argsort(-table.scores[0])
    gained = np.concatenate(([0], np.cumsum(table.correct[0, order].astype(int) - table.correct[1, order])))
    right = table.correct[1].sum() + gained
    cost = table.costs["macs"][1] - np.arange(3001) / 3000 * np.diff(table.costs["macs"])[0]
    for budget in (0.35e8, 0.6e8, 0.9e8):
        result = table.evaluate(solve_budget(table, budget), "macs")
        assert round(result.accuracy * 3000) == right[cost <= budget].max()


@pytest.mark.usefixtures("no_enumeration")
def test_more_exits_come_within_two_images_of_brute_force():
    gaps = []
    for seed in range(4):
        table = synthetic(24, 4, seed, ties=6)
        every = brute_force(table)
        for budget in (0.4e8, 0.55e8, 0.75e8):
            gaps.append(best_within(every, budget) - table.evaluate(solve_budget(table, budget)).accuracy)
    assert max(gaps) <= 2 / 24
    assert np.mean(np.array(gaps) < 1e-12) >= 0.7


@pytest.mark.parametrize(("images", "exits", "ties"), [(400, 5, None), (5000, 4, None), (900, 4, 20)])
def test_no_single_threshold_can_still_be_improved(images, exits, ties):
    table = synthetic(images, exits, seed=3, ties=ties)
    budget = 0.55e8
    thresholds = solve_budget(table, budget)
    result = table.evaluate(thresholds)
    assert result.cost <= budget * ABOVE
    for k in range(exits - 1):
        for value in [None, *np.unique(table.scores[k])[:: max(1, images // 400)]]:
            other = table.evaluate([*thresholds[:k], value, *thresholds[k + 1 :]])
            assert other.cost > budget * ABOVE or other.accuracy <= result.accuracy + 1e-12


def test_refused_budget_names_one_that_works():
    table = synthetic(100, 3, seed=0, cost=[31234567.8, 5e7, 1e8])
    with pytest.raises(DynamizeError, match="cheapest path") as refused:
        solve_budget(table, 1e7)
    field, ratio = refused.value.instead
    assert f"Ask for {field}: {ratio} or more" in str(refused.value)
    nearest = float(ratio) * table.static_cost["macs"]
    result = table.evaluate(solve_budget(table, nearest))
    assert result.cost <= nearest <= 31234567.8 * 1.001


@pytest.mark.parametrize("budget", [float("nan"), float("inf"), -1.0, 0.0, "half"])
def test_budgets_that_are_no_cost_are_refused(budget):
    with pytest.raises(DynamizeError, match="is no budget: give the mean macs per image as a positive number"):
        solve_budget(synthetic(30, 2, seed=0), budget)


def test_one_exit_has_no_thresholds():
    table = synthetic(30, 1, seed=0)
    assert solve_budget(table, 2e8) == []


def test_costs_need_not_increase():
    table = synthetic(60, 3, seed=2, cost=[5e7, 4e7, 9e7])
    every = brute_force(table)
    for budget in (4e7, 4.5e7, 7e7):
        result = table.evaluate(solve_budget(table, budget))
        assert result.cost <= budget * ABOVE
        assert result.accuracy == pytest.approx(best_within(every, budget))


def test_thresholds_route_alike_in_float32():
    base = synthetic(2000, 3, seed=5)
    scores = base.scores.astype(np.float32)
    table = ConfidenceTable(scores, base.answers, base.labels, base.reference, base.costs, base.static_cost)
    thresholds = solve_budget(table, 0.6e8)
    assert None not in thresholds
    for k, threshold in enumerate(thresholds):
        narrow = scores[k] >= np.float32(threshold)
        assert (narrow == (table.scores[k] >= threshold)).all()


def test_frontier_spans_the_curve():
    table = synthetic(3000, 4, seed=6)
    budgets = frontier_budgets(table, "macs", 12)
    results = [table.evaluate(solve_budget(table, budget)) for budget in budgets]
    assert len(budgets) == 11
    assert results[0].cost == pytest.approx(table.costs["macs"][0])
    steps = np.diff([result.cost for result in results])
    assert steps.max() < 1.6 * steps.min()
    assert (np.diff([result.accuracy for result in results]) > 0).all()
    with pytest.raises(DynamizeError, match="at least 2"):
        frontier_budgets(table, "macs", 1)


@pytest.mark.parametrize("seed", range(3))
def test_fifty_thousand_images_and_eight_exits_use_their_budget(seed):
    table = synthetic(50_000, 8, seed)
    result = table.evaluate(solve_budget(table, 0.55e8))
    assert 0.549e8 < result.cost <= 0.55e8 * ABOVE


tables = st.builds(
    synthetic,
    images=st.integers(20, 60),
    exits=st.integers(1, 3),
    seed=st.integers(0, 10_000),
    ties=st.sampled_from([None, 1, 2, 4]),
)


@settings(max_examples=40, deadline=None)
@given(table=tables, shares=st.tuples(st.floats(0, 1), st.floats(0, 1)), measure=st.sampled_from(["macs", "ms"]))
def test_budget_is_kept_and_more_of_it_never_hurts(table, shares, measure):
    cost = table.costs[measure]
    budgets = [cost.min() + share * (cost.max() - cost.min()) for share in sorted(shares)]
    results = [table.evaluate(solve_budget(table, budget, measure), measure) for budget in budgets]
    assert all(result.cost <= budget * ABOVE for result, budget in zip(results, budgets, strict=True))
    assert results[0].accuracy <= results[1].accuracy


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    images=st.integers(20, 300),
    exits=st.integers(2, 6),
    ties=st.sampled_from([None, 1, 3, 8]),
    share=st.floats(0, 1),
)
def test_search_keeps_the_budget_and_replays(seed, images, exits, ties, share):
    table = synthetic(images, exits, seed, ties)
    found = search.Search(table, "macs")
    cost = table.costs["macs"]
    budget = cost[0] + share * (cost[-1] - cost[0])
    setting = found.solve(search.WithinCost(budget / found.unit * images))
    replayed = table.evaluate(found.thresholds(setting.positions))
    assert replayed.cost <= budget * ABOVE
    assert replayed.cost == pytest.approx(setting.cost * found.unit / images)
    assert round(replayed.accuracy * images) == setting.correct


def standard_thresholds(scores: np.ndarray, shares: np.ndarray) -> list[float]:
    """The threshold code that MSDNet, RANet and their successors share, the last exit left out."""
    images = scores.shape[1]
    filtered, thresholds = np.zeros(images), []
    for row, share in zip(scores[:-1], shares, strict=False):
        wanted, count, threshold = int(np.floor(images * share)), 0, 1e8
        for sample in np.argsort(-row, kind="stable"):
            if filtered[sample] == 0:
                count += 1
                if count == wanted:
                    threshold = row[sample]
                    break
        filtered += row >= threshold
        thresholds.append(float(threshold))
    return thresholds


def saturated(images: int = 1000, exits: int = 4) -> ConfidenceTable:
    """12 % of the first exits' confidences are exactly 1."""
    base = synthetic(images, exits, seed=9)
    scores = np.minimum(base.scores, np.quantile(base.scores, 0.88, axis=1, keepdims=True))
    return ConfidenceTable(scores, base.answers, base.labels, base.reference, base.costs, base.static_cost)


def test_small_share_does_not_kill_an_exit():
    table = synthetic(100, 4, seed=8)
    shares = np.array([0.004, 0.006, 0.3, 0.69])
    assert standard_thresholds(table.scores, shares)[:2] == [1e8, 1e8]
    answers = np.array(table.answers)
    answers[:, 0] = (table.labels[0] + 1) % 10
    answers[0, 0] = table.labels[0]
    scores = np.array(table.scores)
    scores[0, 0] = scores[0].max() + 1
    lone = ConfidenceTable(scores, answers, table.labels, table.reference, table.costs, table.static_cost)
    assert lone.route(solve_budget(lone, 1.01e8))[0] == 0


def test_ties_neither_break_a_share_nor_the_budget():
    table = saturated()
    shares = np.array([0.035, 0.15, 0.3, 0.515])
    missed = table.evaluate(standard_thresholds(table.scores, shares))
    assert missed.shares[0] > 0.11
    for budget in np.linspace(0.32e8, 1e8, 9):
        assert table.evaluate(solve_budget(table, budget)).cost <= budget * ABOVE


def test_ties_that_swallow_the_pool_leave_later_exits_alive():
    table = synthetic(200, 4, seed=7)
    scores = np.array(table.scores)
    scores[0] = np.where(np.arange(200) < 180, 1.0, 0.0)
    table = ConfidenceTable(scores, table.answers, table.labels, table.reference, table.costs, table.static_cost)
    assert standard_thresholds(scores, np.array([0.1, 0.3, 0.3, 0.3]))[1] == 1e8
    thresholds = solve_budget(table, 0.7e8)
    assert (table.evaluate(thresholds).shares[1:3] > 0).all()


def test_cost_is_asked_for_not_a_rank_share():
    table = synthetic(2000, 4, seed=3)
    sweep = []
    for p in range(1, 40):
        power = (p / 20) ** np.arange(1, 5)
        sweep.append(table.evaluate(standard_thresholds(table.scores, power / power.sum())))
    for reached in sweep[5:35:5]:
        ours = table.evaluate(solve_budget(table, reached.cost))
        assert ours.cost <= reached.cost * ABOVE
        assert ours.accuracy >= reached.accuracy
    within = [result for result in sweep if result.cost <= 0.61e8]
    assert min(0.61e8 - result.cost for result in within) > 0.005e8  # the sweep cannot be asked for this cost
    ours = table.evaluate(solve_budget(table, 0.61e8))
    assert ours.cost <= 0.61e8 * ABOVE
    assert ours.accuracy >= max(result.accuracy for result in within)


def test_everyone_leaves_through_a_finite_threshold():
    table = synthetic(50, 3, seed=1)
    assert solve_budget(table, table.costs["macs"][0])[0] == EVERYONE
    assert np.isfinite(EVERYONE)
