"""What a recipe expects of its last row: by itself, against the original network, or against an earlier run."""

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dynamize.calibration.operating import no_ratio

AGAINST_BASELINE = ("slowdown", "macs_growth")  # figures that mean nothing without an earlier run


class Bound(BaseModel):
    """A smallest and a largest value that a figure of the last row may have."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, json_schema_extra={"minProperties": 1})

    min: float | None = None
    max: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _has_a_side(cls, given: Any) -> Any:
        if isinstance(given, int | float) and not isinstance(given, bool):
            raise ValueError(
                f"is it the smallest or the largest value? Write {{min: {given:g}}} or {{max: {given:g}}} "
                f"(given: {given:g})"
            )
        return given

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("says neither a smallest nor a largest value: write {min: ...}, {max: ...} or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}, so that nothing is between: exchange them")
        return self


class Expect(BaseModel):
    """What CI enforces about the last row of the ledger.

    With a ``baseline`` three figures compare with its last row: ``accuracy_drop``, ``slowdown`` and ``macs_growth``.
    The others are of this run alone.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        json_schema_extra={"dependentRequired": {name: ["baseline"] for name in AGAINST_BASELINE}},
    )

    baseline: Path | None = Field(
        None,
        description="ledger.json of an earlier run of the same steps, or that run's folder; relative to the recipe",
    )
    accuracy: Bound | None = Field(None, description="in percent")
    accuracy_drop: Bound | None = Field(
        None, description="in points: against the baseline where one is given, else against the original network"
    )
    macs_ratio: Bound | None = Field(None, description="executed MACs as a share of the original network's")
    speedup: Bound | None = Field(
        None, description="over the original network, on the first backend, the smallest over the batch sizes"
    )
    agreement: Bound | None = Field(None, description="same answers as the original network, in percent")
    slowdown: Bound | None = Field(
        None,
        description="needs a baseline: its speed-up over this run's, each over the original network of its own run, so "
        "that another machine changes nothing; on the first backend, the largest over the batch sizes",
    )
    macs_growth: Bound | None = Field(None, description="needs a baseline: executed MACs over the baseline's")

    @field_validator("accuracy", "agreement")
    @classmethod
    def _in_percent(cls, bound: Bound | None) -> Bound | None:
        for value in _values(bound):
            if 0 < value < 1 or not 0 <= value <= 100:
                raise ValueError(f"percent are meant, from 0 to 100: write 90 for 90 % (given: {value:g})")
        return bound

    @field_validator("macs_ratio")
    @classmethod
    def _is_a_share(cls, bound: Bound | None) -> Bound | None:
        for value in _values(bound):
            if fault := no_ratio(value):
                raise ValueError(f"{fault} (given: {value:g})")
        return bound

    @field_validator(*AGAINST_BASELINE)
    @classmethod
    def _is_a_quotient(cls, bound: Bound | None) -> Bound | None:
        for value in _values(bound):
            if value <= 0:
                raise ValueError(f"a quotient is meant, 1 where nothing changed: write 1.1 for a tenth more "
                                 f"(given: {value:g})")  # fmt: skip
        return bound

    @model_validator(mode="after")
    def _has_a_baseline(self) -> Self:
        for name in AGAINST_BASELINE:
            if self.baseline is None and getattr(self, name) is not None:
                raise ValueError(f"{name} compares with an earlier run: name its ledger, e.g. baseline: ledger.json")
        return self

    def bounds(self) -> dict[str, Bound]:
        """Those that are given, by figure."""
        found = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: bound for name, bound in found.items() if isinstance(bound, Bound)}


def _values(bound: Bound | None) -> list[float]:
    return [] if bound is None else [value for value in (bound.min, bound.max) if value is not None]
