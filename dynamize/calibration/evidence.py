"""What several networks answer for the same images, put together: temperatures, combined probabilities, scores.

Each network gives log-probabilities of some classes; those that it does not name share the rest evenly.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from dynamize.calibration.temperature import WIDEST
from dynamize.nn.joining import Joining
from dynamize.nn.scoring import agreement, join

Floats = NDArray[np.float64]
Classes = NDArray[np.int64]
Score = Literal["top_probability", "margin", "entropy", "agreement"]

LEAST_PROBABILITY = 1e-12  # probability of what a network calls impossible
_OTHERS = -1  # in the place of a class: all those that no network names


@dataclass(frozen=True)
class Reading:
    """How the answers of M networks in a row are read.

    Attributes:
        score: what a threshold is compared with. Of the answer so far: the log-odds of its top class, the log-ratio of
            its two largest probabilities, or its negative entropy; or whether all networks so far agree, 1 or 0, which
            the first one alone never does.
        combine: the answer so far is the last network's, or the mean or the normalised product of all so far.
        temperatures: by which each network's logits are divided first (M,).
    """

    score: Score
    combine: Joining
    temperatures: tuple[float, ...]


class Evidence:
    """Log-probabilities of M networks for n images, over the U classes that any of them names and one column for all
    others.

    Args:
        classes: for each network (n, k), the most probable first; k may differ.
        log_probabilities: for each network (n, k).
        class_count: of all classes.

    Attributes:
        answers: of each network alone (M, n).
    """

    def __init__(self, classes: Sequence[Classes], log_probabilities: Sequence[Floats], class_count: int) -> None:
        self.answers = np.stack([one[:, 0] for one in classes])
        images = self.answers.shape[1]
        every = all(one.shape[1] == class_count for one in classes)
        if every:
            columns = np.broadcast_to(np.arange(class_count), (images, class_count))
            times = np.ones((images, class_count + 1))
            times[:, -1] = 0.0
        else:
            columns = np.concatenate(classes, axis=1)
            times = np.ones((images, columns.shape[1] + 1))
            for j in range(1, columns.shape[1]):
                times[:, j] = (columns[:, :j] != columns[:, j : j + 1]).all(axis=1)
            times[:, -1] = class_count - times[:, :-1].sum(axis=1)
        self.columns = np.concatenate([columns, np.full((images, 1), _OTHERS)], axis=1)
        with np.errstate(divide="ignore"):
            self._log_times = np.log(times)  # how many classes a column stands for; none: it was there before
        given = zip(classes, log_probabilities, strict=True)
        self._logits = [_spread(self.columns, *one, class_count, every) for one in given]

    def temperatures(self, labels: Classes) -> tuple[float, ...]:
        """For each network the one that minimises the cross entropy with the labels (n,), in 1/20 to 20."""
        named = (self.columns == labels[:, None]) & (self._log_times > -np.inf)
        place = np.where(named.any(axis=1), named.argmax(axis=1), self.columns.shape[1] - 1)
        return tuple(self._temperature(logits, place) for logits in self._logits)

    def read(self, reading: Reading) -> tuple[Floats, Classes]:
        """Scores (M, n) and answers (M, n) of the networks so far."""
        scores, answers = [], []
        for m, log_probabilities in enumerate(self._combined(reading)):
            if reading.combine == "last" or m == 0:
                answers.append(self.answers[m])
            else:
                top = (log_probabilities + np.minimum(self._log_times, 0.0))[:, :-1].argmax(axis=1)
                answers.append(np.take_along_axis(self.columns, top[:, None], axis=1)[:, 0])
            if reading.score == "agreement":
                scores.append(agreement(self.answers[: m + 1].T))
            else:
                scores.append(_SCORES[reading.score](log_probabilities, self._log_times))
        return np.stack(scores), np.stack(answers)

    def _combined(self, reading: Reading) -> Iterator[Floats]:
        """Log-probabilities of each class (n, U + 1) after each network."""
        total: Floats | None = None
        for logits, temperature in zip(self._logits, reading.temperatures, strict=True):
            own = self._normalised(logits / temperature)
            total = own if total is None else cast(Floats, join(reading.combine, total, own))
            yield own if reading.combine == "last" else self._normalised(total)

    def _normalised(self, logits: Floats) -> Floats:
        found: Floats = logits - _log_sum(logits + self._log_times)[:, None]
        return found

    def _temperature(self, logits: Floats, place: NDArray[np.intp]) -> float:
        of_label = np.take_along_axis(logits, place[:, None], axis=1)[:, 0]

        def cross_entropy(log_temperature: float) -> float:
            warmth = np.exp(-log_temperature)
            return float((_log_sum(logits * warmth + self._log_times) - of_label * warmth).mean())

        bound = float(np.log(WIDEST))
        found = minimize_scalar(cross_entropy, bounds=(-bound, bound), method="bounded")
        return float(np.exp(found.x))


def _spread(columns: Classes, classes: Classes, log_probabilities: Floats, class_count: int, every: bool) -> Floats:
    """One network's log-probability of each column's class (n, U + 1)."""
    named = classes.shape[1]
    left = (1.0 - np.exp(log_probabilities).sum(axis=1)) / max(1, class_count - named)
    rest = np.log(np.maximum(left, LEAST_PROBABILITY))
    found = np.broadcast_to(np.minimum(rest, log_probabilities.min(axis=1))[:, None], columns.shape).copy()
    if every:
        np.put_along_axis(found, classes, log_probabilities, axis=1)
        return found
    for j in range(named):
        np.copyto(found, log_probabilities[:, j : j + 1], where=columns == classes[:, j : j + 1])
    return found


def _log_sum(values: Floats) -> Floats:
    top = values.max(axis=1)
    found: Floats = top + np.log(np.exp(values - top[:, None]).sum(axis=1))
    return found


def _top_probability(log_probabilities: Floats, log_times: Floats) -> Floats:
    single = (log_probabilities + np.minimum(log_times, 0.0))[:, :-1]
    rows, top = np.arange(len(single)), single.argmax(axis=1)
    others = log_probabilities + log_times
    others[rows, top] = -np.inf
    found: Floats = single[rows, top] - _log_sum(others)
    return found


def _margin(log_probabilities: Floats, log_times: Floats) -> Floats:
    single = log_probabilities + np.minimum(log_times, 0.0)
    best = -np.partition(-single, 1, axis=1)
    return best[:, 0] - best[:, 1]


def _entropy(log_probabilities: Floats, log_times: Floats) -> Floats:
    found: Floats = (np.exp(log_probabilities + log_times) * log_probabilities).sum(axis=1)
    return found


_SCORES = {"top_probability": _top_probability, "margin": _margin, "entropy": _entropy}
