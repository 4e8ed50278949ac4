"""The ledger: one row for each step of a run, the first being the untouched static network.

It is kept as `ledger.json`, a plain list of rows, replaced atomically: a killed run leaves a whole file.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from dynamize.errors import DynamizeError
from dynamize.files import write_text
from dynamize.report import older

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Interval = tuple[float, float]
_ROUNDING = 1e-3


class Timing(BaseModel):
    """Latency of one call on one batch, in milliseconds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    median_ms: Positive
    p95_ms: Positive


class Row(BaseModel):
    """The network as it stands after one step, measured on the test split.

    `macs` is the mean of executed multiply-accumulates per image and `macs_worst` the dearest path;
    `macs_ratio`, `accuracy_drop` and `speedup` are against row 0. `latency` and `speedup` map backend, then
    batch size, to the time of one call on the whole batch and to the ratio of interleaved medians. `decisions`
    maps each decision to the shares of all images that took its options, the cheapest first: an image that left
    before took none, and nobody does where it is off. `leaving` names those at which images leave, by the first
    option. `size` is bytes of the weights as saved, `peak_memory` bytes of weights and feature maps at most at
    once for one image in eager PyTorch; older ledgers have neither.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    step: Annotated[int, Field(ge=0)]
    transform: Annotated[str, Field(min_length=1)]
    params: Annotated[int, Field(ge=0)]
    macs: Annotated[float, Field(ge=0)]
    macs_worst: Annotated[float, Field(ge=0)]
    macs_ratio: Annotated[float, Field(ge=0)]
    accuracy: Share
    accuracy_ci: Interval
    accuracy_drop: float
    agreement: Share
    latency: dict[str, dict[str, Timing]] = {}
    speedup: dict[str, dict[str, Positive]] = {}
    decisions: dict[str, Annotated[list[Share], Field(min_length=2)]] = {}
    leaving: list[str] = []
    seconds: Annotated[float, Field(ge=0)]
    size: Annotated[int, Field(ge=0)] | None = None
    peak_memory: Annotated[int, Field(ge=0)] | None = None
    notes: list[str] = []

    @model_validator(mode="before")
    @classmethod
    def _upgraded(cls, given: Any) -> Any:
        return older.row(given)

    @property
    def exits(self) -> list[float]:
        """Share of the images that leave at each place, the end being the last; empty if they leave nowhere else."""
        left = [self.decisions[name][0] for name in self.leaving]
        return [*left, max(0.0, 1 - sum(left))] if left else []

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if unknown := [name for name in self.leaving if name not in self.decisions]:
            raise ValueError(f"images are said to leave at {unknown[0]!r}, which is not among the decisions")
        here = 1.0
        for name in self.leaving:
            asked = sum(self.decisions[name])
            if asked and abs(asked - here) > _ROUNDING:
                raise ValueError(f"the shares at {name} add up to {asked:.4f}, not to the {here:.4f} who come there")
            here -= self.decisions[name][0]
        for name, shares in self.decisions.items():
            if sum(shares) > 1 + _ROUNDING:
                raise ValueError(f"the shares at {name} add up to {sum(shares):.4f}, more than 1")
        if self.accuracy_ci[0] > self.accuracy_ci[1]:
            raise ValueError(f"accuracy_ci {list(self.accuracy_ci)} is upside down: give [low, high]")
        batches = {batch for timings in self.latency.values() for batch in timings}
        batches |= {batch for ratios in self.speedup.values() for batch in ratios}
        if wrong := sorted(batch for batch in batches if not batch.isdecimal()):
            raise ValueError(f"batch {wrong[0]!r} is not a whole number: key times by batch size")
        return self


RIVAL = "rival: "  # what a rival's name stands behind in `transform`


class Rival(Row):
    """A network that the recipe compares with, in the same rounds as the last row; `step` only goes on counting.

    `lead` is its accuracy on the test images less that of the last row, with the 95 % interval of that paired
    difference.
    """

    lead: float
    lead_ci: Interval


_ROWS = TypeAdapter(list[Row])


class Ledger(BaseModel):
    """All rows of a run, and what a reader must know to believe them.

    `backend` is the one shown first (the first measured one if empty). `rivals` were measured beside the last row. The
    file holds the rows only.
    """

    model_config = ConfigDict(extra="forbid")

    rows: list[Row] = []
    rivals: list[Rival] = []
    title: str = "dynamize report"
    model: str = ""
    command: str = ""
    backend: str = ""
    machine: str = ""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        steps = [row.step for row in self.rows]
        if steps and (steps[0] != 0 or steps != sorted(set(steps))):
            raise ValueError(f"rows have the steps {steps}: they must start at 0 and rise")
        return self

    def with_rivals(self) -> Self:
        """The rivals as rows below the others, for tables."""
        return self.model_copy(update={"rows": [*self.rows, *self.rivals]})

    def backends(self) -> list[str]:
        """The measured backends, the main one first."""
        measured = dict.fromkeys(name for row in self.rows for name in row.latency)
        return sorted(measured, key=lambda name: name != self.backend)

    def batches(self, backend: str) -> list[str]:
        """The batch sizes measured on a backend, smallest first."""
        return sorted({batch for row in self.rows for batch in row.latency.get(backend, {})}, key=int)

    def to_json(self) -> str:
        """The rows as a JSON list, with a line feed at the end."""
        return json.dumps(_ROWS.dump_python(self.rows, mode="json"), indent=1) + "\n"

    def write(self, path: str | Path) -> None:
        """Write `to_json()` under a temporary name beside `path` and move it there in one piece."""
        write_text(Path(path), self.to_json())

    @classmethod
    def read(cls, path: str | Path, **about: Any) -> Self:
        """The ledger in the file `path`; `about` gives title, model, command, backend, machine, rivals.

        Raises `DynamizeError` if the file is missing, is not JSON or does not hold ledger rows.
        """
        try:
            given = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise DynamizeError(
                f"{path}: cannot be read ({error.strerror}). Name the ledger.json in the folder of a run."
            ) from error
        except ValueError as error:
            raise DynamizeError(
                f"{path}: not valid JSON ({error}). Restore the file, or write it anew with `dynamize run`."
            ) from error
        try:
            return cls(rows=_ROWS.validate_python(given), **about)
        except ValidationError as error:
            raise DynamizeError(
                f"{path}: not a ledger of this version ({_first_fault(error)}). "
                "Correct that field, or write the file anew with `dynamize run`."
            ) from error


def _first_fault(error: ValidationError) -> str:
    """Where and what, for the first thing that pydantic refused."""
    fault = error.errors()[0]
    where = list(fault["loc"])
    named = [f"row {where.pop(0)}"] if where and isinstance(where[0], int) else []
    named += [".".join(map(str, where))] if where else []
    return ": ".join([*named, fault["msg"].removeprefix("Value error, ")])


def headline(ledger: Ledger) -> str:
    """The last row against the first in one sentence: MACs, time on the main backend, accuracy."""
    if not ledger.rows:
        raise DynamizeError("The ledger has no rows, so there is nothing to report. Use `dynamize run` first.")
    first, last = ledger.rows[0], ledger.rows[-1]
    if last is first:
        return f"The static network: accuracy {100 * first.accuracy:.2f} %; no step has been taken."
    saved = round(100 * (1 - last.macs_ratio))
    parts = [f"{abs(saved)} % {'fewer' if saved > 0 else 'more'} MACs" if saved else "As many MACs"]
    for backend in ledger.backends()[:1]:
        speedups = last.speedup.get(backend, {})
        times = [f"{speedups[batch]:.2f}x at batch {batch}" for batch in sorted(speedups, key=int)]
        parts += [f"speed {' and '.join(times)} in {backend}"] if times else []
    parts.append(f"accuracy {100 * first.accuracy:.2f} % to {100 * last.accuracy:.2f} %")
    return "; ".join(parts) + "."
