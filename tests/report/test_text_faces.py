"""Terminal and Markdown: golden pages, and nothing lost at 80 columns."""

import io
import re
from pathlib import Path

import pytest
from ledgers import leaving
from rich.console import Console

from dynamize.calibration.operating import OperatingPoint
from dynamize.errors import DynamizeError
from dynamize.report import Answerer, Ledger, Place, ReportData, Row, Section, Standing, markdown, terminal

GOLDEN = Path(__file__).parent / "golden"


def on_terminal(report: ReportData, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    console.print(terminal.render(report))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def test_terminal_golden(report: ReportData) -> None:
    assert on_terminal(report) == (GOLDEN / "terminal-80.txt").read_text(encoding="utf-8")


def test_markdown_golden(report: ReportData) -> None:
    assert markdown.render(report) == (GOLDEN / "report.md").read_text(encoding="utf-8")


def hard_rows(ledger: Ledger) -> list[Row]:
    """Long names, many exits, big numbers, a second backend and a third batch."""
    timing = {"median_ms": 1234.5, "p95_ms": 2000.0}
    latency = {"onnxruntime": dict.fromkeys(("1", "8", "64"), timing), "eager": {"1": timing}}
    speedup = {"onnxruntime": dict.fromkeys(("1", "8", "64"), 7.25), "eager": {"1": 8.5}}
    hard = {
        "transform": "channel_groups_and_focus",
        "params": 25_557_032,
        "macs": 4.11e9,
        "accuracy": 0.8911,
        "accuracy_ci": (0.87, 0.9),
        "accuracy_drop": 0.1605,
        "latency": latency,
        "speedup": speedup,
        **leaving(0.2, 0.15, 0.25, 0.1, 0.05, 0.05, 0.12),
    }
    return [ledger.rows[0], Row.model_validate(ledger.rows[1].model_dump() | hard)]


def test_nothing_is_lost_at_80_columns(ledger: Ledger) -> None:
    text = on_terminal(ReportData(ledger=ledger.model_copy(update={"rows": hard_rows(ledger)})))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for cell in ("channel_", "groups_", "and_focus", "25.6M", "4.11G", "89.11", "2.11", "+16.05", "1234"):
        assert cell in text.split(), cell
    for shares in ("20/15/25/", "10/5/5/12/"):
        assert shares in text.split(), shares
    assert "ms and x: eager" in text
    assert "8.50" in text


@pytest.mark.parametrize("width", [50, 60, 72])
def test_narrow_terminal_splits_tables_and_no_number(report: ReportData, width: int) -> None:
    text, wide = on_terminal(report, width), on_terminal(report)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    numbers = re.compile(r"(?<=\s)[+-]?\d+\.\d\d?[MGk]?(?=\s)")
    assert set(numbers.findall(text)) >= set(numbers.findall(wide))


def test_static_ledger_has_no_exit_column_and_no_points(ledger: Ledger) -> None:
    alone = ReportData(ledger=Ledger(rows=ledger.rows[:1]))
    for text in (on_terminal(alone), markdown.render(alone)):
        assert "exits" not in text
        assert "Operating points" not in text
        assert "93.57" in text


def test_measured_points_stand_in_the_place_of_expected_ones(report: ReportData) -> None:
    for face in (on_terminal, markdown.render):
        measured, expected = face(report), face(report.model_copy(update={"standings": []}))
        assert "Measured on the test images" in " ".join(measured.split())
        assert "Expected values, from calibration images" in " ".join(expected.split())
        assert re.search(r"macs-0\.57.*93\.00", measured)
        assert re.search(r"macs-0\.57.*92\.90", expected)


def test_points_of_gates_without_exits_have_no_exit_column(ledger: Ledger, points: list[OperatingPoint]) -> None:
    alone = [point.model_copy(update={"exits": [1.0], "thresholds": {}}) for point in points]
    report = ReportData(ledger=Ledger(rows=ledger.rows[:1]), operating_points=alone)
    for text in (on_terminal(report), on_terminal(report, 50), markdown.render(report)):
        assert "exits" not in text
        assert "16.05" in text


def table_of_gates(ledger: Ledger, *gates: dict[str, tuple[float, float]]) -> list[list[str]]:
    """Cells of the Markdown table on gates, given as label -> (MACs, share of the images)."""
    sections, decisions = [], {}
    for number, gate in enumerate(gates):
        name, macs = f"a|{number}", [macs for macs, _ in gate.values()]
        place = Place(name=name, kind="any", effect="changes", options=[*gate], macs=macs, always=1.0)
        sections.append(Section(name=name, member="main", place=place))
        decisions[name] = [share for _, share in gate.values()]
    stand = Standing(**dict(ledger.rows[-1]) | {"decisions": decisions, "leaving": []}, point="here", routings=1)
    text = markdown.render(ReportData(ledger=ledger, standings=[stand], sections=sections, images=10))
    assert "took 1 way through the network." in text
    header, _, *rows = (line for line in text.split("## Gates")[1].splitlines() if line.startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in (header, *rows)]


def test_who_answers(ledger: Ledger) -> None:
    answerers = [Answerer(name="small", alone=0.8, alike=[1, 0.85]), Answerer(name="main", alone=0.9, alike=[0.85, 1])]
    stand = Standing(**dict(ledger.rows[-1]) | leaving(0.75), point="here", right=[0.9, None])
    told = markdown.render(ReportData(ledger=ledger, standings=[stand], answerers=answerers)).split("## Who answers")[1]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in told.splitlines() if line[:1] == "|"]
    assert cells[0] == ["", "answered %", "of these right %", "alone right %", "as small %", "as main %"]
    assert cells[2:4] == [
        ["small", "75.0", "90.00", "80.00", "-", "85.00"],
        ["main", "25.0", "-", "90.00", "85.00", "-"],
    ]
    assert "## Who answers" not in markdown.render(ReportData(ledger=ledger))


