"""Settings of all thresholds, what they give, and exact moves among them. A setting is a vector of
positions: at exit k the positions[k] surest groups of equal scores leave, so that ties leave together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]
Floats = NDArray[np.float64]

ROUNDING = 1e-11  # relative: what summing n costs in another order may differ by
SEARCH_IMAGES = 4096  # images up to which exits move in pairs, and which the Lagrangian search sees
PAIR_BINS, PAIR_NEAR = 48, 24  # cuts of a pair move: evenly over the ranks, and around where it stands
SWEEPS, ROUNDS = 12, 12


class Setting(NamedTuple):
    """Positions (K-1,) with what they give on the problem they belong to."""

    positions: Positions
    correct: float
    cost: float


@dataclass(frozen=True)
class WithinCost:
    """Most correct answers at a summed cost not above the limit; of equals the cheapest."""

    limit: float

    def meets(self, setting: Setting) -> bool:
        return setting.cost <= self.limit * (1 + ROUNDING)

    def better(self, one: Setting, other: Setting) -> bool:
        if one.correct != other.correct:
            return one.correct > other.correct
        return one.cost < other.cost * (1 - ROUNDING)

    def best(self, correct: Floats, cost: Floats) -> int | None:
        allowed = np.where(cost <= self.limit * (1 + ROUNDING), correct, -1.0)
        top = allowed.max()
        return None if top < 0 else int(np.where(allowed == top, cost, np.inf).argmin())

    def scaled(self, factor: float) -> "WithinCost":
        return WithinCost(self.limit * factor)


class Problem:
    """Grouped ranks (K-1, n), correctness (K, n) and costs (K,) of one table under one measure."""

    def __init__(self, groups: NDArray[np.intp], sizes: Sequence[int], correct: Floats, costs: Floats) -> None:
        self.groups, self.sizes, self.correct, self.costs = groups, np.array(sizes, np.int64), correct, costs
        self._ranks = groups.astype(np.int32)  # a narrower copy, twice as fast to compare
        self.decisions, self.images = groups.shape[0], correct.shape[1]
        self._cut_at: dict[int, Positions] = {}
        self._columns, self._by_sample = np.arange(self.images) * len(costs), correct.T.ravel()

    def exits(self, positions: Positions, skip: Sequence[int] = ()) -> NDArray[np.int16]:
        """Exit (n,) of each sample; the exits in `skip` count as off."""
        taken, alive = np.zeros(self.images, np.int16), np.ones(self.images, bool)
        for k in range(self.decisions):
            if k not in skip and positions[k]:
                alive &= self._ranks[k] >= np.int32(positions[k])
            taken += alive
        return taken

    def right(self, taken: NDArray[np.int16]) -> Floats:
        """1.0 (n,) where the exit that a sample leaves at answers rightly."""
        return self._by_sample.take(self._columns + taken)

    def setting(self, positions: Positions) -> Setting:
        taken = self.exits(positions)
        cost = np.bincount(taken, minlength=self.decisions + 1) @ self.costs
        return Setting(positions, float(self.right(taken).sum()), float(cost))

    def ascend(self, start: Positions, price: float) -> Setting:
        """Coordinate ascent on correct - price x cost; each exit's optimum given the others is exact."""
        positions = start.copy()
        worth = self.correct - price * self.costs[:, None]
        for _ in range(SWEEPS):
            before, reach = positions.copy(), np.ones((self.decisions, self.images), dtype=bool)
            for k in range(1, self.decisions):
                np.logical_and(reach[k - 1], self._ranks[k - 1] >= np.int32(positions[k - 1]), out=reach[k])
            ahead = worth[-1].copy()
            for k in reversed(range(self.decisions)):
                gain = (worth[k] - ahead) * reach[k]
                curve = np.bincount(self.groups[k], gain, self.sizes[k]).cumsum()
                best = int(curve.argmax())
                positions[k] = best + 1 if curve[best] > 0 else 0
                np.copyto(ahead, worth[k], where=self._ranks[k] < np.int32(positions[k]))
            if np.array_equal(before, positions):
                break
        return self.setting(positions)

    def block(self, positions: Positions, ks: Sequence[int], cuts: Sequence[Positions]) -> tuple[Floats, Floats]:
        """Correct answers and cost over the grid of settings of the exits `ks`, the other exits held.

        cuts[i] are the inner positions that exit ks[i] may take besides 0 and all; grid axis i has
        len(cuts[i]) + 2.
        """
        bins = [binned(self.groups[k], self.sizes[k], cut) for k, cut in zip(ks, cuts, strict=True)]
        held = self.exits(positions, skip=ks)
        leaving = [np.minimum(held, np.int16(k)) for k in ks] + [held]
        shape = [len(cut) + 1 for cut in cuts]
        correct = grid_totals(bins, shape, [self.right(exit_) for exit_ in leaving])
        return correct, grid_totals(bins, shape, [self.costs.take(exit_) for exit_ in leaving])

    def even_cuts(self, k: int, bins: int) -> Positions:
        """Inner positions of exit k that part the images into at most so many bins of like size."""
        size = int(self.sizes[k])
        if size <= bins:
            return np.arange(1, size)
        wanted = np.linspace(0, self.images, bins + 1)[1:-1]
        cuts = np.unique(np.searchsorted(np.cumsum(np.bincount(self.groups[k])), wanted) + 1)
        return cuts[cuts < size]

    def polish(self, best: Setting, goal: WithinCost) -> Setting:
        """Exact moves of one exit until none helps, then of two exits together, until nothing helps."""
        count = self.decisions
        ones: list[Sequence[int]] = [(k,) for k in range(count)]
        twos: list[Sequence[int]] = [*combinations(range(count), 2)]
        if self.images > SEARCH_IMAGES:
            twos = [pair for pair in twos if pair[1] == pair[0] + 1]
        moves = ones
        for _ in range(ROUNDS):
            before = best
            for ks in moves:
                best = self._move(best, ks, goal)
            if best is not before:
                moves = ones
            elif moves is ones and twos:
                moves = twos
            else:
                return best
        while (after := self._single_moves(best, goal)) is not best:
            best = after
        return best

    def _single_moves(self, best: Setting, goal: WithinCost) -> Setting:
        for k in range(self.decisions):
            best = self._move(best, (k,), goal)
        return best

    def _pair_cuts(self, k: int) -> Positions:
        if k not in self._cut_at:
            self._cut_at[k] = self.even_cuts(k, PAIR_BINS)
        return self._cut_at[k]

    def _move(self, best: Setting, ks: Sequence[int], goal: WithinCost) -> Setting:
        if len(ks) == 1:
            cuts = [np.arange(1, self.sizes[ks[0]])]
        else:
            near = [np.arange(best.positions[k] - PAIR_NEAR, best.positions[k] + PAIR_NEAR + 1) for k in ks]
            inner = [cut[(cut > 0) & (cut < self.sizes[k])] for cut, k in zip(near, ks, strict=True)]
            cuts = [np.union1d(self._pair_cuts(k), cut) for k, cut in zip(ks, inner, strict=True)]
        correct, cost = self.block(best.positions, ks, cuts)
        found = goal.best(correct, cost)
        if found is None:
            return best
        if not goal.better(Setting(best.positions, correct.flat[found], cost.flat[found]), best):
            return best
        positions = best.positions.copy()
        for k, cut, index in zip(ks, cuts, np.unravel_index(found, correct.shape), strict=True):
            positions[k] = 0 if index == 0 else self.sizes[k] if index > len(cut) else cut[index - 1]
        setting = self.setting(positions)
        keep = goal.meets(setting) and goal.better(setting, best)
        return setting if keep else best


