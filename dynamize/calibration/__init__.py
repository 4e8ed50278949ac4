"""Exit thresholds from a cached table of confidences: budgets met or refused, expectations from held-out
folds, and operating points along the whole curve."""

from dynamize.calibration.intervals import CrossFit, Interval, cross_fit, prediction_interval, wilson
from dynamize.calibration.points import (
    OperatingPoint,
    OperatingPoints,
    operating_points,
    point_for,
    point_for_budget,
    point_for_drop,
)
from dynamize.calibration.protocols import BatchPoint, budgeted_batch
from dynamize.calibration.solver import solve_budget
from dynamize.calibration.table import EVERYONE, ConfidenceTable, Evaluation, Thresholds

__all__ = [
    "EVERYONE",
    "BatchPoint",
    "ConfidenceTable",
    "CrossFit",
    "Evaluation",
    "Interval",
    "OperatingPoint",
    "OperatingPoints",
    "Thresholds",
    "budgeted_batch",
    "cross_fit",
    "operating_points",
    "point_for",
    "point_for_budget",
    "point_for_drop",
    "prediction_interval",
    "solve_budget",
    "wilson",
]
