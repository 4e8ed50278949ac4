"""Settings whose true drop or true mean cost is below a limit with a stated confidence over draws of the images.

Settings are put in an order, the safest first, without looking at the images that judge them; they are tested in that
order until the first fails, and the last that passed is taken (Angelopoulos et al. 2021, Learn then Test). What has to
be chosen on images, temperatures, a combination or the order itself, is chosen on 40 % of them, which judge nothing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dynamize.calibration.bounds import fixed_sequence, images_needed, p_value, upper_limit
from dynamize.calibration.goal import Goal
from dynamize.calibration.operating import Certificate, OperatingPoint
from dynamize.calibration.points import point_for
from dynamize.calibration.solver import frontier_budgets, solve_budget
from dynamize.calibration.table import EVERYONE, ConfidenceTable, Evaluation, Thresholds
from dynamize.errors import DynamizeError, InfeasibleError

LEARNT = 0.4  # of the images: what is chosen, is chosen on them
SETTINGS = 60  # of a learnt order, spread evenly over the costs

Indices = NDArray[np.intp]
Tables = Callable[[float], ConfidenceTable]
"""The table of all calibration images at an offset."""


class Candidate(NamedTuple):
    """A setting."""

    offset: float
    thresholds: Thresholds


@dataclass(frozen=True)
class Certified:
    """What passed.

    Attributes:
        point: the best of the settings that passed, with what to expect from it on the images that judged it.
        least: the smallest limit that these images certify of any setting, in the unit of the goal's limit.
        more: for a mean cost per image in MACs, about how many images more certify a drop at that cost; None where no
            number is known to.
    """

    point: OperatingPoint
    least: float
    more: Callable[[float], int | None]


@dataclass(frozen=True)
class Trial:
    """Who judges what.

    Attributes:
        certain: the confidence, such as 0.95.
        order: of settings, the dearest first, where it needs no images.
        learnt: indices of the images to choose on; none where nothing is chosen.
        judging: indices of the others, in random order.
    """

    certain: float
    order: list[Candidate] | None
    learnt: Indices
    judging: Indices

    @classmethod
    def of(
        cls, certain: float, order: list[Candidate] | None, images: int, seed: int, chooses: bool = False
    ) -> "Trial":
        """Part the images if something ``chooses`` on them, or the order has to be learnt."""
        if not 0.5 <= certain < 1:
            raise DynamizeError(f"certain={certain:g} is no confidence: give 0.95 for 95 %.")
        mixed = np.random.default_rng(seed).permutation(images)
        count = round(LEARNT * images) if chooses or order is None else 0
        return cls(certain, None if chooses else order, mixed[:count], mixed[count:])

    def certify(self, tables: Tables, offsets: Sequence[float], goal: Goal, dearest: float) -> Certified:
        """Test the order of settings, or one that is learnt at these offsets (:func:`certify`)."""
        order = self.order or learnt_order(tables, offsets, self.learnt, goal)
        return certify(tables, order, self.judging, goal, self.certain, dearest)


def fixed_order(decisions: int, offsets: Sequence[float] = (0.0,)) -> list[Candidate] | None:
    """An order of settings, the dearest first, that needs no images: of one offset, or of one threshold over all scores
    that there are. None where more than one number is free."""
    if decisions > 1 or (decisions and len(offsets) > 1):
        return None
    if not decisions:
        return [Candidate(offset, []) for offset in sorted(offsets, reverse=True)]
    return [Candidate(offsets[0], [score]) for score in (None, *_scores())]


def learnt_order(tables: Tables, offsets: Sequence[float], images: Indices, goal: Goal) -> list[Candidate]:
    """The setting that looks safest on these images and cheaper ones, none of which another one beats."""
    found: list[tuple[float, float, Candidate]] = []
    count = max(8, SETTINGS // len(offsets))
    for offset in offsets:
        part = tables(offset).subset(images)
        for budget in frontier_budgets(part, goal.measure, count):
            thresholds = solve_budget(part, budget, goal.measure)
            seen = part.evaluate(thresholds, goal.measure)
            found.append((seen.cost, seen.accuracy, Candidate(offset, thresholds)))
    front: list[tuple[float, Candidate]] = []
    for _, accuracy, candidate in sorted(found, key=lambda one: (one[0], -one[1])):
        if not front or accuracy > front[-1][0]:
            front.append((accuracy, candidate))
    off = tables(offsets[-1])
    order = [Candidate(offsets[-1], [off.never] * (off.exits - 1)), *(candidate for _, candidate in reversed(front))]
    if not goal.about_accuracy:
        return order
    doubts = [_doubt(goal.losses(tables(one.offset).subset(images), one.thresholds)) for one in order]
    return order[doubts.index(min(doubts)) :]


def _doubt(losses: NDArray[np.float64]) -> float:
    """Where the mean may well be: two standard errors above what was seen."""
    n = len(losses)
    return float(losses.mean() + 2 * math.sqrt((losses.var() + 1 / n) / n))


def certify(
    tables: Tables, order: Sequence[Candidate], images: Indices, goal: Goal, certain: float, dearest: float
) -> Certified:
    """Test the settings one by one on these images.

    Args:
        tables: of all calibration images.
        order: of settings, the dearest first, chosen without these images; a cost is tested from the cheapest on.
        images: in random order.
        goal: the limit.
        certain: the confidence, such as 0.95.
        dearest: what no image can exceed in cost, known beforehand.

    Raises:
        InfeasibleError: the first setting fails; it says what these images certify and how many would do.
    """
    order = order if goal.about_accuracy else order[::-1]
    judge = _Judge(tables, images, goal, 1 - certain, dearest)
    passed = order[: fixed_sequence((judge.p_value(one) for one in order), 1 - certain)]
    least = judge.least(order[0])
    if not passed:
        raise _refusal(judge, order[0], certain, least)
    points = [(judge.seen(one), one) for one in passed]
    if goal.about_accuracy:
        best = min(points, key=lambda one: (one[0].cost, -one[0].accuracy))[1]
    else:
        best = max(points, key=lambda one: (one[0].accuracy, -one[0].cost))[1]
    name = goal.asked if goal.asked != "macs_ratio" else "macs"
    certificate = Certificate.model_validate({name: goal.limit, "certain": certain, "images": len(images)})
    point = point_for(judge.table(best.offset), "chosen", lambda _: best.thresholds)
    point = point.model_copy(update={"offset": best.offset, "certified": certificate})

    def more(cost: float) -> int | None:
        within = (one for one in order[len(passed) :] if judge.seen(one).cost <= cost)
        found = next(within, None)
        return None if found is None else judge.images_more(found)

    return Certified(point, least, more)


class _Judge:
    """What the images say of one setting after another."""

    def __init__(self, tables: Tables, images: Indices, goal: Goal, delta: float, dearest: float) -> None:
        self.tables, self.images, self.goal, self.delta = tables, images, goal, delta
        self.unit = 1.0 if goal.about_accuracy else dearest
        self._parts: dict[float, ConfidenceTable] = {}
        self._last: tuple[NDArray[np.float64], float] | None = None

    def table(self, offset: float) -> ConfidenceTable:
        if offset not in self._parts:
            self._parts[offset] = self.tables(offset).subset(self.images)
        return self._parts[offset]

    def losses(self, one: Candidate) -> NDArray[np.float64]:
        return np.minimum(self.goal.losses(self.table(one.offset), one.thresholds) / self.unit, 1.0)

    def p_value(self, one: Candidate) -> float:
        losses = self.losses(one)
        if self._last is None or not np.array_equal(self._last[0], losses):  # neighbours often route alike
            self._last = losses, p_value(losses, self.goal.limit / self.unit, self.delta)
        return self._last[1]

    def seen(self, one: Candidate) -> Evaluation:
        return self.table(one.offset).evaluate(one.thresholds, self.goal.measure)

    def least(self, one: Candidate) -> float:
        return upper_limit(self.losses(one), self.delta) * self.unit

    def images_more(self, one: Candidate) -> int | None:
        """Calibration images, of which those that are chosen on are a part."""
        needed = images_needed(self.losses(one), self.goal.limit / self.unit, self.delta)
        if needed is None:
            return None
        share = len(self.images) / self.tables(one.offset).images
        return max(1, math.ceil((needed - len(self.images)) / share))


def _refusal(judge: _Judge, first: Candidate, certain: float, least: float) -> InfeasibleError:
    goal, more = judge.goal, judge.images_more(first)
    mean = float(judge.losses(first).mean()) * judge.unit
    help_ = f"about {more:,} images more would do" if more else f"even that one is at {goal.words(mean)} on them"
    return InfeasibleError(
        f"no setting is certain at {certain:.0%} to keep {goal.words(goal.limit)}: what {len(judge.images):,} images "
        f"certify of the safest one is {goal.words(least)}, and {help_}.",
        least,
        goal.instead(least),
        ", give more calibration images, or leave out `certain`",
    )


def verdict(certified: Certified, plain: OperatingPoint | None, goal: Goal) -> list[str]:
    """Sentences: what is certain, what it costs beside the ``plain`` point that is not, what more images would do."""
    point, paper = certified.point, certified.point.certified
    assert paper is not None
    notes = [
        f"certified: {goal.words(goal.limit)} at most, with {paper.certain:.0%} confidence over draws of the "
        f"{paper.images:,} calibration images that judged it; the least that they certify of any setting is "
        f"{goal.words(certified.least)}"
    ]
    if plain is None:
        return notes
    if not goal.about_accuracy:
        lost = 100 * (plain.accuracy - point.accuracy)
        return [*notes, f"the guarantee costs {lost:.2f} points of accuracy beside the setting that is not certified"]
    price = f"{point.macs_ratio:.3f} of the MACs instead of {plain.macs_ratio:.3f} without it"
    more = certified.more((point.macs + plain.macs) / 2) if plain.macs < point.macs else None
    less = f"; about {more:,} images more would halve that" if more else ""
    return [*notes, f"the guarantee costs {price}{less}"]


def _scores() -> list[float]:
    """Thresholds from surest to least sure: fine near 0 on either side, where scores of any kind are dense."""
    wide = np.sinh(np.arange(np.arcsinh(80.0), -np.arcsinh(20.0), -0.02))
    near = -np.geomspace(1e-6, 0.02, 60)
    found: list[float] = np.unique(np.concatenate([wide, near, [EVERYONE]]))[::-1].tolist()
    return found
