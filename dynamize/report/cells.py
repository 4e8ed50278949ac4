"""The text of every cell, written once: terminal, Markdown and HTML show the same columns and digits."""

from collections.abc import Sequence
from dataclasses import dataclass

from dynamize.calibration.operating import OperatingPoint
from dynamize.report.best import UNNAMED
from dynamize.report.data import ReportData
from dynamize.report.ledger import Interval, Ledger, Row
from dynamize.report.standing import DecisionUse, Standing

ABSENT = "-"
LEFT = "left before"
_MOST_LABELS = 6
_BY_COST = ("little or nothing", "about a quarter", "about half", "about three quarters", "all or nearly all")


@dataclass(frozen=True)
class Column:
    """A column of a table. A line feed in the title is where a narrow face breaks it."""

    title: str
    cells: list[str]
    right: bool = True

    @property
    def heading(self) -> str:
        """The title on one line."""
        return self.title.replace("\n", " ")


def count(value: float) -> str:
    """A count in three digits: 853k, 25.6M, 4.11G."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit * 0.9995:
            return three_digits(value / unit) + name
    return f"{value:.0f}"


def three_digits(value: float) -> str:
    """A positive number in three significant digits without an exponent, at most two of them decimals."""
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{decimals}f}"


def milliseconds(value: float) -> str:
    """Three significant digits, of less than a tenth two."""
    return f"{value:.3f}" if value < 0.0995 else three_digits(value)


def size(value: int | None) -> str:
    """Bytes in three digits: 853 kB, 3.42 MB."""
    if value is None:
        return ABSENT
    text = count(value)
    return f"{text[:-1]} {text[-1]}B" if text[-1].isalpha() else f"{text} B"


def percent(share: float) -> str:
    """A share as per cent with two decimals, without the sign."""
    return f"{100 * share:.2f}"


def drop(share: float) -> str:
    """A loss of accuracy in points, signed: +0.12 is a loss, -0.12 a gain."""
    text = f"{100 * share:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text


def certificate(point: OperatingPoint) -> str:
    """What is certified of a point: drop ≤ 0.50, 95 %."""
    found = point.certified
    if found is None:
        return ABSENT
    limits = {"macs": found.macs, "ms": found.latency_ms}
    kept = [f"drop ≤ {percent(found.max_drop)}"] if found.max_drop is not None else []
    kept += [f"{name} ≤ {count(limit)}" for name, limit in limits.items() if limit is not None]
    return f"{kept[0]}, {found.certain:.0%}"


def half_width(value: float, interval: Interval) -> str:
    """The longer arm of an interval around a share, in points."""
    return percent(max(interval[1] - value, value - interval[0]))


def shares(exits: Sequence[float]) -> str:
    """Whole per cents of the images that leave at each exit, which add up to 100: 43/31/26."""
    if len(exits) < 2:
        return ABSENT
    whole = [int(100 * share) for share in exits]
    by_rest = sorted(range(len(exits)), key=lambda index: whole[index] - 100 * exits[index])
    for index in by_rest[: max(0, 100 - sum(whole))]:
        whole[index] += 1
    return "/".join(map(str, whole))


def option_names(uses: Sequence[DecisionUse]) -> dict[str, float]:
    """What options are called where decisions stand side by side, the cheapest first, each with its mean cost as a
    share of the dearest: by their labels, or by that cost where labels are too many."""
    costs: dict[str, list[float]] = {}
    for use in uses:
        for name, cost in zip(names_of(use, uses), use.costs, strict=True):
            costs.setdefault(name, []).append(cost)
    means = {name: sum(found) / len(found) for name, found in costs.items()}
    return dict(sorted(means.items(), key=lambda item: item[1]))


def names_of(use: DecisionUse, uses: Sequence[DecisionUse]) -> list[str]:
    """The one among `option_names` of each option."""
    if len({option.label for one in uses for option in one.options}) <= _MOST_LABELS:
        return [option.label for option in use.options]
    return [_BY_COST[round(cost * (len(_BY_COST) - 1))] for cost in use.costs]


def option_shares(use: DecisionUse, uses: Sequence[DecisionUse]) -> dict[str, float]:
    """Share of the images by name of the option."""
    found: dict[str, float] = {}
    for name, option in zip(names_of(use, uses), use.options, strict=True):
        found[name] = found.get(name, 0.0) + option.share
    return found


def routings(report: ReportData, standing: Standing) -> str:
    """How many ways through the network there were, in one sentence; empty if that is not known."""
    if not standing.routings or report.images is None:
        return ""
    ways = "way" if standing.routings == 1 else "different ways"
    return f"The {report.images:,} test images took {standing.routings:,} {ways} through the network."


def latency(row: Row, backend: str, batch: str) -> str:
    """Milliseconds of a call."""
    timing = row.latency.get(backend, {}).get(batch)
    return ABSENT if timing is None else milliseconds(timing.median_ms)


def speedup(row: Row, backend: str, batch: str) -> str:
    """How many times faster than the static network."""
    value = row.speedup.get(backend, {}).get(batch)
    return ABSENT if value is None else f"{value:.2f}"


def name_columns(ledger: Ledger) -> list[Column]:
    """Step number and transform, which begin every table of rows."""
    return [
        Column("#", [str(row.step) for row in ledger.rows]),
        Column("transform", [row.transform for row in ledger.rows], right=False),
    ]


def result_columns(ledger: Ledger) -> list[Column]:
    """Size, MACs and accuracy of every row."""
    rows = ledger.rows
    return [
        Column("params", [count(row.params) for row in rows]),
        Column("MACs", [count(row.macs) for row in rows]),
        Column("MACs\nratio", [f"{row.macs_ratio:.2f}" for row in rows]),
        Column("acc\n%", [percent(row.accuracy) for row in rows]),
        Column("±", [half_width(row.accuracy, row.accuracy_ci) for row in rows]),
        Column("drop", [drop(row.accuracy_drop) for row in rows]),
    ]


def size_columns(ledger: Ledger) -> list[Column]:
    """Weights on disk and peak memory of every row; no column for what no row knows."""
    found = {"size": [row.size for row in ledger.rows], "memory": [row.peak_memory for row in ledger.rows]}
    return [Column(title, [*map(size, values)]) for title, values in found.items() if any(values)]


def timing_columns(ledger: Ledger, backend: str, batches: Sequence[str]) -> list[Column]:
    """Milliseconds per call and speed-up over the static network, for each batch size."""
    return _timing(ledger.rows, backend, batches)


def _timing(rows: Sequence[Row], backend: str, batches: Sequence[str]) -> list[Column]:
    columns = []
    for batch in batches:
        columns.append(Column(f"ms\nb{batch}", [latency(row, backend, batch) for row in rows]))
        columns.append(Column(f"x\nb{batch}", [speedup(row, backend, batch) for row in rows]))
    return columns


def exit_column(ledger: Ledger) -> list[Column]:
    """The exit shares of every row; no column if the network is static throughout."""
    cells = [shares(row.exits) for row in ledger.rows]
    return [Column("exits\n%", cells)] if any(cell != ABSENT for cell in cells) else []


def point_columns(points: Sequence[OperatingPoint]) -> list[Column]:
    """The operating points: expected cost and accuracy, half of the 95 % interval, what is certain, exit shares.

    Where the images had no labels, agreement with the original network and disagreement stand in their place.
    """
    right, lost = ("agree\n%", "differ") if all(point.labels == "none" for point in points) else ("acc\n%", "drop")
    columns = [
        Column("point", [point.name for point in points], right=False),
        Column("MACs", [count(point.macs) for point in points]),
        Column("MACs\nratio", [f"{point.macs_ratio:.2f}" for point in points]),
        Column(right, [percent(point.accuracy) for point in points]),
        Column("±", [half_width(point.accuracy, point.accuracy_ci) for point in points]),
        Column(lost, [drop(point.accuracy_drop) for point in points]),
        Column(f"{lost}\n±", [half_width(point.accuracy_drop, point.accuracy_drop_ci) for point in points]),
    ]
    if any(point.latency_ms is not None for point in points):
        times = [ABSENT if point.latency_ms is None else milliseconds(point.latency_ms) for point in points]
        columns.append(Column("ms", times))
    if any(point.certified is not None for point in points):
        columns.append(Column("certain", [certificate(point) for point in points], right=False))
    leaving = [shares(point.exits) for point in points]
    return [*columns, *([Column("exits\n%", leaving)] if any(cell != ABSENT for cell in leaving) else [])]


def standing_columns(report: ReportData, batches: Sequence[str]) -> list[Column]:
    """The operating points as measured on test images, and the drop that calibration images let expect."""
    stands = report.stands
    expected = [report.expected(one.point) for one in stands]
    columns = [
        Column("point", [one.point for one in stands], right=False),
        Column("MACs", [count(one.macs) for one in stands]),
        Column("MACs\nratio", [f"{one.macs_ratio:.2f}" for one in stands]),
        Column("acc\n%", [percent(one.accuracy) for one in stands]),
        Column("±", [half_width(one.accuracy, one.accuracy_ci) for one in stands]),
        Column("drop", [drop(one.accuracy_drop) for one in stands]),
    ]
    if any(expected):
        drops = [ABSENT if one is None else drop(one.accuracy_drop) for one in expected]
        arms = [ABSENT if one is None else half_width(one.accuracy_drop, one.accuracy_drop_ci) for one in expected]
        differ = all(one is None or one.labels == "none" for one in expected)
        columns += [Column("expected\ndiffer" if differ else "expected\ndrop", drops), Column("expected\n±", arms)]
    for backend in report.ledger.backends()[:1]:
        columns += _timing(stands, backend, batches)
    if any(one is not None and one.certified is not None for one in expected):
        columns.append(
            Column("certain", [ABSENT if one is None else certificate(one) for one in expected], right=False)
        )
    leaving = [shares(one.exits) for one in stands]
    return [*columns, *([Column("exits\n%", leaving)] if any(cell != ABSENT for cell in leaving) else [])]


def protocol_columns(report: ReportData) -> list[Column]:
    """What the protocols of the literature give: all images at one exit, then MSDNet's sweep of budgets."""
    marks, whole = [*report.anytime, *report.budgeted], report.ledger.rows[0].macs
    return [
        Column("images leave", [mark.name for mark in marks], right=False),
        Column("MACs", [count(mark.macs) for mark in marks]),
        Column("MACs\nratio", [f"{mark.macs / whole:.2f}" for mark in marks]),
        Column("acc\n%", [percent(mark.accuracy) for mark in marks]),
    ]


