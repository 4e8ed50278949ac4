"""Operating points as data: settings with what to expect from them, picked by what they cost or lose."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, RootModel, model_validator

from dynamize.errors import DynamizeError

_SLACK = 1e-9

Pair = tuple[float, float]


class OperatingPoint(BaseModel):
    """One setting: a threshold for each decision at which images leave (None = off; score >= threshold leaves), and the
    offset of all others.

    Expected values are cross-fitted on calibration images; each interval is where the value of a fresh set
    of as many images falls with 95 % probability. Accuracies and drops are fractions, macs per image,
    latency in ms per image without the machine's own noise; exits are the expected shares (K,).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    thresholds: dict[str, float | None]
    offset: float = 0.0
    accuracy: float = Field(ge=0, le=1)
    accuracy_ci: Pair
    accuracy_drop: float
    accuracy_drop_ci: Pair
    macs: float = Field(gt=0)
    macs_ci: Pair
    macs_ratio: float = Field(gt=0)
    latency_ms: float | None = None
    latency_ci: Pair | None = None
    exits: list[float]

    @model_validator(mode="before")
    @classmethod
    def _of_format_1(cls, given: Any) -> Any:
        """Thresholds were a list, in the order of the exits."""
        if not isinstance(given, Mapping) or not isinstance(given.get("thresholds"), list):
            return given
        thresholds = {f"exit.{k}": one for k, one in enumerate(given["thresholds"], start=1)}
        kept = {key: value for key, value in given.items() if key != "gate_offset"}
        return {**kept, "thresholds": thresholds, "offset": given.get("gate_offset") or 0.0}


class OperatingPoints(RootModel[tuple[OperatingPoint, ...]]):
    """A sequence of points, the cheapest first; `points["macs-0.50"]` and `points[0]` both work."""

    model_config = ConfigDict(frozen=True)

    def __iter__(self) -> Iterator[OperatingPoint]:  # type: ignore[override]
        return iter(self.root)

    def __len__(self) -> int:
        return len(self.root)

    def __getitem__(self, key: int | str) -> OperatingPoint:
        if isinstance(key, int):
            return self.root[key]
        for point in self.root:
            if point.name == key:
                return point
        names = ", ".join(point.name for point in self.root)
        raise DynamizeError(f"there is no operating point {key!r}: choose one of {names}.")

    def at(
        self,
        *,
        macs_ratio: float | None = None,
        macs: float | None = None,
        latency_ms: float | None = None,
        accuracy_drop: float | None = None,
    ) -> OperatingPoint:
        """For a cost the most accurate point expected not to exceed it; for an accuracy drop (a fraction)
        the point of the fewest MACs expected not to lose more. DynamizeError, naming the nearest, where
        there is none."""
        asked = {
            "macs_ratio": macs_ratio,
            "macs": macs,
            "latency_ms": latency_ms,
            "accuracy_drop": accuracy_drop,
        }
        given = {name: value for name, value in asked.items() if value is not None}
        if len(given) != 1:
            raise DynamizeError(
                f"{len(given)} limits were given ({', '.join(given) or 'none'}): give exactly one of "
                f"{', '.join(asked)}, for example at(macs_ratio=0.5)."
            )
        ((name, limit),) = given.items()
        if math.isnan(limit) or (limit <= 0 and name != "accuracy_drop"):
            raise DynamizeError(f"{name}={limit} is no limit: give a positive number.")
        return self._within(name, limit)

    def _within(self, name: str, limit: float) -> OperatingPoint:
        measured: list[tuple[float, OperatingPoint]] = [
            (value, point) for point in self.root if (value := getattr(point, name)) is not None
        ]
        if not measured:
            raise DynamizeError(f"no operating point states {name}: measure it first, or ask for macs_ratio.")
        allowed = [point for value, point in measured if value <= limit + abs(limit) * _SLACK]
        if not allowed:
            nearest, point = min(measured, key=lambda pair: pair[0])
            raise DynamizeError(
                f"no operating point is expected to keep {name} at or below {limit:g}: the nearest is "
                f"{point.name!r} with {nearest:g}. Ask for {name}={nearest!r} or more."
            )
        if name == "accuracy_drop":
            return min(allowed, key=lambda point: (point.macs, -point.accuracy))
        return max(allowed, key=lambda point: (point.accuracy, -getattr(point, name)))
