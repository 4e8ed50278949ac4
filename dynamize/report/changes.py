"""What a recipe expected beside what came out, and what changed since an earlier run: for terminals, pull requests."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from dynamize.report import cells
from dynamize.report.cells import ABSENT, Column
from dynamize.report.ledger import Ledger, Row
from dynamize.report.markdown import plain, table


@dataclass(frozen=True)
class Finding:
    """A figure of the last row, in the unit of the recipe, which has to be between ``least`` and ``most``.

    ``against`` says what it compares with, nothing where it stands alone.
    """

    figure: str
    value: float
    least: float | None
    most: float | None
    against: str = ""

    @property
    def kept(self) -> bool:
        """Whether it is."""
        low = self.least is not None and self.value < self.least
        high = self.most is not None and self.value > self.most
        return not (low or high)

    @property
    def text(self) -> str:
        """The value in as many digits as it takes to see on which side of a bound it is."""
        bounds = [bound for bound in (self.least, self.most) if bound is not None and bound != self.value]
        for digits in range(3, 10):
            text = f"{self.value:.{digits}f}"
            if all(not math.isclose(float(text), bound, rel_tol=1e-12) for bound in bounds):
                return text
        return repr(self.value)


@dataclass(frozen=True)
class Change:
    """A figure of the last row in an earlier run and in this one, as texts, and by how much it differs."""

    figure: str
    before: str
    now: str
    change: str


@dataclass(frozen=True)
class Verdict:
    """What was expected, what changed since the baseline if there is one, and what to know about that comparison."""

    findings: list[Finding]
    changes: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[Finding]:
        """Expectations that do not hold."""
        return [one for one in self.findings if not one.kept]


def changes(before: Ledger, now: Ledger) -> list[Change]:
    """The last rows of two runs of one recipe, and the accuracy of the network that both began with."""
    old, new = before.rows[-1], now.rows[-1]
    found = [
        _points("original network, accuracy %", before.rows[0].accuracy, now.rows[0].accuracy),
        _points("accuracy %", old.accuracy, new.accuracy),
        _points("agreement %", old.agreement, new.agreement),
        _times("MACs", old.macs, new.macs, cells.count),
        _times("MACs, dearest path", old.macs_worst, new.macs_worst, cells.count),
        _times("parameters", old.params, new.params, cells.count),
    ]
    if old.size and new.size:
        found.append(_times("size", old.size, new.size, lambda value: cells.size(round(value))))
    for backend in new.speedup:
        found += _speedups(old, new, backend)
    return found


def finding_columns(findings: list[Finding]) -> list[Column]:
    """A row for each expectation."""
    return [
        Column("expected", [one.figure for one in findings], right=False),
        Column("against", [one.against or ABSENT for one in findings], right=False),
        Column("at least", [_bound(one.least) for one in findings]),
        Column("at most", [_bound(one.most) for one in findings]),
        Column("found", [one.text for one in findings]),
        Column("", ["kept" if one.kept else "missed" for one in findings], right=False),
    ]


def change_columns(found: list[Change]) -> list[Column]:
    """A row for each figure."""
    return [
        Column("last step", [one.figure for one in found], right=False),
        Column("baseline", [one.before for one in found]),
        Column("now", [one.now for one in found]),
        Column("change", [one.change for one in found]),
    ]


def markdown(verdict: Verdict, title: str) -> str:
    """For a pull request."""
    missed, asked = len(verdict.failures), len(verdict.findings)
    found = f"**Missed: {missed} of {asked} expectations.**" if missed else f"Kept: all of {asked} expectations."
    blocks = [f"## {plain(title)}", *([found] if asked else [])]
    blocks += [table(finding_columns(verdict.findings))] if verdict.findings else []
    if verdict.changes:
        blocks += ["### Since the baseline", table(change_columns(verdict.changes))]
        blocks += ["Speed-ups are over the original network of the same run, so that machines do not matter."]
    blocks += ["\n".join(f"- {plain(note)}" for note in verdict.notes)]
    return "\n\n".join(filter(None, blocks)) + "\n"


def _points(figure: str, old: float, new: float) -> Change:
    text = f"{100 * (new - old):+.2f}"
    return Change(figure, cells.percent(old), cells.percent(new), "0.00" if float(text) == 0 else f"{text} points")


def _times(figure: str, old: float, new: float, text: Callable[[float], str]) -> Change:
    return Change(figure, text(old), text(new), f"{new / old:.3f} x" if old else ABSENT)


def _speedups(old: Row, new: Row, backend: str) -> list[Change]:
    earlier, here = old.speedup.get(backend, {}), new.speedup.get(backend, {})
    return [
        _times(f"speed-up, {backend}, batch {batch}", earlier[batch], here[batch], "{:.2f} x".format)
        for batch in sorted(earlier.keys() & here, key=int)
    ]


def _bound(value: float | None) -> str:
    return ABSENT if value is None else f"{value:g}"