def test_options_of_one_label_stand_below_each_other(ledger: Ledger) -> None:
    assert table_of_gates(
        ledger,
        {"skipped": (10, 0.1), "whole": (100, 0.9)},
        {"one time": (30, 0.2), "two times": (60, 0.3), "whole": (90, 0.25)},
    ) == [
        ["gated unit", "MACs", "skipped %", "one time %", "two times %", "whole %", "left before %", "MACs run %"],
        ["a\\|0", "100", "10.0", "-", "-", "90.0", "0.0", "91.0"],
        ["a\\|1", "90", "-", "20.0", "30.0", "25.0", "25.0", "51.7"],
    ]


def test_many_labels_are_told_as_what_they_cost(ledger: Ledger) -> None:
    parts = (0.0, 0.11, 0.13, 0.3, 0.55, 0.6, 0.9)
    many = {f"{100 * part:.0f} % wide": (1000 * part, 0.1) for part in parts}
    head, *rows = table_of_gates(ledger, many | {"whole": (1000, 0.3)}, {"9 % wide": (9, 0.4), "whole": (100, 0.6)})
    quarters = ["little or nothing %", "about a quarter %", "about half %", "about three quarters %"]
    assert head == ["gated unit", "MACs", *quarters[:3], "all or nearly all %", "MACs run %"]
    assert rows == [
        ["a\\|0", "1.00k", "20.0", "20.0", "20.0", "40.0", "55.9"],
        ["a\\|1", "100", "40.0", "-", "-", "60.0", "63.6"],
    ]


def test_markdown_shows_every_backend(ledger: Ledger) -> None:
    text = markdown.render(ReportData(ledger=ledger.model_copy(update={"rows": hard_rows(ledger)})))
    header = next(line for line in text.splitlines() if line.startswith("|"))
    assert "x b8 onnxruntime" in header
    assert "ms b1 eager" in header
    tables = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert len(set(tables)) == 1


def test_markdown_text_cannot_break_a_table(ledger: Ledger) -> None:
    rows = [ledger.rows[0].model_copy(update={"transform": "a|b\nc <i>"})]
    text = markdown.render(ReportData(ledger=ledger.model_copy(update={"rows": rows})))
    assert "a\\|b c &lt;i>" in text


def test_empty_ledger_is_refused() -> None:
    with pytest.raises(DynamizeError, match="no rows"):
        terminal.render(ReportData(ledger=Ledger()))
    with pytest.raises(DynamizeError, match="no rows"):
        markdown.render(ReportData(ledger=Ledger()))
