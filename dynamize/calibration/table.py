"""The one cached table that all calibration is arithmetic on: what each exit answers for each calibration
image, how sure it is, and what leaving there costs. Nothing here runs a network."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dynamize.errors import DynamizeError

Thresholds = list[float | None]
"""One number for each exit but the last: a sample leaves where its score is not below it; None = exit off."""

LARGEST = float(np.finfo(np.float64).max)
EVERYONE = -LARGEST
"""The threshold that lets every sample leave; finite, so that it survives JSON and a cast to float32."""

FEWEST_IMAGES = 20


class Evaluation(NamedTuple):
    """What a setting of the thresholds does on a table: top-1 accuracy, mean cost per image, exit shares
    (K,)."""

    accuracy: float
    cost: float
    shares: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ConfidenceTable:
    """Outputs of all K exits on n calibration images.

    scores (K, n): confidence, larger = surer; infinities are clipped to the largest float64, NaN is
    refused; the last row decides nothing. answers (K, n), labels (n,), reference (n,): class indices,
    reference being the static teacher's answers. costs: for each measure ("macs", "ms", ...) the cumulative
    cost (K,) of leaving at exit k, all heads passed on the way included; positive, not necessarily
    increasing. static_cost: the static network's cost under the same measures. head_costs: under some
    measures, what each early exit's head (K-1,) costs and, if its exit is off, does not; the solver takes it as
    spent, the stated costs do not. image_costs: under some measures, the cost (K, n) for each image by itself, where
    gates make it differ; stated costs are exact then, and the search uses ``costs``, a mean. names: of the decisions
    (K-1,) at which images leave; "exit.1", ... if not given. labelled: False where labels are the reference, for want
    of true ones. never: the threshold at which nobody leaves: None turns an exit off, the largest number keeps it
    running for what later ones build on. Raises DynamizeError where the parts do not fit together.
    """

    scores: NDArray[np.float64]
    answers: NDArray[np.int64]
    labels: NDArray[np.int64]
    reference: NDArray[np.int64]
    costs: Mapping[str, NDArray[np.float64]]
    static_cost: Mapping[str, float]
    head_costs: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    image_costs: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    labelled: bool = True
    never: float | None = None
    cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        scores = np.array(self.scores, dtype=np.float64)
        if scores.ndim != 2 or scores.shape[0] < 1:
            raise DynamizeError(f"scores have the shape {scores.shape}: give one row per exit, (exits, images).")
        exits, images = scores.shape
        if images < FEWEST_IMAGES:
            raise DynamizeError(
                f"{images} images are too few to fit or judge thresholds: give at least {FEWEST_IMAGES} "
                "(a few thousand make the intervals narrow), for example calibration: 5000."
            )
        bad = np.flatnonzero(np.isnan(scores[:-1]).any(axis=1))
        if bad.size:
            raise DynamizeError(
                f"the scores of exit {int(bad[0])} contain NaN, so its samples cannot be ranked: look for "
                "overflow in that head (half precision?), and compute the scores in float32 or float64."
            )
        given = self.names or tuple(f"exit.{k}" for k in range(1, exits))
        if len(given) != exits - 1:
            raise DynamizeError(f"{len(given)} names for {exits - 1} early exits: give one for each but the last.")
        object.__setattr__(self, "names", given)
        self._store("scores", np.clip(scores, -LARGEST, LARGEST))
        self._store("answers", _classes("answers", self.answers, (exits, images)))
        self._store("labels", _classes("labels", self.labels, (images,)))
        self._store("reference", _classes("reference", self.reference, (images,)))
        if not self.costs:
            raise DynamizeError('no costs were given: pass costs={"macs": one cumulative cost per exit}.')
        costs = {name: _cumulative_cost(name, cost, exits) for name, cost in self.costs.items()}
        object.__setattr__(self, "costs", costs)
        object.__setattr__(self, "static_cost", {k: float(v) for k, v in self.static_cost.items()})
        for name in costs:
            static = self.static_cost.get(name)
            if static is None or not (math.isfinite(static) and static > 0):
                raise DynamizeError(
                    f"static_cost[{name!r}] is {static}: give the static network's cost per image, a positive number."
                )

    def _store(self, name: str, array: NDArray[Any]) -> None:
        array.setflags(write=False)
        object.__setattr__(self, name, array)

    @property
    def exits(self) -> int:
        """K, the network's own classifier counted."""
        return int(self.scores.shape[0])

    @property
    def images(self) -> int:
        """n."""
        return int(self.scores.shape[1])

    @property
    def correct(self) -> NDArray[np.bool_]:
        """(K, n): whether exit k answers image i rightly."""
        if "correct" not in self.cache:
            self.cache["correct"] = self.answers == self.labels
        correct: NDArray[np.bool_] = self.cache["correct"]
        return correct

    @property
    def reference_accuracy(self) -> float:
        """Top-1 accuracy of the static teacher."""
        return float((self.reference == self.labels).mean())

    def cost(self, measure: str) -> NDArray[np.float64]:
        """Cumulative cost (K,) under a measure; DynamizeError where it was not measured."""
        if measure not in self.costs:
            known = ", ".join(self.costs)
            raise DynamizeError(
                f"the table holds no cost under {measure!r}: choose one of {known}, or measure it first."
            )
        return self.costs[measure]

    def spent(self, measure: str, thresholds: Sequence[float | None], exits: NDArray[np.int64]) -> NDArray[np.float64]:
        """What each image (n,) costs if it leaves at ``exits`` (n,), without the heads of exits that are off."""
        cost = self.cost(measure)[exits]
        if measure in self.image_costs:
            cost = self.image_costs[measure][exits, np.arange(self.images)]
        if measure not in self.head_costs:
            return cost
        saved = np.where([threshold is None for threshold in thresholds], self.head_costs[measure], 0.0)
        without: NDArray[np.float64] = cost - np.concatenate([[0.0], np.cumsum(saved)])[exits]
        return without

    def subset(self, index: ArrayLike) -> "ConfidenceTable":
        """The table of some images: an index array or a boolean mask over the n images."""
        chosen = np.asarray(index)
        return ConfidenceTable(
            self.scores[:, chosen],
            self.answers[:, chosen],
            self.labels[chosen],
            self.reference[chosen],
            self.costs,
            self.static_cost,
            self.head_costs,
            {name: cost[:, chosen] for name, cost in self.image_costs.items()},
            self.names,
            self.labelled,
            self.never,
        )

    def route(self, thresholds: Sequence[float | None]) -> NDArray[np.int64]:
        """Exit index (n,) of each image: the first exit k whose score is >= thresholds[k], else the last
        exit."""
        self._check(thresholds)
        taken = np.full(self.images, self.exits - 1, dtype=np.int64)
        for exit_, threshold in reversed(list(enumerate(thresholds))):
            if threshold is not None:
                taken[self.scores[exit_] >= threshold] = exit_
        return taken

    def evaluate(self, thresholds: Sequence[float | None], measure: str = "macs") -> Evaluation:
        """Accuracy, mean cost and exit shares of this setting on the images of the table."""
        taken = self.route(thresholds)
        cost, left = self.spent(measure, thresholds, taken), np.bincount(taken, minlength=self.exits)
        accuracy = self.correct[taken, np.arange(self.images)].mean()
        return Evaluation(float(accuracy), float(cost.mean()), left / self.images)

    def _check(self, thresholds: Sequence[float | None]) -> None:
        if len(thresholds) != self.exits - 1:
            raise DynamizeError(
                f"{len(thresholds)} thresholds for one of {self.exits} exits: give {self.exits - 1}, one "
                "for each exit but the last, and None for an exit that is off."
            )
        if any(threshold is not None and math.isnan(threshold) for threshold in thresholds):
            raise DynamizeError(f"thresholds {list(thresholds)} contain NaN: give a number, or None for off.")


def _classes(name: str, values: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.shape != shape:
        raise DynamizeError(
            f"{name} have the shape {array.shape} where the scores ask for {shape}: give class indices."
        )
    if not np.issubdtype(array.dtype, np.integer):
        raise DynamizeError(f"{name} are {array.dtype}: give class indices as integers, for example logits.argmax(-1).")
    return array.astype(np.int64)


def _cumulative_cost(name: str, values: ArrayLike, exits: int) -> NDArray[np.float64]:
    cost = np.array(values, dtype=np.float64)
    if cost.shape != (exits,):
        raise DynamizeError(f"costs[{name!r}] have the shape {cost.shape}: give {exits} numbers, one for each exit.")
    if not (np.isfinite(cost) & (cost > 0)).all():
        raise DynamizeError(
            f"costs[{name!r}] are {cost.tolist()}: leaving at an exit must cost a positive, finite amount; "
            "give cumulative costs per image."
        )
    cost.setflags(write=False)
    return cost
