"""The report as Markdown tables, for a pull request or a README."""

from collections.abc import Sequence

from dynamize.report import cells
from dynamize.report.best import best
from dynamize.report.cells import Column
from dynamize.report.data import ReportData
from dynamize.report.ledger import headline
from dynamize.report.verdicts import verdicts


def render(report: ReportData) -> str:
    """The same facts as in the terminal and every gated unit, with every backend and batch size in one table.

    Raises `DynamizeError` if the ledger has no rows.
    """
    ledger, shown = report.ledger, report.ledger.with_rivals()
    blocks = [f"# {plain(ledger.title)}", plain(best(ledger)), plain(headline(ledger)), _about(report)]
    columns = cells.name_columns(shown) + cells.result_columns(shown) + cells.size_columns(shown)
    backends = ledger.backends()
    for backend in backends:
        timing = cells.timing_columns(shown, backend, ledger.batches(backend))
        suffix = f" {backend}" if len(backends) > 1 else ""
        columns += [Column(column.heading + suffix, column.cells) for column in timing]
    blocks += [table(columns + cells.exit_column(shown)), plain(cells.legend(ledger))]
    if len(backends) == 1:
        blocks[-1] += f" Backend: {plain(backends[0])}."
    if told := verdicts(ledger):
        blocks.append("\n".join(f"> **Note.** {plain(line)}  " for line in told))
    blocks += _points(report)
    if report.budgeted:
        blocks += [
            "## Anytime and budgeted batch",
            "Accuracy on test images if all leave at one exit, and along MSDNet's sweep (Huang et al. 2018, sec. 5): "
            "a share proportional to q^k leaves at exit k, at thresholds set on calibration images.",
            table(cells.protocol_columns(report)),
        ]
    standing = report.stands[report.here]
    if report.answerers and standing.right:
        blocks += [
            "## Who answers",
            "Which share of the test images each answered where the network stands, how many of these rightly; then "
            "what each would answer alone: its accuracy, and the share of all test images on which two answer alike.",
            table(cells.answerer_columns(report, standing)),
        ]
    if report.changing and report.standings:
        uses = [standing.use(place) for place in report.changing]
        blocks += [
            "## Gates",
            f"{cells.routings(report, standing)} Shares of the images on each path, and of the MACs that ran:",
            table(cells.unit_columns(uses)),
        ]
    if notes := cells.row_notes(ledger) + report.notes:
        blocks += ["## Notes", "\n".join(f"- {plain(note)}" for note in notes)]
    return "\n\n".join(filter(None, blocks)) + "\n"


def _points(report: ReportData) -> list[str]:
    """The operating points as measured, or else as calibration expects them."""
    if report.standings and report.operating_points:
        backends = report.ledger.backends()
        batches = report.ledger.batches(backends[0]) if backends else []
        told = "Measured on the test images, in the same rounds as the last row of the ledger"
        return [
            "## Operating points",
            table(cells.standing_columns(report, batches)),
            f"{told}; expected: from calibration images. ±: the longer arm of the 95 % interval.",
        ]
    if not report.operating_points:
        return []
    return [
        "## Operating points",
        table(cells.point_columns(report.operating_points)),
        "Expected values, from calibration images; ±: the longer arm of the 95 % interval.",
    ]


def _about(report: ReportData) -> str:
    ledger = report.ledger
    facts = {"model": ledger.model, "command": ledger.command, "machine": ledger.machine}
    return "\n".join(f"- {name}: `{value.replace('`', chr(39))}`" for name, value in facts.items() if value)


def table(columns: Sequence[Column]) -> str:
    """A padded pipe table, readable as plain text too."""
    grid = [[plain(column.heading), *map(plain, column.cells)] for column in columns]
    widths = [max(3, *map(len, texts)) for texts in grid]
    rules = ["-" * (width - c.right) + ":" * c.right for c, width in zip(columns, widths, strict=True)]
    lines = []
    for row in zip(*grid, strict=True):
        padded = zip(row, widths, columns, strict=True)
        lines.append([cell.rjust(width) if c.right else cell.ljust(width) for cell, width, c in padded])
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rules, *lines[1:]])


def plain(text: str) -> str:
    """Text that cannot break out of its cell or line."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
