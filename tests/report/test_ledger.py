"""The ledger: what it accepts, how it is kept, and its cells."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dynamize.errors import DynamizeError
from dynamize.report import Ledger, ReportData, Row, cells, headline


def with_row(ledger: Ledger, **changes: object) -> Ledger:
    """The static row and one row that differs from the calibrated one by `changes`."""
    changed = ledger.rows[4].model_dump() | {"step": 1, "transform": "gates"} | changes
    return Ledger(rows=[ledger.rows[0], Row.model_validate(changed)])


def test_file_is_a_list_of_rows_and_comes_back(ledger: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "out" / "ledger.json"
    ledger.write(path)
    rows = json.loads(path.read_text())
    assert [row["transform"] for row in rows] == ["static", "exits", "distill", "skip_gates", "calibrate"]
    assert set(rows[0]) == set(Row.model_fields)
    assert rows[4]["latency"]["onnxruntime"]["64"]["median_ms"] == pytest.approx(38.4 / 1.63)
    about = ledger.model_dump(include={"title", "model", "command", "backend", "machine"})
    assert Ledger.read(path, **about) == ledger
    assert os.listdir(path.parent) == ["ledger.json"]


def test_rows_of_older_versions_lack_size_and_memory(ledger: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    ledger.write(path)
    rows = [{k: v for k, v in row.items() if k not in ("size", "peak_memory")} for row in json.loads(path.read_text())]
    path.write_text(json.dumps(rows))
    old = Ledger.read(path)
    assert [row.accuracy for row in old.rows] == [row.accuracy for row in ledger.rows]
    assert [column.title for column in cells.size_columns(ledger)] == ["size", "memory"]
    assert cells.size_columns(old) == []
    assert "memory" not in cells.legend(old)
    mixed = Ledger(rows=[old.rows[0], *ledger.rows[1:]])
    assert [column.cells[0] for column in cells.size_columns(mixed)] == ["-", "-"]


def old_row(ledger: Ledger, **changes: object) -> dict[str, object]:
    """A row as the first version wrote it."""
    kept = ledger.rows[4].model_dump(mode="json", exclude={"decisions", "leaving"})
    return kept | {"step": 0, "exits": [0.4321, 0.3111, 0.2568]} | changes


def test_rows_of_older_versions_know_exits_only(ledger: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    path.write_text(json.dumps([old_row(ledger, exits=[]), old_row(ledger, step=1)]))
    static, row = Ledger.read(path).rows
    assert (static.decisions, static.leaving, static.exits) == ({}, [], [])
    assert row.leaving == ["exit.1", "exit.2"]
    assert row.decisions == {"exit.1": [0.4321, 0.5679], "exit.2": [0.3111, 0.2568]}
    assert row.exits == pytest.approx([0.4321, 0.3111, 0.2568])
    assert Row.model_validate(row.model_dump()) == row


@pytest.mark.parametrize(
    ("exits", "said"),
    [([0.5, 0.4], "add up to 0.9000"), (["most", 0.4], "exits: Extra inputs"), (0.5, "exits: Extra inputs")],
)
def test_impossible_rows_of_older_versions_are_refused(
    ledger: Ledger, tmp_path: Path, exits: object, said: str
) -> None:
    path = tmp_path / "ledger.json"
    path.write_text(json.dumps([old_row(ledger, exits=exits)]))
    with pytest.raises(DynamizeError, match=said):
        Ledger.read(path)


def test_an_exit_that_is_off_is_passed_unasked(ledger: Ledger) -> None:
    decisions = {"exit.1": [0.0, 0.0], "layer2.0": [0.3, 0.7], "exit.2": [0.25, 0.75], "layer3.0": [0.25, 0.5]}
    row = with_row(ledger, decisions=decisions, leaving=["exit.1", "exit.2"]).rows[1]
    assert row.exits == [0.0, 0.25, 0.75]


def test_reports_of_older_versions_keep_what_still_has_a_place(ledger: Ledger) -> None:
    mark = {"name": "exit 1", "macs": 1e6, "accuracy": 0.9, "accuracy_ci": None, "latency_ms": None}
    answerer = {"name": "small", "share": 1.0, "right": 0.9, "alone": 0.9, "alike": [1, 0.5]}
    given = {"ledger": ledger, "anytime": [mark], "answerers": [answerer], "gates": None, "usage": None, "gallery": []}
    report = ReportData.model_validate(given)
    assert [one.accuracy for one in report.anytime] == [0.9]
    assert report.answerers[0].alike == [1, 0.5]
    assert "--resume" in report.notes[0]
    assert [one.point for one in report.stands] == ["step 4, calibrate"]
    with pytest.raises(ValidationError, match="nonsense"):
        ReportData.model_validate({**given, "nonsense": 1})


def test_failed_write_keeps_the_old_file(ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.json"
    path.write_text("[]")

    def fail(source: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(DynamizeError, match="disk full"):
        ledger.write(path)
    assert path.read_text() == "[]"
    assert os.listdir(tmp_path) == ["ledger.json"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[{", "not valid JSON"),
        ("{}", "Input should be a valid list"),
        ('[{"step": 0}]', "row 0: transform: Field required"),
    ],
)
def test_bad_file_is_explained(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "ledger.json"
    path.write_text(text)
    with pytest.raises(DynamizeError, match=said) as caught:
        Ledger.read(path)
    assert str(path) in str(caught.value)
    assert "dynamize run" in str(caught.value)


def test_missing_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DynamizeError, match=r"No such file.*Name the ledger\.json"):
        Ledger.read(tmp_path / "ledger.json")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"decisions": {"exit.1": [0.5, 0.4]}, "leaving": ["exit.1"]}, "exit.1 add up to 0.9000, not to the 1.0000"),
        (
            {"decisions": {"a": [0.5, 0.5], "b": [0.4, 0.4]}, "leaving": ["a", "b"]},
            "b add up to 0.8000, not to the 0.5000",
        ),
        ({"decisions": {"layer1.0": [0.6, 0.5]}, "leaving": []}, "layer1.0 add up to 1.1000, more than 1"),
        ({"decisions": {}, "leaving": ["exit.1"]}, "'exit.1', which is not among the decisions"),
        ({"decisions": {"exit.1": [1.0]}, "leaving": ["exit.1"]}, "at least 2 items"),
        ({"exits": [0.5, 0.5]}, "Extra inputs"),
        ({"accuracy_ci": (0.9, 0.8)}, "upside down"),
        ({"accuracy": 93.0}, "less than or equal to 1"),
        ({"macs": float("nan")}, "finite"),
        ({"latency": {"onnxruntime": {"all": {"median_ms": 1, "p95_ms": 2}}}}, "not a whole number"),
        ({"flops": 3}, "Extra inputs"),
    ],
)
def test_impossible_row_is_refused(ledger: Ledger, changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        with_row(ledger, **changes)


def test_rows_start_with_the_static_network_and_rise(ledger: Ledger) -> None:
    with pytest.raises(ValidationError, match="must start at 0 and rise"):
        Ledger(rows=ledger.rows[1:])
    with pytest.raises(ValidationError, match="must start at 0 and rise"):
        Ledger(rows=[*ledger.rows, ledger.rows[2]])


def test_main_backend_comes_first(ledger: Ledger) -> None:
    timing = ledger.rows[4].latency["onnxruntime"]["1"]
    both = {"eager": {"128": timing, "16": timing}, "onnxruntime": {"1": timing}}
    rows = with_row(ledger, latency=both).rows
    rows[0] = rows[0].model_copy(update={"latency": {}})
    assert Ledger(rows=rows).backends() == ["eager", "onnxruntime"]
    assert Ledger(rows=rows, backend="onnxruntime").backends() == ["onnxruntime", "eager"]
    assert Ledger(rows=rows).batches("eager") == ["16", "128"]


def test_headline(ledger: Ledger) -> None:
    assert headline(ledger) == (
        "43 % fewer MACs; speed 1.49x at batch 1 and 1.63x at batch 64 in onnxruntime; accuracy 93.57 % to 93.27 %."
    )
    same = ledger.rows[-1].model_copy(update={"macs_ratio": 1.001})
    assert headline(Ledger(rows=[ledger.rows[0], same])).startswith("As many MACs; ")
    alone = Ledger(rows=ledger.rows[:1])
    assert headline(alone) == "The static network: accuracy 93.57 %; no step has been taken."
    with pytest.raises(DynamizeError, match="no rows"):
        headline(Ledger())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (999.6, "1.00k"),
        (853_018, "853k"),
        (999_700, "1.00M"),
        (9_996, "10.0k"),
        (25_557_032, "25.6M"),
        (4.11e9, "4.11G"),
    ],
)
def test_counts_have_three_digits(value: float, text: str) -> None:
    assert cells.count(value) == text


def test_sizes_are_in_bytes() -> None:
    found = [cells.size(value) for value in (0, 999, 3_423_080, 102_228_128, 1_500_000_000, None)]
    assert found == ["0 B", "999 B", "3.42 MB", "102 MB", "1.50 GB", "-"]


@given(st.floats(min_value=1, max_value=9.9e11))
def test_counts_are_short_and_right(value: float) -> None:
    text = cells.count(value)
    unit = {"G": 1e9, "M": 1e6, "k": 1e3}.get(text[-1], 1)
    assert len(text) <= 5
    assert float(text.rstrip("GMk")) * unit == pytest.approx(value, rel=0.006, abs=0.5)


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=9).filter(any))
def test_shares_add_up(weights: list[int]) -> None:
    exits = [weight / sum(weights) for weight in weights]
    whole = [int(part) for part in cells.shares(exits).split("/")]
    assert sum(whole) == 100
    assert all(abs(part - 100 * share) < 1 + 1e-9 for part, share in zip(whole, exits, strict=True))


def test_drop_has_a_sign_unless_it_is_nothing() -> None:
    assert [cells.drop(value) for value in (0.0012, -0.0012, -0.00001)] == ["+0.12", "-0.12", "0.00"]


def test_report_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom dynamize.report import html, markdown, terminal\n"
        "assert 'torch' not in sys.modules, 'heavy import'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
