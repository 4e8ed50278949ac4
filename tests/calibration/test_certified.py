"""What is certified holds in as many draws as is said, whatever is certified; and what may not look at the images that
judge does not."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from calibration.tables import synthetic
from dynamize.calibration.certified import LEARNT, Candidate, Trial, certify, fixed_order, learnt_order, verdict
from dynamize.calibration.goal import Goal
from dynamize.calibration.offsets import OFFSETS, order_without_images
from dynamize.calibration.table import EVERYONE, ConfidenceTable
from dynamize.errors import DynamizeError, InfeasibleError

DELTA, DRAWS, IMAGES = 0.1, 80, 250
BY_CHANCE = DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / DRAWS)
ALL = synthetic(30_000, 3, seed=0)
DROP = Goal.of(1.0, max_drop=8.0)


def draw(number: int, images: int = IMAGES) -> ConfidenceTable:
    return ALL.subset(np.random.default_rng(number).choice(ALL.images, images, replace=False))


def everyone(table: ConfidenceTable) -> np.ndarray:
    return np.arange(table.images)


def certified(table: ConfidenceTable, order: list[Candidate], goal: Goal = DROP):
    return certify(lambda _: table, order, everyone(table), goal, 1 - DELTA, float(table.cost(goal.measure).max()))


def some_settings(count: int) -> list[Candidate]:
    random = np.random.default_rng(7)
    return [Candidate(0.0, random.uniform(-0.5, 2.5, 2).tolist()) for _ in range(count)]


def violations(order_of) -> float:
    """In what share of draws something is certified of 30 settings that answer independently, and all of which truly
    lose a hair more than the limit."""
    violated, zeros = 0, np.zeros(IMAGES, np.int64)
    costs = np.linspace(1e8, 3e7, 30)
    for number in range(DRAWS):
        wrong = np.random.default_rng(number).random((30, IMAGES)) < DROP.limit + 1e-6
        tables = {
            float(k): ConfidenceTable(
                np.zeros((1, IMAGES)), row[None].astype(int), zeros, zeros, {"macs": [cost]}, {"macs": 1e8}
            )
            for k, (row, cost) in enumerate(zip(wrong, costs, strict=True))
        }
        order = [Candidate(float(k), []) for k in order_of(wrong)]
        try:
            certify(tables.__getitem__, order, np.arange(IMAGES), DROP, 1 - DELTA, 1e8)
        except InfeasibleError:
            continue
        violated += 1
    return violated / DRAWS


def test_a_true_drop_above_the_limit_is_certified_as_rarely_as_it_says():
    assert violations(lambda wrong: range(len(wrong))) <= BY_CHANCE


def test_the_simulation_sees_an_order_chosen_on_the_images_that_judge():
    assert violations(lambda wrong: wrong.sum(axis=1).argsort(kind="stable")) > BY_CHANCE


def test_on_a_real_order_of_settings_it_holds_too():
    violated = 0
    for number in range(DRAWS // 2):
        table = ALL.subset(np.random.default_rng(number).choice(ALL.images, 500, replace=False))
        trial = Trial.of(1 - DELTA, None, 500, seed=0)
        try:
            found = trial.certify(lambda _, t=table: t, [0.0], DROP, 1.0)
        except InfeasibleError:
            continue
        violated += DROP.losses(ALL, list(found.point.thresholds.values())).mean() > DROP.limit
    assert violated <= 4 + 3 * math.sqrt(40 * 0.09)


def test_costs_are_limited_in_the_same_way():
    goal = Goal.of(1e8, macs_ratio=0.7)
    settings, violated = some_settings(40), 0
    settings.sort(key=lambda one: -ALL.evaluate(one.thresholds).cost)
    for number in range(DRAWS):
        found = certified(draw(number), settings, goal)
        violated += ALL.evaluate(list(found.point.thresholds.values())).cost > goal.limit
        assert found.point.certified.macs == goal.limit
    assert violated / DRAWS <= BY_CHANCE


def test_images_that_judge_choose_nothing():
    """The order is the same whatever the labels and scores of the judging images are."""
    table = draw(0, 600)
    trial = Trial.of(0.9, fixed_order(2), 600, seed=3)
    assert trial.order is None
    assert len(trial.learnt) == round(LEARNT * 600)
    assert sorted([*trial.learnt, *trial.judging]) == list(range(600))
    scores, labels = table.scores.copy(), table.labels.copy()
    scores[:, trial.judging], labels[trial.judging] = 0.0, 0
    other = ConfidenceTable(scores, table.answers, labels, table.reference, table.costs, table.static_cost)
    before, after = (learnt_order(lambda _, t=t: t, [0.0], trial.learnt, DROP) for t in (table, other))
    assert before == after
    assert len(before) > 5
    costs = [table.subset(trial.learnt).evaluate(one.thresholds).cost for one in before]
    assert costs == sorted(costs, reverse=True)


def test_one_threshold_or_offset_needs_no_images_to_put_in_order():
    one = fixed_order(1)
    assert one[0].thresholds == [None]
    thresholds = [candidate.thresholds[0] for candidate in one[1:]]
    assert thresholds == sorted(thresholds, reverse=True)
    assert thresholds[-1] == EVERYONE
    assert len(Trial.of(0.95, one, 100, seed=0).judging) == 100
    assert len(Trial.of(0.95, one, 100, seed=0, chooses=True).judging) == 60
    gated = order_without_images(SimpleNamespace(changing=[1], leaving=[]))
    offsets = [candidate.offset for candidate in gated]
    assert offsets == sorted(offsets, reverse=True)
    assert set(OFFSETS) < set(offsets)
    assert len(offsets) == 2 * len(OFFSETS) - 2
    assert order_without_images(SimpleNamespace(changing=[1], leaving=[1])) is None
    assert fixed_order(2) is None


def test_gates_and_exits_are_put_in_one_order():
    tables = {-1.0: synthetic(300, 2, seed=1, cost=[2e7, 6e7]), 1.0: synthetic(300, 2, seed=1, cost=[4e7, 1e8])}
    order = learnt_order(tables.__getitem__, [-1.0, 1.0], np.arange(120), DROP)
    assert {candidate.offset for candidate in order} == {-1.0, 1.0}
    costs = [tables[one.offset].subset(np.arange(120)).evaluate(one.thresholds).cost for one in order]
    assert costs == sorted(costs, reverse=True)


def test_what_is_certified_is_stated_with_its_price():
    table = synthetic(3000, 2, seed=5)
    goal = Goal.of(1e8, max_drop=6.0)
    found = certified(table, fixed_order(1), goal)
    plain = goal.solve(table)
    paper = found.point.certified
    assert paper.model_dump(exclude_none=True) == {"max_drop": 0.06, "certain": 1 - DELTA, "images": 3000}
    assert found.least < 0.06
    assert found.point.macs > plain.macs
    assert found.point.accuracy_drop < 0.06
    notes = verdict(found, plain, goal)
    assert "a drop of 6.00 points at most, with 90% confidence over draws of the 3,000 calibration images" in notes[0]
    assert f"{found.point.macs_ratio:.3f} of the MACs instead of {plain.macs_ratio:.3f}" in notes[1]
    assert "images more would halve that" in notes[1]
    assert len(verdict(found, None, goal)) == 1


def test_a_refusal_says_what_can_be_had_and_what_would_help():
    table = synthetic(60, 2, seed=1)
    with pytest.raises(InfeasibleError, match=r"no setting is certain at 90% .* images more would do") as refused:
        certified(table, fixed_order(1), Goal.of(1e8, max_drop=1.0))
    field, value = refused.value.instead
    assert field == "max_drop"
    again = certified(table, fixed_order(1), Goal.of(1e8, max_drop=float(value)))
    assert again.least <= float(value) / 100
    with pytest.raises(InfeasibleError, match="even that one is at a mean of 0.3 of the MACs"):
        certified(table, fixed_order(1), Goal.of(1e8, macs_ratio=0.29))
    with pytest.raises(DynamizeError, match=r"0\.95 for 95 %"):
        Trial.of(95, None, 100, seed=0)
