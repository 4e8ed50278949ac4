"""Operating points as data: settings with what to expect from them, picked by what they cost or lose."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel, model_validator

from dynamize.errors import DynamizeError, rounded_up
from dynamize.nn.joining import Joining

_SLACK = 1e-9
_MOST_DIGITS = 9
_MOST_RATIO = 2.0  # with all heads and gates on top, a network costs more than the original, but not this much

Pair = tuple[float, float]


class Certificate(BaseModel):
    """What holds with confidence ``certain`` over draws of the ``images`` it was tested on: the limit that is given.

    ``max_drop`` is a fraction, ``macs`` and ``latency_ms`` a mean per image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_drop: float | None = None
    macs: float | None = None
    latency_ms: float | None = None
    certain: float = Field(gt=0, lt=1)
    images: int = Field(gt=0)


class OperatingPoint(BaseModel):
    """One setting: a threshold for each decision at which images leave (None = off; score >= threshold leaves), the
    offset of all others, and how the answers of several networks in a row are joined.

    Expected values are cross-fitted on calibration images; each interval is where the value of a fresh set
    of as many images falls with 95 % probability. Accuracies and drops are fractions, macs per image,
    latency in ms per image without the machine's own noise; exits are the expected shares (K,). labels: "none" where
    the images had none: accuracy is agreement with the original network then, and accuracy_drop disagreement, which
    the drop cannot exceed. certified: what was tested to hold besides, if anything was. images: how many calibration
    images all this stands on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    thresholds: dict[str, float | None]
    offset: float = 0.0
    combine: Joining = "last"
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
    labels: Literal["given", "none"] = "given"
    certified: Certificate | None = None
    images: int | None = Field(None, gt=0)

    def __str__(self) -> str:
        what = "right" if self.labels == "given" else "as the original network answers"
        time = "" if self.latency_ms is None else f", {self.latency_ms:.3g} ms"
        lost = f"drop {100 * self.accuracy_drop:+.2f} points"
        return f"{self.name}: {self.macs_ratio:.3f} of the MACs{time}, {self.accuracy:.1%} {what}, {lost}"

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
    """A sequence of points, the cheapest first; `points["macs-0.50"]`, `points["chosen"]` and `points[0]` all work."""

    model_config = ConfigDict(frozen=True)

    def __str__(self) -> str:
        return "\n".join(map(str, self.root))

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
        named = [point for point in self.root if point.name.partition("-")[0] == key]
        if len(named) == 1:
            return named[0]
        names = ", ".join(point.name for point in self.root)
        raise DynamizeError(f"there is no operating point {key!r}: choose one of {names}.")

    def at(
        self,
        *,
        macs_ratio: float | None = None,
        macs: float | None = None,
        latency_ms: float | None = None,
        max_drop: float | None = None,
    ) -> OperatingPoint:
        """For a cost the most accurate point expected not to exceed it; for a largest accuracy drop (in points, as
        in a recipe) the point of the fewest MACs expected not to lose more. DynamizeError, naming the nearest,
        where there is none."""
        asked = {"macs_ratio": macs_ratio, "macs": macs, "latency_ms": latency_ms, "max_drop": max_drop}
        given = {name: value for name, value in asked.items() if value is not None}
        if len(given) != 1:
            raise DynamizeError(
                f"{len(given)} limits were given ({', '.join(given) or 'none'}): give exactly one of "
                f"{', '.join(asked)}, for example at(macs_ratio=0.5)."
            )
        ((name, limit),) = given.items()
        if not math.isfinite(limit) or (limit <= 0 and name != "max_drop"):
            raise DynamizeError(f"{name}={limit} is no limit: give a positive number.")
        if name == "macs_ratio" and (fault := no_ratio(limit)):
            raise DynamizeError(f"{name}={limit:g}: {fault}")
        return self._within(name, limit)

    def _within(self, name: str, limit: float) -> OperatingPoint:
        measured = [(value, point) for point in self.root if (value := _stated(point, name)) is not None]
        if not measured:
            raise DynamizeError(f"no operating point states {name}: measure it first, or ask for macs_ratio.")
        allowed = [point for value, point in measured if value <= limit + abs(limit) * _SLACK]
        if not allowed:
            nearest, point = min(measured, key=lambda pair: pair[0])
            raise DynamizeError(
                f"no operating point is expected to keep {name} at or below {limit:g}: the nearest is "
                f"{point.name!r} with {nearest:g}. Ask for {name}={rounded_up(nearest)} or more."
            )
        if name == "max_drop":
            return min(allowed, key=lambda point: (point.macs, -point.accuracy))
        return max(allowed, key=lambda point: (point.accuracy, -getattr(point, name)))


def undominated(points: Iterable[OperatingPoint], measure: str = "macs") -> list[OperatingPoint]:
    """Those than which no other one is both as cheap and as accurate, the cheapest first.

    Args:
        measure: "macs" or "ms", the cost meant.
    """
    front: list[OperatingPoint] = []
    for point in sorted(points, key=lambda one: (_cost(one, measure), -one.accuracy)):
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return front


def named_by_cost(points: Sequence[OperatingPoint], static: float, measure: str = "macs") -> list[OperatingPoint]:
    """The points, which are named after what they are for ("macs", "chosen"), as "macs-0.48": with their own cost as a
    share of the static network's, in as many digits as it takes to tell them apart.

    Args:
        static: cost of the static network under ``measure``.
    """
    ratios = [_cost(point, measure) / static for point in points]
    names: list[str] = []
    for digits in range(2, _MOST_DIGITS):
        names = [f"{point.name}-{ratio:.{digits}f}" for point, ratio in zip(points, ratios, strict=True)]
        if len(set(names)) == len(names):
            break
    return [point.model_copy(update={"name": name}) for point, name in zip(points, names, strict=True)]


def _cost(point: OperatingPoint, measure: str) -> float:
    cost = point.macs if measure == "macs" else point.latency_ms
    assert cost is not None, "what is solved for milliseconds states them"
    return cost


def no_ratio(value: float) -> str | None:
    """Why a number is no share of the original network's MACs, for an error message; None if it may be one."""
    if value <= _MOST_RATIO:
        return None
    percent = f", not {value:g} % of them" if value <= 100 else ""
    meant = value / 100 if value <= 100 else 0.5
    return f"a share of the original network's MACs is meant{percent}: write {meant:g} for {100 * meant:g} %"


def _stated(point: OperatingPoint, limit: str) -> float | None:
    """What a point states of a limit, in its unit."""
    stated: float | None = 100 * point.accuracy_drop if limit == "max_drop" else getattr(point, limit)
    return stated
