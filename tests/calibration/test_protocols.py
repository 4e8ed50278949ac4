"""The literature's protocol, with the published threshold code's flaws mended."""

import numpy as np
import pytest

from calibration.tables import synthetic
from dynamize.calibration.protocols import budgeted_batch, share_thresholds
from dynamize.calibration.table import ConfidenceTable
from dynamize.errors import DynamizeError


def test_budgeted_batch_spreads_costs_evenly_and_shares_geometrically():
    table = synthetic(4000, 4, seed=1)
    points = budgeted_batch(table.scores, table, count=9)
    targets = np.linspace(table.costs["macs"][0], table.costs["macs"][-1], 11)[1:-1]
    assert [point.cost for point in points] == pytest.approx(targets, rel=1e-3)
    for point in points:
        assert point.shares[1:] / point.shares[:-1] == pytest.approx(point.q, rel=0.1)
        assert table.evaluate(point.thresholds).accuracy == point.accuracy


def test_rounding_and_ties_are_made_up_for_at_the_next_exit():
    table = synthetic(1000, 4, seed=2)
    scores = np.array(table.scores)
    scores[0] = np.minimum(scores[0], np.quantile(scores[0], 0.88))
    tied = ConfidenceTable(scores, table.answers, table.labels, table.reference, table.costs, table.static_cost)
    shares = np.array([0.1, 0.2, 0.3, 0.4])
    reached = tied.evaluate(share_thresholds(tied.scores, shares)).shares
    assert reached[0] == pytest.approx(0.12, abs=0.002)
    assert np.cumsum(reached)[1:] == pytest.approx(np.cumsum(shares)[1:], abs=0.001)
    few = synthetic(20, 4, seed=2)
    reached = few.evaluate(share_thresholds(few.scores, np.array([0.03, 0.03, 0.04, 0.9]))).shares
    assert reached.tolist() == pytest.approx([0.05, 0, 0.05, 0.9])


def test_thresholds_are_set_on_other_images_than_they_are_judged_on():
    fitted, judged = synthetic(4000, 4, seed=1), synthetic(3000, 4, seed=2)
    own, other = budgeted_batch(fitted.scores, fitted), budgeted_batch(fitted.scores, judged)
    assert [point.thresholds for point in other] == [point.thresholds for point in own]
    found = [judged.evaluate(point.thresholds) for point in other]
    assert [(point.cost, point.accuracy) for point in other] == [(one.cost, one.accuracy) for one in found]
    assert all(one.accuracy != two.accuracy for one, two in zip(own, other, strict=True))


def test_one_point_at_least():
    table = synthetic(30, 2, seed=0)
    with pytest.raises(DynamizeError, match="at least one"):
        budgeted_batch(table.scores, table, count=0)