def grid_totals(bins: Sequence[NDArray[np.intp]], shape: Sequence[int], values: Sequence[Floats]) -> Floats:
    """Summed value of all samples under every setting of d thresholds; axis i is shape[i] + 1 long.

    A sample with bins[i] < position i leaves at the first such i and is worth values[i], else values[d].
    """
    depth = len(bins)
    if depth == 1:
        gained = np.bincount(bins[0], values[0] - values[1], shape[0]).cumsum()
        return np.concatenate(([0.0], gained)) + values[1].sum()
    total = np.zeros([size + 1 for size in shape])
    cell = np.zeros(len(values[0]), dtype=np.intp)
    for i in range(depth + 1):
        last = min(i, depth - 1)
        if i < depth:
            cell = cell * shape[i] + bins[i]
        sums: Floats = np.bincount(cell, values[i], math.prod(shape[: last + 1])).astype(np.float64)
        sums = sums.reshape(shape[: last + 1])
        for axis in range(last + 1):
            below = np.zeros([size + (a == axis) for a, size in enumerate(sums.shape)])
            inner = tuple(slice(1, None) if a == axis else slice(None) for a in range(sums.ndim))
            np.cumsum(sums, axis=axis, out=below[inner])
            sums = below if axis == i else np.take(below, [-1], axis=axis) - below
        total += sums.reshape(sums.shape + (1,) * (depth - sums.ndim))
    return total


def binned(groups: NDArray[np.intp], size: int, cuts: Positions) -> NDArray[np.intp]:
    """Bin (n,) of each sample when its groups are cut at these inner positions."""
    if len(cuts) == size - 1:
        return groups
    starts = np.zeros(size, np.intp)
    starts[cuts] = 1
    return np.cumsum(starts)[groups]
