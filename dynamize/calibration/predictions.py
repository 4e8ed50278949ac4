"""Planning a cascade from predictions that are known: no network is needed, solving is arithmetic.

A :class:`PredictionTable` holds, for each of M networks in a row, what it answers for each of n images, whole or its k
most probable classes, and what it costs alone. ``choose`` finds how these are read (temperatures and combination);
``read`` turns the table into the :class:`~dynamize.calibration.table.ConfidenceTable` on which exits, gates and
cascades are all solved and certified; ``solve`` and ``curve`` do both. Who has networks collects their logits and does
the same.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dynamize.calibration.certified import Candidate, Trial, fixed_order, verdict
from dynamize.calibration.evidence import Evidence, Reading, Score
from dynamize.calibration.given import Named, as_costs, as_labels, as_named, from_arrays, from_logits, read_arrays
from dynamize.calibration.goal import UNLABELLED, Goal
from dynamize.calibration.operating import OperatingPoint, OperatingPoints
from dynamize.calibration.points import operating_points
from dynamize.calibration.table import LARGEST, ConfidenceTable, Evaluation
from dynamize.errors import DynamizeError, InfeasibleError
from dynamize.nn.joining import Joining

_FOLDS = 2  # by which combinations are compared
_CURVE = 8  # points at which they are, where there is no goal


class Choice(NamedTuple):
    """How predictions are read, and sentences on why."""

    reading: Reading
    notes: tuple[str, ...]


class Plan(NamedTuple):
    """What was found: the point, how predictions are read at it, and sentences for people."""

    point: OperatingPoint
    reading: Reading
    notes: tuple[str, ...]


class PredictionTable:
    """Predictions of networks that are asked one behind the other, for the same n images.

    Args:
        predictions: by name, in the order in which they are asked, the cheapest first: probabilities of all C classes
            (n, C), or a pair of classes (n, k) and their probabilities (n, k), k of 1 or more, in any order.
        macs: by name, MACs per image of each network alone.
        labels: class indices (n,); None: whether the last network would have answered alike is judged by instead.
        ms: by name, milliseconds per image, if limits in time are wanted.
        class_count: C, if no network names all; by default one more than the largest index.

    Raises:
        DynamizeError: the parts do not fit together.

    Example:
        >>> import numpy as np
        >>> random = np.random.default_rng(0)
        >>> labels = random.integers(0, 10, 500)
        >>> logits = {name: 3 * random.normal(size=(500, 10)) for name in ("small", "big")}
        >>> for name, lift in {"small": 6, "big": 9}.items():
        ...     logits[name][np.arange(500), labels] += lift
        >>> table = dz.PredictionTable.from_logits(logits, macs={"small": 1e8, "big": 1e9}, labels=labels)
        >>> plan = table.solve(max_drop=1)
        >>> plan.point.macs_ratio < 0.8
        True
    """

    def __init__(
        self,
        predictions: Mapping[str, Any],
        macs: Mapping[str, float],
        labels: ArrayLike | None = None,
        *,
        ms: Mapping[str, float] | None = None,
        class_count: int | None = None,
    ) -> None:
        if len(predictions) < 2:
            raise DynamizeError(f"{len(predictions)} networks make no cascade: give at least two, the cheapest first.")
        self.names = tuple(predictions)
        self.named = {name: as_named(name, given) for name, given in predictions.items()}
        counts = {name: len(one.classes) for name, one in self.named.items()}
        if len(set(counts.values())) > 1:
            raise DynamizeError(f"the networks answered different numbers of images: {counts}.")
        self.images = counts[self.names[0]]
        whole = {name: one.classes.shape[1] for name, one in self.named.items() if one.whole}
        if len(set(whole.values())) > 1:
            raise DynamizeError(f"the networks have different numbers of classes: {whole}. They must be the same ones.")
        self.labels = None if labels is None else as_labels(labels, self.images)
        self.costs = {"macs": as_costs("macs", macs, self.names)}
        dearest = self.names[int(np.argmax(self.costs["macs"]))]
        if max(self.costs["macs"]) > self.costs["macs"][-1]:
            raise DynamizeError(
                f"{dearest} takes more MACs than {self.names[-1]}, which is asked after it and with which all is "
                "compared: give the dearest network last."
            )
        if ms is not None:
            self.costs["ms"] = as_costs("ms", ms, self.names)
        tops = [one.classes for one in self.named.values()] + ([] if self.labels is None else [self.labels])
        self.class_count = max(int(one.max()) for one in tops) + 1
        if class_count is not None and class_count < self.class_count:
            raise DynamizeError(f"class_count={class_count}, but class {self.class_count - 1} is named: give more.")
        self.class_count = class_count or self.class_count
        self._evidence: Evidence | None = None

    @classmethod
    def from_logits(cls, logits: Mapping[str, ArrayLike], macs: Mapping[str, float], **more: Any) -> "PredictionTable":
        """The same from logits of all classes (n, C), of any float type; ``more`` as for the class."""
        return cls({name: from_logits(name, np.asarray(one)) for name, one in logits.items()}, macs, **more)

    @classmethod
    def read_files(
        cls, files: Path | str | Sequence[Path | str], macs: Mapping[str, float], **more: Any
    ) -> "PredictionTable":
        """The same from ``.npz`` files.

        Args:
            files: hold for each network that ``macs`` names ``NAME.probabilities`` (n, C), or (n, k) with
                ``NAME.classes`` (n, k), or else ``NAME.logits`` (n, C); and ``labels`` (n,), if there are any.
            macs: by name, in the order in which they are asked.
            more: as for the class; ``labels=None`` leaves out those of the files.
        """
        arrays: dict[str, NDArray[Any]] = {}
        for file in [files] if isinstance(files, (str, Path)) else files:
            arrays |= read_arrays(Path(file))
        more.setdefault("labels", arrays.get("labels"))
        return cls({name: from_arrays(name, arrays) for name in macs}, macs, **more)

    def subset(self, index: ArrayLike) -> "PredictionTable":
        """The table of some images: an index array or a boolean mask over the n images."""
        chosen = np.asarray(index)
        named = {
            name: Named(one.classes[chosen], one.log_probabilities[chosen], one.whole)
            for name, one in self.named.items()
        }
        costs = {measure: dict(zip(self.names, cost, strict=True)) for measure, cost in self.costs.items()}
        labels = None if self.labels is None else self.labels[chosen]
        return PredictionTable(named, costs["macs"], labels, ms=costs.get("ms"), class_count=self.class_count)

    @property
    def evidence(self) -> Evidence:
        """All predictions side by side."""
        if self._evidence is None:
            each = self.named.values()
            self._evidence = Evidence([o.classes for o in each], [o.log_probabilities for o in each], self.class_count)
        return self._evidence

    def read(self, reading: Reading) -> ConfidenceTable:
        """The table that thresholds are solved on; the last network is what drops and costs are compared with.

        A threshold of None leaves a network out altogether, which is possible where later answers do not build on it.
        """
        builds = reading.combine != "last" or reading.score == "agreement"
        scores, answers = self.evidence.read(reading)
        reference = self.evidence.answers[-1]
        return ConfidenceTable(
            scores=scores,
            answers=answers,
            labels=reference if self.labels is None else self.labels,
            reference=reference,
            costs={measure: np.cumsum(cost) for measure, cost in self.costs.items()},
            static_cost={measure: float(cost[-1]) for measure, cost in self.costs.items()},
            head_costs={} if builds else {measure: cost[:-1] for measure, cost in self.costs.items()},
            names=self.names[:-1],
            labelled=self.labels is not None,
            never=LARGEST if builds else None,
        )

    def choose(self, goal: Goal | None, score: Score, combine: Joining | Literal["auto"], seed: int = 0) -> Choice:
        """How predictions are read.

        Temperatures that fit the labels, or none, and the combination if it is "auto": what keeps the goal best by
        cross-fit; without a goal, what is most accurate along the curve.
        """
        plain = (1.0,) * len(self.names)
        if self.labels is None:
            if combine not in ("auto", "last"):
                raise DynamizeError(f"combine={combine!r} cannot be judged without labels: leave it out, or give some.")
            return Choice(Reading(score, "last", plain), (UNLABELLED,))
        fitted = self.evidence.temperatures(self.labels)
        readings = [Reading(score, one, fitted) for one in (get_args(Joining) if combine == "auto" else (combine,))]
        readings += [Reading(score, one.combine, plain) for one in readings if one.combine != "last"]
        if len(readings) == 1:
            return Choice(readings[0], ())
        found: list[tuple[float, str, Reading]] = []
        refused: list[InfeasibleError] = []
        for reading in readings:
            try:
                worth, words = _worth(self.read(reading), goal, seed)
            except InfeasibleError as error:
                refused.append(error)
            else:
                warm = "without temperatures" if reading.temperatures == plain else "with temperatures"
                found.append((worth, f"{words} by {reading.combine} {warm}", reading))
        if not found:
            raise min(refused, key=lambda error: error.nearest)
        _, words, best = max(found, key=lambda one: one[0])  # the first of equals: the plainest
        others = "; ".join(each for _, each, _ in found)
        return Choice(best, (f"answers are combined as in {words}, chosen by cross-fit among: {others}",))

    def solve(
        self,
        *,
        max_drop: float | None = None,
        macs_ratio: float | None = None,
        macs: float | None = None,
        latency_ms: float | None = None,
        certain: float | None = None,
        score: Score = "top_probability",
        combine: Joining | Literal["auto"] = "auto",
        seed: int = 0,
    ) -> Plan:
        """The best setting within one limit.

        Args:
            max_drop: points of accuracy lost against the last network; 0.2 if no limit is given.
            macs_ratio: mean MACs per image as a share of the last network's.
            macs: mean MACs per image.
            latency_ms: mean milliseconds per image.
            certain: confidence with which the true value keeps the limit, such as 0.95 (:mod:`.certified`).
            score: what thresholds are compared with. "agreement" has none to find but which networks may answer.
            combine: how answers so far are put together.
            seed: of folds and of the order of images.

        Raises:
            InfeasibleError: no setting keeps the limit, or is certain to; it says what can be had.
        """
        static = float(self.costs["macs"][-1])
        goal = Goal.of(static, max_drop=max_drop, macs_ratio=macs_ratio, macs=macs, latency_ms=latency_ms)
        if goal.measure not in self.costs:
            raise DynamizeError("milliseconds are not known: give `ms`, or a limit in MACs.")
        if score == "agreement" and len(self.names) < 3:
            raise DynamizeError("agreement is that of at least two networks before the last: give three, or a score.")
        if certain is None:
            reading, notes = self.choose(goal, score, combine, seed)
            return Plan(goal.solve(self.read(reading), seed), reading, notes)
        return self._certified(goal, certain, score, combine, seed)

    def curve(
        self,
        count: int = 20,
        *,
        score: Score = "top_probability",
        combine: Joining | Literal["auto"] = "auto",
        seed: int = 0,
    ) -> OperatingPoints:
        """Up to ``count`` operating points along the whole curve, the cheapest first."""
        return operating_points(self.read(self.choose(None, score, combine, seed).reading), count, seed=seed)

    def evaluate(self, plan: Plan, measure: str = "macs") -> Evaluation:
        """What a plan that was made on other images does on these: accuracy, mean cost and shares answered by each."""
        return self.read(plan.reading).evaluate([plan.point.thresholds[name] for name in self.names[:-1]], measure)

    def _certified(
        self, goal: Goal, certain: float, score: Score, combine: Joining | Literal["auto"], seed: int
    ) -> Plan:
        decisions = len(self.names) - 1
        order = _agreeing(decisions) if score == "agreement" else fixed_order(decisions)
        chooses = self.labels is not None and combine != "last"
        trial = Trial.of(certain, order, self.images, seed, chooses)
        if len(trial.learnt):
            choice = self.subset(trial.learnt).choose(goal, score, combine, seed)
        else:
            words = () if self.labels is not None else (UNLABELLED,)
            choice = Choice(Reading(score, "last", (1.0,) * len(self.names)), words)
        table = self.read(choice.reading)
        found = trial.certify(lambda _: table, [0.0], goal, float(table.cost(goal.measure).max()))
        try:
            plain = goal.solve(table, seed)
        except InfeasibleError:
            plain = None
        return Plan(found.point, choice.reading, (*choice.notes, *verdict(found, plain, goal)))


def _worth(table: ConfidenceTable, goal: Goal | None, seed: int) -> tuple[float, str]:
    """How good a combination is, larger is better, and the same in words."""
    if goal is None:
        accuracy = float(np.mean([point.accuracy for point in operating_points(table, _CURVE, seed=seed)]))
        return accuracy, f"{100 * accuracy:.2f} % along the curve"
    point = goal.solve(table, seed, _FOLDS)
    if goal.about_accuracy:
        return -point.macs, f"{point.macs_ratio:.3f} of the MACs"
    return point.accuracy, f"{100 * point.accuracy:.2f} %"


def _agreeing(decisions: int) -> list[Candidate]:
    """Settings of agreement, the dearest first: the later networks have to agree, the more of them do."""
    return [Candidate(0.0, [*[LARGEST] * (decisions - m), *[1.0] * m]) for m in range(decisions)]
