"""Training curves from the metrics that steps wrote, as points of small charts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dynamize.report.cells import three_digits


@dataclass(frozen=True)
class Line:
    """A line of a chart: `points` lie in a square of 100, y downwards; `last` is the value at its end, as text."""

    name: str
    points: list[tuple[float, float]]
    last: str

    @property
    def path(self) -> str:
        """As SVG has it."""
        return " ".join(f"{x:.2f},{y:.2f}" for x, y in self.points)


@dataclass(frozen=True)
class Curve:
    """A small chart over the epochs of one step; `low` and `high` are the ends of its axis, as text."""

    step: str
    title: str
    epochs: int
    low: str
    high: str
    lines: list[Line]


def curves(metrics: Sequence[dict[str, Any]], exits: Sequence[str]) -> list[Curve]:
    """Accuracy on calibration images and loss, for each step that trained.

    Args:
        metrics: a row for each epoch: step, epoch, loss and calibration_accuracy by exit, if it has these; and the
            member of a row of networks that it is of.
        exits: names of the exits.
    """
    found = []
    for rows in _by_step(metrics):
        step, epochs = str(rows[0].get("step", "training")), len(rows)
        step += f" of {rows[0]['member']}" if "member" in rows[0] else ""
        right = [row["calibration_accuracy"] for row in rows if row.get("calibration_accuracy")]
        if right:
            every = list(zip(*right, strict=False))
            known = len(every) >= len(exits) - 1  # those in front of the network's own may have learned without it
            names = exits[: len(every)] if known else [f"exit {k + 1}" for k in range(len(every))]
            names = names if len(every) > 1 else ["network"]
            lines = {name: [100 * value for value in values] for name, values in zip(names, every, strict=True)}
            found.append(_curve(step, "accuracy on calibration images, %", epochs, lines))
        losses = [float(row["loss"]) for row in rows if isinstance(row.get("loss"), int | float)]
        if losses:
            found.append(_curve(step, "loss", epochs, {"loss": losses}))
    return found


def _by_step(metrics: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of one step together; the next one has another name, or begins with the first epoch again."""
    found: list[list[dict[str, Any]]] = []
    for row in metrics:
        before = found[-1][-1] if found else None
        if before is None or row.get("step") != before.get("step") or row.get("epoch", 0) <= before.get("epoch", 0):
            found.append([])
        found[-1].append(row)
    return found


def _curve(step: str, title: str, epochs: int, values: dict[str, list[float]]) -> Curve:
    every = [value for line in values.values() for value in line]
    low, high = min(every), max(every)
    span = high - low or 1.0
    lines = [
        Line(
            name,
            [(100 * k / max(1, len(line) - 1), 100 * (high - value) / span) for k, value in enumerate(line)],
            three_digits(line[-1]),
        )
        for name, line in values.items()
    ]
    return Curve(step, title, epochs, three_digits(low), three_digits(high), lines)
