"""The report as one HTML page that holds everything it shows: no file beside it, no request to anywhere.

What the slider moves is written once for each operating point and shown or hidden, so that the page says the same
without JavaScript; only the charts are drawn by it.
"""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dynamize.report import cells
from dynamize.report.best import best
from dynamize.report.curves import curves
from dynamize.report.data import ReportData
from dynamize.report.ledger import RIVAL, Row, headline
from dynamize.report.moving import FEW_CLASSES, matrix, moving, shade
from dynamize.report.verdicts import verdicts

_UNITS = {"python": "Python", "threads": ""}  # of versions, how they are called; what is told elsewhere is left out


def render(report: ReportData) -> str:
    """The whole page as text; write it as UTF-8.

    Raises `DynamizeError` if the ledger has no rows.
    """
    ledger, shown = report.ledger, report.ledger.with_rivals()
    summary = headline(ledger)
    names = report.exit_names()
    columns, groups = _ledger_table(report)
    backends = ledger.backends()
    batches = ledger.batches(backends[0]) if backends else []
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            report=report,
            ledger=ledger,
            shown=shown,
            headline=summary,
            best=best(ledger),
            verdicts=verdicts(ledger),
            columns=columns,
            groups=groups,
            legend=cells.legend(ledger),
            count=cells.count,
            drop=cells.drop,
            notes=cells.row_notes(ledger) + report.notes,
            points=moving(report),
            here=report.here,
            charts=_charts(report),
            view=_view(report),
            curves=curves(report.metrics, names),
            every=cells.standing_columns(report, batches) if report.standings else [],
            static_matrix=matrix(report.classes),
            few=FEW_CLASSES,
            colors=_colors(len(names)),
            shade=shade,
            exit_names=names,
            facts=_facts(report),
        )
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _ledger_table(report: ReportData) -> tuple[list[cells.Column], list[tuple[str, int]]]:
    """Columns, and over how many of them each backend stands."""
    ledger, shown = report.ledger, report.ledger.with_rivals()
    columns = cells.name_columns(shown) + cells.result_columns(shown) + cells.size_columns(shown)
    groups = [("", len(columns))]
    for backend in ledger.backends():
        timing = cells.timing_columns(shown, backend, ledger.batches(backend))
        groups.append((backend, len(timing)))
        columns += timing
    exits = cells.exit_column(shown)
    return columns + exits, [group for group in [*groups, ("", len(exits))] if group[1]]


def _charts(report: ReportData) -> list[dict[str, str]]:
    """Accuracy against each cost: MACs, and time for each size of a batch on the main backend."""
    found = [{"key": "macs", "title": "Accuracy against MACs", "about": "mean per image"}]
    for backend in report.ledger.backends()[:1]:
        for batch in report.ledger.batches(backend):
            found.append({"key": batch, "title": "Accuracy against time", "about": f"batch {batch}, {backend}"})
    return found


def _view(report: ReportData) -> dict[str, Any]:
    """What the script in the page draws from."""
    first = report.ledger.rows[0]
    return {
        "points": [_mark(one.point, one, report) for one in report.stands],
        "static": _mark("static", first, report),
        "rivals": [_mark(one.transform.removeprefix(RIVAL), one, report) for one in report.ledger.rivals],
        "anytime": [mark.model_dump(mode="json") for mark in report.anytime],
        "budgeted": [mark.model_dump(mode="json") for mark in report.budgeted],
        "selected": report.here,
    }


def _mark(name: str, row: Row, report: ReportData) -> dict[str, Any]:
    """Where a network lies on the charts."""
    times = {
        batch: timing.median_ms
        for backend in report.ledger.backends()[:1]
        for batch, timing in row.latency.get(backend, {}).items()
    }
    kept = row.model_dump(mode="json", include={"accuracy", "accuracy_ci", "macs"})
    return {"name": name, "told": f"{cells.percent(row.accuracy)} %, {cells.count(row.macs)} MACs", **kept, **times}


def _facts(report: ReportData) -> list[tuple[str, str]]:
    """What the numbers depend on."""
    ledger = report.ledger
    versions = [
        f"{_UNITS.get(name, name)} {version}" for name, version in report.versions.items() if _UNITS.get(name, name)
    ]
    found = {
        "Command": ledger.command,
        "Machine": ledger.machine,
        "Backend": ", ".join(ledger.backends()),
        "Versions": ", ".join(versions),
    }
    return [(name, value) for name, value in found.items() if value]


def _colors(count: int) -> list[str]:
    """One colour for each exit, from teal (early) to violet (last)."""
    steps = max(count - 1, 1)
    return [f"hsl({176 + 86 * index / steps:.0f} 48% 42%)" for index in range(count)]
