"""Terminal and Markdown: golden pages, and nothing lost at 80 columns."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from dynamize.errors import DynamizeError
from dynamize.report import GateUse, Ledger, PathUse, Point, ReportData, Row, UnitUse, markdown, terminal

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
        "exits": [0.2, 0.15, 0.25, 0.1, 0.05, 0.05, 0.12, 0.08],
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


def test_points_of_gates_without_exits_have_no_exit_column(ledger: Ledger, points: list[Point]) -> None:
    alone = [point.model_copy(update={"exits": [1.0], "thresholds": []}) for point in points]
    report = ReportData(ledger=Ledger(rows=ledger.rows[:1]), operating_points=alone)
    for text in (on_terminal(report), on_terminal(report, 50), markdown.render(report)):
        assert "exits" not in text
        assert "16.05" in text


def test_neighbouring_widths_are_told_as_one(ledger: Ledger) -> None:
    paths = [
        PathUse(width=width, macs=macs, share=share)
        for width, macs, share in ((0.01, 1, 0.1), (0.33, 30, 0.2), (0.36, 40, 0.3), (0.99, 90, 0.1), (1, 100, 0.3))
    ]
    gates = GateUse(units=[UnitUse(label="a|b", paths=paths)], images=10, routings=1)
    text = markdown.render(ReportData(ledger=ledger, gates=gates))
    table = [line for line in text.split("## Gates")[1].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in (table[0], table[2])]
    assert cells == [
        ["gated unit", "MACs", "5 % wide %", "35 % wide %", "95 % wide %", "whole %", "MACs run %"],
        ["a\\|b", "100", "10.0", "50.0", "10.0", "30.0", "57.1"],
    ]
    assert "took 1 way through the network." in text


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


def test_points_may_be_objects_with_more_attributes(ledger: Ledger, points: list[Point]) -> None:
    class Other:
        extra = 1

        def __init__(self, point: Point) -> None:
            self.__dict__.update(point.model_dump())

    report = ReportData.model_validate({"ledger": ledger, "operating_points": [Other(p) for p in points]})
    assert report.operating_points == points


def test_empty_ledger_is_refused() -> None:
    with pytest.raises(DynamizeError, match="no rows"):
        terminal.render(ReportData(ledger=Ledger()))
    with pytest.raises(DynamizeError, match="no rows"):
        markdown.render(ReportData(ledger=Ledger()))
