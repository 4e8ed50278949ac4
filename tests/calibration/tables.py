"""Synthetic confidence tables for the calibration tests, and brute force to compare the solver with."""

import itertools

import numpy as np

from dynamize.calibration.table import ConfidenceTable


def synthetic(images: int, exits: int, seed: int, ties: int | None = None, cost=None) -> ConfidenceTable:
    """Exits that get better with depth, and scores that know something of whether the answer is right."""
    random = np.random.default_rng(seed)
    difficulty = random.normal(size=images)
    skill = np.linspace(0.6, 1.8, exits)[:, None]
    margin = skill - difficulty + 0.5 * random.normal(size=(exits, images))
    scores = margin + 0.5 * random.normal(size=(exits, images))
    if ties is not None:
        scores = np.round(scores * ties / 4)
    labels = random.integers(0, 10, images)
    answers = np.where(margin > 0, labels, (labels + 1) % 10)
    reference = np.where(skill[-1] - difficulty + 0.3 * random.normal(size=images) > 0, labels, (labels + 1) % 10)
    macs = np.linspace(0.3, 1.02, exits) * 1e8 if cost is None else np.asarray(cost, float)
    costs = {"macs": macs, "ms": macs**0.8 / 1e6}
    return ConfidenceTable(scores, answers, labels, reference, costs, {"macs": 1e8, "ms": 1e6**0.4})


def brute_force(table: ConfidenceTable, measure: str = "macs") -> np.ndarray:
    """(settings, 2): accuracy and mean cost of every distinct setting, by routing each."""
    options = [[None, *np.unique(scores).tolist()] for scores in table.scores[:-1]]
    found = [table.evaluate(list(setting), measure) for setting in itertools.product(*options)]
    return np.array([(result.accuracy, result.cost) for result in found])
