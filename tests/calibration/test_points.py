"""Operating points span the curve, keep their budgets in expectation, and are picked by cost or loss."""

import dataclasses

import numpy as np
import pytest
from pydantic import ValidationError

from calibration.tables import synthetic
from dynamize.calibration.operating import OperatingPoint, OperatingPoints
from dynamize.calibration.points import operating_points, point_for, point_for_budget, point_for_drop
from dynamize.calibration.table import ConfidenceTable
from dynamize.errors import DynamizeError


@pytest.fixture(scope="module")
def table():
    return synthetic(1200, 3, seed=0)


@pytest.fixture(scope="module")
def points(table):
    return operating_points(table, count=8)


def test_points_span_the_curve(table, points):
    assert points[0] is points["cheapest"]
    assert points[0].macs == table.costs["macs"][0]
    assert 4 <= len(points) <= 8
    assert len({point.name for point in points}) == len(points)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("measure", ["macs", "ms"])
def test_no_point_is_dearer_than_another_and_no_more_accurate(seed, measure):
    found = operating_points(synthetic(150, 3, seed=seed), count=12, measure=measure)
    assert (np.diff([point.macs if measure == "macs" else point.latency_ms for point in found]) > 0).all()
    assert (np.diff([point.accuracy for point in found]) > 0).all()


def test_points_have_their_own_cost_in_their_name(table, points):
    static = table.static_cost["ms"]
    for found, cost in (
        (points, lambda point: point.macs_ratio),
        (operating_points(table, count=6, measure="ms"), lambda point: point.latency_ms / static),
        ([point_for_budget(table, 0.6e8), point_for_drop(table, 6)], lambda point: point.macs_ratio),
    ):
        for point in found:
            role, ratio = point.name.split("-")
            assert role in ("cheapest", "macs", "ms", "full")
            assert ratio == f"{cost(point):.{len(ratio) - 2}f}"


def test_all_exits_off_is_a_point_where_nothing_beats_it():
    table = synthetic(400, 2, seed=1)
    right = table.answers.copy()
    right[-1] = table.labels
    best_last = dataclasses.replace(table, answers=right)
    off = operating_points(best_last, count=5)["full"]
    assert off.thresholds == {"exit.1": None}
    assert off.accuracy == 1.0
    worst_last = dataclasses.replace(table, answers=np.stack([table.answers[0], (table.labels + 1) % 10]))
    with pytest.raises(DynamizeError, match="no operating point 'full'"):
        operating_points(worst_last, count=5)["full"]


def test_points_are_printed_a_line_each(points):
    lines = str(points).splitlines()
    assert len(lines) == len(points)
    assert lines[-1].startswith(f"{points[-1].name}: {points[-1].macs_ratio:.3f} of the MACs")
    differs = points[0].model_copy(update={"labels": "none", "latency_ms": 1.25})
    assert "MACs, 1.25 ms, " in str(differs)
    assert "as the original network answers" in str(differs)


def test_a_role_that_several_points_have_names_none(points):
    with pytest.raises(DynamizeError, match="no operating point 'macs'"):
        points["macs"]


def test_points_state_intervals_around_their_values(points):
    for point in points:
        for name in ("accuracy", "accuracy_drop", "macs"):
            low, high = getattr(point, f"{name}_ci")
            assert low <= getattr(point, name) <= high
        assert point.latency_ci[0] <= point.latency_ms <= point.latency_ci[1]
        assert sum(point.exits) == pytest.approx(1)
        assert point.accuracy_ci[0] < point.accuracy_ci[1]
    assert points[0].macs_ci[0] == points[0].macs_ci[1]


def test_picking(points):
    assert points.at(macs_ratio=2.0).accuracy == max(point.accuracy for point in points)
    middle = points[3]
    assert points.at(macs=middle.macs) == middle
    assert points.at(macs_ratio=middle.macs_ratio).macs <= middle.macs
    assert points.at(latency_ms=middle.latency_ms).latency_ms <= middle.latency_ms
    cheap = points.at(max_drop=100 * middle.accuracy_drop)
    assert cheap.accuracy_drop <= middle.accuracy_drop
    assert cheap.macs <= middle.macs
    assert points[middle.name] is middle


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({}, "exactly one"),
        ({"macs": 1e8, "macs_ratio": 1.0}, "exactly one"),
        ({"macs_ratio": 0.01}, "nearest is 'cheapest-0"),
        ({"macs_ratio": 50}, "a share of the original network's MACs is meant, not 50 % of them: write 0.5 for 50 %"),
        ({"macs_ratio": 1e6}, "is meant: write 0.5 for 50 %"),
        ({"max_drop": -50}, "no operating point is expected"),
        ({"macs": float("nan")}, "positive number"),
        ({"max_drop": float("inf")}, "positive number"),
    ],
)
def test_picking_refuses(points, asked, says):
    with pytest.raises(DynamizeError, match=says):
        points.at(**asked)


