"""The report as rich tables that fit a terminal of 80 columns.

Nothing is printed here: the caller has the console.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from dynamize.report import cells
from dynamize.report.best import best
from dynamize.report.cells import Column
from dynamize.report.data import ReportData
from dynamize.report.ledger import headline
from dynamize.report.verdicts import verdicts

LONGEST_CELL = 10
"""Characters: with this an ordinary ledger is at most 80 columns wide."""

WIDTH = 80
BATCHES_BESIDE_RESULTS = 2
UNLIMITED = 10_000


def render(report: ReportData) -> Group:
    """The ledger, sizes, further backends, the operating points, then what the reader must be told.

    Raises `DynamizeError` if the ledger has no rows.
    """
    return Group(*_parts(report))


def summary(report: ReportData) -> list[Text]:
    """What the last row came to against the first in a sentence, below one on what would be better, if anything is.

    Raises `DynamizeError` if the ledger has no rows.
    """
    found = headline(report.ledger)
    return [*(Text(line, style="bold") for line in [best(report.ledger)] if line), Text(found)]


def text(report: ReportData) -> str:
    """The same as plain text, for ``print``."""
    console = Console(width=WIDTH, color_system=None, highlight=False, markup=False, emoji=False)
    with console.capture() as capture:
        console.print(render(report))
    return capture.get().rstrip()


def _parts(report: ReportData) -> Iterator[RenderableType]:
    ledger, shown = report.ledger, report.ledger.with_rivals()
    lines = summary(report)
    backends = ledger.backends()
    main = backends[:1]
    yield Text(" · ".join(filter(None, [ledger.title, ledger.model])), style="bold")
    yield from lines
    yield Text()
    parts = [cells.result_columns(shown)]
    for backend in main:
        parts.append(cells.timing_columns(shown, backend, _shown_batches(ledger.batches(backend))))
    yield _Fitted(cells.name_columns(shown), [*parts, cells.exit_column(shown)])
    yield from (Text(f"ms and x: {backend}", style="dim") for backend in main)
    if sizes := cells.size_columns(shown):
        yield from (Text(), _Fitted(cells.name_columns(shown), [sizes]))
    for backend in backends:
        batches = ledger.batches(backend)
        if backend not in main or len(batches) > BATCHES_BESIDE_RESULTS:
            timing = [cells.timing_columns(shown, backend, [batch]) for batch in batches]
            yield from (Text(), _Fitted(cells.name_columns(shown), timing))
            yield Text(f"ms and x: {backend}", style="dim")
    if report.operating_points:
        yield from _points(report)
    if report.changing and (told := cells.routings(report, report.stands[report.here])):
        yield Text("\n" + told)
    yield Text("\n" + cells.legend(ledger), style="dim")
    yield from (Text(f"! {line}", style="yellow") for line in verdicts(ledger))
    yield from (Text(f"- {line}") for line in cells.row_notes(ledger) + report.notes)


def _points(report: ReportData) -> Iterator[RenderableType]:
    """The operating points as measured, or else as calibration expects them."""
    yield Text("\nOperating points", style="bold")
    told = "±: the longer arm of the 95 % interval."
    if not report.standings:
        name, *values = cells.point_columns(report.operating_points)
        yield _Fitted([name], [values[:3], values[3:6], values[6:]])
        yield Text(f"Expected values, from calibration images; {told}", style="dim")
        return
    backends = report.ledger.backends()
    batches = _shown_batches(report.ledger.batches(backends[0])) if backends else []
    name, *values = cells.standing_columns(report, batches)
    yield _Fitted([name], [values[:5], values[5:]])
    yield Text(f"Measured on the test images; expected: from calibration images. {told}", style="dim")


def _shown_batches(batches: Sequence[str]) -> list[str]:
    """The smallest and the largest batch: beside the results there is no room for more."""
    return list(dict.fromkeys([*batches[:1], *batches[-1:]]))


@dataclass(frozen=True)
class _Fitted:
    """One table if the console is wide enough for it, else one for each part, all with the same names."""

    names: list[Column]
    parts: list[list[Column]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        parts = [part for part in self.parts if part]
        whole = _table([*self.names, *chain.from_iterable(parts)])
        if Measurement.get(console, options.update(width=UNLIMITED), whole).maximum <= options.max_width:
            yield whole
        else:
            for number, part in enumerate(parts):
                yield Group(*[Text()][:number], _table([*self.names, *part]))


def _table(columns: Sequence[Column]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for column in columns:
        table.add_column(Text(column.title), justify="right" if column.right else "left", overflow="fold")
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*(Text(_broken(cell)) for cell in row))
    return table


def _broken(cell: str) -> str:
    """A long cell on several lines: exit shares after a stroke, names after an underscore."""
    mark = "/" if cell.replace("/", "").isdigit() else "_"
    lines = [""]
    for piece in cell.replace(mark, mark + "\n").split("\n"):
        if lines[-1] and len(lines[-1] + piece) > LONGEST_CELL:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)
