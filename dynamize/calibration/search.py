"""The search for thresholds, shared by many budgets: supported settings by Lagrangian ascent (correct
answers minus price x cost), the gap between two of them by bisection in rank space, the last sample by
exact moves."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dynamize.calibration.problem import (
    SEARCH_IMAGES,
    Floats,
    Positions,
    Problem,
    Setting,
    WithinCost,
    binned,
)
from dynamize.calibration.table import EVERYONE, ConfidenceTable, Thresholds

EXACT_CELLS = 2**18  # settings up to which the whole table is enumerated
SEARCH_BINS, CHORDS, FULL_CHORDS = 512, 24, 1


class Search:
    """All that is budget-independent about one table under one measure, so that many budgets share it."""

    def __init__(self, table: ConfidenceTable, measure: str) -> None:
        ranked = [_ranks(row) for row in table.scores[:-1]]
        self.never = table.never
        self.distinct = [distinct for _, distinct in ranked]
        groups = np.array([groups for groups, _ in ranked], dtype=np.intp).reshape(table.exits - 1, table.images)
        cost = table.cost(measure)
        self.unit = float(cost.max())
        sizes = [len(distinct) for distinct in self.distinct]
        self.full = Problem(groups, sizes, table.correct.astype(np.float64), cost / self.unit)
        self._grid: tuple[Floats, Floats] | None = None
        self.exact = math.prod(size + 1 for size in sizes) <= EXACT_CELLS
        if not self.exact:
            self._cuts = [self.full.even_cuts(k, SEARCH_BINS) for k in range(len(sizes))]
            self._coarse = self._compress()
            self._supported: list[Setting] = []
            self._known = [self.full.setting(position) for position in _leave_at_one(self.full)]
            peak = self._search(WithinCost(math.inf))
            assert peak is not None
            self._known.append(peak)

    def solve(self, goal: WithinCost) -> Setting | None:
        """The best setting found for the goal, None where no setting meets it."""
        if self.exact:
            return self._enumerate(goal)
        best = self._search(goal)
        return None if best is None else self.full.polish(best, goal)

    def _search(self, goal: WithinCost) -> Setting | None:
        """The best of the supported settings and of those between the two around the goal."""
        self._support(goal)
        met = [setting for setting in self._known if goal.meets(setting)]
        if not met:
            return None
        best = met[0]
        for setting in met[1:]:
            best = setting if goal.better(setting, best) else best
        bracket = _tightest(self._known, goal)
        if bracket is not None:
            missed = next(end for end in bracket if not goal.meets(end))
            best = self._bisect(best, missed, goal)
        return best

    def thresholds(self, positions: Positions) -> Thresholds:
        """Numbers that separate the groups: the midpoint in float32 where that still separates them, so
        that a runtime comparing in either precision routes alike."""
        return [
            self.never if p == 0 else EVERYONE if p == len(scores) else _between(scores[p], scores[p - 1])
            for p, scores in zip(positions.tolist(), self.distinct, strict=True)
        ]

    def _enumerate(self, goal: WithinCost) -> Setting | None:
        full = self.full
        if full.decisions == 0:
            only = full.setting(np.zeros(0, np.int64))
            return only if goal.meets(only) else None
        if self._grid is None:
            every = [np.arange(1, size) for size in full.sizes]
            self._grid = full.block(np.zeros(full.decisions, np.int64), range(full.decisions), every)
        found = goal.best(*self._grid)
        if found is None:
            return None
        return full.setting(np.array(np.unravel_index(found, self._grid[0].shape), np.int64))

    def _compress(self) -> Problem:
        full, chosen = self.full, np.arange(self.full.images)
        if full.images > SEARCH_IMAGES:
            chosen = np.sort(np.random.default_rng(0).choice(full.images, SEARCH_IMAGES, replace=False))
        parts = zip(full.groups, full.sizes, self._cuts, strict=True)
        groups = np.array([binned(row[chosen], size, cut) for row, size, cut in parts])
        return Problem(groups, [len(cut) + 1 for cut in self._cuts], full.correct[:, chosen], full.costs)

    def _widen(self, positions: Positions) -> Positions:
        """Positions of the compressed problem as positions of the whole one."""
        ends = zip(positions.tolist(), self._cuts, self.full.sizes, strict=True)
        return np.array([0 if p == 0 else size if p > len(cut) else cut[p - 1] for p, cut, size in ends], np.int64)

    def _support(self, goal: WithinCost) -> None:
        """Adds settings of the whole table around the goal: chords on the compressed one first, then here."""
        coarse, full = self._coarse, self.full
        part = goal.scaled(coarse.images / full.images)
        if not self._supported:
            self._supported = [coarse.setting(position) for position in _leave_at_one(coarse)]
            tiny = 0.5 / coarse.images
            self._supported += [coarse.ascend(s.positions, tiny) for s in self._supported[:: full.decisions]]
        price = _chords(coarse, self._supported, part, CHORDS)
        ends = _tightest(self._supported, part) or [max(self._supported, key=lambda s: (s.correct, -s.cost))]
        self._known += [full.ascend(self._widen(end.positions), price) for end in ends]
        _chords(full, self._known, goal, FULL_CHORDS)

    def _bisect(self, met: Setting, missed: Setting, goal: WithinCost) -> Setting:
        """Along the straight line in rank space the last setting found that still meets the goal."""
        start, best, low, high = met.positions, met, 0.0, 1.0
        for _ in range(1 + int(np.abs(missed.positions - start).max()).bit_length()):
            middle = (low + high) / 2
            setting = self.full.setting(np.rint(start + middle * (missed.positions - start)).astype(np.int64))
            if goal.meets(setting):
                low, best = middle, setting if goal.better(setting, best) else best
            else:
                high = middle
        return best


def _tightest(settings: Sequence[Setting], goal: WithinCost) -> tuple[Setting, Setting] | None:
    """The edge of the settings' upper hull, the cheaper end first, of which one end meets the goal; else
    None."""
    hull: list[Setting] = []
    for setting in sorted(settings, key=lambda s: (s.cost, -s.correct)):
        if hull and setting.correct <= hull[-1].correct:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], setting):
            hull.pop()
        hull.append(setting)
    for cheap, dear in pairwise(hull):
        if goal.meets(cheap) != goal.meets(dear):
            return cheap, dear
    return None


def _slope(cheap: Setting, dear: Setting) -> float:
    return (dear.correct - cheap.correct) / max(dear.cost - cheap.cost, 1e-300)


def _chords(problem: Problem, settings: list[Setting], goal: WithinCost, steps: int) -> float:
    """Adds to the settings those supported at the slope of the bracket around the goal, until nothing lies
    above the bracket's chord; the last price."""
    price = 0.5 / problem.images
    for _ in range(steps):
        bracket = _tightest(settings, goal)
        if bracket is None:
            break
        cheap, dear = bracket
        price = _slope(cheap, dear)
        starts = (cheap.positions, dear.positions, (cheap.positions + dear.positions) // 2)
        found = max((problem.ascend(s, price) for s in starts), key=lambda s: s.correct - price * s.cost)
        if found.correct - price * found.cost <= cheap.correct - price * cheap.cost + 1e-6:
            break
        settings.append(found)
    return price


def _leave_at_one(problem: Problem) -> list[Positions]:
    """For each exit, the cheapest first, the positions at which every sample leaves there."""
    positions = []
    for exit_ in np.argsort(problem.costs, kind="stable"):
        position = np.zeros(problem.decisions, np.int64)
        if exit_ < problem.decisions:
            position[exit_] = problem.sizes[exit_]
        positions.append(position)
    return positions


def _ranks(scores: Floats) -> tuple[NDArray[np.intp], Floats]:
    """Group index (n,) of each sample, the highest score first and equal scores alike; the distinct
    scores."""
    order = np.argsort(-scores)
    falling = scores[order]
    first = np.concatenate(([True], falling[1:] != falling[:-1]))
    groups = np.empty(len(scores), dtype=np.intp)
    groups[order] = np.cumsum(first) - 1
    return groups, falling[first]


def _between(low: float, high: float) -> float:
    with np.errstate(over="ignore"):
        middle = float(np.float32(low / 2 + high / 2))
    return middle if low < middle <= high else float(high)