def test_unknown_name_lists_the_known(points):
    with pytest.raises(DynamizeError, match="choose one of cheapest"):
        points["macs-9"]


def test_points_survive_json_and_are_frozen(points):
    assert OperatingPoints.model_validate_json(points.model_dump_json()) == points
    with pytest.raises(ValidationError, match="frozen"):
        points[0].name = "other"


def test_no_latency_without_measurement(table):
    macs_only = ConfidenceTable(
        table.scores,
        table.answers,
        table.labels,
        table.reference,
        {"macs": table.costs["macs"]},
        {"macs": 1e8},
    )
    few = operating_points(macs_only, count=3)
    assert few[0].latency_ms is None
    with pytest.raises(DynamizeError, match="no operating point states latency_ms"):
        few.at(latency_ms=1.0)


@pytest.mark.parametrize("measure", ["macs", "ms"])
def test_explicit_budget_is_kept_in_expectation(table, measure):
    budget = float(table.costs[measure].mean())
    point = point_for_budget(table, budget, measure)
    reached = point.macs if measure == "macs" else point.latency_ms
    assert 0.97 * budget < reached <= budget * (1 + 1e-9)
    with pytest.raises(DynamizeError, match="cannot be reached"):
        point_for_budget(table, 0.5 * float(table.costs[measure].min()), measure)


def test_a_drop_that_only_cheaper_settings_keep_is_not_answered_with_all_exits_off():
    """The most accurate setting on this table is expected to lose 4.2 points, cheaper ones 3.3."""
    table = synthetic(120, 3, seed=2)
    point = point_for_drop(table, 3.5)
    assert point.accuracy_drop <= 0.035
    assert point.macs_ratio < 0.6


def test_explicit_drop_is_kept_in_expectation(table):
    loose, tight = point_for_drop(table, 6), point_for_drop(table, 4)
    assert loose.accuracy_drop <= 0.06
    assert tight.accuracy_drop <= 0.04
    assert loose.macs < tight.macs < table.costs["macs"][-1]
    hopeless = ConfidenceTable(table.scores, table.answers, table.labels, table.labels, table.costs, table.static_cost)
    with pytest.raises(DynamizeError, match="least expected drop") as refused:
        point_for_drop(hopeless, 0)
    field, least = refused.value.instead
    assert f"Ask for {field}: {least} or more" in str(refused.value)
    assert point_for_drop(hopeless, float(least)).accuracy_drop <= float(least) / 100
    with pytest.raises(DynamizeError, match="points from 0 to 100"):
        point_for_drop(table, -0.1)


def test_a_solver_of_ones_own(table):
    point = point_for(table, "mine", lambda part: [float(np.median(part.scores[0])), None])
    assert point.exits[0] == pytest.approx(0.5, abs=0.02)
    assert point.exits[1] == 0


def test_network_without_exits_has_one_point():
    only = operating_points(synthetic(100, 1, seed=0))
    assert [point.name for point in only] == ["full-0.30"]
    assert only[0].thresholds == {}


def test_points_name_their_thresholds_as_the_table_does(table):
    names = ("layer1", "cascade")
    named = dataclasses.replace(table, names=names)
    assert {tuple(point.thresholds) for point in operating_points(named, count=3)} == {names}
    assert named.subset(np.arange(100)).names == names
    assert table.names == ("exit.1", "exit.2")
    with pytest.raises(DynamizeError, match="1 names for 2 early exits"):
        dataclasses.replace(table, names=("one",))


def test_points_of_format_1_are_read(points):
    plain = points[2].model_dump(exclude={"offset"})
    listed = plain | {"thresholds": list(plain["thresholds"].values())}
    assert OperatingPoint.model_validate(listed | {"gate_offset": None}) == points[2]
    moved = OperatingPoint.model_validate(listed | {"gate_offset": -1.5})
    assert moved == points[2].model_copy(update={"offset": -1.5})
