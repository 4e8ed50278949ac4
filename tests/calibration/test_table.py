"""The table refuses what does not fit together, and routes as the definition says."""

import dataclasses

import numpy as np
import pytest

from calibration.tables import synthetic
from dynamize.calibration.table import EVERYONE, ConfidenceTable
from dynamize.errors import DynamizeError


def parts(**changed):
    table = synthetic(30, 3, seed=0)
    names = ("scores", "answers", "labels", "reference", "costs", "static_cost")
    return {name: getattr(table, name) for name in names} | changed


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"scores": np.zeros(30)}, r"\(exits, images\)"),
        ({"scores": np.full((3, 30), np.nan)}, "NaN"),
        ({"answers": np.zeros((2, 30), int)}, "answers have the shape"),
        ({"labels": np.zeros(29, int)}, "labels have the shape"),
        ({"reference": np.zeros(30)}, "class indices as integers"),
        ({"costs": {}}, "no costs"),
        ({"costs": {"macs": [1.0, 2.0]}}, "give 3 numbers"),
        ({"costs": {"macs": [1.0, 2.0, 0.0]}}, "positive"),
        ({"static_cost": {}}, "static network"),
    ],
)
def test_refuses_what_does_not_fit(changed, says):
    with pytest.raises(DynamizeError, match=says):
        ConfidenceTable(**parts(**changed))


def test_refuses_too_few_images():
    with pytest.raises(DynamizeError, match="at least 20"):
        synthetic(19, 2, seed=0)


def test_last_row_may_hold_anything():
    scores = synthetic(30, 3, seed=0).scores.copy()
    scores[-1] = np.nan
    assert ConfidenceTable(**parts(scores=scores)).exits == 3


def test_is_frozen_and_independent_of_the_callers_arrays():
    scores = np.zeros((3, 30))
    table = ConfidenceTable(**parts(scores=scores))
    scores[:] = 7
    assert table.scores.max() == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.labels = np.zeros(30, int)
    with pytest.raises(ValueError, match="read-only"):
        table.scores[0, 0] = 1


def test_routes_to_the_first_exit_whose_score_reaches_the_threshold():
    table = synthetic(200, 4, seed=1)
    thresholds = [1.0, None, 0.5]
    expected = []
    for i in range(table.images):
        exit_ = 3
        for k, threshold in enumerate(thresholds):
            if threshold is not None and table.scores[k, i] >= threshold:
                exit_ = k
                break
        expected.append(exit_)
    routed = table.route(thresholds)
    assert routed.tolist() == expected
    result = table.evaluate(thresholds, "macs")
    assert result.shares.sum() == pytest.approx(1)
    assert result.cost == pytest.approx(table.costs["macs"][routed].mean())
    assert result.accuracy == np.mean([table.answers[e, i] == table.labels[i] for i, e in enumerate(routed)])


def test_infinite_scores_leave_everywhere_or_nowhere_but_off_stays_off():
    scores = np.zeros((2, 30))
    scores[0, :5], scores[0, 5:9] = np.inf, -np.inf
    whole = parts()
    costs, static = {"macs": [1.0, 2.0]}, {"macs": 2.0}
    table = ConfidenceTable(scores, whole["answers"][:2], whole["labels"], whole["reference"], costs, static)
    assert (table.route([None]) == 1).all()
    assert (table.route([1e300]) == 0).sum() == 5
    assert (table.route([EVERYONE]) == 0).all()


def test_subset_is_the_table_of_those_images():
    table = synthetic(60, 3, seed=2)
    chosen = table.labels % 2 == 0
    part = table.subset(chosen)
    thresholds = [0.7, 0.2]
    assert part.route(thresholds).tolist() == table.route(thresholds)[chosen].tolist()
    assert part.costs["ms"].tolist() == table.costs["ms"].tolist()


@pytest.mark.parametrize(("thresholds", "says"), [([1.0], "give 2"), ([1.0, float("nan")], "NaN")])
def test_refuses_thresholds_that_do_not_fit(thresholds, says):
    with pytest.raises(DynamizeError, match=says):
        synthetic(30, 3, seed=0).route(thresholds)


def test_refuses_an_unknown_measure():
    with pytest.raises(DynamizeError, match="choose one of macs, ms"):
        synthetic(30, 3, seed=0).evaluate([None, None], "joule")
