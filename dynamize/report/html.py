"""The report as one HTML page that holds everything it shows: no file beside it, no request to anywhere."""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dynamize.calibration.operating import OperatingPoint
from dynamize.report import cells
from dynamize.report.best import best
from dynamize.report.data import DecisionUse, Network, ReportData, Usage
from dynamize.report.ledger import Row, headline
from dynamize.report.verdicts import verdicts

_GREY = 1 / 8  # cost of an option, as a share of the dearest one's, up to which it has no blue
_DARK = 0.9  # from which its blue takes white text

SHARED_FIELDS = {"accuracy", "accuracy_ci", "accuracy_drop", "macs", "macs_ratio"}


def render(report: ReportData) -> str:
    """The whole page as text; write it as UTF-8.

    Raises `DynamizeError` if the ledger has no rows.
    """
    ledger, shown = report.ledger, report.ledger.with_rivals()
    summary = headline(ledger)
    columns = cells.name_columns(shown) + cells.result_columns(shown) + cells.size_columns(shown)
    groups = [("", len(columns))]
    for backend in ledger.backends():
        timing = cells.timing_columns(shown, backend, ledger.batches(backend))
        groups.append((backend, len(timing)))
        columns += timing
    exits = cells.exit_column(shown)
    columns += exits
    groups.append(("", len(exits)))
    return (
        _environment()
        .get_template("template.html.j2")
        .render(
            report=report,
            ledger=ledger,
            shown=shown,
            headline=summary,
            best=best(ledger),
            verdicts=verdicts(ledger),
            columns=columns,
            groups=[group for group in groups if group[1]],
            legend=cells.legend(ledger),
            count=cells.count,
            notes=cells.row_notes(ledger) + report.notes,
            view=_view(report),
            colors=_colors(len(report.exit_names())),
            exit_names=report.exit_names(),
            gates=_gates(report.usage) if report.usage and report.usage.changing else None,
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


def _view(report: ReportData) -> dict[str, Any]:
    """What the script in the page draws from. Without operating points the last row stands for one."""
    points = sorted(report.operating_points, key=lambda point: point.macs)
    static, label = report.static, report.latency_label
    first, last = report.ledger.rows[0], report.ledger.rows[-1]
    if not points:
        ms, label = _row_latency(report)
        static = _network("static network", first, ms.get(first.step))
        shown = [_from_row(last, ms.get(last.step), _row_speedup(report, last))]
    else:
        static = static or _network("static network", first, None)
        shown = [_from_point(point, static, report.leaving) for point in points]
    return {
        "points": shown,
        "static": static.model_dump(mode="json"),
        "rivals": [rival.model_dump(mode="json") for rival in report.rivals],
        "anytime": [mark.model_dump(mode="json") for mark in report.anytime],
        "budgeted": [mark.model_dump(mode="json") for mark in report.budgeted],
        "exits": report.exit_names(),
        "colors": _colors(len(report.exit_names())),
        "latency": label,
        "selected": _selected(report, points, last),
    }


def _gates(usage: Usage) -> dict[str, Any]:
    """The bars of the gated units: pieces of (name, share, class, colour)."""
    costs = cells.option_names(usage)
    kinds = [(name, "path", _shade(cost)) for name, cost in costs.items()]
    if any(unit.left for unit in usage.changing):
        kinds.append((cells.LEFT, "gone", ""))
    units = [
        {"label": unit.name, "kind": unit.kind, "executed": unit.executed, "pieces": _pieces(unit, usage, costs)}
        for unit in usage.changing
    ]
    return {"units": units, "kinds": kinds, "routings": cells.routings(usage)}


def _pieces(unit: DecisionUse, usage: Usage, costs: dict[str, float]) -> list[tuple[str, float, str, str]]:
    """Each under the label of its own option, coloured as the options beside it."""
    pieces = []
    for name, option in zip(cells.names_of(unit, usage), unit.options, strict=True):
        look = "path pale" if costs[name] < _DARK else "path"
        pieces.append((option.label, option.share, look, _shade(costs[name])))
    return [*pieces, (cells.LEFT, unit.left, "gone pale", "")]


def _selected(report: ReportData, points: list[OperatingPoint], last: Row) -> int:
    """The named point, or the one that costs what the last row was measured to cost."""
    for index, point in enumerate(points):
        if point.name == report.selected:
            return index
    return min(range(len(points)), key=lambda index: abs(points[index].macs - last.macs), default=0)


def _from_point(point: OperatingPoint, static: Network, leaving: list[str]) -> dict[str, Any]:
    speedup = static.latency_ms / point.latency_ms if static.latency_ms and point.latency_ms else None
    thresholds = [point.thresholds.get(name) for name in leaving]
    return point.model_dump(mode="json") | {"speedup": speedup, "thresholds": thresholds}


def _from_row(row: Row, latency_ms: float | None, speedup: float | None) -> dict[str, Any]:
    return {
        **row.model_dump(mode="json", include=SHARED_FIELDS),
        "name": f"step {row.step}, {row.transform}",
        "exits": row.exits,
        "thresholds": [],
        "accuracy_drop_ci": None,
        "macs_ci": None,
        "latency_ms": latency_ms,
        "latency_ci": None,
        "speedup": speedup,
    }


def _network(name: str, row: Row, latency_ms: float | None) -> Network:
    return Network(name=name, macs=row.macs, accuracy=row.accuracy, accuracy_ci=row.accuracy_ci, latency_ms=latency_ms)


def _row_latency(report: ReportData) -> tuple[dict[int, float], str]:
    """Milliseconds by step on the main backend at its smallest batch, and what they are."""
    ledger = report.ledger
    for backend in ledger.backends():
        batch = ledger.batches(backend)[0]
        timings = {row.step: row.latency.get(backend, {}).get(batch) for row in ledger.rows}
        known = {step: timing.median_ms for step, timing in timings.items() if timing}
        return known, f"ms per call, batch {batch}, {backend}"
    return {}, report.latency_label


def _row_speedup(report: ReportData, row: Row) -> float | None:
    for backend in report.ledger.backends():
        return row.speedup.get(backend, {}).get(report.ledger.batches(backend)[0])
    return None


def _colors(count: int) -> list[str]:
    """One colour for each exit, from teal (early) to violet (last)."""
    steps = max(count - 1, 1)
    return [f"hsl({176 + 86 * index / steps:.0f} 48% 42%)" for index in range(count)]


def _shade(cost: float) -> str:
    """The dearer the option the darker its blue; the page's own grey for what costs little or nothing."""
    return f"hsl(225 {45 + 20 * cost:.0f}% {84 - 36 * cost:.0f}%)" if cost > _GREY else ""