def answerer_columns(report: ReportData, standing: Standing) -> list[Column]:
    """A row for each that answers: what it was asked, and what it would have answered alone."""
    answerers = report.answerers
    names = [one.name for one in answerers]
    answered = standing.exits or [*[0.0] * (len(names) - 1), 1.0]
    return [
        Column("", names, right=False),
        Column("answered\n%", [f"{100 * share:.1f}" for share in answered]),
        Column("of these\nright %", [ABSENT if right is None else percent(right) for right in standing.right]),
        Column("alone\nright %", [percent(one.alone) for one in answerers]),
        *(
            Column(f"as {name}\n%", [ABSENT if one.name == name else percent(one.alike[k]) for one in answerers])
            for k, name in enumerate(names)
        ),
    ]


def unit_columns(uses: Sequence[DecisionUse]) -> list[Column]:
    """A row for each gated unit: what share of the images took each option, and of its MACs was executed."""
    columns = [
        Column("gated unit", [use.name for use in uses], right=False),
        Column("MACs", [count(use.options[-1].macs) for use in uses]),
    ]
    taken = [option_shares(use, uses) for use in uses]
    for name in option_names(uses):
        cells = [f"{100 * one[name]:.1f}" if name in one else ABSENT for one in taken]
        columns.append(Column(f"{name}\n%", cells))
    if any(use.left for use in uses):
        columns.append(Column(f"{LEFT}\n%", [f"{100 * use.left:.1f}" for use in uses]))
    return [*columns, Column("MACs run\n%", [f"{100 * use.executed:.1f}" for use in uses])]


def row_notes(ledger: Ledger) -> list[str]:
    """The notes of all rows, each naming its step, then of the rivals; or that there is none."""
    notes = [f"Step {row.step}, {row.transform}: {note}" for row in ledger.rows for note in row.notes]
    if not ledger.rivals and len(ledger.rows) > 1:
        return [*notes, UNNAMED]
    return notes + [f"{row.transform}: {note}" for row in ledger.rivals for note in row.notes]


def legend(ledger: Ledger) -> str:
    """What the columns mean, in one sentence each."""
    results = (
        "MACs: mean executed per image. ±: 95 % interval on the test split. "
        "drop: points lost against the static network."
    )
    sizes = " size: weights as saved. memory: at most at once, for one image in eager PyTorch, weights included."
    timing = " ms: median per call on a batch (b1: batch 1); x: speed-up over the static network, measured in turns."
    return results + (sizes if size_columns(ledger) else "") + (timing if ledger.backends() else "")
