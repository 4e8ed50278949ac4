"""What calibration is asked for, a largest drop or a largest mean cost, and how each image counts against it."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dynamize.calibration.operating import OperatingPoint
from dynamize.calibration.points import FOLDS, point_for_budget, point_for_drop
from dynamize.calibration.table import ConfidenceTable, Thresholds
from dynamize.errors import DynamizeError, InfeasibleError, rounded_up

Budget = Literal["max_drop", "macs_ratio", "macs", "latency_ms"]
DEFAULT_DROP = 0.2
UNLABELLED = (
    "labels: none: what is held below the limit is how often the answer differs from the original network's; the "
    "accuracy lost against that network cannot be more, and is usually much less; how accurate either is, is not known"
)


@dataclass(frozen=True)
class Goal:
    """A limit.

    Attributes:
        asked: its name.
        typed: as a recipe has it: points, a share of the original network's MACs, MACs or milliseconds.
        limit: the same as a fraction, or as mean cost per image.
    """

    asked: Budget
    typed: float
    limit: float

    @classmethod
    def of(cls, static_macs: float, **given: float | None) -> "Goal":
        """The one limit that is given, by name; else a drop of 0.2 points. DynamizeError where there are two."""
        limits = [(name, value) for name, value in given.items() if value is not None]
        if len(limits) > 1:
            raise DynamizeError(f"{' and '.join(name for name, _ in limits)} are budgets both; give one of them.")
        name, typed = limits[0] if limits else ("max_drop", DEFAULT_DROP)
        scale = {"max_drop": 0.01, "macs_ratio": static_macs}.get(name, 1.0)
        return cls(name, typed, typed * scale)  # type: ignore[arg-type]

    @property
    def measure(self) -> str:
        """Of cost."""
        return "ms" if self.asked == "latency_ms" else "macs"

    @property
    def about_accuracy(self) -> bool:
        """Whether the drop is limited, and the cost made as small as can be; otherwise it is the other way round."""
        return self.asked == "max_drop"

    def solve(self, table: ConfidenceTable, seed: int = 0, folds: int = FOLDS) -> OperatingPoint:
        """The best point that is expected to keep the limit; InfeasibleError where none is."""
        if self.about_accuracy:
            return point_for_drop(table, self.typed, seed=seed, folds=folds)
        try:
            return point_for_budget(table, self.limit, self.measure, seed=seed, folds=folds)
        except InfeasibleError as error:
            raise error.asking("macs", rounded_up(error.nearest)) if self.asked == "macs" else error from None

    def allows(self, point: OperatingPoint) -> bool:
        """Whether a point is expected to keep the limit."""
        found = {"max_drop": 100 * point.accuracy_drop, "macs_ratio": point.macs_ratio, "macs": point.macs}
        value = found.get(self.asked, point.latency_ms)
        return value is not None and value <= self.typed

    def losses(self, table: ConfidenceTable, thresholds: Thresholds) -> NDArray[np.float64]:
        """What each image (n,) counts against the limit: the original right less the network right, or its cost."""
        taken = table.route(thresholds)
        if not self.about_accuracy:
            return table.spent(self.measure, thresholds, taken)
        right = table.correct[taken, np.arange(table.images)]
        losses: NDArray[np.float64] = (table.reference == table.labels).astype(np.float64) - right
        return losses

    def words(self, limit: float) -> str:
        """A value of the limit for people: "a drop of 0.50 points"."""
        if self.about_accuracy:
            return f"a drop of {100 * limit:.2f} points"
        unit = {"macs_ratio": "of the MACs", "macs": "MACs", "latency_ms": "ms"}[self.asked]
        return f"a mean of {self._as_typed(limit):.4g} {unit}"

    def instead(self, limit: float) -> tuple[str, str]:
        """A value of the limit as it is typed, rounded up so that it works."""
        if self.about_accuracy:
            return self.asked, f"{math.ceil(limit * 1e4 - 1e-9) / 1e2:g}"
        return self.asked, rounded_up(self._as_typed(limit))

    def _as_typed(self, limit: float) -> float:
        return limit * self.typed / self.limit
